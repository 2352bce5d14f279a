"""The micro-batches that need the most memory: of the longest rows, and as many target positions as any row has.

B sequences, S tokens
"""

from typing import Any

import numpy as np

from tokentune.data.packing import PackedRows
from tokentune.data.row_sizes import lengths_of, target_counts_of
from tokentune.sampling.sampler import IGNORED_LABEL
from tokentune.settings.finetune import Arguments
from tokentune.training.trainer import SelectiveTrainer


def longest_batch(
    trainer: SelectiveTrainer, arguments: Arguments, sequences: int
) -> tuple[dict[str, Any], tuple[int, int]]:
    """The micro-batch of the longest training rows, with its selection (a schedule's largest), and its shape (B, S).

    A micro-batch selects as many tokens of each row as of the one that selects most. So where all target positions are
    selected, the first of these rows gets as many as any row has.
    """
    rows = trainer.train_dataset
    if hasattr(rows, "__len__"):
        items = _longest(rows, sequences)
        if arguments.selection.takes_answers:
            beside = len(arguments.selection.selected.invocation)  # selected too
            items[0] = _with_targets(items[0], int(row_targets(rows).max()) + beside)
    else:  # a stream: as long as its rows can be
        length = arguments.data.max_length
        item = {"input_ids": [0] * length, "labels": [0] * length, "draw_seed": 0}
        items = [{"documents": [item]} if arguments.data.packing else item] * sequences
    batch = trainer.data_collator(items)
    if trainer.schedule is not None:
        batch = trainer.drawn(batch, trainer.schedule.largest)
    return batch, tuple(next(iter(batch.values())).shape[:2])


def longest_validation_batch(trainer: SelectiveTrainer) -> dict[str, Any] | None:
    """The batch of the longest validation rows; None: there are none."""
    rows = trainer.eval_dataset
    return None if rows is None else trainer.eval_collator(_longest(rows, trainer.args.eval_batch_size))


def answer_share(rows: Any) -> float:
    """The most target positions of any row as a share of the longest row; 1 for a stream, which may hold any row."""
    return float(row_targets(rows).max() / row_lengths(rows).max()) if hasattr(rows, "__len__") else 1.0


def row_lengths(rows: Any) -> np.ndarray:
    """Tokens of each row of a trainer's data set, packed or not."""
    return _of_rows(rows, lengths_of)


def row_targets(rows: Any) -> np.ndarray:
    """Target positions of each row of a causal model's trainer, packed or not."""
    return _of_rows(rows, target_counts_of)


def _of_rows(rows: Any, count: Any) -> np.ndarray:
    if not isinstance(rows, PackedRows):
        return count(getattr(rows, "rows", rows))
    of_documents = count(rows.rows.rows)
    return np.array([of_documents[documents].sum() for documents in rows.bins])


def _longest(rows: Any, count: int) -> list[Any]:
    """The `count` longest items, the longest first."""
    return [rows[int(row)] for row in np.argsort(-row_lengths(rows), kind="stable")[:count]]


def _with_targets(item: dict[str, Any], count: int) -> dict[str, Any]:
    """The row with at least so many target positions, as far as it has tokens: from its end, labels are the tokens."""
    documents = item.get("documents", [item])
    missing, changed = count - int(target_counts_of(documents).sum()), []
    for document in reversed(documents):
        labels, tokens = list(document["labels"]), document["input_ids"]
        for place in range(len(labels) - 1, 0, -1):
            if missing > 0 and labels[place] == IGNORED_LABEL:
                labels[place], missing = tokens[place], missing - 1
        changed.insert(0, {**document, "labels": labels})
    return {**item, "documents": changed} if "documents" in item else changed[0]
