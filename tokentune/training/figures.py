"""What a run counts and measures, over interruptions: tokens, seconds, evaluations, memory.

Counts stay on the device and are only read for log lines: reading them makes the host wait for the GPU.
"""

import time
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor, nn

from tokentune.core.patched import DrawCounts
from tokentune.core.saved_tensors.saved_bytes import BYTES_IN_GIB
from tokentune.environment import memory_usage, reset_peak

# Attributes that a checkpoint holds unchanged.
_PLAIN = (
    *("tokens", "training_seconds", "evaluation_seconds", "saved_for_backward_bytes", "saved_for_backward_by"),
    *("step_seconds", "evaluations", "batch_shape"),
)


class RunFigures:
    """See the module. Seconds, bytes.

    Attributes:
        tokens: trained on up to the last log entry, over all processes: `processed` (without padding), `selected`, and
            `selected_supervised` targets.
        evaluations: (optimizer step, figures), in order; the figures are those of the trainer's `Evaluation`.
        step_seconds: of each optimizer step, without logging, evaluating and saving.
        evaluation_seconds: of validations and gradient comparisons, since the first step began.
        training_seconds: from the first step's beginning to the last log entry, without those.
        saved_for_backward_bytes: what autograd saved in the first micro-batch's forward pass; None before it.
        saved_for_backward_by: the same by kind of module (`core/saved_tensors/breakdown.py`).
        batch_shape: of that micro-batch, (sequences, tokens); None before it.
        has_begun: whether this process has begun a training step.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model
        self.tokens = dict.fromkeys(("processed", "selected", "selected_supervised"), 0)
        self.evaluations: list[tuple[int, dict[str, float]]] = []
        self.step_seconds: list[float] = []
        self.evaluation_seconds = self.training_seconds = 0.0
        self.saved_for_backward_bytes: int | None = None
        self.saved_for_backward_by: dict[str, int] = {}
        self.batch_shape: tuple[int, int] | None = None
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)  # in the order of `tokens`
        # Of the scoring passes since the last log entry: the summed loss of all supervised targets, and their number.
        self._loss_of_all = torch.zeros(2, device=device)
        self._seconds_before = 0.0
        self._started: float | None = None
        self._peak_bytes = self._peak_before = 0

    @property
    def has_begun(self) -> bool:
        return self._started is not None

    @property
    def validation_losses(self) -> list[tuple[int, float]]:
        """(optimizer step, validation loss), in order."""
        return [(step, figures["loss"]) for step, figures in self.evaluations]

    def begin(self) -> None:
        """Starts the clock, and a new peak: loading the weights is no part of training."""
        self._started = time.perf_counter() - self._seconds_before
        self.reset_peaks()
        self._peak_bytes = self._peak_before

    def seconds(self) -> float:
        """Since the first step began, of all processes that this run was resumed in."""
        return self._seconds_before if self._started is None else time.perf_counter() - self._started

    def count(self, *counts: Tensor) -> None:
        """Adds a micro-batch's tokens, as its collator counts them: in the order of `tokens`, or the first of them."""
        self._counts[: len(counts)] += torch.stack(counts).to(self._counts.device, non_blocking=True)

    def count_draw(self, drawn: DrawCounts, *, selected: bool) -> None:
        """Adds what a scoring pass found: the loss of all targets, and with `selected` the tokens that it selected."""
        if selected:
            self._counts[1:] += torch.stack([drawn.selected, drawn.supervised]).to(self._counts.device)
        if drawn.loss is not None:
            self._loss_of_all += torch.stack([drawn.loss, drawn.targets]).to(self._loss_of_all)

    def log_entry(self) -> dict[str, float]:
        """What a training log line gets: memory, speed, and with scoring passes the loss of all tokens."""
        entry = {
            f"memory_{name.removesuffix('_bytes')}_gib": size / BYTES_IN_GIB for name, size in self.memory().items()
        }
        seconds = self.seconds() - self.evaluation_seconds
        counts, (loss, targets) = reduce(self._counts, "sum").tolist(), reduce(self._loss_of_all, "sum").tolist()
        if targets:
            entry["loss_all_tokens"] = loss / targets
        self._loss_of_all.zero_()
        new_tokens = counts[0] - self.tokens["processed"]
        entry["tokens_per_second"] = new_tokens / (seconds - self.training_seconds)
        self.training_seconds, self.tokens = seconds, dict(zip(self.tokens, counts, strict=True))
        return entry

    def memory(self) -> dict[str, int]:
        """Bytes of all devices that hold weights: now allocated, now reserved, and the peak of training so far."""
        usages = [memory_usage(device) for device in self._devices()]
        sizes = {name: sum(usage[name] for usage in usages) for name in usages[0]}
        self._peak_bytes = max(self._peak_bytes, sizes["peak_bytes"])
        return sizes | {"peak_bytes": self._peak_bytes}

    def reset_peaks(self) -> None:
        """Resets the devices' peaks; the peak of training so far is kept."""
        for device in self._devices():
            reset_peak(device)

    def _devices(self) -> set[torch.device]:
        return {parameter.device for parameter in self.model.parameters()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it. Every process has to call it."""
        return {name: getattr(self, name) for name in _PLAIN} | {
            "counts": reduce(self._counts, "sum").tolist(),
            "loss_of_all": reduce(self._loss_of_all, "sum").tolist(),
            "seconds": self.seconds(),
            "peak_bytes": self._peak_bytes,
        }

    def restore(self, state: dict[str, Any], *, first_process: bool) -> None:
        """Restores what `state` returned; counts, which are sums over the processes, in the first process only."""
        for name in _PLAIN:
            setattr(self, name, state[name])
        self.evaluations = [(step, figures) for step, figures in self.evaluations]
        self.batch_shape = tuple(self.batch_shape)
        self._seconds_before, self._peak_before = state["seconds"], state["peak_bytes"]
        if first_process:
            self._counts.copy_(torch.tensor(state["counts"]))
            self._loss_of_all.copy_(torch.tensor(state["loss_of_all"]))
