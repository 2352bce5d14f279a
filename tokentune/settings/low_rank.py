"""Optimizers that project gradients to a low rank, and the layers whose gradients they can project."""

import re

from torch import nn

from tokentune.errors import UserError

LOW_RANK = ("galore", "apollo")
TARGET_MODULES = r".*\.\d+\..*"  # by full name: whatever stands inside of a numbered layer


def is_low_rank(optim: str) -> bool:
    """Whether an optimizer of `--optim` projects gradients to a low rank."""
    return optim.startswith(LOW_RANK)


def check_projected_layers(model: nn.Module, optim: str) -> None:
    """Refuses GaLore and APOLLO, UserError, for a model without anything that they could project."""
    if is_low_rank(optim) and not any(
        isinstance(module, nn.Linear) and re.fullmatch(TARGET_MODULES, name) for name, module in model.named_modules()
    ):
        raise UserError(f"--optim {optim}: {type(model).__name__} has no linear layers (nn.Linear) in its layers")
