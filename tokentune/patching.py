"""Putting the method into a model instance, and taking it out again.

    B sequences, S tokens, K selected, V vocabulary

`apply_tokentune` adds forward hooks to the given instance, nothing else: its classes, its `forward` methods, its
configuration and what `save_pretrained` writes stay as they are. The model's pre-hook starts a step when a selection
is given (or drawn), its post-hook ends it; in between the configuration names the attention function of
`selective.py`, and the loss of a causal model is taken at the selected positions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from tokentune.attention import IMPLEMENTATION, UnsupportedModelError, recipe_from_functions
from tokentune.selection import mask_unselected_labels, select_positions, target_mask
from tokentune.selective import CURRENT_STEP, Step, enter_layer, leave_layer, selective_attention
from tokentune.structure import attention_modules, transformer_layers
from tokentune.verification import verify_model

_SETTINGS = "_tokentune"  # the attribute of a patched model that holds its Settings
_REFUSED = ("output_attentions", "output_hidden_states", "output_router_logits", "past_key_values")
_QUESTION_LABELS = ("start_positions", "end_positions")


@dataclass
class Settings:
    """How a patched model draws its own selection; kept on the model, so that a deep copy has it too."""

    prefix_length: int | float | None
    strategy: str
    running: dict[str, Any] | None = None  # of the step under way: what the post-hook has to put back


def apply_tokentune(
    model: nn.Module, prefix_length: int | float | None = None, *, strategy: str = "random", verify: bool = True
) -> nn.Module:
    """Patch this instance, a transformers model or a peft model around one, and return it. Twice is the same as once.

    Afterwards `model(..., selected_positions=positions)`, with positions (B, K) int64, distinct and ascending in each
    row, runs the selective forward and returns K rows: logits (B, K, V), or last_hidden_state (B, K, D) from a model
    without a head. A causal model's loss is the mean over the selected positions whose next token is supervised.
    Without `selected_positions` the model is the original one, generation included, with one exception:

    Args:
        prefix_length: tokens per sequence to select, a count (int) or a proportion (float). When given, the model
            draws the selection itself whenever it is in training mode and called with labels.
        strategy: how it draws, one of `tokentune.selection.STRATEGIES`.
        verify: first compare a tiny random copy with the definition of the method (`verification.py`).

    Raises:
        UnsupportedModelError: the model cannot be served exactly; the message names the part and the reason.
    """
    owner = _owner(model)
    if not hasattr(owner, _SETTINGS):
        layers = transformer_layers(owner)
        if verify:
            verify_model(owner)
        _register_interfaces()
        for layer in layers:
            last = layer is layers[-1]
            layer.register_forward_pre_hook(partial(enter_layer, last=last), with_kwargs=True)
            layer.register_forward_hook(partial(leave_layer, last=last))
        owner.register_forward_pre_hook(_begin_step, with_kwargs=True)
        owner.register_forward_hook(_end_step, always_call=True)
    setattr(owner, _SETTINGS, Settings(prefix_length, strategy))
    return model


def remove_tokentune(model: nn.Module) -> nn.Module:
    """Undo `apply_tokentune`: the original instance again. A model that was not patched is returned as it is."""
    owner = _owner(model)
    if hasattr(owner, _SETTINGS):
        ours = (enter_layer, leave_layer, _begin_step, _end_step)
        for module in [owner, *transformer_layers(owner)]:
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, hook in hooks.items() if getattr(hook, "func", hook) in ours]:
                    del hooks[key]
                    for flags in (
                        module._forward_pre_hooks_with_kwargs,
                        module._forward_hooks_with_kwargs,
                        module._forward_hooks_always_called,
                    ):
                        flags.pop(key, None)
        delattr(owner, _SETTINGS)
    return model


def _owner(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside whatever peft wraps around it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(f"a transformers or peft model is needed, not {type(inner).__name__}")
    return inner


def _register_interfaces() -> None:
    AttentionInterface.register(IMPLEMENTATION, selective_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, recipe_from_functions)


def _begin_step(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
    """Forward pre-hook of the model: starts a selective forward where a selection is given or to be drawn."""
    settings: Settings = getattr(model, _SETTINGS)
    parameters = signature(type(model).forward).parameters
    kwargs = dict(zip(list(parameters)[1:], args, strict=False)) | kwargs
    positions, labels = kwargs.pop("selected_positions", None), kwargs.get("labels")
    drawn = positions is None and settings.prefix_length is not None and model.training and labels is not None
    if positions is None and not drawn:
        return None
    if getattr(model, "_is_replica", False):
        raise UnsupportedModelError(
            "nn.DataParallel runs copies in threads of one process: use DistributedDataParallel"
        )
    if CURRENT_STEP.get() is not None:
        raise UnsupportedModelError("a selective forward was started inside another one")
    _refuse_arguments(model, kwargs)
    causal = _is_causal_lm(model)
    if drawn:
        positions, labels = _draw(settings, kwargs, causal=causal)
    _check_positions(model, positions, labels)

    loss_function = None
    if labels is not None and _per_token(labels):
        if causal:
            scale = _draw_scale(labels, positions) if drawn else None
            loss_function = partial(_selected_loss, model.loss_function, positions, scale)
        else:
            kwargs["labels"] = labels.gather(1, positions.to(labels.device))
    if "use_cache" in parameters or (_takes_any(parameters) and hasattr(model.config, "use_cache")):
        kwargs["use_cache"] = False
    _start(model, settings, positions, loss_function)
    return (), kwargs


def _start(model: PreTrainedModel, settings: Settings, positions: Tensor, loss_function: Callable | None) -> None:
    configs: list[Any] = []
    for config in (model.config, *(module.config for module in attention_modules(model))):
        if not any(config is known for known in configs):
            configs.append(config)
    implementations = [(config, config._attn_implementation) for config in configs]
    settings.running = {
        "implementations": implementations,
        "own_loss": model.__dict__.get("_loss_function"),
        "loss_changed": loss_function is not None,
        "token": CURRENT_STEP.set(Step(positions, implementations)),
    }
    for config in configs:
        config._attn_implementation_internal = IMPLEMENTATION
    if loss_function is not None:
        model._loss_function = loss_function


def _end_step(model: PreTrainedModel, args: tuple, output: Any) -> None:
    """Forward hook of the model, called after an error too: puts everything back."""
    settings: Settings = getattr(model, _SETTINGS)
    running, settings.running = settings.running, None
    if running is None:
        return
    CURRENT_STEP.reset(running["token"])
    for config, name in running["implementations"]:
        config._attn_implementation_internal = name
    if running["loss_changed"]:
        if running["own_loss"] is None:
            del model._loss_function
        else:
            model._loss_function = running["own_loss"]


def _refuse_arguments(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    for name in _REFUSED:
        if kwargs.get(name) not in (None, False) or (name.startswith("output") and getattr(model.config, name, False)):
            raise ValueError(f"`{name}` cannot be had together with selected_positions")
    if any(kwargs.get(name) is not None for name in _QUESTION_LABELS):
        raise UnsupportedModelError("question answering heads score every position: they cannot be trained selectively")
    keep = kwargs.get("logits_to_keep", 0)
    if isinstance(keep, Tensor) or keep:
        raise ValueError("`logits_to_keep` cannot be had together with selected_positions")


def _draw(settings: Settings, kwargs: dict[str, Any], *, causal: bool) -> tuple[Tensor, Tensor]:
    """The model's own selection (B, K) for a batch that came without one, and the labels it is to be scored on."""
    labels, mask = kwargs["labels"], kwargs.get("attention_mask")
    tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
    if tokens is None:
        raise UnsupportedModelError("drawing a selection needs input_ids or inputs_embeds; pass selected_positions")
    if mask is None or mask.ndim != 2:
        mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
    targets, first = None, None
    if _per_token(labels):
        if causal:  # the padding in front of a left-padded row predicts its first token: never a target
            labels = labels.masked_fill(F.pad(mask[:, :-1], (1, 0)).to(labels.device) == 0, -100)
            kwargs["labels"] = labels
        targets = target_mask(labels, causal=causal).to(mask.device)
    if not causal:  # the token that encoders pool
        first = torch.zeros_like(mask, dtype=torch.bool)
        first[:, 0] = True
    positions = select_positions(
        mask, settings.prefix_length, targets=targets, always=first, strategy=settings.strategy
    )
    return positions, labels


def _per_token(labels: Tensor) -> bool:
    return labels.ndim == 2 and not labels.is_floating_point()


def _check_positions(model: PreTrainedModel, positions: Tensor, labels: Tensor | None) -> None:
    if positions.ndim != 2 or positions.dtype != torch.int64 or positions.shape[1] == 0:
        raise ValueError(
            f"selected_positions must be int64 of shape (batch, selected), at least one per row; "
            f"got {positions.dtype} of shape {tuple(positions.shape)}"
        )
    pooled = any(name.split(".")[-1] == "pooler" for name, _ in model.named_modules()) or (
        labels is not None and labels.ndim == 1
    )
    if pooled and positions.device.type == "cpu" and bool((positions[:, 0] != 0).any()):
        raise ValueError("this model pools the first token: position 0 must be selected in every row")


def _is_causal_lm(model: PreTrainedModel) -> bool:
    return model.can_generate() and (model.loss_function is ForCausalLMLoss or "_loss_function" in model.__dict__)


def _takes_any(parameters: Any) -> bool:
    return any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values())


def _draw_scale(labels: Tensor, positions: Tensor) -> Tensor:
    """Supervised / selected supervised tokens, a scalar: what a sum over a draw is short of a sum over all."""
    every = target_mask(labels, causal=True).sum()
    chosen = (mask_unselected_labels(labels, positions, causal=True) != -100).sum()
    return every / chosen.clamp(min=1)


def _selected_loss(
    loss_function: Callable, positions: Tensor, scale: Tensor | None, logits: Tensor, labels: Tensor, *args, **kwargs
) -> Tensor:
    """A causal model's own loss for logits (B, K, V) of the selected rows and labels (B, S) of the whole sequence.

    Each selected position is scored on the next token of the original sequence. With `num_items_in_batch`, counted by
    the caller over all supervised tokens, a selection that the model drew itself is scaled up (`scale`) to the same
    expectation; a caller who passes the selection has counted accordingly.
    """
    targets = kwargs.pop("shift_labels", None)
    if targets is None:
        targets = F.pad(labels, (0, 1), value=-100)[:, 1:]
    targets = targets.gather(1, positions.to(targets.device))
    if logits.shape[1] != targets.shape[1]:
        raise UnsupportedModelError(f"the head returned {logits.shape[1]} rows for {targets.shape[1]} selected tokens")
    loss = loss_function(logits, labels, *args, shift_labels=targets, **kwargs)
    return loss if scale is None or kwargs.get("num_items_in_batch") is None else loss * scale.to(loss.device)
