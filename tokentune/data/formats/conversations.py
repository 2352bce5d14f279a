"""Conversations as data sets hold them, to the messages that chat templates take.

OpenAI's form is a list of {"role", "content"}, ShareGPT's a list of {"from", "value"}. What chat templates take is
OpenAI's form with texts for content and parsed tool arguments (transformers' documentation, "Tool use").
"""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from tokentune.data.formats.json_files import json_type, parse_json
from tokentune.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
SPEAKERS = {
    **{"system": "system", "human": "user", "user": "user"},
    **{"gpt": "assistant", "assistant": "assistant", "model": "assistant", "chatgpt": "assistant", "ai": "assistant"},
}
SHAREGPT_ROLES = SPEAKERS | {
    **{"function_call": "assistant", "observation": "tool", "tool": "tool", "function_response": "tool"},
}
REASONING = ("reasoning_content", "reasoning", "thinking")
TRAINED = ("train", "training", "loss")  # true or false: axolotl's and ms-swift's word for OpenAI's "weight"
# Keys that say something of a message, not in it.
BOOKKEEPING = {"id", "message_id", "parent_id", "uuid", "index", "type", "metadata", "model", "source", "url"}
BOOKKEEPING |= {"language", "date", "time", "timestamp", "created", "created_at", "updated_at"}
KEPT = ("weight", *TRAINED, *REASONING)  # keys of a turn in ShareGPT's form, besides its speaker and text
OPENAI_ROLES = {role: role for role in ROLES} | SPEAKERS | {"function": "tool"}  # "function": its older form
SPOKEN = re.compile(
    rf"""['"](role|from)['"]\s*:\s*['"]({"|".join(OPENAI_ROLES | SHAREGPT_ROLES)})['"]""", re.IGNORECASE
)


class Conversation(NamedTuple):
    """Messages for a chat template, tools for it, and the indices of the assistant's messages that are learnt."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    learnt: tuple[int, ...]


def openai_conversation(value: Any, tools: Any, where: str, *, learn_from: int = 0, system: Any = None) -> Conversation:
    """A conversation in OpenAI's form.

    An assistant's message with "weight" 0 is context only, as in OpenAI's fine-tuning data; so is one whose "train",
    "training" or "loss" is false.

    Args:
        value: a list of messages, or its JSON text (a CSV cell).
        tools: a list of JSON schemas, its JSON text, or None.
        where: the row, to start messages with.
        learn_from: messages before this index are context only.
        system: of a column beside the messages (Anthropic's form): text, or its parts; None: there is none.

    Raises:
        UserError: names the row, and the message.
    """
    messages = [_openai_message(message, f"{where}, message {n}") for n, message in enumerate(_list(value, where), 1)]
    begun = _with_system(messages, system, where)
    return _conversation(begun, tools, where, learn_from + len(begun) - len(messages))


def sharegpt_conversation(value: Any, system: Any, tools: Any, where: str) -> Conversation:
    """A conversation in ShareGPT's form, otherwise as above."""
    messages = [_sharegpt_message(turn, f"{where}, message {n}") for n, turn in enumerate(_list(value, where), 1)]
    return _conversation(_with_system(messages, system, where), tools, where, 0)


def _with_system(messages: list[dict[str, Any]], system: Any, where: str) -> list[dict[str, Any]]:
    """The messages behind a system message, unless they begin with the same one."""
    if not system:
        return messages
    what = f"{where}: 'system'"
    if isinstance(system, str) and re.match(
        r"""\s*\[\s*\{\s*['"](type|text)['"]\s*:""", system
    ):  # its parts in a CSV cell
        system = json_value(system, what)
    first = {"role": "system", "content": _content(system, what) if isinstance(system, list) else text_of(system, what)}
    same = messages[0]["role"] == "system" and messages[0]["content"] == first["content"]
    return messages if same else [first, *messages]


def system_in_user(conversation: Conversation) -> Conversation:
    """The conversation with its system and developer messages in front of the user's next one, for templates that
    know no such role; one that no message of the user follows becomes a message of the user."""
    messages, learnt, waiting = [], [], []
    for index, message in enumerate(conversation.messages):
        if message["role"] in ("system", "developer"):
            waiting.append(message["content"])
            continue
        if waiting and message["role"] == "user":
            message = message | {"content": "\n\n".join([*waiting, message["content"]])}
        elif waiting:
            messages.append({"role": "user", "content": "\n\n".join(waiting)})
        waiting = []
        if index in conversation.learnt:
            learnt.append(len(messages))
        messages.append(message)
    if waiting:
        messages.append({"role": "user", "content": "\n\n".join(waiting)})
    return conversation._replace(messages=messages, learnt=tuple(learnt))


def text_of(value: Any, what: str) -> str:
    """The text itself. `what`: names it in the message. Raises UserError: it is no text."""
    if not isinstance(value, str):
        raise UserError(f"{what} " + ("is missing." if value is None else f"is {value!r:.60}, not text."))
    try:
        value.encode()
    except UnicodeEncodeError as error:
        lone = f"\\u{ord(value[error.start]):04x}"
        raise UserError(f"{what} holds {lone}, half of a character (a lone surrogate), which is no text.") from error
    return value


def messages_in(value: Any, what: str) -> Any:
    """The messages that a text holds as JSON (a CSV cell); every other value as it is, other JSON being a text too.

    Raises:
        UserError: the text is a list of messages, and not JSON: Python's own writing of it, as pandas leaves it in CSV.
    """
    if not isinstance(value, str) or not re.match(r"\s*[\[{]", value) or not SPOKEN.search(value):
        return value
    try:
        parsed = parse_json(value)
    except ValueError as error:
        if re.match(r"\s*(\[\s*)?\{", value) is None:
            return value
        raise UserError(
            f"{what} looks like messages, and is not JSON: {value!r:.60}. Write it with json.dumps."
        ) from error
    first = parsed[0] if isinstance(parsed, list) and parsed else parsed
    return parsed if isinstance(first, Mapping) and ("role" in first or "from" in first) else value


def holds_something(value: Any) -> bool:
    """Whether a key has a value: 0 and false are values, empty texts, lists and objects are none."""
    return value is not None and (not isinstance(value, str | Sequence | Mapping) or len(value) > 0)


def unread_keys(turns: Any) -> list[str]:
    """The keys of turns in ShareGPT's form that hold something which may be meant, and are not read."""
    with suppress(UserError):
        turns = json_value(turns, "")
    found = (turn for turn in turns if isinstance(turn, Mapping)) if isinstance(turns, Sequence) else ()
    names = dict.fromkeys(key for turn in found for key, value in turn.items() if holds_something(value))
    return [name for name in names if name not in ("from", "role", "value", "tool_calls", *KEPT, *BOOKKEEPING)]


def is_written_out(value: Any) -> bool:
    """Whether a text is nothing but a list of messages, as JSON or as Python writes it."""
    if not isinstance(value, str) or not re.match(r"\s*\[\s*\{", value) or not SPOKEN.search(value):
        return False
    for parse in (parse_json, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError):
            return all(_is_message(message) for message in parse(value.strip()))
    return False


def _is_message(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    if _speaker(value.get("from"), SHAREGPT_ROLES) is not None:
        return "value" in value
    return _speaker(value.get("role"), OPENAI_ROLES) is not None and not {"content", "tool_calls"}.isdisjoint(value)


def json_value(value: Any, what: str) -> Any:
    """The value, parsed where it is JSON as text. `what`: names it in the message. Raises UserError: it is no JSON."""
    try:
        return parse_json(value) if isinstance(value, str) else value
    except ValueError as error:
        raise UserError(f"{what} is text that is not JSON: {value!r:.60}.") from error


def _list(value: Any, where: str) -> list:
    value = json_value(value, f"{where}: the conversation")
    if not isinstance(value, Sequence):
        found = "is missing" if value is None else f"is a JSON {json_type(value)}"
        raise UserError(f"{where}: the conversation {found}; expected a list of messages.")
    if not value:
        raise UserError(f"{where}: the conversation is empty.")
    return list(value)


def _openai_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UserError(f"{where}: expected an object with role and content, found {message!r:.60}.")
    if "role" not in message:
        cure = " It is ShareGPT's form: --data_format sharegpt." if {"from", "value"} <= message.keys() else ""
        raise UserError(f"{where}: no 'role', only {_names(message)}.{cure}")
    role = _speaker(message["role"], OPENAI_ROLES)
    if role is None:
        raise UserError(f"{where}: unknown role {message['role']!r:.40}; known are {', '.join(ROLES)}.")
    # Some templates write "None" for a key that is there without a value.
    kept = {key: value for key, value in message.items() if value is not None} | {"role": role}
    if kept.get("function_call") and kept.get("tool_calls"):
        raise UserError(f"{where}: has 'function_call' and 'tool_calls', which mean the same. Keep one of them.")
    if "function_call" in kept and not kept.get("tool_calls"):  # OpenAI's older form of one call
        kept["tool_calls"] = [{"type": "function", "function": kept.pop("function_call")}]
    if kept.get("refusal") and "content" not in kept:
        kept["content"] = ""
    if kept.get("tool_calls"):
        kept["tool_calls"] = [_tool_call(call, where) for call in _list(kept["tool_calls"], f"{where}: 'tool_calls'")]
        kept.setdefault("content", "")
    else:
        kept.pop("tool_calls", None)
    return kept | {"content": _content(kept.get("content"), where)}


def _content(content: Any, where: str) -> str:
    """Text, or the text of OpenAI's content parts."""
    if not isinstance(content, list):
        return text_of(content, f"{where}: 'content'")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type", "text") != "text" or "text" not in part:
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise UserError(f"{where}: a part of its content is {kind!r:.40}; only text can be learnt from.")
    return "".join(text_of(part["text"], f"{where}: a part of its content") for part in content)


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """With parsed arguments: OpenAI has them as JSON text, which templates would quote once more."""
    if not isinstance(call, Mapping):
        raise UserError(f"{where}: a tool call is {call!r:.60}, not an object.")
    call = dict(call)
    inner = call.get("function", call)
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise UserError(f"{where}: a tool call without the name of a function: {call!r:.60}.")
    inner = dict(inner)
    if isinstance(inner.get("arguments"), str):  # "": a call without arguments
        text = inner["arguments"].strip()
        inner["arguments"] = json_value(text, f"{where}: a tool call's 'arguments'") if text else {}
    return {**call, "type": "function", "function": inner} if "function" in call else inner


def _speaker(name: Any, roles: Mapping[str, str]) -> str | None:
    """The role of whoever speaks, in capitals or not; None where it is unknown."""
    return roles.get(name.strip().lower()) if isinstance(name, str) else None


def _sharegpt_message(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise UserError(f"{where}: expected an object with from and value, found {turn!r:.60}.")
    if "value" not in turn or not {"from", "role"} & turn.keys():
        cure = " It is OpenAI's form: --data_format messages." if {"role", "content"} <= turn.keys() else ""
        raise UserError(f"{where}: needs 'from' and 'value', has {_names(turn)}.{cure}")
    speaker = turn.get("from", turn.get("role"))
    role = _speaker(speaker, SHAREGPT_ROLES)
    if role is None:
        raise UserError(f"{where}: unknown speaker {speaker!r:.40}; known are {', '.join(SHAREGPT_ROLES)}.")
    text = text_of(turn["value"], f"{where}: 'value'")
    kept = {key: turn[key] for key in KEPT if turn.get(key) is not None}
    message = {"role": role, "content": text} | kept
    if turn.get("tool_calls"):
        raise UserError(
            f"{where}: has 'tool_calls', which turns of 'from' and 'value' have not: --data_format messages."
        )
    if speaker.strip().lower() != "function_call":
        return message
    calls = json_value(text, f"{where}: a function_call's 'value'")
    wrapped = [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]
    return message | {"content": "", "tool_calls": [_tool_call(call, where) for call in wrapped]}


def _conversation(messages: list[dict], tools: Any, where: str, learn_from: int) -> Conversation:
    if tools is not None:
        tools = json_value(tools, f"{where}: 'tools'") if isinstance(tools, str) and tools.strip() else tools or None
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise UserError(f"{where}: 'tools' is {tools!r:.60}, not a list of JSON schemas.")
    _check_encodable([messages, tools], where)
    assistants = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= learn_from]
    if not assistants:
        raise UserError(f"{where}: no message of the assistant, so there is nothing to learn.")
    learnt = tuple(i for i in assistants if _weight(messages[i], f"{where}, message {i + 1}"))
    for message in messages:
        message.pop("weight", None)
    return Conversation(messages, tools or None, learnt)


def _weight(message: dict, where: str) -> bool:
    if any(message.get(key) is False for key in TRAINED):
        return False
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise UserError(f"{where}: 'weight' is {weight!r:.40}; it can be 0 (context only) or 1 (learnt).")
    return bool(weight)


def _check_encodable(values: Any, where: str) -> None:
    """Refuses lone surrogates wherever in the conversation they are, names and arguments of tools included."""
    text_of(json.dumps(values, ensure_ascii=False, default=repr), f"{where}: the conversation")


def _names(message: Mapping) -> str:
    return ", ".join(repr(key) for key in list(message)[:8]) or "no keys"
