"""Which part of a model each trained weight belongs to: its layer, and the kind of module that it stands in."""

from typing import NamedTuple

from torch import nn

from tokentune.core.layers import inner_model, transformer_layers
from tokentune.core.saved_tensors import breakdown
from tokentune.core.saved_tensors.breakdown import EMBEDDINGS, MLP, NORMS

# Names of an attention's projections in transformers, by what they give.
_PROJECTIONS = {
    "q": ("q_proj", "query", "q_lin", "q_a_proj", "q_b_proj"),
    "k": ("k_proj", "key", "k_lin"),
    "v": ("v_proj", "value", "v_lin"),
    "o": ("o_proj", "out_proj", "out_lin", "dense", "c_proj", "Wo"),
    "qkv": ("qkv_proj", "query_key_value", "c_attn", "Wqkv"),
}
_KIND_OF_PROJECTION = {name: f"attention {letters}" for letters, names in _PROJECTIONS.items() for name in names}
ATTENTION, HEAD, OTHER = "attention, other", "head", "other"
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
    layer_of = {module: index for index, layer in enumerate(layers) for module in layer.modules()}
    kinds = breakdown.kinds_of_modules(core)
    head = core.get_output_embeddings()
    outside = dict.fromkeys([] if head is None else head.modules(), HEAD)

    def kind(path: str, owner: nn.Module) -> str:
        before, adapter, _ = path.partition(".lora_")
        if adapter:
            return f"adapter of {before.rpartition('.')[2]}"
        if "norm" in type(owner).__name__.lower():
            return NORMS
        if isinstance(owner, nn.Embedding) or "Embedding" in type(owner).__name__:
            return EMBEDDINGS
        if kinds.get(id(owner)) == breakdown.ATTENTION:
            names = reversed(path.split("."))
            return next((_KIND_OF_PROJECTION[name] for name in names if name in _KIND_OF_PROJECTION), ATTENTION)
        return MLP if owner in layer_of else outside.get(owner, OTHER)

    owners = {name: name.rpartition(".")[0] for name, weight in model.named_parameters() if weight.requires_grad}
    modules = dict(model.named_modules())
    return {name: Part(layer_of.get(modules[path]), kind(path, modules[path])) for name, path in owners.items()}


def kinds_in_order(kinds: set[str]) -> list[str]:
    """Kinds as a report lists them."""
    return [kind for kind in KINDS if kind in kinds] + sorted(kinds - set(KINDS))
