"""Which of peft's adapters act on each token alone, as the two groups of a selective forward need it.

The verification of a model does not cover adapters, which are added before or after it. Their kind is told by the
module of their code (`peft.tuners.<kind>`). `test_adapter_kinds.py` compares each served kind with the definition
of the method, and finds new kinds in a new version of peft.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from tokentune.errors import UnsupportedModelError

# fmt: off
SERVED = {
    "adalora", "adamss", "adaption_prompt", "beft", "boft", "c3a", "deft", "delora", "fourierft", "frod", "glora",
    "gralora", "hira", "hra", "ia3", "ln_tuning", "loha", "lokr", "lora", "miss", "mixed", "oft", "osf", "peanut",
    "psoft", "pvera", "randlora", "road", "shira", "supertuning", "tinylora", "trainable_tokens", "unilora", "vblora",
    "vera", "waveft",
}
# fmt: on
_CHANCE = "draws weights anew in each pass, of which a selective forward makes two"
REFUSED = {
    "lily": "mixes its experts by the mean over all tokens, of which each group has a part",
    "poly": _CHANCE,
    "shadow": "hands the states of a network of its own from layer to layer",
    "xlora": "runs the model a second time to weigh its adapters",
}
ACTIVATED = "ALoraLinearVariant"  # served by `core/activated_lora.py`
# Variants of LoRA, by their class in peft.
_VARIANTS = {
    "MontecloraLinearVariant": f"{_CHANCE} (monteclora_config)",
    "VeloraLinearVariant": "projects by the mean over all tokens, of which each group has a part (velora_config; "
    'init_type="random" does not)',
}


@dataclass(frozen=True)
class Suspect:
    """A module with an adapter that cannot be served."""

    name: str
    module: nn.Module
    adapter: str | None  # None: any of the module's
    reason: str

    def is_active(self) -> bool:
        if getattr(self.module, "disable_adapters", False) or getattr(self.module, "merged", False):
            return False
        return self.adapter is None or self.adapter in getattr(self.module, "active_adapters", [])


def wrapper_bypassing_hooks(model: nn.Module) -> nn.Module | None:
    """The peft module around a model, where it calls the model's `forward`, past its hooks (AdaLoRA does)."""
    tuner = getattr(model, "base_model", None) if hasattr(model, "get_base_model") else None
    if tuner is None or not isinstance(getattr(tuner, "model", None), nn.Module):
        return None
    calls = getattr(getattr(type(tuner), "forward", None), "__code__", None)
    return tuner if "forward" in vars(tuner) or (calls is not None and "forward" in calls.co_names) else None


def unserved_adapters(model: nn.Module, *, trust_unknown: bool) -> list[Suspect]:
    """The modules whose adapters cannot be served, active or not; `trust_unknown`: accept kinds never compared."""
    return [
        Suspect(name, module, adapter, reason)
        for name, module in model.named_modules()
        for adapter, reason in _reasons(module, trust_unknown)
    ]


def require_served_adapters(suspects: list[Suspect]) -> None:
    """Raises UnsupportedModelError where one of them is active."""
    suspect = next((suspect for suspect in suspects if suspect.is_active()), None)
    if suspect is not None:
        raise UnsupportedModelError(
            f"the adapter at {suspect.name} ({type(suspect.module).__name__}) {suspect.reason}: it cannot be trained "
            "with a selection"
        )


def activated_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with an adapter of peft's activated LoRA, active or not, by their paths."""
    return {name: module for name, module in model.named_modules() if activated_variants([module])}


def activated_variants(modules: Iterable[nn.Module]) -> list[Any]:
    """What adds these adapters to the outputs of their layers."""
    variants = [variant for module in modules for _, variant in _items(module, "lora_variant")]
    return [variant for variant in variants if type(variant).__name__ == ACTIVATED]


def _reasons(module: nn.Module, trust_unknown: bool) -> Iterator[tuple[str | None, str]]:
    # X-LoRA replaces the forward method of LoRA's layers.
    for part in (module, getattr(module.forward, "__self__", module)):
        kind = _kind(part)
        if kind in REFUSED:
            yield None, REFUSED[kind]
        elif kind is not None and kind not in SERVED and not trust_unknown:
            yield None, f"is of a kind ({kind}) that was never compared with the definition (verify=False trusts it)"
    if _kind(module) is None:
        return
    for adapter, variant in _items(module, "lora_variant"):
        reason = _VARIANTS.get(type(variant).__name__)
        if reason is not None and dict(_items(module, "lora_velora_init_type")).get(adapter) != "random":
            yield adapter, reason
    for name in ("rank_dropout", "module_dropout", "oft_dropout", "boft_dropout"):
        for adapter, dropout in _items(module, name):
            # LoHa and LoKr store the probability itself; OFT and BOFT store a module.
            if dropout if isinstance(dropout, int | float) else getattr(dropout, "p", 0):
                yield adapter, f"{_CHANCE} ({name} above 0)"


def _kind(part: Any) -> str | None:
    home = type(part).__module__.split(".")
    return home[2] if home[:2] == ["peft", "tuners"] and len(home) > 3 else None


def _items(module: nn.Module, name: str) -> list[tuple[str, Any]]:
    values = getattr(module, name, None)
    return list(values.items()) if hasattr(values, "items") else []
