"""Labelled records to rows: which columns hold what, checks of each row, texts and words to tokens.

read_split -> find_columns -> labels.find_labels -> encode_texts | encode_words  (images: images.py)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset, List, Value
from transformers import PreTrainedTokenizerBase

from tokentune.data.records import load_records, require_columns, tells_split
from tokentune.data.sources import is_local_path, listed
from tokentune.encoders.classification_arguments import ClassificationArguments
from tokentune.encoders.glue import COLUMN_NAMES, HUB_ID
from tokentune.encoders.images import holds_images, load_image_folder
from tokentune.encoders.labels import Labels, shortened
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


@dataclass(frozen=True)
class Columns:
    """Which columns hold what is classified (two for pairs) and its labels."""

    inputs: tuple[str, ...]
    label: str


@dataclass
class RowReport:
    """Counts of one split. `labels`: that the rows carry; `cut_labels`: of words behind `--max_length`."""

    rows: int = 0
    cut_rows: int = 0
    tokens: int = 0
    labels: int = 0
    cut_labels: int = 0

    def __str__(self) -> str:
        text = f"{self.rows} rows, {self.tokens} tokens, {self.labels} labels"
        cut = f", {self.cut_labels} labels lost" if self.cut_labels else ""
        return text + (f"; {self.cut_rows} rows cut at --max_length{cut}" if self.cut_rows else "")


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
        if split == "validation" and name is not None and is_local_path(name) and not _tells_validation(name):
            raise UserError(
                f"{flag} {name} names no validation split, by which the best checkpoint is chosen: "
                "give --eval_dataset_name_or_path."
            )
    config, chosen = None, split
    if glue is not None and (name is None or name == HUB_ID):
        name, config = HUB_ID, glue.config
        chosen = {"train": "train", "validation": glue.validation, "test": glue.test}[split]
    if arguments.task.task_type == "image" and holds_images(name):
        rows = load_image_folder(name, flag=flag, split=chosen)
    else:
        texts = arguments.task.text_columns if arguments.task.task_type == "text" else ()
        texts = glue.columns if glue is not None and not texts else texts
        rows = load_records(name, flag=flag, split=chosen, config=config, text_columns=texts)
    return Split(rows, f"{flag} {name}")


def _tells_validation(name: str) -> bool:
    return tells_split(name, "validation")


def some_rows(rows: Dataset, most: int | None) -> Dataset:
    """So many of the rows, in their order: drawn once, whatever the seed of the run. All, where there are no more."""
    if most is None or most >= len(rows):
        return rows
    return rows.select(sorted(np.random.default_rng(0).choice(len(rows), size=most, replace=False).tolist()))


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
    texts = [n for n, f in rows.features.items() if isinstance(f, Value) and f.dtype.endswith("string") and n != label]
    known = next((names for names in COLUMN_NAMES if all(name in texts for name in names)), None)
    return known or tuple(texts)


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
    texts = [list(_checked_texts(split, column)) for column in columns.inputs]
    for number, row in enumerate(zip(*texts, strict=True), start=1):
        if not any(text.strip() for text in row):
            named = " and ".join(map(repr, columns.inputs))
            raise UserError(f"{split.where}, row {number}: {named} {'is' if len(row) == 1 else 'are'} empty.")
    encoded = Encoded([])
    known = None if labels is None else split.rows[columns.label]
    whole = tokenizer(*texts)["input_ids"]
    cut = tokenizer(*texts, truncation=True, max_length=max_length)
    for row in range(len(whole)):
        item = {name: values[row] for name, values in cut.items()}
        if labels is not None:
            item["labels"] = encoded_label(labels, known[row], f"{split.where}, row {row + 1}", columns.label)
        _add(encoded, item, is_cut=len(whole[row]) > len(item["input_ids"]), labels=int(labels is not None))
    return encoded


def _checked_texts(split: Split, column: str) -> Iterator[str]:
    for number, text in enumerate(split.rows[column], start=1):
        if not isinstance(text, str):
            found = "is missing" if text is None else f"is {text!r:.60}, not text"
            raise UserError(f"{split.where}, row {number}: {column!r} {found}.")
        yield text


def encoded_label(labels: Labels, value: Any, where: str, column: str) -> int | float:
    if value is None:
        raise UserError(f"{where}: {column!r} is missing; every row needs a label.")
    if labels.is_regression and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise UserError(f"{where}: {column!r} is {value!r:.60}, not a number as in the training data.")
    if isinstance(value, list | dict):
        raise UserError(f"{where}: {column!r} is {value!r:.60}, not a label as in the training data.")
    return labels.encode(value, where)


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
    that was cut off.

    Raises:
        UserError: a row is no list of words, is empty, or has more or fewer labels than words; a label is unknown.
    """
    encoded = Encoded([])
    (column,) = columns.inputs
    known = None if labels is None else split.rows[columns.label]
    for row, words in enumerate(split.rows[column]):
        where = f"{split.where}, row {row + 1}"
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise UserError(f"{where}: {column!r} is {words!r:.60}, not a list of words.")
        if not any(word.strip() for word in words):
            raise UserError(f"{where}: {column!r} is empty.")
        item = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)
        first = _first_sub_words(item.word_ids(), len(words))
        item = dict(item)
        item["labels"] = [IGNORED_LABEL] * len(item["input_ids"])
        lost = sum(position is None for position in first)
        if labels is None:
            item["word_positions"] = first
        else:
            numbers = _word_labels(labels, known[row], words, columns.label, where)
            for position, number in zip(first, numbers, strict=True):
                if position is not None:
                    item["labels"][position] = number
            encoded.report.cut_labels += lost
        _add(encoded, item, is_cut=lost > 0, labels=0 if labels is None else len(words) - lost)
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
    return [labels.encode(value, f"{where}, word {n}") for n, value in enumerate(values, start=1)]


def describe(labels: Labels) -> str:
    """For the log: the classes, or that a number is predicted."""
    if labels.is_regression:
        return "a number is predicted (mean squared error)"
    return f"{len(labels.names)} classes: {shortened(', '.join(labels.names))}"
