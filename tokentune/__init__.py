"""TokenTune: fine-tune transformers with gradients for a subset of the tokens.

>>> import tokentune
>>> model = tokentune.apply_tokentune(model, prefix_length=0.3)

Importing this package changes nothing; it needs torch and transformers alone.
"""

from tokentune.core.patching import apply_tokentune, remove_tokentune
from tokentune.errors import UnsupportedModelError

__version__ = "0.1.0"
__all__ = ["UnsupportedModelError", "apply_tokentune", "remove_tokentune"]
