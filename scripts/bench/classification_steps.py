"""Step time and exact bytes of one classification batch: plain training against 16 and 32 selected tokens.

    python scripts/bench/classification.py --steps_only --output scripts/bench/results/classification.json

One step is a forward and a backward pass of a batch of random words, all of the same length, in float32 and without an
optimizer. The methods take turns within every round, so that whatever else the machine does hits all of them alike.
"""

import statistics
import time

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from tokentune import apply_tokentune, remove_tokentune
from tokentune.core.saved_tensors.saved_bytes import SavedForBackward
from tokentune.sampling.sampler import select_positions

BATCH, LENGTH = 32, 128  # sequences, tokens each
METHODS: dict[str, int | None] = {"full": None, "16": 16, "32": 32}  # selected tokens per sequence


def measure_steps(model_name: str, rounds: int, seed: int = 0) -> dict:
    """{batch, length, rows: [{method, saved_for_backward_bytes, seconds of each round, ratios to full training}]}."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(model_name, num_labels=2).train()
    ids = torch.randint(999, model.config.vocab_size, (BATCH, LENGTH))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.randint(2, (BATCH,))}
    positions = {name: pooled_and_others(ids, count) for name, count in METHODS.items() if count}
    saved = {name: saved_bytes(model, batch, positions.get(name)) for name in METHODS}  # the warm-up, too
    seconds = {name: [] for name in METHODS}
    for _ in range(rounds):
        for name, taken in seconds.items():
            taken.append(timed_step(model, batch, positions.get(name)))
    rows = [
        {
            "method": name,
            "saved_for_backward_bytes": saved[name],
            "bytes_ratio_to_full": saved[name] / saved["full"],
            "seconds": taken,
            "time_ratio_to_full": statistics.median(
                one / full for one, full in zip(taken, seconds["full"], strict=True)
            ),
        }
        for name, taken in seconds.items()
    ]
    return {"batch": BATCH, "length": LENGTH, "dtype": "float32", "threads": torch.get_num_threads(), "rows": rows}


def pooled_and_others(ids: Tensor, count: int) -> Tensor:
    """(B, K): the class token and others drawn at random."""
    pooled = torch.zeros_like(ids, dtype=torch.bool)
    pooled[:, 0] = True
    return select_positions(torch.ones_like(ids), count, always=pooled)


def saved_bytes(model: nn.Module, batch: dict[str, Tensor], positions: Tensor | None) -> int:
    with SavedForBackward(model) as saved:
        loss = forward(model, batch, positions)
    loss.backward()
    model.zero_grad(set_to_none=True)
    return saved.bytes


def timed_step(model: nn.Module, batch: dict[str, Tensor], positions: Tensor | None) -> float:
    start = time.perf_counter()
    forward(model, batch, positions).backward()
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return seconds


def forward(model: nn.Module, batch: dict[str, Tensor], positions: Tensor | None) -> Tensor:
    if positions is None:
        return remove_tokentune(model)(**batch).loss
    return apply_tokentune(model, verify=False)(**batch, selected_positions=positions).loss
