"""Weights that FSDP (torch's `fully_shard`) splits over the processes: gathering them, and saving them whole."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers.integrations import deepspeed


def is_split(model: nn.Module) -> bool:
    """Whether FSDP splits this model's weights."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def runs_together(model: nn.Module) -> bool:
    """Whether all processes must call each part of the model together: FSDP, or DeepSpeed ZeRO-3, gathers its weights.

    A process that makes one call more than the others waits without end.
    """
    return is_split(model) or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def own_part(parameter: Tensor) -> Tensor:
    """What this process has of a weight: all of it, or a part where DeepSpeed ZeRO-3 has split it."""
    return getattr(parameter, "ds_tensor", parameter)


def size_of(parameter: Tensor) -> int:
    """The number of elements of a weight, of which this process may have a part or none."""
    return getattr(parameter, "ds_numel", parameter.numel())


def own_class(model: nn.Module) -> type[nn.Module]:
    """The class of a model, without the one that FSDP derives from it."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


@contextmanager
def made_whole() -> Iterator[None]:
    """Within it new models have whole weights: DeepSpeed ZeRO-3 splits every model that transformers makes.

    For models without data and tiny ones, on which flags and layers are checked.
    """
    known = deepspeed._hf_deepspeed_config_weak_ref
    config = None if known is None else known()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


@contextmanager
def gathered(module: nn.Module, *, stays: bool = True) -> Iterator[None]:
    """Within it a module that runs outside of FSDP's order has whole weights; afterwards too where it `stays`."""
    split = isinstance(module, FSDPModule)
    if split:
        module.unshard()
    try:
        yield
    finally:
        if split and not stays:
            module.reshard()


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be split. Every process has to call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_state(model: nn.Module, *, trained_only: bool = False) -> dict[str, Tensor]:
    """The weights of a split model, or the trained ones, gathered one by one on the CPU of the first process.

    Every process has to call it; on the others it is empty.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    return get_model_state_dict(model, options=options)
