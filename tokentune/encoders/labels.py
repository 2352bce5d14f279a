"""What is predicted: classes with their names and numbers, or a number; and the checks of a label column.

Labels may be whole numbers, texts, booleans, or numbers with a name each (`datasets.ClassLabel`); numbers with a
fraction are a target of regression.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset, List

from tokentune.encoders.glue import GlueTask
from tokentune.errors import UserError

OUTSIDE = "O"  # the class of words that belong to no entity


@dataclass(frozen=True)
class Labels:
    """The classes in the order of the head's outputs; none for a number to predict (regression)."""

    names: tuple[str, ...]
    numbers: dict[Any, int]  # a label as it stands in the data -> number of its class

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
            raise UserError(f"{where}: label {value!r} is not among the training data's: {shortened(known)}.")
        return self.numbers[value]


def shortened(text: str, length: int = 200) -> str:
    return text if len(text) <= length else f"{text[:length]} ..."


def find_labels(rows: Dataset, column: str, where: str, *, task: GlueTask | None) -> Labels:
    """The labels of a training set of texts or images.

    Args:
        task: whose classes are known; None: they are those of the column.

    Raises:
        UserError: a label is missing or of a type that is none; all are the same; not those of the task.
    """
    values = rows[column]
    kind = kind_of(values, column, where)
    names = class_names(rows, column)
    if task is not None and not task.classes:
        if kind not in (int, float):
            raise UserError(f"{where}: {column!r} holds {kind.__name__} labels; this task predicts a number.")
        labels = Labels((), {})
    elif task is not None:
        labels = _task_labels(task, kind, values, column, where)
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


def _task_labels(task: GlueTask, kind: type, values: Sequence[Any], column: str, where: str) -> Labels:
    """The classes of a GLUE task, by number or by name; every value is one of them."""
    if kind is str:
        labels = Labels(task.classes, {name: number for number, name in enumerate(task.classes)})
    elif kind is int:
        labels = Labels(task.classes, {number: number for number in range(len(task.classes))})
    else:
        raise UserError(
            f"{where}: {column!r} holds labels of type {kind.__name__}; this task has the classes "
            f"{', '.join(task.classes)} (0 to {len(task.classes) - 1})."
        )
    for row, value in enumerate(values, start=1):
        if value not in labels.numbers:
            raise UserError(
                f"{where}, row {row}: label {value!r} is none of this task's: "
                f"{', '.join(map(repr, labels.numbers))} ({', '.join(task.classes)})."
            )
    return labels


def _labels_as_they_stand(values: Iterable[Any]) -> Labels:
    found = sorted(set(values))
    return Labels(tuple(str(value) for value in found), {value: number for number, value in enumerate(found)})


def find_token_labels(rows: Dataset, column: str, where: str) -> Labels:
    """The labels of a training set whose rows have one for each word.

    Raises:
        UserError: as `find_labels`.
    """
    for row, value in enumerate(rows[column], start=1):
        if not isinstance(value, list):
            raise UserError(
                f"{where}, row {row}: {column!r} is {value!r:.60}, not a list with one label for each word."
            )
    values = [label for labels in rows[column] for label in labels]
    if not values:
        raise UserError(f"{where}: {column!r} holds no label at all.")
    kind = kind_of(values, column, where, unit="label")
    if kind is float:
        raise UserError(f"{where}: {column!r} holds numbers with a fraction; words are classified (whole or text).")
    names = class_names(rows, column)
    labels = Labels(names, {n: n for n in range(len(names))}) if names else _labels_as_they_stand(values)
    if len(set(values)) == 1:
        raise UserError(f"{where}: every word has the same label, {values[0]!r}: there is nothing to learn.")
    return labels


def class_names(rows: Dataset, column: str) -> tuple[str, ...]:
    """The names that a data set gives to the numbers of its label column; empty where it names none."""
    feature = rows.features[column]
    if isinstance(feature, List):
        feature = feature.feature
    return tuple(feature.names) if isinstance(feature, ClassLabel) else ()


def kind_of(values: Sequence[Any], column: str, where: str, *, unit: str = "row") -> type:
    """The one type of all labels: int (booleans too), float or str.

    Raises:
        UserError: one is missing, or of another type.
    """
    kinds: dict[type, int] = {}
    for number, value in enumerate(values, start=1):
        kind = int if isinstance(value, bool) else type(value)
        if value is None:
            raise UserError(f"{where}, {unit} {number}: {column!r} is missing; every row needs a label.")
        if kind not in (int, float, str):
            raise UserError(
                f"{where}, {unit} {number}: {column!r} is {value!r:.60}; a label is a text or a number, not a "
                f"{kind.__name__}."
            )
        kinds.setdefault(kind, number)
    if len(kinds) > 1:
        (first, _), (other, number), *_ = kinds.items()
        raise UserError(f"{where}, {unit} {number}: {column!r} is of type {other.__name__}, others {first.__name__}.")
    return next(iter(kinds))
