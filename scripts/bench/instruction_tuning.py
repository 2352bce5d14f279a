"""Validation loss of instruction tuning with and without TokenTune, and of the merged model: the real commands.

    python scripts/bench/instruction_tuning.py --model ../shared/models/llama-tiny \
        --train ../shared/data/alpaca_en.train.jsonl --validation ../shared/data/alpaca_en.validation.jsonl \
        --output scripts/bench/results/instruction_tuning.json

Runs `finetune.py` three times from the same seed, LoRA on all linear layers and the same with `--tokentune`, random
tokens and the default's; merges the last one in float32 with `merge.py`, and measures the merged model's loss and that
of base + adapter on the same rows.
Losses are nats per supervised token over all validation rows, by the full forward pass.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokentune.cli.arguments import parse_arguments
from tokentune.data.collators import CausalCollator
from tokentune.data.instruction_data import load_instruction_data
from tokentune.data.prompts import PromptTemplate, ensure_pad_token

ROOT = Path(__file__).resolve().parents[2]
COMMON = {
    "lora_target_modules": "all-linear",
    "lora_r": 8,
    "learning_rate": 2e-3,
    "global_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "num_epochs": 2,
    "warmup_steps": 10,
    "max_length": 256,
    "report_to": "none",
    "logging_steps": 20,
}
TOKENTUNE = ["--tokentune", "--prefix_length", "0.3"]
RUNS = {
    "LoRA": [],
    "LoRA + TokenTune, random": [*TOKENTUNE, "--selection", "random"],
    "LoRA + TokenTune": TOKENTUNE,
}


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        summaries, folders = {}, {}
        for name, flags in RUNS.items():
            folders[name] = finetune(options, flags, Path(folder) / name.replace(" ", "").replace(",", ""))
            summaries[name] = json.loads((folders[name] / "training_summary.json").read_text())
        adapter = folders["LoRA + TokenTune"]
        merged = adapter / "merged"
        command("merge.py", "--base_model_name_or_path", options.model, "--peft_model_path", str(adapter),
                "--output_dir", str(merged), "--dtype", "float32")  # fmt: skip
        with_adapter = PeftModel.from_pretrained(load(options.model), adapter)
        losses = {
            "base + adapter, float32": validation_loss(with_adapter, options),
            "merged, float32": validation_loss(load(str(merged)), options),
        }
    report = {"schema_version": 1, "settings": COMMON, "rows": rows(summaries), "merge": losses, "machine": machine()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    return parser.parse_args()


def command(name: str, *flags: str) -> None:
    subprocess.run([sys.executable, "-u", str(ROOT / "tokentune" / name), *flags], check=True)


def finetune(options: argparse.Namespace, flags: list[str], folder: Path) -> Path:
    """Trains; returns the run's folder, the only one below `folder`."""
    common = [word for key, value in COMMON.items() for word in (f"--{key}", str(value))]
    paths = ["--model_name_or_path", options.model, "--dataset_name_or_path", options.train]
    paths += ["--eval_dataset_name_or_path", options.validation, "--model_save_path", str(folder)]
    command("finetune.py", *paths, "--lora", *common, *flags)
    return next(folder.iterdir())


def load(name: str) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()


def validation_loss(model: nn.Module, options: argparse.Namespace) -> float:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ensure_pad_token(tokenizer, model.config.vocab_size)
    template = PromptTemplate.load(ROOT / "tokentune" / "alpaca_template.json")
    words = ["--model_name_or_path", options.model, "--dataset_name_or_path", options.validation]
    arguments = parse_arguments([*words, "--max_length", str(COMMON["max_length"]), "--data_cache", "none"])
    encoded = load_instruction_data(arguments, tokenizer, template).train
    loss_sum = tokens = 0.0
    with torch.no_grad():
        for batch in DataLoader(encoded, batch_size=8, collate_fn=CausalCollator(tokenizer.pad_token_id)):
            count = int((batch["labels"][:, 1:] != -100).sum())
            loss_sum += model(**batch).loss.item() * count
            tokens += count
    return loss_sum / tokens


def rows(summaries: dict[str, dict]) -> list[dict]:
    """One row per run, from the summaries that the command wrote."""
    return [
        {
            "run": name,
            "base_loss": summary["validation_loss"]["base"],
            "final_loss": summary["validation_loss"]["final"],
            "saved_for_backward_bytes": summary["saved_for_backward_bytes"],
            "tokens_per_second": summary["tokens_per_second"],
        }
        for name, summary in summaries.items()
    ]


def machine() -> dict:
    return {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
            "torch": torch.__version__}  # fmt: skip


if __name__ == "__main__":
    main()
