"""Query projections that are skipped in a pass which ends at its keys and values."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

QUERY_PROJECTIONS = ("q_proj", "q_b_proj", "query", "q_lin")  # modules whose output becomes queries and nothing else


@contextmanager
def skipped_query_projections(layer: nn.Module) -> Iterator[None]:
    """Within it, the layer's query projections compute nothing.

    They return NaN, so that the verification finds a model whose keys or values are made of queries. Projections that
    draw random numbers, or that have hooks, run as usual.
    """

    def nothing(projection: nn.Module, hidden: Tensor) -> Tensor:
        return hidden.new_full((*hidden.shape[:-1], projection.out_features), torch.nan)

    undo: list[Callable[[], None]] = []
    for name, module in layer.named_modules():
        if name.rpartition(".")[2] in QUERY_PROJECTIONS and hasattr(module, "out_features"):
            parts = list(module.modules())
            if any(part.training and getattr(part, "p", 0) for part in parts) or any(map(_has_hooks, parts)):
                continue
            own = module.__dict__.get("forward")
            undo.append(partial(setattr, module, "forward", own) if own else partial(delattr, module, "forward"))
            module.forward = partial(nothing, module)
    try:
        yield
    finally:
        while undo:
            undo.pop()()


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
