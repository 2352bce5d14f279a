"""What the verification tries: a batch for a tiny model, a selection that its head can do with, and one step.

B sequences, S tokens, K selected, D hidden size
"""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokentune.core.groups import TokenGroups
from tokentune.core.layers import arguments_per_token, transformer_layers
from tokentune.core.profile import SEQUENCE_HEADS, Pooling
from tokentune.errors import UnsupportedModelError
from tokentune.verify.tiny_copy import Float64

# Sizes that differ from one another and from every size of the tiny model, so that none is mistaken for another.
BATCH, LENGTH, PADDING, SELECTED = 3, 19, 4, 7
OTHER_LENGTH = 23  # a second length: arguments whose size changes with it have a row per token
TOLERANCE = 1e-9  # relative, in float64 throughout
_TOKEN_HEADS = ("ForCausalLM", "ForMaskedLM", "ForTokenClassification")


@dataclass
class Trial:
    """A tiny model, a batch for it, and the unpatched model's output for that batch."""

    tiny: PreTrainedModel
    batch: dict[str, Tensor]
    side: str  # of the padding
    positions: Tensor  # (B, K)
    untouched: Tensor
    pooling: Pooling | None


def make_trial(tiny: PreTrainedModel, side: str) -> Trial:
    """A padded batch with labels for the model's head, and a selection that holds what the head pools."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    if side != "no":
        mask[1, slice(0, PADDING) if side == "left" else slice(LENGTH - PADDING, LENGTH)] = 0
    batch = inputs_for(tiny, mask) | _labels(tiny, mask)
    with layer_outputs(tiny) as outputs:
        untouched, result = _forward(tiny, batch)
    length = outputs[-1].shape[1]
    mask = mask if "attention_mask" in batch else torch.ones(BATCH, length, dtype=torch.long)
    pooling = _pooling(result, outputs[-1], mask, batch.get("input_ids"))
    if pooling is Pooling.FIRST and side == "left" and not mask.all():  # it would pool padding
        return make_trial(tiny, "no")
    scores = torch.rand(BATCH, length).masked_fill(mask == 0, 2.0)
    scores[1, mask[1].argmin()] = -1.0  # one padding position, as short rows are filled up with padding
    if pooling is Pooling.FIRST:
        scores[:, 0] = -1.0
    if pooling in (Pooling.LAST, Pooling.LAST_NON_PAD):
        last = mask if pooling is Pooling.LAST else batch["input_ids"] != 0
        scores[torch.arange(BATCH), _last(last)] = -1.0
    positions = scores.argsort(1)[:, :SELECTED].sort(1).values
    return Trial(tiny, batch, side, positions, untouched.detach(), pooling)


def inputs_for(tiny: PreTrainedModel, mask: Tensor) -> dict[str, Tensor]:
    """Random images, or random words where `mask` (B, S) is 1; for a vision-language model only words."""
    accepted = inspect.signature(type(tiny).forward).parameters
    if "input_ids" not in accepted and tiny.main_input_name == "pixel_values":
        vision = getattr(tiny.config, "vision_config", tiny.config)
        size = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
        return {"pixel_values": torch.randn(BATCH, vision.num_channels, size, size, dtype=torch.float64)}
    text = tiny.config.get_text_config()
    ids = torch.randint(1, text.vocab_size, mask.shape).masked_fill(mask == 0, 0)
    if getattr(text, "pad_token_id", None) == 0 and mask[0].all():  # also at real tokens, as where it ends texts
        ids[0, -2:] = 0
        ids[2, mask.shape[1] // 2] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in accepted and getattr(text, "type_vocab_size", 0):
        batch["token_type_ids"] = torch.randint(0, text.type_vocab_size, mask.shape)
    elif "token_type_ids" in accepted and text is not tiny.config:  # tokens of an image, which may see later ones
        batch["token_type_ids"] = torch.zeros_like(mask).index_fill_(1, torch.arange(6, 10), 1)
    if "mm_token_type_ids" in accepted:
        batch["mm_token_type_ids"] = torch.zeros_like(mask)
    return batch


def arguments_of_layers(tiny: PreTrainedModel) -> dict[str, bool]:
    """`arguments_per_token` of a tiny model, tried at two lengths."""

    def run(length: int) -> None:
        mask = torch.ones(BATCH, length, dtype=torch.long)
        mask[1, length - PADDING :] = 0  # without padding, many models make no mask
        with Float64(), torch.no_grad():
            tiny(**inputs_for(tiny, mask))

    return arguments_per_token(transformer_layers(tiny), run, BATCH, (LENGTH, OTHER_LENGTH))


def _labels(tiny: PreTrainedModel, mask: Tensor) -> dict[str, Tensor]:
    """Random labels of the kind that the head takes; none for a model without a head."""
    loss_type, config = "ForCausalLM" if tiny.can_generate() else tiny.loss_type, tiny.config
    if loss_type in _TOKEN_HEADS:
        classes = config.num_labels if loss_type == "ForTokenClassification" else config.get_text_config().vocab_size
        return {"labels": torch.randint(0, classes, mask.shape).masked_fill(mask == 0, -100)}
    if loss_type in SEQUENCE_HEADS:
        if config.problem_type == "multi_label_classification":
            return {"labels": torch.randint(0, 2, (BATCH, config.num_labels)).double()}
        if config.problem_type == "regression" or config.num_labels == 1:
            return {"labels": torch.randn(BATCH, config.num_labels, dtype=torch.float64).squeeze(1)}
        return {"labels": torch.randint(0, config.num_labels, (BATCH,))}
    if loss_type == "ForQuestionAnswering":
        return {"start_positions": torch.tensor([4, 6, 5]), "end_positions": torch.tensor([8, 7, 11])}
    if loss_type is None or tiny.base_model is tiny:
        return {}
    raise UnsupportedModelError(f"the head of {type(tiny).__name__} ({loss_type}) is not served")


@contextmanager
def layer_outputs(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Within it, what each layer call returns is collected: (B, S, D), or the selected rows (B, K, D) where patched."""
    outputs: list[Tensor] = []

    def record(layer: nn.Module, args: tuple, output: Any) -> None:
        hidden = output[0] if type(output) is tuple else output
        outputs.append(hidden.selected if isinstance(hidden, TokenGroups) else hidden)

    with ExitStack() as handles:
        for layer in transformer_layers(model).layers:
            handles.enter_context(layer.register_forward_hook(record))
        yield outputs


def _forward(tiny: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
    with Float64():
        result = tiny(**batch)
    if "start_positions" in batch:
        return torch.stack((result.start_logits, result.end_logits), dim=-1), result
    output = getattr(result, "logits" if "labels" in batch else "last_hidden_state", None)
    if output is None:
        raise UnsupportedModelError(f"the head of {type(tiny).__name__} ({tiny.loss_type}) is not served")
    return output, result


def step(tiny: PreTrainedModel, batch: dict[str, Tensor], positions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and parameter gradients of one step; without a head the loss is a projection of the selected real rows."""
    tiny.zero_grad(set_to_none=True)
    output, result = _forward(tiny, batch)
    loss = getattr(result, "loss", None)
    if loss is None:
        index = torch.arange(BATCH)[:, None]
        real = batch["attention_mask"][index, positions] if "attention_mask" in batch else torch.ones(positions.shape)
        hidden = output if output.shape[1] == SELECTED else output[index, positions]  # (B, K, D)
        weights = torch.linspace(-1, 1, hidden[0].numel(), dtype=hidden.dtype).view(hidden.shape[1:])
        loss = (hidden * weights).sum(-1)[real.bool()].sum()
    loss.backward()
    return output.detach(), {n: p.grad for n, p in tiny.named_parameters() if p.grad is not None}


def _last(mask: Tensor) -> Tensor:
    """(B,): the last true position of each row of (B, S)."""
    return mask.shape[1] - 1 - mask.flip(1).long().argmax(1)


def _pooling(result: Any, hidden: Tensor, mask: Tensor, ids: Tensor | None) -> Pooling | None:
    """Which rows of the last layer's output `hidden` (B, S, D) the head for whole sequences depends on."""
    pooled = getattr(result, "pooler_output", None)
    if pooled is None and getattr(result, "logits", None) is not None and result.logits.ndim == 2:
        pooled = result.logits
    if pooled is None:
        return None
    weights = torch.linspace(-1, 1, pooled[0].numel(), dtype=pooled.dtype)
    (gradient,) = torch.autograd.grad((pooled.flatten(1) * weights).sum(), hidden, retain_graph=True)
    used = gradient.abs().sum(-1) > 0  # (B, S)
    pooled_at = {Pooling.FIRST: torch.zeros(len(mask), dtype=torch.long), Pooling.LAST: _last(mask)}
    if ids is not None:
        pooled_at[Pooling.LAST_NON_PAD] = _last(ids != 0)  # in the tiny copy the pad token has id 0
    index = torch.arange(mask.shape[1])
    return next((way for way, at in pooled_at.items() if torch.equal(used, index == at[:, None])), Pooling.ALL)


def agree(found: Tensor, expected: Tensor, what: str, floor: float | Tensor = 1e-9) -> None:
    """Raises UnsupportedModelError unless both are the same up to rounding."""
    error = (found - expected).abs().max() / expected.abs().max().clamp(min=floor)
    if not error <= TOLERANCE:  # also if it is NaN
        raise UnsupportedModelError(f"{what} differ from the definition of the method by {error:.1e} (relative)")


def agree_on_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """`agree`, on the gradients of all parameters by name."""
    scale = max(gradient.abs().max() for gradient in expected.values())
    for name in expected | found:  # in the order of the parameters
        if name not in found or name not in expected:
            raise UnsupportedModelError(f"{what}: only one of the two gives {name} a gradient")
        agree(found[name], expected[name], f"{what}: gradient of {name}", 1e-3 * scale)
