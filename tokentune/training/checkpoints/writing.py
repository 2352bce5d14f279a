"""Writing a checkpoint of a run in training: weights, optimizer, random numbers and the run's own state.

A failure is reported, and training goes on: the next checkpoint may fit, and stopping would lose what was learnt since
the last one.
"""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from tokentune.file_names import RUN_STATE_NAME
from tokentune.phases import phase
from tokentune.training.checkpoints.run_state import run_state
from tokentune.training.checkpoints.saving import (
    StorageError,
    hidden,
    new_folder,
    publish,
    rotate,
    seal,
    storage_errors,
    write_whole,
)

logger = logging.getLogger(__name__)


@phase("save")
def write_checkpoint(trainer: Trainer, loop_state: dict[str, Any], evaluation_pending: bool) -> bool:
    """Writes the checkpoint of this step; returns whether it could be written. Every process has to call it."""
    trainer.store_flos()
    state, writes = trainer.state, trainer.args.should_save
    checkpoint = Path(trainer.args.output_dir) / f"checkpoint-{state.global_step}"
    partial = hidden(checkpoint, "partial")
    best_before, best = state.best_model_checkpoint, state.best_global_step
    if best and (best == state.global_step or checkpoint.with_name(f"checkpoint-{best}").exists()):
        state.best_model_checkpoint = str(checkpoint.with_name(f"checkpoint-{best}"))
    parts: list[Callable[[], Any]] = [
        lambda: new_folder(partial) if writes else None,
        lambda: trainer.save_model(str(partial), _internal_call=True),
        lambda: None if trainer.args.save_only_model else write_states(trainer, str(partial)),
        lambda: _write_run_state(trainer, run_state(trainer, loop_state, evaluation_pending), partial),
        lambda: seal(partial) if writes else None,
        lambda: publish(partial, checkpoint) if writes else None,
    ]
    for part in parts:  # all processes learn of a failure, so that none waits in the next part
        reason = next((said for said in gather_object([_attempt(part)]) if said is not None), None)
        if reason is not None:
            state.best_model_checkpoint = best_before
            if writes:
                shutil.rmtree(partial, ignore_errors=True)
            last = trainer.last_checkpoint
            kept = f"{last} is kept" if last is not None else "there is none before it"
            logger.error(
                "%s could not be written: %s. %s; training goes on, and tries again at the next one: make room.",
                *(checkpoint, reason, kept),
            )
            return False
    trainer.last_checkpoint = checkpoint
    if writes:
        protected = {checkpoint} | ({Path(state.best_model_checkpoint)} if state.best_model_checkpoint else set())
        reason = _attempt(lambda: rotate(checkpoint.parent, trainer.args.save_total_limit, protected))
        if reason is not None:
            logger.warning("older checkpoints could not be deleted: %s", reason)
    return True


def write_states(trainer: Trainer, folder: str) -> None:
    """Optimizer, scheduler, loss scale and random numbers, in the engine's and the Trainer's own files."""
    trainer._save_optimizer_and_scheduler(folder)
    trainer._save_scaler(folder)
    trainer._save_rng_state(folder)


def _write_run_state(trainer: Trainer, state: dict[str, Any], folder: Path) -> None:
    if not trainer.args.should_save:
        return
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):
            trainer.state.stateful_callbacks[type(callback).__name__] = callback.state()
    if trainer.base_fingerprint is not None:
        trainer.base_fingerprint.save(folder)
    trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))
    write_whole(folder / RUN_STATE_NAME, json.dumps(state, indent=1) + "\n")


def _attempt(part: Callable[[], Any]) -> str | None:
    """What went wrong on the disk; None: nothing did."""
    try:
        with storage_errors():
            part()
    except StorageError as error:
        return str(error)
    return None
