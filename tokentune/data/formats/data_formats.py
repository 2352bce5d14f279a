"""The formats of instruction data: told by columns, and how each record becomes a prompt with an answer or a chat."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

from tokentune.data.formats.conversations import (
    TRAINED,
    Conversation,
    is_written_out,
    json_value,
    messages_in,
    openai_conversation,
    sharegpt_conversation,
    text_of,
    unread_keys,
)
from tokentune.data.formats.records import RecordSource
from tokentune.data.prompts import PromptTemplate
from tokentune.errors import UserError
from tokentune.sources import listed


class Answer(NamedTuple):
    """Text whose beginning is given and whose end is learnt."""

    prompt: str
    answer: str


Item = Answer | Conversation
Record = Mapping[str, Any]


SYSTEM_COLUMNS = ("system", "system_prompt")  # Anthropic's and LLaMA-Factory's; OpenHermes'
TOOL_COLUMNS = ("tools", "functions")  # "functions": OpenAI's older form, without a wrapper around each
CHAT_COLUMNS = (*SYSTEM_COLUMNS, *TOOL_COLUMNS)
# What a column of this name holds belongs to the row: a format reads it or refuses it.
MEANT = (*CHAT_COLUMNS, "history")
# As well, but the names are used for remarks on a row too: said to be left out.
PERHAPS_MEANT = ("input", "context", "documents", "chat_template_kwargs", "thinking", "reasoning", "reasoning_content")
PERHAPS_MEANT += ("image", "images", "videos", "audios", "thought", "weight", "loss_mask")
PERHAPS_MEANT += ("system_message", "sys_prompt", "developer", "available_tools", "tool_schema", "system_instruction")
PERHAPS_MEANT += ("audio", "video", "chosen", "rejected", "completion_mask", "assistant_masks", "rationale", "cot")
# Refused where they say that a row, or a part of it, is not learnt. "label", "kto_tag": TRL's and LLaMA-Factory's word
# for an answer that is not wanted.
ROW_LEARNT = ("weight", "loss_mask", *TRAINED, "label", "kto_tag")
NUMBERS = ("loss", "label")  # of which 0 may be a value
TEXT_COLUMNS = ("instruction", "input", "output", "text")  # taken as text whatever is in them
SOURCE_COLUMN = "data_source"  # of Open-Platypus
NAME_ONE = "name one with --data_format"


@dataclass(frozen=True)
class DataFormat:
    """A format: the columns it needs, those it reads where they are there, and its reader.

    `parse` takes a record, the row's place for messages, and the template around instructions. `leaves_out`: columns of
    `MEANT` that it has no use for.
    """

    needs: tuple[str, ...]
    may_have: tuple[str, ...]
    parse: Callable[[Record, str, PromptTemplate], Item]
    description: str
    leaves_out: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """All that have to be read of a row: also those that it may not have a value in."""
        return tuple({*self.needs, *self.may_have, *MEANT, *ROW_LEARNT, SOURCE_COLUMN})

    def unread(self, names: Iterable[str]) -> str | None:
        """What to say of those columns that may be meant and are not read; None where there are none."""
        found = [name for name in names if self._may_be_meant(name)]
        return f"not read: the columns {listed(found)}" if found else None

    def passed_over(self, names: Iterable[str]) -> str:
        """For the log: the other columns that are not read; empty where there are none."""
        found = [name for name in names if name not in self.columns and not self._may_be_meant(name)]
        return f"; not read: {listed(found)}" if found else ""

    def _may_be_meant(self, name: str) -> bool:
        """Whether a column that is not read may be meant: "Input", " input" and "systemPrompt" too."""
        if name in self._told:
            return self._told[name]
        return _plain(name) in map(_plain, self._told)

    @cached_property
    def _told(self) -> dict[str, bool]:
        """The names that are known, and whether it is told that a column of this name is not read."""
        read = {*self.needs, *self.may_have}
        return {name: name in {*PERHAPS_MEANT, *self.leaves_out} - read for name in {*read, *MEANT, *PERHAPS_MEANT}}

    def doubts(self, record: Record) -> Iterator[str]:
        """What to say of a row: its columns that are not read, and its texts that are chats written out."""
        if (unread := self.unread(record)) is not None:
            yield unread
        if self is FORMATS["sharegpt"] and (keys := unread_keys(record.get(_conversation_column(record)))):
            yield f"not read: the keys {listed(keys)} of turns in ShareGPT's form"
        for name in TEXT_COLUMNS:
            if name in (*self.needs, *self.may_have) and is_written_out(record.get(name)):
                yield (
                    f"the column {name!r} holds a list of messages written out as text, and is taken as this text. To "
                    "train on it as a chat, put it into a column 'messages'"
                )

    def read(self, record: Record, where: str, template: PromptTemplate, *, told: bool = False) -> Item:
        """A row as what is learnt from it.

        Args:
            told: the format was told by the first row's columns, so that no other may fit a later row as well.

        Raises:
            UserError: it is malformed, or has something in a column of `MEANT` that the format has no place for.
        """
        if told and len(fitting := _fitting([name for name, value in record.items() if value is not None])) > 1:
            raise UserError(f"{where}: its columns fit several formats ({', '.join(fitting)}): {NAME_ONE}.")
        tells = [name for name in ROW_LEARNT if name != "label" or self is not FORMATS["text"]]  # there it is a class
        if (name := next((name for name in tells if _is_not_learnt(name, record.get(name))), None)) is not None:
            raise UserError(
                f"{where}: has {name!r}: {record[name]!r:.40}, and no column tells what is learnt. Leave such rows out "
                "(--bad_rows skip), or put 'weight' into the messages."
            )
        placed = {*self.may_have, *self.leaves_out}
        unread = [name for name in MEANT if name not in placed and _filled(record.get(name))]
        if unread and self is FORMATS["alpaca"]:
            raise UserError(
                f"{where}: has {listed(unread)}, which the prompt template has no place for. --data_format alpaca_chat "
                "makes chats of such data."
            )
        if unread:
            raise UserError(
                f"{where}: has {listed(unread)}, which this format does not read. Put it into the messages, or remove "
                "the column."
            )
        return self.parse(record, where, template)


@cache
def _plain(name: str) -> str:
    """A column's name without what programs write it in: capitals, white space, dashes."""
    return re.sub(r"[\s_-]", "", name).lower()


def _is_not_learnt(name: str, value: Any) -> bool:
    """Whether a column of `ROW_LEARNT` holds false or 0, alone or in a list; a CSV cell may hold JSON."""
    if isinstance(value, str):
        with suppress(UserError):
            value = json_value(value.lower(), "")
    if isinstance(value, list):
        return any(_is_not_learnt(name, inner) for inner in value)
    return value is False or (name not in NUMBERS and isinstance(value, int | float) and value == 0)


def _alpaca(record: Record, where: str, template: PromptTemplate) -> Answer:
    instruction, output = (text_of(record.get(name), f"{where}: {name!r}") for name in ("instruction", "output"))
    given = record.get("input")
    return Answer(template.prompt(instruction, None if given is None else text_of(given, f"{where}: 'input'")), output)


def _alpaca_chat(record: Record, where: str, template: PromptTemplate) -> Conversation:
    """LLaMA-Factory's: the user's text is instruction and input, and what `history` answers is learnt too."""
    asked = [text_of(record.get("instruction"), f"{where}: 'instruction'")]
    asked += [text_of(record["input"], f"{where}: 'input'")] if record.get("input") is not None else []
    history = record.get("history") if _filled(record.get("history")) else []
    history = json_value(history, f"{where}: 'history'")
    turns = [text for pair in history for text in pair] if _is_pairs(history) else None
    if turns is None:
        raise UserError(f"{where}: 'history' is {history!r:.60}, not a list of pairs of a question and its answer.")
    turns += ["\n".join(text for text in asked if text), text_of(record.get("output"), f"{where}: 'output'")]
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    return openai_conversation(messages, _tools(record, where), where, system=_system(record, where))


def _is_pairs(history: Any) -> bool:
    return isinstance(history, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history)


def _prompt_completion(record: Record, where: str, template: PromptTemplate) -> Item:
    prompt, completion = (messages_in(record.get(name), f"{where}: {name!r}") for name in ("prompt", "completion"))
    if isinstance(completion, list) and isinstance(prompt, str) and prompt.strip() == "[]":
        prompt = []
    if isinstance(prompt, list) and isinstance(completion, list):
        # An empty prompt is a conversation that the assistant begins.
        tools, system = _tools(record, where), _system(record, where)
        return openai_conversation([*prompt, *completion], tools, where, learn_from=len(prompt), system=system)
    if isinstance(prompt, list) or isinstance(completion, list):
        raise UserError(f"{where}: 'prompt' and 'completion' must be both texts or both lists of messages.")
    if beside := [name for name in CHAT_COLUMNS if _filled(record.get(name))]:
        raise UserError(
            f"{where}: has {listed(beside)}, which is not read beside a prompt of text. Put it into the prompt, or "
            "give prompt and completion as lists of messages."
        )
    return Answer(text_of(prompt, f"{where}: 'prompt'"), text_of(completion, f"{where}: 'completion'"))


def _messages(record: Record, where: str, template: PromptTemplate) -> Conversation:
    column = "messages" if "messages" in record else "conversations"
    return openai_conversation(record.get(column), _tools(record, where), where, system=_system(record, where))


def _sharegpt(record: Record, where: str, template: PromptTemplate) -> Conversation:
    turns = record.get(_conversation_column(record))
    return sharegpt_conversation(turns, _system(record, where), _tools(record, where), where)


def _conversation_column(record: Record) -> str:
    return "conversations" if "conversations" in record else "messages"


def _text(record: Record, where: str, template: PromptTemplate) -> Answer:
    return Answer("", text_of(record.get("text"), f"{where}: 'text'"))


def _system(record: Record, where: str) -> Any:
    return _only(record, SYSTEM_COLUMNS, where)


def _tools(record: Record, where: str) -> Any:
    tools = _only(record, TOOL_COLUMNS, where)
    if not _filled(record.get("functions")):
        return tools
    functions = json_value(tools, f"{where}: 'functions'")
    if not isinstance(functions, list):
        raise UserError(f"{where}: 'functions' is {functions!r:.60}, not a list of JSON schemas.")
    return [{"type": "function", "function": function} for function in functions]


def _only(record: Record, names: Sequence[str], where: str) -> Any:
    """The value of the one column that has one, of several that mean the same."""
    filled = [name for name in names if _filled(record.get(name))]
    if len(filled) > 1 and any(record[name] != record[filled[0]] for name in filled):
        raise UserError(f"{where}: has {' and '.join(map(repr, filled))}, which mean the same. Keep one of them.")
    return record[filled[0]] if filled else None


def _filled(value: Any) -> bool:
    """Whether a cell holds anything; a CSV cell may hold JSON."""
    return bool(value) and not (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null"))


FORMATS = {
    "alpaca": DataFormat(
        ("instruction", "output"), ("input",), _alpaca, "alpaca: 'instruction', 'output' (and 'input', if any)"
    ),
    "alpaca_chat": DataFormat(  # told with alpaca
        ("instruction", "output"), ("input", "history", *CHAT_COLUMNS), _alpaca_chat, ""
    ),
    "prompt_completion": DataFormat(
        ("prompt", "completion"), CHAT_COLUMNS, _prompt_completion, "prompt_completion: 'prompt', 'completion'"
    ),
    "messages": DataFormat(
        ("messages",), (*CHAT_COLUMNS, "conversations"), _messages, "messages: 'messages' (role, content)"
    ),
    "sharegpt": DataFormat(
        ("conversations",), (*CHAT_COLUMNS, "messages"), _sharegpt, "sharegpt: 'conversations' (from, value)"
    ),
    "text": DataFormat(("text",), (), _text, "text: 'text'", leaves_out=MEANT),  # the whole of a row
}


def recognised(source: RecordSource, requested: str, *, whole: bool) -> str:
    """The name of a data set's format: the requested one, or with "auto" the one that its columns fit.

    Args:
        whole: all rows may be looked at, which tells whether any has a `history`; False: the first alone.

    Raises:
        UserError: as `recognise`; the data set cannot be read, or holds no rows.
    """
    columns, first = source.peek(("conversations", *MEANT))
    kind = recognise(columns, first, requested, source.where)
    if (kind, requested) == ("alpaca", "auto") and _has_turns(source, first, whole=whole):
        kind = "alpaca_chat"
    return kind


def _has_turns(source: RecordSource, first: Record, *, whole: bool) -> bool:
    turns = ("history", *SYSTEM_COLUMNS)
    known, complete = source.columns()
    if complete and not set(turns) & set(known):
        return False
    rows = (row for _, row in source.rows(turns)) if whole else [first]
    return any(isinstance(row, Mapping) and any(_filled(row.get(name)) for name in turns) for row in rows)


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
    fitting = _fitting(columns)
    if fitting == ["sharegpt"] and _has_roles(first.get("conversations")):
        return "messages"
    if len(fitting) == 1:
        return fitting[0]
    if not fitting and "text" in columns:
        return "text"
    known = "; ".join(kind.description for kind in FORMATS.values() if kind.description)
    if fitting:
        raise UserError(f"{where}: its columns fit several formats ({', '.join(fitting)}): {NAME_ONE}. {has}.")
    raise UserError(
        f"{where}: its columns fit no format. {has}.\nRename the columns that hold the texts. Formats and their "
        f"columns: {known}."
    )


def _fitting(columns: Sequence[str]) -> list[str]:
    """The formats that are told by such columns."""
    return [n for n, kind in FORMATS.items() if n not in ("text", "alpaca_chat") and {*kind.needs} <= {*columns}]


def _has_roles(conversation: Any) -> bool:
    with suppress(UserError):
        conversation = messages_in(conversation, "")
    turn = conversation[0] if isinstance(conversation, list) and conversation else None
    return isinstance(turn, Mapping) and "role" in turn and not {"from", "value"} & turn.keys()
