"""Whole runs of finetune.py where prompts are longer than answers: tokens per second, bookkeeping included.

    python scripts/bench/whole_runs.py --model FOLDER --data tool_calls.train.jsonl \
        --output scripts/bench/results/whole_runs.json

Each method trains LoRA in a process of its own, with the loss in chunks everywhere, on batches of like cost
(`--group_by_length`); the methods take turns in every round. `tokens_per_second` is the run's own figure
(`training_summary.json`): all tokens over the time of training, with draws, batches, optimizer and logging. The
machine should have nothing else to do.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from steps.report import machine, median_with_interval

from tokentune.errors import UserError
from tokentune.file_names import SUMMARY_NAME
from tokentune.training.checkpoints.saving import write_whole

PROJECT = Path(__file__).resolve().parents[2]
COMMON = (
    "--lora --lora_target_modules all-linear --lora_r 16 --lora_alpha 16 --add_eos_token --bf16 --long_rows drop "
    "--learning_rate 2e-3 --warmup_steps 2 --report_to none --data_cache none --skip_memory_probe --group_by_length"
)
METHODS = {
    "full": "--chunked_loss on",
    "checkpointing": "--chunked_loss on --gradient_checkpointing",
    "answers": "--tokentune --prefix_length answers",
    "answers, checkpointing": "--tokentune --prefix_length answers --gradient_checkpointing",
}
BASES = {"answers": "full", "answers, checkpointing": "checkpointing"}  # what each is compared with


def main() -> None:
    options = parse()
    summaries: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    for number in range(options.rounds):
        for name in METHODS:
            summaries[name].append(run(name, options))
            print(f"round {number}, {name}: {summaries[name][-1]['tokens_per_second']:.0f} tokens/s", flush=True)
            report = {
                "schema_version": 1,
                "settings": {"common": COMMON, "methods": METHODS, "batch": options.batch, "steps": options.steps}
                | {"max_length": options.max_length},
                "machine": machine("cpu"),
                "rows": rows_of(summaries),
            }
            write_whole(options.output, json.dumps(report, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal language model")
    parser.add_argument("--data", type=Path, required=True, help="file of the training rows")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of a run")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step, in one micro-batch")
    parser.add_argument("--max_length", type=int, default=256, help="tokens; longer rows are left out")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One run in a process of its own; its summary. Raises UserError where it fails, with its last words."""
    with tempfile.TemporaryDirectory() as folder:
        words = f"{COMMON} {METHODS[name]} --global_batch_size {options.batch} --gradient_accumulation_steps 1".split()
        words += ["--max_steps", str(options.steps), "--max_length", str(options.max_length)]
        words += ["--model_name_or_path", str(options.model), "--dataset_name_or_path", str(options.data)]
        line = [sys.executable, str(PROJECT / "tokentune" / "finetune.py"), *words, "--model_save_path", folder]
        ended = subprocess.run(line, capture_output=True, text=True)
        if ended.returncode != 0:
            raise UserError(f"{name}: finetune.py ended with {ended.returncode}:\n{ended.stderr[-2000:]}")
        (found,) = Path(folder).glob(f"*/{SUMMARY_NAME}")
        return json.loads(found.read_text(encoding="utf-8"))


def rows_of(summaries: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each method: its figures by round, and its speed over that of the method it is compared with."""
    rows = []
    for name, runs in summaries.items():
        if not runs:
            continue
        speeds = [run["tokens_per_second"] for run in runs]
        row = {"method": name, "tokens_per_second": speeds, "median": statistics.median(speeds)}
        row |= {"tokens": runs[0]["tokens"], "saved_for_backward_bytes": runs[0]["saved_for_backward_bytes"]}
        row |= {"training_seconds": [run["training_seconds"] for run in runs]}
        base = [run["tokens_per_second"] for run in summaries.get(BASES.get(name, ""), [])]
        if len(base) == len(speeds):
            ratios = [own / other for own, other in zip(speeds, base, strict=True)]
            row |= {"compared_with": BASES[name], "speed_ratio": median_with_interval(ratios)}
        rows.append(row)
    return rows


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
