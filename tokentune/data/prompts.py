"""From a record (instruction, input, output) to token ids and labels.

Prompt and answer are tokenized as one text, and the character where the answer begins tells which tokens carry loss.
Tokenizing the prompt alone and counting would be wrong wherever its last token also holds the answer's beginning.

`alpaca_template.json` holds the prompt of Stanford Alpaca (Taori et al., 2023,
https://github.com/tatsu-lab/stanford_alpaca, Apache-2.0), verbatim but for the line break after "Response:", which
Alpaca-LoRA and Platypus added.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tokentune.data.encoding import TokenRow, trimmed_offsets
from tokentune.data.formats.json_files import parse_json
from tokentune.errors import UserError
from tokentune.sampling.sampler import IGNORED_LABEL
from tokentune.sources import first_line

DEFAULT_TEMPLATE = Path(__file__).resolve().parents[1] / "alpaca_template.json"


@dataclass(frozen=True)
class PromptTemplate:
    """The text around an instruction: with an input, without one, and the line after which the answer begins."""

    prompt_input: str
    prompt_no_input: str
    response_split: str

    @classmethod
    def load(cls, path: str | Path) -> "PromptTemplate":
        """Reads a template; keys beside the three are ignored.

        Raises:
            UserError: no such file, not JSON, a key missing or not text, a place for the texts missing.
        """
        try:
            content = parse_json(Path(path).expanduser().read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise UserError(f"prompt template {path}: cannot be read: {error.strerror}.") from error
        except json.JSONDecodeError as error:
            raise UserError(f"prompt template {path}, line {error.lineno}: not valid JSON: {error.msg}.") from error
        except UnicodeDecodeError as error:
            raise UserError(f"prompt template {path}: not UTF-8 text (byte {error.start}).") from error
        except ValueError as error:  # a key twice
            raise UserError(f"prompt template {path}: {first_line(error)}.") from error
        if not isinstance(content, dict):
            raise UserError(f"prompt template {path}: expected a JSON object.")
        places = {
            "prompt_input": ("{instruction}", "{input}"),
            "prompt_no_input": ("{instruction}",),
            "response_split": (),
        }
        for key, needed in places.items():
            if not isinstance(content.get(key), str):
                raise UserError(f"prompt template {path}: needs the key {key!r} with a text; see alpaca_template.json.")
            for place in needed:
                if place not in content[key]:
                    raise UserError(f"prompt template {path}: {key!r} has no {place} in it.")
        return cls(**{key: content[key] for key in places})

    def prompt(self, instruction: str, input: str | None) -> str:
        """The text before the answer. The texts are put in as they are: braces in them mean nothing."""
        texts = {"{instruction}": instruction, "{input}": input or ""}
        template = self.prompt_input if input else self.prompt_no_input
        # One pass, not two replacements: an instruction may itself speak of "{input}".
        return re.sub(r"\{instruction\}|\{input\}", lambda place: texts[place[0]], template)


def encode_answers(
    texts: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, *, add_eos_token: bool
) -> list[TokenRow]:
    """Prompts with their answers, each tokenized as one text, and all together.

    Args:
        add_eos_token: ends the answers with the tokenizer's EOS, unless they end so already.

    Returns:
        Uncut rows. Labels are -100 for the prompt's tokens and the first token of all, which nothing predicts. A token
        that holds the end of the prompt and the beginning of the answer is supervised.

    Raises:
        UserError: the tokenizer has no EOS to add, or can tell neither offsets nor the text that it encoded.
    """
    if getattr(tokenizer, "is_fast", False):
        found = _encode_fast(texts, tokenizer)
    else:
        found = (_encode_slow(prompt, answer, tokenizer) for prompt, answer in texts)
    return [_finished(ids, start, tokenizer, add_eos_token) for ids, start in found]


def _finished(ids: list[int], start: int, tokenizer: PreTrainedTokenizerBase, add_eos: bool) -> TokenRow:
    """A row of uncut ids, of which `start` is the first that holds a part of the answer (or is its EOS)."""
    # A template that spells the BOS out, with a tokenizer that adds one: keep one.
    while len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids, start = ids[1:], max(start - 1, 0)
    if add_eos:
        eos = tokenizer.eos_token_id
        if eos is None:
            raise UserError("--add_eos_token: this tokenizer has no end-of-sequence token. Leave the flag out.")
        if ids[-1:] != [eos]:
            ids = [*ids, eos]
        start = min(start, len(ids) - 1)  # an empty answer still has its EOS to learn
    start = min(max(start, 1), len(ids))
    return TokenRow(ids, [IGNORED_LABEL] * start + ids[start:])


def _encode_fast(
    texts: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], int]]:
    """Of each text its uncut ids, and the index of the first token that holds a part of the answer."""
    whole = [prompt + answer for prompt, answer in texts]
    encoded = tokenizer(whole, return_offsets_mapping=True, truncation=False, verbose=False)
    columns = (encoded["input_ids"], encoded["offset_mapping"])
    for (prompt, _), text, ids, offsets in zip(texts, whole, *columns, strict=True):
        # Special tokens that the tokenizer adds have the offsets (0, 0). Every byte of a character that is split into
        # several tokens has the offsets of the whole character.
        ends = (end for _, end in trimmed_offsets(tokenizer, text, ids, offsets))
        yield list(ids), next((index for index, end in enumerate(ends) if end > len(prompt)), len(ids))


def _encode_slow(prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """For tokenizers in pure Python, which know no offsets: they are recovered from what the tokens spell."""
    text = prompt + answer
    body = list(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])
    ids = tokenizer.build_inputs_with_special_tokens(body)
    before = next(n for n in range(len(ids) - len(body) + 1) if ids[n : n + len(body)] == body)  # special tokens
    if hasattr(tokenizer, "sp_model"):
        start = _first_piece_beyond(prompt, text, tokenizer.convert_ids_to_tokens(body))
    else:
        start = _first_token_beyond(prompt, text, body, tokenizer)
    return ids, before + start if start < len(body) else len(ids)


def _first_piece_beyond(prompt: str, text: str, pieces: list[str]) -> int:
    """Index of the first SentencePiece piece that holds a byte of `text` beyond `prompt`; their number if none does."""
    # Byte fallback is written <0xF0>; a text that reads so is never one piece.
    is_byte = re.compile("<0x[0-9A-F]{2}>").fullmatch
    spelled = [bytes([int(p[3:5], 16)]) if is_byte(p) else p.replace("▁", " ").encode() for p in pieces]
    whole, expected = b"".join(spelled), text.encode()
    _check_spelling(whole.lstrip(b" ") == expected.lstrip(b" "), text)
    end = len(prompt.encode()) + len(whole) - len(expected)  # the pieces may begin with a space more
    ends = accumulate(map(len, spelled))
    return next((index for index, piece_end in enumerate(ends) if piece_end > end), len(pieces))


def _first_token_beyond(prompt: str, text: str, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Index of the first token that holds a character of `text` beyond `prompt`, found by decoding."""

    def decode(n: int) -> str:
        return tokenizer.decode(ids[:n], clean_up_tokenization_spaces=False)

    whole = decode(len(ids))
    _check_spelling(whole.lstrip() == text.lstrip(), text)
    end = max(0, len(prompt) + len(whole) - len(text))  # decoders may drop leading spaces
    # The fewest tokens that spell the whole prompt. Of unfinished characters decoders show nothing, or U+FFFD.
    count = bisect_left(range(len(ids) + 1), end, key=lambda n: common_prefix(decode(n), whole))
    return count - 1 if len(decode(count)) > end else count  # the last of them spells a part of the answer too


def _check_spelling(same: bool, text: str) -> None:
    if not same:
        raise UserError(
            "this tokenizer tells no character offsets and its tokens do not spell the text, so the answer's first "
            f"token cannot be found (text: {text[:60]!r}). Use a fast tokenizer (one with a tokenizer.json)."
        )


def common_prefix(a: str, b: str) -> int:
    """The number of characters in which both begin alike."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase, model_vocab_size: int | None) -> int:
    """Gives the tokenizer a pad token that the model has an embedding for: its own, else unk, else EOS.

    Sharing an id with EOS does no harm here: padding is told by length, never by id, and its labels are -100.

    Args:
        model_vocab_size: rows of the model's embedding; None when unknown.

    Returns:
        The pad token's id.

    Raises:
        UserError: the tokenizer has none of the three within the model's vocabulary.
    """
    for token in (tokenizer.pad_token, tokenizer.unk_token, tokenizer.eos_token):
        if token is None:
            continue
        token_id = tokenizer.convert_tokens_to_ids(token)
        if token_id is not None and (model_vocab_size is None or token_id < model_vocab_size):
            tokenizer.pad_token = token
            return token_id
    raise UserError(
        "the tokenizer has no pad, unknown or end-of-sequence token within the model's vocabulary "
        f"({model_vocab_size} tokens). Give it a pad token (pad_token in its tokenizer_config.json)."
    )
