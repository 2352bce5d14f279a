"""The callbacks of a run: early stopping, and what the user sees."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import EarlyStoppingCallback, TrainerCallback

from tokentune.core.saved_tensors.saved_bytes import BYTES_IN_GIB, gib
from tokentune.training.diagnosing import COSINE, RELATIVE_ERROR

logger = logging.getLogger(__name__)

_BAR = "step {n_fmt}/{total_fmt} |{bar:8}| {desc}"  # 80 columns hold all but the peak, which comes last


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
    """On a terminal one bar, with a line above it for each validation; elsewhere one line per log entry."""

    def __init__(self, memory_figures: Callable[[], dict[str, int]], *, epochs: bool = True) -> None:
        self.memory_figures = memory_figures
        self.epochs = epochs
        self.bar: tqdm | None = None
        self._of_the_bar = ExitStack()
        self._latest: list[str] = []  # figures of the last log entry
        self._began: tuple[float, int] | None = None  # this process's first step: when, and after how many others

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and sys.stdout.isatty():
            steps = {"initial": state.global_step, "total": state.max_steps}
            bar = tqdm(**steps, bar_format=_BAR, dynamic_ncols=True, file=sys.stdout)
            self._of_the_bar.callback(bar.close)
            if min(bar.ncols or 1, bar.nrows or 1) < 1:
                return self.close()  # a terminal without a size (some containers'), where tqdm shows nothing
            self.bar = bar
            loggers = [logging.getLogger(name) for name in ("tokentune", "transformers")]
            self._of_the_bar.enter_context(logging_redirect_tqdm(loggers))  # messages go above the bar

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._began is None:
            self._began = time.perf_counter(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self._describe(state)
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        line = log_line(logs, state.global_step, state.max_steps, self._seconds_left(state), epochs=self.epochs)
        if self.bar is None:
            if line is not None:
                print(line, flush=True)
            return
        if "eval_loss" in logs:
            self.bar.write(line)
        elif "loss" in logs:
            loss, rate, speed = (logs[name] for name in ("loss", "learning_rate", "tokens_per_second"))
            self._latest = [f"loss {loss:.4f}", f"lr {rate:.1e}", f"{speed:.0f} tok/s"]
            self._describe(state)
            self.bar.refresh()

    def _describe(self, state: Any) -> None:
        left, memory = self._seconds_left(state), self.memory_figures()
        figures = [f"ETA {tqdm.format_interval(left)}"] if left is not None else []
        in_use = f"{gib(memory['allocated_bytes'])} (peak {memory['peak_bytes'] / BYTES_IN_GIB:.2f})"
        self.bar.set_description_str(", ".join([*figures, *self._latest, in_use]), refresh=False)

    def _seconds_left(self, state: Any) -> float | None:
        """Of the steps to come, validations and checkpoints among them; None: not known, or there are none."""
        if self._began is None or not self._began[1] < state.global_step < state.max_steps:
            return None
        took = (time.perf_counter() - self._began[0]) / (state.global_step - self._began[1])
        return took * (state.max_steps - state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the bar's line. May be called more than once."""
        self._of_the_bar.close()
        self.bar = None


@contextmanager
def without_bars() -> Iterator[None]:
    """Within it transformers shows no bar of its own for every file that it reads or writes."""
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def log_line(
    logs: dict[str, float], step: int, total: int, seconds_left: float | None = None, *, epochs: bool = True
) -> str | None:
    """One log entry as a line of text; None for entries that hold no loss (the Trainer's closing totals).

    Args:
        seconds_left: of training; None: not known.
        epochs: whether it is known how many steps one has; not of a stream.
    """
    head = f"step {step}/{total}"
    if seconds_left is not None:
        head = f"{head}  ETA {tqdm.format_interval(seconds_left)}"
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
