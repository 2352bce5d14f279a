"""What padding adds to the work of an epoch, by what rows are grouped by. Counted, not timed.

    python scripts/bench/padding.py --output scripts/bench/results/padding.json

A micro-batch costs as much as if each of its rows had the tokens of its longest and the selected tokens of the one that
selects most (`tokentune/data/step_work.py`); its rows alone cost less. Written is the ratio of both sums over an epoch,
mean of ten, for rows in random order, grouped by length, by the sum of their units, and by both of these numbers as
`--group_by_length` does. Nothing is trained. Data and tokenizer stand beside the project.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from tokentune.cli.arguments import parse_arguments
from tokentune.cli.command import run_command
from tokentune.cli.preview import read_inputs
from tokentune.data.instruction_data import load_instruction_data
from tokentune.data.row_sizes import lengths_of, target_counts_of
from tokentune.data.step_work import units_of_rows
from tokentune.environment import library_versions
from tokentune.training.checkpoints.saving import write_whole
from tokentune.training.grouping import GroupedSampler

SHARED = Path(__file__).resolve().parents[3] / "shared"
GLOBAL_BATCH, MICRO_BATCHES, EPOCHS = 16, (8, 16), 10
CASES = (("full", "answers"), ("full", "answers+0.1"), ("full", "0.3"), ("lora", "answers"), ("lora", "answers+0.1"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "llama-tiny")
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "tool_calls.train.jsonl")
    options = parser.parse_args()
    given = ["--model_name_or_path", str(options.model), "--dataset_name_or_path", str(options.data)]
    given += ["--add_eos_token", "--report_to", "none", "--tokentune"]
    arguments = parse_arguments(given)
    inputs = read_inputs(arguments)
    rows = load_instruction_data(arguments, inputs.tokenizer, inputs.template).train
    results = []
    for train, size in CASES:
        selection = parse_arguments([*given, "--prefix_length", size]).selection
        units = units_of_rows(rows, selection, lora=train == "lora", causal=True)
        for micro_batch in MICRO_BATCHES:
            case = {"train": train, "selected": size, "micro_batch": micro_batch}
            results.append(case | ratios(units, micro_batch))
    tokens, targets = (int(count(rows).sum()) for count in (lengths_of, target_counts_of))
    counts = {"rows": len(rows), "tokens": tokens, "targets": targets}
    report = {
        "schema_version": 1,
        "data": {"name": options.data.name, "tokenizer": options.model.name} | counts,
        "global_batch": GLOBAL_BATCH,
        "epochs": EPOCHS,
        "versions": library_versions(),
        "rows": results,
    }
    write_whole(options.output, json.dumps(report, indent=1) + "\n")


def ratios(units: np.ndarray, micro_batch: int) -> dict[str, float]:
    """Of each order of the rows: the work of padded micro-batches over that of the rows. `units` (R, 2)."""
    grouped_by = {
        "random": np.zeros_like(units),
        "by_length": units * [1, 0],
        "by_sum": units.sum(1, keepdims=True),
        "by_both": units,
    }
    return {
        name: round(statistics.fmean(padded(units, by, micro_batch, epoch) for epoch in range(EPOCHS)) / units.sum(), 5)
        for name, by in grouped_by.items()
    }


def padded(units: np.ndarray, grouped_by: np.ndarray, micro_batch: int, epoch: int) -> int:
    """The work of an epoch, its last micro-batch perhaps smaller."""
    sampler = GroupedSampler(grouped_by, seed=0, together=GLOBAL_BATCH)
    sampler.set_epoch(epoch)
    order = np.fromiter(sampler, np.int64)
    batches = (units[order[first : first + micro_batch]] for first in range(0, len(order), micro_batch))
    return sum(len(batch) * int(batch.max(0).sum()) for batch in batches)


if __name__ == "__main__":
    run_command(main)
