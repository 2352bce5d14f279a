"""TokenTune: fine-tune transformers with gradients for a subset of the tokens.

>>> import tokentune
>>> model = tokentune.apply_tokentune(model, prefix_length=0.3)

Importing this package changes nothing; it needs torch and transformers alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tokentune.errors import UnsupportedModelError
from tokentune.version import __version__

if TYPE_CHECKING:
    from tokentune.api import apply_tokentune
    from tokentune.core.patching import remove_tokentune

__all__ = ["UnsupportedModelError", "__version__", "apply_tokentune", "remove_tokentune"]

_HOMES = {"apply_tokentune": "tokentune.api", "remove_tokentune": "tokentune.core.patching"}


def __getattr__(name: str) -> Any:
    # Imported on first use: torch and transformers take seconds, and a command's `--help` needs neither.
    if name not in _HOMES:
        raise AttributeError(f"module 'tokentune' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
