"""A conversation rendered by its chat template: the whole with the places of its words, and beginnings of it.

The whole takes two renderings, without and with marks around the texts (`data/chat/marks.py`), however many messages
there are. Templates are rendered by transformers, in Jinja's immutable sandbox: they see plain data alone, and no
attribute of it.
"""

import json
import re
import traceback
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from tokentune.data.chat.marks import ANY_MARK, SPEAKER, MarkedMessages, Place, Words, read_marks, with_calls
from tokentune.data.formats.conversations import ROLES, Conversation
from tokentune.errors import UserError
from tokentune.sources import first_line

GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


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

    def is_the_same_without(self, keys: Collection[tuple[str, str]] = (), *, tools: bool = True) -> bool:
        """Whether the template writes the same without these keys of messages, given as (role, key), or the tools."""
        messages = [
            {key: value for key, value in message.items() if (message["role"], key) not in keys}
            for message in self._unmarked
        ]
        try:
            return self._render(messages, tools=tools)[0] == self.text
        except UserError:
            return False

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
        self._unmarked = self.messages
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
        """With the arguments of calls as objects, or as JSON text where the template takes these alone."""
        as_text = [with_calls(message, _arguments_as_text) for message in self.messages]
        try:
            found = self._render(self.messages, marks=marks)
        except UserError:
            with suppress(UserError):
                found = self._render(as_text, marks=marks)
                self.messages = as_text
                return found
            raise
        if _writes_python(self.messages, found[0]):
            self.messages = as_text
            found = self._render(as_text, marks=marks)
        return found

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
        self, messages: list[dict], *, generation_prompt: bool = False, marks: bool = False, tools: bool = True
    ) -> tuple[str, list[tuple[int, int]]]:
        try:
            texts, ranges = render_jinja_template(
                conversations=[_contents_as_parts(messages, self._parts)],
                tools=self.conversation.tools if tools else None,
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


def _contents_as_parts(messages: list[dict[str, Any]], roles: Collection[str]) -> list[dict[str, Any]]:
    """The messages, those of these roles with their text as a list of one part (OpenAI's form)."""
    return [
        message | {"content": [{"type": "text", "text": message["content"]}]} if message["role"] in roles else message
        for message in messages
    ]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _arguments_as_text(function: dict[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments")
    return function | {"arguments": _json(arguments)} if isinstance(arguments, Mapping | list) else function


def _writes_python(messages: list[dict[str, Any]], text: str) -> bool:
    """Whether the arguments of calls stand there as Python writes an object, not as JSON does."""
    calls = (call.get("function", call) for message in messages for call in message.get("tool_calls", ()))
    found = [call["arguments"] for call in calls if isinstance(call.get("arguments"), Mapping) and call["arguments"]]
    return any(str(arguments) in text and _json(arguments) not in text for arguments in found)


def last_words(message: dict) -> str:
    """The end of what a message says: templates may trim it, and leave reasoning out or put it elsewhere."""
    return message["content"].split("</think>")[-1].strip()[-20:]


def _line(error: Exception) -> str:
    """ ", line 3" of the template; "" where the error does not tell."""
    if isinstance(error, TemplateSyntaxError):
        return f", line {error.lineno},"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return f", line {lines[-1]}," if lines else ""
