"""How a step grows with the sequence, up to 32,768 tokens: bytes saved, peak memory and time, with fitted exponents.

    python scripts/bench/long_sequence.py --output scripts/bench/results/long_sequence.json
    python scripts/bench/long_sequence.py --output /tmp/long.json --lengths 512 1024 --block_lengths 512 --repeats 1

A slice of a Llama: two layers of the given width without a vocabulary, the first with both groups' attention as in any
layer of a model, the second ending as the last one does; float32, random weights and inputs, one sequence. Three ways
of attending: `blocks` (what TokenTune runs on a CPU), `one call` (masks of K x S and R x S numbers, as far as
--one_call_up_to) and `plain` (no selection, the fused causal kernel). Every length and way has a process of its own.
`peak_bytes` is the highest resident memory of the step less that before it (Linux), `saved_bytes` what autograd keeps
for the backward pass. `block_sizes` is what the sizes in `tokentune/core/attention/blockwise.py` were chosen by:
seconds of the attention of one layer alone, for several numbers of queries in a block, next to one causal kernel over
the whole sequence for the rest's queries. Under four minutes on 2 quiet cores.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from steps.report import fit_power, machine

from tokentune import apply_tokentune
from tokentune.core.attention import blockwise as blocks
from tokentune.core.attention import kernels as attention
from tokentune.core.attention.masks import GroupMask, mask_from_functions
from tokentune.core.groups import token_order
from tokentune.core.saved_tensors.saved_bytes import SavedForBackward

WAYS = ("blocks", "one call", "plain")
BLOCKS = (32, 64, 128, 256, 512)


def main() -> None:
    options = parse()
    torch.manual_seed(options.seed)
    if options.only is not None:
        print(json.dumps(measure(options, *options.only)))
        return
    rows = []
    for way in WAYS:
        for length in options.lengths:
            if way == "blocks" or length <= options.one_call_up_to:
                rows.append(in_a_process(way, length))
                print(rows[-1], file=sys.stderr)
    sizes = [row for length in options.block_lengths for row in block_sizes(options, length)]
    result = machine("cpu") | {
        "seed": options.seed,
        "shape": {name: getattr(options, name) for name in ("hidden_size", "heads", "key_value_heads", "proportion")},
        "rows": rows,
        "growth": growth(rows),
        "block_sizes": sizes,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512 * 2**n for n in range(7)], help="in tokens")
    parser.add_argument("--one_call_up_to", type=int, default=8192, help="longest sequence for the other two ways")
    parser.add_argument("--block_lengths", type=int, nargs="+", default=[512, 2048, 8192], help="for block_sizes")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps up to 8,192 tokens; one beyond")
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--key_value_heads", type=int, default=2)
    parser.add_argument("--proportion", type=float, default=0.3, help="selected tokens, of the sequence")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)  # a way and a length: what a process of its own runs
    return parser.parse_args()


def in_a_process(way: str, length: int) -> dict[str, Any]:
    command = [sys.executable, *sys.argv, "--only", way, str(length)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        raise RuntimeError(f"{way} at {length} tokens: {found.stderr.strip().splitlines()[-1]}")
    return json.loads(found.stdout.splitlines()[-1])


def measure(options: argparse.Namespace, way: str, length: str | int) -> dict[str, Any]:
    """One way at one length: bytes, then seconds per forward and backward pass."""
    length = int(length)
    model = slice_of_a_llama(options, length)
    if way != "plain":
        apply_tokentune(model, verify=False)
    if way == "one call":
        attention._in_blocks = lambda *_: False
    hidden = torch.randn(1, length, options.hidden_size)
    selected = {} if way == "plain" else {"selected_positions": drawn(length, options.proportion)}

    def forward() -> Tensor:
        return model(inputs_embeds=hidden.clone().requires_grad_(), use_cache=False, **selected).last_hidden_state

    def step() -> None:
        forward().sum().backward()
        model.zero_grad(set_to_none=True)

    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of imports, is forgotten
    before, start = resident("VmRSS"), time.perf_counter()
    with SavedForBackward(model) as saved:
        output = forward()
    output.sum().backward()
    del output
    seconds = [time.perf_counter() - start]
    peak = resident("VmHWM") - before
    if length <= 8192:
        seconds = [timed(step) for _ in range(options.repeats)]
    figures = {"saved_bytes": saved.bytes, "peak_bytes": peak, "seconds": statistics.median(seconds)}
    return {"way": way, "length": length, **figures}


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most. Linux only; `getrusage` would count the parent's peak too."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def slice_of_a_llama(options: argparse.Namespace, length: int) -> LlamaModel:
    heads = {"num_attention_heads": options.heads, "num_key_value_heads": options.key_value_heads}
    sizes = {"hidden_size": options.hidden_size, "intermediate_size": options.hidden_size * 11 // 4, "vocab_size": 8}
    return LlamaModel(LlamaConfig(**heads, **sizes, num_hidden_layers=2, max_position_embeddings=length)).train()


def drawn(length: int, proportion: float) -> Tensor:
    """(1, K) random positions, ascending."""
    return torch.randperm(length)[: round(proportion * length)].sort().values[None]


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Exponents of a power of the length, for every way and figure; time and peak from 2,048 tokens on."""
    found = []
    for way in WAYS:
        for figure, shortest in (("saved_bytes", 0), ("peak_bytes", 2048), ("seconds", 2048)):
            points = [(row["length"], row[figure]) for row in rows if row["way"] == way and row["length"] >= shortest]
            if len(points) > 1:
                found.append({"way": way, "figure": figure, **fit_power(points)})
    return found


def block_sizes(options: argparse.Namespace, length: int) -> list[dict[str, Any]]:
    """Seconds of one layer's attention, median of the repeats, for the block sizes in turn within every repeat."""
    size, positions = options.hidden_size // options.heads, drawn(length, options.proportion)
    count = positions.shape[1]
    order, recipe = token_order(positions, length), mask_from_functions(1, length, length)
    groups = {"selected": order[:, :count], "unselected": order[:, count:]}
    key, value = (random_heads(length, options.key_value_heads, size) for _ in range(2))
    queries = {group: random_heads(tokens.shape[1], options.heads, size) for group, tokens in groups.items()}
    whole = random_heads(length, options.heads, size)

    def forward(group: str, block: int) -> Tensor:
        blocks.CPU_BLOCK = blocks.CPU_LONG_BLOCK = block
        mask = GroupMask(recipe, group, groups[group], length)
        return blocks.attend_by_blocks(queries[group], key, value, mask, None)[0]

    def rest(block: int) -> None:
        with torch.no_grad():
            forward("unselected", block)

    def causal() -> None:
        with torch.no_grad():
            F.scaled_dot_product_attention(whole, key, value, is_causal=True, enable_gqa=True)

    works: dict[tuple[str, str | int], Callable[[], object]] = {}
    for block in BLOCKS:
        works["selected, forward and backward", block] = lambda b=block: forward("selected", b).sum().backward()
        works["rest, forward", block] = lambda b=block: rest(b)
    works["rest, forward", "causal kernel over the whole sequence"] = causal
    seconds = {name: [] for name in works}
    for repeat in range(options.repeats + 1):  # the first one to warm up
        for name, work in works.items():
            taken = timed(work)
            if repeat > 0:
                seconds[name].append(taken)
    return [
        {"length": length, "what": what, "block": block, "seconds": statistics.median(values)}
        for (what, block), values in seconds.items()
    ]


def random_heads(length: int, heads: int, size: int) -> Tensor:
    """(1, heads, length, size), laid out as a projection leaves it."""
    return torch.randn(1, length, heads, size).transpose(1, 2).detach().requires_grad_()


if __name__ == "__main__":
    main()
