"""Conversations to tokens by a chat template, and which of these tokens are the assistant's.

Templates that mark the assistant's text (`{% generation %}`, transformers' documentation, "Training with chat
templates") are taken at their word. For the others the text is found by rendering parts of the conversation:

- An answer begins where the rendering of what came before it, with the generation prompt, ends: with the first
  character that the model has to write at inference. Where that rendering is no beginning of the whole one (templates
  that move the system prompt, or rewrite earlier messages), it begins at the place where a placeholder appears that is
  put in for the message.
- It ends with the last visible character that the template writes for the message: the end-of-turn marker is learnt,
  the white space after it, before the next turn, is not. Where the rendering up to the message is no beginning of the
  whole one, the end is found behind the placeholder.

Both are character positions that hold exactly or are not found; then the row is refused, never guessed at. Templates
are rendered by transformers, in Jinja's immutable sandbox: they see plain data alone, and no attribute of it.
"""

import logging
import re
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from tokentune.data.conversations import Conversation
from tokentune.data.encoding import TokenRow
from tokentune.data.sources import first_line
from tokentune.errors import UserError
from tokentune.prompts import common_prefix
from tokentune.selection import IGNORED_LABEL

logger = logging.getLogger(__name__)

MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
PLACEHOLDER = "\ue0a7\ue0a8"  # private use: no text has it, and no filter for white space or case changes it
CURE = "Give a template that marks the assistant's text with {% generation %} ({% endgeneration %}): --chat_template."


class Span(NamedTuple):
    """Characters [start, end) of a rendering that are learnt; what the message itself says ends at `content_end`."""

    start: int
    content_end: int
    end: int


def load_chat_template(path: str) -> str:
    """The text of a Jinja file.

    Raises:
        UserError: it cannot be read, is no template, or never looks at the messages.
    """
    try:
        template = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"--chat_template {path}: cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, ValueError) as error:
        raise UserError(f"--chat_template {path}: not UTF-8 text.") from error
    if "messages" not in template:
        raise UserError(f"--chat_template {path}: never mentions `messages`, so all conversations would look alike.")
    try:
        render_jinja_template([[{"role": "user", "content": ""}]], chat_template=template)
    except TemplateSyntaxError as error:
        raise UserError(f"--chat_template {path}, line {error.lineno}: not valid Jinja: {first_line(error)}") from error
    except Exception:  # what it makes of a real conversation is another matter
        logger.debug("a template that does not take one empty message", exc_info=True)
    return template


class ChatEncoder:
    """Encodes conversations.

    Args:
        tokenizer: a fast one, with a chat template.
        add_eos_token: ends a conversation whose last message is learnt with the EOS, where the template does not.

    Raises:
        UserError: the tokenizer has no chat template, no character offsets, or no EOS to add.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, add_eos_token: bool = False) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                "the data holds conversations, and this model's tokenizer has no chat template to put them into.\n"
                "Give one with --chat_template FILE, or data with the columns instruction and output."
            )
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                "conversations need a tokenizer that tells character offsets, and this one does not. "
                "Use a fast one (with a tokenizer.json)."
            )
        if add_eos_token and tokenizer.eos_token is None:
            raise UserError("--add_eos_token: this tokenizer has no end-of-sequence token. Leave the flag out.")
        self.tokenizer, self.add_eos_token = tokenizer, add_eos_token
        special = sorted({*tokenizer.all_special_tokens, *tokenizer.added_tokens_encoder}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or "(?!)")
        self._warned = self._tools_checked = False

    def __call__(self, conversation: Conversation, where: str) -> TokenRow:
        """Uncut ids and labels. `where`: the row, for messages.

        Raises:
            UserError: the template refuses the conversation, or hides where the assistant speaks.
        """
        text, spans = self.spans(conversation, where)
        _check_tool_calls(conversation, "".join(text[span.start : span.end] for span in spans), where)
        # The template writes the special tokens itself: a BOS that the tokenizer adds would be a second one.
        encoding = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
        )
        ids = list(encoding["input_ids"])
        labels = [IGNORED_LABEL] * len(ids)
        remaining = iter(spans)
        span = next(remaining, None)
        for index, (start, end) in enumerate(encoding["offset_mapping"]):
            while span is not None and start >= span.end:
                span = next(remaining, None)
            if span is not None and _learnt(start, end, span) and index > 0:  # nothing predicts the first token
                labels[index] = ids[index]
        ends_learnt = bool(conversation.learnt) and conversation.learnt[-1] == len(conversation.messages) - 1
        if self.add_eos_token and ends_learnt and not text.rstrip().endswith(self.tokenizer.eos_token):
            ids.append(self.tokenizer.eos_token_id)
            labels.append(self.tokenizer.eos_token_id)
        return TokenRow(ids, labels)

    def spans(self, conversation: Conversation, where: str) -> tuple[str, list[Span]]:
        """The rendered conversation, and what of it is learnt: spans in order, apart from one another."""
        rendering = _Rendering(self.tokenizer, conversation, where)
        if conversation.tools and not self._tools_checked:
            self._tools_checked = True
            if _Rendering(self.tokenizer, conversation._replace(tools=None), where).text == rendering.text:
                logger.warning("%s: the chat template does not write the tools, so the model is not shown them", where)
        marked = self._marked_spans(rendering) if MARKS.search(rendering.template) else None
        if marked is not None:
            return rendering.text, marked
        spans: list[Span] = []
        for index in conversation.learnt:
            span = Span(*self._find(rendering, index))
            if spans and span.start < spans[-1].end:
                raise rendering.hidden(index)
            if span.start < span.end:
                spans.append(span)
        return rendering.text, spans

    def _marked_spans(self, rendering: "_Rendering") -> list[Span] | None:
        """What the template marks; None, said once, where its marks leave out what the assistant says, or hold more."""
        messages, learnt = rendering.conversation.messages, rendering.conversation.learnt
        ranges = sorted((start, end) for start, end in rendering.marks if start < end)
        for index, message in enumerate(messages):
            around = None if message["role"] == "assistant" else rendering.around(index)
            if around is not None and any(start <= len(around[0]) < end for start, end in ranges):
                self._warn_of_marks(rendering, index, "within")
                return None
        assistants = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if len(ranges) == len(assistants):
            ranges = [ranges[assistants.index(i)] for i in learnt]
        elif list(learnt) != assistants:
            return None  # only some are learnt, and which marks are theirs is not told
        marked = "\0".join(rendering.text[start:end] for start, end in ranges)
        position = 0
        for index in learnt:
            tail = _tail(messages[index])
            position = marked.find(tail, position)
            if position < 0:
                self._warn_of_marks(rendering, index, "not within")
                return None
            position += len(tail)
        return [Span(start, end, end) for start, end in ranges]

    def _warn_of_marks(self, rendering: "_Rendering", index: int, what: str) -> None:
        if not self._warned:
            logger.warning(
                "%s, message %d: %s the {%% generation %%} marks that the chat template sets; the assistant's text is "
                "found without them",
                *(rendering.where, index + 1, what),
            )
        self._warned = True

    def _find(self, rendering: "_Rendering", index: int) -> tuple[int, int, int]:
        """Where a message of the assistant begins, where its own text ends, and where its turn does."""
        text = rendering.text
        start = self._start(rendering, index)
        until = rendering.part(index + 1)
        if until is not None and text.startswith(until) and len(until) >= start:
            content_end = end = len(until)
        else:
            content_end, end = self._end_behind_placeholder(rendering, index)
        end = start + len(text[start:end].rstrip())
        eos = self.tokenizer.eos_token
        if eos and text.startswith(eos, end):  # of templates that end a turn where the next one begins
            end += len(eos)
        said = _tail(rendering.conversation.messages[index])
        # A template may spell the text otherwise (escaped, say), as long as it writes it at all.
        if start > end or (said not in text[start:end] and rendering.around(index) is None):
            raise rendering.hidden(index)
        return start, min(content_end, end), end

    def _start(self, rendering: "_Rendering", index: int) -> int:
        text = rendering.text
        prompt = rendering.part(index, generation_prompt=True) if index > 0 else None
        if prompt is not None and text.startswith(prompt):
            if prompt != rendering.part(index):
                return len(prompt)
            # No generation prompt: a header that the template writes before the answer is none of it.
            before, _ = rendering.around(index) or (prompt, "")
            header = text[len(prompt) : len(before)] if text.startswith(before) else ""
            return len(before) if header.strip() else len(prompt)
        around = rendering.around(index)
        if around is None or not text.startswith(around[0]):
            raise rendering.hidden(index)
        if index > 0:  # what is answered has to stand before the answer
            asked = rendering.around(index - 1)
            if asked is None or len(asked[0]) >= len(around[0]) or not text.startswith(asked[0]):
                raise rendering.hidden(index)
        return len(around[0])

    def _end_behind_placeholder(self, rendering: "_Rendering", index: int) -> tuple[int, int]:
        around, alone = rendering.around(index), rendering.around(index, alone=True)
        if around is None or alone is None or not rendering.text.endswith(around[1]):
            raise rendering.hidden(index)
        behind = around[1]
        # What follows the message whether or not others do is the end of its turn.
        common = common_prefix(behind, alone[1])
        for token in self._special.finditer(behind):
            if token.start() < common < token.end():  # two markers that begin alike
                common = token.start()
        if not behind[:common].strip() and self._special.match(alone[1].lstrip()):
            # The last turn ends in a marker of its own (gpt-oss): then so do the others.
            first = self._special.match(behind, len(behind) - len(behind.lstrip()))
            common = first.end() if first else common
        content_end = len(rendering.text) - len(behind)
        return content_end, content_end + common


class _Rendering:
    """A conversation's renderings: the whole, and parts of it, each made once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, conversation: Conversation, where: str) -> None:
        self.tokenizer, self.conversation, self.where = tokenizer, conversation, where
        self._parts: dict[Any, str | None] = {}
        try:
            self.template = tokenizer.get_chat_template(None, conversation.tools)
        except ValueError as error:
            raise UserError(f"the tokenizer's chat template cannot be used: {first_line(error)}") from error
        self.text, self.marks = self._render(conversation.messages, marks=bool(MARKS.search(self.template)))

    def part(self, messages: int, *, generation_prompt: bool = False) -> str | None:
        """The first so many messages; None where the template does not take them alone."""
        key = (messages, generation_prompt)
        if key not in self._parts:
            self._parts[key] = self._try(self.conversation.messages[:messages], generation_prompt)
        return self._parts[key]

    def around(self, index: int, *, alone: bool = False) -> tuple[str, str] | None:
        """What is written before and after a message's text, found with a placeholder for it; `alone`: as the last."""
        key = ("around", index, alone)
        if key not in self._parts:
            messages = list(self.conversation.messages[: index + 1] if alone else self.conversation.messages)
            messages[index] = messages[index] | {"content": PLACEHOLDER}
            self._parts[key] = self._try(messages, False)
        text = self._parts[key]
        if text is None or text.count(PLACEHOLDER) != 1 or PLACEHOLDER in self.text:
            return None
        before, _, after = text.partition(PLACEHOLDER)
        return before, after

    def hidden(self, index: int) -> UserError:
        """What to say when a message's text is not found."""
        return UserError(
            f"{self.where}, message {index + 1}: the chat template rewrites the conversation so that this answer "
            f"cannot be told from the rest. {CURE}"
        )

    def _try(self, messages: list[dict], generation_prompt: bool) -> str | None:
        try:
            return self._render(messages, generation_prompt=generation_prompt)[0]
        except UserError:
            return None

    def _render(
        self, messages: list[dict], *, generation_prompt: bool = False, marks: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        try:
            texts, ranges = render_jinja_template(
                conversations=[messages],
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


def _learnt(start: int, end: int, span: Span) -> bool:
    """Whether a token is: one that holds a part of the message, or stands within the end of its turn."""
    return (end > span.start and start < span.content_end) or (start >= span.content_end and end <= span.end)


def _check_tool_calls(conversation: Conversation, learnt: str, where: str) -> None:
    """Refuses a template that leaves the calls out: the model would learn to say nothing where it should call."""
    for index in conversation.learnt:
        for call in conversation.messages[index].get("tool_calls", ()):
            name = call.get("function", call)["name"]
            if name not in learnt:
                raise UserError(
                    f"{where}, message {index + 1}: the chat template leaves its call of {name!r} out. Give one that "
                    "writes tool calls (--chat_template), or leave such rows out."
                )


def _tail(message: dict[str, Any]) -> str:
    """The end of what a message says: templates may trim it, and leave reasoning out or put it elsewhere."""
    return message["content"].split("</think>")[-1].strip()[-20:]


def _line(error: Exception) -> str:
    """ ", line 3" of the template; "" where the error does not tell."""
    if isinstance(error, TemplateSyntaxError):
        return f", line {error.lineno},"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return f", line {lines[-1]}," if lines else ""
