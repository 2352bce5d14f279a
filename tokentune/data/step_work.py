"""The work of a training step by its tokens: what rows are grouped by, and what is said of a selection.

R rows. In units of which a token's forward pass takes 2, its backward pass takes 4, or 2 where the base is frozen: then
only the gradients of its inputs are computed. Attention and adapters are not counted.
"""

from typing import Any

import numpy as np
import torch

from tokentune.data.packing import PackedRows
from tokentune.data.row_sizes import lengths_of, target_counts_of
from tokentune.sampling.sampler import answers_count, counts_of_rows
from tokentune.sampling.schedule import Answers
from tokentune.settings.model import SelectionArguments

FORWARD = 2  # units of each token


def selected_units(*, lora: bool, again: int = 0) -> int:
    """Units that a selected token takes besides.

    Args:
        lora: the base is frozen.
        again: times that its forward pass is repeated (gradient checkpointing, a scoring pass).
    """
    return (2 if lora else 4) + FORWARD * again


def units_of_rows(rows: Any, selection: SelectionArguments, *, lora: bool, causal: bool) -> np.ndarray:
    """What each row of a training data set, packed or not, costs: all its tokens, and its selected ones, (R, 2) int64.

    Of a schedule, its largest size. Only what a resumed run may not change counts: checkpointing does not.
    """
    if isinstance(rows, PackedRows):
        of_documents = units_of_rows(rows.rows, selection, lora=lora, causal=causal)
        return np.array([of_documents[documents].sum(0) for documents in rows.bins], dtype=np.int64).reshape(-1, 2)
    rows = getattr(rows, "rows", rows)
    lengths = lengths_of(rows)
    selected = selected_in_rows(rows, lengths, selection, causal=causal)
    return np.stack([FORWARD * lengths, selected_units(lora=lora) * selected], axis=1)


def selected_in_rows(rows: Any, lengths: np.ndarray, selection: SelectionArguments, *, causal: bool) -> np.ndarray:
    """`selected_of` rows that are not packed, whose targets are counted where they matter."""
    of_answers = selection.tokentune and isinstance(selection.selected, Answers)
    targets = target_counts_of(rows, causal=causal) if of_answers else None
    return selected_of(lengths, targets, selection)


def selected_of(lengths: np.ndarray, targets: np.ndarray | None, selection: SelectionArguments) -> np.ndarray:
    """Selected tokens of each row, (R,); without --tokentune all.

    Args:
        lengths: tokens of each row, (R,) int64.
        targets: target positions of each row, (R,) int64; needed for `Answers` alone.
    """
    size = selection.selected
    if not selection.tokentune:
        return lengths
    if isinstance(size, Answers):
        return answers_count(size, targets, lengths)
    return counts_of_rows(size, torch.from_numpy(lengths), selection.selection).numpy()
