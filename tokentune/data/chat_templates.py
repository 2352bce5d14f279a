"""Old path of `tokentune.data.chat.templates`, kept for one release."""

import warnings

from tokentune.data.chat.template_files import load_chat_template
from tokentune.data.chat.templates import ChatEncoder

__all__ = ["ChatEncoder", "load_chat_template"]

warnings.warn("tokentune.data.chat_templates is now tokentune.data.chat.templates", DeprecationWarning, stacklevel=2)
