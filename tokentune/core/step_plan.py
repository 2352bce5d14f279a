"""What one forward pass of a patched model does. It is decided once, before the pass, and then only carried out.

    B sequences, S tokens, K selected, D hidden size, G key-value heads, d head size

    Request      what the caller asks for          read by the model's forward hook (`core/patching.py`)
    Batch        tokens, mask and labels           likewise
    ModelState   what of the model matters here    likewise
    StepPlan     the selection, given or drawn,    made by `core/model_sampling.py`;
                 and all that follows from it      added by `plan_step`, carried out by `core/patching.py`

`plan_step` runs no part of the model and changes nothing.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokentune.core.groups import require, token_order
from tokentune.core.profile import Profile, Rows
from tokentune.errors import UnsupportedModelError
from tokentune.sampling.sampler import mask_unselected_labels, target_mask
from tokentune.sampling.weighted_draw import wide_dtype

_ANSWERS = ("start_positions", "end_positions")
CachedKeyValues = deque[tuple[Tensor, Tensor]]  # each layer's keys and values of all tokens, 2 x (B, G, S, d)


class Request(NamedTuple):
    """The keyword arguments of a patched model's forward that the original forward does not have."""

    selected_positions: Tensor | None = None  # (B, K)
    selection_fillers: Tensor | None = None  # (B, K) bool
    selection_weights: Tensor | None = None  # (B, K)
    selection_probabilities: Tensor | None = None  # (B, K)
    selection_draws: Tensor | None = None  # (B, S) in [0, 1)
    num_supervised: int | None = None
    all_labels: Tensor | None = None  # (B, S), before the selection masked any


@dataclass(frozen=True)
class Batch:
    """The inputs of a forward pass, as far as its selection and its loss depend on them."""

    tokens: Tensor | None = None  # ids (B, S), or embeddings (B, S, D); None: images
    input_ids: Tensor | None = None  # (B, S)
    mask: Tensor | None = None  # as the caller gave it, mostly (B, S)
    labels: Tensor | None = None  # of tokens (B, S), or of whole sequences
    answers: tuple[Tensor, ...] = ()  # the labels of question answering: positions (B,) or (B, 1)
    num_items: Any = None  # the number of targets that the caller divides the loss by

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> "Batch":
        """From the keyword arguments of a model's forward."""
        ids, embeddings = inputs.get("input_ids"), inputs.get("inputs_embeds")
        answers = tuple(inputs[name] for name in _ANSWERS if inputs.get(name) is not None)
        tokens = embeddings if ids is None else ids
        mask, labels = inputs.get("attention_mask"), inputs.get("labels")
        return cls(tokens, ids, mask, labels, answers, inputs.get("num_items_in_batch"))

    @property
    def has_labels(self) -> bool:
        return self.labels is not None or bool(self.answers)

    def token_mask(self) -> Tensor:
        """(B, S), 1 at real tokens; all of them where the caller's mask does not tell."""
        if self.mask is not None and self.mask.ndim == 2:
            return self.mask
        return torch.ones(self.tokens.shape[:2], dtype=torch.long, device=self.tokens.device)


@dataclass
class DrawCounts:
    """The last draw in numbers. They are on the device: reading one makes the host wait for it."""

    positions: Tensor  # (B, K)
    selected: Tensor  # how many of them are real tokens
    supervised: Tensor  # how many of them are supervised targets
    loss: Tensor | None = None  # summed over all supervised targets, from a scoring pass through all layers
    targets: Tensor | None = None  # how many these are


@dataclass(frozen=True)
class ModelState:
    """What a plan depends on, of a model and its settings."""

    profile: Profile
    causal: bool = True
    foreign_forward: bool = False  # another library put its own forward on the model
    foreign_layer_hooks: bool = False  # others put hooks on layers, which need all rows
    token_labels: bool = True  # the labels are (B, S), one per token
    pad_token_id: int | None = None  # by which the head recognizes padding
    with_gradients: bool = True
    gradient_correction: float = 0.0
    activated: bool = False  # there are adapters that act on some tokens (`core/activated_lora.py`)
    chunked_loss: bool | None = None  # as the user asked; None: as the next field says
    prefers_chunks: bool = False  # chunks cost no time here, or gradient checkpointing asks for memory before time
    not_in_chunks: str | None = None  # why the loss cannot be taken in chunks

    @property
    def rows(self) -> Rows:
        return Rows.ALL if self.foreign_forward else self.profile.rows


class Loss(Enum):
    """How the loss of a forward pass is taken."""

    UNCHANGED = auto()  # the model's own, on labels that the plan may replace
    SELECTED = auto()  # a causal model's own, on K rows of logits and their targets
    CHUNKED = auto()  # a causal model's, over chunks of the rows that have a target (`core/loss.py`)


@dataclass(frozen=True)
class StepPlan:
    """What one forward pass with a selection does."""

    # The selection, given or drawn, and what came with it.
    positions: Tensor | Callable[[Tensor], Tensor]  # (B, K), ascending; or how to draw them, given (B, S, D) (images)
    weights: Tensor | None = None  # (B, K), factors of the losses at the positions; None: all 1
    num_supervised: int | None = None  # selected supervised targets, where the caller knows the number on the host
    fillers: Tensor | None = None  # (B, K) bool, positions that get no gradient and have no loss; None: there are none
    probabilities: Tensor | None = None  # (B, K), with which positions were drawn independently; None: not known
    cached_kv: CachedKeyValues | None = None  # of a scoring pass: the unselected tokens do not run a second time
    replaced: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the model's own forward
    counts: DrawCounts | None = None
    finish: Callable[[Any], None] | None = None  # what the output of the forward still needs
    # What `plan_step` makes of it.
    all_selected: bool = False  # every token is selected: the layers run as in the original model
    rows: Rows = Rows.SELECTED  # what leaves the last layer
    all_rows_between_layers: bool = False  # layers pass on (B, S, D), which foreign hooks see, not the two groups
    gradient_scales: Tensor | None = None  # (B, K), of the selected keys and values (`attention/correction.py`)
    loss: Loss = Loss.UNCHANGED
    recompute_logits: bool = False  # of a chunked loss: save no logits, and compute them a second time


def plan_step(selection: StepPlan, batch: Batch, state: ModelState) -> StepPlan:
    """The plan of one forward pass with this selection.

    Raises UnsupportedModelError for weights or foreign hooks that this model's step cannot have, and ValueError for
    positions that are not distinct, ascending and inside the sequence, for fillers with a loss, and where the gradient
    is to be corrected and the positions' probabilities are not known.
    """
    positions, weights, labels = selection.positions, selection.weights, batch.labels
    if selection.fillers is not None:
        _check_fillers(selection, labels, state)
    rows, replaced = state.rows, dict(selection.replaced)
    takes_loss = state.causal and rows is not Rows.ALL and state.token_labels
    corrects = state.gradient_correction > 0 and state.with_gradients
    if weights is not None and not takes_loss:
        cure = ", and gradient_correction needs them unless all targets are selected: take answers+0.1"
        raise UnsupportedModelError(
            f"selection_weights are factors of a causal model's own losses, one per token{cure if corrects else ''}"
        )
    if state.token_labels and not takes_loss:
        positions_there = positions.to(labels.device)
        if rows is Rows.ALL:
            replaced["labels"] = mask_unselected_labels(labels, positions_there, causal=state.causal)
        else:
            replaced["labels"] = labels.gather(1, positions_there)
    by_chance = corrects and selection.probabilities is not None
    ordinary = selection.fillers is None and not by_chance and not state.activated
    all_selected = ordinary and selects_all(positions, batch.tokens)
    loss, recompute_logits = _plan_loss(weights, state, all_selected) if takes_loss else (Loss.UNCHANGED, False)
    plan = replace(selection, replaced=replaced, rows=rows, loss=loss, recompute_logits=recompute_logits)
    if all_selected:
        return replace(plan, all_selected=True)
    if state.foreign_layer_hooks:
        if plan.cached_kv is not None:
            raise UnsupportedModelError(
                "a scoring pass leaves no hidden states of the unselected tokens for others' hooks on the layers"
            )
        # A foreign hook on the last layer gets all rows too.
        rows = Rows.GATHERED if rows is Rows.SELECTED else rows
        plan = replace(plan, rows=rows, all_rows_between_layers=True)
    if not corrects:
        return plan
    if selection.probabilities is None:
        raise ValueError("gradient_correction needs selection_probabilities, those with which the positions were drawn")
    probabilities = selection.probabilities.to(positions.device, wide_dtype(positions.device))
    return replace(plan, gradient_scales=probabilities**-state.gradient_correction)


def _check_fillers(selection: StepPlan, labels: Tensor | None, state: ModelState) -> None:
    if state.token_labels:
        targets = target_mask(labels, causal=state.causal).gather(1, selection.positions.to(labels.device))
        if selection.weights is not None:
            targets &= selection.weights.to(labels.device) != 0
        require(~(targets & selection.fillers.to(labels.device)), "selection_fillers must not be positions with a loss")


def _plan_loss(weights: Tensor | None, state: ModelState, all_selected: bool) -> tuple[Loss, bool]:
    """How a causal model's loss is taken, and whether its logits are recomputed. Weights always need chunks."""
    whole = Loss.UNCHANGED if all_selected else Loss.SELECTED
    if weights is None and (state.chunked_loss is False or not state.with_gradients):
        return whole, False
    if state.not_in_chunks is not None:
        if state.chunked_loss or weights is not None:
            asked = "chunked_loss" if weights is None else "selection_weights"
            raise UnsupportedModelError(f"{asked}: {state.not_in_chunks}")
        return whole, False
    chunked = state.prefers_chunks if state.chunked_loss is None else state.chunked_loss
    return (Loss.CHUNKED, chunked) if chunked or weights is not None else (whole, False)


def selects_all(positions: Any, tokens: Tensor | None) -> bool:
    """Whether every token is selected. Then the step is an ordinary one, and costs what an ordinary one costs."""
    if tokens is None or not isinstance(positions, Tensor) or positions.shape[1] != tokens.shape[1]:
        return False
    token_order(positions, tokens.shape[1])  # for its checks
    return True
