"""What predictions are worth: metrics by name, from scikit-learn, SciPy and seqeval.

For classes: accuracy, f1 (of class 1 where there are two, else the classes' mean), matthews_correlation; for a number:
pearson, spearman, mean_squared_error; for entities (labels B-..., I-..., O): f1, precision and recall of whole
entities, accuracy of words; for other classes of words: accuracy, and the classes' mean f1.
"""

import re
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from tokentune.data.labelled.labels import Labels

LOWER_IS_BETTER = ("loss", "mean_squared_error")
_ENTITY_LABEL = re.compile(r"O$|[BIESLU]-.")


def of_classes(predicted: Sequence[int], true: Sequence[int], labels: Labels) -> dict[str, float]:
    """Scores of class numbers; a correlation or an F1 that is undefined (one class alone) counts as 0."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    two = len(labels.names) == 2
    average = {"average": "binary", "pos_label": 1} if two else {"average": "macro"}
    return {
        "accuracy": float(accuracy_score(true, predicted)),
        "f1": float(f1_score(true, predicted, zero_division=0.0, **average)),
        "matthews_correlation": float(matthews_corrcoef(true, predicted)),
    }


def of_numbers(predicted: Sequence[float], true: Sequence[float], labels: Labels) -> dict[str, float]:
    """Scores of numbers; the correlation of a constant is undefined and counts as 0."""
    from scipy.stats import pearsonr, spearmanr

    predicted, true = np.asarray(predicted, dtype=float), np.asarray(true, dtype=float)
    constant = len(true) < 2 or np.ptp(predicted) == 0 or np.ptp(true) == 0
    return {
        "pearson": 0.0 if constant else float(pearsonr(predicted, true).statistic),
        "spearman": 0.0 if constant else float(spearmanr(predicted, true).statistic),
        "mean_squared_error": float(np.mean((predicted - true) ** 2)),
    }


def of_words(predicted: Sequence[Sequence[int]], true: Sequence[Sequence[int]], labels: Labels) -> dict[str, float]:
    """Scores of class numbers of words, row by row."""
    if not are_entities(labels):
        return of_classes([n for row in predicted for n in row], [n for row in true for n in row], labels)
    from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

    predicted = [[labels.names[number] for number in row] for row in predicted]
    true = [[labels.names[number] for number in row] for row in true]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # seqeval's own, on what `zero_division` decides
        return {
            "f1": float(f1_score(true, predicted, zero_division=0)),
            "precision": float(precision_score(true, predicted, zero_division=0)),
            "recall": float(recall_score(true, predicted, zero_division=0)),
            "accuracy": float(accuracy_score(true, predicted)),
        }


def are_entities(labels: Labels) -> bool:
    """Whether the classes of words are parts of entities, which count as a whole."""
    return all(_ENTITY_LABEL.match(name) for name in labels.names) and any("-" in name for name in labels.names)


def scorer(task_type: str, labels: Labels) -> Any:
    """Which of the three a task is scored by."""
    if task_type == "token":
        return of_words
    return of_numbers if labels.is_regression else of_classes


def metric_names(task_type: str, labels: Labels) -> list[str]:
    """What the best checkpoint can be chosen by; the first is the default."""
    if task_type == "token":
        return ["f1", "precision", "recall", "accuracy", "loss"] if are_entities(labels) else _of_classes()
    return ["pearson", "spearman", "mean_squared_error", "loss"] if labels.is_regression else _of_classes()


def _of_classes() -> list[str]:
    return ["accuracy", "f1", "matthews_correlation", "loss"]
