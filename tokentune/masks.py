"""Attention masks of one group of tokens over all tokens, made when they are needed.

B sequences, S tokens, Q queries of one group, H heads.

Masks come from transformers' own mask functions, so that sliding windows, chunks, packing and padding mean what they
always mean; they are evaluated for one group's rows at a time and for keys in the order [selected, rest], once per
step and not once per layer.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from tokentune.errors import UnsupportedModelError


class MaskRecipe:
    """How to make an attention mask: what transformers' mask functions return during a selective forward.

    It travels through the model where a mask would. Each group's rows of the mask are made when the first layer asks
    for them and shared by all other layers that were handed the same recipe.
    """

    def __init__(self, visible: Callable[[Tensor, Tensor], Tensor]):
        """`visible(queries (B, Q), keys (B, S))` -> (B, 1 or H, Q, S), bool (True: attended) or additive float."""
        self._visible = visible
        self._made: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def rows(self, group: str, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
        """The additive mask (B, 1 or H, Q, S) of `group`, whose tokens stand at positions `queries` (B, Q).

        Additive and in the `dtype` that attention computes in, because any other mask is converted anew by each
        layer's kernel, and every one of those copies would be kept for the backward pass.
        """
        key = group, dtype, queries.device
        if key not in self._made:
            mask = self._visible(queries, keys)
            if mask.dtype == torch.bool:
                # The smallest finite number, not -inf: a padding row that sees nothing must not turn into NaN.
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
            self._made[key] = _aligned(mask.to(dtype))
        return self._made[key]


def _aligned(mask: Tensor) -> Tensor:
    """The same mask in rows of a multiple of 16 numbers: CUDA's kernels copy any other one, in each layer."""
    if mask.device.type == "cpu" or mask.shape[-1] % 16 == 0:
        return mask
    wide = mask.new_empty(*mask.shape[:-1], -(-mask.shape[-1] // 16) * 16)
    wide[..., : mask.shape[-1]] = mask
    return wide[..., : mask.shape[-1]]


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
