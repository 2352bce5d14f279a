"""Messages of which no words are marked: they have none, or marks change what the template writes.

Such a message is found by rendering the conversation up to it. Where the same messages stand between words of the same
kind, and the template writes the same text for them, the place in that text is the same: it is found once.
"""

from tokentune.data.chat.rendering import last_words
from tokentune.data.chat.runs import Runs

PROBE = "\ue000"  # an answer of one private-use character


class WordlessMessages:
    """Finds the places of messages without words."""

    def __init__(self, runs: Runs) -> None:
        self.runs, self.text = runs, runs.rendering.text
        self._known: dict[tuple, tuple[int, int]] = {}

    def place(self, index: int) -> tuple[int, int]:
        """Where it begins and ends, end-of-turn mark included.

        Raises:
            UserError: that cannot be told.
        """
        around = self._around(index)
        if around is None:
            return self._measured(index)
        position, key = around
        if key not in self._known:
            start, end = self._measured(index)
            self._known[key] = start - position, end - position
        start, end = self._known[key]
        return position + start, position + end

    def _around(self, index: int) -> tuple[int, tuple] | None:
        """Where the words before a message end; and what decides its place behind them, equal for equal stretches of
        messages without words. None where words do not stand before and behind it in this order."""
        messages = self.runs.rendering.conversation.messages
        first, last = index, index + 1
        while first > 0 and first - 1 not in self.runs.of_message:
            first -= 1
        while last < len(messages) and last not in self.runs.of_message:
            last += 1
        if first == 0 or last == len(messages):
            return None
        begin, end = self.runs.of_message[first - 1][-1].end, self.runs.of_message[last][0].start
        if begin > end:
            return None
        ends = [(messages[n]["role"], "tool_calls" in messages[n]) for n in (first - 1, last)]
        # What white space is written of them stands in the text itself.
        said = [(role, text and text.strip(), name) for role, text, name in map(self.runs.said, range(first, last))]
        return begin, (index - first, messages[index]["content"].strip(), self.text[begin:end], *ends, *said)

    def _measured(self, index: int) -> tuple[int, int]:
        """Where a message begins and ends, by the conversation up to it."""
        rendering, text = self.runs.rendering, self.text
        before = rendering.beginning(index) if index else None
        prompt = rendering.beginning(index, generation_prompt=True) if index else None
        if prompt is not None and before is not None and prompt[0] == before[0]:
            # No generation prompt: an answer of one character tells where the header ends.
            probe = rendering.beginning(index, answer=PROBE)
            prompt = None if probe is None or probe[0].count(PROBE) != 1 else probe[0].partition(PROBE)
        until = rendering.beginning(index + 1)
        if prompt is None or until is None or not text.startswith(prompt[0]) or not text.startswith(until[0]):
            raise rendering.hidden(index)
        start, end = len(prompt[0]), len(until[0].rstrip())
        if start > end or last_words(rendering.conversation.messages[index]) not in text[start:end]:
            raise rendering.hidden(index)
        return start, end
