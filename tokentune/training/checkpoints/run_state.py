"""What a checkpoint holds of a run besides optimizer and random numbers, and how it is restored.

`run_state.json` in a checkpoint:

    settings            {flag: value}, every flag of the run
    batch               {sequences, accumulation, processes}: the micro-batch that the run really has
    grouping            a digest of what --group_by_length groups the rows by; null: they come in random order
    data                a digest of the training rows; null: they are read as a stream
    versions            {tokentune, torch, transformers}
    evaluation_pending  whether the validation that is due at this step is still to be made
    rotary              of each process, the frequencies that follow batch lengths (`core/compat/rotary_state.py`)
    progress            the run's figures so far, as `RunFigures` and the training loop keep them

Whole models are loaded by their own class: the Trainer goes by the names in the file, which for several families (ViT)
differ from those in memory, and leaves a weight that it does not find unchanged. FSDP and DeepSpeed load their own.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_callback import ExportableState

from tokentune.core.compat.rotary_state import read, rotary_state, set_rotary_state, written
from tokentune.environment import library_versions
from tokentune.file_names import RUN_STATE_NAME
from tokentune.training.grouping import units_digest

logger = logging.getLogger(__name__)


def read_run_state(checkpoint: Path) -> dict[str, Any]:
    """The file above, of a checkpoint without faults."""
    return json.loads((checkpoint / RUN_STATE_NAME).read_text(encoding="utf-8"))


def run_state(trainer: Trainer, loop_state: dict[str, Any], evaluation_pending: bool) -> dict[str, Any]:
    """The file above, of a run between two steps. Every process has to call it."""
    settings = trainer.args
    return {
        "settings": trainer.flags,
        "batch": {
            "sequences": settings.per_device_train_batch_size,
            "accumulation": settings.gradient_accumulation_steps,
            "processes": settings.world_size,
        },
        "grouping": units_digest(trainer.units),
        "data": trainer.data_digest,
        "versions": versions(),
        "evaluation_pending": evaluation_pending,
        "rotary": gather_object([written(rotary_state(trainer.model))]),
        "progress": loop_state | trainer.figures.state(),
    }


def versions() -> dict[str, str | None]:
    """The versions that every bit of a result depends on."""
    return {name: library_versions()[name] for name in ("tokentune", "torch", "transformers")}


def restore_run(trainer: Trainer, saved: dict[str, Any]) -> bool:
    """Restores figures, rotary frequencies and callbacks from a run state; returns whether training had ended."""
    trainer.figures.restore(saved["progress"], first_process=trainer.is_world_process_zero())
    of_processes = saved.get("rotary") or [{}]
    set_rotary_state(trainer.model, read(of_processes[min(trainer.args.process_index, len(of_processes) - 1)]))
    states = trainer.state.stateful_callbacks
    for callback in trainer.callback_handler.callbacks:
        known = states.get(type(callback).__name__)
        if isinstance(callback, ExportableState) and isinstance(known, dict):
            for name, value in known.get("attributes", {}).items():
                setattr(callback, name, value)
    return states.get("TrainerControl", {}).get("args", {}).get("should_training_stop", False)


def loads_weights(trainer: Trainer) -> bool:
    """Whether weights are loaded here, and not by the engine that splits them."""
    return not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Loads a whole model's weights, or its adapter's."""
    if isinstance(model, PreTrainedModel):
        saved = type(model).from_pretrained(checkpoint, local_files_only=True, use_safetensors=True)
        model.load_state_dict(saved.state_dict())
    else:
        model.load_adapter(str(checkpoint), model.active_adapters[0], is_trainable=True)


def load_best_weights(trainer: Trainer) -> None:
    """Loads those of the best checkpoint, at the end of training."""
    state = trainer.state
    if loads_weights(trainer):
        load_weights(trainer.model, Path(state.best_model_checkpoint))
    else:
        trainer._load_best_model()
    metric = trainer.args.metric_for_best_model.removeprefix("eval_")
    step, best = state.best_global_step, state.best_metric
    logger.info("the result is that of step %d: validation %s %.4f, the best", step, metric, best)


def data_digest(rows: Any) -> str | None:
    """A digest of encoded rows, their order included; None for a stream, which is endless."""
    while hasattr(rows, "rows"):  # packed, or with the seeds of their draws
        rows = rows.rows
    if not isinstance(rows, Dataset):
        return None
    digest, names = hashlib.blake2b(digest_size=16), ["input_ids", "labels"]
    for table in rows.select_columns(names).with_format("arrow").iter(batch_size=4096):
        for name in names:
            column = table[name].combine_chunks()
            digest.update(name.encode())
            for numbers in (column.value_lengths(), column.flatten()):
                digest.update(np.ascontiguousarray(numbers.to_numpy(False), dtype=np.int64))
    return digest.hexdigest()
