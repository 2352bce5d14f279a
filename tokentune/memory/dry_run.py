"""`--dry_run`: the run with everything but its steps, told in a few lines; it makes no folder and no log."""

import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedConfig

from tokentune.core.saved_tensors.saved_bytes import gib
from tokentune.data.packing import PackedRows, lengths_of
from tokentune.errors import UnsupportedModelError, UserError
from tokentune.memory.footprint import measure
from tokentune.sampling.sampler import selected_count
from tokentune.settings.finetune import Arguments
from tokentune.sources import first_line
from tokentune.training.trainer import SelectiveTrainer
from tokentune.training.trainer_arguments import update_count


def build_without_folder(build: Callable[[], SelectiveTrainer], settings: object) -> SelectiveTrainer:
    """What `build` makes of the settings: the Trainer creates its folder when it is made, here one that goes again."""
    with tempfile.TemporaryDirectory() as folder:
        settings.output_dir = folder
        return build()


def say_plan(
    trainer: SelectiveTrainer,
    rows: Dataset | None,
    reports: Mapping[str, object],
    arguments: Arguments,
    config: PreTrainedConfig,
    run_folder: Path,
) -> None:
    """Prints what the run would do.

    Args:
        trainer: ready for `train()`.
        rows: the encoded ones, each by itself also with --packing; None where they are read while training.
        reports: of "train" and "validation": what became of the records, as a text; None: no such data.
        config: the base model's.
    """
    if not trainer.is_world_process_zero():
        return
    lines = {"model": _model(trainer)}
    lines |= {f"{name} data": str(report) for name, report in reports.items() if report is not None}
    lines["steps"] = _steps(trainer)
    longest = arguments.data.max_length
    if rows is not None:
        lengths = lengths_of(rows)
        lines["tokens"] = _tokens(lengths, arguments)
        packed = trainer.train_dataset if isinstance(trainer.train_dataset, PackedRows) else None
        longest = int(lengths.max()) if packed is None else max(int(lengths[row].sum()) for row in packed.bins)
    lines["memory"] = _memory(trainer, longest, arguments, config)
    lines["run folder"] = str(run_folder)
    width = max(map(len, lines)) + 2
    print("\n".join(f"{name:{width}}{text}" for name, text in lines.items()))
    print("dry run: nothing was trained, and no folder made (tokens may be kept for the run: --data_cache)")


def _model(trainer: SelectiveTrainer) -> str:
    model = trainer.model
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    total = model.num_parameters() if hasattr(model, "num_parameters") else core.num_parameters()
    if hasattr(model, "get_nb_trainable_parameters"):
        trained, total = model.get_nb_trainable_parameters()  # 4-bit weights counted as what they stand for
    else:
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f"{type(core).__name__}, {total:,} parameters, {trained:,} of them trained ({trained / total:.3%})"


def _steps(trainer: SelectiveTrainer) -> str:
    settings = trainer.args
    micro, accumulation = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    steps, epochs = settings.max_steps, ""
    if hasattr(trainer.train_dataset, "__len__"):
        rows = len(trainer.train_dataset)
        steps = update_count(rows, settings)
        epochs = f", {steps / math.ceil(rows / (micro * settings.world_size) / accumulation):.4g} epochs"
    batch = f"{micro} x {accumulation} micro-batches x {settings.world_size} processes"
    return f"{steps:,} of {micro * accumulation * settings.world_size} rows ({batch}){epochs}"


def _tokens(lengths: np.ndarray, arguments: Arguments) -> str:
    total = int(lengths.sum())
    said = f"{total:,} in an epoch, at most {lengths.max():,} in a row"
    if not arguments.selection.tokentune:
        return f"{said}; all get gradients"
    if arguments.selection.selection == "reference":
        return f"{said}; selected as the released code did"
    chosen = sum(selected_count(arguments.selection.selected, length) for length in lengths.tolist())
    most = "at most " if arguments.selection.schedule is not None else ""
    return f"{said}; {most}{chosen:,} of them selected for gradients ({chosen / total:.1%})"


def _memory(trainer: SelectiveTrainer, longest: int, arguments: Arguments, config: PreTrainedConfig) -> str:
    """The footprint of a step over the longest row, by the real step on tensors without data."""
    model = trainer.model
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = trainer.args.per_device_train_batch_size, longest
    try:
        patched = getattr(core, "_tokentune", None)
        found = measure(config, arguments, shape, device=device, profile=getattr(patched, "profile", None))
    except (UserError, UnsupportedModelError, RuntimeError, NotImplementedError) as error:
        return f"not estimated: {first_line(error)}"
    return (
        f"{gib(found.peak)} at the peak of a step of {shape[0]} x {longest:,} tokens, {gib(found.activations)} of it "
        f"kept for the backward pass (estimated for {'the GPU' if device == 'cuda' else 'the CPU'})"
    )
