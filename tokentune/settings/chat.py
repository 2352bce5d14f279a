"""Every flag of `chat.py`.

python ./tokentune/chat.py --help
"""

from dataclasses import dataclass
from typing import ClassVar

from tokentune.settings.flags import REQUIRED, Group, flag


@dataclass
class ChattingArguments(Group):
    """Which model is asked what, and how it answers."""

    _argument_group_name = "chat"
    model_name_or_path: str = flag(
        REQUIRED,
        "the first word, without a flag: a run's folder (all weights or an adapter), a merged model's, or a hub id",
        filled="a folder or a hub id",
        metavar="FOLDER",
    )
    prompt: str | None = flag(
        None,
        "the second word, without a flag: one question, whose answer alone is printed. By default it is read from "
        "standard input; on a terminal begins a conversation, which /exit or Ctrl-D ends",
        filled="a text, or leave it out",
        metavar="PROMPT",
    )
    base_model_name_or_path: str | None = flag(None, "an adapter's base, where its folder does not name the right one")
    system: str | None = flag(None, "system message, in front of the conversation", metavar="TEXT")
    temperature: float = flag(0.0, "0: the likeliest token each time; above it: tokens are drawn", least=0)
    max_new_tokens: int = flag(512, "an answer that is longer is cut", least=1)
    device: str = flag("auto", "auto (a GPU, else cpu) or a device")
    trust_remote_code: bool = flag(False, "run the Python code that comes with the model")
    allow_pickle: bool = flag(False, "read the model's pytorch_model.bin where it has no safetensors")


@dataclass
class ChatArguments:
    """A whole command line of `chat.py`."""

    prog: ClassVar[str] = "chat.py"
    description: ClassVar[str] = "Talk to a trained model, in the prompt that it was trained with."
    words: ClassVar[tuple[str, ...]] = ("model_name_or_path", "prompt")  # flags whose values may stand by themselves
    chatting: ChattingArguments
