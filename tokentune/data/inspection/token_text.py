"""Token ids as text that a person can look at, token by token.

A token alone is often no text: SentencePiece's lose their leading space, and a character outside of the vocabulary is
spelt by several tokens of a byte each. Each token is therefore decoded behind the ones before it, and tokens that only
together spell a character stay together.
"""

import unicodedata
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what decoders write for bytes that are no character yet
LONGEST = 8  # tokens that may spell a character together; beyond it the text holds U+FFFD itself, or no UTF-8
NEWLINE, TAB = "⏎\n", "⇥   "


def spelled(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, int]]:
    """The text of the tokens in groups of (text, number of tokens), one token each wherever that spells something."""

    def decode(first: int, last: int) -> str:
        return tokenizer.decode(ids[first:last], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    groups: list[tuple[str, int]] = []
    context, done = 0, 0  # ids[context:done] are spelt already, and stand before the next ones for their spaces' sake
    for last in range(1, len(ids) + 1):
        before, text = decode(context, done), decode(context, last)
        if text.endswith(UNFINISHED) and last - done < LONGEST and last < len(ids):
            continue
        groups.append((text[len(before) :], last - done))
        context, done = done, last
    return groups


def visible(text: str) -> str:
    """The same text with line breaks and tabs shown, and without characters that a terminal would act on."""
    return "".join(_visible_character(character) for character in text)


def _visible_character(character: str) -> str:
    if character == "\n":
        return NEWLINE
    if character == "\t":
        return TAB
    if ord(character) < 0x20:
        return chr(0x2400 + ord(character))  # Unicode's pictures of control characters
    # Further controls, what turns the direction of writing, lone surrogates; joiners of emoji (Cf too) do no harm.
    dangerous = unicodedata.category(character) in ("Cc", "Cs") or "\u202a" <= character <= "\u202e"
    if dangerous or "\u2066" <= character <= "\u2069" or character in "\u2028\u2029":
        return f"<U+{ord(character):04X}>"
    return character
