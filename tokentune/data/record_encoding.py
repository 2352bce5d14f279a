"""Parsed records to rows of tokens, many at a time: by `data/prompts.py` or the chat template, in one or more
processes."""

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple, TypeVar

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from tokentune.data.chat.templates import ChatEncoder
from tokentune.data.encoding import Notes, TokenRow
from tokentune.data.formats.data_formats import SOURCE_COLUMN, Answer, DataFormat, Item, Record
from tokentune.data.formats.records import DROPPED_SOURCES, Placed
from tokentune.data.prompts import PromptTemplate, encode_answers
from tokentune.errors import UserError
from tokentune.sources import error_chain

CHUNK = 64  # rows that are tokenized together
CHUNKS_HERE = 16  # that are tokenized in this process before others are started: small data is done sooner without them
MOST_WORKERS = 8  # by default: reading the records keeps no more of them busy

Chunk, Outcome = TypeVar("Chunk"), TypeVar("Outcome")


class RecordEncoder:
    """Encodes prompts with answers by `data/prompts.py`, conversations by the tokenizer's chat template.

    Args:
        add_eos_token, system_in_user: as of `ChatEncoder`.

    Raises:
        UserError: as `encode_answers` and `ChatEncoder`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, add_eos_token: bool, system_in_user: bool = False
    ) -> None:
        self.tokenizer, self.add_eos_token, self.system_in_user = tokenizer, add_eos_token, system_in_user
        self._chat: ChatEncoder | None = None
        self._notes = Notes()

    def read(
        self, record: Record, where: str, data_format: DataFormat, template: PromptTemplate, *, told: bool
    ) -> Item:
        """`DataFormat.read`, which notes its doubts."""
        for doubt in data_format.doubts(record):
            self._notes.add(logging.WARNING, doubt, where)
        return data_format.read(record, where, template, told=told)

    def __call__(self, item: Item, where: str) -> TokenRow:
        """Uncut ids and labels. `where`: the row, for messages."""
        (row,) = self.batch([(item, where)])
        if isinstance(row, UserError):
            raise row
        return row

    def batch(self, items: Sequence[tuple[Item, str]]) -> list[TokenRow | UserError]:
        """As many rows; of one that cannot be encoded, what is wrong with it."""
        answers = [n for n, (item, _) in enumerate(items) if isinstance(item, Answer)]
        chats = [n for n, (item, _) in enumerate(items) if not isinstance(item, Answer)]
        found: dict[int, TokenRow | UserError] = {}
        if answers:
            texts = [items[n][0] for n in answers]
            found |= zip(answers, self._answers(texts), strict=True)
        if chats:
            if self._chat is None:  # a tokenizer without a chat template is good enough for everything else
                options = {"add_eos_token": self.add_eos_token, "system_in_user": self.system_in_user}
                self._chat = ChatEncoder(self.tokenizer, **options)
            found |= zip(chats, self._chat.batch([items[n] for n in chats]), strict=True)
        return [found[n] for n in range(len(items))]

    def take_notes(self) -> Notes:
        """What was noticed since this was last asked."""
        notes, self._notes = self._notes, Notes()
        if self._chat is not None:
            notes.update(self._chat.notes)
            self._chat.notes = Notes()
        return notes

    def _answers(self, texts: list[Answer]) -> list[TokenRow | UserError]:
        try:
            return encode_answers(texts, self.tokenizer, add_eos_token=self.add_eos_token)
        except UserError as error:
            if len(texts) == 1:
                return [error]
            return [row for text in texts for row in self._answers([text])]


def held_out(item: Item, fraction: float) -> bool:
    """Whether a row belongs to the validation data: told by what it says alone, so the same in every run and file."""
    content = json.dumps([*item], sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8]) < fraction * 2**64


class EncodedChunk(NamedTuple):
    """What became of some records.

    Attributes:
        rows: how messages about it begin, side ("train" or "validation"), and the row or what is wrong with it.
        left_out: records of `DROPPED_SOURCES`.
        conversations: there is one among them.
    """

    rows: list[tuple[str, str, TokenRow | UserError]]
    left_out: int
    conversations: bool
    notes: Notes


@dataclass(frozen=True)
class ChunkEncoder:
    """Reads and encodes placed records, as `RecordSource.rows` yields them, for `ordered_map`.

    Args:
        told: as of `DataFormat.read`.
        fraction: of the records, that is held out as "validation"; None: all are "train".
    """

    encoder: RecordEncoder
    data_format: DataFormat
    template: PromptTemplate
    told: bool
    fraction: float | None

    def __call__(self, records: Sequence[Placed]) -> EncodedChunk:
        rows: list[tuple[str, str, TokenRow | UserError | None]] = []
        items = []
        for where, record in records:
            if isinstance(record, UserError):
                rows.append(("", "train", record))  # it names its place itself: a line, or a row
                continue
            if record.get(SOURCE_COLUMN) in DROPPED_SOURCES:
                continue
            try:
                item = self.encoder.read(record, where, self.data_format, self.template, told=self.told)
            except UserError as error:
                rows.append((where, "train", error))
                continue
            held = self.fraction is not None and held_out(item, self.fraction)
            rows.append((where, "validation" if held else "train", None))
            items.append((item, where))
        encoded = iter(self.encoder.batch(items))
        rows = [(where, side, next(encoded) if row is None else row) for where, side, row in rows]
        conversations = any(not isinstance(item, Answer) for item, _ in items)
        return EncodedChunk(rows, len(records) - len(rows), conversations, self.encoder.take_notes())


def worker_count(asked: int | None) -> int:
    """Processes that tokenize: those asked for, or one for each core that this process may use."""
    return asked if asked is not None else min(len(os.sched_getaffinity(0)), MOST_WORKERS)


def ordered_map(function: Callable[[Chunk], Outcome], items: Iterable[Chunk], workers: int) -> Iterator[Outcome]:
    """`function` of each item, in order, by so many processes once `CHUNKS_HERE` items were done in this one.

    Args:
        function: it and what it refers to is copied into the processes (by fork); what it changes there is lost.
        workers: below 2, this process does everything.

    Raises:
        Exception: what `function` raises, at its item's turn.
        UserError: a process died.
    """
    items = iter(items)
    yield from map(function, items if workers < 2 else islice(items, CHUNKS_HERE))
    first = list(islice(items, 1))
    if not first:
        return
    # Copies of a process with the tokenizer's threads must not use them: their locks may be held for ever.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # as many processes as the user asked for
        outcomes = iter(
            DataLoader(
                _Mapped(function),
                sampler=chain(first, items),  # any items pass for the indices of a data set
                batch_size=None,
                collate_fn=lambda outcome: outcome,
                num_workers=workers,
                prefetch_factor=4,  # as many as keep all busy; all items at once may not fit into memory
                multiprocessing_context="fork",
                generator=torch.Generator(),  # the seeds of its processes are not drawn from this one's generator
            )
        )
    with killed_workers_told():
        for outcome in outcomes:
            if isinstance(outcome, UserError):
                raise outcome
            yield outcome


@contextmanager
def killed_workers_told() -> Iterator[None]:
    """Also to be put around what is done with the outcomes of `ordered_map`: torch raises wherever its process is."""
    try:
        yield
    except (RuntimeError, UserError) as error:
        if not any(str(led_to_it).startswith("DataLoader worker") for led_to_it in error_chain(error)):
            raise
        raise UserError(
            "--tokenize_workers: a process that tokenizes was killed, perhaps for want of memory. Take fewer of them."
        ) from error


@dataclass
class _Mapped(torch.utils.data.Dataset):
    """A function as a data set; a `UserError` is handed on as it is, which torch would put a traceback around."""

    function: Callable[[Chunk], Outcome]

    def __getitem__(self, item: Chunk) -> Outcome | UserError:
        try:
            return self.function(item)
        except UserError as error:
            return error
