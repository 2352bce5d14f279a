"""FSDP in a run: what it computes in, and saving a model whole whose weights it holds in parts."""

import copy
import warnings
from collections.abc import Collection
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel

from tokentune.core.compat.fsdp import own_class, whole_state


def save_split_model(
    model: nn.Module, folder: Path, dtype: torch.dtype, kept: Collection[str] = (), *, writes: bool
) -> None:
    """Saves the model, or with adapters these alone. To be called on every process.

    Args:
        dtype: of the floating-point weights in the file.
        kept: those that stay in the type that they are held in.
        writes: whether this process writes.
    """
    adapters = not isinstance(model, PreTrainedModel)
    state = whole_state(model, trained_only=adapters)
    if not writes:
        return
    changed = {name: value for name, value in state.items() if value.is_floating_point() and name not in kept}
    state |= {name: value.to(dtype) for name, value in changed.items()}
    if adapters:
        model.save_pretrained(folder, state_dict=state)
    else:
        _whole_model(model, state, dtype).save_pretrained(folder)


def _whole_model(model: PreTrainedModel, state: dict[str, Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """One that is not split: config.json's class and type of the weights, and which are tied, are read from it."""
    with torch.device("meta"):
        whole = own_class(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    whole.load_state_dict(state, assign=True)
    whole.tie_weights()
    whole.generation_config = model.generation_config
    return whole


def set_fsdp_policy(accelerator: Accelerator) -> None:
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
