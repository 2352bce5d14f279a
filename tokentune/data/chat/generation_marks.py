"""The answers as a template marks them itself, by `{% generation %}`, and whether those marks can be used."""

from tokentune.data.chat.marks import CALL_NAME, SPEAKER
from tokentune.data.chat.rendering import Rendering, last_words
from tokentune.data.chat.spans import Span


def generation_spans(rendering: Rendering) -> tuple[list[Span] | None, tuple[int, str] | None]:
    """What the template marks by `{% generation %}`; None where that cannot be used, with a message's index and what is
    wrong with the marks there, or None where only some answers are learnt and which marks are theirs is not told."""
    messages, learnt = rendering.conversation.messages, rendering.conversation.learnt
    ranges = sorted((start, end) for start, end in rendering.generation or () if start < end)
    for place in rendering.places:
        message, key = rendering.words[place.number].message, rendering.words[place.number].key
        if messages[message]["role"] == "assistant" or key == SPEAKER:
            continue
        if any(start <= place.start < end for start, end in ranges):
            return None, (message, "within")
    assistants = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if list(learnt) != assistants:
        if len(ranges) != len(assistants):
            return None, None
        for index, (start, end) in zip(assistants, ranges, strict=True):
            spoken = {rendering.words[p.number].message for p in rendering.places if start <= p.start < end}
            if spoken - {index}:  # one answer has several marks, another none
                return None, None
        ranges = [ranges[assistants.index(i)] for i in learnt]
    first = {place.number: place.start for place in reversed(rendering.places)}
    for number, start in first.items():
        message, key = rendering.words[number].message, rendering.words[number].key
        if key == CALL_NAME and message in learnt and not any(begin <= start < end for begin, end in ranges):
            return None, (message, "not within")
    marked = "\0".join(rendering.text[start:end] for start, end in ranges)
    position = 0
    for index in learnt:
        words = last_words(messages[index])
        position = marked.find(words, position)
        if position < 0:
            return None, (index, "not within")
        position += len(words)
    return [Span(start, end, end) for start, end in ranges], None
