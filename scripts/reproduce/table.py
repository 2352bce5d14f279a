"""The table of the main experiment: memory, speed, losses and scores of every run.

    python scripts/reproduce/table.py --folder reproduce

Reads the runs' `training_summary.json` in FOLDER/models, lm-eval's results in FOLDER/results and, where it is there,
the benchmark FOLDER/step.json; prints the table and writes it to FOLDER/report.md, its figures to FOLDER/report.json.
Peak memory is given as a share of full fine-tuning's, beside the paper's claims.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "figures"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from evaluation import order, read_scores, run_names
from tables import markdown

from tokentune.core.saved_tensors.saved_bytes import gib
from tokentune.errors import UserError
from tokentune.file_names import SUMMARY_NAME

PAPER = {"TokenTune, 0.3": 0.72, "QLoRA": 0.37, "QLoRA + TokenTune, 0.3": 0.21}  # of full fine-tuning's peak memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="the output folder of scripts/reproduce.sh")
    parser.add_argument("--small", action="store_true", help="says below the table that the figures mean nothing")
    options = parser.parse_args()
    folder = options.folder
    try:
        rows = collect(folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    step = folder / "step.json"
    claims = json.loads(step.read_text(encoding="utf-8"))["claims"] if step.exists() else []
    text = as_markdown(rows, claims)
    if options.small:
        text += "\n\nA tiny model and little data: these figures show that everything runs, and nothing else."
    (folder / "report.json").write_text(json.dumps({"rows": rows, "claims": claims}, indent=1) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def collect(folder: Path) -> list[dict[str, Any]]:
    """One row per model, the base first.

    Raises:
        UserError: no results of lm-eval, or no run.
    """
    scores = read_scores(folder / "results")
    paths = sorted((folder / "models").glob(f"*/{SUMMARY_NAME}"))
    if not paths:
        raise UserError(f"--folder {folder}: holds no trained run in models/")
    base = next(name for name in scores if all(path.parent.name != name for path in paths))
    names = run_names([base, *(path.parent.name for path in paths)])
    summaries = {names[path.parent.name]: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    full = summaries.get("all weights", {}).get("peak_memory_bytes")
    by_name = {names[folder_name]: of_model for folder_name, of_model in scores.items() if folder_name in names}
    rows = [{"model": names[base], "scores": shares(by_name.get(names[base], {}))}]
    for name, summary in sorted(summaries.items(), key=lambda item: order(item[0])):
        validation = summary["validation_loss"]
        rows.append(
            {
                "model": name,
                "peak_memory_bytes": summary["peak_memory_bytes"],
                "of_full": summary["peak_memory_bytes"] / full if full else None,
                "paper": PAPER.get(name),
                "saved_for_backward_bytes": summary["saved_for_backward_bytes"],
                "tokens_per_second": summary["tokens_per_second"],
                "training_loss": summary["loss"]["last"],
                "validation_loss": validation["final"] if validation else None,
                "scores": shares(by_name.get(name, {})),
            }
        )
    return rows


def shares(scores: dict[str, tuple[float, float]]) -> dict[str, float]:
    return {task: score for task, (score, _) in scores.items()}


def as_markdown(rows: list[dict[str, Any]], claims: list[dict[str, Any]]) -> str:
    tasks = list(dict.fromkeys(task for row in rows for task in row["scores"]))
    header = [
        "model",
        "peak memory",
        "of full",
        "the paper's",
        "kept for backward",
        "tokens/s",
        "loss",
        "validation loss",
    ]
    lines = []
    for row in rows:
        figures = [""] * 7
        if "peak_memory_bytes" in row:
            figures = [
                gib(row["peak_memory_bytes"]),
                share(row["of_full"]),
                share(row["paper"]),
                gib(row["saved_for_backward_bytes"]),
                f"{row['tokens_per_second']:.0f}",
                f"{row['training_loss']:.3f}",
                "" if row["validation_loss"] is None else f"{row['validation_loss']:.3f}",
            ]
        lines.append([row["model"], *figures, *(share(row["scores"].get(task), 1) for task in tasks)])
    text = markdown([*header, *tasks], lines)
    if claims:
        measured = [[c["claim"], c["suite"], share(c["paper"]), share(c["measured"])] for c in claims]
        text += "\n\n" + markdown(["one step, random weights", "suite", "the paper's", "measured"], measured)
    return text


def share(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:.{digits}%}"


if __name__ == "__main__":
    main()
