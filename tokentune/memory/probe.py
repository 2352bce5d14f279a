"""A run's memory, tried before its first step: what does not fit is said then, and not an hour later.

    B sequences, S tokens

The longest micro-batch takes one step (`memory/trial_step.py`), the longest batch of the validation one forward pass.
Where memory runs out, the run ends with the flags that would make it fit and what each saves.

A GPU says itself that memory runs out. On a CPU the system may kill the process without a word, so there the step is
estimated first (`memory/footprint.py`), unless a generous bound already says that it fits.
"""

import copy
import logging

import numpy as np
from torch import nn
from transformers import PreTrainedConfig

from tokentune.core.saved_tensors.saved_bytes import gib
from tokentune.errors import UserError
from tokentune.memory.available_memory import available_bytes
from tokentune.memory.footprint import NOT_MEASURED, Footprint, measure_run
from tokentune.memory.report import out_of_memory
from tokentune.memory.trial_step import Trial, longest_batch, longest_validation_batch, try_batch, weights_of
from tokentune.settings.finetune import Arguments
from tokentune.training.trainer import SelectiveTrainer

logger = logging.getLogger(__name__)
_ESTIMATE_ERROR = 0.02  # of an estimate on the CPU
# No step that was measured held more than a third of this: numbers per token for each row and column of the weights,
# and bytes for each trained weight's.
_GENEROUS_NUMBERS, _GENEROUS_WEIGHTS = 6, 6


def probe_memory(trainer: SelectiveTrainer, arguments: Arguments, config: PreTrainedConfig) -> Trial | None:
    """Tries the longest training micro-batch, and the longest batch of the validation.

    Args:
        trainer: before `train()`.
        config: of the base.

    Returns:
        None where nothing was tried: with `--skip_memory_probe`, or where it cannot be (the log says why).

    Raises:
        UserError: it does not fit; with what would make it fit.
    """
    if arguments.run.skip_memory_probe:
        return None
    if reason := why_not_tried(trainer, arguments):
        logger.info("the longest batch is not tried before training: %s", reason)
        return None
    batch, shape = longest_batch(trainer, arguments, trainer.args.per_device_train_batch_size)
    if trainer.args.device.type == "cpu":
        _refuse_what_cannot_fit(trainer, arguments, config, shape)
    trial = try_batch(trainer, arguments, batch, longest_validation_batch(trainer))
    if trial.peak is None:
        raise does_not_fit(trainer, arguments, config, shape, trial)
    logger.info("the longest micro-batch, %d x %d tokens, fits: %s at its peak", *shape, gib(trial.peak))
    return trial


def why_not_tried(trainer: SelectiveTrainer, arguments: Arguments) -> str | None:
    """What keeps a step of this run from being tried outside of its training; None where nothing does."""
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return "its weights are spread over the processes when training begins"
    if "lomo" in arguments.optimization.optim:
        return f"--optim {arguments.optimization.optim} moves the weights in every backward pass"
    return None


def does_not_fit(
    trainer: SelectiveTrainer,
    arguments: Arguments,
    config: PreTrainedConfig,
    shape: tuple[int, int],
    trial: Trial | None = None,
) -> UserError:
    """What is to be raised for a micro-batch of this shape that ran out of memory, or (no trial) is to."""
    if trial is not None and trial.during == "validation":
        return UserError(
            "out of memory before training, with the longest batch of the validation.\n"
            "Its batches have as many rows as the training's micro-batches: a higher --gradient_accumulation_steps "
            "makes them smaller"
        )
    when = f"before training, with the longest micro-batch ({shape[0]} x {shape[1]} tokens)"
    return out_of_memory(_as_run(trainer, arguments), config, trainer, when=when, shape=shape, room=room_of(trainer))


# --- before it is tried on a CPU --------------------------------------------------------------------------------------


def room_of(trainer: SelectiveTrainer) -> int:
    """Bytes that a step may take on the devices that hold weights: those of the weights, and what is available."""
    tensors = weights_of(trainer.model)
    held = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(held.values()) + sum(available_bytes(device) for device in {tensor.device for tensor in tensors})


def _refuse_what_cannot_fit(
    trainer: SelectiveTrainer, arguments: Arguments, config: PreTrainedConfig, shape: tuple[int, int]
) -> None:
    room = room_of(trainer)
    if generous_bytes(trainer.model, shape) <= room:
        return
    footprint = estimated(trainer, arguments, config, shape)
    if footprint is None:
        return
    if footprint.peak * (1 - _ESTIMATE_ERROR) > room:
        raise does_not_fit(trainer, arguments, config, shape)
    # Said before it is tried: a system that runs out of memory kills, and the line stays.
    logger.info("a step needs about %s of memory, %s are to be had", gib(footprint.peak), gib(room))


def generous_bytes(model: nn.Module, shape: tuple[int, int]) -> int:
    """More than a step of (B, S) tokens can take, counted in no time: every layer's rows in and out, several times."""
    sequences, tokens = shape
    weights = sum(tensor.untyped_storage().nbytes() for tensor in weights_of(model))
    trained = sum(parameter.numel() * 4 for parameter in model.parameters() if parameter.requires_grad)
    sizes = sum(int(np.prod(p.shape[:-2])) * sum(p.shape[-2:]) for p in model.parameters() if p.ndim >= 2)
    config = model.config.get_text_config()
    scores = 4 * config.num_hidden_layers * config.num_attention_heads * tokens  # of eager attention
    return weights + _GENEROUS_WEIGHTS * trained + 4 * sequences * tokens * (_GENEROUS_NUMBERS * sizes + scores)


def estimated(
    trainer: SelectiveTrainer, arguments: Arguments, config: PreTrainedConfig, shape: tuple[int, int]
) -> Footprint | None:
    """The footprint of a step on this type of device; None where it cannot be had."""
    try:
        return measure_run(trainer, _as_run(trainer, arguments), config, shape)
    except NOT_MEASURED:
        return None


def _as_run(trainer: SelectiveTrainer, arguments: Arguments) -> Arguments:
    """The command line with the accumulation that the trainer was given, which --auto_micro_batch may have found."""
    changed = copy.deepcopy(arguments)
    changed.optimization.gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    return changed
