"""A tiny copy of a model that computes in the same way, and a context to try it in without side effects.

It has the same class and head, the same options and every kind of layer, but few layers, heads, experts and words.
Whatever depends on distance in the sequence (windows, chunks, scales that change with the position) is reduced to a few
tokens, so that a short batch reaches it.
"""

import copy
import random
import re
import warnings
from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy
import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel

from tokentune.core.layers import transformer_layers
from tokentune.errors import UnsupportedModelError

MOST_PARAMETERS = 100_000_000  # a larger copy is not tiny: some size in its configuration has an unknown name
_MODEL_CODE = ("transformers.models.", "transformers.activations", "transformers_modules.")
_HEADS = 4
_HIDDEN = 80
_MOST = {
    name: size
    for size, names in (
        (97, "vocab_size"),
        (48, "intermediate_size intermediate_size_mlp ffn_dim n_inner hidden_dim"),
        (24, "moe_intermediate_size shared_expert_intermediate_size q_lora_rank"),
        (16, "kv_lora_rank"),  # of latent attention, as q_lora_rank; its head sizes do not change
        (4, "num_experts num_local_experts n_routed_experts"),
        (2, "num_experts_per_tok n_group"),
        (1, "topk_group"),
        # Other towers of a multimodal model, which text alone does not reach.
        (48, "out_hidden_size"),
        (2, "depth vision_layers encoder_layers"),
    )
    for name in names.split()
}
# Numbers of tokens: what happens beyond them has to happen within a short batch.
_REACH = re.compile(
    r"window(_size)?$|chunk_size$|block_size$|^local_attention$|floor_scale$|^original_max_position_embeddings$"
)
_MOST_REACH = 5
_CHANCE = re.compile(r"drop|jitter")
_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")


class Float64(TorchFunctionMode):
    """Turns casts to float32 inside a model's own code into casts to float64, so that rounding hides no error."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {k: torch.float64 if value is torch.float32 else value for k, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Within it, models are built and run on the CPU with fixed seeds. Random states, modes and messages are restored.

    Generators of accelerators are not seeded: that would initialize every device.
    """
    with ExitStack() as undo:
        undo.callback(random.setstate, random.getstate())
        undo.callback(numpy.random.set_state, numpy.random.get_state())
        undo.callback(torch.set_rng_state, torch.get_rng_state())
        undo.callback(torch.set_default_dtype, torch.get_default_dtype())
        undo.callback(transformers.logging.set_verbosity, transformers.logging.get_verbosity())
        random.seed(0)
        numpy.random.seed(0)
        torch.default_generator.manual_seed(0)
        torch.set_default_dtype(torch.float32)
        transformers.logging.set_verbosity_error()
        own_modes = torch.device("cpu"), torch.inference_mode(False), torch.enable_grad()
        for mode in (*own_modes, torch.autocast("cpu", enabled=False), warnings.catch_warnings(action="ignore")):
            undo.enter_context(mode)
        yield


def tiny_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A float64 model of the same class, head and options with random weights, in training mode.

    The given model's weights are not used: they may be on the meta device, quantized or adapted.
    Raises UnsupportedModelError when some kind of layer is missing in the copy, or the copy is not small.
    """
    layers = transformer_layers(model).layers
    kinds = [kinds_of(layer) for layer in layers]
    config = tiny_config(model.config, _prefix_with_all(kinds))
    vars(config).pop("quantization_config", None)
    config._experts_implementation = "eager"  # fused ones have no float64, and experts act on each token alone
    eager = transformer_layers(model).backbone.config._attn_implementation == "eager"
    with torch.device("meta"):
        size = sum(p.numel() for p in type(model)._from_config(copy.deepcopy(config)).parameters())
    name = type(model).__name__
    if size > MOST_PARAMETERS:
        raise UnsupportedModelError(f"no small copy of {name} can be made to verify it: {size:,} parameters are left")
    with Float64():
        tiny = type(model)._from_config(config, attn_implementation="eager" if eager else "sdpa", dtype=torch.float64)
    for module in tiny.modules():
        if isinstance(module, nn.Dropout):  # some heads have one that the configuration cannot turn off
            module.p = 0.0
    with torch.no_grad():
        for parameter in tiny.parameters():
            noise = torch.randn_like(parameter)
            # Weights large enough for every path to matter; vectors (norms, biases) near their initial values.
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else parameter + 0.1 * noise)
    present = map(kinds_of, transformer_layers(tiny).layers)
    if missing := sorted(frozenset().union(*kinds) - frozenset().union(*present)):
        raise UnsupportedModelError(f"the small copy of {name} lacks a part of its layers: {missing[0]}")
    return tiny.train()


def kinds_of(layer: nn.Module) -> frozenset[str]:
    """What distinguishes a layer from others of its model: the classes of its parts, with their switches.

    A switch is an attribute that is true or false, a word, or absent (None). Numbers are sizes, which a copy changes.
    Modules that are not model code (adapters, quantized projections) do not count.
    """
    kinds = set()
    for module in layer.modules():
        if type(module).__module__.startswith(_MODEL_CODE):
            switches = [
                f"{name}={value}"
                for name, value in sorted(vars(module).items())
                if (value is None or isinstance(value, bool | str))
                and not (name.startswith("_") or name in ("training", "gradient_checkpointing"))
            ]
            kinds.add(f"{type(module).__name__}({', '.join(switches)})")
    return frozenset(kinds)


def _prefix_with_all(kinds: list[Hashable]) -> int:
    """The number of first layers that contain every kind."""
    return max((kinds.index(kind) + 1 for kind in set(kinds)), default=0)


def tiny_config(config: PreTrainedConfig, layers: int = 0) -> PreTrainedConfig:
    """A copy with few layers (at least `layers`), heads, experts and words; whatever changes the computation stays.

    Head sizes are kept (rotary tables depend on them), as is whether heads are grouped; dropout is turned off.
    """
    config = copy.deepcopy(config)
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))):
        if isinstance(part, PreTrainedConfig):
            _shrink(part, layers)
    return config


def _shrink(config: PreTrainedConfig, layers: int) -> None:
    depth = getattr(config, "num_hidden_layers", None)
    kept = (
        None
        if depth is None
        else min(depth, max(3, layers, _prefix_with_all(getattr(config, "layer_types", None) or [])))
    )
    for name, value in list(vars(config).items()):
        if isinstance(value, int | float) and not isinstance(value, bool) and _CHANCE.search(name):
            setattr(config, name, type(value)(0))
    if depth is not None:
        cut_layers(config, kept)
    heads = next((name for name in ("num_attention_heads", "num_heads") if getattr(config, name, None)), None)
    if heads:
        _shrink_heads(config, heads)
    for name, size in _MOST.items():
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(size, getattr(config, name)))
    _shorten_reach(vars(config))
    if "dynamic" in str(getattr(config, "rope_parameters", None)):  # one rope type, or one for each kind of layer
        longest = config.max_position_embeddings
        config.max_position_embeddings = min(longest, _MOST_REACH)  # beyond it frequencies change
    for name in _TOKEN_IDS:
        if getattr(config, name, None) is not None:
            setattr(config, name, 0)
    if isinstance(getattr(config, "image_size", None), int) and isinstance(getattr(config, "patch_size", None), int):
        config.image_size = 4 * config.patch_size


def per_layer(config: PreTrainedConfig) -> dict[str, list | tuple]:
    """What a configuration lists layer by layer, such as `layer_types`, by name."""
    depth = config.num_hidden_layers
    return {n: value for n, value in vars(config).items() if isinstance(value, list | tuple) and len(value) == depth}


def cut_layers(config: PreTrainedConfig, kept: int) -> None:
    """Leaves the first `kept` layers of a configuration, in place."""
    for name, value in per_layer(config).items():
        setattr(config, name, type(value)(value[:kept]))
    config.num_hidden_layers = kept


def _shrink_heads(config: PreTrainedConfig, name: str) -> None:
    """Four heads of the same size. The hidden size follows them, unless the model sets it independently."""
    tower = hasattr(config, "embed_dim") and not hasattr(config, "vocab_size")  # its hidden size is that of its output
    width = "embed_dim" if tower else "hidden_size"
    if not getattr(config, width, None):
        return
    heads, groups = getattr(config, name), getattr(config, "num_key_value_heads", None)
    head_size = getattr(config, "head_dim", None) or getattr(config, width) // heads
    apart = getattr(config, "head_dim", None) is not None and head_size * heads != getattr(config, width)
    setattr(config, name, _HEADS)
    if groups is not None:
        config.num_key_value_heads = _HEADS if groups == heads else 1 if groups == 1 else 2
    setattr(config, width, _HIDDEN if apart else _HEADS * head_size)


def _shorten_reach(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, dict):
            _shorten_reach(value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and _REACH.search(name):
            values[name] = min(value, type(value)(_MOST_REACH))
