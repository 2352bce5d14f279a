"""`--group_by_length`: batches of rows that take about as much work, so that less of them is padding."""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class GroupedSampler(Sampler):
    """An order of the rows that seed and epoch alone decide, so that a resumed run goes on with the same batches.

    As of transformers' `LengthGroupedSampler`: rows in random order, those of up to 50 global batches sorted, the
    largest first.
    """

    def __init__(self, units: np.ndarray, seed: int, together: int) -> None:
        """
        Args:
            units: what each row costs (`data/step_work.py`).
            together: rows of a global batch, so that its split into micro-batches does not change the order.
        """
        self.units, self.seed, self.together, self.epoch = units.tolist(), seed, together, 0

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.units, self.together, generator=generator))

    def __len__(self) -> int:
        return len(self.units)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def units_digest(units: np.ndarray | None) -> str | None:
    """Of what rows are grouped by; None: they are not."""
    return None if units is None else hashlib.blake2b(units.tobytes(), digest_size=16).hexdigest()
