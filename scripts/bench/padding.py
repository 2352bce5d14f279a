"""What padding adds to the work of an epoch: rows in random order, grouped by length, and grouped by cost. Counted.

    python scripts/bench/padding.py --output scripts/bench/results/padding.json

A micro-batch costs as much as if each of its rows had the tokens of its longest and the selected tokens of the one that
selects most (`tokentune/data/step_work.py`); its rows alone cost less. Written is the ratio of both sums over an epoch,
mean of the epochs. Nothing is trained, and no time measured. Data and tokenizer stand beside the project.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from tokentune.cli.arguments import parse_arguments
from tokentune.cli.command import run_command
from tokentune.cli.preview import read_inputs
from tokentune.data.instruction_data import load_instruction_data
from tokentune.data.row_sizes import lengths_of, target_counts_of
from tokentune.data.step_work import selected_of, units
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
    lengths, targets = lengths_of(rows), target_counts_of(rows, causal=True)
    results = []
    for train, size in CASES:
        selected = selected_of(lengths, targets, parse_arguments([*given, "--prefix_length", size]).selection)
        for micro_batch in MICRO_BATCHES:
            case = {"train": train, "selected": size, "micro_batch": micro_batch}
            results.append(case | ratios(lengths, selected, train == "lora", micro_batch))
    counts = {"rows": len(rows), "tokens": int(lengths.sum()), "targets": int(targets.sum())}
    report = {
        "schema_version": 1,
        "data": {"name": options.data.name, "tokenizer": options.model.name} | counts,
        "global_batch": GLOBAL_BATCH,
        "epochs": EPOCHS,
        "versions": library_versions(),
        "rows": results,
    }
    write_whole(options.output, json.dumps(report, indent=1) + "\n")


def ratios(lengths: np.ndarray, selected: np.ndarray, lora: bool, micro_batch: int) -> dict[str, float]:
    """Of each order of the rows: the work of padded micro-batches over that of the rows."""
    own = units(lengths, selected, lora=lora)
    orders = {
        "random": lambda epoch: np.random.default_rng(epoch).permutation(len(lengths)),
        "by_length": lambda epoch: list(GroupedSampler(lengths, epoch, GLOBAL_BATCH)),
        "by_cost": lambda epoch: list(GroupedSampler(own, epoch, GLOBAL_BATCH)),
    }
    return {
        name: round(
            statistics.fmean(
                padded_units(lengths, selected, order(epoch), lora, micro_batch) / own.sum() for epoch in range(EPOCHS)
            ),
            5,
        )
        for name, order in orders.items()
    }


def padded_units(lengths: np.ndarray, selected: np.ndarray, order: Sequence[int], lora: bool, micro_batch: int) -> int:
    """Of an epoch in this order, its last micro-batch perhaps smaller."""
    batches = (order[first : first + micro_batch] for first in range(0, len(order), micro_batch))
    return sum(len(b) * int(units(lengths[b].max(), selected[b].max(), lora=lora)) for b in batches)


if __name__ == "__main__":
    run_command(main)
