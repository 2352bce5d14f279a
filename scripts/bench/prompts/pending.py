"""The runs that a report lacks, in the order in which they are to be done, and how long they take."""

import argparse
from collections.abc import Iterator
from typing import Any

from prompts.arms import ARMS, FULL
from prompts.comparison import chosen_rate, rates_to_try, step_ratios
from prompts.tasks import Task
from prompts.training import Run


def pending(report: dict[str, Any], tasks: dict[str, Task], arms: list[str], seeds: list[int]) -> list[Run]:
    """Runs that are missing. A rate that is not chosen yet is None, in runs behind those that it is chosen by."""
    known = {(run["task"], run["arm"], run["steps"], run["seed"], run["rate"]) for run in report["runs"]}
    listed = dict.fromkeys(
        run for seed in seeds for name, task in tasks.items() for run in wanted(report, name, task, arms, seed)
    )
    return [run for run in listed if (run.task, run.arm, run.steps, run.seed, run.rate) not in known]


def wanted(report: dict[str, Any], name: str, task: Task, arms: list[str], seed: int) -> Iterator[Run]:
    """All runs of a task with this seed, done or not: first those that choose the rates, then by length.

    The first are of seed 0, one of them the chosen rate's shortest run. Arms that take losses over have that run alone.
    """
    calibrated = [arm for arm in arms if arm in step_ratios(report, name)]
    own = [arm for arm in calibrated if ARMS[arm].same_as is None]
    for arm in own:
        for rate in rates_to_try(report, name, arm):
            yield Run(name, arm, ARMS[arm].lengths(task)[0], 0, rate)
    for at in range(len(task.lengths)):
        for arm in sorted(own, key=lambda arm: arm == FULL):  # an interrupted measurement has no goal that nobody tried
            rate = chosen_rate(report, name, arm)
            if rate is not None or at > 0 or seed > 0:
                yield Run(name, arm, ARMS[arm].lengths(task)[at], seed, rate)
    if seed == 0:
        for arm in calibrated:
            if ARMS[arm].same_as is not None:
                yield Run(name, arm, task.lengths[0], 0, chosen_rate(report, name, arm))


def minutes_of(report: dict[str, Any], run: Run) -> float:
    """By the calibration."""
    seconds = run.steps * step_ratios(report, run.task)[run.arm]["step_seconds"]
    return (seconds + report["tasks"][run.task]["evaluation_seconds"]) / 60


def say_plan(report: dict[str, Any], tasks: dict[str, Task], options: argparse.Namespace) -> None:
    """Prints the number of missing runs and their minutes, by task, seed and arm."""
    total = 0.0
    for name in tasks:
        times = step_ratios(report, name)
        missing = [arm for arm in options.arms if arm not in times]
        if missing:
            print(f"{name}: not calibrated (--steps_only): {', '.join(missing)}")
        runs = pending(report, {name: tasks[name]}, options.arms, options.seeds)
        for seed in options.seeds:
            for arm in times:
                own = [run for run in runs if (run.seed, run.arm) == (seed, arm)]
                if own:
                    minutes = sum(minutes_of(report, run) for run in own)
                    total += minutes
                    step = f"{times[arm]['step_seconds']:.2f} s a step"
                    print(f"{name}, seed {seed}, {arm}: {len(own)} runs, {step}, {minutes:.1f} minutes")
    print(f"all together: {total:.0f} minutes")
