"""The selection of a forward pass: given by the caller, or drawn by a patched model for a training batch with labels.

B sequences, S tokens, K selected, D hidden size, C classes
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from tokentune.core.compat.bypassed_hooks import WEIGHS
from tokentune.core.groups import require
from tokentune.core.patched import Settings
from tokentune.core.profile import Rows, pooled_tokens
from tokentune.core.scoring_pass import ScoringPass, run_scoring_pass
from tokentune.core.step_plan import Batch, DrawCounts, ModelState, Request, StepPlan
from tokentune.errors import UnsupportedModelError
from tokentune.sampling.sampler import IGNORED_LABEL, select_tokens, target_mask

# What TRL's DPOTrainer has the model return beside the log-probabilities.
_OF_PREFERENCES = ("mean_logits", "log_sum_sq_probs")
_PADDING_POOLED = (
    "this model's head pools a padding token of some row, which carries no gradient: let the tokenizer pad where the "
    "head expects it (behind the tokens for a first one), with the id in config.pad_token_id"
)


def without_padding_targets(batch: Batch) -> Tensor:
    """A causal model's labels (B, S) for a draw: padding in front of a row predicts its first token, never a target."""
    before = F.pad(batch.token_mask()[:, :-1], (1, 0))  # (B, S): whether the token before is real
    return batch.labels.masked_fill(before.to(batch.labels.device) == 0, IGNORED_LABEL)


def choose_tokens(
    model: PreTrainedModel,
    settings: Settings,
    request: Request,
    inputs: dict[str, Any],
    batch: Batch,
    state: ModelState,
) -> StepPlan:
    """The selection of a forward pass, the requested one or a draw; a scoring pass comes first where one is asked for.

    Args:
        inputs: the keyword arguments of the model's own forward.
    """
    scored = _score(model, settings, request, inputs, state)
    if request.selected_positions is None:
        return _draw(settings, request, batch, state, scored)
    positions = request.selected_positions
    selection = StepPlan(
        positions,
        request.selection_weights,
        request.num_supervised,
        request.selection_fillers,
        request.selection_probabilities,
        scored.cached_kv,
    )
    if not scored.scores:
        return selection
    targets = target_mask(batch.labels if request.all_labels is None else request.all_labels, causal=True)
    return replace(selection, counts=_counts(selection, batch.token_mask(), targets, scored))


def _score(
    model: PreTrainedModel, settings: Settings, request: Request, inputs: dict[str, Any], state: ModelState
) -> ScoringPass:
    """The scoring pass, where the settings ask for one; a batch selected whole has one too, as its loss is counted."""
    if settings.scoring is None or not (model.training and state.token_labels):
        return ScoringPass({})
    if state.rows is Rows.ALL:
        raise UnsupportedModelError("a scoring pass needs the model's own forward and loss, not a trainer's")
    options = {"chunk_bytes": settings.chunk_bytes}
    if request.selected_positions is None:
        options["num_supervised"] = request.num_supervised
    elif request.all_labels is not None:
        inputs = inputs | {"labels": request.all_labels}
    return run_scoring_pass(model, settings.stack, inputs, settings.scoring, settings.needs, **options)


def _draw(settings: Settings, request: Request, batch: Batch, state: ModelState, scored: ScoringPass) -> StepPlan:
    """Draws the selection of a batch.

    Without weights, the selection replaces `num_items_in_batch` by the share of it that was drawn: the sum over the
    draw, divided by it, has the expectation of the sum over all targets.
    """
    if batch.tokens is None:
        return StepPlan(partial(_draw_in_front_of_the_layers, settings))
    mask, labels = batch.token_mask(), batch.labels if state.token_labels else None
    targets = None if labels is None else target_mask(labels, causal=state.causal).to(mask.device)
    uniform = request.selection_draws
    drawn = select_tokens(
        mask,
        settings.prefix_length,
        targets=targets,
        always=_always(settings, batch, mask, state.pad_token_id),
        strategy=settings.strategy,
        scores=None if uniform is None else uniform.to(mask.device),
        input_ids=batch.input_ids,
        labels=labels,
        token_scores={name: score.to(mask.device) for name, score in scored.scores.items()},
        draw="proportional" if settings.scoring is None else settings.scoring.draw,
        independent=settings.gradient_correction > 0,
    )
    own = {"fillers": drawn.fillers, "probabilities": drawn.probabilities, "cached_kv": scored.cached_kv}
    selection = StepPlan(drawn.positions, drawn.weights, **own)
    if targets is None:
        return selection
    selection = replace(selection, counts=_counts(selection, mask, targets, scored))
    if drawn.weights is not None:  # they stand for all targets by themselves
        return selection
    share = selection.counts.supervised.clamp(min=1) / targets.sum().clamp(min=1)
    if batch.num_items is not None:
        return replace(selection, replaced={"num_items_in_batch": batch.num_items * share})
    return replace(selection, finish=partial(_stand_for_all_targets, targets, share)) if state.causal else selection


def _counts(selection: StepPlan, real: Tensor, targets: Tensor, scored: ScoringPass) -> DrawCounts:
    positions, fillers = selection.positions, selection.fillers
    own = torch.ones_like(positions, dtype=torch.bool) if fillers is None else ~fillers
    selected, supervised = (
        (of_all.gather(1, positions.to(of_all.device)) * own.to(of_all.device)).sum() for of_all in (real, targets)
    )
    return DrawCounts(positions, selected, supervised, scored.loss, scored.supervised)


def _always(settings: Settings, batch: Batch, mask: Tensor, pad_token_id: int | None) -> Tensor | None:
    """(B, S) bool: the tokens that are selected in any case."""
    if not batch.answers:
        pooled = pooled_tokens(settings.profile.pooling, mask, batch.input_ids, pad_token_id)
        if pooled is not None:
            require((pooled & mask.bool()).any(1), _PADDING_POOLED)
        return pooled
    # Without this, most draws would have neither end of the answer.
    answers = [positions.to(mask.device).flatten() for positions in batch.answers]
    ends = torch.stack(answers, dim=1).clamp(0, mask.shape[1] - 1)
    return torch.zeros_like(mask, dtype=torch.bool).scatter(1, ends, True)


def _draw_in_front_of_the_layers(settings: Settings, hidden: Tensor) -> Tensor:
    mask = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    always = pooled_tokens(settings.profile.pooling, mask)
    return select_tokens(mask, settings.prefix_length, always=always, strategy=settings.strategy).positions


def _stand_for_all_targets(targets: Tensor, share: Tensor, output: Any) -> None:
    """Scales what TRL's trainers sum up over the tokens of an output, in place, to stand for all supervised tokens.

    They divide the sum of `log_probs` (B, S - 1) by the number of all supervised tokens, which they count outside of
    the model. That is right only for a plain sum. Losses that weight tokens (`dft`, preferences, rewards) are refused:
    here, where the output has what only such a loss uses; otherwise in the backward pass, by the gradient.
    """
    if getattr(output, "log_probs", None) is None or getattr(output, "label_mask", None) is None:
        return
    if any(getattr(output, name, None) is not None for name in _OF_PREFERENCES):
        raise UnsupportedModelError(WEIGHS)
    drawn = output.label_mask.bool()
    for name in ("log_probs", "entropy", "is_top1"):
        if getattr(output, name, None) is not None:
            setattr(output, name, getattr(output, name) / share)
    output.label_mask = targets[:, :-1].to(drawn.device)  # position t predicts the label at t + 1

    def check(gradient: Tensor) -> None:
        alike = gradient.masked_fill(~drawn, -torch.inf).amax() == gradient.masked_fill(~drawn, torch.inf).amin()
        require(alike, WEIGHS)

    if output.log_probs.requires_grad:
        output.log_probs.register_hook(check)
