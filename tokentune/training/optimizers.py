"""`--optim`: any optimizer of the Hugging Face Trainer, and what some of them ask for.

GaLore and APOLLO project the gradients of weight matrices to a low rank. The matrices are, unless `--optim_args` says
otherwise, all linear layers inside of the transformer layers: attention and MLP, not embeddings and head.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

from tokentune.errors import UserError
from tokentune.training.optimizer_in_backward import OptimizerInBackward

logger = logging.getLogger(__name__)

LAYERWISE = "_layerwise"  # the Trainer's ending for GaLore and APOLLO in the backward pass
# The package of an optimizer, by the beginning of its name. The Trainer's own messages name forks, or none.
PACKAGES = {
    "galore": "galore-torch",
    "apollo": "apollo-torch",
    "lomo": "lomo-optim",
    "adalomo": "lomo-optim",
    "grokadamw": "grokadamw",
    "stable_adamw": "torch-optimi",
    "schedule_free": "schedulefree",
    "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao",
}


def check_optimizer(settings: TrainingArguments) -> None:
    """Refuses an optimizer that does not work here: one step of it is tried, on one small layer.

    Raises:
        UserError: with the package to install, or what is wrong with its options or with this device.
    """
    name = settings.optim.value
    given = f"--optim {name}" + (f" --optim_args {settings.optim_args}" if settings.optim_args else "")
    try:
        with torch.random.fork_rng():
            linear = nn.Linear(128, 128, device=settings.device)  # 8-bit states begin at 4,096 numbers
            _warn_of_vain_options(settings, linear)
            _stepped(settings, linear)
    except Exception as error:  # each package has its own
        package = next((package for start, package in PACKAGES.items() if name.startswith(start)), None)
        if package is not None and (isinstance(error, ImportError) or "install" in str(error)):
            raise UserError(f"--optim {name}: its package is missing; `pip install {package}`") from error
        raise UserError(f"{given} cannot be used here: {type(error).__name__}: {error}") from error


def state_bytes(settings: TrainingArguments, dtype: torch.dtype) -> float:
    """Bytes that the optimizer keeps for each number of a weight matrix; fewer of large ones that it projects."""
    with torch.random.fork_rng():
        linear = nn.Linear(128, 128, device=settings.device, dtype=dtype)
        states = _stepped(settings, linear).state.values()
    kept = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(value.nbytes for value in kept) / linear.weight.numel()


def _stepped(settings: TrainingArguments, linear: nn.Linear) -> Optimizer:
    """The run's optimizer after a step on this layer's weight."""
    build, options = _recipe(settings, linear)
    optimizer = build(options.pop("params", None) or options.pop("model", None) or linear.parameters(), **options)
    if hasattr(optimizer, "train"):  # schedule-free ones have modes
        optimizer.train()
    if not hasattr(optimizer, "fused_backward"):  # LOMO's, whose only step is the backward pass
        linear.weight.grad = torch.ones_like(linear.weight)
        optimizer.step()
    return optimizer


def _recipe(settings: TrainingArguments, linear: nn.Linear) -> tuple[Any, dict[str, Any]]:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"linear": linear})])})
    return Trainer.get_optimizer_cls_and_kwargs(settings, model)


def _warn_of_vain_options(settings: TrainingArguments, linear: nn.Linear) -> None:
    if not settings.optim_args:
        return
    if str(_recipe(settings, linear)) == str(_recipe(replace(settings, optim_args=None), linear)):
        given = (settings.optim_args, settings.optim.value)
        logger.warning("--optim_args %s changes nothing: --optim %s has no such options", *given)


def state_classes(optim: str) -> list[type]:
    """The classes, besides tensors and numbers, of what an optimizer keeps: they hold such alone."""
    if optim.startswith("galore"):
        from galore_torch.galore_projector import GaLoreProjector

        return [GaLoreProjector]
    if optim.startswith("apollo"):
        from apollo_torch.random_projector import GradientProjector
        from apollo_torch.svd_projector import GaLoreProjector

        return [GradientProjector, GaLoreProjector]
    return []


@contextmanager
def load_optimizer(trainer: Trainer, checkpoint: Path | None) -> Iterator[None]:
    """Around the Trainer's loading of a checkpoint's optimizer: which classes it may hold, and on which device."""
    # Torch loads tensors and plain numbers alone, and these classes, which hold nothing else.
    with torch.serialization.safe_globals(state_classes(trainer.args.optim.value)):
        yield
    if checkpoint is None or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    inner = trainer.optimizer.optimizer
    for optimizer in getattr(inner, "optimizers", {None: inner}).values():  # one, or one per parameter
        for parameter, state in optimizer.state.items():
            for kept in state.values():
                if hasattr(kept, "ortho_matrix"):  # torch does not move tensors inside of other objects
                    kept.ortho_matrix = send_to_device(kept.ortho_matrix, parameter.device)


def in_backward(build: Any, options: dict[str, Any], model: nn.Module) -> tuple[type, dict[str, Any]]:
    """The Trainer's optimizer class and options, turned into those of one optimizer per parameter."""
    if options.get("optim_bits") == 8:
        # Embeddings keep 32-bit states, as in the Trainer. It uses bitsandbytes' global table, which goes by a
        # parameter's number in its optimizer: here 0 for every one.
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        build = partial(_build_wide_for, embeddings, build)
    return OptimizerInBackward, options | {"build": build}


def _build_wide_for(wide: set[int], build: Any, groups: list[dict[str, Any]], **options: Any) -> Optimizer:
    (parameter,) = groups[0]["params"]
    return build(groups, **(options | {"optim_bits": 32 if id(parameter) in wide else 8}))
