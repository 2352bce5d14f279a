"""Records to rows of tokens, many at a time, in one or more processes."""

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import NamedTuple, TypeVar

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from tokentune.data.answers_apart import chat_invocation, template_invocation, text_invocation
from tokentune.data.chat.templates import ChatEncoder
from tokentune.data.encoding import Notes, TokenRow
from tokentune.data.formats.data_formats import FORMATS, SOURCE_COLUMN, Answer, DataFormat, Item
from tokentune.data.formats.records import DROPPED_SOURCES, Placed
from tokentune.data.prompts import PromptTemplate, encode_answers
from tokentune.errors import UserError
from tokentune.settings.data import DataArguments
from tokentune.sources import error_chain

CHUNK = 64  # rows that are tokenized together
CHUNKS_HERE = 16  # tokenized in this process before others are started: these would only delay small data
MOST_WORKERS = 8  # by default: one process reads the records, no faster than so many encode them

Chunk, Outcome = TypeVar("Chunk"), TypeVar("Outcome")


class EncodedChunk(NamedTuple):
    """What became of some records.

    Attributes:
        rows: how messages about it begin, side ("train" or "validation"), and the row or what is wrong with it.
        left_out: number of records of `DROPPED_SOURCES`.
        conversations: whether there is one among them.
        columns: of all records.
    """

    rows: list[tuple[str, str, TokenRow | UserError]]
    left_out: int
    conversations: bool
    notes: Notes
    columns: set[str]


@dataclass
class RecordEncoder:
    """Encodes the records of one data set: texts by `data/prompts.py`, conversations by the tokenizer's chat template.

    Args:
        fraction: share of the records that is held out as "validation"; None: all are "train".

    Raises (when called):
        UserError: the tokenizer has no chat template, and the records are conversations.
    """

    tokenizer: PreTrainedTokenizerBase
    data_format: DataFormat
    template: PromptTemplate
    data: DataArguments
    fraction: float | None = None

    def __call__(self, records: Iterable[Placed]) -> EncodedChunk:
        """Encodes records as `RecordSource.rows` yields them; rows are not cut."""
        rows: list[tuple[str, str, TokenRow | UserError | None]] = []
        items: list[tuple[Item, str]] = []
        notes, left_out, columns = Notes(), 0, set()
        for where, record in records:
            if isinstance(record, UserError):
                rows.append(("", "train", record))  # its message names the place: a line, or a row
            elif record.get(SOURCE_COLUMN) in DROPPED_SOURCES:
                left_out += 1
            else:
                columns.update(record)
                for doubt in self.data_format.doubts(record):
                    notes.add(logging.WARNING, doubt, where)
                try:
                    item = self.data_format.read(record, where, self.template, told=self.data.data_format == "auto")
                except UserError as error:
                    rows.append((where, "train", error))
                    continue
                held = self.fraction is not None and held_out(item, self.fraction)
                rows.append((where, "validation" if held else "train", None))
                items.append((item, where))
        encoded = iter(self.encode(items, notes))
        rows = [(where, side, next(encoded) if row is None else row) for where, side, row in rows]
        return EncodedChunk(rows, left_out, any(not isinstance(item, Answer) for item, _ in items), notes, columns)

    def encode(self, items: Sequence[tuple[Item, str]], notes: Notes) -> list[TokenRow | UserError]:
        """Rows of (item, how messages about it begin); of one that cannot be encoded, what is wrong with it."""
        answers = [n for n, (item, _) in enumerate(items) if isinstance(item, Answer)]
        chats = [n for n, (item, _) in enumerate(items) if not isinstance(item, Answer)]
        found = dict(zip(answers, self._answers([items[n][0] for n in answers]), strict=True))
        if chats:
            found |= zip(chats, self._chat.batch([items[n] for n in chats]), strict=True)
            notes.update(self._chat.notes)
            self._chat.notes = Notes()
        return [found[n] for n in range(len(items))]

    def invocation(self, row: TokenRow, *, conversations: bool) -> tuple[int, ...]:
        """The tokens in front of each answer, of conversations or of texts (`data/answers_apart.py`).

        Args:
            row: one of them.

        Raises:
            UserError: there are none.
        """
        if conversations:
            return chat_invocation(self._chat)
        if self.data_format is FORMATS["alpaca"]:
            return template_invocation(self.template, self.tokenizer)
        return text_invocation(row, self.tokenizer)

    @cached_property
    def _chat(self) -> ChatEncoder:
        """Made when it is needed: without conversations a tokenizer needs no chat template."""
        options = {"add_eos_token": self.data.add_eos_token, "system_in_user": self.data.system_in_user}
        return ChatEncoder(self.tokenizer, **options)

    def _answers(self, texts: list[Answer]) -> list[TokenRow | UserError]:
        try:
            return encode_answers(texts, self.tokenizer, add_eos_token=self.data.add_eos_token) if texts else []
        except UserError as error:
            return [error] if len(texts) == 1 else [row for text in texts for row in self._answers([text])]


def held_out(item: Item, fraction: float) -> bool:
    """Whether a row is validation data. It depends on the row's content alone: the same in every run and file."""
    content = json.dumps([*item], sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8]) < fraction * 2**64


def worker_count(asked: int | None) -> int:
    """Processes that tokenize: those asked for, or one for each core that this process may use."""
    return asked if asked is not None else min(len(os.sched_getaffinity(0)), MOST_WORKERS)


def ordered_map(function: Callable[[Chunk], Outcome], items: Iterable[Chunk], workers: int) -> Iterator[Outcome]:
    """`function` of each item, in order: of the first `CHUNKS_HERE` in this process, of the others in worker processes.

    Args:
        function: copied into the processes (by fork) with all it refers to; what it changes there is lost.
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
    # A forked process must not use the tokenizer's threads: they are not copied, and their locks may never be freed.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # as many processes as the user asked for
        outcomes = iter(
            DataLoader(
                _Mapped(function),
                sampler=chain(first, items),  # items take the place of a data set's indices
                batch_size=None,
                collate_fn=lambda outcome: outcome,
                num_workers=workers,
                prefetch_factor=4,  # enough to keep all busy; all items at once may not fit into memory
                multiprocessing_context="fork",
                generator=torch.Generator(),  # otherwise seeds for its processes are drawn from the global one
            )
        )
    with killed_workers_told():
        for outcome in outcomes:
            if isinstance(outcome, UserError):
                raise outcome
            yield outcome


@contextmanager
def killed_workers_told() -> Iterator[None]:
    """Names the cause where a worker was killed. The outcomes of `ordered_map` must be used within it too: torch raises
    from a signal handler, at any place of the program."""
    try:
        yield
    except (RuntimeError, UserError) as error:
        if not any(str(cause).startswith("DataLoader worker") for cause in error_chain(error)):
            raise
        raise UserError(
            "--tokenize_workers: a process that tokenizes was killed, perhaps for want of memory. Take fewer of them."
        ) from error


@dataclass
class _Mapped(torch.utils.data.Dataset):
    """A function as a data set. It returns a `UserError`: of a raised one torch makes the message a traceback."""

    function: Callable[[Chunk], Outcome]

    def __getitem__(self, item: Chunk) -> Outcome | UserError:
        try:
            return self.function(item)
        except UserError as error:
            return error
