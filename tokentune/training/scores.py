"""Metrics of predictions by name, from scikit-learn, SciPy and seqeval.

For classes: accuracy, f1 (of class 1 where there are two, else the classes' mean), matthews_correlation; for a number:
pearson, spearman, mean_squared_error; for entities (labels B-..., I-..., O): f1, precision and recall of whole
entities, accuracy of words; for other classes of words the same as for classes.
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

    average = "binary" if len(labels.names) == 2 else "macro"
    return {
        "accuracy": float(accuracy_score(true, predicted)),
        "f1": float(f1_score(true, predicted, zero_division=0.0, average=average)),
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

    predicted, true = ([[labels.names[number] for number in row] for row in rows] for rows in (predicted, true))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # seqeval's own, on undefined scores
        scores = {"f1": f1_score, "precision": precision_score, "recall": recall_score}
        found = {name: float(score(true, predicted, zero_division=0)) for name, score in scores.items()}
        return found | {"accuracy": float(accuracy_score(true, predicted))}


def are_entities(labels: Labels) -> bool:
    """Whether the classes of words are parts of entities, which count as a whole."""
    return all(_ENTITY_LABEL.match(name) for name in labels.names) and any("-" in name for name in labels.names)


def scorer(task_type: str, labels: Labels) -> Any:
    """The function above that scores a task."""
    if task_type == "token":
        return of_words
    return of_numbers if labels.is_regression else of_classes


def score_predictions(
    task_type: str, predictions: Sequence[dict[str, Any]], true: Sequence[Any], labels: Labels
) -> dict[str, float]:
    """Scores of a test split's predictions.

    Args:
        predictions: as of `classification.predict`; words without one do not count.
        true: `encoding.true_labels`.
    """
    number = {name: number for number, name in enumerate(labels.names)}
    predicted = [entry["prediction"] for entry in predictions]
    if task_type == "token":
        pairs = [
            [(number[name], label) for name, label in zip(*row, strict=True) if name is not None]
            for row in zip(predicted, true, strict=True)
        ]
        predicted, true = ([[pair[at] for pair in row] for row in pairs] for at in (0, 1))
    elif not labels.is_regression:
        predicted = [number[name] for name in predicted]
    return scorer(task_type, labels)(predicted, true, labels)


def metric_names(task_type: str, labels: Labels) -> list[str]:
    """The metrics that the best checkpoint can be chosen by; the first is the default."""
    if task_type == "token" and are_entities(labels):
        return ["f1", "precision", "recall", "accuracy", "loss"]
    if labels.is_regression:
        return ["pearson", "spearman", "mean_squared_error", "loss"]
    return ["accuracy", "f1", "matthews_correlation", "loss"]
