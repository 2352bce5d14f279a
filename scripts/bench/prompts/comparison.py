"""What the runs say: losses by length of run, and the time that each arm needs to the loss full training reaches.

Every point is a run of its own, with a schedule of its own; between two lengths the loss is taken as linear in the
logarithm of the steps. Intervals are those of a bootstrap (2.5 and 97.5 %): validation rows, seeds and rounds of the
calibration are drawn with replacement, the same rows and seeds for all arms of a task.
"""

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from prompts.arms import ARMS, FULL
from prompts.evaluating import loss_of

DRAWS = 1000
GAIN = 0.98  # of what full training gains over the untrained model
Row = dict[str, Any]
Curve = dict[int, np.ndarray]  # steps -> loss of every draw (DRAWS + 1,); the first draw is the rows as they are


def crossing(steps: Sequence[int], losses: Sequence[float], target: float) -> float:
    """The steps that a run needs for this loss; infinite where the longest one has not reached it.

    The shortest length where even that one has a lower loss: an upper bound then.
    """
    if losses[0] <= target:
        return steps[0]
    for (before, high), (after, low) in pairwise(zip(steps, losses, strict=True)):
        if low <= target:
            return before * (after / before) ** ((high - target) / (high - low))
    return math.inf


def chosen_rate(report: Row, task: str, arm: str) -> float | None:
    """The peak learning rate with the lowest loss on training rows held out; None: some were not tried yet.

    An arm with full training's gradients takes over full training's.
    """
    losses = losses_by_rate(report, task, arm)
    rates = rates_to_try(report, task, arm)
    return min(rates, key=losses.__getitem__) if set(rates) <= set(losses) else None


def rates_to_try(report: Row, task: str, arm: str) -> list[float]:
    """The task's peak learning rates, and as long as the highest or the lowest is the best, one beyond it."""
    entry, losses = report["tasks"][task], losses_by_rate(report, task, arm)
    rates = sorted(entry["rates"])
    while len(rates) < entry["most_rates"] and set(rates) <= set(losses):
        best = min(rates, key=losses.__getitem__)
        if best not in (rates[0], rates[-1]):
            break
        rates = [*rates, 2 * best] if best == rates[-1] else [best / 2, *rates]
    return rates


def losses_by_rate(report: Row, task: str, arm: str) -> dict[float, float]:
    """On training rows held out, of the shortest runs of seed 0."""
    arm = ARMS[arm].same_as or arm
    shortest = report["tasks"][task]["lengths"][0] * ARMS[arm].longer
    tried = [run for run in runs_of(report, task, arm) if (run["seed"], run["steps"]) == (0, shortest)]
    return {run["rate"]: loss_of(run["held_out"]) for run in tried}


def runs_of(report: Row, task: str, arm: str) -> list[Row]:
    return [run for run in report["runs"] if (run["task"], run["arm"]) == (task, arm)]


def compare(report: Row) -> list[Row]:
    """A row for every task and arm that is calibrated, and has runs with its chosen rate or takes others' over."""
    return [row for task in report["tasks"] for row in compare_task(report, task)]


def compare_task(report: Row, task: str) -> list[Row]:
    times = step_ratios(report, task)
    found = {arm: by_length(report, task, arm) for arm in times if ARMS[arm].same_as is None}
    if not found.get(FULL):
        return []
    draws = Draws(report["tasks"][task]["base"]["validation"], found[FULL])
    fastest = min((arm for arm in times if FULL in (arm, ARMS[arm].same_as)), key=lambda arm: times[arm]["ratio"])
    rows = []
    for arm, time in times.items():
        summary = draws.summary(found.get(ARMS[arm].same_as or arm, {}), time)
        if summary is not None:
            for goal in ("to_full", "to_gain"):
                ratio = summary[goal]["ratio"]
                summary[goal]["ratio_to_fastest"] = None if ratio is None else ratio / times[fastest]["ratio"]
            row = {"task": task, "arm": arm, "rate": chosen_rate(report, task, arm), "fastest_full": fastest}
            rows.append(row | time | summary | checked(report, task, arm))
    return rows


def by_length(report: Row, task: str, arm: str) -> dict[int, dict[int, Row]]:
    """steps -> seed -> run with the chosen rate, ascending; of the seeds alone that have all of the lengths."""
    rate = chosen_rate(report, task, arm)
    runs = [run for run in runs_of(report, task, arm) if run["rate"] == rate]
    lengths: dict[int, dict[int, Row]] = {steps: {} for steps in sorted({run["steps"] for run in runs})}
    for run in runs:
        lengths[run["steps"]][run["seed"]] = run
    whole = set.intersection(*(set(seeds) for seeds in lengths.values())) if lengths else set()
    return {steps: {seed: seeds[seed] for seed in sorted(whole)} for steps, seeds in lengths.items() if whole}


def step_ratios(report: Row, task: str) -> dict[str, Row]:
    """Of each arm: a step's seconds, its time over full training's by round, and the bytes it keeps.

    An arm's seconds are its ratio to full training in its own calibration, times full training's in the first one.
    """
    known = [entry for entry in report["calibrations"] if entry["task"] == task]
    found: dict[str, Row] = {}
    for entry in known:
        for arm in entry["seconds"]:
            ratios, cpu = (
                [one / full for one, full in zip(entry[clock][arm], entry[clock][FULL], strict=True)]
                for clock in ("seconds", "cpu_seconds")
            )
            full = statistics.median(known[0]["seconds"][FULL])
            found[arm] = {
                "step_seconds": statistics.median(ratios) * full,
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "cpu_ratio": statistics.median(cpu),
                "saved_bytes": entry["saved_bytes"][arm],
                "bytes_ratio": entry["saved_bytes"][arm] / entry["saved_bytes"][FULL],
            }
    return found


class Draws:
    """The draws of one task: how often each validation row counts in each of them.

    Args:
        base: the untrained model's losses.
        full: `by_length` of full training.
    """

    def __init__(self, base: Row, full: dict[int, dict[int, Row]]):
        self.base, self.full = base, full
        self.rng = np.random.default_rng(0)
        rows = len(base["tokens"])
        self.counts = self.rng.multinomial(rows, np.full(rows, 1 / rows), size=DRAWS)  # (draws, rows)
        self.counts = np.concatenate([np.ones((1, rows), dtype=int), self.counts])
        self.chances = self.rng.random((DRAWS + 1, 64))  # which seeds: the n-th of those that two arms share

    def summary(self, lengths: dict[int, dict[int, Row]], time: Row) -> Row | None:
        """The points of an arm, and its time over full training's to the same loss; None: they share no seed."""
        final = max(self.full)
        seeds = sorted({*lengths[max(lengths)]} & {*self.full[final]}) if lengths else []
        if not seeds:
            return None
        own, full = self.curve(lengths, seeds), self.curve(self.full, seeds)
        base = self.losses(self.base)
        points = []
        for steps, losses in own.items():
            runs = [lengths[steps][seed] for seed in seeds]
            low, high = np.quantile(losses[1:], (0.025, 0.975))
            point = {
                "steps": steps,
                "seconds": steps * time["step_seconds"],
                "loss": losses[0],
                "low": low,
                "high": high,
            }
            point["losses"] = [loss_of(run["validation"]) for run in runs]
            point["exact"] = statistics.fmean(statistics.fmean(run["validation"]["exact"]) for run in runs)
            points.append(point | {"other_loss": statistics.fmean(loss_of(run["other"]) for run in runs)})
        targets = {"to_full": full[final], "to_gain": base - GAIN * (base - full[final])}
        goals = {goal: self.time_to(own, full, losses, time["ratios"]) for goal, losses in targets.items()}
        return {"seeds": seeds, "points": points} | goals

    def losses(self, found: Row) -> np.ndarray:
        """Nats per answer token in each draw, (draws + 1,)."""
        return self.counts @ np.array(found["loss_sums"]) / (self.counts @ np.array(found["tokens"]))

    def curve(self, lengths: dict[int, dict[int, Row]], seeds: list[int]) -> Curve:
        """Means over the seeds that each draw takes; in the first draw, over all of them."""
        picks = (self.chances[:, : len(seeds)] * len(seeds)).astype(int)  # (draws + 1, seeds)
        picks[0] = range(len(seeds))
        curve = {}
        for steps, runs in lengths.items():
            by_seed = np.stack([self.losses(runs[seed]["validation"]) for seed in seeds])  # (seeds, draws + 1)
            curve[steps] = np.take_along_axis(by_seed.T, picks, axis=1).mean(1)
        return curve

    def time_to(self, own: Curve, full: Curve, targets: np.ndarray, ratios: list[float]) -> Row:
        """{steps, ratio, low, high, reached}: null where the longest run is too short; `reached`: share of draws."""
        steps, times = [], []
        for draw, target in enumerate(targets):
            needed, needed_by_full = (
                crossing(list(curve), [losses[draw] for losses in curve.values()], target) for curve in (own, full)
            )
            drawn = ratios if draw == 0 else self.rng.choice(ratios, len(ratios))
            steps.append(needed)
            times.append(needed / needed_by_full * float(np.median(drawn)))
        low, high = np.quantile(times[1:], (0.025, 0.975), method="nearest")
        reached = float(np.mean(np.isfinite(times[1:])))
        values = {"steps": steps[0], "ratio": times[0], "low": low, "high": high}
        return {name: float(value) if math.isfinite(value) else None for name, value in values.items()} | {
            "reached": reached
        }


def checked(report: Row, task: str, arm: str) -> Row:
    """Of an arm whose losses are full training's: how far its one run is from the same run of full training."""
    if ARMS[arm].same_as is None:
        return {}
    others = {key_of(run): run for run in runs_of(report, task, ARMS[arm].same_as)}
    pairs = [(run, others[key_of(run)]) for run in runs_of(report, task, arm) if key_of(run) in others]
    gaps = [loss_of(run["validation"]) - loss_of(other["validation"]) for run, other in pairs]
    return {"difference_to_full": gaps[0] if gaps else None}


def key_of(run: Row) -> tuple[int, int, float]:
    return run["steps"], run["seed"], run["rate"]
