"""The trackers of `--report_to` (TensorBoard, Weights & Biases, Trackio, MLflow and the Trainer's others), guarded.

A tracker that cannot begin ends the run in a sentence, before its first step. One that fails later (its server is gone,
its disk full) is left out from there on, with a warning: hours of training are worth more than their log, and
`training_summary.json` has the figures in any case.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, TensorBoardCallback

from tokentune.errors import UserError
from tokentune.sources import first_line

logger = logging.getLogger(__name__)

EVENTS = (
    *("on_train_begin", "on_log", "on_evaluate", "on_predict", "on_save", "on_step_end", "on_epoch_end"),
    *("on_push_begin", "on_train_end"),
)


def prepare_trackers(callbacks: Iterable[TrainerCallback], logging_dir: str | None) -> None:
    """Guards each tracker among the callbacks. `logging_dir`: where TensorBoard writes; None: its default."""
    names = {kind: name for name, kind in INTEGRATION_TO_CALLBACK.items()}
    for callback in callbacks:
        if type(callback) in names:
            lost: list[str] = []
            for event in EVENTS:
                setattr(callback, event, _guarded(getattr(callback, event), event, names[type(callback)], lost))
        if logging_dir is not None and isinstance(callback, TensorBoardCallback):
            callback.logging_dir = logging_dir  # it has no argument for this, only an environment variable


def _guarded(method: Callable, event: str, name: str, lost: list[str]) -> Callable:
    """A tracker's method, which does nothing once one of them has failed: `lost` holds that event then."""

    def call(args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if lost:
            return None
        try:
            return method(args, state, control, **kwargs)
        except Exception as error:
            said = first_line(error)
            if event == "on_train_begin":
                raise UserError(
                    f"--report_to {name}: cannot begin: {said}\n"
                    "Log in to it, let it work offline, or take --report_to none."
                ) from error
            lost.append(event)
            logger.warning(
                "--report_to %s failed at step %d (%s): the run goes on without it", name, state.global_step, said
            )

    return call
