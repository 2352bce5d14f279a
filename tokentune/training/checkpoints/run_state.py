"""What a checkpoint holds of a run besides weights, optimizer and random numbers, so that it goes on as if never ended.

`run_state.json` in a checkpoint:

    settings            {flag: value}, every flag of the run
    batch               {sequences, accumulation, processes}: the micro-batch that the run really has
    data                a digest of the training rows; null: they are read as a stream
    versions            {tokentune, torch, transformers}
    evaluation_pending  whether the validation that is due at this step has still to be made
    rotary              of each process, the frequencies that follow batch lengths (`core/compat/rotary_state.py`)
    progress            the run's figures so far, as `RunFigures` and the training loop keep them
"""

import hashlib
import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from tokentune.core.compat.rotary_state import read, rotary_state, set_rotary_state, written
from tokentune.version import __version__

RUN_STATE_NAME = "run_state.json"


def read_run_state(checkpoint: Path) -> dict[str, Any]:
    """The file above, of a checkpoint that was found whole."""
    return json.loads((checkpoint / RUN_STATE_NAME).read_text(encoding="utf-8"))


class Progress(Protocol):
    """What a checkpoint holds of the training loop (`training/loop.py`)."""

    loss_sum: Tensor
    logged_step: int
    gradient_norm: Tensor | float | None
    learning_rate: float | None
    evaluation_pending: bool
    best_before: tuple[float | None, int | None]

    def last_step(self) -> dict[str, float | None]: ...


def run_state(trainer: Trainer, loop: Progress) -> dict[str, Any]:
    """The file above, of a run between two steps. To be called on every process."""
    settings = trainer.args
    losses = gather_object([loop.loss_sum.item()])
    return {
        "settings": trainer.flags,
        "batch": {
            "sequences": settings.per_device_train_batch_size,
            "accumulation": settings.gradient_accumulation_steps,
            "processes": settings.world_size,
        },
        "data": trainer.data_digest,
        "versions": versions(),
        "evaluation_pending": loop.evaluation_pending,
        "rotary": gather_object([written(rotary_state(trainer.model))]),
        "progress": {
            "loss_sum": sum(losses) / len(losses),  # since the last log entry
            "last_logged": loop.logged_step,
            "last_step": loop.last_step(),
            **trainer.figures.state(trainer.accelerator),
        },
    }


def versions() -> dict[str, str]:
    """Of what decides about every bit of a result."""
    return {"tokentune": __version__} | {name: version(name) for name in ("torch", "transformers")}


def restore_run(trainer: Trainer, loop: Progress, checkpoint: Path) -> tuple[bool, bool]:
    """Puts a run's figures, the model's rotary frequencies and the callbacks' states back.

    Returns:
        Whether training had come to its end, and whether the validation due at this step has still to be made.
    """
    saved = read_run_state(checkpoint)
    progress, last_step = saved["progress"], saved["progress"]["last_step"]
    loop.loss_sum.fill_(progress["loss_sum"])
    loop.logged_step = progress["last_logged"]
    loop.gradient_norm, loop.learning_rate = last_step["grad_norm"], last_step["learning_rate"]
    trainer.figures.restore(progress, first_process=trainer.is_world_process_zero())
    of_processes = saved.get("rotary") or [{}]
    set_rotary_state(trainer.model, read(of_processes[min(trainer.args.process_index, len(of_processes) - 1)]))
    states = trainer.state.stateful_callbacks
    for callback in trainer.callback_handler.callbacks:
        known = states.get(type(callback).__name__)
        if isinstance(callback, ExportableState) and isinstance(known, dict):
            for name, value in known.get("attributes", {}).items():
                setattr(callback, name, value)
    had_ended = states.get("TrainerControl", {}).get("args", {}).get("should_training_stop", False)
    return had_ended, saved["evaluation_pending"]


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
