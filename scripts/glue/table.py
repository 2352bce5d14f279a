"""Prints the scores of all classification runs in a folder as a Markdown table, one task below the other.

    python scripts/glue/table.py models

Every run's folder there holds a `classification_summary.json`, left by `classify.py`. Score: mean and standard
deviation over the seeds; kept for backward: what autograd keeps of the first batch; step: mean over the seeds.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

HEADER = ("task", "run", "metric", "score", "seeds", "kept for backward", "step")
MIB = 1024**2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds the runs' folders, as --model_save_path")
    folder = parser.parse_args().folder
    paths = sorted(folder.glob("*/classification_summary.json"))
    if not paths:
        print(f"error: there is no run with a classification_summary.json in {folder}", file=sys.stderr)
        sys.exit(2)
    rows = sorted(row(path) for path in paths)
    for cells in (HEADER, ["---"] * len(HEADER), *rows):
        print("| " + " | ".join(cells) + " |")


def row(path: Path) -> tuple[str, ...]:
    summary = json.loads(path.read_text(encoding="utf-8"))
    seeds = summary["seeds"]
    saved = max(seed["saved_for_backward_bytes"] for seed in seeds)
    return (
        summary["task"],
        path.parent.name,
        summary["metric"],
        score_of(summary),
        str(len(seeds)),
        f"{saved / MIB:.0f} MiB",
        f"{statistics.mean(seed['seconds_per_step'] for seed in seeds):.3f} s",
    )


def score_of(summary: dict) -> str:
    """The mean, and the deviation where there are several seeds."""
    deviation = summary["standard_deviation"]
    return f"{summary['mean']:.4f}" if deviation is None else f"{summary['mean']:.4f} ± {deviation:.4f}"


if __name__ == "__main__":
    main()
