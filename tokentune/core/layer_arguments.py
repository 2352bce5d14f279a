"""Which arguments of a layer have a row per token: found out on a tiny copy, and held to on every batch.

    B sequences, S tokens

A shape alone does not tell: a table of 64 numbers looks like one per token wherever a batch is 64 tokens long. So the
tiny copy runs at two lengths, and an argument has a row per token where its second dimension is the length both times.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokentune.core.layers import Stack


def map_tensors(value: Any, function: Callable[[Tensor, str], Any], path: str = "") -> Any:
    """`value` with `function(tensor, path)` in place of each tensor in it; a path is `position_embeddings.0`."""
    if isinstance(value, Tensor):
        return function(value, path)
    if isinstance(value, tuple | list):
        items = [map_tensors(item, function, f"{path}.{place}".lstrip(".")) for place, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: map_tensors(item, function, f"{path}.{key}".lstrip(".")) for key, item in value.items()}
    return value


def has_row_per_token(tensor: Tensor, batch: int, length: int) -> bool:
    """Whether its shape is that of numbers per token, (B or 1, S, ...). A mask (B, H, S, S) is left to attention."""
    mask = tensor.ndim == 4 and tensor.shape[2:] == (length, length)
    return tensor.ndim >= 2 and tensor.shape[1] == length and tensor.shape[0] in (1, batch) and not mask


def arguments_per_token(stack: Stack, run: Callable[[int], Any], batch: int, lengths: Sequence[int]) -> dict[str, bool]:
    """Of each tensor among the layers' arguments, by its path, whether it has a row per token.

    Args:
        run: a forward pass of a batch of so many tokens.
        lengths: to try. One that no layer gets (images have their own) is what the hidden states have.
    """
    found: dict[str, set[bool]] = {}

    def look(layer: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        length = hidden.shape[1]

        def note(tensor: Tensor, path: str) -> None:
            found.setdefault(path, set()).add(has_row_per_token(tensor, batch, length))

        map_tensors(args, note)
        map_tensors(kwargs, note)

    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in stack.layers]
    try:
        for length in lengths:
            run(length)
    finally:
        for handle in handles:
            handle.remove()
    return {path: answers == {True} for path, answers in found.items()}
