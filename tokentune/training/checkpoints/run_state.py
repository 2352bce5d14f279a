"""What a checkpoint holds of a run besides weights, optimizer and random numbers, so that it goes on as if never ended.

`run_state.json` in a checkpoint:

    settings            {flag: value}, every flag of the run
    batch               {sequences, accumulation, processes}: the micro-batch that the run really has
    data                a digest of the training rows; null: they are read as a stream
    versions            {tokentune, torch, transformers}
    evaluation_pending  whether the validation that is due at this step has still to be made
    rotary              of each process, the frequencies that follow batch lengths (`core/compat/rotary_state.py`)
    progress            the run's figures so far, as `SelectiveTrainer` and the Trainer keep them
"""

import hashlib
import json
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from tokentune.core.compat.rotary_state import read, rotary_state, set_rotary_state, written
from tokentune.version import __version__

if TYPE_CHECKING:
    from transformers import Trainer

RUN_STATE_NAME = "run_state.json"


def read_run_state(checkpoint: Path) -> dict[str, Any]:
    """The file above, of a checkpoint that was found whole."""
    return json.loads((checkpoint / RUN_STATE_NAME).read_text(encoding="utf-8"))


def run_state(trainer: "Trainer") -> dict[str, Any]:
    """The file above, of a run between two steps. To be called on every process."""
    settings = trainer.args
    return {
        "settings": trainer.flags,
        "batch": {
            "sequences": settings.per_device_train_batch_size,
            "accumulation": settings.gradient_accumulation_steps,
            "processes": settings.world_size,
        },
        "data": trainer.data_digest,
        "versions": versions(),
        "evaluation_pending": trainer.evaluation_pending,
        "rotary": gather_object([written(rotary_state(trainer.model))]),
        "progress": _progress(trainer),
    }


def versions() -> dict[str, str]:
    """Of what decides about every bit of a result."""
    return {"tokentune": __version__} | {name: version(name) for name in ("torch", "transformers")}


def _progress(trainer: "Trainer") -> dict[str, Any]:
    losses = gather_object([trainer._tr_loss.item()])
    return {
        "loss_sum": sum(losses) / len(losses),  # since the last log entry
        "last_logged": trainer._globalstep_last_logged,
        "counts": trainer.accelerator.reduce(trainer._counts, "sum").tolist(),
        "tokens": trainer.tokens,
        "loss_of_all": trainer.accelerator.reduce(trainer.loss_of_all, "sum").tolist(),
        "seconds": trainer.seconds(),
        "training_seconds": trainer.training_seconds,
        "evaluation_seconds": trainer.evaluation_seconds,
        "step_seconds": trainer.step_seconds,
        "evaluations": trainer.evaluations,
        "peak_bytes": trainer._peak_bytes,
        "saved_for_backward_bytes": trainer.saved_for_backward_bytes,
        "saved_for_backward_by": trainer.saved_for_backward_by,
        "batch_shape": trainer.batch_shape,
        "last_step": _last_step(trainer),
    }


def _last_step(trainer: "Trainer") -> dict[str, float | None]:
    kept = {name: None if value is None else float(value) for name, value in trainer.last_step.items()}
    if trainer.optim_in_backward and trainer._started is not None:  # the Trainer found no gradients
        kept["grad_norm"] = trainer.optimizer.optimizer.gradient_norm()
    return kept


class Resumption(TrainerCallback):
    """Puts a resumed run's figures back, after the Trainer has set its own to zero and before its first step."""

    def __init__(self, trainer: "Trainer") -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer.resumed_from is None:
            return
        saved = read_run_state(trainer.resumed_from)
        _restore(trainer, saved["progress"])
        of_processes = saved.get("rotary") or [{}]
        set_rotary_state(trainer.model, read(of_processes[min(args.process_index, len(of_processes) - 1)]))
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                known = state.stateful_callbacks.get(type(callback).__name__, {})
                for name, value in (known.get("attributes", {}) if isinstance(known, dict) else {}).items():
                    setattr(callback, name, value)
        control_then = state.stateful_callbacks.get("TrainerControl", {}).get("args", {})
        trainer.had_ended = control_then.get("should_training_stop", False)
        if saved["evaluation_pending"]:
            # Random numbers are set back when the first batch is there; this may save a checkpoint before that.
            trainer._load_rng_state(str(trainer.resumed_from))
            control.should_evaluate = True
            norm, rate = trainer.last_step["grad_norm"], trainer.last_step["learning_rate"]
            trainer._maybe_log_save_evaluate(
                trainer._tr_loss, norm, trainer.model, None, state.epoch, None, time.time(), learning_rate=rate
            )


def _restore(trainer: "Trainer", progress: dict[str, Any]) -> None:
    trainer._tr_loss.fill_(progress["loss_sum"])
    trainer._total_loss_scalar = -progress["loss_sum"]  # the closing mean is that of the steps of this process
    trainer._globalstep_last_logged = progress["last_logged"]
    if trainer.is_world_process_zero():  # the counts of all: they are added up over the processes
        trainer._counts.copy_(torch.tensor(progress["counts"]))
        trainer.loss_of_all.copy_(torch.tensor(progress["loss_of_all"]))
    trainer.seconds_before = progress["seconds"]
    trainer.step_seconds[:] = progress["step_seconds"]
    trainer.evaluations[:] = [(step, figures) for step, figures in progress["evaluations"]]
    trainer.batch_shape = tuple(progress["batch_shape"])
    trainer.peak_before = progress["peak_bytes"]
    same = ("tokens", "training_seconds", "evaluation_seconds", "saved_for_backward_bytes", "saved_for_backward_by")
    for name in (*same, "last_step"):
        setattr(trainer, name, progress[name])


def data_digest(rows: Any) -> str | None:
    """A digest of encoded rows, their order included; None for a stream, which has no end to wait for."""
    if not hasattr(rows, "__len__"):
        return None
    digest = hashlib.blake2b(digest_size=16)
    for name, lengths, values in _columns(rows):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(lengths, dtype=np.int64))
        digest.update(np.ascontiguousarray(values, dtype=np.int64))
    return digest.hexdigest()


def _columns(rows: Any) -> Iterable[tuple[str, np.ndarray, np.ndarray]]:
    """(column, length of each row, the rows' numbers one behind the other), a part of the rows at a time."""
    names = ("input_ids", "labels")
    if isinstance(rows, Dataset):
        for table in rows.select_columns(list(names)).with_format("arrow").iter(batch_size=4096):
            for name in names:
                column = table[name].combine_chunks()
                yield name, column.value_lengths().to_numpy(False), column.flatten().to_numpy(False)
        return
    for start in range(0, len(rows), 4096):
        part = [rows[row] for row in range(start, min(start + 4096, len(rows)))]
        for name in names:
            values = [np.asarray(item[name]) for item in part]
            yield name, np.array([len(value) for value in values]), np.concatenate(values)
