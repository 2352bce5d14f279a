"""How long encoded rows are, and how many of their positions have a loss."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from tokentune.sampling.sampler import IGNORED_LABEL

Rows = Dataset | Sequence[dict[str, Any]]


def lengths_of(rows: Rows) -> np.ndarray:
    """Tokens of each encoded row, (rows,) int64. Of a `Dataset` only the lists' offsets are read."""
    if not isinstance(rows, Dataset):
        return np.array([len(row["input_ids"]) for row in rows], dtype=np.int64)
    tables = rows.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=10_000)
    lengths = [chunk.value_lengths().to_numpy() for table in tables for chunk in table["input_ids"].chunks]
    return np.concatenate([np.zeros(0, np.int64), *lengths])


def target_counts_of(rows: Rows, *, causal: bool = True) -> np.ndarray:
    """Target positions (`sampler.target_mask`) of each encoded row, (rows,) int64."""
    if isinstance(rows, Dataset):
        labels = (row for table in rows.select_columns(["labels"]).iter(batch_size=1_000) for row in table["labels"])
    else:
        labels = (row["labels"] for row in rows)
    first = int(causal)  # nothing predicts the first token of a row
    return np.array([np.count_nonzero(np.asarray(row[first:]) != IGNORED_LABEL) for row in labels], dtype=np.int64)
