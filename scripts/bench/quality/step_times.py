"""Time of an optimizer step by method: the models and batches that finetune.py makes of the same flags, taking turns.

One step is a batch of 16 rows in its micro-batches: collated, forward, backward, clipped, AdamW. The methods take turns
within every round, so that whatever else the machine does hits all of them alike; ratios are of the same round. The
clock is the process's CPU time: with one thread it is the time of a machine that does nothing else.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from steps.report import median_with_interval
from torch import Tensor, nn
from transformers import set_seed

from tokentune.cli.arguments import parse_arguments
from tokentune.data.instruction_data import load_instruction_data
from tokentune.data.prompts import PromptTemplate, ensure_pad_token
from tokentune.data.streaming_rows import seeded_rows
from tokentune.models.builder import base_dtype, prepare_model
from tokentune.models.pretrained import load_config, load_tokenizer
from tokentune.sampling.sampler import IGNORED_LABEL
from tokentune.training.build import build_trainer
from tokentune.training.trainer_arguments import build_training_arguments

from .experiments import CHECKPOINTING, EQUAL_BYTES, TRAINED, Experiment, Workplace, words

BATCH = 16  # rows
TIMED: tuple[tuple[str, float | None], ...] = (
    ("full", None),
    (CHECKPOINTING, 0.3),
    (EQUAL_BYTES, 0.3),
    ("random", 0.1),
    ("random", 0.3),
    ("random", 0.5),
    ("random, correction 1", 0.3),
    ("random, selection pass", 0.3),
    ("loss", 0.3),
    ("excess_loss", 0.3),
    ("gradient", 0.3),
    ("attention", 0.3),
    ("tokenseek", 0.3),
)


def measure_steps(place: Workplace, rounds: int, timed: tuple[tuple[str, float | None], ...] = TIMED) -> dict[str, Any]:
    """{batch, rows: [{trained, method, proportion, CPU seconds by round, time_ratio_to_full [low, median, high]}]}."""
    rows = []
    for trained in TRAINED:
        steps = {chosen: prepared_step(place, Experiment("one epoch", trained, *chosen, 1)) for chosen in timed}
        seconds = {chosen: [] for chosen in timed}
        for turn in range(rounds + 1):
            for chosen, step in steps.items():
                taken = timed_step(step)
                seconds[chosen] += [taken] if turn else []  # the first one warms up
        full = seconds["full", None]
        for (method, proportion), taken in seconds.items():
            ratio = median_with_interval([one / other for one, other in zip(taken, full, strict=True)])
            row = {"trained": trained, "method": method, "proportion": proportion, "seconds": taken}
            rows.append(row | {"time_ratio_to_full": ratio})
    return {"batch": BATCH, "clock": "CPU time", "threads": torch.get_num_threads(), "rows": rows}


def timed_step(step: Callable[[], None]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def prepared_step(place: Workplace, experiment: Experiment) -> Callable[[], None]:
    """Everything that a run of these settings has, and the function that does its step."""
    with tempfile.TemporaryDirectory(dir=place.folder) as folder:
        line = words(place, experiment, experiment.settings({}))
        arguments = parse_arguments([*line, "--model_save_path", folder])
        name = arguments.model.model_name_or_path
        config, tokenizer = load_config(name), load_tokenizer(name)
        ensure_pad_token(tokenizer, config.vocab_size)
        template = PromptTemplate.load(arguments.data.prompt_template_name_or_path)
        data = load_instruction_data(arguments, tokenizer, template)
        set_seed(arguments.optimization.seed)
        model = prepare_model(arguments, base_dtype(arguments, config)).train()
        rows = seeded_rows(data.train, arguments.optimization.seed)
        settings = build_training_arguments(arguments, Path(folder))
        trainer = build_trainer(model, settings, rows, None, tokenizer, arguments)
    optimizer, collate = trainer.create_optimizer(), trainer.data_collator
    examples = [rows[at] for at in range(BATCH)]
    size = arguments.optimization.micro_batch_size

    def step() -> None:
        batches = [collate(examples[at : at + size]) for at in range(0, BATCH, size)]
        optimizer_step(trainer.model, batches, optimizer, arguments.optimization.max_grad_norm)

    return step


def optimizer_step(
    model: nn.Module, batches: list[dict[str, Tensor]], optimizer: torch.optim.Optimizer, max_norm: float
) -> None:
    """As the Trainer does it, in bfloat16."""
    count = sum((batch["labels"][:, 1:] != IGNORED_LABEL).sum() for batch in batches)
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, num_items_in_batch=count).loss
        loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    optimizer.zero_grad()
