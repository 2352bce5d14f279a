"""`--auto_micro_batch`: the largest micro-batch that fits, with the global batch, and so the result, left as it is.

The gradient of a global batch is the same for every split of it into micro-batches, up to the order of sums: the loss
of each is divided by the targets of all (`training/trainer.py`). What changes is the memory that a step takes, and on a
GPU its speed. A resumed run takes its checkpoint's micro-batch: another one would round differently.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedConfig

from tokentune.errors import UserError
from tokentune.memory.footprint import fits
from tokentune.memory.probe import does_not_fit, estimated, generous_bytes, room_of, why_not_tried
from tokentune.memory.trial_step import longest_batch, try_batch
from tokentune.settings.finetune import Arguments
from tokentune.training.checkpoints.run_state import read_run_state
from tokentune.training.trainer import SelectiveTrainer

logger = logging.getLogger(__name__)
Value = TypeVar("Value")


def choose_micro_batch(
    trainer: SelectiveTrainer, arguments: Arguments, config: PreTrainedConfig, checkpoint: Path | None = None
) -> int:
    """Sets the trainer's micro-batch and accumulation to the largest micro-batch that fits, and returns its rows.

    Divisors of the rows per process are tried, each one or two doublings ahead of the last, then those in between: on a
    GPU by a step on the longest rows, on a CPU by estimates.

    Args:
        trainer: before `train()`; its micro-batches hold all rows of a process, or a part of them.
        checkpoint: that training goes on from.

    Raises:
        UserError: not even one row fits; with what would make it fit.
    """
    rows = arguments.optimization.global_batch_size // trainer.args.world_size
    if checkpoint is not None:
        before = read_run_state(checkpoint)["batch"]["sequences"]
        if rows % before == 0:
            trainer.set_micro_batch(before, rows // before)
            logger.info("--auto_micro_batch: %d sequences, as in %s", before, checkpoint)
            return before
    if reason := why_not_tried(trainer, arguments):
        raise UserError(f"--auto_micro_batch cannot try a batch: {reason}. Give --gradient_accumulation_steps instead")
    divisors = [count for count in range(1, rows + 1) if rows % count == 0]
    tried: list[int] = []

    def whether_fits(count: int) -> bool:
        tried.append(count)
        trainer.set_micro_batch(count, rows // count)
        return _all_agree(trainer, _fits(trainer, arguments, config, count))

    best = last_that_fits(divisors, whether_fits)
    if best is None:
        _, shape = longest_batch(trainer, arguments, 1)
        raise does_not_fit(trainer, arguments, config, shape)
    trainer.set_micro_batch(best, rows // best)
    logger.info(
        "--auto_micro_batch: %d sequences, %d micro-batches a step (looked at %s)",
        *(best, rows // best, ", ".join(map(str, tried))),
    )
    return best


def last_that_fits(values: Sequence[Value], whether_fits: Callable[[Value], bool]) -> Value | None:
    """The last of ascending `values` that fits, None where the first does not; what is larger never fits better.

    Looks at 1, 2, 4 ... values ahead, then halves the interval.
    """
    if not whether_fits(values[0]):
        return None
    low, width = 0, 1
    while low + width < len(values) and whether_fits(values[low + width]):
        low, width = low + width, 2 * width
    high = min(low + width, len(values))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if whether_fits(values[middle]) else (low, middle)
    return values[low]


def _fits(trainer: SelectiveTrainer, arguments: Arguments, config: PreTrainedConfig, count: int) -> bool:
    batch, shape = longest_batch(trainer, arguments, count)
    room = room_of(trainer)
    if trainer.args.device.type == "cpu":
        if generous_bytes(trainer.model, shape) <= room:
            return True
        footprint = estimated(trainer, arguments, config, shape)
        if footprint is None:
            raise UserError(
                "--auto_micro_batch: a step of this model cannot be estimated; tried on a CPU it may end the process.\n"
                "Give --gradient_accumulation_steps instead."
            )
        return fits(footprint.peak, room)
    trial = try_batch(trainer, arguments, batch)
    return trial.peak is not None and fits(trial.peak, room)


def _all_agree(trainer: SelectiveTrainer, fitting: bool) -> bool:
    """Whether it fits on every process: they all take the same micro-batch."""
    votes = trainer.accelerator.reduce(torch.tensor([int(fitting)], device=trainer.args.device), "sum")
    return int(votes) == trainer.args.world_size
