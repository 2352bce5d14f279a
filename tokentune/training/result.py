"""What a run leaves: the trained model or adapter, whole or not at all."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer import TRAINING_ARGS_NAME

from tokentune.core.compat.fsdp import is_split, own_class, own_part, size_of, whole_tensor
from tokentune.errors import UserError
from tokentune.models.saved_types import hold_in, kept_in_float32
from tokentune.training.checkpoints.saving import StorageError, written_into
from tokentune.training.split_saving import save_split_model
from tokentune.training.trainer import SelectiveTrainer


def save_result(trainer: SelectiveTrainer, run_folder: Path, saved_dtype: torch.dtype) -> dict[str, Any]:
    """Saves the adapter, or the whole model in `saved_dtype`, and the tokenizer. To be called once, after training.

    Returns:
        `class`, `parameters`, `trainable_parameters` and `saved_dtype` (adapters stay in float32).

    Raises:
        UserError: every adapter is still what it was, so that nothing was learnt.
    """
    model = trainer.model
    trainer.average_weights()
    if isinstance(model, PreTrainedModel):
        parameters = list(model.parameters())
        trained, total = (sum(map(size_of, kind)) for kind in ([p for p in parameters if p.requires_grad], parameters))
        core, dtype = model, saved_dtype
        if not is_split(model):
            hold_in(model, saved_dtype)  # float32 masters are for training; the checkpoint keeps its type and size
    else:
        check_adapters_moved(model)
        trained, total = model.get_nb_trainable_parameters()
        core, dtype = model.get_base_model(), torch.float32
    if trainer.use_cache is not None:
        core.config.use_cache = trainer.use_cache  # off in training; saved off, it would slow every generation down
    writes = trainer.args.should_save
    try:
        with written_into(run_folder, writes=writes) as folder:
            if is_split(model):
                trainer.check_finite()
                kept = kept_in_float32(model, dtype) if isinstance(model, PreTrainedModel) else ()
                save_split_model(model, folder, dtype, kept, writes=writes)
                if writes:
                    trainer.processing_class.save_pretrained(folder)
                    torch.save(trainer.args, folder / TRAINING_ARGS_NAME)
            else:
                trainer.save_model(str(folder))
    except StorageError as error:
        kept = trainer.last_checkpoint
        cure = f"Make room, and go on from {kept}: the same command with --resume_from_checkpoint."
        if kept is None:
            cure = "No checkpoint is there to go on from: make room, and start again, with --save_steps."
        raise UserError(f"the trained model could not be written to {run_folder}: {error}.\n{cure}") from error
    return {
        "class": own_class(core).__name__,
        "parameters": total,
        "trainable_parameters": trained,
        "saved_dtype": str(dtype).removeprefix("torch."),
    }


def check_adapters_moved(model: nn.Module) -> None:
    """Refuses adapters that training left at their start: one factor of each begins at zero (B; A for embeddings)."""
    zero_at_start = ("lora_B", "lora_embedding_A")
    factors = [p for name, p in model.named_parameters() if any(part in name for part in zero_at_start)]
    if not sum(whole_tensor(own_part(factor).detach().abs().sum()).item() for factor in factors) > 0:
        raise UserError(
            "nothing was learnt: every lora_B is still zero after training, and is not saved.\n"
            "A learning rate of 0 does this: a run of one step, with --warmup_steps above 0, has no other."
        )
