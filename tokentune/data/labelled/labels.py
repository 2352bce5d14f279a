"""What is predicted: classes with their names and numbers, or a number; and the checks of a label column.

Labels may be whole numbers, texts, booleans, or numbers that have names (`datasets.ClassLabel`); numbers with a
fraction are predicted by regression.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import pyarrow
from datasets import ClassLabel, Dataset, List

from tokentune.errors import UserError
from tokentune.settings.glue import GlueTask
from tokentune.sources import first_line

OUTSIDE = "O"  # the class of words that belong to no entity
LABEL_TYPES = (int, float, str)


@dataclass(frozen=True)
class Labels:
    """The classes in the order of the head's outputs; none where a number is predicted (regression)."""

    names: tuple[str, ...]
    numbers: dict[Any, int]  # a label as the data has it -> number of its class
    column: str = "label"
    unknown: str = "is not among the training data's"  # what the message says of a label that is none of them

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

    def told(self, number: float) -> str:
        """An encoded label, in words."""
        return f"{self.column} {number:g}" if self.is_regression else f"{self.column} {self.names[int(number)]}"

    def of(self, feature: Any) -> Self:
        """The same classes as a column of this type numbers them; a folder of images without one class has others."""
        feature = feature.feature if isinstance(feature, List) else feature
        if not isinstance(feature, ClassLabel) or not {*feature.names} & {*self.names}:
            return self
        numbers = {n: self.names.index(name) for n, name in enumerate(feature.names) if name in self.names}
        return replace(self, numbers=numbers)

    def encode(self, value: Any, where: str) -> int | float:
        """The class's number, or the number to predict.

        Args:
            where: the file and row, to start a message with.

        Raises:
            UserError: the label is missing, or is none of these.
        """
        if not isinstance(value, LABEL_TYPES):
            raise _no_label(value, self.column, where)
        if self.is_regression and isinstance(value, bool | str):
            raise UserError(f"{where}: {self.column!r} is {value!r:.60}, not a number as in the training data.")
        if self.is_regression:
            return float(value)
        if value not in self.numbers:
            known = ", ".join(repr(label) for label in self.numbers)
            raise UserError(f"{where}: label {value!r} {self.unknown}: {shortened(known)}.")
        return self.numbers[value]


def shortened(text: str, length: int = 200) -> str:
    return text if len(text) <= length else f"{text[:length]} ..."


def find_labels(rows: Dataset, column: str, where: str, *, task: GlueTask | None) -> Labels:
    """The labels of a training set of texts or images. Rows whose value cannot be a label are not considered.

    Args:
        task: whose classes are known; None: they are those of the column.

    Raises:
        UserError: no row has a label, or they are of several types; all are the same; not those of the task.
    """
    values = _values_of(rows, column, where)
    kind = _type_of(values, column, where, "row")
    labels = Labels((), {}, column)
    if task is not None and not task.classes and kind is str:
        raise UserError(f"{where}: {column!r} holds {kind.__name__} labels; this task predicts a number.")
    if task is not None and task.classes:
        if kind is float:
            raise UserError(
                f"{where}: {column!r} holds labels of type {kind.__name__}; this task has the classes "
                f"{', '.join(task.classes)} (0 to {len(task.classes) - 1})."
            )
        known = task.classes if kind is str else range(len(task.classes))
        numbers = {label: number for number, label in enumerate(known)}
        labels = Labels(task.classes, numbers, column, "is none of this task's")
    elif task is None and kind is not float:
        labels = _classes(rows, column, values)
    _check_they_differ(values, where, "row")
    return labels


def find_token_labels(rows: Dataset, column: str, where: str) -> Labels:
    """The labels of a training set whose rows have one for each word. Raises UserError: as `find_labels`."""
    lists = _values_of(rows, column, where)
    if not any(isinstance(value, list) for value in lists):
        raise UserError(f"{where}, row 1: {column!r} is {lists[0]!r:.60}, not a list with one label for each word.")
    values = [label for labels in lists if isinstance(labels, list) for label in labels]
    if not values:
        raise UserError(f"{where}: {column!r} holds no label at all.")
    if _type_of(values, column, where, "label") is float:
        raise UserError(f"{where}: {column!r} holds numbers with a fraction; words are classified (whole or text).")
    _check_they_differ(values, where, "word")
    return _classes(rows, column, values)


def _classes(rows: Dataset, column: str, values: Sequence[Any]) -> Labels:
    """The classes that the data set names (`ClassLabel`), or those that occur, in ascending order."""
    feature = rows.features[column]
    feature = feature.feature if isinstance(feature, List) else feature
    if isinstance(feature, ClassLabel):
        return Labels(tuple(feature.names), {number: number for number in range(len(feature.names))}, column)
    found = sorted({value for value in values if isinstance(value, LABEL_TYPES)})
    return Labels(tuple(map(str, found)), {value: number for number, value in enumerate(found)}, column)


def _values_of(rows: Dataset, column: str, where: str) -> list[Any]:
    """A column's values; the others are not converted. Raises UserError: they cannot be converted, such as a date
    beyond Python's."""
    try:
        return rows[column][:]
    except (pyarrow.ArrowException, ValueError, OverflowError, OSError, RuntimeError, ImportError) as error:
        raise UserError(f"{where}: column {column!r} cannot be read: {first_line(error)}") from error


def _type_of(values: Sequence[Any], column: str, where: str, unit: str) -> type:
    """The one type of all values that can be labels: int (booleans too), float or str. Raises UserError: none can, or
    two are of different types."""
    kinds: dict[type, int] = {}
    for number, value in enumerate(values, start=1):
        if isinstance(value, LABEL_TYPES):
            kinds.setdefault(int if isinstance(value, bool) else type(value), number)
    if not kinds:
        raise _no_label(values[0], column, f"{where}, {unit} 1")
    if len(kinds) > 1:
        (first, _), (other, number), *_ = kinds.items()
        raise UserError(f"{where}, {unit} {number}: {column!r} is of type {other.__name__}, others {first.__name__}.")
    return next(iter(kinds))


def _check_they_differ(values: Iterable[Any], where: str, unit: str) -> None:
    first, *others = (value for value in values if isinstance(value, LABEL_TYPES))
    if all(value == first for value in others):
        raise UserError(f"{where}: every {unit} has the same label, {first!r}: there is nothing to learn.")


def _no_label(value: Any, column: str, where: str) -> UserError:
    if value is None:
        return UserError(f"{where}: {column!r} is missing; every row needs a label.")
    kind = type(value).__name__
    return UserError(f"{where}: {column!r} is {value!r:.60}; a label is a text or a number, not a {kind}.")
