"""What a training step holds, stacked: weights, gradients, optimizer states, activations; every method side by side.

    python tokentune/estimate.py --model_name_or_path llama-2-7b --json estimate.json
    python scripts/figures/memory_breakdown.py --input estimate.json

Reads an estimate, or a file of `scripts/bench/step.py` (its suite `gpu_7b`, else `table`); writes
`memory_breakdown.png` beside this file.
"""

from pathlib import Path
from typing import Any, NamedTuple

from style import BLACK, BLUE, LOOKS, ORANGE, RESULTS, SKY, TRAINED, command, describe, panels, read_json, save

from tokentune.core.saved_tensors.saved_bytes import BYTES_IN_GIB, BYTES_IN_MIB
from tokentune.errors import UserError

PARTS = {"weights": BLACK, "gradients": ORANGE, "optimizer": SKY, "activations": BLUE}
PART_NAMES = {"optimizer": "optimizer states", "activations": "kept for the backward pass"}
ESTIMATED = {  # the estimate's names of the methods
    "full": "full",
    "plain, chunked loss": "full_chunked",
    "gradient checkpointing": "checkpointing",
    "gradient checkpointing + chunked loss": "checkpointing_chunked",
    "TokenTune": "tokentune",
    "TokenTune + checkpointing": "tokentune_checkpointing",
}
METHODS = (*ESTIMATED.values(), "tokentune_segments")


class Bar(NamedTuple):
    train: str
    method: str
    parts: dict[str, int]  # bytes
    peak: int  # bytes


def draw(source: Path, output: Path) -> None:
    bars, setting = read_bars(source)
    trained = [train for train in TRAINED if any(bar.train == train for bar in bars)]
    figure, axes = panels(trained, height=4.6, sharey=True)
    most = max(max(bar.peak, sum(bar.parts.values())) for bar in bars)
    unit, size = ("GiB", BYTES_IN_GIB) if most > BYTES_IN_GIB else ("MiB", BYTES_IN_MIB)
    for train, panel in axes.items():
        chosen = [bar for method in METHODS for bar in bars if (bar.train, bar.method) == (train, method)]
        bottom = [0.0] * len(chosen)
        for part, color in PARTS.items():
            heights = [bar.parts[part] / size for bar in chosen]
            name = PART_NAMES.get(part, part)
            panel.bar(range(len(chosen)), heights, 0.68, bottom=bottom, color=color, label=name)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        peaks = [bar.peak / size for bar in chosen]
        lines = {"color": "#111111", "linewidth": 1.6, "label": "peak of the step"}
        panel.hlines(peaks, [at - 0.42 for at in range(len(chosen))], [at + 0.42 for at in range(len(chosen))], **lines)
        for at, (top, peak) in enumerate(zip(bottom, peaks, strict=True)):
            panel.text(at, max(top, peak), f"{peak:.3g}", ha="center", va="bottom", fontsize=9)
        names = [LOOKS[bar.method].name.removeprefix("gradient ") for bar in chosen]
        wrapped = [name.replace(" + ", " +\n").replace(", ", ",\n") for name in names]
        panel.set_xticks(range(len(chosen)), wrapped, fontsize=8, rotation=45, ha="right", rotation_mode="anchor")
        panel.grid(visible=False, axis="x")
        panel.set_title(TRAINED[train])
    first = next(iter(axes.values()))
    first.set_ylabel(unit)
    first.set_ylim(0, 1.08 * most / size)
    figure.suptitle(setting, fontsize=9, color="#555555")
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9.5)
    save(figure, output)


def read_bars(path: Path) -> tuple[list[Bar], str]:
    """The bars and the setting, from either kind of file."""
    report = read_json(path)
    rows = report.get("rows", [])
    if any("bytes" in row for row in rows):
        return estimated_bars(report)
    rows = [row for row in rows if "peak_bytes" in row]
    for suite in ("gpu_7b", "table"):
        chosen = [row for row in rows if row.get("suite") == suite]
        if chosen:  # one model of the suite: that with the fewest key-value heads, in float32 where there is a choice
            heads = min(row["key_value_heads"] for row in chosen)
            kind = "float32" if any(row["dtype"] == "float32" for row in chosen) else chosen[0]["dtype"]
            chosen = [row for row in chosen if row["key_value_heads"] == heads and row["dtype"] == kind]
            return [measured_bar(row) for row in chosen], describe(chosen[0])
    raise UserError(f"--input {path}: holds neither an estimate nor the suites gpu_7b or table of a step benchmark")


def measured_bar(row: dict[str, Any]) -> Bar:
    sizes = {"activations": row["saved_bytes"]} | {p: row[f"{p}_bytes"] for p in PARTS if p != "activations"}
    return Bar(row["train"], row["method"], sizes, row["peak_bytes"])


def estimated_bars(report: dict[str, Any]) -> tuple[list[Bar], str]:
    trained = {name: train for train, name in TRAINED.items()}
    bars = []
    for row in report["rows"]:
        if row["bytes"] is not None and row["method"] in ESTIMATED:  # None: refused, with a reason
            sizes = {part: row["bytes"][part] for part in PARTS}
            bars.append(Bar(trained[row["weights"]], ESTIMATED[row["method"]], sizes, row["bytes"]["peak"]))
    settings = report["settings"]
    tokens = f"{settings['sequences']} x {settings['tokens']:,} tokens, proportion {settings['prefix_length']}"
    return bars, f"{settings['model']}, {tokens}, {settings['precision']}, {settings['optim']} (estimate)"


if __name__ == "__main__":
    command(__doc__, RESULTS / "estimate_llama_2_7b.json", draw, "memory_breakdown.png")
