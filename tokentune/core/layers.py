"""Where a model's transformer layers are, found by structure: no list of class names.

A layer is the item of an `nn.ModuleList` that holds one attention module, and an attention module is one whose forward
looks its kernel up in transformers' attention interface.
"""

import inspect
from dataclasses import dataclass

from torch import nn
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


def uses_attention_interface(module: nn.Module) -> bool:
    """Whether the module's own forward asks transformers' attention interface for its kernel."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def attention_modules(module: nn.Module) -> list[nn.Module]:
    """All modules at or below `module` that send their attention through the interface."""
    return [child for child in module.modules() if uses_attention_interface(child)]


def transformer_layers(model: PreTrainedModel) -> Stack:
    """The one stack of layers of a model; of a model with a language model inside (vision-language), that one's.

    Raises:
        UnsupportedModelError: no such stack, several of them (encoder-decoders), layers without attention of the
            interface (state-space or convolution mixers) or with two of them.
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
    backbone = [
        module
        for prefix, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and (prefix == "" or name.startswith(f"{prefix}."))
    ][-1]
    if "deepstack_visual_embeds" in inspect.signature(type(backbone).forward).parameters:
        raise UnsupportedModelError(f"{kind} adds image features to the hidden states between its layers")
    around = [module for prefix, module in model.named_modules() if prefix == "" or name.startswith(f"{prefix}.")]
    return Stack(layers, backbone, _layer_calls(backbone, layers, kind), _configs(backbone, layers), around)


def _configs(backbone: PreTrainedModel, layers: nn.ModuleList) -> list[PreTrainedConfig]:
    found: list[PreTrainedConfig] = []
    for module in (backbone, *attention_modules(layers)):
        config = getattr(module, "config", None)
        if config is None:
            raise UnsupportedModelError(f"{type(module).__name__} has no configuration to name its attention in")
        if not any(config is known for known in found):
            found.append(config)
    return found


def _innermost_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Module lists whose items hold attention, by name, without lists of such lists."""
    stacks = {
        name: stack
        for name, stack in model.named_modules()
        if isinstance(stack, nn.ModuleList) and any(attention_modules(layer) for layer in stack)
    }
    return {name: stack for name, stack in stacks.items() if not any(other.startswith(f"{name}.") for other in stacks)}


def _check_layer(layer: nn.Module, where: str) -> None:
    mixers = [
        child
        for child in layer.modules()
        if isinstance(child, _MIXER_TYPES) or any(part in type(child).__name__ for part in _MIXER_NAMES)
    ]
    if mixers:
        raise UnsupportedModelError(f"{where} mixes tokens in {type(mixers[0]).__name__}, outside of attention")
    for child in layer.modules():
        # A whole residual branch dropped or not, per sequence: the two groups would each throw their own dice.
        if "DropPath" in type(child).__name__ and getattr(child, "drop_prob", 1.0):
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
