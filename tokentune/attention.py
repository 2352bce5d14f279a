"""Attention of one group of tokens over all tokens: the kernel that runs.

B sequences, S tokens, Q queries of one group, H heads, G key-value heads, d head size.

Inside a selective layer the S keys do not stand in sequence order but as [selected, rest]. Attention does not care, as
long as the mask is made for the same order (`masks.py`); rotary positions were applied before the keys were joined.
"""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokentune.errors import UnsupportedModelError


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, implementation: str, **options
) -> tuple[Tensor, None]:
    """Attention of `query` (B, H, Q, d) over `key`, `value` (B, G, S, d) under the additive `mask` (B, 1 or H, Q, S).

    `implementation` is the model's own choice: `eager` runs the eager function of the model's own file, which knows
    the family's soft-capping, sinks and biases; everything else runs fused scaled-dot-product attention. `options` are
    the keyword arguments of the model's attention call: each one is honored, ignored where transformers' own `sdpa`
    ignores it, or refused. Returns the output (B, Q, H, d), and None in place of attention weights.
    """
    if options.get("position_bias") is not None:
        raise UnsupportedModelError(f"{type(module).__name__} passes a position bias, whose rows follow the sequence")
    if implementation == "eager":
        output, _ = eager_function(module)(module, query, key, value, mask, **options)
        return output, None
    for name in ("softcap", "s_aux"):
        if options.get(name) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} passes `{name}`, which fused attention ignores: "
                'load the model with attn_implementation="eager"'
            )
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and query.device.type != "cpu":
        # With a mask, CUDA's fused kernels know no grouped heads and the fallback would hold all scores in memory.
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        groups = 1
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=options.get("dropout", 0.0),
        scale=options.get("scaling"),
        enable_gqa=groups > 1,
    )
    return output.transpose(1, 2).contiguous(), None


def eager_function(module: nn.Module) -> Callable:
    """The eager attention of the module's own modelling file: (module, query, key, value, mask, **options)."""
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise UnsupportedModelError(f"the file of {type(module).__name__} has no eager attention function")


def compute_dtype(query: Tensor) -> torch.dtype:
    """The dtype that attention over `query` computes in: autocast's where that is on."""
    device = query.device.type
    autocast = query.dtype == torch.float32 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else query.dtype
