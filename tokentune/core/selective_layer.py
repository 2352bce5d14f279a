"""The method: every token runs forward; in the layers the selected ones alone get gradients and keep activations.

    B sequences, S tokens, K selected, R = S - K rest, D hidden size, H heads, G key-value heads, d head size

Nothing of a model is rewritten. `core/patching.py` opens a `Step` around the model's forward and makes its
configuration name `selective_attention`, so that every attention of the model calls it. Hooks split the hidden states
(B, S, D) in front of the first layer; between layers they travel as a pair of groups (where others have put hooks on a
layer, as (B, S, D) again), and each layer runs its own, unmodified
forward twice, once per group, the second call nested in the first one's attention:

    layer(TokenGroups)                          enter_layer: unpack, gather the arguments that have a row per token
      layer.forward(selected)   with gradients
        norms, projections of the selected
        attention(q, k, v)                      selective_attention
          layer.forward(rest)   no_grad         run_unselected
            norms, projections of the rest
            attention(q', k', v')               selective_attention: joins k, k' and v, v' for both passes (the join
            output projection, MLP of the rest      has gradients again), in sequence order, and attends with q'
          attends with q over all keys and values: gradients reach k and v, those of the rest are constants
        output projection, MLP of the selected
    -> TokenGroups(selected, rest)              leave_layer: pack

Whatever stands inside the layer (norm placement, LoRA, 4-bit linears, experts) just runs, once per group. In the last
layer the rest is needed for its keys and values only, so its pass ends there, and the final norm and the head see the
K selected rows alone (for models that allow it, see `Rows`). `tests/test_selective.py` compares outputs and gradients
with an independent definition of the method (Simoulin et al., EMNLP 2024, section 3).
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokentune.core.attention.correction import OwnTokens, scale_gradient
from tokentune.core.attention.kernels import attend
from tokentune.core.attention.masks import DeferredMask, GroupMask, read_mask
from tokentune.core.compat.bypassed_hooks import caller_of_forward
from tokentune.core.groups import TokenGroups, gather_tokens, in_sequence_order, token_order
from tokentune.core.layer_arguments import has_row_per_token, map_tensors
from tokentune.errors import UnsupportedModelError

SELECTED, UNSELECTED = "selected", "unselected"
QUERY_PROJECTIONS = ("q_proj", "q_b_proj", "query", "q_lin")  # modules whose output becomes queries and nothing else
IMPLEMENTATION = "tokentune"  # the name under which attention and masks are registered with transformers

# What is ours stays out of `torch.compile`, which would trace it anew for each selection's size: parts of the model
# between two calls of it are compiled. `_around` is for functions that run parts of the model themselves.
uncompiled = torch.compiler.disable
_around = partial(torch.compiler.disable, recursive=False)

CachedKeyValues = deque[tuple[Tensor, Tensor]]  # each layer's keys and values of all tokens, 2 x (B, G, S, d)

# The forward pass under way; None outside of a selective forward, where every hook below does nothing.
CURRENT_STEP: ContextVar["Step | None"] = ContextVar("tokentune_step", default=None)


def activate(step: "Step") -> list[Callable[[], None]]:
    """Makes `step` the one under way, and the model's attention ours. Returns what undoes it, last first."""
    undo: list[Callable[[], None]] = [partial(CURRENT_STEP.reset, CURRENT_STEP.set(step))]
    for config, name in step.implementations:
        undo.append(partial(setattr, config, "_attn_implementation_internal", name))
        config._attn_implementation_internal = IMPLEMENTATION
    return undo


class Rows(Enum):
    """Which rows leave the last layer, by what the code behind it can take."""

    SELECTED = "selected"  # K rows: final norm and head work and keep activations for these alone
    GATHERED = "gathered"  # S rows, the rest's zero, for code that needs length S; cut to K behind the final norm
    ALL = "all"  # S rows, the rest's as constants, for heads that pool or look tokens up by their position


class PassDone(Exception):
    """Ends a pass through a layer early: of the last layer's rest, for one, only keys and values are needed."""


@dataclass
class LayerCall:
    """One layer at work: what it was called with and what its two passes leave for each other."""

    layer: nn.Module
    last: bool
    groups: TokenGroups
    args: tuple
    kwargs: dict[str, Any]
    with_gradients: bool  # False in a forward pass without gradients as a whole
    unselected_pass: Callable[
        ["Step", "LayerCall"], None
    ]  # leaves `joined_kv`; `run_unselected`, but for recomputations
    unselected_ends_early: bool = False  # as soon as its keys and values exist
    running: str = SELECTED
    selected_kv: tuple[Tensor, Tensor] | None = None  # 2 x (B, G, K, d)
    unselected_kv: tuple[Tensor, Tensor] | None = None  # 2 x (B, G, R, d)
    joined_kv: tuple[Tensor, Tensor] | None = None  # 2 x (B, G, S, d), in sequence order
    unselected_output: Tensor | None = None  # (B, R, D); None where the rest's pass ended early

    @uncompiled
    def join(self, step: "Step") -> None:
        """The keys and values of both groups, for both passes; gradients reach those of the selected."""
        # Within the rest's no_grad the selected part keeps its gradients all the same.
        with torch.set_grad_enabled(self.with_gradients):
            flat_indices, scales = step.flat_indices(self.selected_kv[0].device), step.gradient_scales
            selected = self.selected_kv if scales is None else [scale_gradient(kv, scales) for kv in self.selected_kv]
            pairs = zip(selected, self.unselected_kv, strict=True)
            self.joined_kv = tuple(in_sequence_order(*pair, flat_indices) for pair in pairs)


@dataclass
class Step:
    """One forward pass with a selection."""

    positions: Tensor | Callable[[Tensor], Tensor]  # (B, K), ascending; or how to draw them, given (B, S, D)
    implementations: list[tuple[Any, str]]  # (config, its own attention implementation, replaced for this step)
    expected_calls: int  # of layers, in the whole pass
    rows: Rows = Rows.SELECTED
    cached_kv: CachedKeyValues | None = None  # from a look (`core/scoring_pass.py`): the rest runs no more
    gradient_scales: Tensor | None = (
        None  # (B, K), of the selected keys and values (`attention/correction.py`); None: all 1
    )
    per_token: dict[str, bool] = field(default_factory=dict)  # of the layers' arguments (`core/layer_arguments.py`)
    whole_between: bool = False  # layers hand on all rows in place of the pair: others' hooks look at them
    entered_calls: int = 0
    order: Tensor | None = None  # (B, S): the selected positions, then the rest's, both ascending
    call: LayerCall | None = None
    # What was made of tensors that every layer is handed again: (original, result). Compared by identity, which is
    # safe because the original is kept alive here.
    row_cache: list[tuple[Tensor, dict[str, Tensor]]] = field(default_factory=list)
    deferred_masks: list[tuple[Tensor | None, DeferredMask]] = field(default_factory=list)
    flat_indices_on: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @uncompiled
    def indices(self, group: str) -> Tensor:
        """The original positions of a group's rows: (B, K) or (B, R)."""
        count = self.positions.shape[1]
        return self.order[:, :count] if group == SELECTED else self.order[:, count:]

    @uncompiled
    def flat_indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where the groups' rows stand, (B K) and (B R), among the B S rows of all sequences."""
        if device not in self.flat_indices_on:  # made once, as every layer keeps them for its backward pass
            batch, length = self.order.shape
            starts = torch.arange(batch, device=self.order.device)[:, None] * length
            flat_indices = [(self.indices(group) + starts).flatten().to(device) for group in (SELECTED, UNSELECTED)]
            self.flat_indices_on[device] = tuple(flat_indices)
        return self.flat_indices_on[device]

    @uncompiled
    def own_tokens(self, call: LayerCall) -> OwnTokens | None:
        """What attention of the selected needs to leave each token's path to itself unscaled; None: nothing."""
        key, value = call.selected_kv
        scaled = self.gradient_scales is not None and (key.requires_grad or value.requires_grad)
        if not (scaled and torch.is_grad_enabled()):
            return None
        indices = self.indices(SELECTED).to(key.device)
        return OwnTokens(key, value, self.gradient_scales, self.flat_indices(key.device)[0], indices)

    @uncompiled
    def split(self, hidden: Tensor) -> TokenGroups:
        """(B, S, D) in front of a layer, the first one mostly -> the two groups."""
        if callable(self.positions):
            self.positions = self.positions(hidden)
        if len(self.positions) != len(hidden):
            raise ValueError(f"selected_positions has {len(self.positions)} rows, the batch {len(hidden)}")
        if self.order is None:
            self.order = token_order(self.positions.to(hidden.device), hidden.shape[1])
        selected = gather_tokens(hidden, self.indices(SELECTED))
        if self.cached_kv is not None:
            return TokenGroups(selected, hidden.new_empty(len(hidden), 0, *hidden.shape[2:]))
        return TokenGroups(selected, gather_tokens(hidden.detach(), self.indices(UNSELECTED)))

    @uncompiled
    def merge(self, groups: TokenGroups) -> Tensor:
        """The two groups -> (B, S, D) in sequence order."""
        return gather_tokens(torch.cat(groups, dim=1), self.order.argsort(dim=1).to(groups.selected.device))

    @uncompiled
    def rows_of(self, value: Any, group: str) -> Any:
        """A layer's arguments for one group: its rows of whatever has a row per token, all else as it is."""
        return map_tensors(value, partial(self._rows_of_tensor, group))

    def _rows_of_tensor(self, group: str, value: Tensor, path: str) -> Tensor:
        batch, length = self.order.shape
        fits = has_row_per_token(value, batch, length)
        per_token = self.per_token.get(path, fits)
        if per_token and not fits:
            raise UnsupportedModelError(
                f"the layers' argument {path} of shape {tuple(value.shape)} has no row for each of {length} tokens"
            )
        return self._cached_rows(value, group) if per_token else value

    def _cached_rows(self, value: Tensor, group: str) -> Tensor:
        rows = next((rows for original, rows in self.row_cache if original is value), None)
        if rows is None:
            rows = {}
            self.row_cache.append((value, rows))
        if group not in rows:
            # A copy per group, not two views of one: a saved view would keep the rest's rows for the backward pass.
            rows[group] = gather_tokens(value.expand(self.order.shape[0], *value.shape[1:]), self.indices(group))
        return rows[group]

    def forget_unselected(self) -> None:
        """Drops what was made for the rest's pass, where the step outlives the forward pass (checkpointing)."""
        for _, rows in self.row_cache:
            rows.pop(UNSELECTED, None)
        for _, deferred in self.deferred_masks:
            deferred.forget(UNSELECTED)

    @uncompiled
    def mask_rows(self, mask: Any, causal: bool, group: str, query: Tensor) -> GroupMask | None:
        """A group's rows of the mask that the model handed to its attention, or None where it hides nothing.

        `mask` is a deferred mask, a finished one (B, 1 or H, S, S), or None: causal where `causal` is true.
        """
        if mask is None and not causal:
            return None
        return GroupMask(self._deferred_mask(mask), group, self.indices(group).to(query.device), self.order.shape[1])

    def _deferred_mask(self, mask: Any) -> DeferredMask:
        batch, length = self.order.shape
        for original, deferred in self.deferred_masks:
            if original is mask:
                return deferred
        deferred = read_mask(mask, batch, length)
        self.deferred_masks.append((mask, deferred))
        return deferred


@uncompiled
def enter_layer(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
    """Forward pre-hook of every layer: its own forward gets the selected group and that group's arguments."""
    step = CURRENT_STEP.get()
    kwargs = dict(kwargs)
    hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states", None), ())
    if step is None:
        if "selected_positions" in kwargs:  # swallowed by the model's **kwargs, where its hooks did not run
            raise RuntimeError(
                f"selected_positions reached a layer past the model's hooks: {caller_of_forward()} called `forward` "
                "in place of the model itself"
            )
        if isinstance(hidden, TokenGroups):
            raise RuntimeError("a layer is run again outside of its forward pass (a checkpointing wrapper does this)")
        return None
    if any(kwargs.get(name) is not None for name in ("past_key_values", "past_key_value", "layer_past")):
        raise UnsupportedModelError("a key-value cache reached a layer: both passes would write to it")
    if step.entered_calls > 0 and not (isinstance(hidden, TokenGroups) or step.whole_between):
        raise UnsupportedModelError(f"something in front of {type(layer).__name__} took the groups of tokens apart")
    groups = hidden if isinstance(hidden, TokenGroups) else step.split(hidden)
    step.entered_calls += 1
    last = step.entered_calls == step.expected_calls
    ends_early = last and step.rows is not Rows.ALL and not step.whole_between
    unselected_pass = run_unselected if step.cached_kv is None else use_cached_key_values
    step.call = LayerCall(layer, last, groups, args, kwargs, torch.is_grad_enabled(), unselected_pass, ends_early)
    return (groups.selected, *step.rows_of(args, SELECTED)), step.rows_of(kwargs, SELECTED)


@uncompiled
def leave_layer(layer: nn.Module, args: tuple, output: Any) -> Any:
    """Forward hook of every layer: packs both groups, or makes what leaves the last layer."""
    step = CURRENT_STEP.get()
    if step is None:
        return None
    call, step.call = step.call, None
    if call.selected_kv is None:
        raise UnsupportedModelError(f"{type(layer).__name__} does not send its attention through the interface")
    hidden, *others = output if isinstance(output, tuple) else (output,)
    if call.last and step.rows is Rows.SELECTED:
        leaving = hidden
    else:
        rest = call.unselected_output
        if rest is None:  # its pass ended early, or there was none: what leaves the last layer has all rows
            count = step.indices(UNSELECTED).shape[1] if call.last else 0
            rest = hidden.new_zeros(len(hidden), count, *hidden.shape[2:])
        groups = TokenGroups(hidden, rest)
        leaving = step.merge(groups) if call.last or step.whole_between else groups
    return (leaving, *others) if isinstance(output, tuple) else leaving


@_around
def selective_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
) -> tuple[Tensor, None]:
    """What a model's attention calls during a selective forward, for either group.

    Args: query (B, H, Q, d), key and value (B, G, Q, d) of one group; `attention_mask` as the model has it; `options`
    as in its own call. Returns the attention output (B, Q, H, d), and None in place of the weights.
    Raises UnsupportedModelError where the layer does more than one self-attention over its own tokens.
    """
    step = CURRENT_STEP.get()
    call = step.call
    if call is None:
        raise UnsupportedModelError(f"{type(module).__name__} attends outside of the layers")
    group = call.running
    if key.shape[2] != step.indices(group).shape[1]:
        raise UnsupportedModelError(f"{type(module).__name__} attends to keys that are not the layer's own tokens")
    if group == SELECTED:
        if call.selected_kv is not None:
            raise UnsupportedModelError(f"{type(call.layer).__name__} calls attention more than once")
        call.selected_kv = key, value
        if step.indices(UNSELECTED).shape[1] > 0:
            call.unselected_pass(step, call)  # comes by here in its turn, and leaves `joined_kv`
        keys, values = call.joined_kv or call.selected_kv
        own = step.own_tokens(call)
    else:
        call.unselected_kv = key, value
        call.join(step)
        if call.unselected_ends_early:
            raise PassDone
        keys, values = (joined.detach() for joined in call.joined_kv)
        own = None
    implementation = next((name for config, name in step.implementations if config is module.config), None)
    if implementation is None:
        raise UnsupportedModelError(f"{type(module).__name__} has a configuration of its own")
    # Without a mask, transformers' eager attention sees everything; its fused one goes by `is_causal`.
    causal = options.get("is_causal")
    causal = implementation != "eager" and (getattr(module, "is_causal", True) if causal is None else causal)
    mask = step.mask_rows(attention_mask, causal, group, query)
    return uncompiled(attend)(module, query, keys, values, mask, implementation, own=own, **options)


@contextmanager
def skipped_query_projections(layer: nn.Module) -> Iterator[None]:
    """Within it, the layer's query projections compute nothing: a pass that ends at its keys and values needs none.

    They return NaN, so that the verification finds a model whose keys or values are made of queries. What draws random
    numbers, or is watched by hooks, runs as ever.
    """

    def nothing(projection: nn.Module, hidden: Tensor) -> Tensor:
        return hidden.new_full((*hidden.shape[:-1], projection.out_features), torch.nan)

    undo: list[Callable[[], None]] = []
    for name, module in layer.named_modules():
        if name.rpartition(".")[2] in QUERY_PROJECTIONS and hasattr(module, "out_features"):
            parts = list(module.modules())
            if any(part.training and getattr(part, "p", 0) for part in parts) or any(map(_is_watched, parts)):
                continue
            own = module.__dict__.get("forward")
            undo.append(partial(setattr, module, "forward", own) if own else partial(delattr, module, "forward"))
            module.forward = partial(nothing, module)
    try:
        yield
    finally:
        while undo:
            undo.pop()()


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


@_around
def run_unselected(step: Step, call: LayerCall) -> None:
    """The rest's pass through the layer, called from within the selected group's attention.

    `forward`, not the layer itself: the hooks on the layer, ours among them, run once per call of the layer.
    """
    args, kwargs = step.rows_of(call.args, UNSELECTED), step.rows_of(call.kwargs, UNSELECTED)
    call.running = UNSELECTED
    try:
        with torch.no_grad(), skipped_query_projections(call.layer) if call.unselected_ends_early else nullcontext():
            output = call.layer.forward(call.groups.unselected, *args, **kwargs)
            call.unselected_output = output[0] if isinstance(output, tuple) else output
    except PassDone:
        pass
    finally:
        call.running = SELECTED


@uncompiled
def use_cached_key_values(step: Step, call: LayerCall) -> None:
    """In place of `run_unselected`: the rest's keys and values as a look found them, dropped here from what it kept."""
    cached = step.cached_kv.popleft()
    indices = step.indices(UNSELECTED)
    call.unselected_kv = tuple(gather_tokens(tensor.transpose(1, 2), indices).transpose(1, 2) for tensor in cached)
    del cached
    call.join(step)
