"""Label smoothing and R-drop for `classify.py`, which has no flags for them: only a measurement asks for them here.

The Trainer's own label smoothing does nothing here: a trainer with its own loss function, which a classification
needs for accumulation, never gets to it.

    B rows in a micro-batch, C classes
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from tokentune import classify


@dataclass(frozen=True)
class Smoothed:
    """Cross-entropy against targets of which `share` is spread evenly over all classes."""

    share: float

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        total = cross_entropy(outputs.logits.float(), labels, label_smoothing=self.share, reduction="sum")
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


@dataclass(frozen=True)
class RDrop:
    """Each row twice, under two dropout masks: cross-entropy of both, and `weight` times their symmetric divergence.

    Liang et al. 2021 (R-Drop), equation 4: per row -log p1(y) - log p2(y) + weight / 2 (KL(p1 | p2) + KL(p2 | p1)),
    here half of it, so that the rate of learning is that of one pass.
    """

    weight: float

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits = outputs.logits.float()  # (2B, C): the rows, then the rows again
        loss = cross_entropy(logits, labels, reduction="sum")
        one, other = log_softmax(logits, dim=-1).chunk(2)  # (B, C) each
        both_ways = [kl_div(a, b, log_target=True, reduction="sum") for a, b in ((one, other), (other, one))]
        loss = loss + self.weight / 2 * sum(both_ways)
        return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)


class Twice:
    """A collator whose batch holds its rows twice, with the same selection."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: torch.cat([value, value]) for name, value in self.collator(examples).items()}

    def count(self, batch: dict[str, Tensor]) -> Any:
        return self.collator.count(batch)


def classify_with(loss: Smoothed | RDrop, words: list[str]) -> None:
    """`classify.py` with another loss. To be called in a process that does nothing else afterwards."""
    build = classify.build_classification_trainer

    def built(*args: Any, **kwargs: Any) -> Any:
        trainer = build(*args, **kwargs)
        trainer.compute_loss_func = loss
        if isinstance(loss, RDrop):
            trainer.data_collator = Twice(trainer.data_collator)
        return trainer

    classify.build_classification_trainer = built
    classify.main(words)
