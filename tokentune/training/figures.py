"""What a run counts and measures, over interruptions: tokens, seconds, evaluations, memory.

Counts stay on the device and are read at log lines only: reading them makes the host wait for the GPU.
"""

import time
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tokentune.core.patched import DrawCounts
from tokentune.core.saved_tensors.saved_bytes import BYTES_IN_GIB
from tokentune.environment import memory_usage, reset_peak

# What a checkpoint holds as it is.
_PLAIN = ("tokens", "training_seconds", "evaluation_seconds", "saved_for_backward_bytes", "saved_for_backward_by")


class RunFigures:
    """See the module. Seconds, bytes.

    Attributes:
        tokens: trained on up to the last log entry, over all processes: `processed` (real ones), `selected`, and
            `selected_supervised` targets.
        evaluations: (optimizer step, figures), in order; the figures are those of the trainer's `Evaluation`.
        step_seconds: of each optimizer step, without logging, evaluating and saving.
        evaluation_seconds: spent in `evaluate`, and in comparing gradients, since the first step began.
        training_seconds: from the first step's beginning to the last log entry, without those.
        saved_for_backward_bytes: what autograd kept after the first micro-batch's forward pass; None before it.
        saved_for_backward_by: the same by kind of module (`core/breakdown.py`).
        batch_shape: of that micro-batch, (sequences, tokens); None before it.
        has_begun: whether this process has begun a training step.
    """

    def __init__(self, device: torch.device) -> None:
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

    def begin(self, model: nn.Module) -> None:
        """Starts the clock, and a new peak: what loading the weights took is no part of training."""
        self._started = time.perf_counter() - self._seconds_before
        self.reset_peaks(model)
        self._peak_bytes = self._peak_before

    def seconds(self) -> float:
        """Since the first step began, of all processes that this run was resumed in."""
        return self._seconds_before if self._started is None else time.perf_counter() - self._started

    def count(self, processed: Tensor, selected: Tensor, supervised: Tensor) -> None:
        """Adds a micro-batch's tokens, as its collator counts them."""
        self._counts += torch.stack([processed, selected, supervised]).to(self._counts.device, non_blocking=True)

    def count_drawn(self, drawn: DrawCounts) -> None:
        """Adds the tokens that the model itself selected."""
        self._counts[1:] += torch.stack([drawn.selected, drawn.supervised]).to(self._counts.device)

    def count_loss_of_all(self, drawn: DrawCounts) -> None:
        """Adds the loss of all targets, which a scoring pass computed."""
        if drawn.loss is not None:
            self._loss_of_all += torch.stack([drawn.loss, drawn.targets]).to(self._loss_of_all)

    def log_entry(self, accelerator: Accelerator, model: nn.Module) -> dict[str, float]:
        """What a training log line gets: memory, speed, and with scoring passes the loss of all tokens."""
        sizes = self.memory(model)
        entry = {f"memory_{name.removesuffix('_bytes')}_gib": size / BYTES_IN_GIB for name, size in sizes.items()}
        seconds = self.seconds() - self.evaluation_seconds
        counts, (loss, targets) = self._reduced(accelerator)
        if targets:
            entry["loss_all_tokens"] = loss / targets
        self._loss_of_all.zero_()
        new_tokens = counts[0] - self.tokens["processed"]
        entry["tokens_per_second"] = new_tokens / (seconds - self.training_seconds)
        self.training_seconds, self.tokens = seconds, dict(zip(self.tokens, counts, strict=True))
        return entry

    def _reduced(self, accelerator: Accelerator) -> tuple[list[int], list[float]]:
        return tuple(accelerator.reduce(counted, "sum").tolist() for counted in (self._counts, self._loss_of_all))

    # -- memory

    def memory(self, model: nn.Module) -> dict[str, int]:
        """Bytes of all devices that hold weights: now allocated, now reserved, and the peak of training so far."""
        usages = [memory_usage(device) for device in _devices(model)]
        sizes = {name: sum(usage[name] for usage in usages) for name in usages[0]}
        self._peak_bytes = max(self._peak_bytes, sizes["peak_bytes"])
        return sizes | {"peak_bytes": self._peak_bytes}

    def reset_peaks(self, model: nn.Module) -> None:
        """Starts the devices' peaks anew; the peak of training so far is kept."""
        for device in _devices(model):
            reset_peak(device)

    # -- checkpoints

    def state(self, accelerator: Accelerator) -> dict[str, Any]:
        """What a checkpoint holds of it. To be called on every process."""
        counts, loss_of_all = self._reduced(accelerator)
        return {name: getattr(self, name) for name in (*_PLAIN, "step_seconds", "evaluations", "batch_shape")} | {
            "counts": counts,
            "loss_of_all": loss_of_all,
            "seconds": self.seconds(),
            "peak_bytes": self._peak_bytes,
        }

    def restore(self, state: dict[str, Any], *, first_process: bool) -> None:
        """Goes on from such a state; the counts, which are summed over the processes, in the first one alone."""
        for name in _PLAIN:
            setattr(self, name, state[name])
        self.step_seconds[:] = state["step_seconds"]
        self.evaluations[:] = [(step, figures) for step, figures in state["evaluations"]]
        self.batch_shape = tuple(state["batch_shape"])
        self._seconds_before, self._peak_before = state["seconds"], state["peak_bytes"]
        if first_process:
            self._counts.copy_(torch.tensor(state["counts"]))
            self._loss_of_all.copy_(torch.tensor(state["loss_of_all"]))


def _devices(model: nn.Module) -> set[torch.device]:
    return {parameter.device for parameter in model.parameters()}
