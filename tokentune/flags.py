"""What the dataclasses of flags are made with: a flag's help, its check, a warning where it has no effect."""

import logging
import os
from collections.abc import Sequence
from dataclasses import field, fields
from typing import Any

from tokentune.errors import UserError

logger = logging.getLogger(__name__)


def flag(default: Any, help: str) -> Any:
    """A field of a dataclass of flags."""
    return field(default=default, metadata={"help": help})


def require(condition: bool, message: str) -> None:
    """Raises UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def process_count() -> int:
    """Processes of a launcher such as torchrun; 1 in a plain run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def log_without_effect(group: Any, names: Sequence[str], needed: str) -> None:
    """Warns of each flag in `names` that is given although what it needs is not."""
    defaults = {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(group)}
    for name in names:
        if getattr(group, name) != defaults[name]:
            logger.warning("--%s has no effect without %s", name, needed)
