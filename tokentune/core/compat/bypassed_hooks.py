"""Forward passes that bypass the hooks which make the selection: `model.forward(...)` in place of `model(...)`.

Such a pass would train on all tokens without a message. Only the model's hooks and arguments know whether it should
have a selection, so the callers are searched for on Python's stack. That happens only where a patched model that draws
its own selection is reached in training while none of its hooks is running.
"""

import sys
from collections.abc import Iterator
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from tokentune.core.groups import TokenGroups
from tokentune.errors import UnsupportedModelError

logger = logging.get_logger(__name__)
# Whether the hooks of a patched model are running: with a selection, or after they decided that there is none.
HOOKS_AT_WORK: ContextVar[bool] = ContextVar("tokentune_hooks_at_work", default=False)
WEIGHS = "the model draws its own selection for a mean over tokens, not for a loss that weighs them"
# Wrappers: a user wants to know their caller.
_PASS_ON = ("accelerate", "torch", "transformers", "contextlib", "functools")
_WRAPPERS = (
    "tokentune",
    "peft",
    "accelerate",
    "torch",
    "deepspeed",
    "contextlib",
    "functools",
)  # call a model for others


def check_hooks_ran(backbone: nn.Module, settings: Any) -> None:
    """Raises UnsupportedModelError where a training pass with labels reaches `backbone` and bypasses its model's hooks.

    `settings` (`patched.Settings`) are those of the patched model that `backbone` belongs to.
    """
    if HOOKS_AT_WORK.get() or settings.prefix_length is None or not (backbone.training and torch.is_grad_enabled()):
        return
    if torch.compiler.is_compiling():  # there is no Python stack; an uncompiled call finds it
        return
    for frame in _frames():
        owner = frame.f_locals.get("self")
        if not isinstance(owner, nn.Module) or owner.__dict__.get("_tokentune") is not settings:
            continue
        called = f"{type(owner).__name__}.forward was called by {_caller(frame)} past the hooks that make the selection"
        if _argument(frame, "labels") is not None:
            raise UnsupportedModelError(
                f"{called}: call the model itself (a wrapper that came later: call apply_tokentune on the wrapper)"
            )
        refuse_own_loss_of_trl()
        logger.warning_once(f"{called}, without labels: an ordinary forward, all tokens get gradients")
        return
    if any(frame.f_locals.get("self") is backbone and frame.f_code.co_name == "_call_impl" for frame in _frames()):
        refuse_own_loss_of_trl()
        name = type(backbone).__name__
        logger.warning_once(f"{name} was called by itself: an ordinary forward, all tokens get gradients")


def refuse_own_loss_of_trl() -> None:
    """Raises UnsupportedModelError where TRL calls the model without labels, for a loss of its own (ORPO, rewards).

    Other callers without labels, and its SFTTrainer, take a mean over all tokens (label smoothing).
    """
    if torch.compiler.is_compiling():
        return
    for frame in _frames():
        home = frame.f_globals.get("__name__", "")
        if home.split(".")[0] not in _WRAPPERS:
            if home.split(".")[0] == "trl" and home != "trl.trainer.sft_trainer":
                raise UnsupportedModelError(
                    f"{frame.f_code.co_qualname} ({home}) calls the model without labels: {WEIGHS}"
                )
            return


def require_ordinary_call(hidden: Any, of_layer: dict[str, Any]) -> None:
    """Raises RuntimeError where a layer gets what belongs to a selective forward, outside of one.

    `of_layer` are its keyword arguments; not called `kwargs`, by which `_argument` finds the frames of others.
    """
    if "selected_positions" in of_layer:  # swallowed by the model's **kwargs, where its hooks did not run
        frame = next((frame for frame in _frames() if _argument(frame, "selected_positions") is not None), None)
        caller = "its caller" if frame is None else _caller(frame)  # of the running model's `forward`
        raise RuntimeError(
            f"selected_positions reached a layer past the model's hooks: {caller} called `forward` "
            "in place of the model itself"
        )
    if isinstance(hidden, TokenGroups):
        raise RuntimeError("a layer is run again outside of its forward pass (a checkpointing wrapper does this)")


def is_called_by_prompt_learning() -> bool:
    """Whether peft's prompt learning called the model, with its own tokens in front of the batch."""
    configs = (getattr(frame.f_locals.get("self"), "active_peft_config", None) for frame in _frames())
    return any(getattr(config, "is_prompt_learning", False) for config in configs)


def _frames() -> Iterator[FrameType]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _argument(frame: FrameType, name: str) -> Any:
    more = frame.f_locals.get("kwargs")
    return frame.f_locals.get(name, more.get(name) if isinstance(more, dict) else None)


def _caller(frame: FrameType) -> str:
    """The function that called the one of `frame`; functions that only pass a call on are skipped."""
    while frame.f_back is not None:
        frame = frame.f_back
        home = frame.f_globals.get("__name__", "")
        if home.split(".")[0] not in _PASS_ON:
            return f"{frame.f_code.co_qualname} ({home})"
    return "its caller"
