"""State of a model besides its weights: rotary frequencies that follow the lengths of batches.

transformers' dynamic NTK scaling computes new frequencies whenever a batch is longer than all before, and resets them
only for a batch shorter than the pretraining length. LongRoPE's frequencies follow each batch. A checkpoint of weights
does not contain these numbers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_STATIC = ("default", "linear", "yarn", "llama3", "proportional")  # kinds whose frequencies do not change

State = dict[str, dict[str, Any]]  # by the module's path, then by attribute: a tensor or a number


def rotary_state(model: nn.Module) -> State:
    """The current frequencies, and the lengths that they follow; empty for a model whose frequencies do not change."""
    return {name: _numbers(module) for name, module in model.named_modules() if _follows_lengths(module)}


def set_rotary_state(model: nn.Module, state: State) -> None:
    """Restores what `rotary_state` or `read` returned."""
    modules = dict(model.named_modules())
    for name, numbers in state.items():
        module = modules[name]
        for attribute in _numbers(module).keys() - numbers.keys():  # lengths that exist once they grew
            delattr(module, attribute)
        for attribute, value in numbers.items():
            if attribute in module._buffers:  # a new tensor: the buffer may also be the one of the pretraining length
                module._buffers[attribute] = value.to(module._buffers[attribute].device, copy=True)
            else:
                setattr(module, attribute, value)


@contextmanager
def rotary_state_kept(model: nn.Module) -> Iterator[None]:
    """Within it other batches may run; afterwards the model's frequencies are as before."""
    state = rotary_state(model)
    try:
        yield
    finally:
        set_rotary_state(model, state)


def written(state: State) -> dict[str, dict[str, Any]]:
    """For a JSON file, without loss: Python's numbers are float64, and hold every float32."""

    def write(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}

    return _each_value(state, write)


def read(state: dict[str, dict[str, Any]]) -> State:
    """The reverse of `written`."""

    def restore(value: Any) -> Any:
        return torch.tensor(value["values"], dtype=getattr(torch, value["dtype"])) if isinstance(value, dict) else value

    return _each_value(state, restore)


def _each_value(state: dict[str, dict[str, Any]], function: Callable[[Any], Any]) -> dict[str, dict[str, Any]]:
    return {name: {key: function(value) for key, value in numbers.items()} for name, numbers in state.items()}


def _follows_lengths(module: nn.Module) -> bool:
    """Whether it is a rotary embedding (transformers', or one like it) whose frequencies may change."""
    if "max_seq_len_cached" not in vars(module):
        return False
    kinds = getattr(module, "rope_type", None)
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(kind not in _STATIC for kind in kinds)


def _numbers(module: nn.Module) -> dict[str, Any]:
    buffers = {name: buffer.clone() for name, buffer in module._buffers.items() if buffer is not None}
    plain = {
        name: value.item() if isinstance(value, Tensor) else value  # a length of transformers' own is a tensor
        for name, value in vars(module).items()
        if name.endswith(("seq_len_cached", "attention_scaling")) and isinstance(value, Tensor | int | float)
    }
    return buffers | plain
