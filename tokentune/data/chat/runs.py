"""The words of a rendering by the messages that they are of, in the order in which the template writes them."""

from bisect import bisect_left
from itertools import groupby
from typing import NamedTuple

from tokentune.data.chat.marks import CALL_ARGUMENTS, CALL_NAME, Place
from tokentune.data.chat.rendering import Rendering


class Run(NamedTuple):
    """Words of one message with no other message's between them.

    Attributes:
        message: its index.
        begin: first character, white space of the message included.
        start, end: its words.
        previous, following: the places before and behind them, of other messages; None at an end of the rendering.
        last_words: number of the last ones.
        opens, closes: the message's first and last run.
        calls: the first words are those of a call.
    """

    message: int
    begin: int
    start: int
    end: int
    previous: Place | None
    following: Place | None
    last_words: int
    opens: bool
    closes: bool
    calls: bool


class Runs:
    """All runs of a rendering.

    Attributes:
        of_message: its runs, by its index; messages without words have none.
        first: the run that begins with this place.
        repeated: messages of the assistant whose text stands in the rendering twice.
        again: places where words of the assistant come again.
    """

    def __init__(self, rendering: Rendering) -> None:
        self.rendering = rendering
        self.repeated: set[int] = set()
        self.again: list[Place] = []
        self._with_words = {words.message for words in rendering.words}
        self.of_message: dict[int, list[Run]] = {}
        self.first: dict[Place | None, Run] = {}
        for place, run in self._all_runs():
            self.first[place] = run
            self.of_message.setdefault(run.message, []).append(run)

    def is_call(self, number: int) -> bool:
        return self.rendering.words[number].key in (CALL_NAME, CALL_ARGUMENTS)

    def role(self, place: Place) -> str:
        return self.rendering.conversation.messages[self.rendering.words[place.number].message]["role"]

    def said(self, index: int) -> tuple[str, str | None, str]:
        """Of a message without a place: its text where that could be written, None where the template leaves it out."""
        message = self.rendering.conversation.messages[index]
        left_out = index in self._with_words
        return message["role"], None if left_out else message["content"], str(message.get("name"))

    def names(self, start: int, end: int) -> list[Place]:
        """The places of words that come again: the name of the call in its result's header."""
        begun, ended = (bisect_left(self.again, position, key=lambda place: place.start) for position in (start, end))
        return self.again[begun:ended]

    def pieces(self, start: int, end: int) -> list[str]:
        """The text without the words that come again, cut there."""
        pieces = []
        for place in self.names(start, end):
            pieces.append(self.rendering.text[start : place.start])
            start = place.end
        return [*pieces, self.rendering.text[start:end]]

    def header(self, pieces: list[str], start: int, end: int) -> str | None:
        """The pieces with the last words that come again in this part of the rendering between them; None where too few
        do."""
        names = self.names(start, end)
        fewer = len(names) - (len(pieces) - 1)
        if fewer < 0:
            return None
        filled = [self.rendering.text[place.start : place.end] for place in names[fewer:]]
        return pieces[0] + "".join(name + piece for name, piece in zip(filled, pieces[1:], strict=True))

    def _all_runs(self) -> list[tuple[Place, Run]]:
        words, text = self.rendering.words, self.rendering.text
        places, seen, preceding, before = [], set(), {}, None
        for place in self.rendering.places:
            preceding[place], before = before, place
            message, key = words[place.number].message, words[place.number].key
            if place.number in seen and self.rendering.conversation.messages[message]["role"] == "assistant":
                # A call's name may come again in its result's header; an answer that comes twice has no one place.
                self.repeated |= {message} if key == "content" else set()
                self.again.append(place)
                continue
            seen.add(place.number)
            places.append(place)
        grouped = [list(group) for _, group in groupby(places, key=lambda place: words[place.number].message)]
        of_message = [words[group[0].number].message for group in grouped]
        first = {message: n for n, message in reversed(list(enumerate(of_message)))}
        last = {message: n for n, message in enumerate(of_message)}
        return [
            (
                group[0],
                Run(
                    message=message,
                    begin=begin_with_space(words[group[0].number].before, group[0].start, text),
                    start=group[0].start,
                    end=group[-1].end,
                    previous=preceding[group[0]],
                    following=grouped[n + 1][0] if n + 1 < len(grouped) else None,
                    last_words=group[-1].number,
                    opens=first[message] == n,
                    closes=last[message] == n,
                    calls=self.is_call(group[0].number),
                ),
            )
            for n, (message, group) in enumerate(zip(of_message, grouped, strict=True))
        ]


def begin_with_space(before: str, start: int, text: str) -> int:
    """Where words begin that have this white space before them, if it stands in the rendering."""
    return start - len(before) if text.endswith(before, 0, start) else start
