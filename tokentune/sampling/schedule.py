"""How many tokens are selected: `--prefix_length`, also one that changes over the run (`0.1:0.5`)."""

import math
from contextlib import suppress
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Linear in optimizer steps: two counts of tokens (int), or two proportions of each sequence (float)."""

    start: int | float
    end: int | float

    @property
    def largest(self) -> int | float:
        """The size that decides how much memory is needed."""
        return max(self.start, self.end)

    def at(self, step: int, steps: int) -> int | float:
        """The size at an optimizer step: 0 is the first, steps - 1 the last."""
        share = min(1.0, step / max(1, steps - 1))
        value = self.start + (self.end - self.start) * share
        return round(value) if isinstance(self.start, int) else value

    def __str__(self) -> str:
        return f"{self.start}-{self.end}"  # as a run's folder is named


def parse_prefix_length(text: str) -> int | float | Schedule:
    """Reads `--prefix_length`: `16` is a count of tokens, `0.3` a proportion of each sequence, `1.0` all of it.

    `0.1:0.5` and `16:64` go from one to the other over the run. Raises ValueError for anything else.
    """
    if ":" in text:
        start, _, end = text.partition(":")
        both = _parse_size(start), _parse_size(end)
        if type(both[0]) is not type(both[1]):
            raise ValueError("a schedule goes from one proportion to another (0.1:0.5), or from a number to another")
        return Schedule(*both)
    return _parse_size(text)


def _parse_size(text: str) -> int | float:
    for kind, most in ((int, math.inf), (float, 1.0)):
        with suppress(ValueError):
            value = kind(text)
            if 0 < value <= most:  # NaN fails both comparisons
                return value
            break
    raise ValueError(
        f"{text!r} is neither a number of tokens (16, at least 1) nor a proportion of the sequence "
        "(0.3, above 0.0 and at most 1.0)"
    )
