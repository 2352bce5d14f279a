"""Gradients over a fixed set of rows: the full one, and draws of selective ones as training would take them.

    B sequences, S tokens, K selected

Rows go through the model in micro-batches, so that memory stays that of training; gradients are gathered on the CPU in
float32. Dropout is off: both gradients are to differ by the selection alone.
"""

import inspect
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from tokentune.core.groups import gather_tokens
from tokentune.core.layers import inner_model, transformer_layers
from tokentune.core.saved_tensors.saved_bytes import SavedForBackward
from tokentune.core.step import CURRENT_STEP
from tokentune.data.collators import CausalCollator
from tokentune.errors import UserError
from tokentune.gradients.draw_statistics import Gradient
from tokentune.sampling.sampler import IGNORED_LABEL, target_mask

Batch = dict[str, Any]


@dataclass(frozen=True)
class Taken:
    """One gradient over all rows, and what taking it took.

    Attributes:
        gradient: by weight, on the CPU.
        loss: what was differentiated, in nats per token.
        saved_bytes: what autograd kept for the first micro-batch's backward pass.
        selected, supervised: tokens with gradients, and those of them whose output has a loss.
        seconds: of forward and backward passes, without copying gradients.
    """

    gradient: Gradient
    loss: float
    saved_bytes: int
    selected: int
    supervised: int
    seconds: float


def take_gradient(model: nn.Module, batches: Sequence[Batch], *, items: int, bf16: bool) -> Taken:
    """The gradient of the summed loss over `items`, as the Trainer takes it over the micro-batches of a step.

    Args:
        batches: of a collator; with "selected_positions", or what the model draws them from, or neither (all tokens).
        items: what the loss is divided by, over all batches (the Trainer's `num_items_in_batch`).
        bf16: compute in bfloat16 (autocast).

    Raises:
        UserError: the loss, or a gradient, is no finite number.
    """
    device = next(model.parameters()).device
    model.zero_grad(set_to_none=True)
    loss, saved_bytes, seconds = 0.0, 0, 0.0
    with SelectionCount(model) as count:
        for place, batch in enumerate(batches):
            batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            count.expect(batch)
            started = time.perf_counter()
            divisor = torch.tensor(items, device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                if place == 0:
                    with SavedForBackward(model) as saved:
                        share = model(**batch, num_items_in_batch=divisor).loss
                    saved_bytes = saved.bytes
                else:
                    share = model(**batch, num_items_in_batch=divisor).loss
            share.backward()
            loss += float(share.detach())
            seconds += time.perf_counter() - started
            count.close()
    gradient = {name: _on_cpu(weight) for name, weight in model.named_parameters() if weight.requires_grad}
    model.zero_grad(set_to_none=True)
    if not all(torch.isfinite(tensor).all() for tensor in gradient.values()):
        raise UserError(f"the gradient is no finite number (the loss is {loss}): there is nothing to compare")
    return Taken(gradient, loss, saved_bytes, count.selected, count.supervised, seconds)


def _on_cpu(weight: nn.Parameter) -> Tensor:
    gradient = weight.grad if weight.grad is not None else torch.zeros_like(weight)
    return gradient.detach().to("cpu", torch.promote_types(gradient.dtype, torch.float32), copy=True)


def supervised_items(batches: Sequence[Batch]) -> int:
    """The labels that something predicts, as the Trainer counts them."""
    return int(sum((batch["labels"][:, 1:] != IGNORED_LABEL).sum() for batch in batches))


def micro_batches(rows: Sequence[dict[str, Any]], collator: CausalCollator, sequences: int) -> Iterator[Batch]:
    """The rows in their order, `sequences` at a time."""
    for first in range(0, len(rows), sequences):
        yield collator([rows[row] for row in range(first, min(first + sequences, len(rows)))])


class SelectionCount:
    """Counts the selected tokens of forward passes, also where the model chooses them itself, by a hook on a layer."""

    def __init__(self, model: nn.Module) -> None:
        core = inner_model(model)
        self._layer = transformer_layers(core).layers[0]
        self._batch: Batch = {}
        self._positions: Tensor | None = None
        self.selected = self.supervised = 0

    def __enter__(self) -> "SelectionCount":
        self._handle = self._layer.register_forward_pre_hook(self._look)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.remove()

    def _look(self, layer: nn.Module, args: Any) -> None:
        step = CURRENT_STEP.get()
        if step is not None and isinstance(step.positions, Tensor):
            self._positions = step.positions

    def expect(self, batch: Batch) -> None:
        """The batch that the next forward pass gets."""
        self._batch, self._positions = batch, None

    def close(self) -> None:
        """Adds up what the forward pass since `expect` selected; all tokens, where it was an ordinary one."""
        real = self._batch["attention_mask"].bool()
        targets = target_mask(self._batch["labels"], causal=True) & real
        if self._positions is not None:
            places = self._positions.to(real.device)
            real, targets = gather_tokens(real, places), gather_tokens(targets, places)
        self.selected += int(real.sum())
        self.supervised += int(targets.sum())


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Training mode in which nothing is dropped, neither by modules nor within attention."""
    was_training, undo = model.training, []
    for module in model.modules():
        rates = {"p": module.p} if isinstance(module, nn.modules.dropout._DropoutNd) else {}
        own = vars(module)
        rates |= {name: own[name] for name in ("attention_dropout", "dropout_p") if isinstance(own.get(name), float)}
        for name, rate in rates.items():
            setattr(module, name, 0.0)
            undo.append((module, name, rate))
    model.train()
    try:
        yield
    finally:
        for module, name, rate in undo:
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
