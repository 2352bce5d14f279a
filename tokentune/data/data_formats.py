"""The formats of instruction data: told by columns, and how each record becomes a prompt with an answer or a chat."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tokentune.data.conversations import Conversation, openai_conversation, sharegpt_conversation, text_of
from tokentune.data.sources import listed
from tokentune.errors import UserError
from tokentune.prompts import PromptTemplate


class Answer(NamedTuple):
    """Text whose beginning is given and whose end is learnt."""

    prompt: str
    answer: str


Item = Answer | Conversation
Record = Mapping[str, Any]


@dataclass(frozen=True)
class DataFormat:
    """A format: the columns it needs, those it reads where they are there, and its reader.

    `parse` takes a record, the row's place for messages, and the template around instructions.
    """

    needs: tuple[str, ...]
    may_have: tuple[str, ...]
    parse: Callable[[Record, str, PromptTemplate], Item]
    description: str


def _alpaca(record: Record, where: str, template: PromptTemplate) -> Answer:
    instruction, output = (text_of(record.get(name), f"{where}: {name!r}") for name in ("instruction", "output"))
    given = record.get("input")
    return Answer(template.prompt(instruction, None if given is None else text_of(given, f"{where}: 'input'")), output)


def _prompt_completion(record: Record, where: str, template: PromptTemplate) -> Item:
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        # An empty prompt is a conversation that the assistant begins.
        return openai_conversation([*prompt, *completion], record.get("tools"), where, learn_from=len(prompt))
    if isinstance(prompt, list) or isinstance(completion, list):
        raise UserError(f"{where}: 'prompt' and 'completion' must be both texts or both lists of messages.")
    return Answer(text_of(prompt, f"{where}: 'prompt'"), text_of(completion, f"{where}: 'completion'"))


def _messages(record: Record, where: str, template: PromptTemplate) -> Conversation:
    column = "messages" if "messages" in record else "conversations"
    return openai_conversation(record.get(column), record.get("tools"), where)


def _sharegpt(record: Record, where: str, template: PromptTemplate) -> Conversation:
    column = "conversations" if "conversations" in record else "messages"
    return sharegpt_conversation(record.get(column), record.get("system"), record.get("tools"), where)


def _text(record: Record, where: str, template: PromptTemplate) -> Answer:
    return Answer("", text_of(record.get("text"), f"{where}: 'text'"))


FORMATS = {
    "alpaca": DataFormat(
        ("instruction", "output"),
        ("input",),
        _alpaca,
        "alpaca: 'instruction', 'output' (and 'input', if any)",
    ),
    "prompt_completion": DataFormat(
        ("prompt", "completion"), ("tools",), _prompt_completion, "prompt_completion: 'prompt', 'completion'"
    ),
    "messages": DataFormat(
        ("messages",), ("tools", "conversations"), _messages, "messages: 'messages' (role, content)"
    ),
    "sharegpt": DataFormat(
        ("conversations",), ("tools", "system", "messages"), _sharegpt, "sharegpt: 'conversations' (from, value)"
    ),
    "text": DataFormat(("text",), (), _text, "text: 'text'"),
}
SOURCE_COLUMN = "data_source"  # of Open-Platypus
READ_COLUMNS = tuple({name for kind in FORMATS.values() for name in (*kind.needs, *kind.may_have)} | {SOURCE_COLUMN})


def recognise(columns: Sequence[str], first: Record, requested: str, where: str) -> str:
    """The name of the format: the requested one if its columns are there, or with "auto" the one that they fit.

    A `text` column beside those of another format is its rendering, as Alpaca has it, and means nothing.

    Args:
        columns: of the data set.
        first: its first row, which tells whose form its conversations have.
        where: the data set, to start messages with.

    Raises:
        UserError: a requested format's columns are missing, or the columns fit none or several.
    """
    has = f"It has {listed(columns) or 'no columns'}"
    if requested != "auto":
        # A conversation's column may have the other form's name.
        either = {"messages": "conversations", "sharegpt": "messages"}.get(requested)
        missing = [name for name in FORMATS[requested].needs if name not in columns and either not in columns]
        if missing:
            raise UserError(
                f"{where}: no column {', '.join(map(repr, missing))}, which --data_format {requested} needs. {has}."
            )
        return requested
    fitting = [name for name, kind in FORMATS.items() if name != "text" and set(kind.needs) <= set(columns)]
    if fitting == ["sharegpt"] and _has_roles(first.get("conversations")):
        return "messages"
    if len(fitting) == 1:
        return fitting[0]
    if not fitting and "text" in columns:
        return "text"
    known = "; ".join(kind.description for kind in FORMATS.values())
    if fitting:
        raise UserError(
            f"{where}: its columns fit several formats ({', '.join(fitting)}): name one with --data_format. {has}."
        )
    raise UserError(
        f"{where}: its columns fit no format. {has}.\nRename the columns that hold the texts. Formats and their "
        f"columns: {known}."
    )


def _has_roles(conversation: Any) -> bool:
    turn = conversation[0] if isinstance(conversation, list) and conversation else None
    return isinstance(turn, Mapping) and "role" in turn and "from" not in turn
