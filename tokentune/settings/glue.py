"""The GLUE tasks (Wang et al., 2019) by name: where the hub keeps them, their columns, classes and metrics."""

from dataclasses import dataclass

HUB_ID = "nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """One task. `classes` in the order of their numbers in the data; empty: a number is predicted."""

    columns: tuple[str, ...]
    classes: tuple[str, ...]
    metric: str  # of the leaderboard; where that has two, the first
    config: str  # its name on the hub
    validation: str = "validation"  # the split that is evaluated on
    test: str = "test"


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_MNLI = (("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), "accuracy", "mnli")
TASKS = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), "matthews_correlation", "cola"),
    "sst2": GlueTask(("sentence",), ("negative", "positive"), "accuracy", "sst2"),
    "mrpc": GlueTask(_PAIR, ("not_equivalent", "equivalent"), "f1", "mrpc"),
    "stsb": GlueTask(_PAIR, (), "pearson", "stsb"),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate"), "f1", "qqp"),
    "mnli": GlueTask(*_MNLI, "validation_matched", "test_matched"),
    "mnli_mismatched": GlueTask(*_MNLI, "validation_mismatched", "test_mismatched"),
    "qnli": GlueTask(("question", "sentence"), _ENTAILMENT, "accuracy", "qnli"),
    "rte": GlueTask(_PAIR, _ENTAILMENT, "accuracy", "rte"),
    "wnli": GlueTask(_PAIR, ("not_entailment", "entailment"), "accuracy", "wnli"),
}
# What text columns are called there: looked for in any data set, pairs first.
COLUMN_NAMES = sorted({task.columns for task in TASKS.values()}, key=lambda columns: (-len(columns), columns))
