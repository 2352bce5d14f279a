"""Several data sets as one: how many rows of each, and which."""

from collections.abc import Sequence

import numpy as np


def mixture_counts(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Rows of each data set in an epoch, in proportion to the weights.

    No row is left out: the data set that is largest for its weight gives every row once, and the others give theirs as
    often as their share asks for. A data set of weight 0 gives none.

    Args:
        sizes: rows that there are; 0 only where the weight is 0.
        weights: not negative, not all zero.
    """
    epoch = max(size / weight for size, weight in zip(sizes, weights, strict=True) if weight > 0)
    return [round(epoch * weight) for weight in weights]


def mixture_rows(sizes: Sequence[int], counts: Sequence[int], seed: int) -> np.ndarray:
    """Indices into the concatenated data sets: of each so many rows, none more than once more often than another.

    Which rows are taken once more is drawn by the seed. Order: data set after data set.
    """
    chosen, offset = [], 0
    for number, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        times, more = divmod(count, max(size, 1))  # an empty one has the weight 0
        drawn = np.random.default_rng((seed, number)).permutation(size)[:more]
        chosen.append(offset + np.concatenate([np.tile(np.arange(size), times), np.sort(drawn)]))
        offset += size
    return np.concatenate(chosen)
