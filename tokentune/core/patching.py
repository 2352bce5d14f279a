"""Putting the method into a model instance, and taking it out again.

    B sequences, S tokens, K selected, D hidden size, V vocabulary

`apply_tokentune` adds forward hooks to the given instance, nothing else: its classes, its `forward` methods, its
configuration and what `save_pretrained` writes stay as they are. The model's pre-hook starts a step when a selection
is given (or drawn), its post-hook ends it; in between the configuration names the attention function of
`core/selective_layer.py`, and the loss of a causal model is taken at the selected positions.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.utils import logging

from tokentune.core.adapter_kinds import Suspect, require_served_adapters, unserved_adapters, wrapper_past_hooks
from tokentune.core.attention import require_served
from tokentune.core.checkpointing import CHECKPOINT_REST, checkpoint_layers
from tokentune.core.correction import gradient_scales, require_correctable
from tokentune.core.groups import gather_tokens
from tokentune.core.hooks_of_others import have_hooks_of_others
from tokentune.core.layers import Stack, transformer_layers
from tokentune.core.loss import CHUNK_BYTES, ChunkedLoss, is_frozen, put_loss, why_not_in_chunks
from tokentune.core.masks import recipe_from_functions
from tokentune.core.model_sampling import DrawCounts, draw, has_labels, look_beside, per_token
from tokentune.core.past_hooks import HOOKS_AT_WORK, check_hooks_ran
from tokentune.core.scoring_pass import SCORES, LookOptions
from tokentune.core.selective_layer import (
    CURRENT_STEP,
    IMPLEMENTATION,
    Kept,
    Rows,
    Step,
    activate,
    enter_layer,
    leave_layer,
    selective_attention,
    uncompiled,
)
from tokentune.core.step_checks import (
    PROMPT_LEARNING,
    check_positions,
    has_foreign_forward,
    is_causal_lm,
    is_whole_sequence,
    require_served_step,
)
from tokentune.errors import UnsupportedModelError
from tokentune.sampling.sampler import mask_unselected_labels
from tokentune.sampling.strategies import find_strategy
from tokentune.verify.scoring_pass_check import verify_look
from tokentune.verify.verification import SEQUENCE_HEADS, Pooling, Profile, verified_profile, verify_correction

logger = logging.get_logger(__name__)
_SETTINGS = "_tokentune"  # the attribute of a patched model that holds its Settings
_SETTINGS_OF_OWNER = "_tokentune_of_owner"  # likewise, of the model inside that holds the layers
# Keyword arguments that no model's own forward takes.
_OURS = ("selected_positions", "selection_weights", "selection_draws", "num_supervised", "all_labels")


@dataclass
class Settings:
    """How a patched model behaves; kept on the model, so that a deep copy has it too."""

    prefix_length: int | float | None
    strategy: str
    profile: Profile
    stack: Stack
    checkpoint_rest: str = "auto"
    offload_kv: bool = False
    chunked_loss: bool | None = None
    chunk_bytes: int = CHUNK_BYTES
    look: LookOptions | None = None
    needs: tuple[str, ...] = ()  # the scores that the strategy needs
    gradient_correction: float = 0.0
    verify: bool = True  # whether the model was compared, and its adapters are to be of a kind that was
    adapters: list[Suspect] = field(default_factory=list)  # that cannot be served, active ones or not
    adapters_of: tuple[int, ...] = ()  # the adapters' configurations that were looked at for these
    undo: list[Callable[[], None]] = field(default_factory=list)  # what ends the step under way, last first
    finish: Callable[[Any], None] | None = None  # what the output of the step under way still needs
    counts: DrawCounts | None = None  # of the last draw


def apply_tokentune(
    model: nn.Module,
    prefix_length: int | float | None = None,
    *,
    strategy: str = "supervised",
    verify: bool = True,
    checkpoint_rest: str = "auto",
    offload_kv: bool = False,
    chunked_loss: bool | None = None,
    look: LookOptions | None = None,
    gradient_correction: float = 0.0,
) -> nn.Module:
    """Patch this instance, a transformers model or a peft model around one, and return it. Twice is the same as once.

    Afterwards `model(..., selected_positions=positions)`, with positions (B, K) int64, distinct and ascending in each
    row, runs the selective forward and returns K rows: logits (B, K, V), or last_hidden_state (B, K, D) from a model
    without a head. A causal model's loss is the mean over the selected positions whose next token is supervised (given
    `num_items_in_batch`: their sum divided by it, as everywhere in transformers). A caller that knows on the host how
    many of them that are can say so, `num_supervised=n`: on an accelerator a chunked loss then leaves out the others.
    `selection_weights` (B, K) are factors of the positions' losses, whose sum is then divided by the number of all
    supervised targets in `labels`, selected or not (or by `num_items_in_batch`). `all_labels` (B, S) are the labels
    before the selection masked any, where it did: a look takes the loss over all of them.
    Without `selected_positions` the model is the original one, generation included, with one exception:

    Args:
        prefix_length: tokens per sequence to select, a count (int) or a proportion (float). When given, the model
            draws the selection itself whenever it is in training mode and called with labels; with the uniform numbers
            `selection_draws` (B, S), where these are given.
        strategy: how it draws, a name that `strategies.find_strategy` knows.
        verify: first compare a tiny random copy with the definition of the method (`verify/verification.py`), and
            refuse adapters of kinds that were never compared (`core/adapter_kinds.py`). Without it a model that
            cannot be served may be trained wrongly, without an error.
        look: how it looks at all tokens first (`core/scoring_pass.py`), for strategies that need scores (None: the
            default ways), or for the loss over all tokens (`last_draw`) and steps that run nothing of the rest, given
            positions too. Where the strategy knows probabilities, the loss of a token weighs 1 / probability.
        checkpoint_rest: what gradient checkpointing, once enabled on the model, keeps of the tokens that are not
            selected: one of `tokentune.core.checkpointing.CHECKPOINT_REST`.
        offload_kv: and whether it keeps that in the CPU's memory, for a model on an accelerator.
        chunked_loss: whether a causal model's loss is taken a chunk of rows at a time (`core/loss.py`): its logits are
            then never there as a whole, and the output has none of them, (B, 0, V). None: in training, where it costs
            no time (frozen output embeddings, as with adapters) or gradient checkpointing asks for memory before time.
        gradient_correction: exponent a in [0, 1] of a causal model's less biased gradient (`core/correction.py`): 0 is
            the method as published; 1 is exact in expectation where one layer mixes tokens, for positions drawn
            uniformly (or with weights), and varies more from draw to draw.

    Forward hooks that others put on a layer itself, before or after, see and may change all of its rows, (B, S, D), as
    ever (which costs copies of them, and the last layer's rest; where a hook mixes tokens, those of the rest are
    constants to it). Modules inside are called once per group, and so are hooks on them.

    Raises:
        UnsupportedModelError: the model cannot be served exactly; the message names the part and the reason.
    """
    owner = _owner(model)
    require_served_adapters(unserved_adapters(owner, trust_unknown=not verify))
    if checkpoint_rest not in CHECKPOINT_REST:
        raise ValueError(f"checkpoint_rest must be one of {', '.join(CHECKPOINT_REST)}, not {checkpoint_rest!r}")
    require_correctable(gradient_correction, transformer_layers(owner))
    before: Settings | None = getattr(owner, _SETTINGS, None)
    if before is not None:
        profile = before.profile
    else:
        # A trainer may move the model to the accelerator later; each attention call looks at its own device again.
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        for config in transformer_layers(owner).configs:
            require_served(config._attn_implementation, device)
        _keep_4bit_layout(owner)
        profile = verified_profile(owner) if verify else _assumed_profile(owner)
    if verify and gradient_correction > 0.0 and (before is None or before.gradient_correction == 0.0):
        verify_correction(owner, profile)
    needs = find_strategy(strategy).needs
    if look is None and needs and prefix_length is not None:
        look = LookOptions()
    for asked, what in ((chunked_loss, "chunked_loss"), (look is not None, "a look at all tokens")):
        if asked and (reason := why_not_in_chunks(owner, profile)):
            raise UnsupportedModelError(f"{what}: {reason}")
    if look is not None:
        _check_look(owner, look, needs, checkpoint_rest)
        known = before is not None and before.look is not None and set(needs) <= set(before.needs)
        if verify and not (known and before.look.layers == look.layers):
            verify_look(owner, profile, look, needs)
    stack = transformer_layers(owner)
    settings = Settings(
        prefix_length,
        strategy,
        profile,
        stack,
        checkpoint_rest,
        offload_kv,
        chunked_loss,
        look=look,
        needs=needs,
        gradient_correction=gradient_correction,
        verify=verify,
    )
    if before is None:
        install_hooks(owner)
    wrapper = wrapper_past_hooks(model)
    if wrapper is not None and _begin_for_model_inside not in wrapper._forward_pre_hooks.values():
        wrapper.register_forward_pre_hook(_begin_for_model_inside, with_kwargs=True)
        wrapper.register_forward_hook(_end_for_model_inside, always_call=True)
    setattr(owner, _SETTINGS, settings)
    setattr(stack.backbone, _SETTINGS_OF_OWNER, settings)
    return model


def _check_look(owner: PreTrainedModel, look: LookOptions, needs: tuple[str, ...], checkpoint_rest: str) -> None:
    """Raises ValueError for what a look cannot do with this model."""
    if unknown := sorted(set(needs) - set(SCORES)):
        raise ValueError(f"a strategy needs scores that no look makes: {', '.join(unknown)}")
    depth = len(transformer_layers(owner).layers)
    if look.layers is not None and look.layers >= depth:
        raise ValueError(f"a look through {look.layers} of {depth} layers: leave `layers` out to look through all")
    if look.layers is None and checkpoint_rest in ("hidden_states", "segments"):
        raise ValueError(
            f"checkpoint_rest={checkpoint_rest!r} keeps hidden states of the tokens that are not selected, which a "
            "look through all layers has none of: it keeps their keys and values"
        )
    if "excess_loss" in needs and look.reference is None and not next(owner.parameters()).is_meta:
        raise ValueError("excess_loss is a loss minus that of another model: give LookOptions a reference")


def _keep_4bit_layout(owner: PreTrainedModel) -> None:
    """Stops bitsandbytes from repacking 4-bit weights in an evaluation, on CPUs with AVX512-BF16.

    Repacked they have no backward pass: all gradients through such a layer are lost, at most with a warning.
    """
    for name, layer in owner.named_modules():
        if getattr(getattr(getattr(layer, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
            raise UnsupportedModelError(f"{name} was run in evaluation mode and lost its backward pass: load it anew")
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def _assumed_profile(owner: PreTrainedModel) -> Profile:
    """What most models are, for one that is not to be verified: encoders pool the first token."""
    whole = owner.loss_type in SEQUENCE_HEADS
    pooler = any(name.split(".")[-1] == "pooler" for name, _ in owner.named_modules())
    return Profile(Rows.SELECTED, Pooling.FIRST if whole or pooler else None)


def install_hooks(owner: PreTrainedModel) -> None:
    """Adds the hooks, and registers the attention function with transformers under a name of its own."""
    AttentionInterface.register(IMPLEMENTATION, selective_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, recipe_from_functions)
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
    owner = _owner(model)
    if not hasattr(owner, _SETTINGS):
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
        module.__dict__.pop(_SETTINGS_OF_OWNER, None)
    delattr(owner, _SETTINGS)
    return model


def set_prefix_length(model: nn.Module, prefix_length: int | float) -> None:
    """Changes how many tokens a patched model selects that draws itself, as for a schedule over training."""
    getattr(_owner(model), _SETTINGS).prefix_length = prefix_length


def last_draw(model: nn.Module) -> DrawCounts | None:
    """The last selection that a patched model drew itself, in numbers; None where it drew none yet."""
    return getattr(_owner(model), _SETTINGS).counts


def reference_of(model: nn.Module) -> PreTrainedModel | None:
    """The second model that a patched model compares losses with, where it does."""
    settings: Settings | None = getattr(_owner(model), _SETTINGS, None)
    return None if settings is None or settings.look is None else settings.look.reference


def profile_of(model: nn.Module) -> Profile:
    """What was found out about a model when it was patched: the token that its head pools, the rows that it needs."""
    return getattr(_owner(model), _SETTINGS).profile


def _owner(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside whatever peft or `torch.compile` wraps around it."""
    model = getattr(model, "_orig_mod", model)
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise UnsupportedModelError(PROMPT_LEARNING)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(f"a transformers or peft model is needed, not {type(inner).__name__}")
    return inner


@uncompiled
def _begin_step(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
    """Forward pre-hook of the model: starts a selective forward where a selection is given or to be drawn."""
    settings: Settings = getattr(model, _SETTINGS)
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
    looks = settings.look is not None and model.training and per_token(model, kwargs.get("labels"))
    if looks and rows is Rows.ALL:
        raise UnsupportedModelError("a look at all tokens needs the model's own forward and loss, not a trainer's")
    kept = None
    if own:
        options = {"uniform": uniform, "num_supervised": supervised}
        (positions, weights, kept), supervised = draw(model, settings, kwargs, causal=causal, **options), None
    if isinstance(positions, Tensor):
        check_positions(model, settings.profile.pooling, positions, kwargs)
    if weights is not None and not (causal and rows is not Rows.ALL and per_token(model, kwargs.get("labels"))):
        raise UnsupportedModelError("selection_weights are factors of a causal model's own losses, one per token")

    whole = is_whole_sequence(positions, kwargs)
    if looks and not (own or whole):
        kept = look_beside(model, settings, kwargs, positions, kwargs["labels"] if all_labels is None else all_labels)
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
        _start_step(settings, positions, rows, kept, scales)
    if loss_function is not None:
        settings.undo += put_loss(model, loss_function)
    return (), kwargs


def _start_step(settings: Settings, positions: Any, rows: Rows, kept: Kept | None, scales: Tensor | None) -> None:
    """Starts the selective forward; `settings.undo` gets what puts everything back."""
    implementations = [(config, config._attn_implementation) for config in settings.stack.configs]
    whole_between = have_hooks_of_others(settings.stack.layers)
    if whole_between and kept is not None:
        raise UnsupportedModelError("a look at all tokens leaves nothing of the rest for others' hooks on the layers")
    if whole_between and rows is Rows.SELECTED:
        rows = Rows.GATHERED  # a hook on the last layer too gets what leaves it whole
    step = Step(
        positions,
        implementations,
        settings.stack.calls,
        rows,
        kept,
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
    settings: Settings = getattr(model, _SETTINGS)
    _put_back(settings)
    finish, settings.finish = settings.finish, None
    if finish is not None and output is not None:
        finish(output)


@uncompiled
def _begin_for_model_inside(wrapper: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
    """Forward pre-hook of a wrapper that calls the model's `forward` and not the model (`wrapper_past_hooks`)."""
    return _begin_step(wrapper.model, args, kwargs) if hasattr(wrapper.model, _SETTINGS) else None


@uncompiled
def _end_for_model_inside(wrapper: nn.Module, args: tuple, output: Any) -> None:
    if hasattr(wrapper.model, _SETTINGS):
        _end_step(wrapper.model, args, output)


def _put_back(settings: Settings) -> None:
    while settings.undo:
        settings.undo.pop()()


@uncompiled
def _enter_backbone(backbone: PreTrainedModel, args: tuple) -> None:
    """Forward pre-hook of the model that holds the layers."""
    settings = backbone.__dict__.get(_SETTINGS_OF_OWNER)
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
