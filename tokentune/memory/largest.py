"""The largest value (batch, length, proportion) whose step fits a card, by few steps.

The search begins at a value that is predicted from copies with few layers (`memory/shallow.py`). What it returns was
run with all layers and fits; so was the next larger value, which does not fit.
"""

from collections.abc import Callable, Sequence
from typing import Any

from tokentune.memory.accounting import FRAGMENTATION, Footprint
from tokentune.memory.estimate_table import fits_card, room_on
from tokentune.memory.probe import last_that_fits

_FIRST_STRIDE, _MOST_GROWTH = 15, 4  # of the index: steps with long sequences take the longest
_MOST_PREDICTIONS = 8


def largest(
    values: Sequence[Any], step: Callable[[Any], Footprint], memory_gb: float, start: int = 0
) -> tuple[Any | None, Footprint, int]:
    """The last of ascending `values` whose step fits (None: not even the first), its footprint, and the steps run.

    `start`: the index to begin at.
    """
    seen: dict[Any, Footprint] = {}

    def whether_fits(value: Any) -> bool:
        seen[value] = step(value)
        return fits_card(seen[value].peak, memory_gb)

    best = last_that_fits(values, whether_fits, start)
    return best, seen[values[0] if best is None else best], len(seen)


def predicted_start(values: Sequence[Any], peak: Callable[[Any], float], memory_gb: float) -> int:
    """The index of the last value whose predicted `peak`, in bytes, fits; 0 where none does.

    By secant steps, because the peak bends upwards with the length; by halving the interval where two peaks are equal.
    It stops after `_MOST_PREDICTIONS`: the search goes on from wherever it begins.
    """
    most = room_on(memory_gb) / (1 + FRAGMENTATION)
    low, high, at = 0, len(values), min(_FIRST_STRIDE, len(values) - 1)
    before = 0, peak(values[0])
    if before[1] > most:
        return 0
    for _ in range(_MOST_PREDICTIONS):
        if high - low <= 1:
            break
        here = at, peak(values[at])
        low, high = (at, high) if here[1] <= most else (low, at)
        rise, run = here[1] - before[1], here[0] - before[0]
        at = int(here[0] + (most - here[1]) * run / rise) if rise else (low + high) // 2
        at = max(low + 1, min(at, high - 1, _MOST_GROWTH * (low + _FIRST_STRIDE)))
        before = here
    return low
