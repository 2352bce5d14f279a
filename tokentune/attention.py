"""Attention of one group of tokens over all tokens: the group's mask and the kernel that runs.

B sequences, S tokens, Q queries of one group, H heads, G key-value heads, d head size.

Inside a selective layer the S keys do not stand in sequence order but as [selected, rest]. Attention does not care, as
long as the mask is made for the same order; rotary positions were applied before the keys were joined. Masks come from
transformers' own mask functions, so that sliding windows, chunks, packing and padding mean what they always mean; they
are evaluated for one group's rows at a time, once per step, never for all S x S pairs.
"""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

IMPLEMENTATION = "tokentune"  # the name under which attention and masks are registered with transformers


class UnsupportedModelError(ValueError):
    """The model cannot be served exactly. The message says which part of it, and why."""


class MaskRecipe:
    """How to make an attention mask: what transformers' mask functions return during a selective forward.

    It travels through the model where a (B, 1, S, S) mask would. Each group's rows of the mask are made when the first
    layer asks for them and shared by all other layers that were handed the same recipe.
    """

    def __init__(self, visible: Callable[[Tensor, Tensor], Tensor]):
        """`visible(queries (B, Q), keys (B, S))` -> (B, 1 or H, Q, S), bool (True: attended) or additive float."""
        self._visible = visible
        self._made: dict[tuple[str, torch.dtype], Tensor] = {}

    def rows(self, group: str, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
        """The additive mask (B, 1 or H, Q, S) of `group`, whose tokens stand at positions `queries` (B, Q).

        Additive and in the dtype of the queries, because a boolean mask is converted anew inside each layer's
        kernel, and every one of those copies would be kept for the backward pass.
        """
        if (group, dtype) not in self._made:
            mask = self._visible(queries, keys)
            if mask.dtype == torch.bool:
                # The smallest finite number, not -inf: a padding row that sees nothing must not turn into NaN.
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
            self._made[group, dtype] = mask.to(dtype)
        return self._made[group, dtype]


def recipe_from_functions(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | None = None,
    **_: object,
) -> MaskRecipe | None:
    """The mask interface of transformers (`AttentionMaskInterface`), making a recipe instead of a mask.

    Args follow `transformers.masking_utils.sdpa_mask`; `attention_mask` is (B, S), True at real tokens. None means that
    every token sees every token. Raises UnsupportedModelError when the keys are not exactly the queries' tokens.
    """
    if q_length != kv_length or not isinstance(q_offset, int) or q_offset or kv_offset:
        raise UnsupportedModelError(
            f"a mask over {kv_length} keys for {q_length} queries was asked for: selective backpropagation serves "
            "self-attention over one whole sequence, without a key-value cache and without cross-attention"
        )
    # Reading the mask's values would synchronize an accelerator; there it is kept even where it hides nothing.
    if attention_mask is not None and attention_mask.device.type == "cpu" and bool(attention_mask.all()):
        attention_mask = None
    if mask_function is bidirectional_mask_function and attention_mask is None:
        return None
    if use_vmap:  # a caller's own mask function, not known to broadcast over index tensors
        mask = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            use_vmap=True,
            device=device,
        )
        return recipe_from_mask(mask)

    def visible(queries: Tensor, keys: Tensor) -> Tensor:
        rows = torch.arange(batch_size, device=queries.device)[:, None, None, None]
        heads = torch.zeros((1, 1, 1, 1), dtype=torch.long, device=queries.device)
        seen = mask_function(rows, heads, queries[:, None, :, None], keys[:, None, None, :])
        if attention_mask is not None:
            seen = seen & attention_mask.to(queries.device)[rows, keys[:, None, None, :]]
        return seen.expand(batch_size, 1, queries.shape[1], keys.shape[1])

    return MaskRecipe(visible)


def recipe_from_mask(mask: Tensor) -> MaskRecipe:
    """The recipe that gathers from a finished mask (B or 1, H or 1, S, S), bool or additive, in sequence order."""

    def visible(queries: Tensor, keys: Tensor) -> Tensor:
        full = mask.to(queries.device).expand(queries.shape[0], -1, -1, -1)
        rows = full.take_along_dim(queries[:, None, :, None], dim=2)
        return rows.take_along_dim(keys[:, None, None, :], dim=3)

    return MaskRecipe(visible)


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
