"""Labelled records: which data is read, and which columns hold what.

read_split -> find_columns -> labels.find_labels -> classification_encoding | images
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset, Json, List, Value

from tokentune.data.formats.bad_rows import BadRows
from tokentune.data.formats.dataset_layout import CHOICES, tells_split
from tokentune.data.formats.record_files import rows_of_table
from tokentune.data.formats.records import load_records
from tokentune.data.labelled.images import holds_images, load_image_folder
from tokentune.errors import UserError
from tokentune.settings.classification import ClassificationArguments, LabelledRowsArguments
from tokentune.settings.glue import COLUMN_NAMES, HUB_ID
from tokentune.sources import is_local_path, listed

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
        for row, values in enumerate(rows_of_table(self.rows, columns, self.where)):
            if isinstance(values, UserError):
                self.bad.add(values)
            elif self.number(row) not in self.bad.rows:
                yield row, values


@dataclass(frozen=True)
class Columns:
    """Which columns hold what is classified (two for pairs) and its labels."""

    inputs: tuple[str, ...]
    label: str


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


def require_columns(rows: Dataset, columns: Sequence[str], where: str, which: str = "") -> None:
    """Checks that the columns are there.

    Args:
        where: what holds them (a flag and its value), to start the message with.
        which: says more of those that are missing.

    Raises:
        UserError: names the missing columns and those that are there.
    """
    if missing := [column for column in columns if column not in rows.column_names]:
        raise UserError(f"{where}: no column {listed(missing)}{which}. It has {listed(rows.column_names)}.")


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
