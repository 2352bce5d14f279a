"""Encoded rows on their way into training: cut or dropped at the maximum length, counted, and put into a table."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerBase

from tokentune.errors import UserError
from tokentune.sampling.sampler import IGNORED_LABEL

TOKENS = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})
FEATURES = Features(TOKENS | {"cut": Value("int8")})
WHOLE, CUT, END_LOST = range(3)


class TokenRow(NamedTuple):
    """One row: token ids, and as many labels, which are the ids, or -100 where nothing is learnt.

    `cut`: `CUT` where the row was longer than the maximum length, `END_LOST` where it lost supervised tokens too.
    """

    ids: list[int]
    labels: list[int]
    cut: int = WHOLE


def trimmed_offsets(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """Character offsets of tokens, without the white space around special tokens with `lstrip` or `rstrip` (Phi-3's),
    whose offsets include it."""
    greedy = {i for i, token in tokenizer.added_tokens_decoder.items() if token.lstrip or token.rstrip}
    for token_id, (start, end) in zip(ids, offsets, strict=True):
        if token_id in greedy and (core := text[start:end].strip()):
            start += text[start:end].index(core)
            end = start + len(core)
        yield start, end


@dataclass
class Notes:
    """What was noticed while rows were encoded: each thing once, with its first place and how often it occurred."""

    found: dict[str, tuple[int, str, int]] = field(default_factory=dict)  # sentence -> level of the log, place, times

    def add(self, level: int, sentence: str, where: str, times: int = 1) -> None:
        """`where`: the row, perhaps with the message of a conversation."""
        level, where, before = self.found.get(sentence, (level, where, 0))
        self.found[sentence] = level, where, before + times

    def update(self, other: "Notes") -> None:
        """Adds what was noticed elsewhere, later."""
        for sentence, (level, where, times) in other.found.items():
            self.add(level, sentence, where, times)

    def log(self, logger: logging.Logger) -> None:
        """Logs them."""
        for sentence, (level, where, times) in self.found.items():
            again = f" (and {times - 1:,} more)" if times > 1 else ""
            logger.log(level, "%s: %s%s", where, sentence, again)


@dataclass
class EncodingReport:
    """What became of the records. With --dataset_weights, what is kept is counted as often as it comes in an epoch."""

    records: int = 0  # encoded, kept or not
    rows: int = 0  # kept
    dropped_rows: int = 0  # without a supervised token: it has nothing to learn, or that was cut off
    cut_rows: int = 0  # kept, but cut at max_length
    tokens: int = 0  # of the kept rows
    supervised_tokens: int = 0  # of the kept rows
    cut_ends: int = 0  # cut rows that lost supervised tokens, and so the end of an answer
    dropped_long_rows: int = 0  # longer than max_length, with --long_rows drop

    def __str__(self) -> str:
        text = (
            f"{self.rows:,} rows, {self.tokens:,} tokens, {self.supervised_tokens:,} of them supervised; "
            f"{self.cut_rows:,} rows cut to the maximum length"
        )
        text += f" ({self.cut_ends:,} of them lost an answer's end)" if self.cut_ends else ""
        text += f", {self.dropped_long_rows:,} dropped because they are longer" if self.dropped_long_rows else ""
        return f"{text}, {self.dropped_rows:,} dropped because no answer token is left"

    def __add__(self, other: "EncodingReport") -> "EncodingReport":
        return EncodingReport(**{name: count + getattr(other, name) for name, count in vars(self).items()})

    def check(self, max_length: int) -> None:
        """Raises UserError when no row is left to learn from."""
        if self.rows:
            return
        if self.dropped_long_rows == self.records:
            raise UserError(
                f"every one of {self.records} rows is longer than --max_length {max_length}, and --long_rows drop "
                "leaves none. Raise it, or take --long_rows cut."
            )
        raise UserError(
            f"no token to learn is left in any of {self.records} rows: every answer is empty or context only, or lies "
            f"beyond --max_length {max_length}. Raise it, or shorten the prompts."
        )


@dataclass
class LengthLimit:
    """Cuts or drops each row at the maximum length, and counts.

    Args:
        max_length: tokens.
        long_rows: "cut" removes the end (EOS too, so that a cut answer does not teach to stop there), "drop" the row.
    """

    max_length: int
    long_rows: Literal["cut", "drop"] = "cut"
    report: EncodingReport = field(default_factory=EncodingReport)

    def __call__(self, row: TokenRow) -> TokenRow | None:
        """The row as it is trained on; None where it is dropped."""
        report, too_long = self.report, len(row.ids) > self.max_length
        report.records += 1
        if too_long and self.long_rows == "drop":
            report.dropped_long_rows += 1
            return None
        ids, labels = row.ids[: self.max_length], row.labels[: self.max_length]
        supervised = count_supervised(labels)
        if supervised == 0:
            report.dropped_rows += 1
            return None
        report.rows += 1
        cut = WHOLE if not too_long else END_LOST if count_supervised(row.labels) > supervised else CUT
        report.cut_rows += cut != WHOLE
        report.cut_ends += cut == END_LOST
        report.tokens += len(ids)
        report.supervised_tokens += supervised
        return TokenRow(ids, labels, cut)


def count_supervised(labels: Iterable[int]) -> int:
    """Labels that are learnt."""
    return sum(label != IGNORED_LABEL for label in labels)


class TableOfRows:
    """A table with the columns of `FEATURES`, written row by row into a file, or with None into memory.

    All methods raise OSError when the file cannot be written.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self._buffer = None if file is not None else pyarrow.BufferOutputStream()
        target = {"stream": self._buffer} if file is None else {"path": str(file)}
        self._writer = ArrowWriter(features=FEATURES, **target)

    def add(self, row: TokenRow) -> None:
        """Appends a row."""
        self._writer.write(dict(zip(FEATURES, row, strict=True)))

    def finish(self) -> Dataset:
        """Closes the table and opens it for reading; a file is mapped into memory."""
        self._writer.finalize(close_stream=self.file is not None)
        if self.file is None:
            return Dataset.from_buffer(self._buffer.getvalue())
        return Dataset.from_file(str(self.file))
