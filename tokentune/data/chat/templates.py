"""Conversations to tokens by a chat template, and which of these tokens are learnt.

The template writes a text (`data/chat/rendering.py`), of which some characters are learnt (`data/chat/spans.py`); the
tokenizer's offsets tell which tokens those are.
"""

import logging
import re
from collections.abc import Sequence

from transformers import GenerationConfig, PreTrainedTokenizerBase

from tokentune.data.chat.generation_marks import generation_spans
from tokentune.data.chat.omissions import omissions, refuse_call, writes_tools_in_part
from tokentune.data.chat.rendering import Rendering
from tokentune.data.chat.spans import Span, SpanFinder, ends_by_next_turn
from tokentune.data.chat.template_files import fitting
from tokentune.data.encoding import Notes, TokenRow, trimmed_offsets
from tokentune.data.formats.conversations import Conversation, system_in_user
from tokentune.errors import UserError
from tokentune.sampling.sampler import IGNORED_LABEL


class ChatEncoder:
    """Encodes conversations.

    Args:
        tokenizer: a fast one, with a chat template.
        add_eos_token: ends a conversation whose last message is learnt with the EOS, where the template does not.
        system_in_user: puts system and developer messages in front of the user's next one.

    Attributes:
        notes: what the template leaves out, and where its marks are wrong.

    Raises:
        UserError: the tokenizer has no chat template, no character offsets, or no EOS to add.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, add_eos_token: bool = False, system_in_user: bool = False
    ) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                "the data holds conversations, and this model's tokenizer has no chat template to put them into.\n"
                f"{fitting(tokenizer)} Or give data with the columns instruction and output."
            )
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                "conversations need a tokenizer that tells character offsets, and this one does not. "
                "Use a fast one (with a tokenizer.json)."
            )
        if add_eos_token and tokenizer.eos_token is None:
            raise UserError("--add_eos_token: this tokenizer has no end-of-sequence token. Leave the flag out.")
        self.tokenizer, self.add_eos_token, self.system_in_user = tokenizer, add_eos_token, system_in_user
        self.notes = Notes()
        special = sorted({*tokenizer.all_special_tokens, *tokenizer.added_tokens_encoder}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or "(?!)")
        self._tools_written = False  # of the last conversation with tools
        self._ends_by_next_turn: bool | None = None

    def __call__(self, conversation: Conversation, where: str) -> TokenRow:
        """Uncut ids and labels. `where`: the row, for messages.

        Raises:
            UserError: the template refuses the conversation, leaves out what is learnt, or hides where the assistant
                speaks.
        """
        (row,) = self.batch([(conversation, where)])
        if isinstance(row, UserError):
            raise row
        return row

    def batch(self, conversations: Sequence[tuple[Conversation, str]]) -> list[TokenRow | UserError]:
        """As many rows, tokenized together; of one that cannot be encoded, what is wrong with it."""
        found: list[tuple[str, list[Span]] | UserError] = []
        for conversation, where in conversations:
            try:
                found.append(self.spans(conversation, where))
            except UserError as error:
                found.append(error)
        texts = [one[0] for one in found if not isinstance(one, UserError)]
        if not texts:
            return found
        # The template writes the special tokens itself: a BOS that the tokenizer adds would be a second one.
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
        )
        tokens = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [
            one if isinstance(one, UserError) else self._row(*one, conversation, *next(tokens))
            for one, (conversation, _) in zip(found, conversations, strict=True)
        ]

    def spans(self, conversation: Conversation, where: str) -> tuple[str, list[Span]]:
        """The rendered conversation, and what of it is learnt: spans in order, apart from one another."""
        if self.system_in_user:
            conversation = system_in_user(conversation)
        rendering = self._rendering(conversation, where)
        if conversation.tools and (left_out := self._tools_left_out(rendering)) is not None:
            self.notes.add(logging.WARNING, left_out, where)
        for omission in omissions(rendering):
            place = f"{where}, message {omission.message + 1}"
            self.notes.add(omission.level, f"the chat template leaves out {omission.sentence}", place)
        spans = self._generation_spans(rendering)
        if spans is None:
            spans = SpanFinder(rendering, self.tokenizer, self._special, self._unended).spans()
        _check_calls(conversation, "".join(rendering.text[span.start : span.end] for span in spans), where)
        return rendering.text, spans

    def _rendering(self, conversation: Conversation, where: str) -> Rendering:
        try:
            return Rendering(self.tokenizer, conversation, where)
        except UserError as error:
            folded = system_in_user(conversation)
            if folded == conversation:
                raise
            try:
                Rendering(self.tokenizer, folded, where)
            except UserError:
                raise error from None
            raise UserError(
                f"{error}\nIt takes the conversation with its system message in front of the user's: --system_in_user."
            ) from error

    def _tools_left_out(self, rendering: Rendering) -> str | None:
        """What to say of a conversation's tools that the template does not write; None: it writes them. A rendering
        without tools is made only where it is needed: of the first, and where something is missing in the text."""
        in_part = writes_tools_in_part(rendering)
        if in_part or not self._tools_written:
            self._tools_written = not rendering.is_the_same_without(tools=False)
        if not self._tools_written:
            return "the chat template does not write the tools, which the model is not shown"
        return "the chat template leaves out a part of the tools, which the model is not shown" if in_part else None

    def _unended(self) -> bool:
        if self._ends_by_next_turn is None:
            texts = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
            try:
                rendering = Rendering(self.tokenizer, Conversation(texts, None, (1,)), "")
            except UserError:
                self._ends_by_next_turn = False
            else:
                self._ends_by_next_turn = ends_by_next_turn(rendering, self._special)
        return self._ends_by_next_turn

    def _generation_spans(self, rendering: Rendering) -> list[Span] | None:
        if rendering.generation is None:
            return None
        spans, wrong = generation_spans(rendering)
        if wrong is not None:
            index, what = wrong
            sentence = f"{what} the {{% generation %}} marks that the chat template sets; the assistant's text is found"
            self.notes.add(logging.WARNING, f"{sentence} without them", f"{rendering.where}, message {index + 1}")
        return spans

    def _row(
        self, text: str, spans: list[Span], conversation: Conversation, ids: list[int], offsets: list[tuple[int, int]]
    ) -> TokenRow:
        ids, labels = list(ids), [IGNORED_LABEL] * len(ids)
        remaining = iter(spans)
        span = next(remaining, None)
        for index, (start, end) in enumerate(trimmed_offsets(self.tokenizer, text, ids, offsets)):
            while span is not None and start >= span.end:
                span = next(remaining, None)
            if span is not None and _learnt(start, end, span) and index > 0:  # nothing predicts the first token
                labels[index] = ids[index]
        ends_learnt = bool(conversation.learnt) and conversation.learnt[-1] == len(conversation.messages) - 1
        if self.add_eos_token and ends_learnt and not text.rstrip().endswith(self.tokenizer.eos_token):
            ids.append(self.tokenizer.eos_token_id)
            labels.append(self.tokenizer.eos_token_id)
        return TokenRow(ids, labels)


def _learnt(start: int, end: int, span: Span) -> bool:
    """Whether a token is: one that holds a part of the message, or stands within the end of its turn."""
    return (end > span.start and start < span.content_end) or (start >= span.content_end and end <= span.end)


def _check_calls(conversation: Conversation, learnt: str, where: str) -> None:
    """Refuses a template that leaves learnt calls out: the model would learn to say nothing where it should call."""
    for index in conversation.learnt:
        for call in conversation.messages[index].get("tool_calls", ()):
            if call.get("function", call)["name"] not in learnt:
                refuse_call(call, f"{where}, message {index + 1}")


def end_of_answer(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template ends an answer with, for the model to learn; empty where it writes no such thing."""
    messages = [{"role": role, "content": "said"} for role in ("user", "assistant", "user")]
    try:
        text, (span,) = ChatEncoder(tokenizer).spans(Conversation(messages, None, (1,)), "")
    except UserError:
        return ""
    return text[span.start : span.end].rpartition("said")[2].strip()


def stop_at_end(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Adds the tokenizer's EOS, and the end of an answer where it is one token, to those that generation stops at."""
    end = tokenizer(end_of_answer(tokenizer), add_special_tokens=False)["input_ids"]
    known = generation.eos_token_id
    ids = [] if known is None else [known] if isinstance(known, int) else list(known)
    new = [token for token in (tokenizer.eos_token_id, *(end if len(end) == 1 else ())) if token is not None]
    if not {*new} <= {*ids}:
        generation.eos_token_id = list(dict.fromkeys([*ids, *new]))
