"""Attention masks of one group of tokens over all tokens, made when they are needed.

B sequences, S tokens, Q queries of one group, H heads.

Masks come from transformers' own mask functions, so that sliding windows, chunks, packing and padding keep their
meaning. A `DeferredMask` passes through the model in place of a mask. Each kind of attention takes from it what the
queries of one group need: all rows, made once per step; parts of them for a block of queries, made and freed in each
layer, so that S x S numbers are never in memory; or FlexAttention's block mask.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.nn.attention.flex_attention import create_block_mask
from transformers.masking_utils import and_masks, bidirectional_mask_function, causal_mask_function, sdpa_mask

from tokentune.errors import UnsupportedModelError


class Span(NamedTuple):
    """A block of queries, and the keys that at least one of them sees."""

    start: int
    stop: int  # the queries start:stop of the group
    first: int
    last: int  # the keys first:last of the sequence
    open_from: int
    open_to: int  # a run of keys, within first:last, that every one of the queries sees


@dataclass(eq=False)
class DeferredMask:
    """An attention mask, made when it is needed: what transformers' mask functions return in a selective forward.

    It passes through the model in place of a mask. What is made of it is shared by all layers that get it.
    """

    # (queries (B, Q), first, last) -> (B, 1 or H, Q, last - first), bool (True: seen) or additive float
    visible: Callable[[Tensor, int, int], Tensor]
    triangle: bool = False  # it is exactly the causal mask
    causal: bool = False  # no query sees a key after its own position
    alike: bool = False  # all queries of a sequence see the same keys
    made: dict[tuple, object] = field(default_factory=dict)  # by group, then by dtype, block size or kind

    def forget(self, group: str) -> None:
        """Frees the finished masks of `group`."""
        self.made = {key: made for key, made in self.made.items() if key[0] != group or not isinstance(made, Tensor)}


@dataclass
class GroupMask:
    """A deferred mask for the queries of one group, whose positions (B, Q) are ascending."""

    deferred: DeferredMask
    group: str
    positions: Tensor
    length: int  # S

    def _once(self, make: Callable[[], object], *key: object) -> object:
        key = (self.group, *key, self.positions.device)
        if key not in self.deferred.made:
            self.deferred.made[key] = make()
        return self.deferred.made[key]

    def additive(self, dtype: torch.dtype) -> Tensor:
        """All rows as an additive mask (B, 1 or H, Q, S). Where all rows are alike, one of them is stored.

        It has the `dtype` that attention computes in: each layer's kernel would convert any other mask, and each of
        these copies would be saved for the backward pass.
        """

        def make() -> Tensor:
            queries = self.positions[:, :1] if self.deferred.alike else self.positions
            return self.rows(queries, 0, self.length, dtype)

        return self._once(make, dtype).expand(-1, -1, self.positions.shape[1], -1)

    def rows(self, queries: Tensor, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """The additive mask of queries at these positions (B, n) over the keys first:last."""
        return _aligned(_additive(self.deferred.visible(queries, first, last), dtype))

    def spans(self, block: int) -> list[Span]:
        """The group's queries in blocks of `block`, with the keys that each block sees."""
        return self._once(lambda: self._find_spans(block), block)

    def _find_spans(self, block: int) -> list[Span]:
        count = self.positions.shape[1]
        starts = range(0, count, block)
        stops = [min(start + block, count) for start in starts]
        # Reading positions makes the host wait for an accelerator: once per step, and only where keys can be left out.
        host = self.positions.device.type == "cpu"
        if not _readable(self.positions) or (count <= block and not host):
            return [Span(start, stop, 0, self.length, 0, 0) for start, stop in zip(starts, stops, strict=True)]
        lowest = self.positions[:, list(starts)].amin(0).tolist()
        highest = self.positions[:, [stop - 1 for stop in stops]].amax(0).tolist()
        spans = []
        for start, stop, low, high in zip(starts, stops, lowest, highest, strict=True):
            last = high + 1 if self.deferred.causal else self.length
            extents = 0, last, 0, low + 1 if self.deferred.triangle else 0
            if host and not self.deferred.triangle:
                extents = _extents(self.deferred.visible(self.positions[:, start:stop], 0, last))
            spans.append(Span(start, stop, *extents))
        return spans

    def piece(self, span: Span, dtype: torch.dtype) -> Tensor | None:
        """The additive mask (B, 1 or H, n, last - first) of one block; None where it hides nothing.

        Only keys outside of the open run are computed, which is a small part of a causal mask.
        """
        queries = self.positions[:, span.start : span.stop]
        edges = [(span.first, span.open_from), (span.open_to, span.last)]
        edges = [(first, last) for first, last in edges if first < last]
        if not edges:
            return None
        if span.open_from == span.open_to:
            return self.rows(queries, span.first, span.last, dtype)
        parts = [(first, last, self.deferred.visible(queries, first, last)) for first, last in edges]
        heads = parts[0][2].shape[1]
        mask = queries.new_zeros(len(queries), heads, queries.shape[1], span.last - span.first, dtype=dtype)
        for first, last, seen in parts:
            mask[..., first - span.first : last - span.first] = _additive(seen, dtype)
        return _aligned(mask)

    def block_mask(self) -> object:
        """FlexAttention's `BlockMask`, made once per step: which tiles of (Q, S) are visible, and how."""
        function = getattr(self.deferred.visible, "mask_function", None)
        if function is None:
            raise UnsupportedModelError(
                "flex_attention was handed a finished mask, which holds one number for every pair of tokens: "
                'load the model with attn_implementation="sdpa"'
            )
        positions = self.positions

        def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return function(batch, head, positions[batch, query], key)

        # Uncompiled, it briefly has the whole mask in memory.
        options = {"device": positions.device, "_compile": positions.device.type != "cpu"}
        sizes = {"B": positions.shape[0], "H": None, "Q_LEN": positions.shape[1], "KV_LEN": self.length}
        return self._once(lambda: create_block_mask(mask_mod, **sizes, **options), "flex")


def _readable(positions: Tensor) -> bool:
    """Whether the positions have values: fake tensors, with which memory is estimated, have none."""
    return not (positions.is_meta or is_fake(positions))


def _extents(seen: Tensor) -> tuple[int, int, int, int]:
    """Of (B, 1 or H, n, W): the range of keys that any query sees, and the longest run in it that all queries see."""
    width = seen.shape[-1]
    if seen.dtype != torch.bool:  # a bias may be any number, so all of it is needed
        return 0, width, 0, 0
    keys = seen.flatten(0, 2).any(0).nonzero()
    if len(keys) == 0:  # padding only: the result means nothing, but has to be finite
        return 0, 1, 0, 0
    first, last = int(keys[0]), int(keys[-1]) + 1
    gaps = (~seen[..., first:last].flatten(0, 2).all(0)).nonzero().flatten()
    gaps = torch.cat([gaps.new_tensor([-1]), gaps, gaps.new_tensor([last - first])])
    run = int(gaps.diff().argmax())
    return first, last, first + int(gaps[run]) + 1, first + int(gaps[run + 1])


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        # The smallest finite number, not -inf: a padding row that sees nothing must not become NaN.
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
    return mask.to(dtype)


def _aligned(mask: Tensor) -> Tensor:
    """The same mask, with rows of a multiple of 16 numbers: CUDA's kernels copy any other mask in each layer."""
    if mask.device.type == "cpu" or mask.shape[-1] % 16 == 0:
        return mask
    wide = mask.new_empty(*mask.shape[:-1], -(-mask.shape[-1] // 16) * 16)
    wide[..., : mask.shape[-1]] = mask
    return wide[..., : mask.shape[-1]]


def mask_from_functions(
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
) -> DeferredMask | None:
    """The mask interface of transformers (`AttentionMaskInterface`), which makes a deferred mask.

    Args follow `transformers.masking_utils.sdpa_mask`; `attention_mask` is (B, S), True at real tokens. None means that
    every token sees every token. Raises UnsupportedModelError when the keys are not exactly the queries' tokens.
    """
    if q_length != kv_length or not isinstance(q_offset, int) or q_offset or kv_offset:
        raise UnsupportedModelError(
            f"a mask over {kv_length} keys for {q_length} queries was asked for: selective backpropagation serves "
            "self-attention over one whole sequence, without a key-value cache and without cross-attention"
        )
    # Reading the mask's values would synchronize an accelerator: there it is used even where it hides nothing.
    if attention_mask is not None and attention_mask.device.type == "cpu" and bool(attention_mask.all()):
        attention_mask = None
    if mask_function is bidirectional_mask_function and attention_mask is None:
        return None
    if use_vmap:  # a caller's own mask function, which may not broadcast over index tensors
        options = {"mask_function": mask_function, "attention_mask": attention_mask, "device": device}
        full = sdpa_mask(batch_size, q_length, kv_length, allow_is_causal_skip=False, use_vmap=True, **options)
        return mask_from_tensor(full)

    def seen(rows: Tensor, heads: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        found = mask_function(rows, heads, queries, keys)
        return found if attention_mask is None else found & attention_mask.to(queries.device)[rows, keys]

    def visible(queries: Tensor, first: int, last: int) -> Tensor:
        rows = torch.arange(batch_size, device=queries.device)[:, None, None, None]
        heads = torch.zeros((1, 1, 1, 1), dtype=torch.long, device=queries.device)
        keys = torch.arange(first, last, device=queries.device)[None, None, None]
        found = seen(rows, heads, queries[:, None, :, None], keys)
        return found.expand(batch_size, 1, queries.shape[1], last - first)

    visible.mask_function = seen
    return DeferredMask(
        visible,
        triangle=mask_function is causal_mask_function and attention_mask is None,
        causal=_is_causal(mask_function),
        alike=mask_function is bidirectional_mask_function,
    )


def _is_causal(mask_function: Callable) -> bool:
    """Whether a mask function is known to hide every later key: the causal one itself, or in an intersection.

    For any other function the answer is False, which is always safe: it only costs computing the later keys too.
    """
    if mask_function is causal_mask_function:
        return True
    if getattr(mask_function, "__code__", None) not in and_masks.__code__.co_consts:
        return False
    parts = dict(zip(mask_function.__code__.co_freevars, mask_function.__closure__, strict=True))
    return any(_is_causal(part) for part in parts["mask_functions"].cell_contents)


def mask_from_tensor(mask: Tensor) -> DeferredMask:
    """Defers a finished mask (B or 1, H or 1, S, S), bool or additive: its rows are gathered when they are needed."""

    def visible(queries: Tensor, first: int, last: int) -> Tensor:
        full = mask[..., first:last].to(queries.device).expand(queries.shape[0], -1, -1, -1)
        return full.take_along_dim(queries[:, None, :, None], dim=2)

    return DeferredMask(visible)


def read_mask(mask: object, batch: int, length: int) -> DeferredMask:
    """Defers what a model handed to its attention: a deferred mask, a finished one (B, 1 or H, S, S), or None: causal.

    FlexAttention's block masks carry their function. Raises UnsupportedModelError for anything else.
    """
    if mask is None:
        return mask_from_functions(batch, length, length)
    if isinstance(mask, DeferredMask):
        return mask
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[2:] == (length, length):
        return mask_from_tensor(mask)
    if callable(getattr(mask, "mask_mod", None)):
        return mask_from_functions(batch, length, length, mask_function=mask.mask_mod)
    raise UnsupportedModelError(f"the attention was handed a mask that cannot be read: {type(mask).__name__}")
