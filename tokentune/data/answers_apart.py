"""Rows for adapters that act on answers alone (`--lora_on answers`): one answer each, behind what invokes them.

peft looks for the last occurrence of certain tokens in a row, the invocation, and adapters act from there on (activated
LoRA, arXiv 2504.12397). Here they are a chat template's generation prompt, or where it has none what it writes between
a question and its answer; of a prompt template the line after which the answer begins, and what follows it; of other
texts their prompts' last line, if it is the same in all rows.

A conversation with several answers makes as many rows, each up to its answer's end: those before belong to its prompt.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from tokentune.data.chat.rendering import Rendering
from tokentune.data.chat.spans import EMPTY_REASONING, REASONING_OPENED
from tokentune.data.chat.templates import ChatEncoder
from tokentune.data.encoding import TokenRow, trimmed_offsets
from tokentune.data.formats.conversations import Conversation
from tokentune.data.prompts import PromptTemplate
from tokentune.errors import UserError
from tokentune.sampling.sampler import IGNORED_LABEL
from tokentune.settings.flags import require

_FLAG = "--lora_on answers"
_CURE = "Take --lora_on all"


def chat_invocation(encoder: ChatEncoder) -> tuple[int, ...]:
    """The tokens with which a chat template leads over to an answer.

    Raises:
        UserError: it writes nothing visible there.
    """
    asked, tokenizer = "Hi", encoder.tokenizer
    texts = [{"role": "user", "content": asked}, {"role": "assistant", "content": "Yes"}]
    conversation = Conversation(texts, None, (1,))
    text, spans = encoder.spans(conversation, _FLAG)
    rendering = Rendering(tokenizer, conversation, _FLAG)
    parts = [rendering.beginning(1, generation_prompt=prompted) for prompted in (False, True)]
    without, prompt = ("" if part is None else part[0] for part in parts)
    added = prompt[len(without) :] if prompt.startswith(without) else ""
    added = REASONING_OPENED.sub("", added)
    end = spans[0].start
    start, question = (text.rfind(words, 0, end) for words in (added, asked))
    if added.strip():
        end = start + len(added)  # without the reasoning that a prompt may open, and an answer without any may not have
    else:
        start = question + len(asked)
    require(
        start > question >= 0,
        f"{_FLAG}: the chat template does not write its generation prompt between a question and its answer. {_CURE}.",
    )
    return _tokens_within(tokenizer, text, start, end, "the chat template writes nothing in front of answers")


def template_invocation(template: PromptTemplate, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens from a prompt template's `response_split` to the answer.

    Raises:
        UserError: it does not end with such a line, or the tokenizer tells no character offsets.
    """
    prompt, mark = template.prompt("Hi", None), template.response_split
    start = prompt.rfind(mark) if mark.strip() else -1
    require(start >= 0, f"{_FLAG}: the prompt template has no response_split in front of the answer. {_CURE}.")
    why_not = "the prompt template writes nothing in front of answers"
    return _tokens_within(tokenizer, f"{prompt}Yes", start, len(prompt), why_not)


def text_invocation(row: TokenRow, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens of the last line of a row's prompt, which has to be that of all rows ("Answer:").

    Raises:
        UserError: the prompt has no line before it.
    """
    end = next((n for n, label in enumerate(row.labels) if label != IGNORED_LABEL), 0)
    visible = False
    for start in range(end - 1, -1, -1):
        piece = tokenizer.decode([row.ids[start]])
        if visible and "\n" in piece:
            return tuple(row.ids[start + 1 : end])
        visible |= bool(piece.strip())
    raise UserError(
        f"{_FLAG}: nothing tells where answers begin in these texts: their prompts would have to end with a line of "
        f"their own, the same in all rows. {_CURE}, or data of instructions or conversations."
    )


def _tokens_within(
    tokenizer: PreTrainedTokenizerBase, text: str, start: int, end: int, why_not: str
) -> tuple[int, ...]:
    """The tokens of characters [start, end) alone."""
    require(
        getattr(tokenizer, "is_fast", False),
        f"{_FLAG} needs a tokenizer that tells character offsets (with a tokenizer.json). {_CURE}.",
    )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = encoded["input_ids"]
    offsets = [*trimmed_offsets(tokenizer, text, ids, encoded["offset_mapping"])]
    inside = [n for n, (first, last) in enumerate(offsets) if start <= first and last <= end]
    while inside and len({*offsets[inside[-1]]}) == 1:  # of white space alone, perhaps the answer's
        inside.pop()
    found = tuple(ids[n] for n in inside)
    require(bool(found) and bool(text[start:end].strip()), f"{_FLAG}: {why_not}. {_CURE}.")
    return found


@dataclass(frozen=True)
class AnswersApart:
    """Makes rows of one answer each. `invocation`: the tokens in front of each answer."""

    invocation: tuple[int, ...]
    tokenizer: PreTrainedTokenizerBase

    def __call__(self, row: TokenRow, where: str) -> list[TokenRow]:
        """The rows of an encoded one; itself where nothing is learnt.

        Raises:
            UserError: an answer does not stand behind the invocation, or holds it.
        """
        ids, length, rows = row.ids, len(self.invocation), []
        places = [n for n, token in enumerate(ids) if token == self.invocation[0]]
        places = [n for n in places if tuple(ids[n : n + length]) == self.invocation]
        for begin, end in self._answers(row):
            before = [place for place in places if place + length <= begin]
            if not before or not self._is_reasoning(ids[before[-1] + length : begin]):
                raise self._unfit(where, "does not begin behind")
            if any(before[-1] < place <= end - length for place in places):
                raise self._unfit(where, "holds")
            labels = [IGNORED_LABEL] * begin + row.labels[begin:end]
            rows.append(TokenRow(ids[:end], labels))
        return rows or [row]

    def _answers(self, row: TokenRow) -> Iterator[tuple[int, int]]:
        """Where each answer begins and ends: supervised tokens, with none but white space between them."""
        begin = end = None
        for supervised, run in groupby(range(len(row.ids)), key=lambda place: row.labels[place] != IGNORED_LABEL):
            if not supervised:
                continue
            first, *others = run
            if begin is not None and self.tokenizer.decode(row.ids[end:first]).strip():
                yield begin, end
                begin = None
            begin, end = first if begin is None else begin, (others or [first])[-1] + 1
        if begin is not None:
            yield begin, end

    def _is_reasoning(self, ids: list[int]) -> bool:
        """Whether these tokens before an answer are white space, or open, or open and close, its reasoning."""
        text = self.tokenizer.decode(ids).strip() if ids else ""
        return any(pattern.fullmatch(text) for pattern in (REASONING_OPENED, EMPTY_REASONING))

    def _unfit(self, where: str, what: str) -> UserError:
        return UserError(
            f"{where}: its answer {what} {self.tokenizer.decode(self.invocation)!r}, from where adapters act "
            f"({_FLAG}). {_CURE}, or leave such rows out (--bad_rows skip)."
        )
