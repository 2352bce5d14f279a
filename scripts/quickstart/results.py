"""Reads what the quick start measured: lm-eval's results and samples, and `measure.py`'s file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skills import SKILLS

BEFORE, LORA, AFTER = "base", "lora", "merged"
MODELS = {BEFORE: "base", LORA: "LoRA", AFTER: "LoRA + TokenTune"}


@dataclass(frozen=True)
class Results:
    """exact_match: model -> skill (and "all") -> share of right answers. examples: skill -> question and answers.

    measurements: as `measure.py` writes them."""

    exact_match: dict[str, dict[str, float]]
    examples: dict[str, dict[str, str]]
    measurements: dict[str, Any]


def read_results(folder: Path) -> Results:
    """Reads `evaluation/<model>` of all `MODELS`, and `measurements.json`, in the quick start's folder."""
    samples = {model: {name: read_samples(folder, model, name) for name in SKILLS} for model in (BEFORE, AFTER)}
    examples = {}
    for name in SKILLS:
        question, answer = samples[BEFORE][name][0], samples[AFTER][name][0]
        examples[name] = {
            "question": f"{question['doc']['instruction']} {question['doc']['input']}".strip(),
            "target": question["target"],
            BEFORE: question["filtered_resps"][0],
            AFTER: answer["filtered_resps"][0],
        }
    return Results(
        exact_match={model: read_exact_match(folder, model) for model in MODELS},
        examples=examples,
        measurements=json.loads((folder / "measurements.json").read_text()),
    )


def read_exact_match(folder: Path, model: str) -> dict[str, float]:
    results = json.loads(newest(folder / "evaluation" / model, "results_*.json").read_text())["results"]
    shares = {name: results[f"quickstart_{name}"]["exact_match,none"] for name in SKILLS}
    return shares | {"all": results["quickstart"]["exact_match,none"]}


def read_samples(folder: Path, model: str, skill: str) -> list[dict[str, Any]]:
    """In the order of the held-out file."""
    path = newest(folder / "evaluation" / model, f"samples_quickstart_{skill}_*.jsonl")
    samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted(samples, key=lambda sample: sample["doc_id"])


def newest(folder: Path, pattern: str) -> Path:
    """lm-eval puts the model's path and the date into its files' names. The date sorts.

    Raises FileNotFoundError where there is none."""
    paths = list(folder.rglob(pattern))
    if not paths:
        raise FileNotFoundError(f"no {pattern} in {folder}: run the evaluation first (bash scripts/quickstart.sh)")
    return max(paths, key=lambda path: path.name)
