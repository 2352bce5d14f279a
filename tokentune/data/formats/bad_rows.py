"""Rows that cannot be used: all are counted, the first are named, and `--bad_rows` decides whether the run goes on."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from tokentune.errors import UserError
from tokentune.sources import first_line

logger = logging.getLogger(__name__)

NAMED = 5
LONGEST = 200  # characters of one of them in a list

BadRowPolicy = Literal["stop", "skip"]


@dataclass
class BadRows:
    """The bad rows of one data set."""

    policy: BadRowPolicy
    count: int = 0
    first: Sequence[str] = ()  # messages of the first `NAMED`
    skippable: bool = field(default=True, kw_only=True)  # whether the user could have said "skip"
    rows: set[int] = field(default_factory=set)  # numbers of those that are known, in a table of all rows

    def add(self, error: UserError, row: int | None = None) -> None:
        """Counts a row that is wrong in this way."""
        self.count += 1
        self.rows |= {row} - {None}
        self.first = [*self.first, str(error)][:NAMED]

    @contextmanager
    def catch(self, where: str) -> Iterator[None]:
        """Counts a `UserError` of the block, unless it does not begin with this place, and so is about more than a
        row."""
        try:
            yield
        except UserError as error:
            if not str(error).startswith(where):
                raise
            self.add(error)

    def refuse(self, where: str, read: int) -> None:
        """To be called when all rows are read.

        Args:
            where: the data set.
            read: number of rows, bad ones included.

        Raises:
            UserError: there are bad rows, and the policy is to stop or all rows are bad.
        """
        if self.count and (self.policy == "stop" or self.count >= read):
            raise UserError(self.first[0] if self.count == 1 else f"{self._told(where, read)}.\n{self._cure(read)}")

    def settle(self, where: str, read: int) -> None:
        """`refuse`, or a warning of the rows that are left out."""
        self.refuse(where, read)
        if self.count:
            logger.warning("%s. --bad_rows skip: they are left out", self._told(where, read))

    def _told(self, where: str, read: int) -> str:
        named = [first_line(UserError(text)).rstrip(".") for text in self.first]
        common, _, _ = named[0].partition(", ")
        if all(text.startswith(f"{common}, ") for text in named):  # the file's name once, not in front of each row
            where, named = common, [text.removeprefix(f"{common}, ") for text in named]
        named = [text if len(text) <= LONGEST else f"{text[:LONGEST]}..." for text in named]
        more = "" if self.count <= NAMED else f", the first {NAMED}"
        return f"{where}: {self.count:,} of {read:,} rows are bad{more}: {'; '.join(named)}"

    def _cure(self, read: int) -> str:
        if self.count >= read or not self.skippable:
            return "Repair them."
        return "Repair them, or leave them out with --bad_rows skip."
