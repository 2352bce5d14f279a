"""Putting the method into a model instance, and taking it out again.

    B sequences, S tokens, K selected, D hidden size

`install` adds forward hooks to the given instance and nothing else: its classes, its `forward` methods, its
configuration and what `save_pretrained` writes do not change. One forward pass:

    _begin_step     pre-hook of the model: reads the call, checks it, chooses the tokens (`core/model_sampling.py`),
                    plans the step (`core/step_plan.py`) and carries the plan out: until the end of the step the
                    configuration names our attention function, and the model has the loss function of the plan
    the model's own forward, with hooks on its layers (`core/selective_layer.py`)
    _end_step       post-hook of the model: puts everything back
"""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.utils import logging

from tokentune.core.activated_lora import ActivatedLora, take_over_recomputation
from tokentune.core.attention.masks import mask_from_functions
from tokentune.core.checkpointing import checkpoint_layers
from tokentune.core.compat.adapters import wrapper_bypassing_hooks
from tokentune.core.compat.bypassed_hooks import HOOKS_AT_WORK, check_hooks_ran, refuse_own_loss_of_trl
from tokentune.core.compat.foreign_hooks import are_foreign, have_foreign_hooks, warn_of_partial_views
from tokentune.core.compat.step_checks import check_positions, has_foreign_forward, is_causal_lm, require_served_step
from tokentune.core.groups import gather_tokens
from tokentune.core.layers import is_checkpointed, transformer_layers
from tokentune.core.loss import ChunkedLoss, WithheldRows, is_frozen, put_loss, selected_loss, why_not_in_chunks
from tokentune.core.model_sampling import choose_tokens, without_padding_targets
from tokentune.core.patched import SETTINGS, SETTINGS_OF_OWNER, Model, Settings, owner_of, settings_of
from tokentune.core.profile import Rows, are_per_token, pad_token
from tokentune.core.scoring_pass import use_cached_key_values
from tokentune.core.selective_layer import enter_layer, leave_layer, run_unselected, selective_attention
from tokentune.core.step import CURRENT_STEP, IMPLEMENTATION, Step, activate, uncompiled
from tokentune.core.step_plan import Batch, Loss, ModelState, Request, StepPlan, plan_step

logger = logging.get_logger(__name__)


def install(model: nn.Module, settings: Settings) -> None:
    """Gives `model`, or the model inside it that holds the layers, these settings, and the hooks if it has none."""
    owner, stack = owner_of(model), settings.stack
    if settings_of(owner) is None:
        AttentionInterface.register(IMPLEMENTATION, selective_attention)
        AttentionMaskInterface.register(IMPLEMENTATION, mask_from_functions)
        for layer in stack.layers:
            layer.register_forward_pre_hook(enter_layer, with_kwargs=True)
            layer.register_forward_hook(leave_layer)
        stack.backbone.register_forward_pre_hook(_enter_backbone)
        stack.backbone.register_forward_hook(_gather_output_rows)
        owner.register_forward_pre_hook(_begin_step, with_kwargs=True)
        owner.register_forward_hook(_end_step, always_call=True)
    wrapper = wrapper_bypassing_hooks(model)
    if wrapper is not None and _begin_for_model_inside not in wrapper._forward_pre_hooks.values():
        wrapper.register_forward_pre_hook(_begin_for_model_inside, with_kwargs=True)
        wrapper.register_forward_hook(_end_for_model_inside, always_call=True)
    setattr(owner, SETTINGS, settings)
    setattr(stack.backbone, SETTINGS_OF_OWNER, settings)
    warn_of_partial_views(owner, stack, settings.profile)


@contextmanager
def patched(model: PreTrainedModel, **options: Any) -> Iterator[None]:
    """Within it the model is patched, without a verification; `options` are those of `Settings`."""
    install(model, Settings(stack=transformer_layers(model), **options))
    try:
        yield
    finally:
        remove_tokentune(model)


def remove_tokentune(model: Model) -> Model:
    """Undoes `apply_tokentune`: the original instance again. A model that was not patched is returned unchanged."""
    owner = owner_of(model)
    if not hasattr(owner, SETTINGS):
        return model
    ours = (enter_layer, leave_layer, _enter_backbone, _gather_output_rows, _begin_step, _end_step)
    ours += (_begin_for_model_inside, _end_for_model_inside)
    for module in {*owner.modules(), *model.modules()}:
        flags = module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs
        registries = (module._forward_pre_hooks, module._forward_hooks, module._forward_hooks_always_called, *flags)
        for key in [key for hooks in registries[:2] for key, hook in hooks.items() if hook in ours]:
            for registry in registries:  # a key belongs to one hook of all modules
                registry.pop(key, None)
        module.__dict__.pop(SETTINGS_OF_OWNER, None)
    delattr(owner, SETTINGS)
    return model


@uncompiled
def _begin_step(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
    """Forward pre-hook of the model: starts a selective forward where a selection is given or to be drawn."""
    settings: Settings = getattr(model, SETTINGS)
    settings.undo.close()  # after an interrupt (Ctrl-C) torch did not call `_end_step`
    settings.undo.callback(HOOKS_AT_WORK.reset, HOOKS_AT_WORK.set(True))
    parameters = inspect.signature(type(model).forward).parameters
    given, inputs = kwargs, dict(zip(list(parameters)[1:], args, strict=False)) | kwargs
    request = Request(*(inputs.pop(name, None) for name in Request._fields))
    batch = Batch.of(inputs)
    selective = _is_selective(model, settings, request, batch)
    if selective or not torch.is_grad_enabled():
        take_over_recomputation(settings.stack.layers)
    if not selective:
        return ((), inputs) if any(name in given for name in Request._fields) else None
    require_served_step(model, settings, inputs)
    state = _state_of(model, settings, batch)
    if request.selected_positions is not None:
        check_positions(request, batch, state.profile.pooling, state.pad_token_id)
    elif state.causal and state.token_labels and batch.tokens is not None:
        inputs["labels"] = without_padding_targets(batch)
        batch = replace(batch, labels=inputs["labels"])
    if "use_cache" in parameters or hasattr(model.config.get_text_config(), "use_cache"):
        inputs["use_cache"] = False
    plan = plan_step(choose_tokens(model, settings, request, inputs, batch, state), batch, state)
    settings.counts, settings.finish = plan.counts or settings.counts, plan.finish
    _carry_out(model, settings, plan)
    return (), inputs | plan.replaced


def _is_selective(model: PreTrainedModel, settings: Settings, request: Request, batch: Batch) -> bool:
    """Whether this forward pass has a selection: a given one, or one that the model draws for a batch with labels."""
    if request.selected_positions is not None:
        return True
    draws = settings.prefix_length is not None and model.training
    if draws and not batch.has_labels and torch.is_grad_enabled():
        refuse_own_loss_of_trl()
        logger.warning_once("called without labels (label smoothing?): an ordinary forward, all tokens get gradients")
    return draws and batch.has_labels


def _state_of(model: PreTrainedModel, settings: Settings, batch: Batch) -> ModelState:
    """What of the model a plan depends on."""
    head, layers = model.get_output_embeddings(), settings.stack.layers
    frozen = head is not None and model.training and is_frozen(head)
    return ModelState(
        profile=settings.profile,
        causal=is_causal_lm(model),
        foreign_forward=has_foreign_forward(model),
        foreign_layer_hooks=have_foreign_hooks(layers),
        token_labels=are_per_token(batch.labels, model.loss_type),
        pad_token_id=pad_token(model),
        with_gradients=torch.is_grad_enabled(),
        gradient_correction=settings.gradient_correction,
        activated=bool(settings.activated),
        chunked_loss=settings.chunked_loss,
        prefers_chunks=frozen or any(map(is_checkpointed, layers)),
        not_in_chunks=why_not_in_chunks(model, settings.profile),
    )


def _carry_out(model: PreTrainedModel, settings: Settings, plan: StepPlan) -> None:
    """Sets up layers and loss for the forward pass that follows; `settings.undo` gets what puts everything back."""
    loss_function = None
    if plan.loss is Loss.CHUNKED:
        rows = WithheldRows(model.get_output_embeddings(), plan.num_supervised, settings.chunk_bytes)
        loss_function = ChunkedLoss(rows, plan.positions, plan.weights, plan.recompute_logits)
    elif plan.loss is Loss.SELECTED:
        loss_function = partial(selected_loss, model.loss_function, plan.positions)
    if not plan.all_selected:
        stack = settings.stack
        if not settings.hooks_checked:  # some may have come after the model was patched
            warn_of_partial_views(model, stack, replace(settings.profile, rows=plan.rows))
            settings.hooks_checked = True
        if plan.all_rows_between_layers:
            _move_own_hooks_inside(stack.layers)
        implementations = [(config, config._attn_implementation) for config in stack.configs]
        unselected_pass = run_unselected if plan.cached_kv is None else use_cached_key_values
        step = Step(plan, implementations, stack.calls, unselected_pass, settings.profile.per_token)
        activated = ActivatedLora(step)
        step.own_forwards = [(variant, activated.forward) for variant in settings.activated]
        activate(step, settings.undo)
        checkpoint_layers(stack, step, settings.checkpoint_rest, settings.offload_kv, settings.undo)
    if loss_function is not None:
        put_loss(settings.undo, model, loss_function)


@uncompiled
def _end_step(model: PreTrainedModel, args: tuple, output: Any) -> None:
    """Forward hook of the model, which torch calls after an error too: puts everything back."""
    settings: Settings = getattr(model, SETTINGS)
    settings.undo.close()
    finish, settings.finish = settings.finish, None
    if finish is not None and output is not None:
        finish(output)


@uncompiled
def _begin_for_model_inside(wrapper: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
    """Forward pre-hook of a wrapper that calls the model's `forward` and not the model (`wrapper_bypassing_hooks`)."""
    return _begin_step(wrapper.model, args, kwargs) if hasattr(wrapper.model, SETTINGS) else None


@uncompiled
def _end_for_model_inside(wrapper: nn.Module, args: tuple, output: Any) -> None:
    if hasattr(wrapper.model, SETTINGS):
        _end_step(wrapper.model, args, output)


@uncompiled
def _enter_backbone(backbone: PreTrainedModel, args: tuple) -> None:
    """Forward pre-hook of the model that holds the layers."""
    check_hooks_ran(backbone, getattr(backbone, SETTINGS_OF_OWNER))


@uncompiled
def _gather_output_rows(backbone: PreTrainedModel, args: tuple, output: Any) -> Any:
    """Forward hook of the model that holds the layers: takes the K selected rows of an output that had to have S."""
    step = CURRENT_STEP.get()
    if step is None or step.plan.rows is not Rows.GATHERED:
        return None
    hidden = output[0]
    gathered = gather_tokens(hidden, step.positions.to(hidden.device))
    if isinstance(output, tuple):
        return gathered, *output[1:]
    output.last_hidden_state = gathered
    return output


# ---------------------------------------------------------------------------------------------------- hooks of others
#
# A forward hook that another library puts on a layer itself, as for steering a model, gets what it would get without
# us: all rows, (B, S, D) in sequence order. For that our own hooks stand between it and the layer's forward.


def _move_own_hooks_inside(layers: Iterable[nn.Module]) -> None:
    """Where a layer has foreign hooks, ours run last before its forward, and first after it."""
    for layer in layers:
        for hooks, own, at_end in (
            (layer._forward_pre_hooks, enter_layer, True),
            (layer._forward_hooks, leave_layer, False),
        ):
            if are_foreign(hooks):
                key = next(key for key, hook in hooks.items() if hook is own)
                hooks.move_to_end(key, last=at_end)
