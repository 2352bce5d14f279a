"""Where a model's transformer layers are, found by structure: no list of class names.

A layer is the item of an `nn.ModuleList` that holds one attention module, and an attention module is one whose forward
looks its kernel up in transformers' attention interface.
"""

import inspect

from torch import nn
from transformers import PreTrainedModel

from tokentune.attention import UnsupportedModelError

# Modules that mix tokens without the attention interface, recognized by a part of their class name or their base.
_TOKEN_MIXERS = (nn.Conv1d, nn.Conv2d, nn.RNNBase)


def uses_attention_interface(module: nn.Module) -> bool:
    """Whether the module's own forward asks transformers' attention interface for its kernel."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def attention_modules(module: nn.Module) -> list[nn.Module]:
    """All modules at or below `module` that send their attention through the interface."""
    return [child for child in module.modules() if uses_attention_interface(child)]


def transformer_layers(model: nn.Module) -> nn.ModuleList:
    """The one stack of layers that selective backpropagation works on.

    Raises:
        UnsupportedModelError: no such stack, several of them (encoder-decoders), layers without attention of the
            interface (state-space or convolution mixers), with two of them, or sharing their weights.
    """
    stacks = [
        (name, stack)
        for name, stack in model.named_modules()
        if isinstance(stack, nn.ModuleList) and any(attention_modules(layer) for layer in stack)
    ]
    # The innermost: a stack of groups of layers is not itself the stack of layers.
    stacks = [
        (name, stack)
        for name, stack in stacks
        if not any(other.startswith(f"{name}.") for other, _ in stacks if other != name)
    ]
    kind = type(model).__name__
    if not stacks:
        raise UnsupportedModelError(
            f"{kind} has no layers that send their attention through transformers' attention interface"
        )
    if len(stacks) > 1:
        names = ", ".join(name for name, _ in stacks)
        raise UnsupportedModelError(f"{kind} has several stacks of attention layers ({names}); one is served")
    name, stack = stacks[0]
    for index, layer in enumerate(stack):
        found = attention_modules(layer)
        where = f"layer {name}.{index} ({type(layer).__name__}) of {kind}"
        if len(found) != 1:
            what = ", ".join(sorted({type(child).__name__ for child in found})) or "none"
            raise UnsupportedModelError(
                f"{where} needs exactly one attention of the attention interface, found: {what}"
            )
        mixers = [child for child in layer.modules() if isinstance(child, _TOKEN_MIXERS)]
        if mixers:
            raise UnsupportedModelError(f"{where} mixes tokens in {type(mixers[0]).__name__}, outside of attention")
    if len({id(layer) for layer in stack}) != len(stack) or len(stack) != _layer_count(model):
        raise UnsupportedModelError(f"{kind} runs its layers in {name} more than once or not all of them")
    return stack


def _layer_count(model: PreTrainedModel) -> int:
    return model.config.get_text_config().num_hidden_layers
