"""Which part of a model each trained weight belongs to: its layer, and the kind of module it stands in."""

from typing import NamedTuple

from torch import nn

from tokentune.core.layers import inner_model, transformer_layers
from tokentune.core.saved_tensors.breakdown import ATTENTION as IN_ATTENTION
from tokentune.core.saved_tensors.breakdown import kinds_of_modules

# Names of an attention's projections in transformers, by what comes out of them.
_PROJECTIONS = {
    "q": ("q_proj", "query", "q_lin", "q_a_proj", "q_b_proj"),
    "k": ("k_proj", "key", "k_lin"),
    "v": ("v_proj", "value", "v_lin"),
    "o": ("o_proj", "out_proj", "out_lin", "dense", "c_proj", "Wo"),
    "qkv": ("qkv_proj", "query_key_value", "c_attn", "Wqkv"),
}
KIND_OF_PROJECTION = {name: f"attention {letters}" for letters, names in _PROJECTIONS.items() for name in names}
ATTENTION, MLP, NORMS, EMBEDDINGS, HEAD, OTHER = "attention, other", "mlp", "norms", "embeddings", "head", "other"
# In the order of a report; adapters come last, by the module that they adapt.
KINDS = (EMBEDDINGS, *(f"attention {letters}" for letters in _PROJECTIONS), ATTENTION, MLP, NORMS, HEAD, OTHER)


class Part(NamedTuple):
    layer: int | None  # None outside of the layers
    kind: str  # one of `KINDS`, or "adapter of" and a module's name


def parts_of(model: nn.Module) -> dict[str, Part]:
    """The part of every trained weight, by the weight's name, in the model's order.

    Output embeddings that are the input's are counted as "embeddings", once.

    Args:
        model: a transformers model or a peft model around one, which TokenTune serves.
    """
    core = inner_model(model)
    layers = transformer_layers(core).layers
    layer_of = {id(module): index for index, layer in enumerate(layers) for module in layer.modules()}
    kinds = kinds_of_modules(core)
    head = core.get_output_embeddings()
    in_head = set() if head is None else {id(module) for module in head.modules()}
    modules = dict(model.named_modules())
    parts = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        path = name.split(".")[:-1]
        owner = modules[".".join(path)]
        kind = _kind(path, owner, inside=id(owner) in layer_of, attention=kinds.get(id(owner)) == IN_ATTENTION)
        if kind == OTHER and id(owner) in in_head:
            kind = HEAD
        parts[name] = Part(layer_of.get(id(owner)), kind)
    return parts


def _kind(path: list[str], owner: nn.Module, *, inside: bool, attention: bool) -> str:
    """`path`: names from the model down to the module that owns the weight."""
    lora = next((place for place, name in enumerate(path) if name.startswith("lora_")), None)
    if lora is not None:
        return f"adapter of {path[lora - 1]}"
    if "norm" in type(owner).__name__.lower():
        return NORMS
    if isinstance(owner, nn.Embedding) or "Embedding" in type(owner).__name__:
        return EMBEDDINGS
    if attention:
        return next((KIND_OF_PROJECTION[name] for name in reversed(path) if name in KIND_OF_PROJECTION), ATTENTION)
    return MLP if inside else OTHER


def kinds_in_order(kinds: set[str]) -> list[str]:
    """Kinds as a report lists them."""
    return [kind for kind in KINDS if kind in kinds] + sorted(kinds - set(KINDS))
