"""Memory and time of one training step on the quick start's base: all weights and LoRA, each plain and with TokenTune.

    python scripts/quickstart/measure.py --model quickstart/base --data quickstart/data/train.jsonl \
        --output quickstart/measurements.json

Memory is what autograd keeps for the backward pass, parameters excluded: the part that grows with the batch. A step is
forward, backward and AdamW on one batch of the training data. The methods take turns within every round, so that
whatever else the machine does hits all alike.
"""

import argparse
import json
import logging
import platform
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[2]))  # for tokentune, when run as a file

from tokentune import apply_tokentune
from tokentune.cli.arguments import parse_arguments
from tokentune.core.saved_tensors.saved_bytes import SavedForBackward
from tokentune.data.collators import CausalCollator, SeededRows, token_counts
from tokentune.data.instruction_data import load_instruction_data
from tokentune.data.prompts import DEFAULT_TEMPLATE, PromptTemplate, ensure_pad_token
from tokentune.models.adapters import add_adapters
from tokentune.models.pretrained import load_base_model, load_tokenizer

# Other packages' words on their own internals, which a user can do nothing about.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")

PLAIN = {"full": "full", "TokenTune": "full", "LoRA": "LoRA", "TokenTune + LoRA": "LoRA"}  # what each is compared with


def build_model(method: str, path: str, rank: int) -> nn.Module:
    model = load_base_model(path, dtype=torch.float32, quantize_4bit=False)
    if "LoRA" in method:
        model = add_adapters(model, r=rank, alpha=2 * rank, dropout=0.0, target_modules=["all-linear"], quantized=False)
    return (apply_tokentune(model) if "TokenTune" in method else model).train()


def build_batches(arguments: argparse.Namespace) -> dict[str, dict[str, Tensor]]:
    """One batch of the training data for each method, the same rows; with positions where the method selects."""
    tokenizer = load_tokenizer(arguments.model)
    pad_token_id = ensure_pad_token(tokenizer, None)
    words = ["--model_name_or_path", arguments.model, "--dataset_name_or_path", arguments.data, "--add_eos_token"]
    words += ["--tokentune", "--prefix_length", arguments.prefix_length, "--max_length", "96", "--data_cache", "none"]
    options = parse_arguments(words)
    rows = load_instruction_data(options, tokenizer, PromptTemplate.load(DEFAULT_TEMPLATE)).train
    examples = [SeededRows(rows, seed=0)[index] for index in range(arguments.batch)]
    whole = CausalCollator(pad_token_id)(examples)
    selected = CausalCollator(pad_token_id, options.selection.selected, options.selection.selection)(examples)
    return {method: selected if "TokenTune" in method else whole for method in PLAIN}


def timed_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> float:
    """Seconds of one step."""
    start = time.perf_counter()
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=32, help="sequences")
    parser.add_argument("--prefix_length", default="answers+0.3", help="which tokens are selected, as of finetune.py")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA")
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()

    batches = build_batches(arguments)
    models = {method: build_model(method, arguments.model, arguments.rank) for method in PLAIN}
    saved_bytes, seconds = {}, {method: [] for method in PLAIN}
    optimizers = {}
    for method, model in models.items():
        with SavedForBackward(model) as saved:
            loss = model(**batches[method]).loss
        saved_bytes[method] = saved.bytes
        del loss
        # A learning rate of zero: the timed steps do all the work and leave the weights as they are.
        optimizers[method] = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.0)
        timed_step(model, optimizers[method], batches[method])  # warm-up
    for _ in tqdm(range(arguments.rounds), desc="measuring", unit="round"):
        for method, model in models.items():
            seconds[method].append(timed_step(model, optimizers[method], batches[method]))

    tokens, selected, _ = token_counts(batches["TokenTune"]["attention_mask"], batches["TokenTune"])
    rows = []
    for method, plain in PLAIN.items():
        ratios = [one / other for one, other in zip(seconds[method], seconds[plain], strict=True)]
        rows.append(
            {
                "method": method,
                "compared_with": plain,
                "saved_bytes": saved_bytes[method],
                "seconds": statistics.median(seconds[method]),
                "saved_bytes_ratio": saved_bytes[method] / saved_bytes[plain],
                "seconds_ratio": statistics.median(ratios),  # median over rounds of the ratio within a round
            }
        )
        print("{method}: {saved_bytes:,} bytes saved for backward, {seconds:.3f} s per step".format(**rows[-1]))
    setting = {
        "batch": list(batches["full"]["input_ids"].shape),
        "prefix_length": arguments.prefix_length,
        "tokens": int(tokens),
        "selected_tokens": int(selected),
        "rank": arguments.rank,
        "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    arguments.output.write_text(json.dumps({"setting": setting, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
