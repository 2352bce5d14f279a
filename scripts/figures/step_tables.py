"""The tables of `scripts/bench/step.py`: time and memory of a training step on the CPU.

Not a command: `scripts/docs.py` puts them into README and docs.
"""

import statistics

from quality_tables import BYTES_IN_MIB
from tables import METHOD_NAMES, WEIGHTS, markdown, read


def step_rows(suite: str, **chosen: object) -> list[dict]:
    """Rows of a suite of scripts/bench/step.py with these settings, without those that ran out of memory."""
    rows = [row for row in read("step_cpu.json")["rows"] if row["suite"] == suite and "error" not in row]
    return [row for row in rows if all(row[key] == value for key, value in chosen.items())]


def times(row: dict, base: str) -> str:
    """0.45 (0.44 to 0.46): the time's ratio with its interval; 1 for the base itself."""
    if row["method"] == base:
        return "1"
    low, middle, high = row[f"time_ratio_to_{base}"]
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def step_table(**chosen: object) -> str:
    rows = []
    for row in step_rows("table", key_value_heads=4, dtype="float32", **chosen):
        saved, ratio = f"{row['saved_bytes'] / BYTES_IN_MIB:.0f} MiB", f"{row['bytes_ratio_to_full']:.2f}"
        seconds = f"{statistics.median(row['seconds']):.2f} s"
        rows.append([WEIGHTS[row["train"]], METHOD_NAMES[row["method"]], saved, ratio, seconds, times(row, "full")])
    return markdown(["trained", "method", "kept for backward", "of plain", "step", "of plain (95 % interval)"], rows)


def lowest_table() -> str:
    """24 layers, against gradient checkpointing with the loss in chunks."""
    base = "checkpointing_chunked"
    header = ["trained", "key-value heads", "method", *columns_against(base)]
    rows = []
    for row in step_rows("lowest"):
        if row["seconds"]:
            own = [WEIGHTS[row["train"]], heads_of(row), METHOD_NAMES[row["method"]]]
            rows.append([*own, *figures_against(base, row)])
    return markdown(header, rows)


def answers_table() -> str:
    """Long prompts: all tokens of the answers selected, 5 % of a row."""
    base = "checkpointing_chunked"
    header = ["layers", "trained", "key-value heads", "method", *columns_against(base)]
    rows = []
    for row in step_rows("answers"):
        name = METHOD_NAMES[row["method"]].replace("30 % of the tokens", "the answers").replace("30 %", "the answers")
        rows.append([str(row["layers"]), WEIGHTS[row["train"]], heads_of(row), name, *figures_against(base, row)])
    return markdown(header, rows)


def short_table(suite: str, selected: str, *, trains: tuple[str, ...] = ("full", "lora"), **chosen: object) -> str:
    """TokenTune below ordinary training with the loss in chunks, and both with checkpointing, each against the other.

    Args:
        selected: the tokens that are, in words.
        trains: ways to train.
        chosen: settings of the rows, which leave one case for each way to train.
    """
    pairs = {
        "full_chunked": ("tokentune", ""),
        "checkpointing_chunked": ("tokentune_checkpointing", ", checkpointing"),
    }
    rows = []
    for train in trains:
        found = {row["method"]: row for row in step_rows(suite, train=train, **chosen)}
        for base, (method, addition) in pairs.items():
            for row, name in ((found[base], "plain, loss in chunks"), (found[method], f"**TokenTune, {selected}**")):
                ratios = ["", ""] if row is found[base] else [f"{row[f'bytes_ratio_to_{base}']:.2f}", times(row, base)]
                saved = f"{row['saved_bytes'] / BYTES_IN_MIB:.0f} MiB"
                seconds = f"{statistics.median(row['seconds']):.2f} s"
                rows.append([WEIGHTS[train], name + addition, saved, ratios[0], seconds, ratios[1]])
    above = "of the row above"
    return markdown(["trained", "method", "kept for backward", above, "step", f"{above} (95 % interval)"], rows)


def columns_against(base: str) -> list[str]:
    name = METHOD_NAMES[base].removeprefix("plain, gradient ")
    return ["kept for backward", f"of {name}", "step", "time, of the same (95 % interval)"]


def figures_against(base: str, row: dict) -> list[str]:
    """A measured step beside another method's."""
    saved, ratio = f"{row['saved_bytes'] / BYTES_IN_MIB:.0f} MiB", f"{row[f'bytes_ratio_to_{base}']:.2f}"
    return [saved, ratio, f"{statistics.median(row['seconds']):.2f} s", times(row, base)]


def heads_of(row: dict) -> str:
    return f"{row['key_value_heads']} of {row['heads']}"


def growth_table() -> str:
    """Exponents of growth with the sequence and with layers, per method."""
    names = {"saved_bytes": "kept", "step_peak_bytes": "peak", "seconds": "time"}
    suites = {"length": "sequence", "depth": "layers"}
    found = [fit for fit in read("step_cpu.json")["growth"] if fit["suite"] in suites]
    fits = {(fit["method"], fit["suite"], fit["quantity"]): fit["exponent"] for fit in found}
    columns = [(suite, quantity) for suite in suites for quantity in names]
    methods = dict.fromkeys(method for method, *_ in fits)
    rows = [[METHOD_NAMES[m], *(f"{fits[m, *column]:.2f}" for column in columns)] for m in methods]
    return markdown(["grows with", *(f"{suites[suite]}: {names[quantity]}" for suite, quantity in columns)], rows)


def qlora_table() -> str:
    """Where a QLoRA step's time goes."""
    rows = []
    for row in step_rows("qlora"):
        split = row["dequantisation"]
        share = split["dequantisation_seconds"] / split["step_seconds"]
        seconds = f"{statistics.median(row['seconds']):.2f} s"
        rows.append([row["dtype"], METHOD_NAMES[row["method"]], seconds, times(row, "full"), f"{share:.0%}"])
    return markdown(["computed in", "method", "step", "of plain (95 % interval)", "dequantisation"], rows)


def bounds_table() -> str:
    """What the method is held to, beside what was measured."""
    rows = []
    for entry in read("step_cpu.json")["bounds"]:
        about = f"{WEIGHTS[entry['train']]}, {entry['key_value_heads']} key-value heads, {entry['dtype']}"
        measured = f"{entry['measured']:.3f}"
        if "interval" in entry:
            measured += " ({:.3f} to {:.3f})".format(*entry["interval"])
        rows.append([entry["what"], about, f"{entry['bound']:.2f}", measured, "yes" if entry["holds"] else "**no**"])
    return markdown(["ratio", "of", "at most", "measured", "holds"], rows)
