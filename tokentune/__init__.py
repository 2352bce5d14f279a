"""TokenTune: fine-tune transformers with gradients for a subset of the tokens.

>>> import tokentune
>>> model = tokentune.apply_tokentune(model, prefix_length=0.3)

Importing this package changes nothing; it needs torch and transformers alone.
"""

from tokentune.api import apply_tokentune
from tokentune.core.patching import remove_tokentune
from tokentune.errors import UnsupportedModelError
from tokentune.version import __version__

__all__ = ["UnsupportedModelError", "__version__", "apply_tokentune", "remove_tokentune"]
