"""Where prompts are longer than answers: validation loss against training time, from `scripts/bench/prompt_heavy.py`.

    python scripts/figures/prompt_heavy.py

A panel for each task, a line for each arm. Each point is the end of runs of one length with a learning-rate schedule of
their own, at the time of their steps on an idle machine; the band is the interval of a bootstrap over validation rows
and seeds. The dotted line is the loss of full training's longest runs.
"""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from prompt_tables import arm_label, task_label
from style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, RESULTS, SKY, VERMILION, command, pyplot, read_json, save

from tokentune.errors import UserError

MEASURED = RESULTS / "prompt_heavy.json"
LOOKS = {
    "full": (BLACK, "s", "-"),
    "full-chunked": (GREY, "s", "--"),
    "full-checkpointing": (SKY, "D", "--"),
    "full-micro-batch": (ORANGE, "D", ":"),
    "answers": (BLUE, "o", "-"),
    "answers-checkpointing": (BLUE, "x", "--"),
    "answers+0.1": (VERMILION, "^", "-"),
    "answers+0.3": (GREEN, "v", "-"),
    "answers+0.1-corrected": (VERMILION, "^", ":"),
    "answers+0.3-corrected": (GREEN, "v", ":"),
    "random-0.3": (PURPLE, "P", "-."),
}


def draw(source: Path, output: Path) -> None:
    rows = read_json(source).get("comparison", [])
    if not rows:
        raise UserError(
            f"--input {source}: holds no runs to compare. Measure them: python scripts/bench/prompt_heavy.py --help"
        )
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    columns = min(len(tasks), 3)
    lines = -(-len(tasks) // columns)
    size = (max(8.0, 4.6 * columns + 1.2), 4.2 * lines + 1)
    figure, axes = pyplot.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    handles = {}
    for task, panel in zip(tasks, axes.flat, strict=False):
        draw_task(panel, [row for row in rows if row["task"] == task])
        panel.set_title(task_label(task))
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    for panel in axes.flat[len(tasks) :]:
        panel.set_axis_off()
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2 if columns == 1 else 3)
    save(figure, output)


def draw_task(panel: Axes, rows: list[dict]) -> None:
    for row in rows:
        color, marker, dash = LOOKS[row["arm"]]
        seconds, losses, lows, highs = zip(
            *((point["seconds"], point["loss"], point["low"], point["high"]) for point in row["points"]), strict=True
        )
        panel.plot(seconds, losses, color=color, marker=marker, linestyle=dash, label=arm_label(row["arm"]))
        if row["arm"] == "full" or not row["arm"].startswith("full"):
            panel.fill_between(seconds, lows, highs, color=color, alpha=0.1, linewidth=0)
    full = next(row for row in rows if row["arm"] == "full")
    panel.axhline(full["points"][-1]["loss"], color=BLACK, linestyle=":", linewidth=1)
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(ScalarFormatter())
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel("training time, seconds")
    panel.set_ylabel("validation loss, nats per answer token")


if __name__ == "__main__":
    command(__doc__, MEASURED, draw, "prompt_heavy.png")
