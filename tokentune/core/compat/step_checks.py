"""Checks of a selective forward pass: what it cannot do is refused with a reason.

B sequences, S tokens, K selected
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from tokentune.core.compat.adapters import activated_variants, require_served_adapters, unserved_adapters
from tokentune.core.compat.bypassed_hooks import is_called_by_prompt_learning
from tokentune.core.groups import require
from tokentune.core.patched import PROMPT_LEARNING, Settings
from tokentune.core.profile import Pooling, pooled_tokens
from tokentune.core.step import CURRENT_STEP
from tokentune.core.step_plan import Batch, Request
from tokentune.errors import UnsupportedModelError

_REFUSED = ("output_attentions", "output_hidden_states", "output_router_logits", "past_key_values", "logits_to_keep")
_POOLED = {Pooling.LAST: "last real token", Pooling.LAST_NON_PAD: "last token that has not the pad token's id"}
_PASS_ON = ("accelerate", "torch", "transformers")  # their wrappers of `forward` pass on all arguments


def require_served_step(model: PreTrainedModel, settings: Settings, kwargs: dict[str, Any]) -> None:
    """Raises for what a selective forward cannot do."""
    if getattr(model, "_is_replica", False):
        raise UnsupportedModelError(
            "nn.DataParallel runs copies in threads of one process: use DistributedDataParallel"
        )
    if CURRENT_STEP.get() is not None:
        raise UnsupportedModelError("a selective forward was started inside another one")
    _require_served_adapters_now(model, settings)
    of_others = any(kwargs.get(name) is not None for name in ("inputs_embeds", "past_key_values"))
    if of_others and not torch.compiler.is_compiling() and is_called_by_prompt_learning():
        raise UnsupportedModelError(PROMPT_LEARNING)
    config = model.config.get_text_config()
    for name in _REFUSED:
        asked = kwargs.get(name)
        by_default = name.startswith("output") and getattr(config, name, False)
        if by_default or isinstance(asked, Tensor) or asked not in (None, False, 0):
            raise ValueError(f"`{name}` cannot be had together with a selection")


def _require_served_adapters_now(model: PreTrainedModel, settings: Settings) -> None:
    """Adapters may have been added, or made active, after the model was patched."""
    configs = getattr(model, "peft_config", None)
    known = tuple(id(config) for config in configs.values()) if isinstance(configs, dict) else ()
    if known != settings.adapters_of:
        settings.adapters, settings.adapters_of = unserved_adapters(model, trust_unknown=not settings.verify), known
        settings.activated = activated_variants(model.modules())
    require_served_adapters(settings.adapters)


def check_positions(request: Request, batch: Batch, pooling: Pooling | None, pad_token_id: int | None) -> None:
    """Raises ValueError for a selection of wrong shapes or values, or without the token that the head pools."""
    positions, fillers, chances = request.selected_positions, request.selection_fillers, request.selection_probabilities
    if positions.ndim != 2 or positions.dtype != torch.int64 or positions.shape[1] == 0:
        raise ValueError(
            f"selected_positions must be int64 of shape (batch, selected), at least one per row; "
            f"got {positions.dtype} of shape {tuple(positions.shape)}"
        )
    if fillers is not None and (fillers.shape != positions.shape or fillers.dtype != torch.bool):
        raise ValueError(
            f"selection_fillers must be bool of the shape of selected_positions, {tuple(positions.shape)}; "
            f"got {fillers.dtype} of shape {tuple(fillers.shape)}"
        )
    if chances is not None:
        shape = tuple(positions.shape)
        if chances.shape != positions.shape or not chances.is_floating_point():
            raise ValueError(
                f"selection_probabilities must be floating-point numbers of the shape of selected_positions, {shape}; "
                f"got {chances.dtype} of shape {tuple(chances.shape)}"
            )
        require((chances > 0) & (chances <= 1), "selection_probabilities must be above 0 and at most 1")
    if positions.device.type != "cpu" or is_fake(positions):  # reading the values would make the host wait
        return
    with_gradients = torch.ones_like(positions, dtype=torch.bool) if fillers is None else ~fillers.cpu()
    if pooling is Pooling.FIRST and not bool(((positions[:, 0] == 0) & with_gradients[:, 0]).all()):
        raise ValueError("this model pools the first token: position 0 must be selected in every row")
    mask, ids = batch.mask, batch.input_ids
    if mask is None and ids is not None:
        mask = torch.ones_like(ids)
    if pooling in (Pooling.LAST, Pooling.LAST_NON_PAD) and mask is not None and mask.ndim == 2:
        pooled = pooled_tokens(pooling, mask.cpu(), None if ids is None else ids.cpu(), pad_token_id)
        selected = pooled.gather(1, positions.clamp(0, mask.shape[1] - 1)) & with_gradients
        if not bool(selected.any(dim=1).all()):
            raise ValueError(f"this model pools the {_POOLED[pooling]}: it must be selected in every row")


def is_causal_lm(model: PreTrainedModel) -> bool:
    return model.can_generate() and (model.loss_function is ForCausalLMLoss or "_loss_function" in model.__dict__)


def has_foreign_forward(model: nn.Module) -> bool:
    """Whether another library has put its own forward on this instance (a trainer's or a kernel's fused loss).

    Such a forward calls the backbone and applies (B, S) labels itself, so it gets all rows in sequence order. Wrappers
    that pass everything on (accelerate's, torch's) do not count. They are told by the module of their code: a function
    with another one in `__wrapped__` may not call it (TRL's only has the other's signature).
    """
    own = inspect.unwrap(type(model).forward)
    link = model.forward
    while link is not None:
        function = getattr(link, "__func__", link)  # of a bound method
        function = getattr(function, "func", function)  # of a partial one
        if function is own:
            return False
        home = getattr(function, "__globals__", {}).get("__name__", type(function).__module__)
        if home.split(".")[0] not in _PASS_ON:
            return True
        link = getattr(link, "__wrapped__", None)
    return True
