"""Old path of `tokentune.api` and `tokentune.core.patched`, kept for one release."""

import warnings

from tokentune.api import apply_tokentune, remove_tokentune
from tokentune.core.patched import last_draw, profile_of, reference_of, set_prefix_length

__all__ = ["apply_tokentune", "last_draw", "profile_of", "reference_of", "remove_tokentune", "set_prefix_length"]

warnings.warn(
    "tokentune.patching is now tokentune.api (apply_tokentune, remove_tokentune) and tokentune.core.patched (others)",
    DeprecationWarning,
    stacklevel=2,
)
