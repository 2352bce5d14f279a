"""Which labels the rows of a classification have, and how often."""

from collections.abc import Mapping

import numpy as np

from tokentune.data.inspection.preview import share
from tokentune.data.labelled.encoding import Encoded
from tokentune.data.labelled.labels import Labels
from tokentune.sampling.sampler import IGNORED_LABEL

MOST_CLASSES = 20  # told one by one


def label_counts(splits: Mapping[str, Encoded], labels: Labels) -> dict[str, dict[str, str]]:
    """Of each split how often each class occurs, or which numbers are predicted; nothing of a split without labels.

    Of many classes those that occur most in the first split, and the others together.
    """
    values = {name: label_values(split, labels) for name, split in splits.items()}
    values = {name: found for name, found in values.items() if len(found)}
    if labels.is_regression:
        kinds = {"smallest": np.min, "mean": np.mean, "largest": np.max}
        return {
            name: {f"{kind} label": f"{of(found):.4g}" for kind, of in kinds.items()} for name, found in values.items()
        }
    classes, told = len(labels.names), {}
    counts = {name: np.bincount(found, minlength=classes) for name, found in values.items()}
    shown = range(classes)
    if classes > MOST_CLASSES:
        shown = np.argsort(-next(iter(counts.values())), kind="stable")[:MOST_CLASSES].tolist()
    for name, found in counts.items():
        told[name] = {labels.names[number]: share(int(found[number]), int(found.sum())) for number in shown}
        if others := classes - len(shown):
            rest = int(found.sum() - found[shown].sum())
            told[name][f"{others} other classes"] = share(rest, int(found.sum()))
    return told


def label_values(split: Encoded, labels: Labels) -> np.ndarray:
    """The labels of all rows, or of all words, as numbers; none of rows to predict without labels."""
    values = getattr(split.rows, "numbers", None) if split.truth is None else split.truth  # images are not opened
    if values is None:
        values = [row["labels"] for row in split.rows] if split.report.labels else []
    flat = np.concatenate([np.zeros(0), *map(np.atleast_1d, values)])
    return flat if labels.is_regression else flat[flat != IGNORED_LABEL].astype(np.int64)
