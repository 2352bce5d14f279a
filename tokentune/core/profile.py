"""What the verification finds out about a model: the rows that its head needs, and the token that it pools.

B sequences, S tokens, K selected
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # importing it takes the modelling code's seconds, which reading data does without
    from transformers import PreTrainedModel

SEQUENCE_HEADS = ("ForSequenceClassification", "ForImageClassification")


class Rows(Enum):
    """Which rows leave the last layer. It depends on what the code behind the layers accepts."""

    SELECTED = "selected"  # K rows: the final norm and the head compute and save activations for these alone
    GATHERED = "gathered"  # S rows, zero at unselected tokens, for code that needs length S; K rows after the backbone
    ALL = "all"  # S rows, constant at unselected tokens, for heads that pool tokens or find them by position


class Pooling(Enum):
    """Which token's last hidden state a head for whole sequences uses."""

    FIRST = "first"
    LAST = "last"
    LAST_NON_PAD = "last non-pad"  # by its id: a real token that has the pad token's id does not count
    ALL = "all"


@dataclass(frozen=True)
class Profile:
    """What the verification finds out about a model."""

    rows: Rows
    pooling: Pooling | None  # None: the head classifies every token by itself, or there is no head
    whole_logits: str | None = None  # why the loss cannot be taken a chunk of rows at a time (`core/loss.py`)
    # Whether an argument of the layers has a row per token, by its path (`core/layers.py`); others are told by shape.
    per_token: dict[str, bool] = field(default_factory=dict)


def are_per_token(labels: Tensor | None, loss_type: str | None) -> bool:
    """Whether labels are of tokens (B, S); not classes (B,) or (B, 1), several classes or numbers (B, C)."""
    whole = loss_type in SEQUENCE_HEADS
    return labels is not None and labels.ndim == 2 and not labels.is_floating_point() and not whole


def pad_token(model: "PreTrainedModel") -> int | None:
    """The id by which a model's head recognizes padding."""
    return getattr(model.config.get_text_config(), "pad_token_id", None)


def pooled_tokens(
    pooling: Pooling | None, mask: Tensor, input_ids: Tensor | None = None, pad_token_id: int | None = None
) -> Tensor | None:
    """(B, S) bool: the token that the head pools, which has to be selected; None where it pools none or all.

    `input_ids` (B, S) and `pad_token_id` are how the decoders of transformers find the token: without one of the two
    they take the last position, padding or not.
    """
    if pooling not in (Pooling.FIRST, Pooling.LAST, Pooling.LAST_NON_PAD):
        return None
    index = torch.arange(mask.shape[1], device=mask.device)
    if pooling is Pooling.FIRST:
        return (index == 0).expand(mask.shape)
    if pooling is Pooling.LAST_NON_PAD:
        by_id = input_ids is not None and pad_token_id is not None
        mask = (input_ids != pad_token_id).to(mask) if by_id else torch.ones_like(mask)
    return index == (index * mask).argmax(dim=1, keepdim=True)
