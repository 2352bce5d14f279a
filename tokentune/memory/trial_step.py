"""One training step tried before training, on the longest rows: forward pass, backward pass and update.

    B sequences, S tokens

Nothing of it remains, bit for bit: weights and buffers, gradients, random states and the trainer's counters are as
before. The step has an optimizer of its own, with gradients of zero and a learning rate of zero.
"""

import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import nn

from tokentune.errors import UserError
from tokentune.memory.accounting import WEIGHTS, LiveBytes, weights_of
from tokentune.memory.footprint import fill_states, forward_loss, update
from tokentune.memory.report import is_out_of_memory
from tokentune.sampling.sampler import IGNORED_LABEL
from tokentune.settings.finetune import Arguments
from tokentune.training.diagnosing import for_all_tokens
from tokentune.training.trainer import SelectiveTrainer

# --- the step ---------------------------------------------------------------------------------------------------------


def try_batch(
    trainer: SelectiveTrainer, arguments: Arguments, batch: dict[str, Any], validation: dict[str, Any] | None = None
) -> int | None:
    """One optimizer step on `batch`, as in training, then the loss of `validation`; leaves no trace.

    Returns:
        The most bytes that were alive on the device, the weights among them; None: memory ran out in the step.

    Raises:
        UserError: memory ran out in the validation.
    """
    highest, validates = None, False
    try:
        with _left_as_it_was(trainer.model), _peak(trainer) as peak:
            optimizer = _step(trainer, arguments, batch)
            if validation is not None:
                validates = True
                trainer.model.eval()
                with torch.no_grad(), trainer.accelerator.autocast():
                    trainer.evaluation(trainer, [send_to_device(validation, trainer.args.device)])
            del optimizer
            highest = peak()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    finally:
        if highest is None:
            gc.collect()  # tensors that the error's frames held
        if trainer.args.device.type == "cuda":
            torch.cuda.empty_cache()
    if highest is None and validates:
        raise UserError(
            "out of memory before training, with the longest batch of the validation.\n"
            "Its batches have as many rows as the training's micro-batches: a higher --gradient_accumulation_steps "
            "makes them smaller"
        )
    return highest


def _step(trainer: SelectiveTrainer, arguments: Arguments, batch: dict[str, Any]) -> Any:
    """Forward, backward and the update, with the optimizer's states of earlier steps there; returns the optimizer."""
    model = trainer.model
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Registered before an optimizer's own hooks: no gradient ever reaches a weight.
    hooks = [parameter.register_post_accumulate_grad_hook(_erase) for parameter in trained]
    # A paged optimizer's states may be swapped out, and bitsandbytes never frees them.
    optimizer = None if "paged" in arguments.optimization.optim else _idle_optimizer(trainer)
    try:
        fill_states(optimizer, trained)
        if trainer.args.gradient_accumulation_steps == 1:  # else gradients of earlier micro-batches are there
            model.zero_grad()
        inputs = send_to_device(batch, trainer.args.device)
        _backward(trainer, arguments, inputs)
        if trainer.diagnosis is not None:  # a pass over all tokens, with the selective gradients set aside
            aside = [parameter.grad for parameter in trained]
            model.zero_grad()
            _backward(trainer, arguments, for_all_tokens(inputs))
            for parameter, gradient in zip(trained, aside, strict=True):
                parameter.grad = gradient
        update(model, optimizer, arguments)
    finally:
        for hook in (*hooks, *getattr(optimizer, "hooks", ())):
            hook.remove()
    return optimizer


def _backward(trainer: SelectiveTrainer, arguments: Arguments, inputs: dict[str, Any]) -> None:
    if trainer.model_accepts_loss_kwargs:
        inputs = {**inputs, "num_items_in_batch": (inputs["labels"][:, 1:] != IGNORED_LABEL).sum()}
    forward_loss(trainer.model, inputs, arguments, trainer.args.device.type).backward()


def _erase(parameter: nn.Parameter) -> None:
    parameter.grad.zero_()


def _idle_optimizer(trainer: SelectiveTrainer) -> Any:
    """An optimizer as the run's that changes no weight: gradients, learning rate and weight decay are zero."""
    own = trainer.optimizer, trainer.optimizer_cls_and_kwargs
    trainer.optimizer = None
    try:
        optimizer = trainer.create_optimizer()
    finally:
        trainer.optimizer, trainer.optimizer_cls_and_kwargs = own
    for group in optimizer.param_groups:
        group.update(lr=0.0, weight_decay=0.0)
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()
    return optimizer


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Restores whatever a step changes besides the weights, which it must not change."""
    devices = {parameter.device for parameter in model.parameters()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    # Some models store facts about their batches: rotary embeddings grow with the longest sequence.
    attributes = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device.index for device in devices if device.type == "cuda"]):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        model.zero_grad()
        for module, own, own_buffers in attributes:
            vars(module).clear()
            vars(module).update(own)
            module._buffers.clear()
            module._buffers.update(own_buffers)
        for buffer, content in buffers:
            buffer.copy_(content)


@contextmanager
def _peak(trainer: SelectiveTrainer) -> Iterator[Callable[[], int]]:
    """Yields a function that returns the peak so far, in bytes: the GPU's allocator's, or counted tensor by tensor."""
    gpus = {parameter.device for parameter in trainer.model.parameters() if parameter.device.type == "cuda"}
    if gpus:
        for device in gpus:
            torch.cuda.reset_peak_memory_stats(device)
        yield lambda: sum(map(torch.cuda.max_memory_allocated, gpus))
        return
    with LiveBytes(trainer.args.device.type) as live:
        live.claim(WEIGHTS, weights_of(trainer.model))
        yield lambda: live.peak
