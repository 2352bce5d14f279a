"""Old path of `tokentune.data.formats.conversations`, kept for one release."""

import warnings

from tokentune.data.formats.conversations import Conversation, openai_conversation, sharegpt_conversation

__all__ = ["Conversation", "openai_conversation", "sharegpt_conversation"]

warnings.warn(
    "tokentune.data.conversations is now tokentune.data.formats.conversations", DeprecationWarning, stacklevel=2
)
