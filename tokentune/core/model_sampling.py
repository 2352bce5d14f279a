"""The selection of a forward pass: given by the caller, or drawn by a patched model for a training batch with labels.

B sequences, S tokens, K selected, D hidden size, C classes
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from tokentune.core.compat.step_checks import check_positions
from tokentune.core.groups import require
from tokentune.core.patched import Settings
from tokentune.core.profile import SEQUENCE_HEADS, Rows, pad_token, pooled_tokens
from tokentune.core.scoring_pass import ScoringPass, run_scoring_pass
from tokentune.core.step_plan import DrawCounts, ModelState, Request, Selection, selects_all
from tokentune.errors import UnsupportedModelError
from tokentune.sampling.sampler import select_tokens, target_mask

_ANSWERS = ("start_positions", "end_positions")  # the labels of question answering: positions (B,) or (B, 1)
# What TRL's DPOTrainer has the model return beside the log-probabilities.
_OF_PREFERENCES = ("mean_logits", "log_sum_sq_probs")
_PADDING_POOLED = (
    "this model's head pools a padding token of some row, which carries no gradient: let the tokenizer pad where the "
    "head expects it (behind the tokens for a first one), with the id in config.pad_token_id"
)
_WEIGHS = "the model draws its own selection for a mean over tokens, not for a loss that weighs them"


def has_labels(inputs: Mapping[str, Any]) -> bool:
    """Whether a model's keyword arguments hold what its head takes a loss from."""
    return any(inputs.get(name) is not None for name in ("labels", *_ANSWERS))


def are_per_token(model: PreTrainedModel, labels: Tensor | None) -> bool:
    """Whether labels are of tokens (B, S); not classes (B,) or (B, 1), several classes or numbers (B, C)."""
    whole = model.loss_type in SEQUENCE_HEADS
    return labels is not None and labels.ndim == 2 and not labels.is_floating_point() and not whole


def choose_tokens(
    model: PreTrainedModel, settings: Settings, request: Request, inputs: dict[str, Any], state: ModelState
) -> Selection:
    """The selection of a forward pass: the requested one, or a draw. A scoring pass comes first where it is set.

    Args:
        inputs: the keyword arguments of the model's own forward.

    Raises:
        UnsupportedModelError: a scoring pass where another library takes the loss.
        ValueError: given positions that this model cannot select.
    """
    scores_first = settings.scoring is not None and model.training and state.token_labels
    if scores_first and state.rows is Rows.ALL:
        raise UnsupportedModelError("a scoring pass needs the model's own forward and loss, not a trainer's")
    given = request.selected_positions is not None
    if given:
        selection = Selection(request.selected_positions, request.selection_weights, request.num_supervised)
    else:
        selection = _draw(model, settings, request, inputs, state)
    if isinstance(selection.positions, Tensor):
        check_positions(model, settings.profile.pooling, selection.positions, inputs)
    if scores_first and given and not selects_all(selection.positions, inputs):
        labels = inputs["labels"] if request.all_labels is None else request.all_labels
        return _score_given(model, settings, inputs | {"labels": labels}, selection)
    return selection


def _draw(
    model: PreTrainedModel, settings: Settings, request: Request, inputs: dict[str, Any], state: ModelState
) -> Selection:
    """Draws the selection of a batch.

    The selection replaces `labels` by those that count. Without weights it also replaces `num_items_in_batch` by the
    share of it that was drawn: the sum over the draw, divided by it, has the expectation of the sum over all targets.
    """
    labels, mask = inputs.get("labels"), inputs.get("attention_mask")
    tokens = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
    if tokens is None:
        return Selection(partial(_draw_in_front_of_the_layers, settings))
    if mask is None or mask.ndim != 2:
        mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
    replaced: dict[str, Any] = {}
    targets = None
    if state.token_labels:
        if state.causal:  # the padding in front of a left-padded row predicts its first token: never a target
            labels = labels.masked_fill(F.pad(mask[:, :-1], (1, 0)).to(labels.device) == 0, -100)
            replaced["labels"] = labels
        targets = target_mask(labels, causal=state.causal).to(mask.device)
    scored = None if settings.scoring is None else _score(model, settings, inputs | replaced, request.num_supervised)
    uniform = request.selection_draws
    positions, weights = select_tokens(
        mask,
        settings.prefix_length,
        targets=targets,
        always=_always(model, settings, inputs, mask),
        strategy=settings.strategy,
        scores=None if uniform is None else uniform.to(mask.device),
        input_ids=inputs.get("input_ids"),
        labels=labels if state.token_labels else None,
        token_scores=None if scored is None else {name: score.to(mask.device) for name, score in scored.scores.items()},
        draw="proportional" if settings.scoring is None else settings.scoring.draw,
    )
    selection = Selection(positions, weights, replaced=replaced)
    if scored is not None:
        selection = replace(selection, cached_kv=scored.cached_kv)
    if targets is None:
        return selection
    supervised = targets.gather(1, positions).sum()
    counts = _counts(positions, mask.gather(1, positions).sum(), supervised, scored)
    share = supervised.clamp(min=1) / targets.sum().clamp(min=1)
    finish = None
    if weights is not None:
        pass  # they stand for all targets by themselves
    elif inputs.get("num_items_in_batch") is not None:
        replaced["num_items_in_batch"] = inputs["num_items_in_batch"] * share
    elif state.causal:
        finish = partial(_stand_for_all_targets, targets, share)
    return replace(selection, counts=counts, finish=finish)


def _score(
    model: PreTrainedModel, settings: Settings, inputs: dict[str, Any], num_supervised: int | None = None
) -> ScoringPass:
    options = {"num_supervised": num_supervised, "chunk_bytes": settings.chunk_bytes}
    return run_scoring_pass(model, settings.stack, inputs, settings.scoring, settings.needs, **options)


def _score_given(model: PreTrainedModel, settings: Settings, inputs: dict[str, Any], selection: Selection) -> Selection:
    """A scoring pass for given positions: it adds the loss over all tokens, and the cached keys and values.

    Args:
        inputs: with the labels (B, S) from before the selection masked any.
    """
    scored = _score(model, settings, inputs)
    positions, mask = selection.positions, inputs.get("attention_mask")
    real = torch.ones_like(positions) if mask is None or mask.ndim != 2 else mask.gather(1, positions.to(mask.device))
    targets = target_mask(inputs["labels"], causal=True)
    supervised = targets.gather(1, positions.to(targets.device)).sum()
    counts = _counts(positions, real.sum(), supervised, scored)
    return replace(selection, cached_kv=scored.cached_kv, counts=counts)


def _counts(positions: Tensor, selected: Tensor, supervised: Tensor, scored: ScoringPass | None) -> DrawCounts:
    loss, targets = (None, None) if scored is None else (scored.loss, scored.supervised)
    return DrawCounts(positions, selected, supervised, loss, targets)


def _always(model: PreTrainedModel, settings: Settings, inputs: dict[str, Any], mask: Tensor) -> Tensor | None:
    """(B, S) bool: the tokens that are selected in any case."""
    answers = [inputs[name].to(mask.device).flatten() for name in _ANSWERS if inputs.get(name) is not None]
    if not answers:
        pooled = pooled_tokens(settings.profile.pooling, mask, inputs.get("input_ids"), pad_token(model))
        if pooled is not None:
            require((pooled & mask.bool()).any(1), _PADDING_POOLED)
        return pooled
    # Without this, most draws would have neither end of the answer.
    ends = torch.stack(answers, dim=1).clamp(0, mask.shape[1] - 1)
    return torch.zeros_like(mask, dtype=torch.bool).scatter(1, ends, True)


def _draw_in_front_of_the_layers(settings: Settings, hidden: Tensor) -> Tensor:
    mask = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    always = pooled_tokens(settings.profile.pooling, mask)
    return select_tokens(mask, settings.prefix_length, always=always, strategy=settings.strategy)[0]


def _stand_for_all_targets(targets: Tensor, share: Tensor, output: Any) -> None:
    """Scales what TRL's trainers sum up over the tokens of an output, in place, to stand for all supervised tokens.

    They divide the sum of `log_probs` (B, S - 1) by the number of all supervised tokens, which they count outside of
    the model. That is right only for a plain sum. Losses that weight tokens (`dft`, preferences, rewards) are refused:
    here, where the output has what only such a loss uses; otherwise in the backward pass, by the gradient.
    """
    if getattr(output, "log_probs", None) is None or getattr(output, "label_mask", None) is None:
        return
    if any(getattr(output, name, None) is not None for name in _OF_PREFERENCES):
        raise UnsupportedModelError(_WEIGHS)
    drawn = output.label_mask.bool()
    for name in ("log_probs", "entropy", "is_top1"):
        if getattr(output, name, None) is not None:
            setattr(output, name, getattr(output, name) / share)
    output.label_mask = targets[:, :-1].to(drawn.device)  # position t predicts the label at t + 1

    def check(gradient: Tensor) -> None:
        alike = gradient.masked_fill(~drawn, -torch.inf).amax() == gradient.masked_fill(~drawn, torch.inf).amin()
        require(alike, _WEIGHS)

    if output.log_probs.requires_grad:
        output.log_probs.register_hook(check)
