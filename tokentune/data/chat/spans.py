"""Which characters of a rendered conversation are learnt.

Templates that mark the assistant's text (`{% generation %}`, transformers' documentation, "Training with chat
templates") are taken at their word. For the others:

- An answer begins where the model begins to write at inference: behind the generation prompt. Which text that is, is
  rendered once for each kind of message that an answer follows. Where it does not stand before an answer (templates
  that open reasoning in the generation prompt alone, or write none), the answer begins with its own words.
- It ends with the last visible character that the template writes for the message: the end-of-turn mark is learnt, the
  white space after it and the next turn's header are not. Which text is the next turn's header, is found by rendering
  the conversation up to one answer of each kind.
- Where a template ends a turn by nothing but the next turn's first mark (GLM), that mark is learnt as the end.
- What another message wrote within the assistant's turn (a tool's result) is cut out.

A message's place holds exactly or is not found; then the row is refused, never guessed at.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from tokentune.data.chat.marks import Place
from tokentune.data.chat.rendering import Rendering
from tokentune.data.chat.runs import Run, Runs, begin_with_space
from tokentune.data.chat.wordless import PROBE, WordlessMessages
from tokentune.data.prompts import common_prefix

# What opens, or opens and closes, an answer's reasoning at the end of a generation prompt.
REASONING_TAG = r"[<\[][/|]?(?:think|thought|reason)\w*[/|]?[>\]]"
REASONING_OPENED = re.compile(rf"(?:{REASONING_TAG}\s*)+\Z", re.IGNORECASE)
EMPTY_REASONING = re.compile(rf"(?:{REASONING_TAG}\s*{REASONING_TAG})?", re.IGNORECASE)


class Span(NamedTuple):
    """Characters [start, end) of a rendering that are learnt; what the message itself says ends at `content_end`."""

    start: int
    content_end: int
    end: int


class SpanFinder:
    """Finds the learnt spans of a rendering whose template sets no marks.

    Args:
        special: matches the tokenizer's special tokens.
        unended: whether the template ends an answer's text by nothing but the next turn's mark.
    """

    def __init__(
        self,
        rendering: Rendering,
        tokenizer: PreTrainedTokenizerBase,
        special: re.Pattern[str],
        unended: Callable[[], bool],
    ) -> None:
        self.rendering, self.special, self.unended = rendering, special, unended
        self.eos, self.bos = tokenizer.eos_token, tokenizer.bos_token
        self.text = rendering.text
        self._prompts: dict[tuple, tuple[str, bool] | None] = {}
        self._call_starts: dict[tuple, int] = {}  # characters before a call that are not its own
        self._headers: dict[tuple, list[tuple[list[str], bool]]] = {}
        self.runs = Runs(rendering)
        self._wordless = WordlessMessages(self.runs)

    def spans(self) -> list[Span]:
        """In order, apart from one another.

        Raises:
            UserError: an answer is not found.
        """
        spans: list[Span] = []
        for index in self.rendering.conversation.learnt:
            for span in self._of_message(index):
                if spans and span.start < spans[-1].end:
                    raise self.rendering.hidden(index)
                if span.start < span.end:
                    spans.append(span)
        return spans

    def _of_message(self, index: int) -> Iterator[Span]:
        rendering = self.rendering
        if index in self.runs.repeated:
            raise rendering.hidden(index)
        runs = self.runs.of_message.get(index)
        if runs is None:
            start, end = self._wordless.place(index)
            yield Span(start, end, end)
            return
        asked = self.runs.of_message.get(index - 1)
        if asked is not None and asked[0].start > runs[0].start:  # what is answered has to stand before the answer
            raise rendering.hidden(index)
        for run in runs:
            start = self._start(run)
            yield Span(start, *self._end(run))

    # ---- where an answer begins --------------------------------------------------------------------------------------

    def _start(self, run: Run) -> int:
        if not run.opens or run.message == 0:
            return run.begin
        header, is_prompt = self._prompt(run) or ("", False)
        start = self._behind(header, run)
        # Without a generation prompt, a header that the template writes before the answer is none of it.
        if start is not None:
            before = self.text[start : run.begin if start <= run.begin else run.start]
            if is_prompt or not before.strip():
                return start
        opened = REASONING_OPENED.search(header) if is_prompt else None
        start = None if opened is None else self._behind(header[: opened.start()], run)
        behind = None if start is None else EMPTY_REASONING.match(self.text, start).end()
        if run.calls:  # perhaps one that the template writes without the reasoning which the prompt opens
            return self._behind_answer_header(run) if behind is None else behind
        if behind is not None and "/" in opened[0] and self.text[behind : run.start].strip():
            return start  # an answer that reasons, where the prompt has closed the reasoning
        tag = "" if opened is None else opened[0].strip()
        return run.begin + len(tag) * self.text.startswith(tag, run.begin)

    def _behind(self, header: str, run: Run) -> int | None:
        """Where the header ends that stands between the words before this run and the run; None where it does not."""
        # A message's last white space and the header's first cannot be told apart, where the template trims texts.
        visible = header.lstrip()
        for position in self._ends(run.previous) if header else ():
            gap = self.text[position : run.start]
            start = position + (len(gap) - len(gap.lstrip()) if visible else 0)
            if self.text.startswith(visible or header, start, run.start):
                return start + len(visible or header)
        return None

    def _behind_answer_header(self, run: Run) -> int:
        """Where a call begins, of which only names and arguments are marked: where a text would, were it no call."""
        position = self._ends(run.previous)[0]
        key = (*self._kind(run), self.text[position : run.start])
        if key not in self._call_starts:
            header = self._answer_header(run.message)
            start = None if header is None else self._behind(header, run) if header else position
            if start is None and header is not None and header.strip():
                start = self._behind(header.rstrip(), run)  # Mistral's texts begin with a space, and its calls do not
            if start is None:
                raise self.rendering.hidden(run.message)
            self._call_starts[key] = start - position
        return position + self._call_starts[key]

    def _answer_header(self, index: int) -> str | None:
        """What the template writes between the last words before a message and an answer of one character there."""
        text = self.rendering.beginning(index, answer=PROBE)
        if text is None or text[0].count(PROBE) != 1:
            return None
        before = text[0].partition(PROBE)[0]
        places = [place for place in text[1] if place.end <= len(before)]
        return before[self._ends(places[-1] if places else None, before)[0] :]

    def _prompt(self, run: Run) -> tuple[str, bool] | None:
        """What stands between the words before an answer and where the model begins to write, and whether it holds a
        generation prompt: of the first answer that follows words and a message of this kind."""
        key = self._kind(run)
        if key not in self._prompts:
            self._prompts[key] = None
            with_prompt = self.rendering.beginning(run.message, generation_prompt=True)
            without = self.rendering.beginning(run.message)
            if with_prompt is not None:
                text, places = with_prompt
                position = self._ends(places[-1] if places else None, text)[0]
                self._prompts[key] = text[position:], without is None or text != without[0]
        return self._prompts[key]

    def _kind(self, run: Run) -> tuple:
        """What decides how the template leads over to an answer: the message and the words before it."""
        messages, words = self.rendering.conversation.messages, self.rendering.words
        asked = messages[run.message - 1]
        before = None if run.previous is None else words[run.previous.number]
        spoke = None if before is None else (messages[before.message]["role"], before.key)
        # Of messages between that have no words, no place tells what the template writes of each.
        silent = [n for n in range(before.message + 1 if before else 0, run.message) if n not in self.runs.of_message]
        return asked["role"], "tool_calls" in asked, spoke, tuple(map(self.runs.said, silent))

    def _ends(self, place: Place | None, text: str | None = None) -> list[int]:
        """Where the words end: with what the message has after them, if that is there, and without."""
        if place is None:
            return [0]
        text, after = self.text if text is None else text, self.rendering.words[place.number].after
        forms = [form for kept in (after, after.rstrip()) for form in (kept, json.dumps(kept)[1:-1])]  # GPT-OSS: JSON
        return [place.end + len(form) for form in forms if text.startswith(form, place.end)] + [place.end]

    # ---- where it ends -----------------------------------------------------------------------------------------------

    def _end(self, run: Run) -> tuple[int, int]:
        """Where what the message says ends, and where its turn does."""
        text, following = self.text, run.following
        limit = len(text) if following is None else following.start
        if run.closes and following is None and run.message == len(self.rendering.messages) - 1:
            length, exact = limit - run.end, True
        else:
            length, exact = self._tail(run, limit)
            limit = self._begins_at(following, limit)
            length = max(min(length, limit - run.end), 0)
        tail = text[run.end : run.end + length].rstrip()
        if not tail and run.start == run.end and following is None:  # an answer of white space, and nothing behind it
            tail = text[run.end : run.end + len(self.rendering.words[run.last_words].after)]
        end = run.end + len(tail)
        content_end = end if exact else run.end
        if self.eos and text.startswith(self.eos, end):  # of templates that end a turn where the next one begins
            end += len(self.eos)
        elif not tail or not run.closes or (self.runs.is_call(run.last_words) and self.unended()):
            gap = text[end:limit]
            mark = self.special.match(text, end + len(gap) - len(gap.lstrip()), limit)
            if mark is not None and mark[0] != self.bos:
                end = mark.end()
        return content_end, end

    def _begins_at(self, following: Place | None, limit: int) -> int:
        """Where the next words' turn begins, if that is another answer: neither what the model writes for it nor the
        generation prompt before it ends this one."""
        run = self.runs.first.get(following)
        if run is None or not run.opens or self.runs.role(following) != "assistant":
            return limit
        start, prompt = self._start(run), self._generation_prompt()
        return start - len(prompt) * (self.text.endswith(prompt, 0, start) and not self.unended())

    def _generation_prompt(self) -> str:
        """What the generation prompt adds to the first message of a user."""
        users = [n for n, message in enumerate(self.rendering.messages) if message["role"] == "user"]
        if not users:
            return ""
        without = self.rendering.beginning(users[0] + 1)
        prompt = self.rendering.beginning(users[0] + 1, generation_prompt=True)
        added = prompt is not None and without is not None and prompt[0].startswith(without[0])
        return prompt[0][len(without[0]) :] if added else ""

    def _tail(self, run: Run, limit: int) -> tuple[int, bool]:
        """Characters behind the words that belong to the message, and whether they are written alike when nothing
        follows it. `limit`: where the words of the next message begin."""
        words, text, following = self.rendering.words, self.text, run.following
        role = None if following is None else self.runs.role(following)
        key = ("tool_calls" in self.rendering.conversation.messages[run.message], run.closes, role)
        begin = limit if following is None else begin_with_space(words[following.number].before, limit, text)
        for pieces, exact in self._headers.setdefault(key, []):
            for end in (begin, limit):
                header = self.runs.header(pieces, run.end, end)
                if header is not None and text.endswith(header, run.end, end):
                    return end - len(header) - run.end, exact
        gap = text[run.end : begin]
        alone = self._written_alone(run)
        exact = gap.startswith(alone)
        length = len(alone) if exact else self._common(gap, alone)
        self._headers[key].append((self.runs.pieces(run.end + length, begin), exact))
        return length, exact

    def _written_alone(self, run: Run) -> str:
        """What the template writes behind the words when no message follows."""
        beginning = self.rendering.beginning(run.message + 1)
        if beginning is None:
            raise self.rendering.hidden(run.message)
        text, places = beginning
        at = next((n for n, place in enumerate(places) if place.number == run.last_words), None)
        if at is None:
            raise self.rendering.hidden(run.message)
        known = {place.number for place in places[: at + 1]}  # a call's name may be written twice
        other = next((place for place in places[at + 1 :] if place.number not in known), None)
        return text[places[at].end : len(text) if other is None else other.start]

    def _common(self, gap: str, alone: str) -> int:
        """The beginning of `gap` that is written whether or not messages follow; whole special tokens only."""
        common = _common_marks(gap, alone, self.special)
        if not gap[:common].strip() and self.special.match(alone.lstrip()):
            # The last turn ends in a marker of its own (gpt-oss): then so do the others.
            first = self.special.match(gap, len(gap) - len(gap.lstrip()))
            common = first.end() if first else common
        return common


def ends_by_next_turn(rendering: Rendering, special: re.Pattern[str]) -> bool:
    """Whether a template writes nothing behind the answer of (question, answer, question) but the next turn's mark.

    Such a mark is another one than stands behind a question; an end of all turns is the same.
    """
    alone = rendering.beginning(2)
    ends = {rendering.words[place.number].message: place.end for place in rendering.places}
    if alone is None or not {0, 1} <= ends.keys() or len(alone[1]) != 2:
        return False
    gap = rendering.text[ends[1] :]
    marks = [special.search(rendering.text, ends[message]) for message in (0, 1)]
    if gap[: _common_marks(gap, alone[0][alone[1][1].end :], special)].strip() or None in marks:
        return False
    return marks[0][0] != marks[1][0]


def _common_marks(a: str, b: str, special: re.Pattern[str]) -> int:
    """The length of the beginning that both share, without a part of a special token."""
    common = common_prefix(a, b)
    for token in special.finditer(a):
        if token.start() < common < token.end():  # two markers that begin alike
            common = token.start()
    return common
