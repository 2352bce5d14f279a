"""A conversation rendered by its chat template, and where in the rendering the words of each message stand.

A template is a program and may trim, move, repeat or leave out what it is given. So the conversation is rendered a
second time with every text between two marks, private-use characters that no text has. When the marks are taken out
again, what is left must be the first rendering, to the last character; then the places of the marks are places in it.
That is two renderings, however many messages there are.

White space at a text's ends and tags such as `</think>` stay outside of the marks: templates trim the one and look for
the other, and have to find the same as without marks.

Templates are rendered by transformers, in Jinja's immutable sandbox: they see plain data alone, and no attribute of it.
"""

import json
import re
import traceback
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from tokentune.data.formats.conversations import ROLES, Conversation
from tokentune.errors import UserError
from tokentune.sources import first_line

GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
REASONING = ("reasoning_content", "reasoning", "thinking")
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
        if self._calls and message.get("tool_calls"):
            marked["tool_calls"] = [self._call(call, index) for call in message["tool_calls"]]
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
        if "function" in call:
            return call | {"function": self._call(call["function"], index)}
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


class Rendering:
    """A conversation's renderings: the whole, and beginnings of it, each made once.

    Attributes:
        text: the whole conversation.
        generation: ranges of characters that the template marks by `{% generation %}`; None where it marks none.
        words: what was marked.
        places: of words in `text`, in order. Empty where marks change what the template writes.
        written: numbers of the words that are in `text`; None where marks change what the template writes.

    Raises:
        UserError: the template does not take the conversation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, conversation: Conversation, where: str) -> None:
        self.tokenizer, self.conversation, self.where = tokenizer, conversation, where
        self._beginnings: dict[tuple[int, bool, str | None], tuple[str, list[Place]] | None] = {}
        try:
            self.template = tokenizer.get_chat_template(None, conversation.tools)
        except ValueError as error:
            raise UserError(f"the tokenizer's chat template cannot be used: {first_line(error)}") from error
        try:
            silent = self._read(parts=())
        except UserError:
            if not self._read_as_parts(ROLES):
                raise
        else:
            if silent and not self._read_as_parts(silent):
                self._read(parts=())

    def beginning(
        self, messages: int, *, generation_prompt: bool = False, answer: str | None = None
    ) -> tuple[str, list[Place]] | None:
        """The first so many messages, and one more where there is an `answer` to them; and the places of words in them.

        None where the template takes no such part.
        """
        key = (messages, generation_prompt, answer)
        if key not in self._beginnings:
            further = [] if answer is None else [{"role": "assistant", "content": answer}]
            try:
                text = self._render([*self.messages[:messages], *further], generation_prompt=generation_prompt)[0]
                self._beginnings[key] = read_marks(text)[:2]
            except UserError:
                self._beginnings[key] = None
        return self._beginnings[key]

    def hidden(self, index: int) -> UserError:
        """What to say when a message's text is not found."""
        return UserError(
            f"{self.where}, message {index + 1}: the chat template rewrites the conversation so that this answer "
            "cannot be told from the rest. Give a template that marks the assistant's text with {% generation %} "
            "({% endgeneration %}): --chat_template."
        )

    def _read(self, *, parts: Collection[str]) -> set[str]:
        """Renders and marks the conversation. The roles of which no content is written, as far as marks tell.

        Args:
            parts: roles whose content is given as a list of parts, which some templates (of vision models) take alone.
        """
        self._parts = parts
        self.messages = self.conversation.messages
        marks = GENERATION_MARK.search(self.template) is not None
        self.text, ranges = self._whole(marks)
        self.generation = ranges if marks else None
        self.words: list[Words] = []
        self.places: list[Place] = []
        self.written: set[int] | None = None
        self._find_words()
        return set() if self.written is None else self._speaking(range(len(self.words))) - self._speaking(self.written)

    def _speaking(self, numbers: Collection[int]) -> set[str]:
        """The roles of messages whose content has one of these words."""
        contents = [n for n in numbers if self.words[n].key == "content"]
        return {self.messages[self.words[n].message]["role"] for n in contents}

    def _read_as_parts(self, roles: Collection[str]) -> bool:
        """Whether the template takes these roles' content in parts, and writes its text rather than JSON or Python."""
        try:
            self._read(parts=roles)
        except UserError:
            return False
        given = _contents_as_parts([m for m in self.conversation.messages if m["role"] in roles], roles)
        forms = (form for m in given for part in m["content"] for form in (str(part), _json(part)))
        return bool(self._speaking(self.written or ()) & {*roles}) and not any(form in self.text for form in forms)

    def _whole(self, marks: bool) -> tuple[str, list[tuple[int, int]]]:
        """With the arguments of calls as objects or as JSON text, whichever the template takes."""
        try:
            text, ranges = self._render(self.messages, marks=marks)
        except UserError:
            if (as_text := _calls_as_text(self.messages)) is None:
                raise
            try:
                text, ranges = self._render(as_text, marks=marks)
            except UserError:
                pass  # not the arguments' doing
            else:
                self.messages = as_text
                return text, ranges
            raise
        if _writes_python(self.messages, text) and (as_text := _calls_as_text(self.messages)) is not None:
            self.messages = as_text
            text, ranges = self._render(self.messages, marks=marks)
        return text, ranges

    def _find_words(self) -> None:
        if ANY_MARK.search(self.text):
            return
        # Templates that look whether a text is empty write something else around marks: without these, then.
        named = any(SPEAKER in message for message in self.messages)
        for speakers, calls, empty in (
            *([(True, True, ROLES)] if named else []),
            (False, True, ROLES),
            (False, True, ("assistant",)),
            (False, True, ()),
            (False, False, ()),
        ):
            marked = MarkedMessages(self.messages, speakers=speakers, calls=calls, empty=empty)
            try:
                text, places, written = read_marks(self._render(marked.messages)[0])
            except UserError:
                continue
            if text == self.text or (marked.complete and _same_but_for_case(text, self.text)):
                self.messages, self.words, self.places, self.written = marked.messages, marked.words, places, written
                return

    def _render(
        self, messages: list[dict], *, generation_prompt: bool = False, marks: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        try:
            texts, ranges = render_jinja_template(
                conversations=[_contents_as_parts(messages, self._parts)],
                tools=self.conversation.tools,
                chat_template=self.template,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=generation_prompt,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:  # a template is a program, and may fail in any way
            raise UserError(
                f"{self.where}: the chat template{_line(error)} does not take this conversation: "
                f"{first_line(error) or type(error).__name__}"
            ) from error
        return texts[0], ranges[0] if marks else []


def _same_but_for_case(a: str, b: str) -> bool:
    """As of templates that write texts capitalized, and with marks before them do not."""
    return len(a) == len(b) and a.lower() == b.lower()


def call_arguments(messages: list[dict[str, Any]]) -> list[Any]:
    """The arguments of all calls."""
    calls = (call.get("function", call) for message in messages for call in message.get("tool_calls", ()))
    return [call.get("arguments") for call in calls]


def _contents_as_parts(messages: list[dict[str, Any]], roles: Collection[str]) -> list[dict[str, Any]]:
    """The messages, those of these roles with their text as a list of one part (OpenAI's form)."""
    return [
        message | {"content": [{"type": "text", "text": message["content"]}]} if message["role"] in roles else message
        for message in messages
    ]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _calls_as_text(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The messages with the arguments of calls as JSON text; None where that changes nothing."""

    def as_text(call: dict[str, Any]) -> dict[str, Any]:
        if "function" in call:
            return call | {"function": as_text(call["function"])}
        if isinstance(call.get("arguments"), Mapping | list):
            return call | {"arguments": _json(call["arguments"])}
        return call

    changed = [
        message | {"tool_calls": [as_text(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]
    return None if changed == messages else changed


def _writes_python(messages: list[dict[str, Any]], text: str) -> bool:
    """Whether the arguments of calls stand there as Python writes an object, not as JSON does."""
    return any(
        isinstance(arguments, Mapping) and arguments and str(arguments) in text and _json(arguments) not in text
        for arguments in call_arguments(messages)
    )


def last_words(message: dict) -> str:
    """The end of what a message says: templates may trim it, and leave reasoning out or put it elsewhere."""
    return message["content"].split("</think>")[-1].strip()[-20:]


def _line(error: Exception) -> str:
    """ ", line 3" of the template; "" where the error does not tell."""
    if isinstance(error, TemplateSyntaxError):
        return f", line {error.lineno},"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return f", line {lines[-1]}," if lines else ""
