"""Attention of one group of tokens over all tokens: which kernel runs, and how.

B sequences, S tokens, Q queries of one group, H heads, G key-value heads, d head size.

The queries of a group are not consecutive tokens; the S keys are all tokens, in sequence order. Rotary embeddings were
applied before the keys were joined, and the mask (`attention/masks.py`) has the position of each query.
"""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.flex_attention import flex_attention_forward

from tokentune.core.attention import blockwise as blocks
from tokentune.core.attention import correction
from tokentune.core.attention.correction import OwnTokens
from tokentune.core.attention.masks import GroupMask
from tokentune.errors import UnsupportedModelError

IMPLEMENTATIONS = ("sdpa", "flex_attention", "eager")  # what `attn_implementation` may name


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: GroupMask | None,
    implementation: str,
    own: OwnTokens | None = None,
    **options,
) -> tuple[Tensor, None]:
    """Attention of `query` (B, H, Q, d) over `key`, `value` (B, G, S, d); without a mask, every query sees every key.

    Args:
        implementation: the model's own choice. `eager` runs the eager function of the model's own file, which has the
            family's soft-capping, sinks and biases; `flex_attention` runs transformers' function of that name.
        own: the queries' own tokens, where the gradients of their keys and values are scaled (`correction.py`).
        options: of the model's attention call. Each is honored, ignored where transformers' `sdpa` ignores it, or
            refused.

    Returns the output (B, Q, H, d), and None in place of attention weights.
    """
    require_served(implementation, query.device)
    if options.get("position_bias") is not None:
        raise UnsupportedModelError(f"{type(module).__name__} passes a position bias, whose rows follow the sequence")
    if own is not None:
        correction.require_correctable_call(module, mask, implementation, options)
    dtype, weights, sums = compute_dtype(query), None, None
    if implementation == "eager":
        additive = None if mask is None else mask.additive(dtype)
        output, weights = eager_function(module)(module, query, key, value, additive, **options)
    else:
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        if implementation == "flex_attention":
            block_mask = None if mask is None else mask.block_mask()
            output, _ = flex_attention_forward(module, query, key, value, block_mask, **options)
        else:
            output, sums = _fused(module, (query, key, value), mask, own is not None, options)
    if own is not None:
        output = correction.correct(output, weights, sums, (query, key, value), mask, own, options)
    return output, None


def require_served(implementation: str, device: torch.device | str) -> None:
    """Raises UnsupportedModelError for an attention implementation that cannot attend for one group of tokens."""
    device = torch.device(device).type
    if implementation not in IMPLEMENTATIONS:
        raise UnsupportedModelError(
            f'attn_implementation="{implementation}" cannot attend for selected tokens alone, whose positions have '
            'gaps that its kernels take no mask for: load the model with "sdpa", "eager" or, on a GPU, "flex_attention"'
        )
    if implementation == "flex_attention" and device == "cpu":
        raise UnsupportedModelError(
            'attn_implementation="flex_attention" has no backward pass on CPUs: load the model with "sdpa" or "eager"'
        )


def _fused(
    module: nn.Module, operands: blocks.Operands, mask: GroupMask | None, with_sums: bool, options: dict
) -> tuple[Tensor, Tensor | None]:
    """Fused attention -> (B, Q, H, d): over blocks of queries, or in one call where blocks bring nothing.

    One call serves attention without a mask, or with one mask row for all queries (padding alone), and dropout, which
    on CPUs has all scores (B, H, Q, S) in memory, as without a selection. `with_sums`: see `attend_by_blocks`.
    """
    for name in ("softcap", "s_aux"):
        if options.get(name) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} passes `{name}`, which fused attention ignores: "
                'load the model with attn_implementation="eager"'
            )
    query, key, value = operands
    dropout, scaling = options.get("dropout", 0.0), options.get("scaling")
    heads = query.shape[1] // key.shape[1]
    if mask is not None and dropout == 0.0 and _in_blocks(query, heads, mask):
        return blocks.attend_by_blocks(query, key, value, mask, scaling, with_sums=with_sums)
    additive = None if mask is None else mask.additive(query.dtype)
    if heads > 1 and not blocks.takes_grouped_heads(query, key, value, additive):
        key, value = key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1)
        heads = 1
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=additive, dropout_p=dropout, scale=scaling, enable_gqa=heads > 1
    )
    return output.transpose(1, 2).contiguous(), None


def _in_blocks(query: Tensor, heads: int, mask: GroupMask) -> bool:
    if query.device.type == "cpu":
        return not mask.deferred.alike
    if query.device.type != "cuda":
        return False
    long = len(query) * mask.length**2 > blocks.CUDA_MASK_NUMBERS
    return heads > 1 or (long and not mask.deferred.alike)


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
