"""The longest sequence that fits cards of 16 to 80 GB, estimated, by method.

    python scripts/bench/longest_sequences.py --output scripts/bench/results/estimate_longest.json

Llama-3.1-8B, one sequence, bfloat16, LoRA and QLoRA; plain training, gradient checkpointing, the same with the loss in
chunks, and TokenTune with checkpointing: 30 % of the tokens, or answers that are 5 % of a row. As `estimate.py --find
length --memory 24` tells it, in steps of 128 tokens. About 30 minutes on one core. Goes on where an earlier call
stopped.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tokentune import estimate
from tokentune.errors import UserError
from tokentune.memory.accounting import Footprint
from tokentune.memory.footprint import Estimate
from tokentune.training.checkpoints.saving import write_whole

CARDS_GB = (16, 24, 48, 80)
METHODS: dict[str, tuple[str, str]] = {  # name in the table -> the row of estimate.py, further flags
    "plain training": ("full", ""),
    "gradient checkpointing": ("gradient checkpointing", ""),
    "gradient checkpointing, loss in chunks": ("gradient checkpointing + chunked loss", ""),
    "TokenTune, 30 %, checkpointing": ("TokenTune + checkpointing", "--prefix_length 0.3"),
    "TokenTune, answers of 5 %, checkpointing": (
        "TokenTune + checkpointing",
        "--prefix_length answers --answer_share 0.05",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write, or to go on with")
    parser.add_argument("--model", default="llama-3.1-8b", help="preset, folder or hub id")
    options = parser.parse_args()
    rows = json.loads(options.output.read_text(encoding="utf-8"))["rows"] if options.output.exists() else []
    done = {(row["weights"], row["method"], row["memory_gb"]) for row in rows}
    for weights in ("LoRA", "QLoRA"):
        for name, (method, flags) in METHODS.items():
            words = f"--model_name_or_path {options.model} --bf16 --report_to none --lora --tokentune {flags}".split()
            arguments, subject = estimate.parse(words)
            arguments = estimate.with_mode(arguments, method, weights)
            run = remembered(estimate.estimator_for(arguments, subject))
            for card in CARDS_GB:
                if (weights, name, card) in done:
                    continue
                asked = arguments.changed(find="length", memory=float(card))
                row = {"weights": weights, "method": name, "memory_gb": card, "tokens": None, "peak": None}
                try:
                    found = estimate.find(asked, subject, run)
                    row |= {"tokens": found["length"], "peak": found["bytes"]["peak"]}
                except UserError as error:
                    if "not even" not in str(error):
                        raise
                rows.append(row)
                report = {"schema_version": 1, "model": options.model, "torch": torch.__version__, "rows": rows}
                write_whole(options.output, json.dumps(report, indent=2) + "\n")
    print(f"written: {options.output}")


def remembered(run: Estimate) -> Callable[..., Footprint]:
    """The estimates of one method's steps, each run once: the cards share them."""
    known: dict[tuple[Any, ...], Footprint] = {}

    def once(arguments: Any, shape: tuple[int, int], depth: int | None = None) -> Footprint:
        if (shape, depth) not in known:
            known[shape, depth] = run(arguments, shape, depth)
        return known[shape, depth]

    return once


if __name__ == "__main__":
    main()
