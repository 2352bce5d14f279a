"""`--dry_run`: prepares the run, prints a short plan, and stops; it makes no folder and no log."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from tokentune.core.layers import inner_model
from tokentune.core.saved_tensors.saved_bytes import gib
from tokentune.data.row_sizes import lengths_of
from tokentune.data.step_work import selected_in_rows
from tokentune.errors import UserError
from tokentune.memory.longest_rows import row_lengths
from tokentune.memory.report import Run
from tokentune.models.tasks import CAUSAL_LM, Head
from tokentune.settings.finetune import Arguments
from tokentune.sources import first_line
from tokentune.training.trainer import SelectiveTrainer
from tokentune.training.trainer_arguments import Extent


def say_plan(
    trainer: SelectiveTrainer,
    rows: Any,
    data: Mapping[str, object],
    arguments: Arguments,
    config: PreTrainedConfig,
    run_folder: Path,
    head: Head = CAUSAL_LM,
) -> None:
    """Prints what the run would do.

    Args:
        trainer: ready for `train()`.
        rows: encoded, not packed, or images; None if they are streamed.
        data: what is said of it, and of the disk, by the names of lines; None: nothing.
        config: of the base model.
    """
    if not trainer.is_world_process_zero():
        return
    lines = {"model": _model(trainer)}
    lines |= {name: str(said).replace("\n", " ") for name, said in data.items() if said is not None}
    lines["steps"] = _steps(trainer)
    longest = arguments.data.max_length
    if rows is not None:
        images = inner_model(trainer.model).main_input_name == "pixel_values"
        lengths = np.full(len(rows), trainer.data_collator.tokens_per_image) if images else lengths_of(rows)
        lines["tokens"] = _tokens(rows, lengths, arguments, causal=trainer.causal)
        longest = int((lengths if images else row_lengths(trainer.train_dataset)).max())
    lines["memory"] = _memory(Run(arguments, config, trainer, head), longest)
    lines["run folder"] = str(run_folder)
    width = max(map(len, lines)) + 2
    print("\n".join(f"{name:{width}}{text}" for name, text in lines.items()))
    kept = " (tokens may be kept for the run: --data_cache)" if trainer.causal else ""
    print(f"dry run: nothing was trained, and no folder made{kept}")


def _model(trainer: SelectiveTrainer) -> str:
    model = trainer.model
    if hasattr(model, "get_nb_trainable_parameters"):
        trained, total = model.get_nb_trainable_parameters()  # counts 4-bit weights by their number, not by their bytes
    else:
        trained, total = (model.num_parameters(only_trainable=only) for only in (True, False))
    name = type(inner_model(model)).__name__
    return f"{name}, {total:,} parameters, {trained:,} of them trained ({trained / total:.3%})"


def _steps(trainer: SelectiveTrainer) -> str:
    settings = trainer.args
    micro, accumulation = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    extent = Extent.of(trainer.train_dataset, settings)
    streamed = not hasattr(trainer.train_dataset, "__len__")
    epochs = "" if streamed else f", {extent.steps / extent.steps_per_epoch:.4g} epochs"
    batch = f"{micro} x {accumulation} micro-batches x {settings.world_size} processes"
    return f"{extent.steps:,} of {micro * accumulation * settings.world_size} rows ({batch}){epochs}"


def _tokens(rows: Any, lengths: np.ndarray, arguments: Arguments, *, causal: bool) -> str:
    selection, total = arguments.selection, int(lengths.sum())
    said = f"{total:,} in an epoch, at most {lengths.max():,} in a row"
    if not selection.tokentune:
        return f"{said}; all get gradients"
    chosen = int(selected_in_rows(rows, lengths, selection, causal=causal).sum())
    most = "at most " if selection.schedule is not None else ""
    return f"{said}; {most}{chosen:,} of them selected for gradients ({chosen / total:.1%})"


def _memory(run: Run, longest: int) -> str:
    """The footprint of a step on the longest rows, estimated on tensors without data."""
    settings = run.trainer.args
    sequences = settings.per_device_train_batch_size
    try:
        found = run.estimator()(run.given, (sequences, longest))
    except UserError as error:
        return f"not estimated: {first_line(error)}"
    return (
        f"{gib(found.peak)} at the peak of a step of {sequences} x {longest:,} tokens, {gib(found.activations)} of it "
        f"kept for the backward pass (estimated for {'the GPU' if settings.device.type == 'cuda' else 'the CPU'})"
    )
