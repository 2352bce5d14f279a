"""FSDP in a run: what it computes in, and saving a model whole whose weights it holds in parts."""

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy

if TYPE_CHECKING:
    from accelerate import Accelerator

import copy
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from tokentune.core.compat.fsdp import own_class, whole_state

if TYPE_CHECKING:
    from transformers import Trainer


def save_split_model(trainer: "Trainer", folder: Path, dtype: torch.dtype, kept: Collection[str] = ()) -> None:
    """Saves the model, or with adapters these alone, and the tokenizer. To be called on every process.

    Args:
        dtype: of the floating-point weights in the file.
        kept: those that stay in the type that they are held in.
    """
    model = trainer.model
    adapters = not isinstance(model, PreTrainedModel)
    state = whole_state(model, trained_only=adapters)
    if not trainer.args.should_save:
        return
    changed = {name: value for name, value in state.items() if value.is_floating_point() and name not in kept}
    state |= {name: value.to(dtype) for name, value in changed.items()}
    if adapters:
        trainer._save(str(folder), state_dict=state)
        return
    # Through a model that is not split: what is written beside the weights (config.json's type of the weights and
    # class, which of them are tied) is read from the model.
    trainer.model = _whole_model(model, state, dtype)
    try:
        trainer._save(str(folder))
    finally:
        trainer.model = model


def _whole_model(model: PreTrainedModel, state: dict[str, Tensor], dtype: torch.dtype) -> PreTrainedModel:
    with torch.device("meta"):
        whole = own_class(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    whole.load_state_dict(state, assign=True)
    whole.tie_weights()
    whole.generation_config = model.generation_config
    return whole


def set_fsdp_policy(accelerator: "Accelerator") -> None:
    """Has FSDP compute in the accelerator's 16 bits, over float32 weights whose gradients are added up in float32.

    accelerate's own policy adds them up in 16 bits, and rounds the loss to them.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    reduce_dtype = None if dtype is None else torch.float32
    plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce_dtype)
    # A layer that is checkpointed returns its states through an identity, a view. Nothing writes into them.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(\w+\) returned a view tensor")
