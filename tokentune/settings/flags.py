"""What the dataclasses of flags are made with: a flag's help, its check, a warning where it has no effect."""

import logging
from collections.abc import Sequence
from dataclasses import MISSING, Field, field, fields
from types import MappingProxyType
from typing import Any
from unicodedata import category

from tokentune.errors import UserError

logger = logging.getLogger(__name__)
REQUIRED = MISSING
AUTO = "auto"  # the value of a flag of numbers that a run finds by itself


def flag(default: Any, help: str = "", *, least: float | None = None, filled: str = "", **options: Any) -> Any:
    """A field of a `Group`; one that is declared anew in a derived group keeps what is left out here.

    Args:
        default: a list is copied; `REQUIRED`: there is none.
        least: the smallest number that is allowed.
        filled: what to give instead of an empty text, which is refused.
        options: of argparse's `add_argument`; `metavar` is otherwise told by the type.
    """
    said = {"help": help, "least": least, "filled": filled, "options": options}
    metadata = {name: value for name, value in said.items() if value not in ("", None, {})}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def default_of(attribute: Field) -> Any:
    """The default of a dataclass's field; `REQUIRED`: there is none."""
    return attribute.default if attribute.default_factory is MISSING else attribute.default_factory()


class Group:
    """Flags that belong together: a dataclass whose `__post_init__` refuses, UserError, values that cannot work."""

    def __init_subclass__(cls) -> None:
        known = getattr(cls, "__dataclass_fields__", {})  # of the group that this one is derived from
        for name in known.keys() & vars(cls).keys():
            if isinstance(anew := vars(cls)[name], Field):
                anew.metadata = MappingProxyType({**known[name].metadata, **anew.metadata})

    def __post_init__(self) -> None:
        for attribute in fields(self):
            name, least, value = attribute.name, attribute.metadata.get("least"), getattr(self, attribute.name)
            values = value if isinstance(value, list) else [value]
            if filled := attribute.metadata.get("filled"):
                require("" not in values, f"--{name} is empty: give {filled}")
            if least is not None and value not in (None, AUTO):
                fits = all(least <= number < float("inf") for number in values)  # NaN does not
                require(fits, f"--{name} {value}: must be {least} or more")


def require(condition: bool, message: str) -> None:
    """Raises UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def check_characters(text: str, where: str) -> None:
    """Refuses line breaks and control characters in a flag's value, which would also end up in messages and logs."""
    if any(category(letter) in ("Cc", "Zl", "Zp") for letter in text):
        raise UserError(f"{where}: {text if len(text) <= 60 else text[:60] + '...'!a} holds a control character.")


def log_without_effect(group: Any, names: Sequence[str], needed: str) -> None:
    """Warns of each flag in `names` that is given although what it needs is not."""
    for name in names:
        if getattr(group, name) != default_of(group.__dataclass_fields__[name]):
            logger.warning("--%s has no effect without %s", name, needed)
