"""Validation loss by strategy and proportion, from `scripts/bench/selection_quality.py`'s results.

    python scripts/figures/quality_by_strategy.py

Above, the loss against the proportion of selected tokens, mean and standard error over the seeds, and full training:
the same number of steps (the same bytes come with a smaller micro-batch), and as many steps as take TokenTune's time.
Below, at 30 %, each strategy's difference to random tokens, paired by seed, with two standard errors: beyond them green
is better, orange worse. Black are full training with fewer steps and, as a line, with the same number of steps.
"""

from pathlib import Path

from matplotlib.axes import Axes
from style import BLACK, BLUE, GREEN, ORANGE, PURPLE, RESULTS, SKY, TRAINED, VERMILION, command, pyplot, read_json, save

from tokentune.errors import UserError

QUALITY = RESULTS / "selection_quality.json"
MAIN_ARM, SHARE, SHARES = "one epoch", 0.3, (0.1, 0.3, 0.5)
CURVES = {
    "random": ("random", BLUE, "o"),
    "supervised": ("supervised first", VERMILION, "^"),
    "answer window": ("a window in the answer", SKY, "v"),
    "gradient": ("gradient, drawn", GREEN, "D"),
    "random, correction 1": ("random, correction 1", PURPLE, "P"),
    "full, equal time": ("full training in the same time", BLACK, "s"),
}


def draw(source: Path, output: Path) -> None:
    rows = [row for row in read_json(source).get("comparison", []) if row["arm"] == MAIN_ARM]
    panels = [trained for trained in TRAINED if any(row["trained"] == trained for row in rows)]
    if not panels:
        raise UserError(
            f"--input {source}: holds no runs. Measure them: python scripts/bench/selection_quality.py --help"
        )
    size = (5.0 * len(panels), 9.6)
    figure, axes = pyplot.subplots(2, len(panels), figsize=size, squeeze=False, layout="constrained")
    handles = {}
    for (above, below), trained in zip(axes.T, panels, strict=True):
        own = [row for row in rows if row["trained"] == trained]
        draw_curves(above, own)
        draw_differences(below, own)
        above.set_title(f"{TRAINED[trained]} trained" if trained == "full" else TRAINED[trained])
        handles |= dict(zip(*reversed(above.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    save(figure, output)


def draw_curves(panel: Axes, rows: list[dict]) -> None:
    full = next((row for row in rows if row["method"] == "full"), None)
    if full is not None:
        error = standard_error(full)
        low, high = full["validation_loss"] - error, full["validation_loss"] + error
        panel.axhline(full["validation_loss"], color=BLACK, label="full training (any micro-batch)")
        panel.axhspan(low, high, color=BLACK, alpha=0.13, linewidth=0)
    for at, (method, (label, color, marker)) in enumerate(CURVES.items()):
        points = sorted((row for row in rows if row["method"] == method), key=lambda row: row["proportion"])
        if points:
            xs = [row["proportion"] + 0.006 * (at - len(CURVES) / 2) for row in points]
            ys, errors = [row["validation_loss"] for row in points], [standard_error(row) for row in points]
            dash = ":" if method.startswith("full") else "-"
            panel.errorbar(xs, ys, errors, color=color, marker=marker, linestyle=dash, capsize=3, label=label)
    panel.set_xticks(SHARES, [f"{share:.0%}" for share in SHARES])
    panel.set_xlim(0.05, 0.55)
    panel.set_xlabel("selected tokens")
    panel.set_ylabel("validation loss, nats per answer token")


def standard_error(row: dict) -> float:
    """0 where there is one seed alone."""
    return (row["standard_deviation"] or 0.0) / row["seeds"] ** 0.5


def draw_differences(panel: Axes, rows: list[dict]) -> None:
    found = [row for row in rows if row["proportion"] == SHARE and row["to_random"] and row["method"] != "random"]
    found.sort(key=lambda row: -row["to_random"]["mean"])
    for at, row in enumerate(found):
        gap = row["to_random"]
        color = GREEN if gap["better"] else ORANGE if gap["worse"] else SKY
        color, marker = (BLACK, "s") if row["method"].startswith("full") else (color, "o")
        panel.errorbar(gap["mean"], at, xerr=2 * gap["standard_error"], color=color, marker=marker, capsize=3)
    panel.axvline(0, color=BLUE, linewidth=1.2)
    random = next((row for row in rows if (row["method"], row["proportion"]) == ("random", SHARE)), None)
    if random is not None and random["to_full"]:
        panel.axvline(-random["to_full"]["mean"], color=BLACK, linewidth=1.2)
    panel.set_yticks(range(len(found)), [row["method"] for row in found])
    panel.set_ylim(-0.7, max(len(found), 1) - 0.3)
    panel.set_xlabel(f"difference to random at {SHARE:.0%}\n← better")
    panel.grid(axis="y", visible=False)


if __name__ == "__main__":
    command(__doc__, QUALITY, draw, "quality_by_strategy.png")
