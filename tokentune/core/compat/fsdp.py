"""Weights that FSDP (torch's `fully_shard`) holds in parts, one per process: gathering, and saving them whole."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers.integrations import deepspeed


def is_split(model: nn.Module) -> bool:
    """Whether FSDP holds this model's weights in parts."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def runs_together(model: nn.Module) -> bool:
    """Whether each call of a part of the model is one of all processes: FSDP, or DeepSpeed ZeRO-3, gathers its weights.

    A process that makes one call more than the others waits for them for ever.
    """
    return is_split(model) or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def own_part(parameter: Tensor) -> Tensor:
    """What this process has of a weight: all of it, or where DeepSpeed ZeRO-3 has split it, a part."""
    return getattr(parameter, "ds_tensor", parameter)


def size_of(parameter: Tensor) -> int:
    """The numbers in a weight, of which a process may have a part or none."""
    return getattr(parameter, "ds_numel", parameter.numel())


def own_class(model: nn.Module) -> type[nn.Module]:
    """The class of a model, without the one that FSDP derives from it."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


@contextmanager
def made_whole() -> Iterator[None]:
    """Within it the models that are made have all their weights: DeepSpeed ZeRO-3 splits any that transformers makes.

    For those without data and for tiny ones, which flags and layers are checked on.
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
    """Within it a module that is run outside of its turn has its weights whole; afterwards too where it `stays`."""
    split = isinstance(module, FSDPModule)
    if split:
        module.unshard()
    try:
        yield
    finally:
        if split and not stays:
            module.reshard()


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that may be split; to be called on every process."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_state(model: nn.Module, *, trained_only: bool = False) -> dict[str, Tensor]:
    """The weights of a split model on the CPU of the first process, one after the other; on others nothing.

    To be called on every process.

    Args:
        trained_only: leave the frozen ones out.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    return get_model_state_dict(model, options=options)
