"""What `--report_to` names: TensorBoard, Weights & Biases, Trackio, MLflow and the Trainer's others, kept from harm.

A tracker that cannot begin ends the run in a sentence, before its first step. One that fails later (its server is gone,
its disk full) is left out from there on, with a warning: hours of training are worth more than their log, and
`training_summary.json` has the figures in any case.
"""

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, TensorBoardCallback

from tokentune.errors import UserError
from tokentune.sources import first_line

logger = logging.getLogger(__name__)

EVENTS = ("on_log", "on_evaluate", "on_predict", "on_save", "on_step_end", "on_epoch_end", "on_push_begin")


def prepare_trackers(callbacks: Iterable[TrainerCallback], logging_dir: str | None) -> None:
    """Guards the callbacks of trackers, each by itself. `logging_dir`: where TensorBoard writes; None: its default."""
    names = {kind: name for name, kind in INTEGRATION_TO_CALLBACK.items()}
    for callback in callbacks:
        if type(callback) in names:
            _guard(callback, names[type(callback)])
        if logging_dir is not None and isinstance(callback, TensorBoardCallback):
            callback.logging_dir = logging_dir  # it has no argument for this, only an environment variable


def _guard(callback: Any, name: str) -> None:
    lost: list[str] = []

    def guarded(event: str, method: Callable) -> Callable:
        @functools.wraps(method)
        def call(args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            if lost:
                return None
            try:
                return method(args, state, control, **kwargs)
            except UserError:
                raise
            except Exception as error:
                if event == "on_train_begin":
                    raise UserError(
                        f"--report_to {name}: cannot begin: {first_line(error)}\n"
                        f"Log in to it, let it work offline, or take --report_to none."
                    ) from error
                lost.append(event)
                logger.warning(
                    "--report_to %s failed at step %d (%s): the run goes on without it",
                    name,
                    state.global_step,
                    first_line(error),
                )
                return None

        return call

    for event in ("on_train_begin", *EVENTS, "on_train_end"):
        setattr(callback, event, guarded(event, getattr(callback, event)))
