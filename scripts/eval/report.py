"""The scores of the five lm-eval tasks as a table: the base and what was trained from it, side by side.

    python scripts/eval/report.py --results results
    python scripts/eval/report.py --results results --base meta-llama-Llama-2-7b-hf --model my-run --markdown

Reads what `scripts/eval/all.sh`, or its five scripts, left (the newest file of each task counts). Without names every
model in the folder gets a column, the base first; with them those alone. A task that has no result is shown as missing;
the mean needs all five.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parent))

from lm_eval_results import METRICS, Result, order, read_results, run_names
from rich import box
from rich.console import Console
from rich.table import Table

from tokentune.cli.command import run_command
from tokentune.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
MISSING = "missing"
Results = dict[str, dict[str, Result]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the results (results)")
    parser.add_argument("--base", metavar="NAME", help="the base's folder in it")
    parser.add_argument(
        "--model", metavar="NAME", action="append", default=[], help="a trained model's; can be repeated"
    )
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--markdown", action="store_true", help="a Markdown table")
    shape.add_argument("--json", action="store_true", help="every figure, with the file that it is from")
    options = parser.parse_args()
    results = chosen(options.results, ([options.base] if options.base else []) + options.model)
    if options.json:
        print(json.dumps(as_json(results), indent=2))
        return
    header, rows = table(results)
    lines = remarks(results)
    if options.markdown:
        print("\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]))
        print("".join(f"\n{line}" for line in lines), end="\n" if lines else "")
    else:
        show(header, rows, lines)


def chosen(folder: Path, names: list[str]) -> Results:
    """The results of these models in this order; of all in the folder, the base first, where none is named.

    Raises:
        UserError: no folder, no results, or none of any named model.
    """
    if not folder.is_dir():
        raise UserError(f"--results {folder}: there is no such folder. Make some: bash scripts/eval/all.sh")
    found = read_results(folder, "--results")
    if not names:
        called = run_names(list(found))
        return {name: found[name] for name in sorted(found, key=lambda name: order(called[name]))}
    if not any(name in found for name in names):
        raise UserError(f"--results {folder}: has no result of {' or '.join(names)}; it has {', '.join(found)}")
    return {name: found.get(name, {}) for name in names}


def table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows, in percent: each task, then the mean; of two models also by how much they differ."""
    called = run_names(list(results))
    header = ["task", "metric", *(called[name] for name in results)] + (["difference"] if len(results) == 2 else [])
    rows = []
    for task, (metric, title) in METRICS.items():
        found = [of_model.get(task) for of_model in results.values()]
        shots = {result.shots for result in found if result is not None}
        counted = f", {shots.pop()}-shot" if len(shots) == 1 and None not in shots else ""
        scores = [MISSING if result is None else cell(result) for result in found]
        values = [None if result is None else result.score for result in found]
        rows.append([title + counted, metric.partition(",")[0], *scores, *difference(values)])
    means = [mean(of_model) for of_model in results.values()]
    cells = [MISSING if value is None else f"{100 * value:.1f}" for value in means]
    rows.append(["mean of the five", "", *cells, *difference(means)])
    return header, rows


def cell(result: Result) -> str:
    """Score and standard error in percent; a star where not all questions were asked."""
    spread = "" if result.stderr is None else f" ± {100 * result.stderr:.1f}"
    return f"{100 * result.score:.1f}{spread}" + (" *" if result.limit is not None else "")


def mean(of_model: dict[str, Result]) -> float | None:
    """Over the five tasks; None where one is missing."""
    return statistics.fmean(of_model[task].score for task in METRICS) if METRICS.keys() <= of_model.keys() else None


def difference(values: list[float | None]) -> list[str]:
    """The last column, where there are two models: the second one's score less the first one's, in points."""
    if len(values) != 2:
        return []
    return [MISSING if None in values else f"{100 * (values[1] - values[0]):+.1f}"]


def remarks(results: Results) -> list[str]:
    """What a reader must know about the figures."""
    lines = ["Percent, ± standard error of the score."]
    if any(r.limit is not None for of in results.values() for t, r in of.items() if t in METRICS):
        lines.append("* not all questions were asked (--limit).")
    for task, (_, title) in METRICS.items():
        shots = {name: of_model[task].shots for name, of_model in results.items() if task in of_model}
        if len(set(shots.values())) > 1:
            lines.append(f"{title}: not comparable, {', '.join(f'{n}: {s}-shot' for n, s in shots.items())}.")
    return lines


def as_json(results: Results) -> dict[str, Any]:
    """Shares, 0 to 1; null for what is missing."""
    called = run_names(list(results))

    def entry(result: Result | None) -> dict[str, Any] | None:
        return None if result is None else result._asdict() | {"path": str(result.path)}

    return {
        "metrics": {task: metric.partition(",")[0] for task, (metric, _) in METRICS.items()},
        "models": [
            {
                "name": name,
                "called": called[name],
                "tasks": {task: entry(of_model.get(task)) for task in METRICS},
                "mean": mean(of_model),
            }
            for name, of_model in results.items()
        ],
    }


def show(header: list[str], rows: list[list[str]], lines: list[str]) -> None:
    """The table with rich: in the terminal's width, or 120 columns where stdout is none."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    shown = Table(box=box.SIMPLE_HEAD)
    for at, name in enumerate(header):
        shown.add_column(name, justify="left" if at < 2 else "right")
    for row in rows[:-1]:
        shown.add_row(*(f"[dim]{text}[/dim]" if text == MISSING else text for text in row))
    shown.add_section()
    shown.add_row(*rows[-1], style="bold")
    console.print(shown)
    for line in lines:
        console.print(line, markup=False)


if __name__ == "__main__":
    run_command(main)
