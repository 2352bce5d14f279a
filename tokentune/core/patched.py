"""What a patched model stores: its settings, and its last draw."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from tokentune.core.compat.adapters import Suspect
from tokentune.core.layers import Stack, inner_model
from tokentune.core.loss import CHUNK_BYTES
from tokentune.core.profile import Profile
from tokentune.core.scoring_pass import ScoringOptions
from tokentune.core.step_plan import DrawCounts
from tokentune.errors import UnsupportedModelError
from tokentune.sampling.schedule import Size

PROMPT_LEARNING = "peft's prompt learning puts tokens in front that selected positions do not count"
SETTINGS = "_tokentune"  # the attribute of a patched model that holds its Settings
Model = TypeVar("Model", bound=nn.Module)  # what is given is what is returned
SETTINGS_OF_OWNER = "_tokentune_of_owner"  # the same Settings, on the model inside that holds the layers


@dataclass
class Settings:
    """How a patched model behaves. They are stored on the model, so that a deep copy has them too."""

    profile: Profile
    stack: Stack
    prefix_length: Size | None = None
    strategy: str = "supervised"
    checkpoint_rest: str = "auto"
    offload_kv: bool = False
    chunked_loss: bool | None = None
    chunk_bytes: int = CHUNK_BYTES
    scoring: ScoringOptions | None = None
    needs: tuple[str, ...] = ()  # scores, which the strategy needs
    gradient_correction: float = 0.0
    verify: bool = True  # whether model and adapter kinds must have been compared with the definition
    adapters: list[Suspect] = field(default_factory=list)  # adapters that cannot be served, active or not
    activated: list[Any] = field(default_factory=list)  # peft's parts that add an activated LoRA
    adapters_of: tuple[int, ...] = ()  # ids of the adapters' configurations that were checked
    hooks_checked: bool = False  # whether a step has warned of others' hooks that see a part of the tokens
    undo: ExitStack = field(default_factory=ExitStack)  # ends the current step
    finish: Callable[[Any], None] | None = None  # what the output of the current step still needs
    counts: DrawCounts | None = None  # of the last draw


def settings_of(owner: nn.Module) -> Settings | None:
    """The settings of a patched model; None: it is not patched."""
    return getattr(owner, SETTINGS, None)


def set_prefix_length(model: nn.Module, prefix_length: Size) -> None:
    """Changes how many tokens a patched model draws, as for a schedule over training."""
    getattr(owner_of(model), SETTINGS).prefix_length = prefix_length


def last_draw(model: nn.Module) -> DrawCounts | None:
    """The last draw of a patched model in numbers; None: it has not drawn yet."""
    return getattr(owner_of(model), SETTINGS).counts


def reference_of(model: nn.Module) -> PreTrainedModel | None:
    """The reference model whose losses a scoring pass subtracts, where there is one."""
    settings: Settings | None = getattr(owner_of(model), SETTINGS, None)
    return None if settings is None or settings.scoring is None else settings.scoring.reference


def profile_of(model: nn.Module) -> Profile:
    """What the verification found out about a patched model: the token that its head pools, the rows that it needs."""
    return getattr(owner_of(model), SETTINGS).profile


def owner_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside whatever peft or `torch.compile` wraps around it."""
    model = getattr(model, "_orig_mod", model)
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise UnsupportedModelError(PROMPT_LEARNING)
    inner = inner_model(model)
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(f"a transformers or peft model is needed, not {type(inner).__name__}")
    return inner
