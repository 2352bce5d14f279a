"""Where prompts are longer than answers: the time to full training's loss, by arm, each with runs of several lengths.

    python scripts/bench/prompt_heavy.py --model FOLDER --data FOLDER --tasks tools-lora \
        --output scripts/bench/results/prompt_heavy.json
    python scripts/bench/prompt_heavy.py --tiny FOLDER --data FOLDER --small --output /tmp/prompt_heavy.json

Tasks (`prompts/tasks.py`) of a pretrained model (`--model`, such as SmolLM2-135M-Instruct) and of a tiny one
(`--tiny`); arms (`prompts/arms.py`) are flags of finetune.py. For each task: one calibration, in which the arms take
turns on the same batches (time and bytes of a step; the machine should have nothing else to do); three learning rates
for each arm at its shortest length, and more while the best is the highest or the lowest, chosen by training rows held
out; then runs of all lengths, seed 0 of every arm first. A run begins with the untrained model and has a schedule of
its own. Arms with full training's gradients (loss in chunks, checkpointing, micro-batches) have one run, as a check,
and full training's losses. The result is written after every run; a run that it holds is not repeated. `--plan` says
what is missing and how long it takes.

The JSON holds
    tasks         {task: settings, rows, tokens_per_row, answer_share, base: the untrained model's losses}
    calibrations  [{task, rounds, seconds and cpu_seconds: {arm: [by round]}, saved_bytes: {arm}, micro_batch, machine}]
    runs          [{task, arm, steps, seed, rate, seconds, cpu_seconds (of the steps alone), tokens_per_second,
                    tokens: {processed, selected, supervised}, validation, held_out, other}]
                  The last three: {loss_sums (nats), tokens, exact} of each row; `other`: rows of another kind (Alpaca).
    comparison    [{task, arm, rate, step_seconds, ratio (a step's time over full training's), cpu_ratio, saved_bytes,
                    bytes_ratio, seeds, points: [{steps, seconds, loss, low, high, losses (by seed), exact,
                    other_loss}], to_full, to_gain: {steps, ratio, low, high, reached, ratio_to_fastest}, fastest_full}]
                  `to_full`: the time to full training's last loss, over full training's own; `to_gain`: to 98 % of what
                  it gains. `prompts/comparison.py` says how.
    refused       {task: {arm: why}}
"""

import argparse
import gc
import json
import re
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from prompts.arms import ARMS, FULL, MICRO_BATCH
from prompts.calibration import calibrate
from prompts.comparison import compare
from prompts.pending import minutes_of, pending, say_plan
from prompts.tasks import TASKS, Task
from prompts.training import Place, Run, described, place_of, train
from transformers.utils.logging import disable_progress_bar

from tokentune.training.checkpoints.saving import write_whole


def main() -> None:
    options = parse()
    disable_progress_bar()  # of each run's weights
    report, tasks = read(options.output), chosen_tasks(options)
    if options.plan:
        say_plan(report, tasks, options)
        return
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        places = {}
        for name, task in tasks.items():
            model = options.model if task.model == "model" else options.tiny
            places[name] = place_of(task, model, options.data, Path(folder) / name)
            measure(report, name, places[name], options)
        if options.steps_only:
            return
        while runs := pending(report, tasks, options.arms, options.seeds):
            expected = [minutes_of(report, run) for run in runs]
            gone = (time.perf_counter() - started) / 60
            if options.minutes is not None and gone + expected[0] > options.minutes:
                print(f"{len(runs)} runs are left, {sum(expected):.0f} minutes", flush=True)
                return
            print(f"{gone:.0f} min gone, {sum(expected):.0f} to go in {len(runs)} runs: {said(runs[0])}", flush=True)
            report["runs"].append(done(report, runs[0], places[runs[0].task]))
            write(report, options.output)
            gc.collect()  # the model


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a pretrained causal language model")
    parser.add_argument("--tiny", type=Path, help="folder of a tiny one, for the tasks that begin with tiny-")
    parser.add_argument("--data", type=Path, required=True, help="holds tool_calls.*.jsonl, alpaca_en.*.jsonl, ...")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write, or to go on with")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="default: all tasks of the models that are given")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="full is always among them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=5, help="of the calibration")
    parser.add_argument("--minutes", type=float, help="begin no run that would end later")
    parser.add_argument("--plan", action="store_true", help="say what is missing, and do nothing")
    parser.add_argument("--steps_only", action="store_true", help="calibrate, and train nothing")
    parser.add_argument("--small", action="store_true", help="runs of one and two steps, to try the script out")
    options = parser.parse_args()
    options.arms = list(dict.fromkeys([FULL, *options.arms]))
    return options


def chosen_tasks(options: argparse.Namespace) -> dict[str, Task]:
    given = {flag for flag in ("model", "tiny") if getattr(options, flag) is not None}
    names = options.tasks or [name for name, task in TASKS.items() if task.model in given]
    if missing := {TASKS[name].model for name in names} - given:
        sys.exit(f"these tasks need --{' and --'.join(sorted(missing))}")
    return {name: TASKS[name].small() if options.small else TASKS[name] for name in names}


def said(run: Run) -> str:
    return f"{run.task}, {run.arm}, {run.steps} steps, seed {run.seed}, rate {run.rate:g}"


def measure(report: dict[str, Any], name: str, place: Place, options: argparse.Namespace) -> None:
    """The untrained model, and a calibration of the arms that have none."""
    if name not in report["tasks"]:
        report["tasks"][name] = described(place)
    known = {arm for entry in report["calibrations"] if entry["task"] == name for arm in entry["seconds"]}
    if missing := [arm for arm in options.arms if arm not in known]:
        print(f"{name}: time and bytes of {', '.join(missing)}", flush=True)
        found, refused = calibrate(place, missing, 1 if options.small else options.rounds)
        report["refused"][name] = refused
        if found is not None:
            report["calibrations"].append({"task": name} | found)
        for arm, why in refused.items():
            print(f"{name}: without {arm}: {why}", flush=True)
    write(report, options.output)


def done(report: dict[str, Any], run: Run, place: Place) -> dict[str, Any]:
    size = None
    if run.arm == MICRO_BATCH:
        size = next(
            entry["micro_batch"]
            for entry in report["calibrations"]
            if entry["task"] == run.task and "micro_batch" in entry
        )
    return asdict(run) | train(place, ARMS[run.arm], run, size)


def read(path: Path) -> dict[str, Any]:
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    unit = "nats per answer token"
    return {
        "schema_version": 1,
        "unit": unit,
        "tasks": {},
        "calibrations": [],
        "runs": [],
        "comparison": [],
        "refused": {},
    }


def write(report: dict[str, Any], path: Path) -> None:
    """Whole or not at all, with the comparison of all runs so far; lists of numbers on a line each."""
    report["comparison"] = compare(report)
    text = re.sub(r"\[[-+.\de,\s]*\]", lambda found: " ".join(found[0].split()), json.dumps(report, indent=1))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text + "\n")


if __name__ == "__main__":
    main()
