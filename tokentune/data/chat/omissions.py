"""What of a conversation its chat template does not write: learnt wrongly without a word, if nobody looks.

Most templates know some roles and keys and pass over all others. What the model is not shown is refused where nothing
is left to learn, and told otherwise.
"""

import json
import logging
from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple, NoReturn

from tokentune.data.chat.marks import CALL_ARGUMENTS, CALL_NAME, SPEAKER, TEXTS, Words
from tokentune.data.chat.rendering import Rendering
from tokentune.data.formats.conversations import BOOKKEEPING, REASONING, TRAINED, holds_something
from tokentune.errors import UserError

LOOKED_AT = ("role", "tool_calls", "tool_call_id", "weight", *TRAINED)  # keys of a message, besides `TEXTS`


class Omission(NamedTuple):
    """What a template leaves out.

    Attributes:
        message: index of the message that shows it.
        sentence: what is left out; the same for all messages that it happens to.
        level: of the log.
    """

    message: int
    sentence: str
    level: int = logging.WARNING


def omissions(rendering: Rendering) -> Iterator[Omission]:
    """What the template does not write of a conversation.

    Raises:
        UserError: a learnt call is left out, or all of a learnt message.
    """
    yield from _unread_keys(rendering)
    if rendering.written is None:
        return
    numbered = [(number, words) for number, words in enumerate(rendering.words) if words.key != SPEAKER]
    for index, group in groupby(numbered, key=lambda pair: pair[1].message):
        of_message = list(group)
        left_out = [words for number, words in of_message if number not in rendering.written]
        written = {words.key for number, words in of_message if number in rendering.written}
        if left_out:
            yield from _of_message(rendering, index, left_out, written)


def writes_tools_in_part(rendering: Rendering) -> bool:
    """Whether a tool's name, a parameter or a description stands nowhere in what the template writes."""
    for said in _said_of_tools(rendering.conversation.tools):
        forms = (said, json.dumps(said)[1:-1], json.dumps(said, ensure_ascii=False)[1:-1])
        if not any(form in rendering.text for form in forms):
            return True
    return False


def _said_of_tools(value: Any) -> Iterator[str]:
    """The names of tools and parameters, and the beginnings of descriptions, which may be on several lines."""
    if isinstance(value, list):
        for inner in value:
            yield from _said_of_tools(inner)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key in ("name", "description") and isinstance(inner, str) and inner.strip():
                yield inner.strip().splitlines()[0][:20].strip()
            elif key == "properties" and isinstance(inner, dict):
                yield from inner
                yield from _said_of_tools([*inner.values()])
            else:
                yield from _said_of_tools(inner)


def _unread_keys(rendering: Rendering) -> Iterator[Omission]:
    """Keys that change nothing of what the template writes, told by role."""
    found: dict[tuple[str, str], int] = {}
    for index, message in enumerate(rendering.conversation.messages):
        for key, value in message.items():
            told = key in LOOKED_AT or (key in TEXTS and isinstance(value, str))
            if not told and holds_something(value):
                found.setdefault((message["role"], key), index)
    if not found:
        return
    none_read = rendering.is_the_same_without(found)
    for (role, key), index in found.items():
        if none_read or (len(found) > 1 and rendering.is_the_same_without([(role, key)])):
            known = key in BOOKKEEPING or (role, key) == ("tool", SPEAKER)
            level = logging.INFO if known else logging.WARNING
            yield Omission(index, f"the key {key!r} of messages of the role {role!r}", level)
        else:
            _refuse_placeholder(rendering, role, key)


def _refuse_placeholder(rendering: Rendering, role: str, key: str) -> None:
    """Refuses values that are not JSON, such as dates in Parquet: transformers gives "<date>" to the template."""
    for index, message in enumerate(rendering.conversation.messages):
        placeholder = f"<{type(message.get(key)).__name__}>"
        if message["role"] == role and placeholder in rendering.text and not _is_json(message.get(key)):
            raise UserError(
                f"{rendering.where}, message {index + 1}: the chat template writes the key {key!r}, and its value "
                f"({message[key]!r:.80}) is not JSON. Write it as text."
            )


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _of_message(rendering: Rendering, index: int, left_out: list[Words], written: set[str]) -> Iterator[Omission]:
    conversation, nothing = rendering.conversation, not written
    message = conversation.messages[index]
    if message["role"] != "assistant":
        if not message["content"].strip():
            return
        what = f"{'' if nothing else 'a part of '}messages of the role {message['role']!r}"
        cure = (
            "; --system_in_user puts them in front of the user's" if message["role"] in ("system", "developer") else ""
        )
        yield Omission(index, f"{what}, which the model is therefore not shown{cure}")
        return
    keys = {words.key for words in left_out}
    _refuse_unlearnable(rendering, index, left_out, nothing=nothing)
    last_answer = all(later["role"] != "assistant" for later in conversation.messages[index + 1 :])
    level = logging.WARNING if last_answer else logging.INFO
    which = "the last answer" if last_answer else "earlier answers, as many templates do"
    reasoning = keys.intersection(REASONING)
    if reasoning and not written.intersection(REASONING):
        yield Omission(index, f"the reasoning ({sorted(reasoning)[0]!r}) of {which}", level)
    content = [words for words in left_out if words.key == "content"]
    if any(words.last for words in content):
        yield Omission(index, "the text beside a call" if "tool_calls" in message else "answers that are not learnt")
    elif content:
        yield Omission(index, f"the reasoning within the text of {which}", level)
    if CALL_NAME in keys:
        yield Omission(index, "calls of tools")
    elif CALL_ARGUMENTS in keys:
        yield Omission(index, "some arguments of calls")
    for key in sorted(keys & {"refusal", "tool_plan"}):
        yield Omission(index, f"{key!r} of answers")


def _refuse_unlearnable(rendering: Rendering, index: int, left_out: list[Words], *, nothing: bool) -> None:
    """Refuses an answer whose text or call is missing: the model would learn to say nothing there."""
    message, where = rendering.conversation.messages[index], f"{rendering.where}, message {index + 1}"
    if index not in rendering.conversation.learnt:
        return
    keys = {words.key for words in left_out}
    calls = message.get("tool_calls", [])
    if CALL_NAME in keys:
        # Its name may stand elsewhere: in the tools, in what somebody says, in another call.
        absent = [call for call in calls if call.get("function", call)["name"] not in rendering.text]
        refuse_call((absent or calls)[0], where)
    if not calls and any(words.key == "content" and words.last for words in left_out):
        raise rendering.hidden(index)
    if nothing and "content" not in keys:
        raise UserError(
            f"{where}: the chat template writes nothing of this message, which has only "
            f"{' and '.join(map(repr, sorted(keys)))}. Put its text into 'content', give a template that writes it "
            "(--chat_template), or leave such rows out."
        )


def refuse_call(call: dict, where: str) -> NoReturn:
    """Refuses a template that leaves a learnt call out."""
    raise UserError(
        f"{where}: the chat template leaves its call of {call.get('function', call)['name']!r} out. Give one that "
        "writes tool calls (--chat_template), or leave such rows out."
    )
