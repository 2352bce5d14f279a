"""What a step changes for a time and puts back."""

from contextlib import ExitStack
from typing import Any


def set_until_undone(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Sets an instance's attribute. `undo` puts back the one that the instance had, or none."""
    if name in vars(owner):
        undo.callback(setattr, owner, name, vars(owner)[name])
    else:
        undo.callback(delattr, owner, name)
    setattr(owner, name, value)
