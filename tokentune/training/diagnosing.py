"""`--diagnose_steps N`: every N optimizer steps, the selective gradient beside the full one, of the same rows.

    B sequences, S tokens

After the last backward pass of such a step the selective gradients are set aside, the step's micro-batches go through
the model once more with all tokens selected (an ordinary forward and backward pass) and all labels, at the same
weights, and both are compared before anything is clipped. Then the very tensors that were set aside are put back, and
random numbers too, so that training goes on as it would have, bit for bit. The step takes the memory of full training,
and its gradients beside the selective ones. Where the model drops out at random, that is part of the difference.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from tokentune.data.collators import ALL_LABELS
from tokentune.gradients.draw_statistics import inner, squared_distance
from tokentune.sampling.sampler import IGNORED_LABEL

COSINE, RELATIVE_ERROR = "gradient_cosine", "gradient_relative_error"
# What belongs to a selection, in a batch of the collators.
_OF_SELECTION = (
    ALL_LABELS,
    "selected_positions",
    "selection_fillers",
    "num_supervised",
    "selection_draws",
    "selection_weights",
    "selection_probabilities",
)


def for_all_tokens(batch: dict[str, Any]) -> dict[str, Any]:
    """A training batch without its selection: every token selected, every label there."""
    ids = batch["input_ids"]
    everything = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape).contiguous()
    kept = {name: value for name, value in batch.items() if name not in _OF_SELECTION}
    return kept | {"labels": batch.get(ALL_LABELS, batch["labels"]), "selected_positions": everything}


class GradientDiagnosis:
    """Compares gradients in a trainer's steps.

    Attributes:
        every: optimizer steps.
        latest: the figures of the step that was compared last, until they are logged.
        seconds: that comparing took in the step under way.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.latest: dict[str, float] = {}
        self.seconds = 0.0
        self._window: list[dict[str, Any]] = []

    def is_due(self, step: int) -> bool:
        """Whether the optimizer step with this number, from 1, is compared."""
        return step % self.every == 0

    def note(
        self,
        trainer: Trainer,
        batch: dict[str, Any],
        backward: Callable[[dict[str, Any], Any], Tensor],
    ) -> None:
        """To be called after each micro-batch's backward pass; compares after the last one of the step.

        Args:
            batch: as the collator made it.
            backward: forward and backward pass of a batch, given the number of items that its loss is divided by.
        """
        if not self.is_due(trainer.state.global_step + 1):
            return
        self._window.append(batch)
        if trainer.accelerator.sync_gradients:
            window, self._window = self._window, []
            started = time.perf_counter()
            self.latest = self._compare(trainer, [for_all_tokens(batch) for batch in window], backward)
            self.seconds += time.perf_counter() - started

    def _compare(
        self, trainer: Trainer, window: list[dict[str, Any]], backward: Callable[[dict, Any], Tensor]
    ) -> dict[str, float]:
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        items = None
        if trainer.model_accepts_loss_kwargs:
            items = sum((batch["labels"][:, 1:] != IGNORED_LABEL).sum() for batch in window).to(trainer.args.device)
        selective = [parameter.grad for parameter in trained]
        gpus = {parameter.device.index for parameter in trained if parameter.device.type == "cuda"}
        try:
            _set_gradients(trained, [None] * len(trained))
            with torch.random.fork_rng(devices=sorted(gpus)):
                for batch in window:
                    backward(batch, items)
            return compared(selective, [parameter.grad for parameter in trained])
        finally:
            _set_gradients(trained, selective)


def _set_gradients(parameters: Iterable[nn.Parameter], gradients: Iterable[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def compared(selective: list[Tensor | None], full: list[Tensor | None]) -> dict[str, float]:
    """Cosine of the selective gradient to the full one, and the norm of their difference over the full one's norm.

    A gradient that is missing is zero. Where the full one is zero as a whole, nothing is said.
    """
    product = square = full_square = error = 0.0
    for first, second in zip(selective, full, strict=True):
        if first is None and second is None:
            continue
        first = torch.zeros_like(second) if first is None else first
        second = torch.zeros_like(first) if second is None else second
        product += inner(first, second)
        square += inner(first, first)
        full_square += inner(second, second)
        error += squared_distance(first, second)
    if not (square > 0 and full_square > 0):
        return {}
    return {COSINE: product / (square * full_square) ** 0.5, RELATIVE_ERROR: (error / full_square) ** 0.5}
