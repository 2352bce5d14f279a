"""Rows, models and training runs of `prompt_heavy.py`, made with the pieces of finetune.py."""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality.step_times import optimizer_step
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, set_seed

from prompts.arms import Arm, words
from prompts.evaluating import Found, evaluate
from prompts.tasks import SPLITS, Task
from tokentune.cli.arguments import parse_arguments
from tokentune.data.collators import SeededRows
from tokentune.data.instruction_data import load_instruction_data
from tokentune.data.prompts import PromptTemplate, ensure_pad_token
from tokentune.models.builder import base_dtype, prepare_model
from tokentune.models.pretrained import load_config, load_tokenizer
from tokentune.training.build import training_collator

OTHER = "alpaca_en.validation.jsonl"  # rows of another kind: what training on the task forgets shows there
WARM_UP = 0.1  # of a run's steps
GROUPED = 6  # steps whose rows are sorted by length together
Batches = list[dict[str, Tensor]]  # the micro-batches of an optimizer step


@dataclass(frozen=True)
class Place:
    """A task with its model's folder, tokenizer and encoded rows: "train", and the parts that are evaluated."""

    task: Task
    model: Path
    data: Path  # a file of the training rows
    tokenizer: PreTrainedTokenizerBase
    rows: dict[str, list[dict]]


def place_of(task: Task, model: Path, data: Path, folder: Path) -> Place:
    """Makes and encodes the rows. `folder`: where they are written, one file for each split."""
    tokenizer = load_tokenizer(str(model))
    ensure_pad_token(tokenizer, load_config(str(model)).vocab_size)
    folder.mkdir(parents=True)
    encoded = {}
    for split, rows in task.make(data).items():
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        encoded[split] = encode(path, task, model, tokenizer)
    train, validation = (encoded[split] for split in SPLITS)
    order = np.random.default_rng(0).permutation(len(train)).tolist()
    held_out = task.evaluated["held_out"]
    rows = {
        "train": [train[row] for row in order[held_out:]],
        "held_out": [train[row] for row in order[:held_out]],
        "validation": validation[: task.evaluated["validation"]],
        "other": encode(data / OTHER, task, model, tokenizer)[: task.evaluated["other"]],
    }
    return Place(task, model, folder / "train.jsonl", tokenizer, rows)


def encode(path: Path, task: Task, model: Path, tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """A file's rows that are not too long."""
    arguments = parse_arguments(words(task, Arm(), model, path))
    template = PromptTemplate.load(arguments.data.prompt_template_name_or_path)
    return load_instruction_data(arguments, tokenizer, template).train.to_list()


@dataclass(frozen=True)
class Run:
    """A training run. `rate`: the peak learning rate; None: not chosen yet."""

    task: str
    arm: str
    steps: int
    seed: int
    rate: float | None


@dataclass
class Trained:
    """A model as an arm's flags make it, and what turns rows into the micro-batches of a step."""

    model: nn.Module
    collate: Callable[[list[dict]], dict[str, Tensor]]
    micro_batch: int

    def batches(self, examples: list[dict]) -> Batches:
        starts = range(0, len(examples), self.micro_batch)
        return [self.collate(examples[at : at + self.micro_batch]) for at in starts]


def prepared(place: Place, arm: Arm, seed: int, *, micro_batch: int | None = None, verify: bool = False) -> Trained:
    """Raises UserError where flags or model refuse the arm. `verify`: compare with the method's definition first."""
    line = words(place.task, arm, place.model, place.data, seed=seed, micro_batch=micro_batch)
    skip = ["--skip_verification"] if "tokentune" in arm.flags and not verify else []
    arguments = parse_arguments([*line, *skip])
    set_seed(seed)
    model = prepare_model(arguments, base_dtype(arguments, load_config(str(place.model)))).train()
    collate = training_collator(arguments.selection, place.tokenizer, packed=False)
    return Trained(model, collate, arguments.optimization.micro_batch_size)


def step_rows(place: Place, seed: int) -> Iterator[list[dict]]:
    """The rows of one optimizer step after another: each epoch in an order of its own, the same for all arms.

    Steps hold rows of like length, out of the rows of `GROUPED` steps that are drawn together: there is little padding,
    which costs full training most.
    """
    rows = SeededRows(place.rows["train"], seed)
    size, epoch = place.task.batch, 0
    while True:
        rows.set_epoch(epoch)
        chance = np.random.default_rng((seed, epoch))
        order = chance.permutation(len(rows)).tolist()[: len(rows) // size * size]
        for start in range(0, len(order), GROUPED * size):
            group = sorted(order[start : start + GROUPED * size], key=lambda row: len(rows.rows[row]["input_ids"]))
            for step in chance.permutation(len(group) // size):
                yield [rows[row] for row in group[step * size : (step + 1) * size]]
        epoch += 1


def rate_at(step: int, steps: int) -> float:
    """The learning rate of a step, 0 is the first, as a share of the peak: a linear warm-up, then a cosine to 0."""
    rising = max(1, round(WARM_UP * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising + 1) / (steps - rising + 1)))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=0.0, weight_decay=0.01, fused=True)


def timed_step(trained: Trained, examples: list[dict], optimizer: torch.optim.Optimizer) -> tuple[Batches, list[float]]:
    """One step, its draws included: the batches, and seconds by the clock and of the CPU, all threads."""
    start, cpu = time.perf_counter(), time.process_time()
    batches = trained.batches(examples)
    optimizer_step(trained.model, batches, optimizer, max_norm=1.0)
    return batches, [time.perf_counter() - start, time.process_time() - cpu]


def train(place: Place, arm: Arm, run: Run, micro_batch: int | None = None) -> dict[str, Any]:
    """A run of its own from the untrained model, with a schedule of its own; what the report keeps of it."""
    trained = prepared(place, arm, run.seed, micro_batch=micro_batch)
    optimizer, counts, seconds = optimizer_of(trained.model), np.zeros(3, dtype=int), np.zeros(2)
    for step, examples in zip(range(run.steps), step_rows(place, run.seed), strict=False):
        optimizer.param_groups[0]["lr"] = run.rate * rate_at(step, run.steps)
        batches, taken = timed_step(trained, examples, optimizer)
        seconds += taken
        counts += np.sum([[int(count) for count in trained.collate.count(batch)] for batch in batches], axis=0)
    tokens = dict(zip(("processed", "selected", "supervised"), counts.tolist(), strict=True))
    clocks = {"seconds": round(float(seconds[0]), 3), "cpu_seconds": round(float(seconds[1]), 3)}
    speed = {"tokens_per_second": round(tokens["processed"] / float(seconds[0]), 1)}
    return clocks | speed | {"tokens": tokens} | evaluated(place, trained.model)


def evaluated(place: Place, model: nn.Module) -> dict[str, Found]:
    """Of each part of the rows that is not trained on."""
    pad = place.tokenizer.pad_token_id
    return {name: evaluate(model, rows, pad) for name, rows in place.rows.items() if name != "train"}


def described(place: Place) -> dict[str, Any]:
    """The task in numbers, with the untrained model's losses ("base") and the time of an evaluation."""
    rows, config = place.rows["train"], load_config(str(place.model))
    tokens, answers = (
        sum(len(row["input_ids"]) for row in rows),
        sum(label >= 0 for row in rows for label in row["labels"]),
    )
    start = time.perf_counter()
    base = evaluated(place, prepared(place, Arm(), 0).model)
    return {
        "model": {"type": config.model_type, "layers": config.num_hidden_layers, "hidden_size": config.hidden_size},
        "trained": place.task.trained,
        "batch": place.task.batch,
        "max_length": place.task.max_length,
        "rates": list(place.task.rates),
        "most_rates": place.task.most_rates,
        "lengths": list(place.task.lengths),
        "rows": {name: len(part) for name, part in place.rows.items()},
        "tokens_per_row": tokens / len(rows),
        "answer_share": answers / tokens,
        "base": base,
        "evaluation_seconds": round(time.perf_counter() - start, 2),
    }
