"""Labelled texts and words to token ids and labels: what is wrong with a row, and what is cut."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from tokentune.data.formats.conversations import text_of
from tokentune.data.formats.record_files import ROWS_AT_ONCE, chunks
from tokentune.data.labelled.labels import Labels
from tokentune.data.labelled.rows import Columns, Split
from tokentune.errors import UserError
from tokentune.sampling.sampler import IGNORED_LABEL

logger = logging.getLogger(__name__)
HIDDEN = (None, -1)  # labels of GLUE's test data


@dataclass
class RowReport:
    """Counts of one split."""

    rows: int = 0
    cut_rows: int = 0
    tokens: int = 0
    labels: int = 0  # that the rows have
    cut_labels: int = 0  # lost, of words beyond `--max_length`; of rows to predict, words without a prediction
    unwritten_labels: int = 0  # lost, of words without a token (a zero-width space, a control character)

    def __str__(self) -> str:
        counts = {"tokens": self.tokens, "labels": self.labels}  # no tokens of images, no labels of rows to predict
        text = ", ".join([f"{self.rows} rows", *(f"{count} {name}" for name, count in counts.items() if count)])
        cut = f", {self.cut_labels} {'labels' if self.labels else 'predictions'} lost" if self.cut_labels else ""
        text += f"; {self.cut_rows} rows cut at --max_length{cut}" if self.cut_rows else ""
        unwritten = f"; {self.unwritten_labels} words without a token, as the tokenizer makes none of them"
        return text + (unwritten if self.unwritten_labels else "")


@dataclass
class Encoded:
    """Rows of token ids (or images, lazily) and labels, and their counts.

    `truth`: of rows to predict their labels (`true_labels`), which the rows do not have.
    """

    rows: Sequence[dict[str, Any]]
    report: RowReport
    truth: list[Any] | None = None


def encode_texts(
    split: Split, columns: Columns, labels: Labels | None, *, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    """Texts or pairs to token ids. `labels` None: rows to predict, without labels. Raises UserError: a text is missing,
    no text or empty; a label is unknown."""

    def check(values: dict[str, Any], where: str) -> tuple[list[str], int | float | None]:
        texts = [text_of(values[column], f"{where}: {column!r}") for column in columns.inputs]
        if not any(text.strip() for text in texts):
            named = " and ".join(map(repr, columns.inputs))
            raise UserError(f"{where}: {named} {'is' if len(texts) == 1 else 'are'} empty.")
        return texts, None if labels is None else labels.encode(values[columns.label], where)

    rows, report = [], RowReport()
    for checked in _checked(split, columns, labels, check):
        texts = [list(column) for column in zip(*(texts for texts, _ in checked), strict=True)]
        for (item, is_cut), (_, number) in zip(_tokenized(texts, tokenizer, max_length), checked, strict=True):
            rows.append(item if labels is None else item | {"labels": number})
            report.cut_rows += is_cut
            report.tokens += len(item["input_ids"])
    report.rows, report.labels = len(rows), 0 if labels is None else len(rows)
    return Encoded(rows, report)


def _tokenized(
    texts: list[list[str]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[tuple[dict[str, Any], bool]]:
    """Of each text, or pair of a text of each list, what the tokenizer makes of it, and whether that was cut."""
    if tokenizer.is_fast:
        cut = tokenizer(*texts, truncation=True, max_length=max_length)
        for row, encoding in enumerate(cut.encodings):
            yield {name: values[row] for name, values in cut.items()}, bool(encoding.overflowing)
        return
    # Tokenizers in pure Python do not tell what they cut off, and some (RoCBERT's) cut more than ids: a row that is too
    # long is tokenized again.
    whole = tokenizer(*texts, truncation=False, verbose=False)
    for row, ids in enumerate(whole["input_ids"]):
        is_cut = len(ids) > max_length
        part = tokenizer(*([of[row]] for of in texts), truncation=True, max_length=max_length) if is_cut else whole
        yield {name: values[0 if is_cut else row] for name, values in part.items()}, is_cut


def _checked(split: Split, columns: Columns, labels: Labels | None, check: Callable) -> Iterator[list[Any]]:
    """What `check(values, where)` returns for the good rows, in batches to be tokenized. Raises UserError: there are
    bad rows (after all were read); with --bad_rows skip they are left out."""
    needed = columns.inputs if labels is None else (*columns.inputs, columns.label)

    def good() -> Iterator[Any]:
        for row, values in split.good_rows(needed):
            with split.bad.catch(where := split.place(row)):
                yield check(values, where)

    yield from chunks(good(), ROWS_AT_ONCE)
    split.bad.settle(split.where, len(split.rows))


def encode_words(
    split: Split, columns: Columns, labels: Labels | None, *, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    """Lists of words to token ids: a word's first sub-word has its label, all others none (-100).

    With `labels` None, rows to predict: they have "word_positions", the position of each word's first sub-word, None
    for a word that was cut off or has no token.

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
        return words, [] if labels is None else _word_labels(labels, values[columns.label], words, where)

    rows, report = [], RowReport()
    for checked in _checked(split, columns, labels, check):
        texts = [words for words, _ in checked]
        cut = tokenizer(texts, is_split_into_words=True, truncation=True, max_length=max_length)
        for row, (words, numbers) in enumerate(checked):
            item = {name: values[row] for name, values in cut.items()}
            item["labels"] = [IGNORED_LABEL] * len(item["input_ids"])
            first: dict[int, int] = {}  # word -> position of its first sub-word
            for position, word in enumerate(cut.word_ids(row)):
                if word is not None and word not in first:
                    first[word] = position
                    item["labels"][position] = numbers[word] if labels is not None else IGNORED_LABEL
            overflowing = cut.encodings[row].overflowing
            report.cut_rows += bool(overflowing)
            behind = {word for part in overflowing for word in part.word_ids if word is not None}
            report.cut_labels += len(behind - first.keys())
            report.unwritten_labels += len(set(range(len(words))) - first.keys() - behind)
            if labels is None:
                item["word_positions"] = [first.get(word) for word in range(len(words))]
            else:
                report.labels += len(first)
            report.tokens += len(item["input_ids"])
            rows.append(item)
    report.rows = len(rows)
    return Encoded(rows, report)


def _word_labels(labels: Labels, values: Any, words: Sequence[str], where: str) -> list[int]:
    if not isinstance(values, list) or len(values) != len(words):
        found = f"{len(values)} labels" if isinstance(values, list) else f"{values!r:.60}"
        raise UserError(f"{where}: {labels.column!r} has {found} for {len(words)} words; each word needs one.")
    return [labels.encode(value, f"{where}, word {n}") for n, value in enumerate(values, start=1)]


def true_labels(split: Split, columns: Columns, labels: Labels, *, of_words: bool) -> list[Any] | None:
    """The labels of rows to predict: a class's number, a number, or `of_words` a class's number for each word.

    None: they have none to score the predictions by; where some have, a warning says what is wrong with the others.
    """
    if columns.label not in split.rows.column_names:
        return None
    needed = (*columns.inputs, columns.label) if of_words else (columns.label,)
    try:
        rows = [(values, split.place(row)) for row, values in split.good_rows(needed)]
        split.bad.refuse(split.where, len(split.rows))
        given = [values[columns.label] for values, _ in rows]
        if all(one in HIDDEN for value in given for one in (value if isinstance(value, list) else [value])):
            return None
        if not of_words:
            return [labels.encode(value, where) for value, (_, where) in zip(given, rows, strict=True)]
        return [_word_labels(labels, values[columns.label], values[columns.inputs[0]], where) for values, where in rows]
    except UserError as error:
        logger.warning("%s The predictions get no score.", error)
        return None
