"""What the dataclasses of flags are made with: a flag's help, its check, a warning where it has no effect."""

import logging
import os
from collections.abc import Sequence
from dataclasses import field, fields
from typing import Any
from unicodedata import category

from tokentune.errors import UserError

logger = logging.getLogger(__name__)


def flag(default: Any, help: str, *, metavar: str | None = None) -> Any:
    """A field of a dataclass of flags. `metavar`: what stands for its value in the help; None: told by its type."""
    return field(default=default, metadata={"help": help} | ({} if metavar is None else {"metavar": metavar}))


def require(condition: bool, message: str) -> None:
    """Raises UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def check_characters(text: str, where: str) -> None:
    """Refuses line breaks and control characters in a flag's value, which would also end up in messages and logs."""
    if any(category(letter) in ("Cc", "Zl", "Zp") for letter in text):
        raise UserError(f"{where}: {text if len(text) <= 60 else text[:60] + '...'!a} holds a control character.")


def process_count() -> int:
    """Processes of a launcher such as torchrun; 1 in a plain run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def log_without_effect(group: Any, names: Sequence[str], needed: str) -> None:
    """Warns of each flag in `names` that is given although what it needs is not."""
    defaults = {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(group)}
    for name in names:
        if getattr(group, name) != defaults[name]:
            logger.warning("--%s has no effect without %s", name, needed)
