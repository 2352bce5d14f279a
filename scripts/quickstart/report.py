"""Shows the quick start's results: a table in the terminal, `report.json` and a picture, `report.png`.

    python scripts/quickstart/report.py --folder quickstart

Exits with code 1 where the skills were not learnt (exact match not under 20 % before, or not over 80 % after).
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from results import AFTER, BEFORE, Results, read_results
from rich.console import Console
from rich.table import Table
from skills import SKILLS

MOST_BEFORE, LEAST_AFTER = 0.20, 0.80  # exact match over all skills
LEGEND = {
    "capital": "recall a fact",
    "sum": "add two numbers",
    "words": "order words",
    "find": "find by category",
    "numbers": "order numbers",
}
MIB = 2**20
GRAY, BLUE, GREEN = "#b5bac2", "#2f6fb3", "#2e9e6b"


def print_tables(results: Results, console: Console) -> None:
    before, after = results.exact_match[BEFORE], results.exact_match[AFTER]
    table = Table(title="Exact match on held-out questions", title_justify="left")
    for heading, justify in (("skill", "left"), ("before", "right"), ("after", "right"), ("for example", "left")):
        table.add_column(heading, justify=justify)
    for name in SKILLS:
        example = results.examples[name]
        shown = f"{example['question']} [dim]{example[BEFORE] or '(nothing)'}[/dim] -> {example[AFTER]}"
        table.add_row(f"{name}: {LEGEND[name]}", f"{before[name]:.0%}", f"{after[name]:.0%}", shown)
    table.add_section()
    table.add_row("[bold]all[/bold]", f"{before['all']:.0%}", f"[bold]{after['all']:.0%}[/bold]", "")
    console.print(table)

    setting = results.measurements["setting"]
    sequences, length = setting["batch"]
    table = Table(
        title=f"One training step: {sequences} x {length} tokens, {setting['proportion']:.0%} of them selected",
        title_justify="left",
        caption=f"{SMALL} docs/measurements.md has a larger one. Shares are medians of steps side by side.",
        caption_justify="left",
    )
    for heading in ("method", "saved for backward", "of full", "time", "of full"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in results.measurements["rows"]:
        table.add_row(
            row["method"],
            f"{row['saved_bytes'] / MIB:.1f} MiB",
            f"{row['saved_bytes_ratio']:.0%}",
            f"{1000 * row['seconds']:.0f} ms",
            f"{row['seconds_ratio']:.0%}",
        )
    console.print(table)


SMALL = "What every call costs by itself weighs in a model this small."


def draw_picture(results: Results, path: Path) -> None:
    """Three panels: exact match of each skill before and after, saved memory, step time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (quality, memory, duration) = pyplot.subplots(
        1, 3, figsize=(12.5, 4.2), width_ratios=(2.2, 1, 1), layout="constrained"
    )
    names = [*SKILLS, "all"]
    for offset, color, model, label in (
        (-0.2, GRAY, BEFORE, "base"),
        (0.2, GREEN, AFTER, "fine-tuned with LoRA + TokenTune, merged"),
    ):
        shares = [100 * results.exact_match[model][name] for name in names]
        bars = quality.bar([i + offset for i in range(len(names))], shares, 0.38, color=color, label=label)
        quality.bar_label(bars, [f"{share:.0f}" for share in shares], padding=2, fontsize=9)
    quality.set_title("Exact match on held-out questions, %", loc="left")
    quality.set_xticks(range(len(names)), [f"{name}\n{LEGEND.get(name, 'skills')}" for name in names], fontsize=7.5)
    quality.set_ylim(0, 122)
    quality.set_yticks(range(0, 101, 20))
    quality.legend(loc="upper left", ncols=2, frameon=False, fontsize=9)

    rows = results.measurements["rows"]
    methods = [row["method"].replace(" + ", "\n+ ") for row in rows]
    for axes, title, values, ratios in (
        (memory, "Saved for backward, MiB", [r["saved_bytes"] / MIB for r in rows], "saved_bytes_ratio"),
        (duration, "Training step, ms", [1000 * r["seconds"] for r in rows], "seconds_ratio"),
    ):
        bars = axes.bar(methods, values, 0.62, color=[GRAY, BLUE, GREEN])
        shown = [f"{value:.3g}\n({row[ratios]:.0%})" for value, row in zip(values, rows, strict=True)]
        axes.bar_label(bars, shown, padding=2, fontsize=9)
        axes.set_title(title, loc="left")
        axes.set_ylim(0, 1.18 * max(values))
        axes.tick_params("x", labelsize=8.5)
    duration.set_xlabel(SMALL.replace(" weighs", "\nweighs"), fontsize=7.5, color="#555555")
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
