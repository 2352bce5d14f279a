"""The state of a forward pass with a selection: of the step as a whole, and of the layer that is running.

    B sequences, S tokens, K selected, R = S - K unselected, D hidden size, G key-value heads, d head size

What is the same for all layers (indices, rows of arguments, masks) is made once, and shared by them.
"""

from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokentune.core.attention.correction import OwnTokens, scale_gradient
from tokentune.core.attention.masks import DeferredMask, GroupMask, read_mask
from tokentune.core.attention.replaced import Implementations, implementation_of
from tokentune.core.groups import TokenGroups, gather_tokens, token_order
from tokentune.core.layers import has_row_per_token, map_tensors
from tokentune.core.step_plan import StepPlan
from tokentune.core.temporary import set_until_undone
from tokentune.errors import UnsupportedModelError

SELECTED, UNSELECTED = "selected", "unselected"
IMPLEMENTATION = "tokentune"  # the name under which attention and masks are registered with transformers

# The project's own functions stay out of `torch.compile`, which would trace them again for each number of selected
# tokens. Parts of the model between two of them are compiled, and so are parts that an `uncompiled_alone` one runs.
uncompiled = torch.compiler.disable
uncompiled_alone = partial(torch.compiler.disable, recursive=False)

# The forward pass under way. None outside of a selective one: then the hooks of layers and attention do nothing.
CURRENT_STEP: ContextVar["Step | None"] = ContextVar("tokentune_step", default=None)


def activate(step: "Step", undo: ExitStack) -> None:
    """Makes `step` the current one, and the model's attention ours, until `undo` is closed."""
    undo.callback(CURRENT_STEP.reset, CURRENT_STEP.set(step))
    for config, _ in step.implementations:
        set_until_undone(undo, config, "_attn_implementation_internal", IMPLEMENTATION)
    for owner, forward in step.own_forwards:
        set_until_undone(undo, owner, "forward", forward)


class PassDone(Exception):
    """Ends a pass through a layer early, where only its keys and values are needed."""


@dataclass
class LayerCall:
    """A running layer: what it was called with, and what its two passes leave for each other."""

    layer: nn.Module
    last: bool
    groups: TokenGroups
    args: tuple
    kwargs: dict[str, Any]
    with_gradients: bool  # False where the whole forward pass has none
    unselected_pass: Callable[["Step", "LayerCall"], None]  # sets `joined_kv`
    unselected_ends_early: bool = False  # as soon as its keys and values exist
    running: str = SELECTED
    selected_kv: tuple[Tensor, Tensor] | None = None  # 2 x (B, G, K, d)
    unselected_kv: tuple[Tensor, Tensor] | None = None  # 2 x (B, G, R, d)
    joined_kv: tuple[Tensor, Tensor] | None = None  # 2 x (B, G, S, d), in sequence order
    unselected_output: Tensor | None = None  # (B, R, D); None where that pass ended early


@dataclass
class Step:
    """One forward pass with a selection."""

    plan: StepPlan
    implementations: Implementations  # the model's own ones, replaced during this step
    expected_calls: int  # of layers, in the whole pass
    unselected_pass: Callable[["Step", LayerCall], None]
    per_token: dict[str, bool] = field(default_factory=dict)  # of the layers' arguments (`core/layers.py`)
    own_forwards: list[tuple[Any, Callable]] = field(default_factory=list)  # what runs in place of others' `forward`
    entered_calls: int = 0
    positions: Tensor | None = None  # (B, K), ascending; known in front of the first layer
    order: Tensor | None = None  # (B, S): the selected positions, then the unselected ones, both ascending
    call: LayerCall | None = None
    # What was made of tensors that every layer gets again: (original, result).
    row_cache: list[tuple[Tensor, dict[str, Tensor]]] = field(default_factory=list)
    deferred_masks: list[tuple[Tensor | None, DeferredMask]] = field(default_factory=list)
    flat_indices_on: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def set_positions(self, hidden: Tensor) -> None:
        """Fixes the selected positions, given the hidden states (B, S, D) in front of the first layer."""
        positions = self.plan.positions
        self.positions = positions(hidden) if callable(positions) else positions
        if len(self.positions) != len(hidden):
            raise ValueError(f"selected_positions has {len(self.positions)} rows, the batch {len(hidden)}")
        self.order = token_order(self.positions.to(hidden.device), hidden.shape[1])

    @uncompiled
    def own_attention(self, module: nn.Module, options: dict[str, Any]) -> tuple[str, bool]:
        """The model's own attention implementation, and whether it is causal in a call without a mask."""
        implementation, causal = implementation_of(module, self.implementations), options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        return implementation, implementation != "eager" and causal  # eager attention then sees every key

    @uncompiled
    def indices(self, group: str) -> Tensor:
        """The original positions of a group's rows: (B, K) or (B, R)."""
        count = self.positions.shape[1]
        return self.order[:, :count] if group == SELECTED else self.order[:, count:]

    @uncompiled
    def flat_indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The indices of both groups' rows, (B K) and (B R), among the B S rows of all sequences."""
        if device not in self.flat_indices_on:  # made once, as every layer saves them for its backward pass
            batch, length = self.order.shape
            starts = torch.arange(batch, device=self.order.device)[:, None] * length
            flat = [(self.indices(group) + starts).flatten().to(device) for group in (SELECTED, UNSELECTED)]
            self.flat_indices_on[device] = tuple(flat)
        return self.flat_indices_on[device]

    @uncompiled
    def own_tokens(self, call: LayerCall) -> OwnTokens | None:
        """What the gradient's correction needs to leave each token's path to itself unscaled; None: no correction."""
        key, value = call.selected_kv
        scales = self.plan.gradient_scales
        scaled = scales is not None and (key.requires_grad or value.requires_grad)
        if not (scaled and torch.is_grad_enabled()):
            return None
        indices = self.indices(SELECTED).to(key.device)
        return OwnTokens(key, value, scales, self.flat_indices(key.device)[0], indices)

    @uncompiled
    def constant_at_fillers(self, tokens: Tensor) -> Tensor:
        """The selected tokens' rows (B, K, D), or keys or values (B, G, K, d): those of fillers get no gradient.

        Nothing else reads a filler with gradients, so that its own pass through the layers has none either.
        """
        fillers = self.plan.fillers
        return tokens if fillers is None else scale_gradient(tokens, ~fillers)

    @uncompiled
    def rows_of(self, value: Any, group: str) -> Any:
        """A layer's arguments for one group: its rows of each tensor that has a row per token, all else unchanged."""
        return map_tensors(value, partial(self._rows_of_tensor, group))

    def _rows_of_tensor(self, group: str, value: Tensor, path: str) -> Tensor:
        batch, length = self.order.shape
        fits = has_row_per_token(value, batch, length)
        per_token = self.per_token.get(path, fits)
        if per_token and not fits:
            raise UnsupportedModelError(
                f"the layers' argument {path} of shape {tuple(value.shape)} has no row for each of {length} tokens"
            )
        if not per_token:
            return value
        rows = _made_of(value, self.row_cache, dict)
        if group not in rows:
            # A copy per group, not two views of one tensor: a saved view would keep the other group's rows in memory.
            rows[group] = gather_tokens(value.expand(batch, *value.shape[1:]), self.indices(group))
        return rows[group]

    def forget_unselected(self) -> None:
        """Frees what only the unselected tokens' passes used. Under checkpointing the step outlives its forward."""
        for _, rows in self.row_cache:
            rows.pop(UNSELECTED, None)
        for _, deferred in self.deferred_masks:
            deferred.forget(UNSELECTED)

    @uncompiled
    def mask_rows(self, mask: Any, causal: bool, group: str, query: Tensor) -> GroupMask | None:
        """A group's rows of the mask that the model gave to its attention, or None where it hides nothing.

        `mask` is a deferred mask, a finished one (B, 1 or H, S, S), or None: causal where `causal` is true.
        """
        if mask is None and not causal:
            return None
        deferred = _made_of(mask, self.deferred_masks, lambda: read_mask(mask, *self.order.shape))
        return GroupMask(deferred, group, self.indices(group).to(query.device), self.order.shape[1])


def _made_of(original: Any, cache: list[tuple[Any, Any]], make: Callable[[], Any]) -> Any:
    """What was made of `original`, which is compared by identity: safe, because the cache keeps it alive."""
    for known, made in cache:
        if known is original:
            return made
    made = make()
    cache.append((original, made))
    return made
