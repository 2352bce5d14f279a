"""Speed and memory of training on one process and on two (DDP over gloo), the same global batch.

    python scripts/bench/processes.py --model ../shared/models/llama-tiny \
        --data ../shared/data/alpaca_en.train.jsonl --output scripts/bench/results/processes.json

`torchrun` with `finetune.py`, LoRA with and without TokenTune. The machine's cores are shared out among the processes,
so that on a CPU two processes cannot be faster than one by more than what threads of one lose; what is looked at is
that nothing else is lost, and that the weights are the same. The runs alternate.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from steps.report import machine

ROOT = Path(__file__).resolve().parents[2]
METHODS = {"LoRA": "", "LoRA + TokenTune": "--tokentune --prefix_length 0.3 --selection random"}
COMMON = "--lora --lora_dropout 0 --base_dtype float32 --global_batch_size 16 --max_length 256 --warmup_steps 2 "
COMMON += "--learning_rate 1e-3 --report_to none --logging_steps 100 --skip_memory_probe"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--model", required=True, help="folder of a small causal language model")
    parser.add_argument("--data", required=True, help="instruction data")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    runs = {(method, count): [] for method in METHODS for count in options.processes}
    weights = {}
    for _ in range(options.rounds):
        for method, count in runs:
            summary, weights[method, count] = run(options, method, count)
            runs[method, count].append(summary)
    rows = []
    for (method, count), summaries in runs.items():
        first = weights[method, options.processes[0]]
        difference = max((tensor - first[name]).abs().max().item() for name, tensor in weights[method, count].items())
        rows.append(
            {
                "method": method,
                "processes": count,
                "tokens_per_second": [summary["tokens_per_second"] for summary in summaries],
                "saved_for_backward_bytes_per_process": summaries[0]["saved_for_backward_bytes"],
                "last_loss": summaries[0]["loss"]["last"],
                "largest_difference_of_a_weight": difference,
            }
        )
        median = statistics.median(rows[-1]["tokens_per_second"])
        print(f"{method}, {count}: {median:.0f} tokens/s, weights differ by at most {difference:.1e}")
    report = machine("cpu") | {"cores": os.cpu_count(), "steps": options.steps, "rows": rows}
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def run(options: argparse.Namespace, method: str, count: int) -> tuple[dict, dict]:
    """One training: its summary, and the adapter's weights."""
    with tempfile.TemporaryDirectory() as folder:
        names = ["--model_name_or_path", options.model, "--dataset_name_or_path", options.data]
        words = [*f"{COMMON} {METHODS[method]} --max_steps {options.steps}".split(), "--model_save_path", folder]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        env = os.environ | {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // count))}
        script = str(ROOT / "tokentune" / "finetune.py")
        subprocess.run([*launcher, script, *names, *words], check=True, env=env, stdout=subprocess.DEVNULL)
        (summary,) = Path(folder).glob("*/training_summary.json")
        found = json.loads(summary.read_text(encoding="utf-8"))
        return found, load_file(summary.parent / "adapter_model.safetensors")


if __name__ == "__main__":
    main()
