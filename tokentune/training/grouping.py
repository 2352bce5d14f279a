"""`--group_by_length`: batches of rows with about as many tokens and selected tokens, which need little padding."""

import hashlib
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

WINDOW = 50  # global batches that are made of rows drawn together; of little data a quarter of an epoch


class GroupedSampler(Sampler):
    """An order of R rows that seed and epoch alone decide, so that a resumed run goes on with the same batches.

    Rows are drawn at random, a window of them at a time. A window is cut into global batches of rows that are alike,
    which come in random order.
    """

    def __init__(self, units: np.ndarray, seed: int, together: int) -> None:
        """
        Args:
            units: what each row costs (R, 2), as of `data/step_work.py`.
            together: rows of a global batch. Its split into micro-batches does not change the order.
        """
        self.units, self.seed, self.together, self.epoch = units, seed, together, 0

    def __iter__(self) -> Iterator[int]:
        random, together = np.random.default_rng((self.seed, self.epoch)), self.together
        order = random.permutation(len(self.units))
        window = together * min(max(1, len(order) // (4 * together)), WINDOW)
        for first in range(0, len(order), window):
            rows = self._alike(order[first : first + window])
            full = rows[: len(rows) // together * together].reshape(-1, together)
            yield from random.permutation(full).flatten().tolist()
            yield from rows[full.size :].tolist()  # the epoch's last batch

    def _alike(self, rows: np.ndarray) -> np.ndarray:
        """The rows with those that are alike side by side: halved again and again, by what differs most among them.

        While there are several global batches of them, they are cut between two.
        """
        spread = np.ptp(self.units[rows], axis=0)
        if not spread.any():
            return rows
        rows = rows[np.argsort(-self.units[rows, spread.argmax()], kind="stable")]
        half = len(rows) // 2
        if len(rows) > self.together:
            half = max(1, half // self.together) * self.together
        return np.concatenate([self._alike(rows[:half]), self._alike(rows[half:])])

    def __len__(self) -> int:
        return len(self.units)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def units_digest(units: np.ndarray | None) -> str | None:
    """Of what rows are grouped by; None: they are not."""
    return None if units is None else hashlib.blake2b(units.tobytes(), digest_size=16).hexdigest()
