"""What is predicted: classes with their names and numbers, or a number; and the checks of a label column.

Labels may be whole numbers, texts, booleans, or numbers with a name each (`datasets.ClassLabel`); numbers with a
fraction are a target of regression.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow
from datasets import ClassLabel, Dataset, List

from tokentune.errors import UserError
from tokentune.settings.glue import GlueTask
from tokentune.sources import first_line

OUTSIDE = "O"  # the class of words that belong to no entity


@dataclass(frozen=True)
class Labels:
    """The classes in the order of the head's outputs; none for a number to predict (regression)."""

    names: tuple[str, ...]
    numbers: dict[Any, int]  # a label as it stands in the data -> number of its class
    unknown: str = "is not among the training data's"  # what is said of a label that is none of them

    def __str__(self) -> str:
        """For the log: the classes, or that a number is predicted."""
        if self.is_regression:
            return "a number is predicted (mean squared error)"
        return f"{len(self.names)} classes: {shortened(', '.join(self.names))}"

    @property
    def is_regression(self) -> bool:
        return not self.names

    @property
    def outputs(self) -> int:
        """Of the head, per text, token or image."""
        return len(self.names) or 1

    @property
    def outside(self) -> int | None:
        """The number of the class of words outside of entities; None where there is none."""
        return self.names.index(OUTSIDE) if OUTSIDE in self.names else None

    def encode(self, value: Any, where: str) -> int | float:
        """The class's number, or the number to predict. `where`: the file and row, to start a message with."""
        if self.is_regression:
            return float(value)
        if value not in self.numbers:
            known = ", ".join(repr(label) for label in self.numbers)
            raise UserError(f"{where}: label {value!r} {self.unknown}: {shortened(known)}.")
        return self.numbers[value]


def shortened(text: str, length: int = 200) -> str:
    return text if len(text) <= length else f"{text[:length]} ..."


def find_labels(rows: Dataset, column: str, where: str, *, task: GlueTask | None) -> Labels:
    """The labels of a training set of texts or images, by those rows whose label can be one.

    Args:
        task: whose classes are known; None: they are those of the column.

    Raises:
        UserError: no row has a label, or they are of several types; all are the same; not those of the task.
    """
    values = values_of(rows, column, where)
    kind = kind_of(values, column, where)
    values = [value for value in values if _can_be_label(value)]
    names = class_names(rows, column)
    if task is not None and not task.classes:
        if kind not in (int, float):
            raise UserError(f"{where}: {column!r} holds {kind.__name__} labels; this task predicts a number.")
        labels = Labels((), {})
    elif task is not None:
        labels = _task_labels(task, kind, column, where)
    elif kind is float:
        labels = Labels((), {})
    elif names:
        labels = Labels(names, {number: number for number in range(len(names))})
    else:
        labels = _labels_as_they_stand(values)
    first = values[0]
    if all(value == first for value in values):
        raise UserError(f"{where}: every row has the same label, {first!r}: there is nothing to learn.")
    return labels


def _task_labels(task: GlueTask, kind: type, column: str, where: str) -> Labels:
    """The classes of a GLUE task, by number or by name."""
    if kind is float:
        raise UserError(
            f"{where}: {column!r} holds labels of type {kind.__name__}; this task has the classes "
            f"{', '.join(task.classes)} (0 to {len(task.classes) - 1})."
        )
    known = task.classes if kind is str else range(len(task.classes))
    return Labels(task.classes, {label: number for number, label in enumerate(known)}, "is none of this task's")


def _labels_as_they_stand(values: Iterable[Any]) -> Labels:
    found = sorted(set(values))
    return Labels(tuple(str(value) for value in found), {value: number for number, value in enumerate(found)})


def find_token_labels(rows: Dataset, column: str, where: str) -> Labels:
    """The labels of a training set whose rows have one for each word.

    Raises:
        UserError: as `find_labels`.
    """
    lists = values_of(rows, column, where)
    if not any(isinstance(value, list) for value in lists):
        raise UserError(f"{where}, row 1: {column!r} is {lists[0]!r:.60}, not a list with one label for each word.")
    values = [label for labels in lists if isinstance(labels, list) for label in labels]
    if not values:
        raise UserError(f"{where}: {column!r} holds no label at all.")
    kind = kind_of(values, column, where, unit="label")
    values = [value for value in values if _can_be_label(value)]
    if kind is float:
        raise UserError(f"{where}: {column!r} holds numbers with a fraction; words are classified (whole or text).")
    names = class_names(rows, column)
    labels = Labels(names, {n: n for n in range(len(names))}) if names else _labels_as_they_stand(values)
    if len(set(values)) == 1:
        raise UserError(f"{where}: every word has the same label, {values[0]!r}: there is nothing to learn.")
    return labels


def values_of(rows: Dataset, column: str, where: str) -> list[Any]:
    """A column's values; the others are not looked at.

    Raises:
        UserError: they cannot be converted, such as a date beyond Python's.
    """
    try:
        return rows[column][:]
    except (pyarrow.ArrowException, ValueError, OverflowError, OSError, RuntimeError, ImportError) as error:
        raise UserError(f"{where}: column {column!r} cannot be read: {first_line(error)}") from error


def class_names(rows: Dataset, column: str) -> tuple[str, ...]:
    """The names that a data set gives to the numbers of its label column; empty where it names none."""
    feature = rows.features[column]
    if isinstance(feature, List):
        feature = feature.feature
    return tuple(feature.names) if isinstance(feature, ClassLabel) else ()


def _can_be_label(value: Any) -> bool:
    return isinstance(value, int | float | str)


def kind_of(values: Sequence[Any], column: str, where: str, *, unit: str = "row") -> type:
    """The one type of all values that can be labels: int (booleans too), float or str.

    Raises:
        UserError: none can, or two are of different types.
    """
    kinds: dict[type, int] = {}
    for number, value in enumerate(values, start=1):
        if _can_be_label(value):
            kinds.setdefault(int if isinstance(value, bool) else type(value), number)
    if not kinds:
        raise not_a_label(values[0], column, f"{where}, {unit} 1")
    if len(kinds) > 1:
        (first, _), (other, number), *_ = kinds.items()
        raise UserError(f"{where}, {unit} {number}: {column!r} is of type {other.__name__}, others {first.__name__}.")
    return next(iter(kinds))


def not_a_label(value: Any, column: str, where: str) -> UserError:
    """What to say of a value that cannot be a label."""
    if value is None:
        return UserError(f"{where}: {column!r} is missing; every row needs a label.")
    kind = type(value).__name__
    return UserError(f"{where}: {column!r} is {value!r:.60}; a label is a text or a number, not a {kind}.")


def encoded_label(labels: Labels, value: Any, column: str, where: str) -> int | float:
    """The class's number, or the number to predict. Raises UserError: it is missing, or none of the labels."""
    if not _can_be_label(value):
        raise not_a_label(value, column, where)
    if labels.is_regression and (isinstance(value, bool | str)):
        raise UserError(f"{where}: {column!r} is {value!r:.60}, not a number as in the training data.")
    return labels.encode(value, where)
