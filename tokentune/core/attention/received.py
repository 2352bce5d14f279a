"""The attention that each token receives, without a matrix of all pairs of tokens.

B sequences, S tokens, H heads, G key-value heads, d head size
"""

from typing import Any

import torch
from torch import Tensor, nn

from tokentune.core.attention.masks import read_mask
from tokentune.errors import UnsupportedModelError

_SCORE_BYTES = 64 * 1024**2  # of the attention weights of a block of queries in float32


def attention_received(
    module: nn.Module, query: Tensor, key: Tensor, mask: Any, real: Tensor | None = None, **options: Any
) -> Tensor:
    """The attention that each token receives: the mean over heads of the sum over queries of softmax weights.

    It works on a block of queries at a time, so that the weights of all pairs of tokens are never in memory.

    Args: query (B, H, S, d); key (B, G, S, d); `mask` as the model's attention gets it; real (B, S), 0 at padding,
    whose queries do not count; `options` of the attention call: `scaling`, `softcap` and `s_aux` (sinks) are honoured.
    Returns (B, S) float32.
    """
    if options.get("position_bias") is not None:
        raise UnsupportedModelError(f"{type(module).__name__} passes a position bias, which attention scores leave out")
    batch, heads, length, size = query.shape
    groups, deferred = key.shape[1], read_mask(mask, batch, length)
    scaling = options.get("scaling")
    scaling = size**-0.5 if scaling is None else scaling
    sinks, cap = options.get("s_aux"), options.get("softcap")
    received = query.new_zeros(batch, length).float()
    block = max(1, _SCORE_BYTES // (4 * batch * heads * length))
    for start in range(0, length, block):
        stop = min(start + block, length)
        last = stop if deferred.causal else length
        rows = query[:, :, start:stop].unflatten(1, (groups, -1)).flatten(2, 3)  # (B, G, H / G * n, d)
        weights = rows @ key[:, :, :last].transpose(2, 3)
        weights = weights.view(batch, heads, stop - start, last).float() * scaling
        if cap is not None:
            weights = torch.tanh(weights / cap) * cap
        seen = deferred.visible(torch.arange(start, stop, device=query.device).expand(batch, -1), 0, last)
        smallest = torch.finfo(weights.dtype).min
        weights = weights.masked_fill(~seen, smallest) if seen.dtype == torch.bool else weights + seen
        if sinks is not None:
            columns = sinks.view(1, -1, 1, 1).expand(batch, -1, stop - start, 1).to(weights.dtype)
            weights = torch.cat([weights, columns], dim=-1)
        weights = weights.softmax(-1)[..., :last]
        if real is not None:
            weights = weights * (real[:, None, start:stop, None] != 0)
        received[:, :last] += weights.mean(1).sum(1)
    return received if real is None else received * (real != 0)
