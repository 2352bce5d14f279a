"""What a run leaves: the trained model or adapter, complete or not at all."""

import copy
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tokentune.core.compat.fsdp import is_split, own_class, own_part, size_of, whole_state, whole_tensor
from tokentune.errors import UserError
from tokentune.models.saved_types import hold_in, kept_in_float32
from tokentune.training.callbacks import without_bars
from tokentune.training.checkpoints.saving import StorageError, written_into
from tokentune.training.trainer import SelectiveTrainer


def save_result(trainer: SelectiveTrainer, run_folder: Path, saved_dtype: torch.dtype) -> dict[str, Any]:
    """Saves the adapter, or the whole model in `saved_dtype`, and the tokenizer. To be called once, after training.

    Returns:
        `class`, `parameters`, `trainable_parameters` and `saved_dtype` (adapters stay in float32).

    Raises:
        UserError: the adapters are still at their initial values, so that nothing was learnt; or a full disk.
    """
    model = trainer.model
    trainer.average_weights()
    kept: Collection[str] = ()
    if isinstance(model, PreTrainedModel):
        core, dtype = model, saved_dtype
        total = sum(size_of(parameter) for parameter in model.parameters())
        trained = sum(size_of(parameter) for parameter in model.parameters() if parameter.requires_grad)
        if is_split(model):
            kept = kept_in_float32(model, dtype)
        else:
            hold_in(model, dtype)  # float32 master weights are for training only
    else:
        check_adapters_moved(model)
        trained, total = model.get_nb_trainable_parameters()
        core, dtype = model.get_base_model(), torch.float32
    if trainer.use_cache is not None:
        core.config.use_cache = trainer.use_cache  # off in training; saved off, it would slow every generation down
    writes = trainer.args.should_save
    try:
        with written_into(run_folder, writes=writes) as folder, without_bars():
            generation = getattr(core, "generation_config", None)
            if writes and core is not model and generation is not None:  # where it stops, which an adapter does not say
                generation.save_pretrained(folder)
            if is_split(model):
                trainer.check_finite()
                save_split_model(model, folder, dtype, kept, writes=writes)
                if writes:
                    trainer.processing_class.save_pretrained(folder)
            else:
                trainer.save_model(str(folder))
            if trainer.base_fingerprint is not None:
                trainer.base_fingerprint.save(folder)
    except StorageError as error:
        last = trainer.last_checkpoint
        cure = f"Make room, and go on from {last}: the same command with --resume_from_checkpoint."
        if last is None:
            cure = "No checkpoint is there to go on from: make room, and start again, with --save_steps."
        raise UserError(f"the trained model could not be written to {run_folder}: {error}.\n{cure}") from error
    return {
        "class": own_class(core).__name__,
        "parameters": total,
        "trainable_parameters": trained,
        "saved_dtype": str(dtype).removeprefix("torch."),
    }


def check_adapters_moved(model: nn.Module) -> None:
    """Refuses adapters at their initial values: one factor of each starts at zero (B; A for embeddings)."""
    zero_at_start = ("lora_B", "lora_embedding_A")
    factors = [p for name, p in model.named_parameters() if any(part in name for part in zero_at_start)]
    if not sum(whole_tensor(own_part(factor).detach().abs().sum()).item() for factor in factors) > 0:
        raise UserError(
            "nothing was learnt: every lora_B is still zero after training, and is not saved.\n"
            "A learning rate of 0 does this: a run of one step, with --warmup_steps above 0, has no other."
        )


def save_split_model(
    model: nn.Module, folder: Path, dtype: torch.dtype, kept: Collection[str] = (), *, writes: bool
) -> None:
    """Saves a model that FSDP splits as a whole, or its adapters alone. Every process has to call it.

    Args:
        dtype: of the floating-point weights in the file.
        kept: names of weights that keep the type that they have.
        writes: whether this process writes.
    """
    adapters = not isinstance(model, PreTrainedModel)
    state = whole_state(model, trained_only=adapters)
    if not writes:
        return
    for name, value in state.items():
        if value.is_floating_point() and name not in kept:
            state[name] = value.to(dtype)
    if adapters:
        model.save_pretrained(folder, state_dict=state)
        return
    # One that is not split: its class, the type of its weights, and which are tied, go into config.json.
    with torch.device("meta"):
        whole = own_class(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    whole.load_state_dict(state, assign=True)
    whole.tie_weights()
    whole.generation_config = model.generation_config
    whole.save_pretrained(folder)
