"""Labelled records to rows: which columns hold what, checks of each row, texts and words to tokens.

read_split -> find_columns -> labels.find_labels -> encode_texts | encode_words  (images: images.py)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset, Json, List, Value
from transformers import BatchEncoding, PreTrainedTokenizerBase

from tokentune.data.bad_rows import BadRows
from tokentune.data.conversations import text_of
from tokentune.data.dataset_layout import CHOICES, tells_split
from tokentune.data.record_files import ROWS_AT_ONCE
from tokentune.data.records import load_records, require_columns
from tokentune.data.sources import is_local_path, listed
from tokentune.encoders.classification_arguments import ClassificationArguments, LabelledRowsArguments
from tokentune.encoders.glue import COLUMN_NAMES, HUB_ID
from tokentune.encoders.images import holds_images, load_image_folder
from tokentune.encoders.labels import Labels, encoded_label, shortened, values_of
from tokentune.errors import UserError
from tokentune.selection import IGNORED_LABEL

FLAGS = {
    "train": "--dataset_name_or_path",
    "validation": "--eval_dataset_name_or_path",
    "test": "--test_dataset_name_or_path",
}
LABEL_COLUMNS = {
    "text": ("label", "labels"),
    "image": ("label", "labels"),
    "token": ("ner_tags", "tags", "labels", "label"),
}
WORD_COLUMNS, IMAGE_COLUMNS = ("tokens", "words"), ("image", "img")


@dataclass
class Split:
    """One split as it was read, and where it came from."""

    rows: Dataset
    where: str  # the flag and its value: how messages begin
    bad: BadRows = field(default_factory=lambda: BadRows("stop"))
    numbers: Sequence[int] | None = None  # of the rows in what was read; None: all of it

    def place(self, row: int) -> str:
        """How messages about a row begin."""
        return f"{self.where}, row {self.number(row) + 1}"

    def number(self, row: int) -> int:
        """Of a row in what was read, from 0."""
        return row if self.numbers is None else self.numbers[row]

    def good_rows(self, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """(row, its values in these columns) of the rows that could be read; other columns are not looked at.

        Raises:
            UserError: the values cannot be converted.
        """
        rows = self.rows.select_columns(list(dict.fromkeys(columns)))
        for first in range(0, len(rows), ROWS_AT_ONCE):
            part = rows.select(range(first, min(first + ROWS_AT_ONCE, len(rows))))
            values = {column: values_of(part, column, self.where) for column in part.column_names}
            for offset in range(len(part)):
                if self.number(first + offset) not in self.bad.rows:
                    yield first + offset, {column: values[column][offset] for column in values}


@dataclass(frozen=True)
class Columns:
    """Which columns hold what is classified (two for pairs) and its labels."""

    inputs: tuple[str, ...]
    label: str


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


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_split(arguments: ClassificationArguments, split: str) -> Split | None:
    """The rows of "train", "validation" or "test"; None for no test data.

    Without `--eval_dataset_name_or_path` the validation split of the training data's source is taken.

    Raises:
        UserError: as `load_records`; no validation data.
    """
    data, glue = arguments.data, arguments.task.glue
    name, flag = getattr(data, FLAGS[split].removeprefix("--")), FLAGS[split]
    if name is None and split == "test":
        return None
    if name is None:
        name, flag = data.dataset_name_or_path, FLAGS["train"]
        if split == "validation" and name is not None and is_local_path(name) and not _tells(data, name):
            raise UserError(
                f"{flag} {name} names no validation split, by which the best checkpoint is chosen: "
                "give --eval_dataset_name_or_path."
            )
    asked_split, asked_config = _asked(arguments, split, name)
    if glue is not None and (name is None or name == HUB_ID):
        name, asked_config = HUB_ID, asked_config or glue.config
        asked_split = asked_split or {"train": "train", "validation": glue.validation, "test": glue.test}[split]
    # A prediction is written for every row to be predicted.
    bad = BadRows("stop" if split == "test" else data.bad_rows, skippable=split != "test")
    if arguments.task.task_type == "image" and holds_images(name):
        if asked_config is not None:
            raise UserError(f"{CHOICES[split]}_config {asked_config}: a folder of images has no configurations.")
        rows = load_image_folder(name, flag=flag, role=split, split=asked_split)
    else:
        texts = arguments.task.text_columns if arguments.task.task_type == "text" else ()
        texts = glue.columns if glue is not None and not texts else texts
        chosen = {"split": asked_split, "config": asked_config}
        rows = load_records(name, flag=flag, role=split, **chosen, text_columns=texts, bad=bad)
    return Split(rows, f"{flag} {name}", bad)


def _tells(data: LabelledRowsArguments, name: str) -> bool:
    return data.eval_dataset_split is not None or tells_split(name, "validation")


def _asked(arguments: ClassificationArguments, split: str, name: str | None) -> tuple[str | None, str | None]:
    """The names of split and configuration that the flags tell; of one source, all splits are of one configuration."""
    data = arguments.data
    prefix = CHOICES[split].removeprefix("--")
    asked_split, config = (getattr(data, f"{prefix}_{what}") for what in ("split", "config"))
    return asked_split, config or (data.dataset_config if name == data.dataset_name_or_path else None)


def some_rows(split: Split, most: int | None) -> Split:
    """So many of the rows, in their order: drawn once, whatever the seed of the run. All, where there are no more."""
    if most is None or most >= len(split.rows):
        return split
    drawn = sorted(np.random.default_rng(0).choice(len(split.rows), size=most, replace=False).tolist())
    return Split(split.rows.select(drawn), split.where, split.bad, drawn)


# ---- columns ---------------------------------------------------------------------------------------------------------


def find_columns(arguments: ClassificationArguments, train: Split) -> Columns:
    """The columns that the flags or the task name, or those that their names and types tell.

    Raises:
        UserError: a named column is not there, or none or too many could be meant.
    """
    task, features = arguments.task, train.rows.features
    label = task.label_column or ("label" if task.glue is not None else None)
    if label is None:
        label = next((name for name in LABEL_COLUMNS[task.task_type] if name in features), None)
    if label is None:
        raise UserError(
            f"{train.where}: no column {' or '.join(map(repr, LABEL_COLUMNS[task.task_type]))}. It has "
            f"{listed(features)}: name the one of labels with --label_column."
        )
    inputs = tuple(task.text_columns) or (task.glue.columns if task.glue is not None else ())
    if not inputs:
        candidates = {"text": _texts, "token": _words, "image": _images}[task.task_type](train.rows, label)
        if not candidates:
            kinds = {"text": "of texts", "token": "of lists of words (tokens or words)", "image": "of images"}
            raise UserError(
                f"{train.where}: no column {kinds[task.task_type]}. It has {listed(features)}: "
                "name one with --text_columns."
            )
        if len(candidates) > 2:
            raise UserError(
                f"{train.where}: {len(candidates)} columns of texts ({listed(candidates)}): "
                "name one or two with --text_columns."
            )
        inputs = candidates
    require_columns(train.rows, [*inputs, label], train.where)
    return Columns(inputs, label)


def _texts(rows: Dataset, label: str) -> tuple[str, ...]:
    texts = [name for name, feature in rows.features.items() if name != label and _holds_texts(rows, name, feature)]
    known = next((names for names in COLUMN_NAMES if all(name in texts for name in names)), None)
    return known or tuple(texts)


def _holds_texts(rows: Dataset, name: str, feature: Any) -> bool:
    if isinstance(feature, Json):  # not all values are of one type: texts, but for a bad row
        return isinstance(next((value for value in rows[name] if value is not None), None), str)
    return isinstance(feature, Value) and "string" in feature.dtype


def _words(rows: Dataset, label: str) -> tuple[str, ...]:
    return tuple(name for name in WORD_COLUMNS if isinstance(rows.features.get(name), List) and name != label)[:1]


def _images(rows: Dataset, label: str) -> tuple[str, ...]:
    return tuple(name for name in IMAGE_COLUMNS if name in rows.features and name != label)[:1]


# ---- rows ------------------------------------------------------------------------------------------------------------

Encoder = Callable[[Split, Columns, Labels | None], Encoded]


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
    checked: list[Any] = []
    for row, values in split.good_rows(needed):
        where = split.place(row)
        with split.bad.catch(where):
            checked.append(check(values, where))
        if len(checked) == ROWS_AT_ONCE:
            yield checked
            checked = []
    if checked:
        yield checked
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


def describe(labels: Labels) -> str:
    """For the log: the classes, or that a number is predicted."""
    if labels.is_regression:
        return "a number is predicted (mean squared error)"
    return f"{len(labels.names)} classes: {shortened(', '.join(labels.names))}"
