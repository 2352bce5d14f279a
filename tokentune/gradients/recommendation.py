"""One sentence of a diagnosis: which selection to take, and what it costs.

A selection's gradient over B rows is as noisy as full training's over e B rows (`effective_batch`), and takes a share t
of its time. The selection with the largest e / t gets the most out of an hour of training; above 1 it gets more than
full training. Only those count whose mean points where the full gradient does, and that select enough.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tokentune.settings.diagnose import Setting, named

FAILURES = ("proportion", "direction")  # signs of `failure_signs` that a selection is not to be taken
LEAST_SAVING = 0.05  # of time or bytes; else it is as good as full training


def recommend(full: Mapping[str, Any], results: Sequence[Mapping[str, Any]], warnings: Sequence[Mapping]) -> dict:
    """The report's `recommendation`. Args: its parts of the same names."""
    failing = {_setting(warning) for warning in warnings if warning["sign"] in FAILURES}
    sound = [result for result in results if _setting(result) not in failing]
    if not sound:
        return _none(
            "every selection that was compared points elsewhere than the full gradient, or selects too little (see the "
            "warnings): compare larger --proportions"
        )
    sound = [result for result in sound if result["whole"]["effective_batch"] is not None]
    if not sound:
        return _none("so few rows do not tell how noisy a gradient is: take more --rows")
    costs = [(result["seconds"] / full["seconds"], result["saved_ratio"], result) for result in sound]
    costs = [cost for cost in costs if min(cost[:2]) <= 1 - LEAST_SAVING and cost[2]["proportion"] != 1]
    if not costs:
        return _none("no selection that was compared saves time or bytes: train on all tokens, or compare smaller ones")
    time, saved, best = max(costs, key=lambda cost: cost[2]["whole"]["effective_batch"] / cost[0])
    effective, setting = best["whole"]["effective_batch"], _setting(best)
    pays = effective >= time
    correction = f" --gradient_correction {setting.correction:g}" if setting.correction else ""
    message = (
        f"--selection {setting.strategy} --prefix_length {named(setting.proportion)}{correction}: a step takes "
        f"{time:.2f} of the time of full training and {saved:.0%} of the bytes for its backward pass (measured here), "
        f"and its gradient is as precise as one over {effective:.0%} of the rows: {effective / time:.2f} times as much "
        "for the time"
    )
    if not pays:
        message = f"full training, where it fits into memory: it gets the most out of the time; else {message}"
    cost = {"time_ratio": time, "saved_ratio": saved, "effective_batch": effective, "pays_in_time": pays}
    return setting._asdict() | cost | {"message": message}


def _setting(place: Mapping[str, Any]) -> Setting:
    return Setting(*(place[name] for name in Setting._fields))


def _none(reason: str) -> dict[str, Any]:
    nothing = dict.fromkeys((*Setting._fields, "time_ratio", "saved_ratio", "effective_batch", "pays_in_time"))
    return nothing | {"message": f"none: {reason}"}
