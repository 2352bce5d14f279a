"""Shows the quick start's results: a table in the terminal, `report.json` and a picture, `report.png`.

    python scripts/quickstart/report.py --folder quickstart

Exits with code 1 where the skills were not learnt (exact match not under 20 % before, or not over 80 % after).
"""

import argparse
import json
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path

from results import AFTER, BEFORE, LORA, MODELS, Results, read_results
from rich.console import Console
from rich.table import Table
from rich.text import Text
from skills import SKILLS

MOST_BEFORE, LEAST_AFTER = 0.20, 0.80  # exact match over all skills
LEGEND = {
    "capital": "recall a fact",
    "sum": "add two numbers",
    "words": "order words",
    "find": "find by category",
    "numbers": "order numbers",
    "page": "add, below facts",
}
NAMES = {
    "full": "all weights",
    "TokenTune": "all weights + TokenTune",
    "LoRA": "LoRA",
    "TokenTune + LoRA": "LoRA + TokenTune",
}
MIB = 2**20
GRAY, BLUE, ORANGE, GREEN = "#b5bac2", "#2f6fb3", "#d98c3f", "#2e9e6b"
COLOURS = {"full": GRAY, "TokenTune": BLUE, "LoRA": ORANGE, "TokenTune + LoRA": GREEN}  # of methods
MODEL_COLOURS = {BEFORE: GRAY, LORA: ORANGE, AFTER: GREEN}


SMALL = (
    "LoRA spares large models the gradients of their weights, and adds two small products to each layer. In a model "
    "this small these cost more than it spares: LoRA + TokenTune may take longer than all weights + TokenTune."
)


def print_tables(results: Results, console: Console) -> None:
    table = Table(title="Exact match on held-out questions", title_justify="left")
    table.add_column("skill")
    for name in MODELS.values():
        table.add_column(name, justify="right")
    for name in (*SKILLS, "all"):
        skill = f"{name}: {LEGEND[name]}" if name in LEGEND else "[bold]all[/bold]"
        table.add_row(skill, *(f"{results.exact_match[model][name]:.0%}" for model in MODELS))
    console.print(table)

    table = Table(title="For example", title_justify="left", show_lines=True)
    for heading in ("question", "answer of the base", "of LoRA + TokenTune"):
        table.add_column(heading, overflow="fold")
    for example in results.examples.values():
        table.add_row(*(Text(example[column].strip() or "(nothing)") for column in ("question", BEFORE, AFTER)))
    console.print(table)

    setting = results.measurements["setting"]
    sequences, length = setting["batch"]
    share, flag = setting["selected_tokens"] / setting["tokens"], f"--prefix_length {setting['prefix_length']}"
    title = f"One training step: {sequences} x {length} tokens; TokenTune selects {share:.0%} of the tokens ({flag})"
    caption = f"{SMALL} Shares are medians of steps side by side. Larger models: docs/measurements.md."
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.add_column("trained")
    for heading in ("kept for backward", "", "time", ""):
        table.add_column(heading, justify="right")
    for row in results.measurements["rows"]:
        plain = row["method"] == row["compared_with"]
        of = "" if plain else f" of {NAMES[row['compared_with']]}"
        table.add_row(
            NAMES[row["method"]],
            f"{row['saved_bytes'] / MIB:.1f} MiB",
            "" if plain else f"{row['saved_bytes_ratio']:.0%}{of}",
            f"{1000 * row['seconds']:.0f} ms",
            "" if plain else f"{row['seconds_ratio']:.0%}{of}",
        )
    console.print(table)


def draw_picture(results: Results, path: Path) -> None:
    """Three panels: exact match of each skill and model, saved memory, step time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (quality, memory, duration) = pyplot.subplots(
        1, 3, figsize=(14, 4.6), width_ratios=(2.4, 1, 1), layout="constrained"
    )
    names = [*SKILLS, "all"]
    for offset, (model, label) in zip((-0.27, 0, 0.27), MODELS.items(), strict=True):
        shares = [100 * results.exact_match[model][name] for name in names]
        places = [number + offset for number in range(len(names))]
        bars = quality.bar(places, shares, 0.25, color=MODEL_COLOURS[model], label=label)
        quality.bar_label(bars, [f"{share:.0f}" for share in shares], padding=2, fontsize=7.5)
    quality.set_title("Exact match on held-out questions, %", loc="left")
    quality.set_xticks(range(len(names)), [f"{name}\n{LEGEND.get(name, 'skills')}" for name in names], fontsize=7.5)
    quality.set_ylim(0, 122)
    quality.set_yticks(range(0, 101, 20))
    quality.legend(loc="upper left", ncols=3, frameon=False, fontsize=9)

    rows = results.measurements["rows"]
    for axes, title, values, ratios in (
        (memory, "Kept for backward, MiB", [r["saved_bytes"] / MIB for r in rows], "saved_bytes_ratio"),
        (duration, "Training step, ms", [1000 * r["seconds"] for r in rows], "seconds_ratio"),
    ):
        methods = [NAMES[row["method"]].replace(" + ", "\n+ ") for row in rows]
        bars = axes.bar(methods, values, 0.66, color=[COLOURS[row["method"]] for row in rows])
        shown = [
            f"{value:.3g}" + ("" if row["method"] == row["compared_with"] else f"\n({row[ratios]:.0%})")
            for value, row in zip(values, rows, strict=True)
        ]
        axes.bar_label(bars, shown, padding=2, fontsize=9)
        axes.set_title(title, loc="left")
        axes.set_ylim(0, 1.18 * max(values))
        axes.tick_params("x", labelsize=8.5)
    memory.set_xlabel("In brackets: of the same weights trained plainly.", fontsize=7.5, color="#555555")
    duration.set_xlabel(textwrap.fill(SMALL, 62), fontsize=6.5, color="#555555")
    for axes in (quality, memory, duration):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="the quick start's output folder")
    folder = parser.parse_args().folder

    results = read_results(folder)
    print_tables(results, Console(width=None if sys.stdout.isatty() else 130))
    (folder / "report.json").write_text(json.dumps(asdict(results), indent=2) + "\n")
    draw_picture(results, folder / "report.png")
    before, after = results.exact_match[BEFORE]["all"], results.exact_match[AFTER]["all"]
    if before >= MOST_BEFORE or after <= LEAST_AFTER:
        sys.exit(f"error: not learnt: exact match {before:.0%} before and {after:.0%} after")


if __name__ == "__main__":
    main()
