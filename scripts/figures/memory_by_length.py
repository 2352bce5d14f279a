"""Memory and time of one step against the sequence's length, on logarithmic axes, with the exponents of growth.

    python scripts/figures/memory_by_length.py

Reads the suite `length` (or, of a GPU's file, `gpu_length`) of `scripts/bench/results/step_cpu.json`; writes
`memory_by_length.png` beside this file. Memory is what autograd keeps for the backward pass.
"""

import statistics
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, NullLocator
from style import LOOKS, STEP_CPU, command, describe, panels, rows_of, save

from tokentune.core.saved_tensors.saved_bytes import BYTES_IN_MIB

SUITES = ("length", "gpu_length")
QUANTITIES = {
    "saved_bytes": ("kept for the backward pass, MiB", lambda row: row["saved_bytes"] / BYTES_IN_MIB),
    "seconds": ("step, seconds", lambda row: statistics.median(row["seconds"])),
}


def draw(source: Path, output: Path) -> None:
    rows, report = rows_of(source, *SUITES)
    exponents = {
        (fit["method"], fit["quantity"]): fit["exponent"] for fit in report["growth"] if "length" in fit["suite"]
    }
    figure, axes = panels(QUANTITIES)
    for quantity, panel in axes.items():
        draw_panel(panel, rows, quantity, exponents)
    setting = describe(rows[0]).replace(f" x {rows[0]['length']:,} tokens", " sequence")
    figure.suptitle(setting, fontsize=9, color="#555555")
    save(figure, output)


def draw_panel(panel: Axes, rows: list[dict], quantity: str, exponents: dict[tuple[str, str], float]) -> None:
    title, value = QUANTITIES[quantity]
    for method, look in LOOKS.items():
        chosen = sorted((row for row in rows if row["method"] == method), key=lambda row: row["length"])
        if chosen:
            exponent = exponents.get((method, quantity))
            label = look.name + ("" if exponent is None else f" (n$^{{{exponent:.2f}}}$)")
            points = [row["length"] for row in chosen], [value(row) for row in chosen]
            panel.plot(*points, color=look.color, linestyle=look.dash, marker=look.marker, label=label)
    lengths = sorted({row["length"] for row in rows})
    panel.set(xscale="log", yscale="log", title=title, xlabel="tokens per sequence, n")
    panel.set_xticks(lengths, [f"{length:,}" for length in lengths])
    panel.xaxis.set_minor_locator(NullLocator())
    low, high = panel.get_ylim()
    panel.set_ylim(low, high * (high / low) ** 0.5)  # room for the legend
    panel.yaxis.set_major_formatter(lambda tick, _: f"{tick:,.10g}")
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.legend(fontsize=8.5, loc="upper left")


if __name__ == "__main__":
    command(__doc__, STEP_CPU, draw, "memory_by_length.png")
