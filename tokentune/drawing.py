"""The selection that a patched model draws itself, for a training batch that came with labels and without one.

B sequences, S tokens, K selected, D hidden size, C classes
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokentune.groups import require
from tokentune.selection import select_positions, target_mask
from tokentune.verification import Pooling

if TYPE_CHECKING:
    from tokentune.patching import Settings

_ANSWERS = ("start_positions", "end_positions")  # the labels of question answering: positions (B,)


def has_labels(kwargs: dict[str, Any]) -> bool:
    """Whether a model's keyword arguments hold what its head takes a loss from."""
    return any(kwargs.get(name) is not None for name in ("labels", *_ANSWERS))


def per_token(labels: Tensor | None) -> bool:
    """Whether these are labels of tokens (B, S), not classes (B,) or several yes-or-no classes (B, C), floats."""
    return labels is not None and labels.ndim == 2 and not labels.is_floating_point()


def draw(settings: "Settings", kwargs: dict[str, Any], *, causal: bool) -> Tensor | Callable[[Tensor], Tensor]:
    """Positions (B, K) for a batch, or, where only the layers know the number of tokens (images), how to draw them.

    Replaces `labels` in `kwargs` by those that count, and `num_items_in_batch` by its share that the draw holds: the
    sum over the draw, divided by it, has the expectation of the sum over all.
    """
    labels, mask = kwargs.get("labels"), kwargs.get("attention_mask")
    tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    if tokens is None:
        return partial(_draw_in_front_of_the_layers, settings)
    if mask is None or mask.ndim != 2:
        mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
    targets = None
    if per_token(labels):
        if causal:  # the padding in front of a left-padded row predicts its first token: never a target
            labels = labels.masked_fill(F.pad(mask[:, :-1], (1, 0)).to(labels.device) == 0, -100)
            kwargs["labels"] = labels
        targets = target_mask(labels, causal=causal).to(mask.device)
    always = pooled_tokens(settings.profile.pooling, mask)
    answers = [kwargs[name].to(mask.device) for name in _ANSWERS if kwargs.get(name) is not None]
    if answers:  # otherwise most draws would hold neither end of the answer
        ends = torch.stack(answers, dim=1).clamp(0, mask.shape[1] - 1)
        always = torch.zeros_like(mask, dtype=torch.bool).scatter(1, ends, True)
    positions = select_positions(
        mask, settings.prefix_length, targets=targets, always=always, strategy=settings.strategy
    )
    if targets is not None:
        share = targets.gather(1, positions).sum().clamp(min=1) / targets.sum().clamp(min=1)
        if kwargs.get("num_items_in_batch") is not None:
            kwargs["num_items_in_batch"] = kwargs["num_items_in_batch"] * share
        elif causal:
            settings.finish = partial(_stand_for_all_targets, targets, share)
    return positions


def _draw_in_front_of_the_layers(settings: "Settings", hidden: Tensor) -> Tensor:
    mask = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    always = pooled_tokens(settings.profile.pooling, mask)
    return select_positions(mask, settings.prefix_length, always=always, strategy=settings.strategy)


def pooled_tokens(pooling: Pooling | None, mask: Tensor) -> Tensor | None:
    """(B, S) bool: the token that the head pools, which has to be selected; None where it pools none or all."""
    if pooling not in (Pooling.FIRST, Pooling.LAST):
        return None
    index = torch.arange(mask.shape[1], device=mask.device)
    if pooling is Pooling.FIRST:
        return (index == 0).expand(mask.shape)
    return index == (index * mask).argmax(dim=1, keepdim=True)


def _stand_for_all_targets(targets: Tensor, share: Tensor, output: Any) -> None:
    """Scales what TRL's trainers sum up over the tokens of an output, in place, to stand for all supervised tokens.

    They divide the sum of `log_probs` (B, S - 1) by a count of all of them, taken outside of the model. That is right
    for a plain sum alone: the backward pass refuses losses that weigh tokens (`dft`, preferences, rewards).
    """
    if getattr(output, "log_probs", None) is None or getattr(output, "label_mask", None) is None:
        return
    drawn = output.label_mask.bool()
    for name in ("log_probs", "entropy", "is_top1"):
        if getattr(output, name, None) is not None:
            setattr(output, name, getattr(output, name) / share)
    output.label_mask = targets[:, :-1].to(drawn.device)  # position t predicts the label at t + 1

    def check(gradient: Tensor) -> None:
        alike = gradient.masked_fill(~drawn, -torch.inf).amax() == gradient.masked_fill(~drawn, torch.inf).amin()
        require(alike, "the model draws its own selection for a mean over tokens, not for a loss that weighs them")

    if output.log_probs.requires_grad:
        output.log_probs.register_hook(check)
