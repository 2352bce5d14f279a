"""Putting the method into a model instance, and taking it out again.

    B sequences, S tokens, K selected, D hidden size, V vocabulary

`install` adds forward hooks to the given instance, nothing else: its classes, its `forward` methods, its
configuration and what `save_pretrained` writes stay as they are. The model's pre-hook starts a step when a selection
is given (or drawn), its post-hook ends it; in between the configuration names the attention function of
`core/selective_layer.py`, and the loss of a causal model is taken at the selected positions.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.utils import logging

from tokentune.core.attention.correction import gradient_scales
from tokentune.core.attention.masks import mask_from_functions
from tokentune.core.checkpointing import checkpoint_layers
from tokentune.core.compat.adapters import wrapper_past_hooks
from tokentune.core.compat.bypassed_hooks import HOOKS_AT_WORK, check_hooks_ran
from tokentune.core.compat.foreign_hooks import have_hooks_of_others
from tokentune.core.compat.step_checks import (
    check_positions,
    has_foreign_forward,
    is_causal_lm,
    is_whole_sequence,
    require_served_step,
)
from tokentune.core.groups import gather_tokens
from tokentune.core.layers import transformer_layers
from tokentune.core.loss import ChunkedLoss, is_frozen, put_loss, why_not_in_chunks
from tokentune.core.model_sampling import draw, has_labels, per_token, score_given_selection
from tokentune.core.patched import SETTINGS, SETTINGS_OF_OWNER, Settings, owner_of, settings_of
from tokentune.core.selective_layer import (
    CURRENT_STEP,
    IMPLEMENTATION,
    CachedKeyValues,
    Rows,
    Step,
    activate,
    enter_layer,
    leave_layer,
    selective_attention,
    uncompiled,
)
from tokentune.errors import UnsupportedModelError
from tokentune.sampling.sampler import mask_unselected_labels

logger = logging.get_logger(__name__)
# Keyword arguments that no model's own forward takes.
_OURS = ("selected_positions", "selection_weights", "selection_draws", "num_supervised", "all_labels")


def install(model: nn.Module, settings: Settings) -> None:
    """Has `model`, or the model inside of it that holds the layers, behave so: adds the hooks where there are none."""
    owner = owner_of(model)
    if settings_of(owner) is None:
        install_hooks(owner)
    wrapper = wrapper_past_hooks(model)
    if wrapper is not None and _begin_for_model_inside not in wrapper._forward_pre_hooks.values():
        wrapper.register_forward_pre_hook(_begin_for_model_inside, with_kwargs=True)
        wrapper.register_forward_hook(_end_for_model_inside, always_call=True)
    setattr(owner, SETTINGS, settings)
    setattr(settings.stack.backbone, SETTINGS_OF_OWNER, settings)


def install_hooks(owner: PreTrainedModel) -> None:
    """Adds the hooks, and registers the attention function with transformers under a name of its own."""
    AttentionInterface.register(IMPLEMENTATION, selective_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, mask_from_functions)
    stack = transformer_layers(owner)
    for layer in stack.layers:
        layer.register_forward_pre_hook(enter_layer, with_kwargs=True)
        layer.register_forward_hook(leave_layer)
    stack.backbone.register_forward_pre_hook(_enter_backbone)
    stack.backbone.register_forward_hook(_gather_rows)
    owner.register_forward_pre_hook(_begin_step, with_kwargs=True)
    owner.register_forward_hook(_end_step, always_call=True)


def remove_tokentune(model: nn.Module) -> nn.Module:
    """Undo `apply_tokentune`: the original instance again. A model that was not patched is returned as it is."""
    owner = owner_of(model)
    if not hasattr(owner, SETTINGS):
        return model
    ours = (enter_layer, leave_layer, _enter_backbone, _gather_rows, _begin_step, _end_step)
    ours += (_begin_for_model_inside, _end_for_model_inside)
    for module in {*owner.modules(), *model.modules()}:
        for hooks, *flags in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called),
        ):
            for key in [key for key, hook in hooks.items() if hook in ours]:
                for registry in (hooks, *flags):
                    registry.pop(key, None)
        module.__dict__.pop(SETTINGS_OF_OWNER, None)
    delattr(owner, SETTINGS)
    return model


@uncompiled
def _begin_step(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
    """Forward pre-hook of the model: starts a selective forward where a selection is given or to be drawn."""
    settings: Settings = getattr(model, SETTINGS)
    _put_back(settings)  # what an interrupt (Ctrl-C) left, after which torch calls no hooks
    settings.undo.append(partial(HOOKS_AT_WORK.reset, HOOKS_AT_WORK.set(True)))
    parameters = inspect.signature(type(model).forward).parameters
    given, kwargs = kwargs, dict(zip(list(parameters)[1:], args, strict=False)) | kwargs
    positions, weights, uniform, supervised, all_labels = (kwargs.pop(name, None) for name in _OURS)
    own = positions is None and settings.prefix_length is not None and model.training
    if positions is None and not (own and has_labels(kwargs)):
        if own and torch.is_grad_enabled():
            logger.warning_once(
                "called without labels (label smoothing?): an ordinary forward, all tokens get gradients"
            )
        return ((), kwargs) if any(name in given for name in _OURS) else None
    require_served_step(model, settings, kwargs)
    causal = is_causal_lm(model)
    rows = Rows.ALL if has_foreign_forward(model) else settings.profile.rows
    if "use_cache" in parameters or hasattr(model.config.get_text_config(), "use_cache"):
        kwargs["use_cache"] = False
    scoring_pass_first = settings.scoring is not None and model.training and per_token(model, kwargs.get("labels"))
    if scoring_pass_first and rows is Rows.ALL:
        raise UnsupportedModelError("a scoring pass needs the model's own forward and loss, not a trainer's")
    cached_kv = None
    if own:
        options = {"uniform": uniform, "num_supervised": supervised}
        (positions, weights, cached_kv), supervised = draw(model, settings, kwargs, causal=causal, **options), None
    if isinstance(positions, Tensor):
        check_positions(model, settings.profile.pooling, positions, kwargs)
    if weights is not None and not (causal and rows is not Rows.ALL and per_token(model, kwargs.get("labels"))):
        raise UnsupportedModelError("selection_weights are factors of a causal model's own losses, one per token")

    whole = is_whole_sequence(positions, kwargs)
    if scoring_pass_first and not (own or whole):
        cached_kv = score_given_selection(
            model, settings, kwargs, positions, kwargs["labels"] if all_labels is None else all_labels
        )
    loss_function = None
    labels = kwargs.get("labels")
    if per_token(model, labels):
        if causal and rows is not Rows.ALL:
            loss_function = _chunked_loss(model, settings, positions, supervised, weights)
            if loss_function is None and not whole:
                loss_function = partial(_selected_loss, model.loss_function, positions)
        elif rows is Rows.ALL:
            kwargs["labels"] = mask_unselected_labels(labels, positions.to(labels.device), causal=causal)
        else:
            kwargs["labels"] = labels.gather(1, positions.to(labels.device))
    if not whole:
        scales = gradient_scales(positions, kwargs, settings.gradient_correction, weights)
        _start_step(settings, positions, rows, cached_kv, scales)
    if loss_function is not None:
        settings.undo += put_loss(model, loss_function)
    return (), kwargs


def _start_step(
    settings: Settings, positions: Any, rows: Rows, cached_kv: CachedKeyValues | None, scales: Tensor | None
) -> None:
    """Starts the selective forward; `settings.undo` gets what puts everything back."""
    implementations = [(config, config._attn_implementation) for config in settings.stack.configs]
    whole_between = have_hooks_of_others(settings.stack.layers)
    if whole_between and cached_kv is not None:
        raise UnsupportedModelError(
            "a scoring pass leaves no hidden states of the unselected tokens for others' hooks on the layers"
        )
    if whole_between and rows is Rows.SELECTED:
        rows = Rows.GATHERED  # a hook on the last layer too gets what leaves it whole
    step = Step(
        positions,
        implementations,
        settings.stack.calls,
        rows,
        cached_kv,
        scales,
        settings.profile.per_token,
        whole_between,
    )
    settings.undo += activate(step)
    settings.undo += checkpoint_layers(settings.stack, step, settings.checkpoint_rest, settings.offload_kv)


def _chunked_loss(
    model: PreTrainedModel, settings: Settings, positions: Tensor, num_supervised: int | None, weights: Tensor | None
) -> ChunkedLoss | None:
    """The loss by chunks of rows, where it is wanted: always where rows have weights."""
    if weights is None and (settings.chunked_loss is False or not torch.is_grad_enabled()):
        return None
    if reason := why_not_in_chunks(model, settings.profile):
        if settings.chunked_loss or weights is not None:
            raise UnsupportedModelError(f"{'chunked_loss' if weights is None else 'selection_weights'}: {reason}")
        return None
    head, layers = model.get_output_embeddings(), settings.stack.layers
    checkpointed = any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in layers)
    chunked = settings.chunked_loss
    if chunked is None:
        chunked = (model.training and is_frozen(head)) or checkpointed
    if weights is None and not chunked:
        return None
    options = {"weights": weights, "recompute": chunked}
    return ChunkedLoss(head, positions, num_supervised, settings.chunk_bytes, **options)


@uncompiled
def _end_step(model: PreTrainedModel, args: tuple, output: Any) -> None:
    """Forward hook of the model, called after an error too: puts everything back."""
    settings: Settings = getattr(model, SETTINGS)
    _put_back(settings)
    finish, settings.finish = settings.finish, None
    if finish is not None and output is not None:
        finish(output)


@uncompiled
def _begin_for_model_inside(wrapper: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
    """Forward pre-hook of a wrapper that calls the model's `forward` and not the model (`wrapper_past_hooks`)."""
    return _begin_step(wrapper.model, args, kwargs) if hasattr(wrapper.model, SETTINGS) else None


@uncompiled
def _end_for_model_inside(wrapper: nn.Module, args: tuple, output: Any) -> None:
    if hasattr(wrapper.model, SETTINGS):
        _end_step(wrapper.model, args, output)


def _put_back(settings: Settings) -> None:
    while settings.undo:
        settings.undo.pop()()


@uncompiled
def _enter_backbone(backbone: PreTrainedModel, args: tuple) -> None:
    """Forward pre-hook of the model that holds the layers."""
    settings = backbone.__dict__.get(SETTINGS_OF_OWNER)
    if settings is not None:  # None: it is being verified
        check_hooks_ran(backbone, settings)


@uncompiled
def _gather_rows(backbone: PreTrainedModel, args: tuple, output: Any) -> Any:
    """Forward hook of the model that holds the layers: K rows of an output that had to keep all S."""
    step = CURRENT_STEP.get()
    if step is None or step.rows is not Rows.GATHERED:
        return None
    hidden = output[0]
    gathered = gather_tokens(hidden, step.positions.to(hidden.device))
    if isinstance(output, tuple):
        return gathered, *output[1:]
    output.last_hidden_state = gathered
    return output


def _selected_loss(
    loss_function: Callable, positions: Tensor, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """A causal model's own loss for logits (B, K, V) of the selected rows and labels (B, S) of the whole sequence.

    Each selected position is scored on the next token of the original sequence.
    """
    targets = kwargs.pop("shift_labels", None)
    if targets is None:
        targets = F.pad(labels, (0, 1), value=-100)[:, 1:]
    targets = targets.gather(1, positions.to(targets.device))
    if logits.shape[1] != targets.shape[1]:
        raise UnsupportedModelError(f"the head returned {logits.shape[1]} rows for {targets.shape[1]} selected tokens")
    return loss_function(logits, labels, *args, shift_labels=targets, **kwargs)
