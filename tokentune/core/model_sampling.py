"""The selection that a patched model draws itself, for a training batch that came with labels and without one.

B sequences, S tokens, K selected, D hidden size, C classes
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from tokentune.core.groups import require
from tokentune.core.patched import DrawCounts
from tokentune.core.profile import SEQUENCE_HEADS, Pooling
from tokentune.core.scoring_pass import run_scoring_pass
from tokentune.core.selective_layer import CachedKeyValues
from tokentune.errors import UnsupportedModelError
from tokentune.sampling.sampler import select_tokens, target_mask

if TYPE_CHECKING:
    from tokentune.core.patched import Settings

_ANSWERS = ("start_positions", "end_positions")  # the labels of question answering: positions (B,) or (B, 1)
# What TRL's DPOTrainer has the model return beside the log-probabilities.
_OF_PREFERENCES = ("mean_logits", "log_sum_sq_probs")
_PADDING_POOLED = (
    "this model's head pools a padding token of some row, which carries no gradient: let the tokenizer pad where the "
    "head expects it (behind the tokens for a first one), with the id in config.pad_token_id"
)
_WEIGHS = "the model draws its own selection for a mean over tokens, not for a loss that weighs them"


def has_labels(kwargs: dict[str, Any]) -> bool:
    """Whether a model's keyword arguments hold what its head takes a loss from."""
    return any(kwargs.get(name) is not None for name in ("labels", *_ANSWERS))


def per_token(model: PreTrainedModel, labels: Tensor | None) -> bool:
    """Whether these are labels of tokens (B, S), not classes (B,) or (B, 1), several of them or numbers (B, C)."""
    whole = model.loss_type in SEQUENCE_HEADS
    return labels is not None and labels.ndim == 2 and not labels.is_floating_point() and not whole


class Drawn(NamedTuple):
    """What a model drew itself."""

    positions: Tensor | Callable[[Tensor], Tensor]  # (B, K), or how to draw them given (B, S, D) (images)
    weights: Tensor | None = None  # (B, K), what the loss at each of them counts; None: all alike
    cached_kv: CachedKeyValues | None = None  # the keys and values of all tokens, where a look kept them


def draw(
    model: PreTrainedModel,
    settings: "Settings",
    kwargs: dict[str, Any],
    *,
    causal: bool,
    uniform: Tensor | None = None,
    num_supervised: int | None = None,
) -> Drawn:
    """Draws the selection of a batch, after a look at it where the settings ask for one.

    Replaces `labels` in `kwargs` by those that count. Without weights it also replaces `num_items_in_batch` by its
    share that the draw holds: the sum over the draw, divided by it, has the expectation of the sum over all.

    Args:
        uniform: (B, S) in [0, 1), the random numbers to draw with; None: torch's.
        num_supervised: how many targets the batch has, where the caller knows.
    """
    labels, mask = kwargs.get("labels"), kwargs.get("attention_mask")
    tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    if tokens is None:
        return Drawn(partial(_draw_in_front_of_the_layers, settings))
    if mask is None or mask.ndim != 2:
        mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
    targets = None
    if per_token(model, labels):
        if causal:  # the padding in front of a left-padded row predicts its first token: never a target
            labels = labels.masked_fill(F.pad(mask[:, :-1], (1, 0)).to(labels.device) == 0, -100)
            kwargs["labels"] = labels
        targets = target_mask(labels, causal=causal).to(mask.device)
    scored = None
    if settings.scoring is not None:
        options = {"num_supervised": num_supervised, "chunk_bytes": settings.chunk_bytes}
        scored = run_scoring_pass(model, settings.stack, kwargs, settings.scoring, settings.needs, **options)
    positions, weights = select_tokens(
        mask,
        settings.prefix_length,
        targets=targets,
        always=_always(model, settings, kwargs, mask),
        strategy=settings.strategy,
        scores=None if uniform is None else uniform.to(mask.device),
        input_ids=kwargs.get("input_ids"),
        labels=labels if per_token(model, labels) else None,
        token_scores=None if scored is None else {name: score.to(mask.device) for name, score in scored.scores.items()},
        draw="proportional" if settings.scoring is None else settings.scoring.draw,
    )
    if targets is not None:
        supervised = targets.gather(1, positions).sum()
        settings.counts = DrawCounts(positions, mask.gather(1, positions).sum(), supervised)
        if scored is not None:
            settings.counts.loss, settings.counts.targets = scored.loss, scored.supervised
        share = supervised.clamp(min=1) / targets.sum().clamp(min=1)
        if weights is not None:
            pass  # they stand for all targets by themselves
        elif kwargs.get("num_items_in_batch") is not None:
            kwargs["num_items_in_batch"] = kwargs["num_items_in_batch"] * share
        elif causal:
            settings.finish = partial(_stand_for_all_targets, targets, share)
    return Drawn(positions, weights, None if scored is None else scored.cached_kv)


def score_given_selection(
    model: PreTrainedModel, settings: "Settings", kwargs: dict[str, Any], positions: Tensor, labels: Tensor
) -> CachedKeyValues | None:
    """Looks at all tokens of a batch whose selection somebody else drew: its loss, and the keys and values.

    Args:
        positions: (B, K).
        labels: (B, S), before the selection masked any.
    """
    options = {"chunk_bytes": settings.chunk_bytes}
    scored = run_scoring_pass(
        model, settings.stack, kwargs | {"labels": labels}, settings.scoring, settings.needs, **options
    )
    mask = kwargs.get("attention_mask")
    real = torch.ones_like(positions) if mask is None or mask.ndim != 2 else mask.gather(1, positions.to(mask.device))
    targets = target_mask(labels, causal=True)
    supervised = targets.gather(1, positions.to(targets.device)).sum()
    settings.counts = DrawCounts(positions, real.sum(), supervised, scored.loss, scored.supervised)
    return scored.cached_kv


def _always(model: PreTrainedModel, settings: "Settings", kwargs: dict[str, Any], mask: Tensor) -> Tensor | None:
    """(B, S) bool: the tokens to be selected in any case."""
    answers = [kwargs[name].to(mask.device).flatten() for name in _ANSWERS if kwargs.get(name) is not None]
    if not answers:
        pooled = pooled_tokens(settings.profile.pooling, mask, kwargs.get("input_ids"), pad_token(model))
        if pooled is not None:
            require((pooled & mask.bool()).any(1), _PADDING_POOLED)
        return pooled
    # Otherwise most draws would hold neither end of the answer.
    ends = torch.stack(answers, dim=1).clamp(0, mask.shape[1] - 1)
    return torch.zeros_like(mask, dtype=torch.bool).scatter(1, ends, True)


def _draw_in_front_of_the_layers(settings: "Settings", hidden: Tensor) -> Tensor:
    mask = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    always = pooled_tokens(settings.profile.pooling, mask)
    return select_tokens(mask, settings.prefix_length, always=always, strategy=settings.strategy)[0]


def pad_token(model: PreTrainedModel) -> int | None:
    """The id by which a model's head knows padding."""
    return getattr(model.config.get_text_config(), "pad_token_id", None)


def pooled_tokens(
    pooling: Pooling | None, mask: Tensor, input_ids: Tensor | None = None, pad_token_id: int | None = None
) -> Tensor | None:
    """(B, S) bool: the token that the head pools, which has to be selected; None where it pools none or all.

    `input_ids` (B, S) and `pad_token_id` are what transformers' decoders look for it by: without one of them they take
    the last place, padding or not.
    """
    if pooling not in (Pooling.FIRST, Pooling.LAST, Pooling.LAST_NON_PAD):
        return None
    index = torch.arange(mask.shape[1], device=mask.device)
    if pooling is Pooling.FIRST:
        return (index == 0).expand(mask.shape)
    if pooling is Pooling.LAST_NON_PAD:
        by_id = input_ids is not None and pad_token_id is not None
        mask = (input_ids != pad_token_id).to(mask) if by_id else torch.ones_like(mask)
    return index == (index * mask).argmax(dim=1, keepdim=True)


def _stand_for_all_targets(targets: Tensor, share: Tensor, output: Any) -> None:
    """Scales what TRL's trainers sum up over the tokens of an output, in place, to stand for all supervised tokens.

    They divide the sum of `log_probs` (B, S - 1) by a count of all of them, taken outside of the model. That is right
    for a plain sum alone: refused are losses that weigh tokens (`dft`, preferences, rewards), here where the output
    holds what only such a loss asks for, which would work with it before its backward pass; otherwise in that.
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
