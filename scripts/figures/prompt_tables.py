"""The tables of `scripts/bench/prompt_heavy.py` and `whole_runs.py`: header and rows.

Not a command: `scripts/docs.py` puts them into the docs.
"""

from typing import Any

from quality_tables import BYTES_IN_MIB, Table

TRAINED = {"lora": "LoRA", "full": "all weights"}
WHAT = {
    "tools": "tool calls",
    "names": "names written out",
    "opinions": "opinions, four examples in front",
    "lookup-1": "look-up, one link",
    "lookup-2": "look-up, two links",
}
METHODS = {
    "full": "full training",
    "full-chunked": "full, loss in chunks",
    "full-checkpointing": "full, checkpointing, loss in chunks",
    "full-micro-batch": "full, micro-batch of equal bytes, loss in chunks",
}


def task_label(task: str) -> str:
    """tiny-tools-lora -> tool calls, LoRA, tiny model."""
    name, _, trained = task.removeprefix("tiny-").rpartition("-")
    return f"{WHAT[name]}, {TRAINED[trained]}" + (", tiny model" if task.startswith("tiny-") else "")


def arm_label(arm: str) -> str:
    """answers+0.1-corrected -> TokenTune, answers+0.1, corrected."""
    return METHODS.get(arm) or f"TokenTune, {arm.replace('-', ', ')}"


def time_to_loss(report: dict[str, Any]) -> Table:
    """By task and arm: a step's cost, the loss of the longest runs, the time to full training's."""
    rows = []
    for row in report["comparison"]:
        label, last = arm_label(row["arm"]), row["points"][-1]
        facts = [task_label(row["task"]), label if row["arm"] in METHODS else f"**{label}**"]
        facts += [f"{row['ratio']:.2f}", f"{row['saved_bytes'] / BYTES_IN_MIB:.0f} MiB"]
        facts += [f"{last['loss']:.3f} ({last['steps']} steps)", f"{last['exact']:.0%}", f"{last['other_loss']:.3f}"]
        rows.append([*facts, goal(row["to_full"]), goal(row["to_gain"]), str(len(row["seeds"]))])
    header = ["task", "method", "time of a step, of full", "kept for backward", "validation loss", "exact"]
    header += ["loss of other rows", "time to full's loss, of full's (95 % interval)", "to 98 % of its gain", "seeds"]
    return header, rows


def whole_runs(report: dict[str, Any]) -> Table:
    """Tokens per second of whole runs, selective ones beside ordinary training of the same memory."""
    names = {"full": "full, loss in chunks", "checkpointing": METHODS["full-checkpointing"]}
    rows = []
    for row in report["rows"]:
        label, ratio = names.get(row["method"]) or f"**TokenTune, {row['method']}**", ""
        if "speed_ratio" in row:
            low, middle, high = row["speed_ratio"]
            ratio = f"{middle:.2f} ({low:.2f} to {high:.2f}) of {names[row['compared_with']]}"
        saved = f"{row['saved_for_backward_bytes'] / BYTES_IN_MIB:.0f} MiB"
        rows.append([label, f"{row['median']:.0f}", saved, ratio])
    return ["method", "tokens per second", "kept for backward", "speed, lowest and highest round"], rows


def goal(found: dict[str, Any]) -> str:
    """0.48 (0.41 to 0.60); where the longest runs are too short for it, a dash."""
    if found["ratio"] is None:
        return "not reached"
    low, high = (f"{found[end]:.2f}" if found[end] is not None else "-" for end in ("low", "high"))
    return f"{found['ratio']:.2f} ({low} to {high})"
