"""Whether a run fits into memory, found before its first step; and the largest micro-batch that fits.

    B sequences, S tokens

The longest micro-batch takes one step (`memory/trial_step.py`), the longest batch of the validation one forward pass.
If memory runs out, the run ends with the flags that would make it fit and what each saves. Without
`--gradient_accumulation_steps` the largest micro-batch that fits is taken. The global batch stays, and so does its
gradient, up to the order of sums: each micro-batch's loss is divided by the targets of all (`training/trainer.py`).

On a GPU the allocator raises an error. On a CPU the system may kill the process without a message, so there the step
is estimated first (`memory/footprint.py`), unless a generous bound already fits.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig

from tokentune.core.saved_tensors.saved_bytes import gib
from tokentune.errors import UserError
from tokentune.memory.accounting import bytes_of, fits, weights_of
from tokentune.memory.available_memory import available_bytes
from tokentune.memory.longest_rows import longest_batch, longest_validation_batch
from tokentune.memory.report import Run, out_of_memory
from tokentune.memory.trial_step import try_batch
from tokentune.settings.finetune import Arguments
from tokentune.settings.flags import AUTO, require
from tokentune.sources import first_line
from tokentune.training.checkpoints.run_state import read_run_state
from tokentune.training.trainer import SelectiveTrainer

logger = logging.getLogger(__name__)
Value = TypeVar("Value")
_ESTIMATE_ERROR = 0.02  # of an estimate on the CPU
# For `generous_bytes`; no step that was measured held more than a third of it. Numbers per token, for each row and
# column of a weight matrix; bytes per byte of a trained weight in float32.
_GENEROUS_NUMBERS, _GENEROUS_WEIGHTS = 6, 6


class _UnknownNeedError(UserError):
    """What a step takes is not known, and it cannot be tried."""


def probe_memory(trainer: SelectiveTrainer, arguments: Arguments, config: PreTrainedConfig) -> int | None:
    """Tries the longest training micro-batch, and the longest batch of the validation.

    Args:
        trainer: before `train()`.
        config: of the base.

    Returns:
        The peak in bytes; None where nothing was tried: with `--skip_memory_probe`, or where it cannot be (the log
        says why).

    Raises:
        UserError: it does not fit; with what would make it fit.
    """
    if arguments.run.skip_memory_probe:
        return None
    run = Run(arguments, config, trainer)
    if reason := _why_not_tried(run):
        logger.info("the longest batch is not tried before training: %s", reason)
        return None
    batch, shape = longest_batch(trainer, arguments, trainer.args.per_device_train_batch_size)
    if trainer.args.device.type == "cpu":
        room = room_of(trainer)
        try:
            needed = estimated_peak(run, shape, room)
        except UserError:
            needed = 0  # not known
        if needed * (1 - _ESTIMATE_ERROR) > room:
            raise _does_not_fit(run, shape)
        if needed:  # logged before the trial, which the system may kill
            logger.info("a step needs about %s of memory, %s are available", gib(needed), gib(room))
    peak = try_batch(trainer, arguments, batch, longest_validation_batch(trainer))
    if peak is None:
        raise _does_not_fit(run, shape)
    logger.info("the longest micro-batch, %d x %d tokens, fits: %s at its peak", *shape, gib(peak))
    return peak


def choose_micro_batch(
    trainer: SelectiveTrainer, arguments: Arguments, config: PreTrainedConfig, checkpoint: Path | None = None
) -> int:
    """Sets the trainer's micro-batch and accumulation where the flags leave them to be found; returns its rows.

    Divisors of the rows per process are tried: on a GPU by a step on the longest rows, on a CPU by estimates. Those
    take seconds, so without `--auto_micro_batch` a generous bound decides on a CPU, if it lets one row fit.

    Args:
        trainer: before `train()`; its micro-batches hold all rows of a process, or a part of them.
        checkpoint: that training goes on from, with its micro-batch: another one would round differently.

    Raises:
        UserError: not even one row fits, with what would make it fit; `--auto_micro_batch` where no batch can be tried.
    """
    rows, asked = arguments.optimization.global_batch_size // trainer.args.world_size, arguments.run.auto_micro_batch
    given = trainer.args.per_device_train_batch_size
    if arguments.optimization.gradient_accumulation_steps != AUTO or given == 1:
        return given
    run = Run(arguments, config, trainer)
    reason = _why_one_micro_batch(run)
    if reason is None and checkpoint is not None:
        before = read_run_state(checkpoint)["batch"]["sequences"]
        if rows % before == 0:
            return _taken(trainer, before, f"as in {checkpoint}")
    reason = reason or _why_not_tried(run)
    require(
        not (asked and reason),
        f"--auto_micro_batch cannot try a batch: {reason}. Give --gradient_accumulation_steps instead",
    )
    if reason := reason or ("--skip_memory_probe" if arguments.run.skip_memory_probe and not asked else None):
        return _taken(trainer, rows, reason)
    try:
        best, tried = _largest(run, [count for count in range(1, rows + 1) if rows % count == 0], exactly=asked)
    except _UnknownNeedError as error:
        if asked:
            raise UserError(f"--auto_micro_batch: {error}") from error
        return _taken(trainer, rows, first_line(error))
    if best is None:
        _, shape = longest_batch(trainer, arguments, 1)
        raise _does_not_fit(run, shape)
    return _taken(trainer, best, f"looked at {', '.join(map(str, tried))}")


def _taken(trainer: SelectiveTrainer, sequences: int, why: str) -> int:
    accumulation = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps // sequences
    trainer.set_micro_batch(sequences, accumulation)
    said = "auto: --gradient_accumulation_steps %d, %d sequences in a micro-batch (%s)"
    logger.info(said, accumulation, sequences, why)
    return sequences


def _why_one_micro_batch(run: Run) -> str | None:
    """What keeps the steps of this run from being split into micro-batches by itself; None: nothing does."""
    arguments, trainer = run.given, run.trainer
    if arguments.optimization.optim_in_backward:
        return "--optim_in_backward applies each gradient at once"
    if arguments.data.streaming:
        return "--streaming makes its batches as it reads them"
    if trainer.is_deepspeed_enabled:
        return "DeepSpeed's batches are set before the model is there"
    if not trainer.model_accepts_loss_kwargs:
        return "the model does not take num_items_in_batch, and micro-batches would weigh the same"
    return None


def _largest(run: Run, counts: Sequence[int], *, exactly: bool) -> tuple[int | None, list[int]]:
    """The largest of these micro-batches that fits, None where none does; and those that were looked at.

    Raises:
        _UnknownNeedError: what a step takes cannot be told without a risk.
    """
    trainer, tried = run.trainer, []
    rows, processes = counts[-1], trainer.args.world_size

    def by(fits: Callable[[Run, int], bool | None]) -> Callable[[int], bool]:
        def whether_fits(count: int) -> bool:
            tried.append(count)
            trainer.set_micro_batch(count, rows // count)
            found = fits(run, count)
            # All processes take the same micro-batch, and end the search together.
            vote = torch.tensor([-processes if found is None else int(found)], device=trainer.args.device)
            votes = int(trainer.accelerator.reduce(vote, "sum"))
            if votes < 0:
                raise _UnknownNeedError(
                    "a step of this model cannot be estimated; tried on a CPU it may end the process.\n"
                    "Give --gradient_accumulation_steps."
                )
            return votes == processes

        return whether_fits

    best = None
    if trainer.args.device.type == "cpu" and not exactly:
        best = last_that_fits(counts, by(_fits_by_far), len(counts) - 1)
    return best or last_that_fits(counts, by(_fits)), tried


def last_that_fits(values: Sequence[Value], whether_fits: Callable[[Value], bool], start: int = 0) -> Value | None:
    """The last of ascending `values` that fits, None where the first does not; what is larger never fits better.

    Looks at the value of index `start`, then 1, 2, 4 ... values further up or down, then halves the interval.
    """
    low, high, width = -1, len(values), 1  # the last index known to fit, and the first known not to
    if whether_fits(values[start]):
        low = start
        while low + width < high and whether_fits(values[low + width]):
            low, width = low + width, 2 * width
        high = min(low + width, high)
    else:
        high = start
        while high - width > low and not whether_fits(values[high - width]):
            high, width = high - width, 2 * width
        low = max(high - width, low)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if whether_fits(values[middle]) else (low, middle)
    return None if low < 0 else values[low]


def _fits(run: Run, count: int) -> bool | None:
    """Whether a micro-batch of so many rows fits; None: that cannot be told without a risk."""
    batch, shape = longest_batch(run.trainer, run.given, count)
    room = room_of(run.trainer)
    if run.trainer.args.device.type != "cpu":
        peak = try_batch(run.trainer, run.given, batch)
        return peak is not None and fits(peak, room)
    try:
        return fits(estimated_peak(run, shape, room), room)
    except UserError:
        return None


def _fits_by_far(run: Run, count: int) -> bool:
    _, shape = longest_batch(run.trainer, run.given, count)
    return generous_bytes(run.trainer.model, shape) <= room_of(run.trainer)


def _why_not_tried(run: Run) -> str | None:
    """What keeps a step of this run from being tried outside of its training; None where nothing does."""
    if run.trainer.is_deepspeed_enabled or run.trainer.is_fsdp_enabled:
        return "its weights are spread over the processes when training begins"
    if "lomo" in run.given.optimization.optim:
        return f"--optim {run.given.optimization.optim} moves the weights in every backward pass"
    return None


def _does_not_fit(run: Run, shape: tuple[int, int]) -> UserError:
    when = f"before training, with the longest micro-batch ({shape[0]} x {shape[1]} tokens)"
    return out_of_memory(run, when, shape=shape, room=room_of(run.trainer))


# --- before it is tried on a CPU --------------------------------------------------------------------------------------


def room_of(trainer: SelectiveTrainer) -> int:
    """Bytes that a step may take on the devices that hold weights: those of the weights, and what is available."""
    weights = weights_of(trainer.model)
    return bytes_of(weights) + sum(available_bytes(device) for device in {tensor.device for tensor in weights})


def estimated_peak(run: Run, shape: tuple[int, int], room: int) -> int:
    """Bytes that a step of (B, S) tokens needs, estimated; 0 where a generous bound already fits into `room`.

    Raises:
        UserError: it cannot be estimated.
    """
    return 0 if generous_bytes(run.trainer.model, shape) <= room else run.estimator()(run.arguments, shape).peak


def generous_bytes(model: nn.Module, shape: tuple[int, int]) -> int:
    """More bytes than a step of (B, S) tokens can take, without running it: all layers' inputs and outputs, 6 times."""
    sequences, tokens = shape
    trained = sum(parameter.numel() * 4 for parameter in model.parameters() if parameter.requires_grad)
    sizes = sum(int(np.prod(p.shape[:-2])) * sum(p.shape[-2:]) for p in model.parameters() if p.ndim >= 2)
    config = model.config.get_text_config()
    scores = 4 * config.num_hidden_layers * config.num_attention_heads * tokens  # of eager attention
    numbers = sequences * tokens * (_GENEROUS_NUMBERS * sizes + scores)
    return bytes_of(weights_of(model)) + _GENEROUS_WEIGHTS * trained + 4 * numbers
