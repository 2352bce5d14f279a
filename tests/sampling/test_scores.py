"""Metrics by name: their values on predictions small enough to count by hand, and which a task has."""

import math

import pytest

from tokentune.data.labelled.labels import Labels
from tokentune.training.scores import metric_names, of_classes, of_numbers, of_words

TWO = Labels(("no", "yes"), {0: 0, 1: 1})
THREE = Labels(("a", "b", "c"), {"a": 0, "b": 1, "c": 2})
ENTITIES = Labels(("B-x", "I-x", "O"), {"B-x": 0, "I-x": 1, "O": 2})
NUMBER = Labels((), {})


def test_two_classes() -> None:
    """2 true positives, 1 false positive, 1 false negative, 2 true negatives."""
    scores = of_classes([1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0], TWO)
    assert scores["accuracy"] == pytest.approx(4 / 6)
    assert scores["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert scores["matthews_correlation"] == pytest.approx((2 * 2 - 1 * 1) / math.sqrt(3 * 3 * 3 * 3))


def test_f1_of_three_classes_is_their_mean() -> None:
    scores = of_classes([0, 1, 2, 2], [0, 1, 1, 2], THREE)
    assert scores["f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)


def test_one_class_predicted_throughout_is_no_correlation() -> None:
    scores = of_classes([0, 0, 0], [0, 1, 1], TWO)
    assert scores["matthews_correlation"] == 0.0 and scores["f1"] == 0.0


def test_numbers() -> None:
    scores = of_numbers([1.0, 2.0, 4.0], [0.0, 1.0, 3.0], NUMBER)
    assert scores == pytest.approx({"pearson": 1.0, "spearman": 1.0, "mean_squared_error": 1.0})
    assert of_numbers([2.0, 2.0], [0.0, 1.0], NUMBER)["pearson"] == 0.0


def test_entities_count_as_a_whole() -> None:
    """One of two entities has its second word wrong: half of them are found, though five of six words are right."""
    scores = of_words([[0, 1, 2], [0, 2, 2]], [[0, 1, 2], [0, 1, 2]], ENTITIES)
    assert scores["f1"] == pytest.approx(0.5) and scores["accuracy"] == pytest.approx(5 / 6)
    assert scores["precision"] == pytest.approx(0.5) and scores["recall"] == pytest.approx(0.5)


def test_words_that_are_no_entities_are_scored_alone() -> None:
    assert of_words([[0, 1], [2]], [[0, 1], [1]], THREE)["accuracy"] == pytest.approx(2 / 3)


def test_which_metrics_a_task_has() -> None:
    assert metric_names("text", TWO)[0] == "accuracy" and "pearson" not in metric_names("text", TWO)
    assert metric_names("text", NUMBER)[0] == "pearson"
    assert metric_names("token", ENTITIES) == ["f1", "precision", "recall", "accuracy", "loss"]
    assert metric_names("token", THREE)[0] == "accuracy"
