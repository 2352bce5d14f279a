"""A less biased gradient: paths between selected tokens also count for paths through tokens that were not drawn.

    B sequences, S tokens, K selected, H heads, G key-value heads, d head size
    pi_j  the probability with which token j was selected, independently of all other tokens

Keys and values of the unselected tokens are constants. So of all paths from a token's loss back through the layers,
only those count that visit selected tokens alone: the expected gradient is too small, and has another direction.
A path begins at the loss of a token i, stays on i through any number of layers, goes to a token j ≠ i where i attends
to j, and so on. In a causal model its positions never increase: it visits each token in one stretch. As draws are
independent, all its tokens i, j, ... are selected with probability pi_i pi_j ..., and its expectation is the whole path
where

    the loss of i is weighted by 1 / pi_i                                          (`sampling/sampler.py`)
    the gradient that reaches j through the attention of another token is scaled by s_j = pi_j ** -a,  a = 1

and nothing else is scaled: exact for any number of layers. `gradient_correction` is a; 0 is the paper's method, and
between 0 and 1 it trades bias for variance. The forward pass does not change.

Attention kernels cannot do that. So the whole gradient of keys and values is scaled, and then each token's own path is
corrected. With o_i the output of head h at query i, p_ii its weight of its own key, g_i the gradient of
o_i, and q_i, k_i, v_i the token's query, key and value:

    gradient of v_i   += sum over the group's heads of  (1 - s_i) p_ii g_i
    gradient of k_i   += sum over the group's heads of  (1 - s_i) p_ii slope <g_i, v_i - o_i> q_i

where `slope`, the derivative of a score by the product <q_i, k_i>, is attention's scaling (the other
factors are the derivative of the softmax). Saved for it are the p_ii, (B, H, K) numbers in float32 per layer; attention
saves all else already.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tokentune.core.attention.masks import GroupMask
from tokentune.core.layers import Stack, attention_modules
from tokentune.errors import UnsupportedModelError

SCORE_NUMBERS = 2**24  # most (query, key) pairs in one block of `score_sums`: 64 MiB in float32


def require_correctable(exponent: float, stack: Stack) -> None:
    """Raises ValueError for an exponent that is no number from 0 to 1, and UnsupportedModelError for a model in which
    tokens see later ones, or attention drops weights at random.
    """
    if not 0.0 <= exponent <= 1.0:
        raise ValueError(f"gradient_correction must be a number from 0 to 1, not {exponent}")
    if exponent == 0.0:
        return
    for module in attention_modules(stack.layers):
        if not getattr(module, "is_causal", False):
            raise UnsupportedModelError(
                f"gradient_correction serves causal attention: in {type(module).__name__} tokens see one another "
                "both ways, so that a path may come back to a token that it was scaled for already"
            )
        dropout = getattr(module, "attention_dropout", 0.0)
        if isinstance(dropout, float):
            _require_no_dropout(module, dropout)


def require_correctable_call(module: nn.Module, mask: GroupMask | None, implementation: str, options: dict) -> None:
    """Raises UnsupportedModelError for an attention call in which a token's weight of itself cannot be known."""
    name = type(module).__name__
    if mask is None:
        raise UnsupportedModelError(f"gradient_correction: {name} lets every token see every other")
    _require_no_dropout(module, options.get("dropout") or 0.0)
    for option in ("softcap", "s_aux"):
        if implementation != "eager" and options.get(option) is not None:
            raise UnsupportedModelError(
                f'gradient_correction: {name} passes `{option}`: load the model with attn_implementation="eager"'
            )


def _require_no_dropout(module: nn.Module, dropout: float) -> None:
    if dropout > 0.0:
        raise UnsupportedModelError(
            f"gradient_correction needs each token's weight of itself, which the attention dropout ({dropout}) of "
            f"{type(module).__name__} changes at random: set `attention_dropout` to 0 in the model's configuration"
        )


class OwnTokens(NamedTuple):
    """The selected tokens of an attention call: their keys and values before their gradients are scaled."""

    key: Tensor  # (B, G, K, d)
    value: Tensor  # (B, G, K, d)
    scales: Tensor  # (B, K)
    flat_indices: Tensor  # (B K,): their rows among the B S of all sequences
    positions: Tensor  # (B, K)


class _ScaleGradient(torch.autograd.Function):
    """The same keys or values (B, G, K, d), or rows (B, K, D); their gradient is multiplied by `scales` (B, K)."""

    @staticmethod
    def forward(ctx, tokens: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(scales)
        return tokens.view_as(tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        scales = ctx.saved_tensors[0].to(gradient.device, _wide(gradient))
        scales = scales.view(len(scales), *(1,) * (gradient.ndim - 3), -1, 1)
        return (gradient * scales).to(gradient.dtype), None


scale_gradient = _ScaleGradient.apply


class _OwnPaths(torch.autograd.Function):
    """The identity on attention's output (B, K, H, d); its backward pass corrects each token's path to itself.

    Args of `apply`: the scores' scaling; the output; the tokens' own key and value (B, G, K, d); query (B, H, K, d) and
    value (B, G, S, d) as attention took them; the queries' weights of their own keys, (B, H, K), in float32 or wider;
    scales and flat_indices; the derivative of soft-capping at the own scores, (B, H, K), or None.
    """

    @staticmethod
    def forward(ctx, scaling: float, output: Tensor, own_key: Tensor, own_value: Tensor, *others: Tensor) -> Tensor:
        ctx.scaling, ctx.dtypes = scaling, (own_key.dtype, own_value.dtype)
        ctx.save_for_backward(output, *others)
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        output, query, value, weights, scales, flat_indices, damping = ctx.saved_tensors
        wide, by_group = weights.dtype, (value.shape[1], -1)  # the heads (H,) of each group: (G, h)
        excess = weights.transpose(1, 2) * (1 - scales.to(gradient.device, wide))[..., None]  # (B, K, H)
        of_output = gradient.to(wide).unflatten(2, by_group)  # (B, K, G, h, d)
        of_key = of_value = None
        # Products and sums, not matrix products, which autocast would round.
        if ctx.needs_input_grad[3]:
            of_value = (excess.unflatten(2, by_group)[..., None] * of_output).sum(3)  # (B, K, G, d)
            of_value = of_value.transpose(1, 2).to(ctx.dtypes[1])
        if ctx.needs_input_grad[2]:
            values = _rows(value, flat_indices, scales.shape)[:, :, :, None].to(wide)  # (B, K, G, 1, d)
            of_score = (of_output * (values - output.unflatten(2, by_group))).sum(-1)  # (B, K, G, h)
            slope = excess * ctx.scaling if damping is None else excess * ctx.scaling * damping.transpose(1, 2)
            of_score = of_score * slope.unflatten(2, by_group)
            queries = query.transpose(1, 2).unflatten(2, by_group).to(wide)
            of_key = (of_score[..., None] * queries).sum(3).transpose(1, 2).to(ctx.dtypes[0])
        return None, gradient, of_key, of_value, None, None, None, None, None, None


def correct(
    output: Tensor,
    weights: Tensor | None,  # (B, H, K, S), of eager attention, which may have soft-capping and sinks; None: fused
    sums: Tensor | None,  # the logarithms of the softmax's sums (B, H, K), of a fused kernel that returns them
    operands: tuple[Tensor, Tensor, Tensor],  # query, key and value, as attention took them
    mask: GroupMask,
    own: OwnTokens,
    options: dict,
) -> Tensor:
    """The output (B, K, H, d) of attention over scaled keys and values, its own-token paths unscaled."""
    query, key, value = operands
    scaling, softcap, damping = _scaling(query, options), options.get("softcap"), None
    with torch.no_grad():
        if weights is None:
            weights = fused_weights(sums, query, key, mask, own, scaling)
        else:
            weights = weights.take_along_dim(own.positions[:, None, :, None], 3)[..., 0].to(_wide(weights))
            if softcap is not None:
                damping = 1 - torch.tanh(_own_scores(query, key, scaling, own) / softcap) ** 2
    tensors = output, own.key, own.value, query, value, weights, own.scales, own.flat_indices, damping
    return _OwnPaths.apply(scaling, *tensors)


def fused_weights(
    sums: Tensor | None, query: Tensor, key: Tensor, mask: GroupMask, own: OwnTokens, scaling: float
) -> Tensor:
    """The queries' weights of their own keys, (B, H, K). `sums` are computed here where the kernel returned none."""
    if sums is None:
        sums = score_sums(query, key, mask, scaling)
    scores = _own_scores(query, key, scaling, own)
    if not hasattr(mask.deferred.visible, "mask_function"):  # a finished mask; by a function, a token sees itself
        rows = mask.rows(mask.positions, 0, mask.length, scores.dtype)
        scores = scores + rows.take_along_dim(own.positions[:, None, :, None], 3)[..., 0]
    # A padding query may see no key at all, not even itself; its result means nothing, but has to be finite.
    return (scores - sums).clamp(max=0.0).exp()


def _scaling(query: Tensor, options: dict) -> float:
    scaling = options.get("scaling")
    return query.shape[-1] ** -0.5 if scaling is None else scaling


def _own_scores(query: Tensor, key: Tensor, scaling: float, own: OwnTokens) -> Tensor:
    """Scaled products of each selected query (B, H, K, d) and its own key, of (B, G, S, d): (B, H, K), wide."""
    queries = query.unflatten(1, (key.shape[1], -1)).to(_wide(query))  # (B, G, h, K, d)
    keys = _rows(key, own.flat_indices, own.positions.shape).transpose(1, 2)[:, :, None].to(queries.dtype)
    return (queries * keys).sum(-1).flatten(1, 2) * scaling


def score_sums(query: Tensor, key: Tensor, mask: GroupMask, scaling: float) -> Tensor:
    """The logarithms of the softmax's sums (B, H, K), over blocks of queries: no matrix of all pairs of tokens."""
    batch, heads, count, _ = query.shape
    wide, groups = _wide(query), key.shape[1]
    keys = key.to(wide).transpose(2, 3)  # (B, G, d, S)
    block = max(1, SCORE_NUMBERS // (batch * heads * key.shape[2]))
    found = []
    for span in mask.spans(min(block, count)):
        queries = query[:, :, span.start : span.stop].to(wide).unflatten(1, (groups, -1)).flatten(2, 3)
        with torch.autocast(query.device.type, enabled=False):
            scores = queries @ keys[..., span.first : span.last] * scaling  # (B, G, h n, keys)
        scores = scores.unflatten(2, (heads // groups, -1)).flatten(1, 2)  # (B, H, n, keys)
        piece = mask.piece(span, wide)
        found.append((scores if piece is None else scores + piece).logsumexp(-1))
    return torch.cat(found, dim=2)


def _rows(tokens: Tensor, flat_indices: Tensor, shape: torch.Size) -> Tensor:
    """The selected ones (B, K, G, d) of all tokens' keys or values (B, G, S, d)."""
    return tokens.transpose(1, 2).flatten(0, 1).index_select(0, flat_indices).unflatten(0, shape)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
