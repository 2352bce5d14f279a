"""What merging a QLoRA adapter costs: differences of logits, and validation losses, for both bases. The real commands.

    python scripts/bench/merging.py --model ../shared/models/llama-tiny \
        --train ../shared/data/alpaca_en.train.jsonl --validation ../shared/data/alpaca_en.validation.jsonl \
        --output scripts/bench/results/merging.json

Trains with `finetune.py --qlora --tokentune` (one epoch, the other settings of `instruction_tuning.py`), merges with
`merge.py` into the base's own weights and into the dequantised 4-bit ones, in the base's type and in float32. Losses
are nats per supervised token over all validation rows, computed in float32.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from instruction_tuning import COMMON, command, finetune, load, machine, parse, validation_loss
from peft import PeftModel
from torch import nn

from tokentune.core.compat.four_bit import keep_4bit_layout
from tokentune.models.merging.logit_difference import float32_arithmetic
from tokentune.models.pretrained import load_base_model


def loss_in_float32(model: nn.Module, options: argparse.Namespace) -> float:
    with float32_arithmetic(model):
        return validation_loss(model, options)


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            "--qlora",
            "--tokentune",
            "--prefix_length",
            "0.3",
            "--selection",
            "random",
            "--bf16",
            "--num_epochs",
            "1",
        ]
        adapter = finetune(options, flags, Path(folder) / "runs")
        base = load_base_model(options.model, dtype=torch.bfloat16, quantize_4bit=True, compute_dtype=torch.float32)
        keep_4bit_layout(base)
        trained = PeftModel.from_pretrained(base, adapter).eval()
        rows = []
        for dtype in ("auto", "float32"):
            for kind in ("16bit", "dequantized"):
                merged = Path(folder) / f"{kind}-{dtype}"
                command("merge.py", "--base_model_name_or_path", options.model, "--peft_model_path", str(adapter),
                        "--output_dir", str(merged), "--qlora_base", kind, "--dtype", dtype)  # fmt: skip
                summary = json.loads((merged / "merge_summary.json").read_text())
                rows.append(
                    {
                        "base": kind,
                        "dtype": summary["dtype"],
                        "from_training": summary["qlora"]["from_training"][kind],
                        "validation_loss": validation_loss(load(str(merged)), options),
                    }
                )
        report = {
            "schema_version": 1,
            "settings": COMMON | {"num_epochs": 1, "flags": flags},
            "trained": {"validation_loss": loss_in_float32(trained, options)},
            "base": {"validation_loss": validation_loss(load(options.model), options)},
            "merged": rows,
            "machine": machine(),
        }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
