"""Old path of `tokentune.data.chat.templates`, kept for one release."""

import warnings

from tokentune.data.chat.templates import ChatEncoder, load_chat_template

__all__ = ["ChatEncoder", "load_chat_template"]

warnings.warn("tokentune.data.chat_templates is now tokentune.data.chat.templates", DeprecationWarning, stacklevel=2)
