"""The callbacks of a run: early stopping, and what the user sees."""

import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import EarlyStoppingCallback, TrainerCallback

from tokentune.core.saved_tensors.saved_bytes import gib
from tokentune.training.diagnosing import COSINE, RELATIVE_ERROR

logger = logging.getLogger(__name__)


class EarlyStopping(EarlyStoppingCallback):
    """The Trainer's early stopping; the last step is logged like any last step. Checkpoints hold its patience."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        pass  # the Trainer's warns that the last weights are not the best, which --load_best_model_at_end is for

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        super().on_evaluate(args, state, control, metrics, **kwargs)
        if self.early_stopping_patience_counter >= self.early_stopping_patience and state.global_step < state.max_steps:
            control.should_log = True
            logger.info(
                "stopped early, after step %d of %d: %d evaluations in a row without a %s validation %s than %.4f",
                *(state.global_step, state.max_steps, self.early_stopping_patience_counter),
                *("higher" if args.greater_is_better else "lower", args.metric_for_best_model, state.best_metric),
            )


class Progress(TrainerCallback):
    """On a terminal a bar with loss and memory; elsewhere one line per log entry."""

    def __init__(self, memory_figures: Callable[[], dict[str, int]], *, epochs: bool = True) -> None:
        self.memory_figures = memory_figures
        self.epochs = epochs
        self.bar: tqdm | None = None
        self.losses: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and sys.stdout.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", file=sys.stdout)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self._show_figures()
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        for key, name in (("loss", "loss"), ("eval_loss", "validation")):
            if key in logs:
                self.losses[name] = f"{logs[key]:.4f}"
        if self.bar is not None:
            self._show_figures()
            self.bar.refresh()
        elif line := log_line(logs, state.global_step, state.max_steps, epochs=self.epochs):
            print(line, flush=True)

    def _show_figures(self) -> None:
        figures = {name.removesuffix("_bytes"): gib(size) for name, size in self.memory_figures().items()}
        self.bar.set_postfix(self.losses | figures, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def log_line(logs: dict[str, float], step: int, total: int, *, epochs: bool = True) -> str | None:
    """One log entry as a line of text; None for entries that hold no loss (the Trainer's closing totals).

    Args:
        epochs: whether it is known how many steps one has; not of a stream.
    """
    head = f"step {step}/{total}"
    if "eval_loss" in logs:
        figures = {key.removeprefix("eval_"): value for key, value in logs.items() if key.startswith("eval_")}
        figures.pop("runtime", None)
        return f"{head}  validation " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
    if "loss" not in logs:
        return None
    kinds = ("allocated", "reserved", "peak")
    if not torch.accelerator.is_available():  # without one, "allocated" is all memory that the process holds
        kinds, logs = ("resident", "peak"), {**logs, "memory_resident_gib": logs["memory_allocated_gib"]}
    memory = ", ".join(f"{kind} {logs[f'memory_{kind}_gib']:.2f}" for kind in kinds)
    head = f"{head}  epoch {logs['epoch']:.2f}" if epochs else head
    compared = ""
    if COSINE in logs:
        compared = f"  to full: cosine {logs[COSINE]:.3f}, error {logs[RELATIVE_ERROR]:.3f}"
    of_all = f" (all tokens {logs['loss_all_tokens']:.4f})" if "loss_all_tokens" in logs else ""
    return (
        f"{head}  loss {logs['loss']:.4f}{of_all}  learning rate {logs['learning_rate']:.2e}  "
        f"gradient norm {logs['grad_norm']:.3f}{compared}  "
        f"{logs['tokens_per_second']:.0f} tokens/s  memory GiB: {memory}"
    )
