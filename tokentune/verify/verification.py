"""The verification: a model is compared with the definition of the method before it is patched.

A tiny random copy of the model (`verify/tiny_copy.py`) runs twice on a padded batch: once patched, once by the
definition (Simoulin et al., EMNLP 2024, section 3):

    run the unmodified model; replace each row of a layer's input outside of the selection by a constant, and
    likewise each query, key and value inside attention; take the loss over the selected rows.

Outputs and all parameter gradients have to agree, and the definition's outputs have to be those of the unpatched model.
The verification also finds out which rows the head needs (`profile.Rows`) and which token it pools.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokentune.core.attention.correction import gradient_scales
from tokentune.core.groups import TokenGroups
from tokentune.core.layers import arguments_per_token, attention_modules, transformer_layers
from tokentune.core.loss import why_not_in_chunks
from tokentune.core.patched import Settings
from tokentune.core.patching import install_hooks, remove_tokentune
from tokentune.core.profile import SEQUENCE_HEADS, Pooling, Profile, Rows
from tokentune.errors import UnsupportedModelError
from tokentune.sampling.sampler import mask_unselected_labels
from tokentune.verify.definition import definition_of_the_method
from tokentune.verify.tiny_copy import Float64, tiny_copy, undisturbed

# Sizes that differ from one another and from every size of the tiny model, so that none is mistaken for another.
BATCH, LENGTH, PADDING, SELECTED = 3, 19, 4, 7
OTHER_LENGTH = 23  # a second length: arguments whose size changes with it have a row per token
TOLERANCE = 1e-9  # relative, in float64 throughout
_TOKEN_HEADS = ("ForCausalLM", "ForMaskedLM", "ForTokenClassification")


@dataclass
class _Trial:
    """A tiny model, a batch for it, and the unpatched model's output for that batch."""

    tiny: PreTrainedModel
    batch: dict[str, Tensor]
    side: str
    positions: Tensor  # (B, K)
    untouched: Tensor
    pooling: Pooling | None


def verified_profile(model: PreTrainedModel) -> Profile:
    """Compare a tiny copy of `model` with the definition of the method, on both sides of padding.

    Raises:
        UnsupportedModelError: with the place and the size of the first mismatch.
    """
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise UnsupportedModelError(
            "`config.output_router_logits` adds a loss over the routers of all tokens: set it to False"
        )
    with undisturbed():
        try:
            tiny = tiny_copy(model)
            per_token = _arguments_per_token(tiny)
            trials = [_trial(tiny, side) for side in ("right", "left")]
        except UnsupportedModelError:
            raise
        except Exception as error:  # the model's own code may raise anything on sizes that it was not written for
            raise UnsupportedModelError(
                f"no small copy of {type(model).__name__} could be run to verify it: {type(error).__name__}: {error}"
            ) from error
        pooling = next((trial.pooling for trial in trials if trial.pooling is not None), None)
        first_error = None
        for rows in (Rows.SELECTED, Rows.GATHERED, Rows.ALL):
            try:
                for trial in trials:
                    _compare(trial, Profile(rows, pooling, per_token=per_token))
                profile = Profile(rows, pooling, per_token=per_token)
                return replace(profile, whole_logits=_why_whole_logits(trials[0], profile))
            except UnsupportedModelError as error:
                first_error = first_error or error
        raise UnsupportedModelError(f"{first_error}{_likely_reason(tiny, str(first_error))}") from first_error


def verify_correction(model: PreTrainedModel, profile: Profile) -> None:
    """Compare a tiny copy of a causal `model` with the definition of the corrected gradient.

    Raises:
        UnsupportedModelError: with the place and the size of the first mismatch.
    """
    with undisturbed():
        tiny = tiny_copy(model)
        for side in ("right", "left"):
            _compare(_trial(tiny, side), profile, correction=1.0)


def _likely_reason(tiny: PreTrainedModel, message: str) -> str:
    """What in the model's code explains a mismatch; empty where nothing is found."""
    attention = attention_modules(transformer_layers(tiny).layers)[0]
    if "DeferredMask" in message:
        return f" ({type(attention).__name__} computes with the mask itself, before attention)"
    if "arange" in inspect.unwrap(type(attention).forward).__code__.co_names:
        return f" ({type(attention).__name__} counts the tokens it is given, which are one group's, not the sequence's)"
    return ""


def _arguments_per_token(tiny: PreTrainedModel) -> dict[str, bool]:
    def run(length: int) -> None:
        mask = torch.ones(BATCH, length, dtype=torch.long)
        mask[1, length - PADDING :] = 0  # without padding, many models make no mask
        with Float64(), torch.no_grad():
            tiny(**_inputs(tiny, mask))

    return arguments_per_token(transformer_layers(tiny), run, BATCH, (LENGTH, OTHER_LENGTH))


# --- what is tried ----------------------------------------------------------------------------------------------


def _trial(tiny: PreTrainedModel, side: str) -> _Trial:
    """A padded batch with labels for the model's head, and a selection that holds what the head pools."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    if side != "no":
        mask[1, slice(0, PADDING) if side == "left" else slice(LENGTH - PADDING, LENGTH)] = 0
    batch = _inputs(tiny, mask)
    batch |= _labels(tiny, mask)

    outputs = []
    handle = transformer_layers(tiny).layers[-1].register_forward_hook(lambda *call: outputs.append(_hidden(call[2])))
    untouched, result = _forward(tiny, batch)
    handle.remove()
    length = outputs[-1].shape[1]
    mask = mask if "attention_mask" in batch else torch.ones(BATCH, length, dtype=torch.long)
    pooling = _pooling(result, outputs[-1], mask, batch.get("input_ids"))
    if pooling is Pooling.FIRST and side == "left" and not mask.all():  # it would pool padding
        return _trial(tiny, "no")
    scores = torch.rand(BATCH, length).masked_fill(mask == 0, 2.0)
    scores[1, mask[1].argmin()] = -1.0  # one padding position, as short rows are filled up with padding
    if pooling is Pooling.FIRST:
        scores[:, 0] = -1.0
    if pooling in (Pooling.LAST, Pooling.LAST_NON_PAD):
        last = mask if pooling is Pooling.LAST else batch["input_ids"] != 0
        scores[torch.arange(BATCH), _last(last)] = -1.0
    positions = scores.argsort(1)[:, :SELECTED].sort(1).values
    return _Trial(tiny, batch, side, positions, untouched.detach(), pooling)


def _inputs(tiny: PreTrainedModel, mask: Tensor) -> dict[str, Tensor]:
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


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _forward(tiny: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
    with Float64():
        result = tiny(**batch)
    if "start_positions" in batch:
        return torch.stack((result.start_logits, result.end_logits), dim=-1), result
    output = getattr(result, "logits" if "labels" in batch else "last_hidden_state", None)
    if output is None:
        raise UnsupportedModelError(f"the head of {type(tiny).__name__} ({tiny.loss_type}) is not served")
    return output, result


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


# --- the comparison ---------------------------------------------------------------------------------------------------


def _compare(trial: _Trial, profile: Profile, correction: float = 0.0) -> None:
    """Raises UnsupportedModelError unless the patched model agrees with the definition."""
    tiny, positions = trial.tiny, trial.positions
    what = f"{type(tiny).__name__}, {trial.side} padding" + (", gradient_correction" if correction else "")
    scales = gradient_scales(positions, trial.batch.get("input_ids"), trial.batch.get("attention_mask"), correction)
    defined_layers: list[Tensor] = []
    with (
        definition_of_the_method(tiny, positions, last_output=profile.rows is Rows.ALL, scales=scales),
        _recorded(tiny, defined_layers),
    ):
        defined, defined_gradients = _step(tiny, _selected_labels(trial), positions)
    real = trial.batch.get("attention_mask", torch.ones(defined.shape[:2])).bool()
    per_token = defined.shape[:2] == real.shape and defined.ndim == 3
    seen = real if per_token else slice(None)
    _agree(defined[seen], trial.untouched[seen], f"{what}: outputs of its own attention function")

    install_hooks(tiny)
    tiny._tokentune = Settings(None, "random", profile, transformer_layers(tiny), gradient_correction=correction)
    found_layers: list[Tensor] = []
    try:
        with _recorded(tiny, found_layers):
            found, gradients = _step(tiny, trial.batch | {"selected_positions": positions}, positions)
    except UnsupportedModelError:
        raise
    except Exception as error:  # the model's own code may raise anything on a part of a sequence
        raise UnsupportedModelError(f"{what} fails on groups of tokens: {type(error).__name__}: {error}") from error
    finally:
        remove_tokentune(tiny)
    rows = torch.arange(BATCH)[:, None]
    if per_token:
        chosen = real[rows, positions]
        for index, (one, other) in enumerate(zip(found_layers[:-1], defined_layers[:-1], strict=True)):
            _agree(one[chosen], other[rows, positions][chosen], f"{what}: outputs of layer {index}")
    if per_token and profile.rows is not Rows.ALL:
        _agree(found[chosen], defined[rows, positions][chosen], f"{what}: outputs of the last layer or the head")
    else:
        _agree(found[seen], defined[seen], f"{what}: outputs of the last layer or the head")
    scale = max(gradient.abs().max() for gradient in defined_gradients.values())
    for name in defined_gradients | gradients:  # in the order of the parameters
        if name not in gradients or name not in defined_gradients:
            raise UnsupportedModelError(f"{what}: only one of the two gives {name} a gradient")
        _agree(gradients[name], defined_gradients[name], f"{what}: gradient of {name}", 1e-3 * scale)


def _why_whole_logits(trial: _Trial, profile: Profile) -> str | None:
    """Compares the loss in chunks of two rows with the whole loss. Returns what is wrong with it, or None."""
    tiny, gradients = trial.tiny, []
    if reason := why_not_in_chunks(tiny, profile):
        return reason
    two_rows = 2 * 4 * tiny.config.get_text_config().vocab_size
    try:
        for chunked in (False, True):
            install_hooks(tiny)
            options = {"chunked_loss": chunked, "chunk_bytes": two_rows}
            tiny._tokentune = Settings(None, "random", profile, transformer_layers(tiny), **options)
            gradients.append(_step(tiny, trial.batch | {"selected_positions": trial.positions}, trial.positions)[1])
            remove_tokentune(tiny)
        scale = max(gradient.abs().max() for gradient in gradients[0].values())
        for name in gradients[0]:
            _agree(gradients[1][name], gradients[0][name], f"gradient of {name}", 1e-3 * scale)
    except Exception as error:  # the model's own code may raise anything on no rows
        return f"the loss of {type(tiny).__name__} differs in chunks, or fails: {str(error).splitlines()[0]}"
    finally:
        remove_tokentune(tiny)
    return None


@contextmanager
def _recorded(model: PreTrainedModel, outputs: list[Tensor]) -> Iterator[None]:
    """Collects what each layer call returns: (B, S, D), or the selected rows (B, K, D) of a patched model."""

    def record(layer: nn.Module, args: tuple, output: Any) -> None:
        hidden = output if isinstance(output, TokenGroups) else _hidden(output)
        outputs.append((hidden.selected if isinstance(hidden, TokenGroups) else hidden).detach())

    handles = [layer.register_forward_hook(record) for layer in transformer_layers(model).layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _selected_labels(trial: _Trial) -> dict[str, Tensor]:
    labels = trial.batch.get("labels")
    if labels is None or labels.ndim == 1 or labels.is_floating_point():
        return trial.batch
    masked = mask_unselected_labels(labels, trial.positions, causal=trial.tiny.can_generate())
    return trial.batch | {"labels": masked}


def _step(tiny: PreTrainedModel, batch: dict[str, Tensor], positions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
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


def _agree(found: Tensor, expected: Tensor, what: str, floor: float | Tensor = 1e-9) -> None:
    error = (found - expected).abs().max() / expected.abs().max().clamp(min=floor)
    if not error <= TOLERANCE:  # also if it is NaN
        raise UnsupportedModelError(f"{what} differ from the definition of the method by {error:.1e} (relative)")
