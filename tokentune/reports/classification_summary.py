"""The files that a run of `classify.py` leaves besides its weights.

What its summaries hold: docs/encoders.md, "The summaries".
"""

import itertools
import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from tokentune.data.labelled.encoding import Encoded
from tokentune.data.labelled.labels import Labels
from tokentune.data.labelled.splits import ClassificationData
from tokentune.data.row_sizes import target_counts_of
from tokentune.environment import device_facts, library_versions
from tokentune.file_names import PREDICTIONS_NAME
from tokentune.reports.summary import run_facts
from tokentune.sampling.schedule import Answers
from tokentune.settings.classification import ClassificationArguments
from tokentune.training.checkpoints.saving import write_whole
from tokentune.training.nan_batch import sampler_of
from tokentune.training.scores import LOWER_IS_BETTER
from tokentune.training.trainer import SelectiveTrainer

SCHEMA_VERSION = 1
SHOWN = ("seconds_per_step", "saved_for_backward_bytes", "peak_memory_bytes", "share_of_labels_trained")  # per seed


def seed_summary(
    trainer: SelectiveTrainer,
    arguments: ClassificationArguments,
    data: ClassificationData,
    model_facts: dict[str, Any],
    metric: str,
    test: dict[str, Any] | None,
) -> dict[str, Any]:
    """The content of a seed's `training_summary.json`.

    Args:
        model_facts: as `summary.build_summary`.
        metric: of the score.
        test: in the first process, {metric, score, metrics} of the test data; None: it has no labels.
    """
    counts = trainer.figures.tokens
    labels = labels_seen(trainer, arguments, data.train)
    epochs = {entry["step"]: entry["epoch"] for entry in trainer.state.log_history if "eval_loss" in entry}
    evaluations = [{"step": step, "epoch": epochs[step]} | figures for step, figures in trainer.figures.evaluations]
    best = (min if metric in LOWER_IS_BETTER else max)(evaluations, key=lambda entry: entry[metric])
    figures = {name: value for name, value in best.items() if name not in ("step", "epoch")}
    reports = {name: split and split.report for name, split in data.splits.items()}
    trained = counts["selected_supervised"]
    tokens = {name: counts[name] for name in ("processed", "selected")} | {"labels": labels, "selected_labels": trained}
    return run_facts(trainer, arguments, model_facts, reports, tokens) | {
        "share_of_labels_trained": trained / labels if labels else None,
        "evaluations": evaluations,
        "metric": metric,
        "best": {"step": best["step"], "score": best[metric], "metrics": figures},
        "test": gather_object([test])[0],
        "seconds_per_step": statistics.median(trainer.figures.step_seconds),
    }


def labels_seen(trainer: SelectiveTrainer, arguments: ClassificationArguments, train: Encoded) -> int:
    """The number of labels in all batches, trained on or not. Every process must call it."""
    if arguments.task.task_type != "token" or not arguments.selection.tokentune:
        return trainer.figures.tokens["selected_supervised"]  # all labels: the pooled token is always selected
    epochs = trainer.state.epoch
    if epochs == int(epochs):
        return train.report.labels * int(epochs)
    loader = trainer.get_train_dataloader()
    sampler, counts, seen = sampler_of(loader), target_counts_of(train.rows, causal=False), 0
    for epoch in range(math.ceil(epochs)):
        sampler.set_epoch(epoch)
        batches = round(len(loader) * min(1.0, epochs - epoch))
        for numbers in itertools.islice(loader.batch_sampler, batches):
            seen += sum(int(counts[number]) for number in numbers if number is not None)
    return sum(gather_object([seen]))


def scores_over_seeds(
    summaries: list[dict[str, Any]], arguments: ClassificationArguments, labels: Labels
) -> dict[str, Any]:
    """The content of `classification_summary.json`, from the summaries of all seeds."""
    selection = arguments.selection
    seeds = [
        {
            "seed": summary["seed"],
            **{name: summary["best"][name] for name in ("score", "metrics")},
            **{name: summary[name] for name in SHOWN},
            "train_rows": summary["data"]["train"]["rows"],
            "steps": summary["optimizer_steps"],
            "best_step": summary["best"]["step"],
            "test": summary["test"],
            "folder": summary["run_folder"],
        }
        for summary in summaries
    ]
    tests = [entry["test"]["score"] for entry in seeds if entry["test"] is not None]
    size = str(selection.selected) if isinstance(selection.selected, Answers) else selection.selected
    return {
        "schema_version": SCHEMA_VERSION,
        "task": arguments.task.name,
        "metric": summaries[0]["metric"],
        "classes": list(labels.names) or None,
        "method": {
            "tokentune": selection.tokentune,
            "prefix_length": size if selection.tokentune else None,
            "selection": selection.selection if selection.tokentune else None,
            "lora": arguments.adapters.lora,
        },
        "seeds": seeds,
        **_over_seeds([entry["score"] for entry in seeds]),
        "test": _over_seeds(tests) if tests else None,
        "settings": arguments.settings(),
        "device": device_facts(),
        "versions": library_versions(),
    }


def best_folder(scores: dict[str, Any]) -> Path:
    """Of the seed with the best score."""
    best = min if scores["metric"] in LOWER_IS_BETTER else max
    return Path(best(scores["seeds"], key=lambda seed: seed["score"])["folder"])


def _over_seeds(scores: list[float]) -> dict[str, float | None]:
    deviation = statistics.stdev(scores) if len(scores) > 1 else None
    return {"mean": statistics.fmean(scores), "standard_deviation": deviation}


def write_predictions(predictions: Iterable[dict[str, Any]], run_folder: Path) -> None:
    """Writes `predictions.jsonl`: one line for each row of the test data."""
    lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in predictions)
    write_whole(run_folder / PREDICTIONS_NAME, "".join(lines))


def said(scores: dict[str, Any]) -> str:
    """One line for the log: the score of every seed, mean and standard deviation, the share of labels trained on."""
    seeds = scores["seeds"]
    parts = [f"{scores['task']} {scores['metric']}: {_said([entry['score'] for entry in seeds], seeds, scores)}"]
    if (test := scores["test"]) is not None:
        each = _said([entry["test"]["score"] for entry in seeds], seeds, test)
        parts.append(f"test {seeds[0]['test']['metric']}: {each}")
    shares = [entry["share_of_labels_trained"] for entry in seeds]
    if None not in shares and (share := statistics.fmean(shares)) < 1:
        parts.append(f"{share:.1%} of the labels were learnt from")
    return "; ".join(parts)


def _said(scores: list[float], seeds: list[dict[str, Any]], over: dict[str, Any]) -> str:
    each = ", ".join(f"{score:.4f} (seed {entry['seed']})" for score, entry in zip(scores, seeds, strict=True))
    if over["standard_deviation"] is None:
        return each
    return f"{each}; mean {over['mean']:.4f}, standard deviation {over['standard_deviation']:.4f}"
