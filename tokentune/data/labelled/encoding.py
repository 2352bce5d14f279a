"""Labelled texts and words to token ids and labels, row by row: what is wrong with a row, and what is cut."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase

from tokentune.data.formats.conversations import text_of
from tokentune.data.formats.record_files import ROWS_AT_ONCE, chunks
from tokentune.data.labelled.labels import Labels, encoded_label
from tokentune.data.labelled.rows import Columns, Split
from tokentune.errors import UserError
from tokentune.sampling.sampler import IGNORED_LABEL


@dataclass
class RowReport:
    """Counts of one split.

    `labels`: that the rows carry; `cut_labels`: of words behind `--max_length`; `unwritten_labels`: of words that the
    tokenizer makes no token of (a zero-width space, a control character).
    """

    rows: int = 0
    cut_rows: int = 0
    tokens: int = 0
    labels: int = 0
    cut_labels: int = 0
    unwritten_labels: int = 0

    def __str__(self) -> str:
        text = f"{self.rows} rows, {self.tokens} tokens, {self.labels} labels"
        cut = f", {self.cut_labels} labels lost" if self.cut_labels else ""
        text += f"; {self.cut_rows} rows cut at --max_length{cut}" if self.cut_rows else ""
        unwritten = f"; {self.unwritten_labels} words without a token, as the tokenizer makes none of them"
        return text + (unwritten if self.unwritten_labels else "")


@dataclass
class Encoded:
    """Rows of token ids (or images, lazily) and labels, and their counts."""

    rows: Sequence[dict[str, Any]]
    report: RowReport = field(default_factory=RowReport)


def encode_texts(
    split: Split, columns: Columns, labels: Labels | None, *, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    """Texts or pairs to token ids. `labels` None: rows to predict, without labels.

    Raises:
        UserError: a text is missing, no text or empty; a label is unknown.
    """

    def check(values: dict[str, Any], where: str) -> tuple[list[str], int | float | None]:
        texts = [text_of(values[column], f"{where}: {column!r}") for column in columns.inputs]
        if not any(text.strip() for text in texts):
            named = " and ".join(map(repr, columns.inputs))
            raise UserError(f"{where}: {named} {'is' if len(texts) == 1 else 'are'} empty.")
        return texts, None if labels is None else encoded_label(labels, values[columns.label], columns.label, where)

    encoded = Encoded([])
    for checked in _checked(split, columns, labels, check):
        texts = [list(column) for column in zip(*(texts for texts, _ in checked), strict=True)]
        cut = tokenizer(*texts, truncation=True, max_length=max_length)
        for row, (pair, number) in enumerate(checked):
            item = {name: values[row] for name, values in cut.items()}
            if labels is not None:
                item["labels"] = number
            is_cut = _is_cut(cut, row, lambda pair=pair: tokenizer(*pair)["input_ids"])
            _add(encoded, item, is_cut=is_cut, labels=int(labels is not None))
    return encoded


def _checked(split: Split, columns: Columns, labels: Labels | None, check: Callable) -> Iterator[list[Any]]:
    """What `check(values, where)` returns of the good rows, in batches to be tokenized.

    Raises:
        UserError: there are bad rows, told when all are read; with --bad_rows skip they are left out.
    """
    needed = columns.inputs if labels is None else (*columns.inputs, columns.label)

    def good() -> Iterator[Any]:
        for row, values in split.good_rows(needed):
            with split.bad.catch(where := split.place(row)):
                yield check(values, where)

    yield from chunks(good(), ROWS_AT_ONCE)
    split.bad.settle(split.where, len(split.rows))


def _is_cut(cut: BatchEncoding, row: int, whole: Callable[[], list[int]]) -> bool:
    """Whether a row was cut at the maximum length. `whole`: its tokens uncut, for a tokenizer that does not tell."""
    if cut.encodings is not None:
        return bool(cut.encodings[row].overflowing)
    return len(whole()) > len(cut["input_ids"][row])


def _add(encoded: Encoded, item: dict[str, Any], *, is_cut: bool, labels: int) -> None:
    encoded.rows.append(item)
    report = encoded.report
    report.rows += 1
    report.cut_rows += is_cut
    report.tokens += len(item["input_ids"])
    report.labels += labels


def encode_words(
    split: Split, columns: Columns, labels: Labels | None, *, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    """Lists of words to token ids: a word's first sub-word carries its label, all others none (-100).

    Rows keep "word_positions" for predictions where `labels` is None: the first sub-word of each word, None for a word
    that was cut off or has no token.

    Raises:
        UserError: a row is no list of words, is empty, or has more or fewer labels than words; a label is unknown.
    """
    (column,) = columns.inputs

    def check(values: dict[str, Any], where: str) -> tuple[list[str], list[int]]:
        words = values[column]
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise UserError(f"{where}: {column!r} is {words!r:.60}, not a list of words.")
        if not any(text_of(word, f"{where}: a word").strip() for word in words):
            raise UserError(f"{where}: {column!r} is empty.")
        return words, [] if labels is None else _word_labels(labels, values[columns.label], words, columns.label, where)

    encoded = Encoded([])
    for checked in _checked(split, columns, labels, check):
        cut = tokenizer(
            [words for words, _ in checked], is_split_into_words=True, truncation=True, max_length=max_length
        )
        for row, (words, numbers) in enumerate(checked):
            item = {name: values[row] for name, values in cut.items()}
            first = _first_sub_words(cut.word_ids(row), len(words))
            item["labels"] = [IGNORED_LABEL] * len(item["input_ids"])
            lost = sum(position is None for position in first)
            if labels is None:
                item["word_positions"] = first
            for position, number in zip(first, numbers, strict=False):
                if position is not None:
                    item["labels"][position] = number
            overflowing = cut.encodings[row].overflowing
            behind = {word for part in overflowing for word in part.word_ids if word is not None}
            cut_off = sum(position is None and word in behind for word, position in enumerate(first))
            if labels is not None:
                encoded.report.cut_labels += cut_off
                encoded.report.unwritten_labels += lost - cut_off
            is_cut = bool(overflowing)
            _add(encoded, item, is_cut=is_cut, labels=0 if labels is None else len(words) - lost)
    return encoded


def _first_sub_words(word_ids: Sequence[int | None], words: int) -> list[int | None]:
    first: list[int | None] = [None] * words
    for position, word in enumerate(word_ids):
        if word is not None and first[word] is None:
            first[word] = position
    return first


def _word_labels(labels: Labels, values: Any, words: Sequence[str], column: str, where: str) -> list[int]:
    if not isinstance(values, list) or len(values) != len(words):
        found = f"{len(values)} labels" if isinstance(values, list) else f"{values!r:.60}"
        raise UserError(f"{where}: {column!r} has {found} for {len(words)} words; each word needs one.")
    return [encoded_label(labels, value, column, f"{where}, word {n}") for n, value in enumerate(values, start=1)]
