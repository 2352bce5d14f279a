"""Rows that are read, tokenized and shuffled while training, for data that does not fit on the disk.

The stream has no end: data sets are read again and again, and `--max_steps` ends the run. The same seed gives the same
rows in the same order, so a resumed run, which skips the rows that it was trained on, continues exactly.
"""

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from datasets import Dataset

from tokentune.data.collators import SeededRows, draw_seed
from tokentune.data.encoding import LengthLimit, Notes, TokenRow
from tokentune.data.formats.bad_rows import NAMED
from tokentune.data.formats.data_formats import SOURCE_COLUMN
from tokentune.data.formats.records import DROPPED_SOURCES, RecordSource
from tokentune.data.record_encoding import RecordEncoder
from tokentune.errors import UserError
from tokentune.settings.data import DataArguments

logger = logging.getLogger(__name__)

SHUFFLED_ROWS = 10_000  # rows that the order is drawn among
SHUFFLED_CHARACTERS = 2**25  # fewer rows where they are long
FRUITLESS_ROWS = 100_000  # without one to learn from: none is expected any more


class WorkerError(UserError):
    """A `UserError` of a loader's worker: torch puts the worker's traceback around its message, which is left off."""

    def __init__(self, message: str) -> None:
        super().__init__(message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip())


class StreamedSource(NamedTuple):
    """A data set, and what encodes its records."""

    source: RecordSource
    encoder: RecordEncoder


Encodable = tuple[RecordEncoder, str, dict[str, Any] | UserError]  # what encodes a record, its place, and itself


class Drawn(NamedTuple):
    """A record of the stream: its number since the beginning, its place for messages, and itself, or what is wrong."""

    number: int
    encoder: RecordEncoder
    where: str
    record: dict[str, Any] | UserError


@dataclass(eq=False)
class StreamedRows(torch.utils.data.IterableDataset):
    """An endless stream of items "input_ids", "labels" and "draw_seed", for a `DataLoader` of any number of workers.

    Several data sets are read one after another, or with weights in turns that are drawn in their proportion. The order
    is then drawn within a buffer of `SHUFFLED_ROWS` rows. The seed of an item's selection depends on (seed, number of
    the row since the stream's beginning) alone.

    Every worker reads everything and tokenizes its own batches, which the loader takes in turns: the batches are the
    same for any number of workers, as long as no row is dropped for want of anything to learn.

    With --bad_rows skip the log names the first bad rows. They cannot be counted: a stream is never read to its end.

    Args:
        block: sequences of a micro-batch of all processes; each takes its share (accelerate's `IterableDatasetShard`).
    """

    sources: Sequence[StreamedSource]
    data: DataArguments
    seed: int
    block: int
    noted: set[str] = field(default_factory=set)  # notes that this process has logged

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: there is one endless epoch, and a row has another number each time."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """
        Raises:
            UserError: a malformed row, when it is reached; nothing to learn in many rows.
        """
        worker = torch.utils.data.get_worker_info()
        try:
            yield from self._share(*((0, 1) if worker is None else (worker.id, worker.num_workers)))
        except UserError as error:
            if worker is None:
                raise
            raise WorkerError(str(error)) from error

    def _share(self, index: int, workers: int) -> Iterator[dict[str, Any]]:
        """The items of one of so many workers."""
        limit, fruitless, told = LengthLimit(self.data.max_length, self.data.long_rows), 0, set()
        for position, drawn in enumerate(self._shuffled()):
            if position // self.block % workers != index:
                continue
            row = None
            try:
                row = limit(self._encoded(drawn))
            except UserError as error:
                of_row = isinstance(drawn.record, UserError) or str(error).startswith(drawn.where)
                if self.data.bad_rows == "stop" or not of_row:
                    raise
                if len(told) < NAMED and str(error) not in told:  # rows come again
                    told.add(str(error))
                    logger.warning("--bad_rows skip: %s", error)
            fruitless = 0 if row is not None else fruitless + 1
            if row is not None:
                yield {"input_ids": row.ids, "labels": row.labels, "draw_seed": draw_seed(self.seed, drawn.number)}
            elif fruitless >= FRUITLESS_ROWS:
                limit.report.check(self.data.max_length)  # names the cause, if no row before was learnt from either
                raise UserError(f"{drawn.where}: it and {fruitless - 1:,} rows before it hold no token to learn.")

    def _encoded(self, drawn: Drawn) -> TokenRow:
        chunk = drawn.encoder([(drawn.where, drawn.record)])
        Notes({text: note for text, note in chunk.notes.found.items() if text not in self.noted}).log(logger)
        self.noted |= chunk.notes.found.keys()
        ((_, _, row),) = chunk.rows
        if isinstance(row, UserError):
            raise row
        return row

    def _shuffled(self) -> Iterator[Drawn]:
        """The stream in drawn order: of a full buffer, a drawn row is taken out."""
        rng = random.Random(f"order {self.seed}")
        buffer: list[Drawn] = []
        characters = 0
        for number, record in enumerate(self._mixed()):
            buffer.append(Drawn(number, *record))
            characters += _characters(buffer[-1].record)
            while len(buffer) >= SHUFFLED_ROWS or characters > SHUFFLED_CHARACTERS:
                place = rng.randrange(len(buffer))
                buffer[place], buffer[-1] = buffer[-1], buffer[place]
                taken = buffer.pop()
                characters -= _characters(taken.record)
                yield taken

    def _mixed(self) -> Iterator[Encodable]:
        if not self.data.dataset_weights:
            yield from _endless(self.sources)
        endless = [_endless([source]) for source in self.sources]
        rng = random.Random(f"mixture {self.seed}")
        for (number,) in iter(lambda: rng.choices(range(len(endless)), self.data.dataset_weights), None):
            yield next(endless[number])


def _endless(sources: Sequence[StreamedSource]) -> Iterator[Encodable]:
    """Their records, one source after another, again and again."""
    found = True
    while found:
        found = False
        for source in sources:
            for where, record in source.source.rows(source.encoder.data_format.columns):
                if isinstance(record, UserError) or record.get(SOURCE_COLUMN) not in DROPPED_SOURCES:
                    found = True
                    yield source.encoder, where, record
    raise UserError(f"{sources[0].source.where}: holds no rows to train on.")


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(_characters, values))


def seeded_rows(rows: Dataset | StreamedRows, seed: int) -> SeededRows | StreamedRows:
    """Rows whose items have the seed of their selection; a stream's items have it already."""
    return rows if isinstance(rows, StreamedRows) else SeededRows(rows, seed)
