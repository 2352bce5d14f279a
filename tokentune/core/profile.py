"""What the verification finds out about a model, and the layers and heads go by."""

from dataclasses import dataclass, field
from enum import Enum

from tokentune.core.selective_layer import Rows

SEQUENCE_HEADS = ("ForSequenceClassification", "ForImageClassification")


class Pooling(Enum):
    """Which token's last hidden state a head for whole sequences looks at."""

    FIRST = "first"
    LAST = "last"
    LAST_NON_PAD = "last non-pad"  # by its id: a real token that has the pad token's id does not count
    ALL = "all"


@dataclass(frozen=True)
class Profile:
    """What the verification finds out about a model."""

    rows: Rows
    pooling: Pooling | None  # None: the head looks at every token for itself, or there is none
    whole_logits: str | None = None  # why the loss cannot be taken a chunk of rows at a time (`core/loss.py`)
    # Whether an argument of the layers has a row per token, by its path (`core/layer_arguments.py`); others go by
    # shape.
    per_token: dict[str, bool] = field(default_factory=dict)
