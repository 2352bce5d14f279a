"""What the runs say: each way to choose tokens against random ones and against full training, seed by seed.

A difference is the mean over the seeds that both have, of one's loss minus the other's: the same seed means the same
order of the rows and the same first adapter weights. It counts where it is larger than two standard errors, standard
deviation of the differences / sqrt(seeds). With three seeds chance alone does that in one of five cases (Student's t
with two degrees of freedom: 18 %), with five in one of nine (12 %).
"""

import math
import statistics
from typing import Any

from .experiments import BASELINES, EQUAL_BOTH, EQUAL_BYTES, EQUAL_TIME, Experiment, units

Row = dict[str, Any]
Key = tuple[str, str, str, float | None]  # arm, trained, method, proportion


def compare(runs: list[Row], steps: list[Row]) -> list[Row]:
    """One row for each method, sorted as the runs are.

    Args:
        runs: each with the fields of `Experiment`, `validation_loss` and `saved_for_backward_bytes`.
        steps: {trained, method, proportion, time_ratio_to_full} as far as measured.
    """
    groups: dict[Key, list[Row]] = {}
    for run in runs:
        groups.setdefault(key_of(run), []).append(run)
    times = {(row["trained"], row["method"], row["proportion"]): row["time_ratio_to_full"] for row in steps}
    return [summary_of(key, groups, times.get(key[1:])) for key in groups]


def key_of(run: Row) -> Key:
    return run["arm"], run["trained"], run["method"], run["proportion"]


def summary_of(key: Key, groups: dict[Key, list[Row]], time_ratio: list[float] | None) -> Row:
    arm, trained, method, proportion = key
    losses = [run["validation_loss"] for run in groups[key]]
    full = groups.get((arm, trained, "full", None), [])
    experiment, plain = (Experiment(arm, trained, name, proportion, 0) for name in (method, "full"))
    row = {"arm": arm, "trained": trained, "method": method, "proportion": proportion, "seeds": len(losses)}
    row |= {"validation_loss": statistics.fmean(losses), "standard_deviation": deviation(losses)}
    row["saved_for_backward_bytes"] = saved_bytes(groups[key])
    row["bytes_ratio_to_full"] = row["saved_for_backward_bytes"] / saved_bytes(full) if full else None
    row |= {"units_ratio_to_full": units(experiment) / units(plain), "time_ratio_to_full": time_ratio}
    others = {"random": ("random", proportion), "full": ("full", None)}
    if method not in BASELINES:
        others |= {"equal_time": (EQUAL_TIME, proportion), "equal_both": (EQUAL_BOTH, proportion)}
    own = by_seed(groups[key])
    for name, (other, share) in others.items():
        row[f"to_{name}"] = difference(own, by_seed(groups.get((arm, trained, other, share), [])))
    uncorrected, mark, _ = method.partition(", correction ")
    if mark:
        row["to_uncorrected"] = difference(own, by_seed(groups.get((arm, trained, uncorrected, proportion), [])))
    if method == EQUAL_BYTES and full:
        gaps = [abs(own[seed] - loss) for seed, loss in by_seed(full).items() if seed in own]
        row["rounding"] = max(gaps, default=None)
    return row


def by_seed(runs: list[Row]) -> dict[int, float]:
    return {run["seed"]: run["validation_loss"] for run in runs}


def difference(own: dict[int, float], other: dict[int, float], *, higher_is_better: bool = False) -> Row | None:
    """{mean, standard_error, seeds, better, worse} of own minus other; None without two seeds in common.

    Args:
        own, other: seed -> loss or score.
    """
    gaps = [value - other[seed] for seed, value in own.items() if seed in other]
    if len(gaps) < 2:
        return None
    mean, error = statistics.fmean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))
    above, below = mean > 2 * error, mean < -2 * error
    better, worse = (above, below) if higher_is_better else (below, above)
    return {"mean": mean, "standard_error": error, "seeds": len(gaps), "better": better, "worse": worse}


def deviation(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def saved_bytes(runs: list[Row]) -> float:
    """The median: a run measures its first micro-batch, whose rows depend on the seed."""
    return statistics.median(run["saved_for_backward_bytes"] for run in runs)
