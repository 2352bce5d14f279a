"""How many tokens are selected: `--prefix_length`, also one that changes over the run (`0.1:0.5`)."""

import math
from contextlib import suppress
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Answers:
    """Every target position of a row, and a share of its other tokens, from 0 to 1: `answers`, `answers+0.1`.

    `invocation`: token ids; where they are given, also all tokens from their last occurrence on.
    """

    share: float = 0.0
    invocation: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"answers+{self.share}" if self.share else "answers"


Size = int | float | Answers  # a count of tokens, a proportion of each sequence, or what `Answers` says


@dataclass(frozen=True)
class Schedule:
    """Linear in optimizer steps: two counts of tokens, two proportions of each sequence, or two `Answers`."""

    start: Size
    end: Size

    @property
    def largest(self) -> Size:
        """The size that decides how much memory is needed."""
        return max(self.start, self.end)

    def at(self, step: int, steps: int) -> Size:
        """The size at an optimizer step: 0 is the first, steps - 1 the last."""
        if isinstance(self.start, Answers):
            return Answers(Schedule(self.start.share, self.end.share).at(step, steps))
        share = min(1.0, step / max(1, steps - 1))
        value = self.start + (self.end - self.start) * share
        return round(value) if isinstance(self.start, int) else value

    def __str__(self) -> str:
        return f"{self.start}-{self.end}"  # as a run's folder is named


def parse_prefix_length(text: str) -> Size | Schedule:
    """Reads `--prefix_length`: `16` is a count of tokens, `0.3` a proportion of each sequence, `1.0` all of it.

    `answers` and `answers+0.1` are `Answers`. `0.1:0.5`, `16:64` and `answers+0.3:answers` go from one to the other
    over the run. Raises ValueError for anything else.
    """
    if ":" in text:
        start, _, end = text.partition(":")
        both = _parse_size(start), _parse_size(end)
        if type(both[0]) is not type(both[1]):
            raise ValueError(
                "a schedule goes from one proportion to another (0.1:0.5), from a number to another, or from one share "
                "beside the answers to another (answers+0.3:answers)"
            )
        return Schedule(*both)
    return _parse_size(text)


def _parse_size(text: str) -> Size:
    word, plus, share = text.partition("+")
    if word == "answers":
        with suppress(ValueError):
            if not plus or ("." in share and 0 < float(share) <= 1):
                return Answers(float(share) if plus else 0.0)
        raise ValueError(
            f"{text!r} selects the answers and a share of the other tokens, which has to be above 0.0 and at most 1.0 "
            "(answers+0.1), or the answers alone (answers)"
        )
    for kind, most in ((int, math.inf), (float, 1.0)):
        with suppress(ValueError):
            value = kind(text)
            if 0 < value <= most:  # NaN fails both comparisons
                return value
            break
    raise ValueError(
        f"{text!r} is neither a number of tokens (16, at least 1) nor a proportion of the sequence "
        "(0.3, above 0.0 and at most 1.0), nor answers or answers+0.1"
    )
