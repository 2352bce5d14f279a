"""Gradients over a fixed set of rows: the full one, and draws of selective ones as training would take them.

    B sequences, S tokens, K selected

Rows go through the model in micro-batches, so that memory stays that of training; gradients are collected on the CPU,
in float32. Dropout is off: the gradients are to differ by the selection alone.
"""

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokentune.core.groups import gather_tokens
from tokentune.core.layers import inner_model, transformer_layers
from tokentune.core.saved_tensors.saved_bytes import SavedForBackward
from tokentune.core.step import CURRENT_STEP, Step
from tokentune.data.collators import CausalCollator
from tokentune.errors import UserError
from tokentune.gradients.draw_statistics import Gradient
from tokentune.sampling.sampler import IGNORED_LABEL, target_mask

Batch = dict[str, Any]


@dataclass(frozen=True)
class Taken:
    """One gradient over all rows, and its cost."""

    gradient: Gradient
    loss: float  # what was differentiated, in nats per token
    saved_bytes: int  # that autograd kept for the first micro-batch's backward pass
    selected: int  # tokens with gradients
    supervised: int  # those of them whose output has a loss
    seconds: float  # of forward and backward passes, without copying gradients


def take_gradient(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    items: int,
    bf16: bool,
    after_batch: Callable[[], None] = lambda: None,
) -> Taken:
    """The gradient of the summed loss over `items`, as the Trainer takes it over the micro-batches of a step.

    Args:
        batches: of a collator; with "selected_positions", or what the model draws them from, or neither (all tokens).
        items: what the loss is divided by, over all batches (the Trainer's `num_items_in_batch`).
        bf16: compute in bfloat16 (autocast).
        after_batch: called after each of the batches.

    Raises:
        UserError: the loss, or a gradient, is no finite number.
    """
    device = next(model.parameters()).device
    divisor = torch.tensor(items, device=device)
    model.zero_grad(set_to_none=True)
    saved = SavedForBackward(model)
    loss, selected, supervised, seconds = 0.0, 0, 0, 0.0
    for place, batch in enumerate(batches):
        batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        started = time.perf_counter()
        with steps_noted(model) as steps:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16), saved if place == 0 else nullcontext():
                share = model(**batch, num_items_in_batch=divisor).loss
            share.backward()
        loss += float(share.detach())
        seconds += time.perf_counter() - started
        real = batch["attention_mask"].bool()
        targets = target_mask(batch["labels"], causal=True) & real
        if steps:
            positions, fillers = steps[-1].positions.to(device), steps[-1].plan.fillers
            real, targets = (gather_tokens(mask, positions) for mask in (real, targets))
            if fillers is not None:
                real, targets = (mask & ~fillers.to(device) for mask in (real, targets))
        selected += int(real.sum())
        supervised += int(targets.sum())
        after_batch()
    gradient = {name: _on_cpu(weight) for name, weight in model.named_parameters() if weight.requires_grad}
    model.zero_grad(set_to_none=True)
    if not all(torch.isfinite(tensor).all() for tensor in gradient.values()):
        raise UserError(f"the gradient is no finite number (the loss is {loss}): there is nothing to compare")
    return Taken(gradient, loss, saved.bytes, selected, supervised, seconds)


def _on_cpu(weight: nn.Parameter) -> Tensor:
    gradient = weight.grad if weight.grad is not None else torch.zeros_like(weight)
    return gradient.detach().to("cpu", torch.promote_types(gradient.dtype, torch.float32), copy=True)


@contextmanager
def steps_noted(model: nn.Module) -> Iterator[list[Step]]:
    """Collects the forward passes with a selection, whose positions (B, K) the model may have chosen itself.

    A hook on the first layer; an ordinary pass over all tokens adds nothing.
    """
    found: list[Step] = []

    def note(layer: nn.Module, args: Any) -> None:
        step = CURRENT_STEP.get()
        if step is not None and isinstance(step.positions, Tensor):
            found.append(step)

    handle = transformer_layers(inner_model(model)).layers[0].register_forward_pre_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def supervised_items(batches: Sequence[Batch]) -> int:
    """The labels that something predicts, as the Trainer counts them."""
    return int(sum((batch["labels"][:, 1:] != IGNORED_LABEL).sum() for batch in batches))


def micro_batches(rows: Sequence[dict[str, Any]], collator: CausalCollator, sequences: int) -> Iterator[Batch]:
    """The rows in their order, `sequences` at a time."""
    for first in range(0, len(rows), sequences):
        yield collator([rows[row] for row in range(first, min(first + sequences, len(rows)))])


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Training mode in which nothing is dropped, neither by modules nor within attention."""
    was_training, rates = model.training, []
    for module in model.modules():
        names = ("p",) if isinstance(module, nn.modules.dropout._DropoutNd) else ("attention_dropout", "dropout_p")
        rates += [(module, name, rate) for name in names if isinstance(rate := vars(module).get(name), int | float)]
    for module, name, _ in rates:
        setattr(module, name, 0.0)
    model.train()
    try:
        yield
    finally:
        for module, name, rate in rates:
            setattr(module, name, rate)
        model.train(was_training)


def check_counts_items(model: nn.Module) -> None:
    """Refuses a model whose loss cannot be divided by the items of several micro-batches."""
    core = inner_model(model)
    parameters = inspect.signature(type(core).forward).parameters.values()
    takes = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    if not (takes and getattr(core, "accepts_loss_kwargs", True)):
        raise UserError(
            f"{type(core).__name__} does not take num_items_in_batch, so that micro-batches would not weigh what their "
            "tokens do: it cannot be diagnosed"
        )
