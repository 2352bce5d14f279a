"""What a patched model remembers: how it behaves, and its last draw."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tokentune.core.compat.adapters import Suspect
from tokentune.core.layers import Stack
from tokentune.core.loss import CHUNK_BYTES
from tokentune.core.profile import Profile
from tokentune.core.scoring_pass import ScoringOptions
from tokentune.core.step_plan import DrawCounts
from tokentune.errors import UnsupportedModelError

PROMPT_LEARNING = "peft's prompt learning puts tokens in front that selected positions do not count"
SETTINGS = "_tokentune"  # the attribute of a patched model that holds its Settings
SETTINGS_OF_OWNER = "_tokentune_of_owner"  # likewise, of the model inside that holds the layers


@dataclass
class Settings:
    """How a patched model behaves; kept on the model, so that a deep copy has it too."""

    prefix_length: int | float | None
    strategy: str
    profile: Profile
    stack: Stack
    checkpoint_rest: str = "auto"
    offload_kv: bool = False
    chunked_loss: bool | None = None
    chunk_bytes: int = CHUNK_BYTES
    scoring: ScoringOptions | None = None
    needs: tuple[str, ...] = ()  # the scores that the strategy needs
    gradient_correction: float = 0.0
    verify: bool = True  # whether the model was compared, and its adapters are to be of a kind that was
    adapters: list[Suspect] = field(default_factory=list)  # that cannot be served, active ones or not
    adapters_of: tuple[int, ...] = ()  # the adapters' configurations that were looked at for these
    undo: list[Callable[[], None]] = field(default_factory=list)  # what ends the step under way, last first
    finish: Callable[[Any], None] | None = None  # what the output of the step under way still needs
    counts: DrawCounts | None = None  # of the last draw


def settings_of(owner: nn.Module) -> Settings | None:
    """How a patched model behaves; None: it is not patched."""
    return getattr(owner, SETTINGS, None)


def set_prefix_length(model: nn.Module, prefix_length: int | float) -> None:
    """Changes how many tokens a patched model selects that draws itself, as for a schedule over training."""
    getattr(owner_of(model), SETTINGS).prefix_length = prefix_length


def last_draw(model: nn.Module) -> DrawCounts | None:
    """The last selection that a patched model drew itself, in numbers; None where it drew none yet."""
    return getattr(owner_of(model), SETTINGS).counts


def reference_of(model: nn.Module) -> PreTrainedModel | None:
    """The second model that a patched model compares losses with, where it does."""
    settings: Settings | None = getattr(owner_of(model), SETTINGS, None)
    return None if settings is None or settings.scoring is None else settings.scoring.reference


def profile_of(model: nn.Module) -> Profile:
    """What was found out about a model when it was patched: the token that its head pools, the rows that it needs."""
    return getattr(owner_of(model), SETTINGS).profile


def owner_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside whatever peft or `torch.compile` wraps around it."""
    model = getattr(model, "_orig_mod", model)
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise UnsupportedModelError(PROMPT_LEARNING)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(f"a transformers or peft model is needed, not {type(inner).__name__}")
    return inner
