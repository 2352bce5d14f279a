"""Chat templates that are given by a name or a file, and the one that is saved with a trained model.

Every run saves the prompt that it trained with as its tokenizer's chat template, also where rows were instructions, so
that `pipeline("text-generation")` and `tokentune chat` prompt the model as in training.
"""

import json
import logging
import re
from pathlib import Path

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from tokentune.data.prompts import PromptTemplate, encode_answers
from tokentune.errors import UserError
from tokentune.sources import first_line

logger = logging.getLogger(__name__)

FLAG = "--chat_template"
NAMED = {path.stem: path for path in sorted((Path(__file__).parent / "named").glob("*.jinja"))}
MARKER = re.compile(r"<\|?\w+\|?>")  # of a turn, in the named templates: one token each
BOS, NOTHING = "{{- bos_token }}\n", '""'
OWN = "base"  # the name under which the base's chat template is kept beside another
AS_IT_IS = PromptTemplate("{instruction}{input}", "{instruction}", "")  # a prompt that the rows bring along
# In front of a template: what --system_in_user made of the rows.
SYSTEM_IN_USER = """\
{%- if messages | length > 1 and messages[0].role == 'system' %}
{%- set asked = {'role': 'user', 'content': messages[0].content ~ '\\n\\n' ~ messages[1].content} %}
{%- set messages = [asked] + messages[2:] %}
{%- endif %}
"""

# A system message is the instruction, to which each message of the user is an input.
_INSTRUCTIONS = """\
{{{{- {start} }}}}
{{%- set instruction, turns = '', messages %}}
{{%- if messages[0].role == 'system' %}}
{{%- set instruction, turns = messages[0].content, messages[1:] %}}
{{%- endif %}}
{{%- for message in turns %}}
{{%- if message.role == 'user' and instruction %}}
{{{{- {prompt_input} }}}}
{{%- elif message.role == 'user' %}}
{{{{- {prompt_no_input} }}}}
{{%- elif message.role == 'assistant' %}}
{{{{- message.content ~ eos_token }}}}
{{%- else %}}
{{{{- raise_exception('a role other than system (at the beginning), user and assistant') }}}}
{{%- endif %}}
{{%- endfor %}}
"""


def load_chat_template(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a named template, or of a Jinja file.

    Raises:
        UserError: no such name or file, it cannot be read, is no template, or never looks at the messages; the
            tokenizer lacks tokens of a named template.
    """
    if name in NAMED:
        if missing := _lacking(name, tokenizer):
            raise UserError(
                f"{FLAG} {name}: this tokenizer has no token {', '.join(missing)}, so that the ends of turns would be "
                f"ordinary text, at which nothing stops. {fitting(tokenizer)}"
            )
        template = NAMED[name].read_text(encoding="utf-8")
        return template.replace(BOS, "") if _start(tokenizer) == NOTHING else template
    path = Path(name).expanduser()
    try:
        template = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        named = "" if path.exists() else f" Nor is it one of the names {', '.join(NAMED)}."
        raise UserError(f"{FLAG} {name}: cannot be read: {error.strerror}.{named}") from error
    except (UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{FLAG} {name}: not UTF-8 text.") from error
    if "messages" not in template:
        raise UserError(f"{FLAG} {name}: never mentions `messages`, so all conversations would look alike.")
    try:
        render_jinja_template([[{"role": "user", "content": ""}]], chat_template=template)
    except TemplateSyntaxError as error:
        raise UserError(f"{FLAG} {name}, line {error.lineno}: not valid Jinja: {first_line(error)}") from error
    except Exception:  # what it makes of a real conversation is another matter
        logger.debug("a template that does not take one empty message", exc_info=True)
    return template


def fitting(tokenizer: PreTrainedTokenizerBase) -> str:
    """What to give as a chat template for this tokenizer, as a sentence."""
    names = ", ".join(name for name in NAMED if not _lacking(name, tokenizer))
    return f"Give one with {FLAG}: {' or '.join(filter(None, (names, 'a Jinja file')))}."


def _lacking(name: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens of a named template that the tokenizer does not have."""
    template, vocabulary = NAMED[name].read_text(encoding="utf-8"), tokenizer.get_vocab()
    missing = [marker for marker in dict.fromkeys(MARKER.findall(template)) if marker not in vocabulary]
    return missing + ["for the end (eos_token)"] * ("eos_token" in template and tokenizer.eos_token is None)


def beside_own(template: str | dict | None, own: str | dict | None) -> str | dict[str, str] | None:
    """What is saved: the template that was trained with, and under a name the base's own where that is another."""
    of_base = own.get("default") if isinstance(own, dict) else own
    if own is None or template in (own, of_base):
        return own or template
    logger.info("the prompt of this training is saved as the chat template, and the base's own beside it as %r", OWN)
    return {"default": template, OWN: of_base}


def prompt_as_chat_template(prompt: PromptTemplate, tokenizer: PreTrainedTokenizerBase) -> str:
    """A chat template that writes for a message of the user what instructions were put into, to the last token.

    Tokenizers put a space in front of a text's first word, but not in front of one that follows a BOS which is spelled
    out: there the template writes the space.
    """
    asked, start = "Say x.", _start(tokenizer)
    texts = {
        "prompt_input": _expression(prompt.prompt_input, "instruction", "message.content"),
        "prompt_no_input": _expression(prompt.prompt_no_input, "message.content", NOTHING),
    }
    (trained,) = encode_answers([(prompt.prompt(asked, None), "")], tokenizer, add_eos_token=False)
    for beginning in (start, f"{start} ~ ' '", NOTHING):  # the last: a prompt that spells the BOS out
        template = _INSTRUCTIONS.format(start=beginning, **texts)
        text = render_jinja_template(
            [[{"role": "user", "content": asked}]], chat_template=template, **tokenizer.special_tokens_map
        )[0][0]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if trained.ids[: len(ids)] == ids and {*trained.ids[len(ids) :]} <= {tokenizer.eos_token_id}:
            return template
    logger.warning("the chat template that is saved gives a prompt whose tokens differ from those of the training")
    return template


def _expression(text: str, instruction: str, input: str) -> str:
    """A prompt's text as an expression of Jinja, with these expressions in its places."""
    places = {"{instruction}": instruction, "{input}": input}
    parts = re.split(r"(\{instruction\}|\{input\})", text)
    return " ~ ".join(places.get(part) or json.dumps(part, ensure_ascii=False) for part in parts)


def _start(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokens that the tokenizer puts in front of a text, as an expression of Jinja."""
    whole, body = (tokenizer("x", add_special_tokens=special)["input_ids"] for special in (True, False))
    first = next((n for n in range(len(whole)) if whole[n : n + len(body)] == body), 0)
    if whole[:first] == [tokenizer.bos_token_id]:
        return "bos_token"
    return json.dumps("".join(tokenizer.convert_ids_to_tokens(whole[:first])), ensure_ascii=False)
