"""A number of selected tokens that changes over the run: `--prefix_length 0.1:0.5`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Linear in optimizer steps, from the first one's size to the last one's.

    Attributes:
        start, end: both counts of tokens (int), or both proportions of each sequence (float).
    """

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
