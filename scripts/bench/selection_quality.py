"""Which tokens: validation loss of instruction tuning by strategy, proportion and gradient correction, over seeds.

    python scripts/bench/selection_quality.py --model ../shared/models/llama-tiny --data ../shared/data \
        --output scripts/bench/results/selection_quality.json
    python scripts/bench/selection_quality.py --steps_only --output scripts/bench/results/selection_quality.json

Every run is the real command, `finetune.py`, in a process of its own; `quality/experiments.py` lists them, the honest
baselines among them: full training with a smaller micro-batch (the bytes of TokenTune), with gradient checkpointing,
and with fewer steps (the time of TokenTune, by the steps that `--steps_only` measures), at either micro-batch. The
result is written after every run; one that it holds with the same settings is not run again. Losses are nats per
supervised token over all validation rows, by the full forward pass.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from quality.comparison import compare
from quality.experiments import (
    EQUAL_BYTES,
    EQUAL_TIME,
    Experiment,
    TimeRatios,
    Workplace,
    experiments,
    units,
    words,
    workplace,
)
from quality.running import Job, run_all
from quality.step_times import measure_steps
from steps.report import machine

from tokentune import finetune

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
FIELDS = ("arm", "trained", "method", "proportion", "seed")


def main() -> None:
    options = parse()
    report = read(options.output)
    with tempfile.TemporaryDirectory() as folder:
        place = workplace(options.model, options.data, Path(folder))
        if options.steps_only:
            report["steps"] = measure_steps(place, options.rounds) | {"machine": machine("cpu")}
            write(report, options.output)
            return

        def done(job: Job, models: Path) -> None:
            experiment, settings = job.about
            summary = json.loads(next(models.glob("*/training_summary.json")).read_text(encoding="utf-8"))
            run = row(experiment, settings, summary)
            report["runs"] = [known for known in report["runs"] if experiment_of(known) != experiment] + [run]
            write(report, options.output)
            print(f"   {experiment.method}, seed {experiment.seed}: {run['validation_loss']:.4f}", flush=True)

        failed = run_all(missing(report, options, place), options.processes, place.folder, done)
    if failed:
        sys.exit(f"{len(failed)} runs failed: {', '.join(dict.fromkeys(job.about[0].method for job in failed))}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "llama-tiny", help="a small Llama")
    parser.add_argument("--data", type=Path, default=SHARED / "data", help="holds alpaca_en.{train,validation}.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write, or to go on with")
    parser.add_argument("--methods", nargs="+", help="these alone, by their names in quality/experiments.py")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time, each with one thread")
    parser.add_argument("--steps_only", action="store_true", help="measure a step's time, train nothing")
    parser.add_argument("--rounds", type=int, default=7, help="of --steps_only")
    return parser.parse_args()


def read(path: Path) -> dict[str, Any]:
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    return {"schema_version": 1, "unit": "nats per supervised token", "runs": [], "steps": None, "comparison": []}


def write(report: dict[str, Any], path: Path) -> None:
    """Whole or not at all, with the comparison of all runs so far."""
    report["comparison"] = compare(report["runs"], report["steps"]["rows"] if report["steps"] else [])
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".json.tmp")
    unfinished.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def missing(report: dict[str, Any], options: argparse.Namespace, place: Workplace) -> list[Job]:
    """A run for every experiment that the report lacks; without those whose time is not measured yet."""
    known = {experiment_of(run): run["settings"] for run in report["runs"]}
    ratios = time_ratios(report)
    jobs = []
    for experiment in experiments():
        settings = experiment.settings(ratios)
        if options.methods is not None and experiment.method not in options.methods:
            continue
        if settings is not None and known.get(experiment) != settings:
            line = words(place, experiment, settings)
            jobs.append(Job(str(experiment), finetune.main, line, (experiment, settings)))
    if not ratios and (options.methods is None or EQUAL_TIME in options.methods):
        print(f'"{EQUAL_TIME}" is left out: no step was measured yet (--steps_only)', flush=True)
    return jobs


def time_ratios(report: dict[str, Any]) -> TimeRatios:
    """Medians over the rounds of the step times' ratio within a round."""
    rows = report["steps"]["rows"] if report["steps"] else []
    seconds = {(row["trained"], row["method"], row["proportion"]): row["seconds"] for row in rows}
    ratios = {}
    for (trained, method, share), taken in seconds.items():
        for base, key in (("full", None), (EQUAL_BYTES, share)):
            if method == "random" and (trained, base, key) in seconds:
                pairs = zip(taken, seconds[trained, base, key], strict=True)
                ratios[trained, base, share] = statistics.median(one / other for one, other in pairs)
    return ratios


def experiment_of(run: dict[str, Any]) -> Experiment:
    return Experiment(**{name: run[name] for name in FIELDS})


def row(experiment: Experiment, settings: dict[str, str], summary: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a run: no path, and no seconds, as other programs may have run beside it."""
    own = {name: getattr(experiment, name) for name in FIELDS}
    losses = summary["validation_loss"]
    kept = {name: summary[name] for name in ("saved_for_backward_bytes", "optimizer_steps", "tokens")}
    kept |= {"units_per_token": units(experiment), "units": units(experiment) * summary["tokens"]["processed"]}
    losses = {"base_loss": losses["base"], "validation_loss": losses["final"], "training_loss": summary["loss"]["last"]}
    return own | losses | kept | {"settings": settings, "versions": summary["versions"]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
