"""The transformer layers of a model, found by structure and not by class names; and the arguments they are called with.

    B sequences, S tokens

A layer is an item of an `nn.ModuleList` that holds one attention module. An attention module is one whose forward gets
its kernel from transformers' attention interface.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from tokentune.errors import UnsupportedModelError

# What mixes tokens in a layer without asking the attention interface. Class names' parts, for what is no torch module.
_MIXER_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase, nn.modules.batchnorm._BatchNorm)
_MIXER_NAMES = ("Mamba", "ShortConv", "DeltaNet", "LinearAttention", "Indexer", "Lightning")


@dataclass
class Stack:
    """The layers that selective backpropagation works on, and the model around them."""

    layers: nn.ModuleList
    backbone: PreTrainedModel  # the innermost model that holds the layers: it makes the masks
    calls: int  # of layers in one forward pass
    configs: list[PreTrainedConfig]  # the distinct ones that name the attention of masks and layers
    around: list[nn.Module]  # the modules that contain the layers, outermost first


def inner_model(model: nn.Module) -> nn.Module:
    """The transformers model inside peft's wrapper; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_checkpointed(module: nn.Module) -> bool:
    """Whether gradient checkpointing is enabled on the module, and at work."""
    return module.training and getattr(module, "gradient_checkpointing", False)


def attention_modules(module: nn.Module) -> list[nn.Module]:
    """All modules at or below `module` whose own forward asks transformers' attention interface for its kernel."""
    codes = ((child, getattr(inspect.unwrap(type(child).forward), "__code__", None)) for child in module.modules())
    return [child for child, code in codes if code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names]


def transformer_layers(model: PreTrainedModel) -> Stack:
    """The one stack of layers of a model; of a model with a language model inside (vision-language), that one's.

    Raises UnsupportedModelError for none, several of them (encoder-decoders), and layers that mix tokens otherwise.
    """
    kind = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{kind} is an encoder-decoder: one stack of self-attention layers is served")
    stacks = _innermost_stacks(model)
    if len(stacks) > 1 and model.can_generate():
        decoder = model.get_decoder()
        inside = {id(module) for module in decoder.modules()}
        stacks = {name: stack for name, stack in stacks.items() if id(stack) in inside}
    if not stacks:
        raise UnsupportedModelError(
            f"{kind} has no layers that send their attention through transformers' attention interface"
        )
    if len(stacks) > 1:
        raise UnsupportedModelError(f"{kind} has several stacks of attention layers ({', '.join(stacks)}), not one")
    (name, layers), *_ = stacks.items()
    for index, layer in enumerate(layers):
        _check_layer(layer, f"layer {name}.{index} ({type(layer).__name__}) of {kind}")
    if getattr(model.config, "layerdrop", 0):
        raise UnsupportedModelError(f"{kind} skips layers at random in training: set config.layerdrop to 0")
    around = [module for prefix, module in model.named_modules() if prefix == "" or name.startswith(f"{prefix}.")]
    backbone = [module for module in around if isinstance(module, PreTrainedModel)][-1]
    if "deepstack_visual_embeds" in inspect.signature(type(backbone).forward).parameters:
        raise UnsupportedModelError(f"{kind} adds image features to the hidden states between its layers")
    return Stack(layers, backbone, _layer_calls(backbone, layers, kind), _configs(backbone, layers), around)


def _configs(backbone: PreTrainedModel, layers: nn.ModuleList) -> list[PreTrainedConfig]:
    found: dict[int, PreTrainedConfig] = {}  # by id: equal ones are not the same one
    for module in (backbone, *attention_modules(layers)):
        config = getattr(module, "config", None)
        if config is None:
            raise UnsupportedModelError(f"{type(module).__name__} has no configuration to name its attention in")
        found[id(config)] = config
    return list(found.values())


def _innermost_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Module lists whose items hold attention, by name, without lists of such lists."""
    stacks = {
        name: stack
        for name, stack in model.named_modules()
        if isinstance(stack, nn.ModuleList) and any(attention_modules(layer) for layer in stack)
    }
    return {name: stack for name, stack in stacks.items() if not any(other.startswith(f"{name}.") for other in stacks)}


def _check_layer(layer: nn.Module, where: str) -> None:
    for child in layer.modules():
        kind = type(child).__name__
        if isinstance(child, _MIXER_TYPES) or any(part in kind for part in _MIXER_NAMES):
            raise UnsupportedModelError(f"{where} mixes tokens in {kind}, outside of attention")
        # A whole residual branch dropped or not, per sequence: each of the two groups would draw for itself.
        if "DropPath" in kind and getattr(child, "drop_prob", 1.0):
            raise UnsupportedModelError(f"{where} drops whole branches at random: set config.drop_path_rate to 0")
    found = attention_modules(layer)
    if len(found) != 1:
        what = ", ".join(sorted({type(child).__name__ for child in found})) or "none"
        raise UnsupportedModelError(f"{where} needs exactly one attention of the attention interface, found: {what}")
    if "shared_kv_states" in inspect.signature(type(found[0]).forward).parameters:
        raise UnsupportedModelError(
            f"{where} shares keys and values with other layers, which each group would overwrite"
        )


def _layer_calls(backbone: PreTrainedModel, layers: nn.ModuleList, kind: str) -> int:
    """Layer calls of one forward pass: one per layer, or more where layers are shared (ALBERT)."""
    depth = backbone.config.get_text_config().num_hidden_layers
    if len(layers) == depth:
        return depth
    if len(layers) == getattr(backbone.config, "inner_group_num", None):
        return depth * len(layers)
    raise UnsupportedModelError(f"{kind} has {len(layers)} layers where its configuration counts {depth}")


# ------------------------------------------------------------------------------------------------ the layers' arguments
#
# Which arguments of a layer have a row per token? A shape alone does not tell: a table of 64 numbers looks like one row
# per token wherever a batch is 64 tokens long. So the tiny copy of the verification runs at two lengths. An argument
# has a row per token where its second dimension is the length both times.


def map_tensors(value: Any, function: Callable[[Tensor, str], Any], path: str = "") -> Any:
    """`value` with `function(tensor, path)` in place of each tensor in it; a path is `position_embeddings.0`."""
    if isinstance(value, Tensor):
        return function(value, path)
    if isinstance(value, tuple | list):
        items = [map_tensors(item, function, f"{path}.{place}".lstrip(".")) for place, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: map_tensors(item, function, f"{path}.{key}".lstrip(".")) for key, item in value.items()}
    return value


def has_row_per_token(tensor: Tensor, batch: int, length: int) -> bool:
    """Whether its shape is that of numbers per token, (B or 1, S, ...). A mask (B, H, S, S) is left to attention."""
    mask = tensor.ndim == 4 and tensor.shape[2:] == (length, length)
    return tensor.ndim >= 2 and tensor.shape[1] == length and tensor.shape[0] in (1, batch) and not mask


def arguments_per_token(stack: Stack, run: Callable[[int], Any], batch: int, lengths: Sequence[int]) -> dict[str, bool]:
    """Of each tensor among the layers' arguments, by its path, whether it has a row per token.

    `run` is a forward pass of a batch of so many tokens; images have a length of their own, that of the hidden states.
    """
    found: dict[str, set[bool]] = {}

    def record(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())

        def note(tensor: Tensor, path: str) -> None:
            found.setdefault(path, set()).add(has_row_per_token(tensor, batch, hidden.shape[1]))

        map_tensors(args, note)
        map_tensors(kwargs, note)

    with ExitStack() as handles:
        for layer in stack.layers:
            handles.enter_context(layer.register_forward_pre_hook(record, with_kwargs=True))
        for length in lengths:
            run(length)
    return {path: answers == {True} for path, answers in found.items()}
