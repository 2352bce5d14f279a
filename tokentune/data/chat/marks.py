"""Marks around the texts of messages, and where they stand in a rendering.

A template is a program and may trim, move, repeat or leave out what it is given. So the conversation is rendered a
second time with every text between two marks, private-use characters that no text has. When the marks are taken out
again, what is left must be the first rendering, to the last character; then the places of the marks are places in it.
Upper and lower case may differ where every message is marked, as of templates that capitalize texts.

White space at a text's ends and tags such as `</think>` stay outside of the marks: templates trim the one and look for
the other, and have to find the same as without marks.
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from tokentune.data.formats.conversations import REASONING

TEXTS = ("content", *REASONING, "refusal", "tool_plan")  # keys of a message that hold what somebody says
CALL_NAME, CALL_ARGUMENTS = "name of a call", "arguments of a call"
SPEAKER = "name"  # of whoever speaks, or of the function whose result it is

BEGIN, END = "\uf8a0", "\uf8a1"
DIGITS = "".join(chr(0xF8B0 + digit) for digit in range(10))
TO_DIGITS = str.maketrans("0123456789", DIGITS)
FROM_DIGITS = str.maketrans(DIGITS, "0123456789")
MARK = re.compile(f"([{BEGIN}{END}])([{DIGITS}]+)")
ANY_MARK = re.compile(f"[{BEGIN}{END}{DIGITS}]")
TAG = re.compile(r"(<[^<>\s]{1,40}>)")


class Words(NamedTuple):
    """Marked words: one text of a message, or what stands between two tags of it.

    Attributes:
        message: index of the message.
        key: one of `TEXTS`, `CALL_NAME`, `CALL_ARGUMENTS` or `SPEAKER`.
        before, after: what of their text stands around them and is not marked: white space, tags before the
            first and behind the last.
        last: no others of the same text follow.
    """

    message: int
    key: str
    before: str
    after: str
    last: bool


class Place(NamedTuple):
    """Characters [start, end) of a rendering that are the words of this number."""

    number: int
    start: int
    end: int


def with_calls(message: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """The message with the function of each of its calls changed: its name and arguments, wrapped as OpenAI has them or
    not."""
    if not message.get("tool_calls"):
        return message
    calls = [
        call | {"function": change(call["function"])} if "function" in call else change(call)
        for call in message["tool_calls"]
    ]
    return message | {"tool_calls": calls}


class MarkedMessages:
    """Messages whose texts are marked.

    Args:
        speakers: names of those who speak too, but for the assistant's, which stands within the header of an answer.
        calls: names and arguments of tool calls too.
        empty: roles of which messages without words have a place too.
    """

    def __init__(self, messages: list[dict[str, Any]], *, speakers: bool, calls: bool, empty: Collection[str]) -> None:
        self.words: list[Words] = []
        self._speakers, self._calls, self._empty = speakers, calls, empty
        self.messages = [self._message(index, message) for index, message in enumerate(messages)]
        self.complete = {words.message for words in self.words} == {*range(len(messages))}

    def _message(self, index: int, message: dict[str, Any]) -> dict[str, Any]:
        begun = len(self.words)
        marked = {key: self._marked(message[key], index, key) for key in TEXTS if isinstance(message.get(key), str)}
        if self._calls:
            message = with_calls(message, lambda function: self._call(function, index))
        if message["role"] in self._empty and len(self.words) == begun:  # nothing, white space or tags alone
            tags, space = (message["content"], "") if message["content"].strip() else ("", message["content"])
            self.words.append(Words(index, "content", "", space, True))
            marked["content"] = self._between_marks(tags) + space
        if self._speakers and message["role"] != "assistant" and len(self.words) > begun:
            marked |= {SPEAKER: self._marked(message[SPEAKER], index, SPEAKER)} if SPEAKER in message else {}
        return message | marked

    def _between_marks(self, core: str) -> str:
        """Marked as the words that were added last."""
        number = str(len(self.words) - 1).translate(TO_DIGITS)
        return f"{BEGIN}{number}{core}{END}{number}"

    def _call(self, call: dict[str, Any], index: int) -> dict[str, Any]:
        marked = {"name": self._marked(call["name"], index, CALL_NAME)}
        if "arguments" in call:
            marked["arguments"] = self._marked(call["arguments"], index, CALL_ARGUMENTS)
        return call | marked

    def _marked(self, value: Any, index: int, key: str) -> Any:
        """The value with all of its texts marked; keys of objects, numbers, true, false and null stay as they are."""
        if isinstance(value, Mapping):
            return {name: self._marked(inner, index, key) for name, inner in value.items()}
        if isinstance(value, list):
            return [self._marked(inner, index, key) for inner in value]
        if not isinstance(value, str) or not value.strip():
            return value
        pieces = TAG.split(value)
        visible = [n for n, piece in enumerate(pieces) if n % 2 == 0 and piece.strip()]
        for n in visible:
            core = pieces[n].strip()
            before, _, after = pieces[n].partition(core)
            opening = "".join(pieces[:n]) if n == visible[0] else ""
            closing = "".join(pieces[n + 1 :]) if n == visible[-1] else ""
            self.words.append(Words(index, key, opening + before, after + closing, n == visible[-1]))
            pieces[n] = before + self._between_marks(core) + after
        return "".join(pieces)


def read_marks(text: str) -> tuple[str, list[Place], set[int]]:
    """A rendering without its marks; the places of words in it, in order; the numbers of all words that are in it."""
    parts, places, begun, seen = [], [], {}, set()
    position = length = 0
    for mark in MARK.finditer(text):
        parts.append(text[position : mark.start()])
        length += len(parts[-1])
        position, number = mark.end(), int(mark[2].translate(FROM_DIGITS))
        seen.add(number)
        if mark[1] == BEGIN:
            begun[number] = length
        elif number in begun:
            places.append(Place(number, begun.pop(number), length))
    return "".join(parts) + text[position:], sorted(places, key=lambda place: place.start), seen
