"""Time and memory of one training step: plain training, gradient checkpointing and TokenTune, side by side.

    python scripts/bench/step.py --output scripts/bench/results/step_cpu.json

A Llama with random weights takes forward and backward passes on random tokens, the methods one after the other in every
round, so that whatever else the machine does hits all of them alike. Ratios are medians over rounds of the ratio within
a round, with the interval that holds the median with 95 % confidence. Bytes are exact: what autograd keeps for the
backward pass, each storage once, parameters excluded; on a GPU the allocator's peak too.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import transformers

from tokentune import apply_tokentune, remove_tokentune
from tokentune.memory import SavedForBackward, gib, memory_usage, reset_peak
from tokentune.selection import select_positions

METHODS = ("full", "checkpointing", "tokentune")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    options = parse()
    rows = []
    for adapters in options.train:
        for heads in options.key_value_heads:
            rows += measure(options, heads, adapters)
    report = {"schema_version": 1, "setting": setting(options), "machine": machine(options), "rows": rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {options.output}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--hidden_size", type=int, default=1024)
    parser.add_argument("--intermediate_size", type=int, default=2816)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--key_value_heads", type=int, nargs="+", default=[16, 4])
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--batch", type=int, default=2, help="sequences per step")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--proportion", type=float, default=0.3, help="selected tokens, as a share of the sequence")
    parser.add_argument("--train", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def build(options: argparse.Namespace, key_value_heads: int, adapters: str) -> nn.Module:
    config = LlamaConfig(
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=key_value_heads,
        vocab_size=options.vocabulary,
        max_position_embeddings=max(4096, options.length),
        use_cache=False,
    )
    with torch.device(options.device):
        model = LlamaForCausalLM._from_config(config, dtype=DTYPES[options.dtype])
    if adapters == "lora":
        from peft import LoraConfig, get_peft_model

        targets = ["gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    return model.train()


def measure(options: argparse.Namespace, key_value_heads: int, adapters: str) -> list[dict]:
    """One row per method: bytes, seconds per round, and the ratios to plain training."""
    torch.manual_seed(options.seed)
    model = build(options, key_value_heads, adapters)
    ids = torch.randint(0, options.vocabulary, (options.batch, options.length), device=options.device)
    mask = torch.ones_like(ids)
    positions = select_positions(mask, options.proportion)
    rows = {method: prepare(model, ids, positions, method, options.device) for method in METHODS}
    for method in METHODS:  # warm-up: allocator and thread pools
        timed_step(model, ids, positions, method, options.device)
    for _ in range(options.rounds):
        for method in METHODS:
            rows[method]["seconds"].append(timed_step(model, ids, positions, method, options.device))
    for method in METHODS:
        row = rows[method]
        row |= {"train": adapters, "key_value_heads": key_value_heads}
        for base in ("full", "checkpointing"):
            pairs = zip(row["seconds"], rows[base]["seconds"], strict=True)
            row[f"time_ratio_to_{base}"] = median_with_interval([one / other for one, other in pairs])
            row[f"bytes_ratio_to_{base}"] = row["saved_bytes"] / rows[base]["saved_bytes"]
        low, middle, high = row["time_ratio_to_full"]
        print(
            f"{adapters:5s} {key_value_heads:2d} kv heads {method:14s} saved {gib(row['saved_bytes']):>10s} "
            f"({row['bytes_ratio_to_full']:.3f})  step {statistics.median(row['seconds']):.3f} s "
            f"({middle:.3f}, 95 % {low:.3f} to {high:.3f})",
            flush=True,
        )
    return list(rows.values())


def prepare(model: nn.Module, ids: Tensor, positions: Tensor, method: str, device: str) -> dict:
    """The bytes of one step, outside of the timed rounds."""
    switch(model, method)
    reset_peak(device)
    with SavedForBackward(model) as saved:
        loss = forward(model, ids, positions, method)
    loss.backward()
    model.zero_grad(set_to_none=True)
    return {
        "method": method,
        "saved_bytes": saved.bytes,
        "peak_bytes": memory_usage(device)["peak_bytes"] if device != "cpu" else None,
        "seconds": [],
    }


def switch(model: nn.Module, method: str) -> None:
    remove_tokentune(model)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.gradient_checkpointing_disable()
    if method == "checkpointing":
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if method == "tokentune":
        apply_tokentune(model, verify=False)


def forward(model: nn.Module, ids: Tensor, positions: Tensor, method: str) -> Tensor:
    if method == "tokentune":
        return model(input_ids=ids, labels=ids, selected_positions=positions).loss
    return model(input_ids=ids, labels=ids).loss


def timed_step(model: nn.Module, ids: Tensor, positions: Tensor, method: str, device: str) -> float:
    switch(model, method)
    synchronize(device)
    start = time.perf_counter()
    forward(model, ids, positions, method).backward()
    synchronize(device)
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return seconds


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def median_with_interval(values: list[float]) -> tuple[float, float, float]:
    """(low, median, high): order statistics that hold the median of the population with 95 % confidence."""
    ordered, n = sorted(values), len(values)
    reach = round(0.98 * n**0.5)  # 1.96 standard deviations of a binomial(n, 1/2), in ranks
    return ordered[max(0, n // 2 - reach)], statistics.median(ordered), ordered[min(n - 1, n // 2 + reach)]


def setting(options: argparse.Namespace) -> dict:
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()} | {
        "output": options.output.name
    }


def machine(options: argparse.Namespace) -> dict:
    gpu = torch.cuda.get_device_name() if options.device.startswith("cuda") else None
    return {
        "device": gpu or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    main()
