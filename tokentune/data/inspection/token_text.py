"""Token ids as readable text, token by token.

A token alone is often no text: those of SentencePiece lose their leading space, and a character outside of the
vocabulary takes several tokens of a byte each. So each token is decoded together with the ones before it, and tokens
that only together make a character stay together.
"""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what decoders write for bytes that are no character yet
LONGEST = 8  # tokens that may make a character together; of more, the text holds U+FFFD itself, or no UTF-8
# Controls, what changes the direction of writing, lone surrogates. The joiners of emoji do no harm.
DANGEROUS = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")
SHOWN = {chr(code): chr(0x2400 + code) for code in range(0x20)} | {"\n": "⏎\n", "\t": "⇥   "}  # Unicode's pictures


def spelled(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, int]]:
    """The text of the tokens in groups of (text, number of tokens), one token each wherever that spells something."""

    def decode(first: int, last: int) -> str:
        return tokenizer.decode(ids[first:last], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    groups: list[tuple[str, int]] = []
    context, done = 0, 0  # ids[context:done] are in a group already; the next ones need them to keep their spaces
    for last in range(1, len(ids) + 1):
        before, text = decode(context, done), decode(context, last)
        if text.endswith(UNFINISHED) and last - done < LONGEST and last < len(ids):
            continue
        groups.append((text[len(before) :], last - done))
        context, done = done, last
    return groups


def visible(text: str) -> str:
    """The same text with line breaks and tabs shown, and without characters that a terminal would act on."""
    return DANGEROUS.sub(lambda found: SHOWN.get(found[0], f"<U+{ord(found[0]):04X}>"), text)
