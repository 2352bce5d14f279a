"""One training step tried before training: the longest rows, forward, backward and update, and no trace of it.

    B sequences, S tokens

Afterwards everything is as it was, bit for bit: weights and buffers, gradients, random numbers, the trainer's own
counters. The optimizer is another one than the run's, whose steps have gradients of zero and no learning rate.
"""

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from tokentune.core.patched import reference_of
from tokentune.data.packing import PackedRows, lengths_of
from tokentune.memory.accounting import LiveBytes, quantization_constants
from tokentune.memory.footprint import forward_loss
from tokentune.memory.report import is_out_of_memory
from tokentune.sampling.sampler import IGNORED_LABEL
from tokentune.settings.finetune import Arguments
from tokentune.training.diagnosing import for_all_tokens
from tokentune.training.trainer import SelectiveTrainer


@dataclass
class Trial:
    """What came of trying a batch.

    Attributes:
        peak: most bytes that were alive on the device, the weights among them; None: memory ran out.
        during: what was tried last: "training" or "validation".
    """

    peak: int | None = None
    during: str = "training"


# --- the longest rows -------------------------------------------------------------------------------------------------


def longest_batch(
    trainer: SelectiveTrainer, arguments: Arguments, sequences: int
) -> tuple[dict[str, Any], tuple[int, int]]:
    """The micro-batch of the longest training rows, with its selection (a schedule's largest), and its shape (B, S)."""
    rows = trainer.train_dataset
    if hasattr(rows, "__len__"):
        items = _longest(rows, sequences)
    else:  # a stream: as long as its rows can be
        length = arguments.data.max_length
        item = {"input_ids": [0] * length, "labels": [0] * length, "draw_seed": 0}
        items = [{"documents": [item]} if arguments.data.packing else item] * sequences
    batch = trainer.data_collator(items)
    if trainer.schedule is not None:
        batch = trainer.drawn(batch, trainer.schedule.largest)
    return batch, tuple(next(iter(batch.values())).shape[:2])


def longest_validation_batch(trainer: SelectiveTrainer) -> dict[str, Any] | None:
    rows = trainer.eval_dataset
    return None if rows is None else trainer.eval_collator(_longest(rows, trainer.args.eval_batch_size))


def _longest(rows: Any, count: int) -> list[Any]:
    """The `count` longest items, the longest first."""
    if isinstance(rows, PackedRows):
        of_documents = lengths_of(rows.rows.rows)
        lengths = np.array([of_documents[documents].sum() for documents in rows.bins])
    else:
        lengths = lengths_of(getattr(rows, "rows", rows))
    return [rows[int(row)] for row in np.argsort(-lengths, kind="stable")[:count]]


# --- the step ---------------------------------------------------------------------------------------------------------


def try_batch(
    trainer: SelectiveTrainer,
    arguments: Arguments,
    batch: dict[str, Any],
    validation: dict[str, Any] | None = None,
) -> Trial:
    """One optimizer step on `batch`, as in training, then the loss of `validation`; leaves no trace."""
    trial = Trial()
    try:
        with _left_as_it_was(trainer.model), _peak(trainer, trial):
            optimizer = _step(trainer, arguments, batch)
            if validation is not None:
                trial.during = "validation"
                _validate(trainer, validation)
            del optimizer
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        trial.peak = None
    finally:
        if trial.peak is None:
            gc.collect()  # what the error's frames held
        if trainer.args.device.type == "cuda":
            torch.cuda.empty_cache()
    return trial


def _step(trainer: SelectiveTrainer, arguments: Arguments, batch: dict[str, Any]) -> Any:
    """Forward, backward and the update, with the optimizer's states of earlier steps there; returns the optimizer."""
    model, in_backward = trainer.model, trainer.optim_in_backward
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # In front of an optimizer's own hooks: no gradient ever reaches a weight.
    hooks = [parameter.register_post_accumulate_grad_hook(_erase) for parameter in trained]
    # Paged optimizers keep their states in memory that is swapped out, and in a list that is never emptied.
    optimizer = None if "paged" in arguments.optimization.optim else _idle_optimizer(trainer)
    try:
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
            if in_backward and optimizer is not None:
                optimizer.optimizers[parameter].step()
                parameter.grad = None
        if optimizer is not None:
            optimizer.step()
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
        given = [parameter for parameter in trained if parameter.grad is not None]
        if given and arguments.optimization.max_grad_norm:
            nn.utils.clip_grad_norm_(given, arguments.optimization.max_grad_norm)
        if optimizer is not None:
            optimizer.step()
        model.zero_grad()
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
    """One like the run's, that moves nothing: with gradients of zero there is nothing left but rate and decay."""
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


def _validate(trainer: SelectiveTrainer, batch: dict[str, Any]) -> None:
    trainer.model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        trainer.evaluation(trainer, [send_to_device(batch, trainer.args.device)])


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Puts back whatever a step changes besides the weights, which it must leave alone itself."""
    devices = {parameter.device for parameter in model.parameters()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    # Some models keep numbers of the batches that they saw: rotary embeddings that grow with the longest sequence.
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
def _peak(trainer: SelectiveTrainer, trial: Trial) -> Iterator[None]:
    """Notes the most bytes that are alive within: on a GPU by its allocator, elsewhere counted tensor by tensor."""
    devices = {parameter.device for parameter in trainer.model.parameters()}
    if any(device.type == "cuda" for device in devices):
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
        yield
        trial.peak = sum(torch.cuda.max_memory_allocated(device) for device in devices)
        return
    with LiveBytes(trainer.args.device.type) as live:
        live.claim("weights", weights_of(trainer.model))
        yield
    trial.peak = live.peak


def weights_of(model: nn.Module) -> list[Tensor]:
    reference = reference_of(model)
    beside = [] if reference is None else weights_of(reference)
    return [*model.parameters(), *model.buffers(), *quantization_constants(model), *beside]
