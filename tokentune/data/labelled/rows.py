"""Labelled records: which data is read, and which columns hold what.

read_split -> find_columns -> labels.find_labels -> encoding | images
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
from tokentune.settings.classification import ClassificationArguments
from tokentune.settings.glue import COLUMN_NAMES, HUB_ID
from tokentune.sources import is_local_path, listed

# Task -> the names that its column of labels may have, and what the messages call its other columns.
TASK_COLUMNS = {
    "text": (("label", "labels"), "of texts"),
    "image": (("label", "labels"), "of images"),
    "token": (("ner_tags", "tags", "labels", "label"), "of lists of words (tokens or words)"),
}
WORD_COLUMNS, IMAGE_COLUMNS = ("tokens", "words"), ("image", "img")


@dataclass
class Split:
    """One split as it was read, and where it came from."""

    rows: Dataset
    where: str  # the flag and its value: how messages begin
    bad: BadRows = field(default_factory=lambda: BadRows("stop"))
    numbers: Sequence[int] | None = None  # the rows' numbers in what was read, from 0; None: all of it

    def __post_init__(self) -> None:
        self.numbers = range(len(self.rows)) if self.numbers is None else self.numbers

    def place(self, row: int) -> str:
        """How messages about a row begin."""
        return f"{self.where}, row {self.numbers[row] + 1}"

    def good_rows(self, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """(row, its values in these columns) of the rows that could be read; other columns are not converted. Raises
        UserError: the values cannot be converted."""
        for row, values in enumerate(rows_of_table(self.rows, columns, self.where)):
            if isinstance(values, UserError):
                self.bad.add(values)
            elif self.numbers[row] not in self.bad.rows:
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
    prefix = CHOICES[split].removeprefix("--")
    name, asked_split, config = (getattr(data, f"{prefix}_{what}") for what in ("name_or_path", "split", "config"))
    flag = f"{CHOICES[split]}_name_or_path"
    if name is None and split == "test":
        return None
    if name is None:
        name, flag = data.dataset_name_or_path, f"{CHOICES['train']}_name_or_path"
        told = asked_split is not None or name is None or not is_local_path(name) or tells_split(name, "validation")
        if split == "validation" and not told:
            raise UserError(
                f"{flag} {name} names no validation split, by which the best checkpoint is chosen: "
                "give --eval_dataset_name_or_path."
            )
    if name == data.dataset_name_or_path:  # all splits of one source are of one configuration
        config = config or data.dataset_config
    if glue is not None and (name is None or name == HUB_ID):
        name, config = HUB_ID, config or glue.config
        asked_split = asked_split or {"train": "train", "validation": glue.validation, "test": glue.test}[split]
    # A prediction is written for every row of the test split, so none is skipped.
    bad = BadRows("stop" if split == "test" else data.bad_rows, skippable=split != "test")
    if arguments.task.task_type == "image" and holds_images(name):
        if config is not None:
            raise UserError(f"{CHOICES[split]}_config {config}: a folder of images has no configurations.")
        rows = load_image_folder(name, flag=flag, role=split, split=asked_split)
    else:
        texts = _named_inputs(arguments) if arguments.task.task_type == "text" else ()
        rows = load_records(name, flag=flag, role=split, split=asked_split, config=config, text_columns=texts, bad=bad)
    return Split(rows, f"{flag} {name}", bad)


def _named_inputs(arguments: ClassificationArguments) -> tuple[str, ...]:
    """The columns of what is classified that the flags or the task name; empty where they name none."""
    glue = arguments.task.glue
    return tuple(arguments.task.text_columns) or (glue.columns if glue is not None else ())


def some_rows(split: Split, most: int | None) -> Split:
    """At most so many of the rows that could be read, in their order. The draw does not depend on the seed of the run.
    Raises UserError: there are others."""
    if most is None or most >= len(split.rows):
        return split
    split.bad.settle(split.where, len(split.rows))
    read = [row for row in range(len(split.rows)) if row not in split.bad.rows]
    drawn = sorted(np.random.default_rng(0).choice(read, size=min(most, len(read)), replace=False).tolist())
    return Split(split.rows.select(drawn), split.where, BadRows(split.bad.policy), drawn)


# ---- columns ---------------------------------------------------------------------------------------------------------


def find_columns(arguments: ClassificationArguments, train: Split) -> Columns:
    """The columns that the flags or the task name, or that are known by their names and types. Raises UserError: a
    named column is not there, or none or too many could be meant."""
    task, features = arguments.task, train.rows.features
    names, kind = TASK_COLUMNS[task.task_type]
    label = task.label_column or ("label" if task.glue is not None else next((n for n in names if n in features), None))
    if label is None:
        raise UserError(
            f"{train.where}: no column {' or '.join(map(repr, names))}. It has {listed(features)}: name the one of "
            "labels with --label_column."
        )
    inputs = _named_inputs(arguments)
    if not inputs:
        inputs = _candidates(train.rows, task.task_type, label)
        if not inputs:
            raise UserError(
                f"{train.where}: no column {kind}. It has {listed(features)}: name one with --text_columns."
            )
        if len(inputs) > 2:
            raise UserError(
                f"{train.where}: {len(inputs)} columns of texts ({listed(inputs)}): name one or two with "
                "--text_columns."
            )
    require_columns(train.rows, [*inputs, label], train.where)
    return Columns(inputs, label)


def require_columns(rows: Dataset, columns: Sequence[str], where: str, which: str = "") -> None:
    """Checks that the columns are there.

    Args:
        where: a flag and its value, to start the message with.
        which: what the message adds about missing ones.

    Raises:
        UserError: names the missing columns and those that are there.
    """
    if missing := [column for column in columns if column not in rows.column_names]:
        raise UserError(f"{where}: no column {listed(missing)}{which}. It has {listed(rows.column_names)}.")


def _candidates(rows: Dataset, task_type: str, label: str) -> tuple[str, ...]:
    """Columns that may hold what is classified, by their names and types."""
    features = {name: feature for name, feature in rows.features.items() if name != label}
    if task_type == "token":
        return tuple(name for name in WORD_COLUMNS if isinstance(features.get(name), List))[:1]
    if task_type == "image":
        return tuple(name for name in IMAGE_COLUMNS if name in features)[:1]
    texts = [name for name, feature in features.items() if _holds_texts(rows, name, feature)]
    return next((names for names in COLUMN_NAMES if {*names} <= {*texts}), tuple(texts))


def _holds_texts(rows: Dataset, name: str, feature: Any) -> bool:
    if isinstance(feature, Json):  # the values are of several types: texts, except in bad rows
        return isinstance(next((value for value in rows[name] if value is not None), None), str)
    return isinstance(feature, Value) and "string" in feature.dtype
