"""Query projections that are skipped in a pass which ends at its keys and values."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from tokentune.core.temporary import set_until_undone

QUERY_PROJECTIONS = ("q_proj", "q_b_proj", "query", "q_lin")  # modules whose output becomes queries and nothing else


@contextmanager
def skipped_query_projections(layer: nn.Module) -> Iterator[None]:
    """Within it, the layer's query projections compute nothing.

    They return NaN, so that the verification finds a model whose keys or values are made of queries. Projections that
    draw random numbers, or that have hooks, run as usual.
    """

    def nothing(projection: nn.Module, hidden: Tensor) -> Tensor:
        return hidden.new_full((*hidden.shape[:-1], projection.out_features), torch.nan)

    with ExitStack() as undo:
        for name, module in layer.named_modules():
            makes_queries = name.rpartition(".")[2] in QUERY_PROJECTIONS and hasattr(module, "out_features")
            if makes_queries and not any(map(_draws_or_has_hooks, module.modules())):
                set_until_undone(undo, module, "forward", partial(nothing, module))
        yield


def _draws_or_has_hooks(module: nn.Module) -> bool:
    draws = module.training and getattr(module, "p", 0)
    return bool(draws or module._forward_hooks or module._forward_pre_hooks)
