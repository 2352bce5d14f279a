"""What each strategy of --selection costs: time, saved bytes and peak of one training step, side by side.

    python scripts/bench/selection_cost.py --output scripts/bench/results/selection_cost.json
    python scripts/bench/selection_cost.py --output tried.json --small

A Llama with random weights takes steps on random tokens, the second half of each row supervised. Strategies without
scores are drawn beforehand, as a collator does; those with scores, and "pass" (random after a pass over all tokens),
draw within the step. All ways take turns within every round. Ratios of time are medians over rounds of the ratio within
a round, with the interval that holds the median with 95 % confidence; bytes are exact (`steps/measure.py`).

    rows    [{way, checkpointing, strategy, layers (looked through; null: all), saved_bytes, peak_bytes (weights
            included), seconds (of every round), and for each base `time_ratio_to_<base>` ([low, median, high]),
            `saved_ratio_to_<base>`, `peak_ratio_to_<base>`}]
    bases   random (with checkpointing where the row has it), plain, plain_checkpointing
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from steps.cases import Case, Shape, build, shrunk
from steps.measure import allocations, storage_bytes
from steps.report import machine, median_with_interval

from tokentune import apply_tokentune, remove_tokentune
from tokentune.core.saved_tensors.saved_bytes import SavedForBackward, gib
from tokentune.core.scoring_pass import ScoringOptions
from tokentune.sampling.sampler import IGNORED_LABEL, mask_unselected_labels, select_positions, target_mask

SCHEMA_VERSION = 1
DRAWN = ("random", "supervised", "stratified", "contiguous")
SCORED = ("loss", "gradient", "attention", "tokenseek", "excess_loss")


@dataclass(frozen=True)
class Way:
    """One way of taking a step; a strategy of None selects nothing."""

    way: str
    checkpointing: bool
    strategy: str | None = None
    looks: bool = False
    layers: int | None = None


def ways_of(depth: int) -> list[Way]:
    ways = []
    for checkpointing in (False, True):
        ways.append(Way("plain", checkpointing))
        ways += [Way(name, checkpointing, name) for name in DRAWN]
        ways.append(Way("pass", checkpointing, "random", True))
        ways += [Way(name, checkpointing, name, True) for name in SCORED]
        ways.append(Way("gradient, first layers", checkpointing, "gradient", True, max(1, depth // 3)))
    return ways


class Cost:
    """A model and a batch, and what one step takes of each way."""

    def __init__(self, case: Case, proportion: float, seed: int) -> None:
        torch.manual_seed(seed)
        self.proportion = proportion
        self.model, self.reference = build(case, "cpu"), build(case, "cpu").requires_grad_(False)
        self.ids = torch.randint(0, case.shape.vocabulary, (case.batch, case.length))  # (B, S)
        self.labels = self.ids.clone()
        self.labels[:, : case.length // 2] = IGNORED_LABEL
        self.mask = torch.ones_like(self.ids)
        self.uniform = torch.rand(self.ids.shape)

    def prepare(self, way: Way) -> None:
        core: nn.Module = remove_tokentune(self.model)
        if way.strategy is not None:
            options: dict[str, Any] = {}
            if way.looks:
                reference = self.reference if way.strategy == "excess_loss" else None
                options = ScoringOptions(layers=way.layers, reference=reference)
                options = {"prefix_length": self.proportion, "selection": way.strategy, "scoring_pass": options}
            apply_tokentune(self.model, verify=False, **options)
        core.activation_checkpointing_enable() if way.checkpointing else core.activation_checkpointing_disable()

    def batch(self, way: Way) -> dict[str, Any]:
        batch = {"input_ids": self.ids, "labels": self.labels, "attention_mask": self.mask}
        targets = target_mask(self.labels, causal=True)
        if way.looks:
            return batch | {"selection_draws": self.uniform}
        if way.strategy is None:
            return batch
        options = {"targets": targets, "strategy": way.strategy, "scores": self.uniform, "labels": self.labels}
        positions = select_positions(self.mask, self.proportion, **options)
        batch["labels"] = mask_unselected_labels(self.labels, positions, causal=True)
        return batch | {"selected_positions": positions}

    def bytes_of(self, way: Way) -> dict[str, int]:
        self.prepare(way)
        batch = self.batch(way)
        self.model(**batch).loss.backward()  # warm-up
        self.model.zero_grad(set_to_none=True)
        with SavedForBackward(self.model) as saved:
            loss = self.model(**batch).loss
        del loss
        losses: list[Tensor] = []
        held, forward_peak = allocations(lambda: losses.append(self.model(**batch).loss))
        _, backward_peak = allocations(lambda: losses.pop().backward())
        self.model.zero_grad(set_to_none=True)
        weights = storage_bytes(list(self.model.parameters()))
        if way.strategy == "excess_loss":
            weights += storage_bytes(list(self.reference.parameters()))
        return {"saved_bytes": saved.bytes, "peak_bytes": weights + max(forward_peak, held + backward_peak)}

    def seconds_of(self, way: Way) -> float:
        self.prepare(way)
        batch = self.batch(way)
        started = time.perf_counter()
        self.model(**batch).loss.backward()
        seconds = time.perf_counter() - started
        self.model.zero_grad(set_to_none=True)
        return round(seconds, 6)


def add_ratios(rows: list[dict[str, Any]]) -> None:
    known = {(row["way"], row["checkpointing"]): row for row in rows}
    for row in rows:
        bases = {"random": ("random", row["checkpointing"]), "plain": ("plain", False)}
        bases["plain_checkpointing"] = "plain", True
        for name, key in bases.items():
            base = known[key]
            for kind in ("saved", "peak"):
                row[f"{kind}_ratio_to_{name}"] = row[f"{kind}_bytes"] / base[f"{kind}_bytes"]
            ratios = [one / other for one, other in zip(row["seconds"], base["seconds"], strict=True)]
            row[f"time_ratio_to_{name}"] = median_with_interval(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--small", action="store_true", help="a tiny model and two rounds, to try the code path out")
    parser.add_argument("--proportion", type=float, default=0.3, help="selected tokens, of the sequence")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shape = Shape("llama-1024", 1024, 2816, options.layers, 16, 4, options.vocabulary)
    case = Case("selection_cost", shape, (), batch=options.batch, length=options.length, rounds=options.rounds)
    case = shrunk(case) if options.small else case
    cost, ways = Cost(case, options.proportion, options.seed), ways_of(case.shape.layers)
    rows = [asdict(way) | cost.bytes_of(way) | {"seconds": []} for way in ways]
    for _ in range(case.rounds):
        for way, row in zip(ways, rows, strict=True):
            row["seconds"].append(cost.seconds_of(way))
    add_ratios(rows)
    settings = asdict(case) | {"proportion": options.proportion, "seed": options.seed}
    report = {"schema_version": SCHEMA_VERSION, "machine": machine("cpu"), "settings": settings, "rows": rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        low, middle, high = row["time_ratio_to_random"]
        name = row["way"] + (" + checkpointing" if row["checkpointing"] else "")
        print(
            f"{name:40s} saved {gib(row['saved_bytes']):>10s}  peak {gib(row['peak_bytes']):>10s}  "
            f"step {statistics.median(row['seconds']):.3f} s  {middle:.3f} of random ({low:.3f} to {high:.3f})"
        )


if __name__ == "__main__":
    main()
