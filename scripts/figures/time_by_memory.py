"""Time of a step against what it keeps in memory, every method and proportion, with the Pareto front.

    python scripts/figures/time_by_memory.py

Reads the suite `proportions` (or, of a GPU's file, `gpu_proportions`) of `scripts/bench/results/step_cpu.json`, and the
suite `table`, whose times are of more rounds, where it has the same case; writes `time_by_memory.png` beside this file.
Both axes are shares of plain training's; percentages beside the points are the proportions of selected tokens. The
front is that of one proportion, as fewer tokens are always cheaper, and teach less:
no method at 30 % is both faster and smaller than a point of it.
"""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator
from style import LOOKS, STEP_CPU, TRAINED, command, describe, device_of, panels, rows_of, save

LABELLED = (0.1, 0.3, 0.5, 1.0)  # proportions whose points are named
RECOMMENDED = 0.3
SAME_STEP = {"train", "method", "proportion", "dtype", "batch", "length", "layers", "key_value_heads", "vocabulary"}


def draw(source: Path, output: Path) -> None:
    rows, report = rows_of(source, "proportions", "gpu_proportions")
    rows = [better_timed(row, report["rows"]) for row in rows]
    trained = [train for train in TRAINED if any(row["train"] == train for row in rows)]
    figure, axes = panels(trained, height=4.6, sharey=True)
    for train, panel in axes.items():
        draw_panel(panel, [row for row in rows if row["train"] == train])
        panel.set_title(TRAINED[train])
        panel.set_xlabel("kept for the backward pass, % of plain")
    first = next(iter(axes.values()))
    first.set_ylabel("time of a step, % of plain")
    first.set_ylim(0, 108 * max(row["time_ratio_to_full"][1] for row in rows))
    figure.suptitle(f"{describe(rows[0])}\n{device_of(report)}", fontsize=8.5, color="#555555")
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9.5)
    save(figure, output)


def better_timed(row: dict, measured: list[dict]) -> dict:
    """The row of the suite `table` for the same step, where there is one: its ratios are medians of more rounds."""
    same = [
        other
        for other in measured
        if other["suite"] == "table" and all(other[name] == row[name] for name in row if name in SAME_STEP)
    ]
    return same[0] if same else row


def draw_panel(panel: Axes, rows: list[dict]) -> None:
    points = {id(row): (100 * row["bytes_ratio_to_full"], 100 * row["time_ratio_to_full"][1]) for row in rows}
    best = front([points[id(row)] for row in rows if row["proportion"] in (None, RECOMMENDED)])
    look = {"color": "#bbbbbb", "linewidth": 7, "alpha": 0.5, "solid_capstyle": "round", "zorder": 1}
    panel.plot(*zip(*best, strict=True), label=f"Pareto front at {RECOMMENDED:.0%}", **look)
    for method, look in LOOKS.items():
        chosen = sorted((row for row in rows if row["method"] == method), key=lambda row: row["proportion"] or 0)
        if not chosen:
            continue
        xs, ys = zip(*(points[id(row)] for row in chosen), strict=True)
        panel.plot(xs, ys, color=look.color, linestyle=look.dash, linewidth=1.2, marker=look.marker, label=look.name)
        for row, x, y in zip(chosen, xs, ys, strict=True):
            if row["proportion"] in LABELLED:
                look_of_text = {"textcoords": "offset points", "fontsize": 8.5, "color": look.color}
                place = {"xytext": (-8, -4), "ha": "right"} if method == "tokentune_segments" else {"xytext": (8, -5)}
                panel.annotate(f"{row['proportion']:.0%}", (x, y), **place, **look_of_text)
    panel.set_xscale("log")
    low, high = min(x for x, _ in points.values()), max(x for x, _ in points.values())
    panel.set_xlim(0.7 * low, 1.7 * high)
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100) if 0.7 * low <= tick]
    panel.set_xticks(ticks, [f"{tick}" for tick in ticks])
    panel.xaxis.set_minor_locator(NullLocator())


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both coordinates, from the smallest memory on."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


if __name__ == "__main__":
    command(__doc__, STEP_CPU, draw, "time_by_memory.png")
