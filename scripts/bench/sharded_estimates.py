"""What each of several GPUs would hold and send, estimated: the table of 8B and 70B models in docs/multi-gpu.md.

    python scripts/bench/sharded_estimates.py --output scripts/bench/results/estimate_sharded.json

One sequence of 2,048 tokens per GPU, bfloat16 autocast, AdamW, 30 % of the tokens selected; one GPU, or FSDP. The real
step on tensors without data, as `estimate.py` runs it, at full depth. About 20 minutes on one core. Goes on where an
earlier call stopped.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tokentune import estimate
from tokentune.training.checkpoints.saving import write_whole

MODELS = ("llama-3-8b", "llama-3-70b")
PROCESSES = (1, 8, 64)
ROWS = (
    ("all weights", "gradient checkpointing"),
    ("all weights", "TokenTune + checkpointing"),
    ("LoRA", "full"),
    ("LoRA", "gradient checkpointing"),
    ("LoRA", "TokenTune"),
    ("LoRA", "TokenTune + checkpointing"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write, or to go on with")
    parser.add_argument("--models", nargs="+", default=MODELS, help="presets, folders or hub ids")
    options = parser.parse_args()
    rows = json.loads(options.output.read_text(encoding="utf-8"))["rows"] if options.output.exists() else []
    for model in options.models:
        for processes in PROCESSES:
            rows += missing_rows(model, processes, rows)
            report = {"schema_version": 1, "torch": torch.__version__, "rows": rows}
            write_whole(options.output, json.dumps(report, indent=2) + "\n")
    print(f"written: {options.output}")


def missing_rows(model: str, processes: int, known: list[dict]) -> list[dict]:
    """The rows of one model on so many GPUs that are not known yet."""
    words = f"--model_name_or_path {model} --bf16 --max_length 2048 --prefix_length 0.3 --report_to none"
    given, subject = estimate.parse([*words.split(), *(sharding(processes))])
    run = estimate.estimator_for(given, subject)
    done = {(row["model"], row["processes"], row["weights"], row["method"]) for row in known}
    left = [pair for pair in ROWS if (model, processes, *pair) not in done]
    rows = []
    for weights, method in left:
        footprint = run(estimate.with_mode(given, method, weights), (subject.sequences, subject.length))
        row = {"model": model, "processes": processes, "weights": weights, "method": method}
        rows.append(row | {"bytes": footprint.as_dict()})
        print(rows[-1]["model"], processes, weights, method, f"{footprint.peak / 2**30:.1f} GiB", flush=True)
    return rows


def sharding(processes: int) -> list[str]:
    return [] if processes == 1 else ["--num_processes", str(processes), "--sharding", "fsdp"]


if __name__ == "__main__":
    main()
