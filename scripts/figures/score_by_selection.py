"""Score against the number of selected tokens, one panel per task, from `scripts/bench/classification.py`'s results.

    python scripts/figures/score_by_selection.py

Full training is a line with a band of one standard deviation over the seeds; every other method is a point with its
deviation, and each seed a small dot. The percentage below a number of tokens is the share of the real tokens that it
came to: texts may be shorter.
"""

from pathlib import Path

from matplotlib.axes import Axes
from style import BLUE, LOOKS, RESULTS, VERMILION, command, pyplot, read_json, save

from tokentune.errors import UserError

CLASSIFICATION = RESULTS / "classification.json"
TITLES = {
    "sst2": "SST-2: sentiment",
    "cola": "CoLA: grammar",
    "rte": "RTE: entailment",
    "paraphrase": "paraphrase pairs",
    "wnut17": "WNUT-17: entities",
    "digits": "digits: a ViT from scratch",
}
METRICS = {"matthews_correlation": "Matthews correlation", "f1": "entity F1", "accuracy": "accuracy"}
LEAST_RANGE = 0.08  # of a score axis: noise is not to fill a panel


def draw(source: Path, output: Path) -> None:
    runs = read_json(source).get("runs", [])
    tasks = [task for task in TITLES if any(run["task"] == task for run in runs)]
    if not tasks:
        raise UserError(f"--input {source}: holds no runs. Measure them: python scripts/bench/classification.py --help")
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    size = (3.1 * columns, 2.9 * rows + 0.5)
    figure, panels = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    for panel, task in zip(panels.flat, tasks, strict=False):
        draw_task(panel, task, [run for run in runs if run["task"] == task])
    for panel in panels.flat[len(tasks) :]:
        panel.set_visible(False)
    handles = {}
    for panel in panels.flat:
        handles |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    save(figure, output)


def draw_task(panel: Axes, task: str, runs: list[dict]) -> None:
    selective = sorted((run for run in runs if "prefix_length" in run["settings"]), key=place)
    for run in runs:
        if run not in selective:
            low, high = run["mean"] - run["standard_deviation"], run["mean"] + run["standard_deviation"]
            panel.axhline(run["mean"], color=LOOKS["full"].color, label=LOOKS["full"].name)
            panel.axhspan(low, high, color=LOOKS["full"].color, alpha=0.13, linewidth=0)
    for at, run in enumerate(selective):
        color, marker, label = BLUE, "o", "TokenTune, tokens at random"
        if run["settings"].get("selection") == "labelled":
            color, marker, label = VERMILION, "^", "TokenTune, entities first"
        scores = [seed["score"] for seed in run["seeds"]]
        panel.plot([at + 0.16] * len(scores), scores, "o", markersize=3, color=color, alpha=0.5)
        panel.errorbar(
            at, run["mean"], run["standard_deviation"], marker=marker, linestyle="", capsize=4, color=color, label=label
        )
    counts = [run for run in selective if isinstance(selected(run), int)]
    panel.plot(range(len(counts)), [run["mean"] for run in counts], color=BLUE, linewidth=1, alpha=0.6)
    panel.set_xticks(range(len(selective)), [name(run) for run in selective])
    panel.set_xlim(-0.5, max(len(selective), 1) - 0.5)
    panel.set_xlabel("selected tokens and share" if counts else "share of selected tokens")
    panel.set_ylabel(METRICS[runs[0]["metric"]])
    panel.set_title(TITLES[task])
    panel.grid(axis="x", visible=False)
    low, high = panel.get_ylim()
    missing = max(0.0, LEAST_RANGE - (high - low)) / 2
    panel.set_ylim(low - missing, high + missing)


def selected(run: dict) -> int | float:
    text = run["settings"]["prefix_length"]
    return float(text) if "." in text else int(text)


def place(run: dict) -> tuple:
    return selected(run), run["settings"].get("selection") == "labelled"


def name(run: dict) -> str:
    """The count and the share of tokens that it came to; the proportion."""
    value = selected(run)
    if isinstance(value, float):
        return f"{value:.0%}"
    tokens = [seed["tokens"] for seed in run["seeds"]]
    share = sum(count["selected"] for count in tokens) / sum(count["processed"] for count in tokens)
    return f"{value}\n{share:.0%}"


if __name__ == "__main__":
    command(__doc__, CLASSIFICATION, draw, "score_by_selection.png")
