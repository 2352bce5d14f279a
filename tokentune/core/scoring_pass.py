"""The scoring pass: a forward pass over all tokens without gradients, which scores them before the selection.

    B sequences, S tokens, N supervised targets, D hidden size, H heads, G key-value heads, d head size

The model's own forward runs once under `no_grad`, with its own attention kernels and masks. During it the configuration
names an attention function that also stores each layer's keys and values. They are all that the selected tokens need of
the others, so the step that follows does not run the unselected tokens a second time (`use_cached_key_values`). With a
token's forward as 2 units of work and its backward as 4, a step then costs 2 + 6r in place of 2 + 4r, where r is the
proportion of selected tokens.

The output head gets no rows (`loss.WithheldRows`), so logits exist only a chunk at a time. The scores, each (B, S)
float32 and 0 where there is nothing to score:

    loss         of the target that a position predicts
    gradient     the norm of that loss's gradient with respect to the position's hidden state in front of the head
    excess_loss  the loss minus that of a reference model
    attention    the attention that a token receives in the last layer: over all real queries, the mean of the heads

`ScoringOptions.layers` runs the first layers alone, with the final norm and the head behind them: scores that are
cheaper and less exact, and no cached keys and values. Dropout is on in the scoring pass as in the step.
"""

from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokentune.core.attention.received import attention_received
from tokentune.core.attention.replaced import replaced_attention
from tokentune.core.groups import gather_tokens
from tokentune.core.layers import Stack, attention_modules
from tokentune.core.loss import CHUNK_BYTES, WithheldRows, next_targets, put_loss, row_gradients
from tokentune.core.saved_tensors.saved_bytes import in_own_storage
from tokentune.core.selective_layer import join_key_values
from tokentune.core.step import UNSELECTED, LayerCall, Step, uncompiled
from tokentune.core.step_plan import CachedKeyValues
from tokentune.core.temporary import set_until_undone
from tokentune.errors import UnsupportedModelError
from tokentune.sampling.strategies import DRAWS


@dataclass(frozen=True)
class ScoringOptions:
    """How a scoring pass runs, and what its scores do."""

    draw: str = "proportional"  # probabilities in proportion to the scores; "top": the highest win
    layers: int | None = None  # run the first N alone; None: all layers, whose keys and values are then cached
    reference: PreTrainedModel | None = None  # the model whose loss `excess_loss` subtracts

    def __post_init__(self) -> None:
        if self.draw not in DRAWS:
            raise ValueError(f"draw must be one of {', '.join(DRAWS)}, not {self.draw!r}")
        if self.layers is not None and self.layers < 1:
            raise ValueError(f"layers must be at least 1, not {self.layers}")


@dataclass
class ScoringPass:
    """The result of a scoring pass."""

    scores: dict[str, Tensor]  # (B, S) float32 by name
    cached_kv: CachedKeyValues | None = None
    loss: Tensor | None = None  # the sum over all supervised targets; None where only some layers ran
    supervised: Tensor | None = None  # N


def run_scoring_pass(
    model: PreTrainedModel,
    stack: Stack,
    kwargs: dict[str, Any],
    options: ScoringOptions,
    needs: tuple[str, ...],
    *,
    num_supervised: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> ScoringPass:
    """Runs the model once over all tokens without gradients.

    Args:
        model: a causal model whose head may be run on chunks of rows (`loss.why_not_in_chunks`).
        kwargs: of its forward, "labels" among them.
        needs: of `SCORES`; a pass through all layers makes the losses in any case.
        num_supervised: N, where the caller knows it on the host.

    Raises UnsupportedModelError where something between attention and head cannot be recorded.
    """
    recording = _Recording(keep=options.layers is None)
    if "attention" in needs:
        recording.scored_module = attention_modules(stack.layers[(options.layers or len(stack.layers)) - 1])[0]
        recording.real = kwargs.get("attention_mask")
    rows = WithheldRows(model.get_output_embeddings(), num_supervised, chunk_bytes)
    losses = TokenLosses(rows, "gradient" in needs)
    if options.layers is not None and needs == ("attention",):
        kwargs = kwargs | {"labels": None}  # no losses are needed: the head gets no rows and costs nothing
    with torch.no_grad(), ExitStack() as undo, replaced_attention(stack.configs, recording.attention):
        # Without gradients, checkpointing would only store random states.
        for module in (*stack.layers, *stack.around):
            if getattr(module, "gradient_checkpointing", False):
                set_until_undone(undo, module, "gradient_checkpointing", False)
        if options.layers is not None:
            _keep_first_layers(undo, stack, options.layers)
        put_loss(undo, model, losses)
        # `forward`, not the model itself: its hooks started this, and run once per step.
        model.forward(**kwargs)
    scores = losses.scores
    if recording.scored_module is not None:
        if recording.received is None:
            raise UnsupportedModelError(f"{type(recording.scored_module).__name__} was not reached by the scoring pass")
        scores["attention"] = recording.received
    if "excess_loss" in needs:
        scores["excess_loss"] = scores["loss"] - _reference_losses(options.reference, kwargs, losses)
    if options.layers is not None:
        return ScoringPass(scores)
    if len(recording.cached_kv) != stack.calls:
        raise UnsupportedModelError(f"{len(recording.cached_kv)} attention calls were recorded, not {stack.calls}")
    return ScoringPass(scores, recording.cached_kv, scores["loss"].sum(), losses.count)


@uncompiled
def use_cached_key_values(step: Step, call: LayerCall) -> None:
    """In place of the unselected tokens' pass: their keys and values from the scoring pass, removed from its cache."""
    cached = step.plan.cached_kv.popleft()  # 2 x (B, G, S, d)
    indices = step.indices(UNSELECTED)
    call.unselected_kv = tuple(gather_tokens(tensor.transpose(1, 2), indices).transpose(1, 2) for tensor in cached)
    del cached
    join_key_values(step, call)


def _reference_losses(reference: PreTrainedModel, kwargs: dict[str, Any], own: "TokenLosses") -> Tensor:
    """(B, S): the losses of the reference model on the same targets."""
    if reference is None:
        raise ValueError("excess_loss is a loss minus that of another model: give ScoringOptions a reference")
    losses = TokenLosses(replace(own.rows, head=reference.get_output_embeddings()))
    device = own.scores["loss"].device
    if next(reference.parameters()).device != device:
        reference.to(device)
    reference.eval()
    with torch.no_grad(), ExitStack() as undo:
        put_loss(undo, reference, losses)
        reference(**kwargs)
    return losses.scores["loss"]


@dataclass(eq=False)
class TokenLosses:
    """In place of a causal model's loss function: each target's own loss, and the norm of its gradient."""

    rows: WithheldRows
    gradients: bool = False
    scores: dict[str, Tensor] = field(default_factory=dict)  # "loss", and "gradient" if wanted: (B, S) float32
    count: Tensor | None = None  # N

    def __call__(self, logits: Tensor, labels: Tensor, vocab_size: Any = None, **kwargs: Any) -> Tensor:
        targets = next_targets(labels, **kwargs)
        rows, supervised, indices = self.rows.with_loss(logits, targets)
        self.count = supervised.sum()
        losses, norms = [], []
        for chunk in self.rows.in_chunks(rows):
            if self.gradients:
                of_rows, gradient, scale = row_gradients(self.rows.losses, *chunk)
                norms.append(gradient.to(self.rows.dtype).norm(dim=-1) / scale)
            else:
                of_rows = self.rows.losses(*chunk)
            losses.append(of_rows)
        for name, parts in (("loss", losses), ("gradient", norms)):
            if parts:
                values = torch.cat(parts)  # (N,)
                if indices is not None:  # 0 elsewhere
                    values = values.new_zeros(targets.numel()).index_copy_(0, indices, values)
                self.scores[name] = values.view(targets.shape)
        return self.scores["loss"].sum()


# ------------------------------------------------------------------------------------------------ inside the model


@dataclass
class _Recording:
    """What the attention calls of a scoring pass leave."""

    keep: bool
    cached_kv: CachedKeyValues = field(default_factory=deque)
    scored_module: nn.Module | None = None  # the attention module whose weights are wanted
    real: Tensor | None = None  # (B, S), 0 at padding
    received: Tensor | None = None  # (B, S)

    def attention(
        self, own: Callable, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **options
    ) -> tuple[Tensor, Any]:
        """The model's own attention, whose inputs are recorded."""
        if self.keep:
            self.cached_kv.append((in_own_storage(key), in_own_storage(value)))
        if module is self.scored_module:
            self.received = attention_received(module, query, key, mask, self.real, **options)
        return own(module, query, key, value, mask, **options)


def _keep_first_layers(undo: ExitStack, stack: Stack, count: int) -> None:
    """Until `undo` is closed, the model has only its first `count` layers."""
    children = [(module, name, child) for module in stack.around for name, child in module._modules.items()]
    holders = [(module, name) for module, name, child in children if child is stack.layers]
    if len(holders) != 1:
        raise UnsupportedModelError("the model's list of layers stands in several places")
    (module, name) = holders[0]
    undo.callback(setattr, module, name, stack.layers)
    setattr(module, name, nn.ModuleList(list(stack.layers)[:count]))
