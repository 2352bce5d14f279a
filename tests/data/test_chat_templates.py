"""What of a conversation is learnt: hand-written expectations for public styles of templates, marked and unmarked."""

from itertools import pairwise
from pathlib import Path

import pytest
from chat_tokenizers import CHATML, LLAMA_3, MISTRAL, STYLES, TOOLS, chat_tokenizer, learnt_texts, without_marks
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tokentune.data.chat.templates import ChatEncoder
from tokentune.data.formats.conversations import Conversation, openai_conversation
from tokentune.errors import UserError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hi. You ok?"},
    {"role": "user", "content": "ok yes"},
    {"role": "assistant", "content": "yes ok. "},
]
EXPECTED = {
    "chatml": ["Hi. You ok?<|im_end|>", "yes ok. <|im_end|>"],
    "llama-3": ["Hi. You ok?<|eot_id|>", "yes ok.<|eot_id|>"],
    "mistral": [" Hi. You ok?</s>", " yes ok. </s>"],
}


SPECIAL_OF_FAMILIES = ["<|return|>", "<|start|>", "<|channel|>", "<|message|>", "<|eot|>", "<turn|>", "<end_of_turn>"]


def conversation(messages: list[dict], **options: object) -> Conversation:
    return openai_conversation(messages, options.pop("tools", None), "row 1", **options)


def learnt(template: str, messages: list[dict], *, eos: str = "</s>", add_eos_token: bool = False) -> list[str]:
    tokenizer = chat_tokenizer(template, eos=eos)
    row = ChatEncoder(tokenizer, add_eos_token=add_eos_token)(conversation(messages), "row 1")
    return learnt_texts(tokenizer, row.ids, row.labels)


def noted(template: str, messages: list[dict]) -> str:
    """What is said of the conversation, a line each."""
    encode = ChatEncoder(chat_tokenizer(template))
    encode(conversation(messages), "row 1")
    return "\n".join(f"{where}: {sentence}" for sentence, (_, where, _) in encode.notes.found.items())


def refused(template: str, messages: list[dict]) -> str:
    with pytest.raises(UserError) as error:
        learnt(template, messages)
    return str(error.value)


@pytest.mark.parametrize("marks", [True, False])
@pytest.mark.parametrize("style", STYLES)
def test_answers_and_their_end_are_learnt(style: str, marks: bool) -> None:
    template = STYLES[style] if marks else without_marks(STYLES[style])
    assert learnt(template, CHAT) == EXPECTED[style]
    assert learnt(template, CHAT[1:]) == EXPECTED[style]  # without a system prompt
    assert learnt(template, CHAT[:4]) == EXPECTED[style][:1]  # the user has the last word


@pytest.mark.parametrize("style", STYLES)
def test_marked_and_unmarked_give_the_same_row(style: str) -> None:
    rows = []
    for template in (STYLES[style], without_marks(STYLES[style])):
        rows.append(ChatEncoder(chat_tokenizer(template))(conversation(CHAT), "row 1"))
    assert rows[0] == rows[1]


TEXTS = st.text("ab ok.yHi\n😀é<|[]s>/INSTuserassistant\ue000", min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@example(texts=["<", "<H><"], style="mistral")  # a tag at the answer's beginning is no part of the header
@given(texts=st.lists(TEXTS.filter(str.strip), min_size=2, max_size=6), style=st.sampled_from(list(STYLES)))
def test_any_text(texts: list[str], style: str) -> None:
    """With and without marks alike, whatever the texts: parts of markers, of headers, and repetitions included."""
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    rows = []
    for template in (STYLES[style], without_marks(STYLES[style])):
        rows.append(ChatEncoder(chat_tokenizer(template))(conversation(messages), "row 1"))
    assert rows[0] == rows[1]


def test_the_row_is_what_inference_writes() -> None:
    """The prompt's tokens, with the generation prompt, and then the first learnt token; one BOS."""
    for style in STYLES.values():
        tokenizer = chat_tokenizer(without_marks(style))
        row = ChatEncoder(tokenizer)(conversation(CHAT), "row 1")
        whole = tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
        assert row.ids == whole
        prompt = tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
        first = next(i for i, label in enumerate(row.labels) if label != -100)
        assert row.ids[:first] == prompt[:first] and len(prompt) - first <= 1
        assert row.ids.count(tokenizer.bos_token_id) == ("bos_token" in style)


def test_only_the_completion_or_weighted_messages_are_learnt() -> None:
    for template in (CHATML, without_marks(CHATML)):
        tokenizer = chat_tokenizer(template)
        encode = ChatEncoder(tokenizer)
        row = encode(conversation(CHAT, learn_from=3), "row 1")
        assert learnt_texts(tokenizer, row.ids, row.labels) == EXPECTED["chatml"][1:]
        chat = [*CHAT[:4], CHAT[4] | {"weight": 0}]
        row = encode(conversation(chat), "row 1")
        assert learnt_texts(tokenizer, row.ids, row.labels) == EXPECTED["chatml"][:1]


def test_the_assistant_begins() -> None:
    messages = [{"role": "assistant", "content": "Hi."}, {"role": "user", "content": "ok"}]
    assert learnt(without_marks(CHATML), messages) == ["Hi.<|im_end|>"]


def test_eos_is_added_where_the_template_writes_none() -> None:
    assert learnt(CHATML, CHAT, add_eos_token=True)[-1].endswith("</s>")
    assert learnt(CHATML, CHAT, add_eos_token=True, eos="<|im_end|>") == EXPECTED["chatml"]
    assert learnt(MISTRAL, CHAT, add_eos_token=True) == EXPECTED["mistral"]
    assert learnt(CHATML, CHAT[:4], add_eos_token=True) == EXPECTED["chatml"][:1]  # it does not end with an answer


def test_published_templates_are_read_as_their_marked_versions() -> None:
    """Those of TRL, which has a version with marks of each: both give the same answers and the same ends.

    Marks may also take in the generation prompt before an answer and the white space behind it. Left out: GLM-4 has no
    end of a turn, and its marks take the next turn's first marker for one.
    """
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    pairs = [(folder / file.name.replace("_training", ""), file) for file in sorted(folder.glob("*_training.jinja"))]
    pairs = [pair for pair in pairs if pair[0].is_file() and "glm" not in pair[0].name]
    assert len(pairs) > 10
    compared = 0
    for files in pairs:
        found = []
        for file in files:
            encode = ChatEncoder(chat_tokenizer(file.read_text(encoding="utf-8")))
            encode.tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_OF_FAMILIES})
            encode = ChatEncoder(encode.tokenizer)
            try:
                text, spans = encode.spans(conversation(CHAT[1:]), "row 1")
            except UserError:  # templates of vision models, which take content in parts
                continue
            pieces = "".join(text[a.start : a.end] + "\0" * (a.end != b.start) for a, b in pairwise([*spans, spans[0]]))
            found.append([piece.rstrip() for piece in pieces.strip("\0").split("\0")])
        if len(found) == 2:
            compared += 1
            assert len(found[0]) == len(found[1]) == 2, files
            both = list(zip(*found, strict=True))
            assert all(marked.endswith(plain) or plain.endswith(marked) for plain, marked in both), files
            assert "Hi. You ok?" in found[0][0] and "yes ok." in found[0][1], files
    assert compared > 10


# ---- templates that rewrite the conversation -------------------------------------------------------------------------

# Qwen3's way: reasoning stays in the last answer alone, which always has a place for it.
THINKING = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- set said = message.content.split('</think>')[-1].lstrip('\\n') %}
{%- if message.role == 'assistant' and loop.last %}
{%- set thought = message.content.split('</think>')[0].replace('<think>', '') %}
{%- if '</think>' not in message.content %}{% set thought = '' %}{% endif %}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
{%- endif %}
{{- said + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
THOUGHTFUL = [
    {"role": "user", "content": "a?"},
    {"role": "assistant", "content": "<think>\nhm ok\n</think>\n\nFirst."},
    {"role": "user", "content": "b?"},
    {"role": "assistant", "content": "<think>\nwell\n</think>\n\nSecond."},
]
# DeepSeek-R1's way: the generation prompt opens the reasoning, which past answers do not have.
OPENED = """{%- for message in messages %}
{%- if message.role == 'user' %}{{ '<|user|>' + message.content }}
{%- else %}{{ '<|assistant|>' + message.content.split('</think>')[-1] + eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"""
# Mistral's later way: the system prompt moves into the last message of the user.
MOVING = """{{- bos_token }}{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- for message in messages if message.role != 'system' %}
{%- if message.role == 'user' %}
{%- set rest = messages | selectattr('role', 'equalto', 'user') | list %}
{{- '[INST] ' + (system + ' ' if message == rest[-1] else '') + message.content + '[/INST]' }}
{%- else %}{{ ' ' + message.content + eos_token }}{% endif %}
{%- endfor %}"""
# Phi-3's way: an end of text after the last turn, which begins as the next turn's header does.
CLOSING = """{%- for message in messages %}
{{- '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"""


def test_earlier_reasoning_is_dropped() -> None:
    expected = ["First.<|im_end|>", "<think>\nwell\n</think>\n\nSecond.<|im_end|>"]
    assert learnt(THINKING, THOUGHTFUL) == expected


def test_a_generation_prompt_that_opens_the_reasoning() -> None:
    assert learnt(OPENED, THOUGHTFUL) == ["\n\nFirst.</s>", "\n\nSecond.</s>"]


def test_a_system_prompt_that_moves() -> None:
    assert learnt(MOVING, CHAT) == [" Hi. You ok?</s>", " yes ok. </s>"]


def test_an_end_of_text_after_the_last_turn() -> None:
    assert learnt(CLOSING, CHAT[1:]) == ["Hi. You ok?<|end|>", "yes ok. <|end|>\n<|endoftext|>"]


def test_an_end_that_the_next_turn_writes() -> None:
    template = """{%- for m in messages %}
{%- if m.role == 'user' %}{{ (eos_token if loop.index0 else '') + m.content + '\\n' }}
{%- else %}{{ m.content }}{% endif %}{% endfor %}"""
    assert learnt(template, CHAT[1:]) == ["Hi. You ok?</s>", "yes ok."]


def test_a_template_that_writes_no_generation_prompt() -> None:
    template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    assert learnt(template, CHAT) == EXPECTED["chatml"]


def test_a_template_without_markers() -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    assert learnt(template, CHAT) == [" Hi. You ok?", " yes ok."]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages if m.role != 'assistant' %}{{ m.content + '<|im_end|>' }}{% endfor %}",
        "{% for m in messages %}{{ m.role + m.contents }}{% endfor %}",
        "{{ messages | length }}",
        "{% for m in messages | reverse %}{{ m.content + m.content + '<|im_end|>' }}{% endfor %}",
        "{% for m in messages %}{{ m.content | length }}<|im_end|>{% endfor %}",
        "{% for m in messages %}{{ loop.length }}{{ m.content }}{{ m.content }}<|im_end|>{% endfor %}",
        "{% generation %}{% endgeneration %}{{ messages | length }}",
    ],
)
def test_templates_that_hide_the_answer_are_refused(template: str) -> None:
    message = refused(template, CHAT)
    assert message.startswith("row 1, message 3: the chat template rewrites") or "row 1: the chat template" in message
    assert message.count("\n") < 3


def test_marks_that_leave_the_answer_out() -> None:
    wrong = without_marks(CHATML).replace(
        "'<|im_start|>' + message.role", "'<|im_start|>' }}{% generation %}{{ message.role"
    )
    wrong = wrong.replace("+ '\\n' }}", "}}{% endgeneration %}{{ '\\n' }}", 1)
    assert learnt(wrong, CHAT) == EXPECTED["chatml"]
    assert "row 1, message 3: not within the {% generation %} marks" in noted(wrong, CHAT)


def test_marks_that_hold_more_than_answers() -> None:
    everything = "{% generation %}" + without_marks(CHATML) + "{% endgeneration %}"
    assert learnt(everything, CHAT) == EXPECTED["chatml"]
    assert "row 1, message 1: within the {% generation %} marks" in noted(everything, CHAT)


# ---- tools -----------------------------------------------------------------------------------------------------------


def test_tool_calls_are_learnt_and_results_are_not() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": [2]}'}}
    messages = [
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    tokenizer = chat_tokenizer(TOOLS)
    row = ChatEncoder(tokenizer)(conversation(messages, tools=tools), "row 1")
    assert learnt_texts(tokenizer, row.ids, row.labels) == [
        '<|tool|>{"name": "add", "arguments": {"a": 1, "b": [2]}}<|im_end|>',
        "It is 3.<|im_end|>",
    ]
    assert tokenizer.decode(row.ids).startswith('<|tool|>[{"type": "function"')


def test_a_template_that_leaves_the_tools_out() -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    for template, said in ((TOOLS, 0), (CHATML, 1)):
        encode = ChatEncoder(chat_tokenizer(template))
        for _ in range(2):
            encode(conversation(CHAT, tools=tools), "row 1")
        assert sum("does not write the tools" in sentence for sentence in encode.notes.found) == said


def test_a_template_that_leaves_tool_calls_out() -> None:
    call = {"function": {"name": "add", "arguments": {}}}
    messages = [CHAT[1], {"role": "assistant", "content": None, "tool_calls": [call]}]
    for template in (CHATML, without_marks(CHATML)):
        assert "row 1, message 2: the chat template leaves its call of 'add' out" in refused(template, messages)


# ---- what can be wrong -----------------------------------------------------------------------------------------------


def test_a_template_s_own_refusal_names_the_row() -> None:
    message = refused(MISTRAL, [CHAT[1], CHAT[1], CHAT[2]])
    assert message == "row 1: the chat template, line 5, does not take this conversation: roles must alternate"


@pytest.mark.parametrize(
    ("template", "part"),
    [
        ("{% for m in messages %}\n{{ m.content }", "line 2"),
        ("{{ messages | nosuch }}", "nosuch"),
        ("{{ messages[0].content + 1 }}", "line 1"),
        ("{% for i in range(10**9) %}{{ messages }}{% endfor %}", "Range too big"),
        ("{{ 1 / 0 }}{{ messages }}", "division"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(messages) }}", "recursion"),
    ],
)
def test_broken_templates(template: str, part: str) -> None:
    message = refused(template, CHAT)
    assert message.startswith("row 1: the chat template") and part in message


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages[0].__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('touch ESCAPED').read() }}",
        "{% set _ = messages.append({'role': 'user', 'content': 'x'}) %}",
        "{% set _ = messages[0].update({'content': 'x'}) %}",
        "{{ namespace.__init__.__globals__['os'] }}",
        "{{ lipsum.__globals__['os'].system('touch ESCAPED') }}",
    ],
)
def test_templates_reach_no_attributes(attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    messages = [dict(message) for message in CHAT]
    message = refused(attack + without_marks(CHATML), messages)
    assert "unsafe" in message or "undefined" in message or "not callable" in message
    assert messages == CHAT and not list(tmp_path.iterdir())


def test_no_chat_template() -> None:
    with pytest.raises(UserError, match=r"no chat template[\s\S]*--chat_template: alpaca, chatml, "):
        ChatEncoder(chat_tokenizer(None))


def test_several_templates_without_a_default() -> None:
    tokenizer = chat_tokenizer(None)
    tokenizer.chat_template = {"rag": CHATML, "tool_use": LLAMA_3}
    with pytest.raises(UserError, match=r"cannot be used: .*no default"):
        ChatEncoder(tokenizer)(conversation(CHAT), "row 1")


# ---- templates of any kind -------------------------------------------------------------------------------------------

HEADERS = [
    "<|im_start|>{{ m.role }}\n",
    "{{ m.role }}: ",
    "",
    "{{ bos_token if loop.first }}[INST]",
    "{{ loop.index }} ",
]
TEXTS_OF = ["{{ m.content }}", "{{ m.content | trim }}", "{{ m.content }}", "{{ m.content | upper }}", "said"]
TEXTS_OF += ["{{ m.content if loop.last else '...' }}", "{{ '<think></think>' if loop.last }}{{ m.content }}"]
FOOTERS = ["<|im_end|>\n", "\n", "{{ eos_token }}", "", "<|end|>{{ '<|endoftext|>' if loop.last }}", " .\n\n"]
PROMPTS = ["", "<|im_start|>assistant\n", "assistant: ", "<|im_start|>assistant\n<think>"]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(HEADERS),
    st.sampled_from(TEXTS_OF),
    st.sampled_from(FOOTERS),
    st.sampled_from(PROMPTS),
    st.integers(1, 3),
    st.booleans(),
)
def test_an_answer_is_found_or_refused(
    header: str, said: str, footer: str, prompt: str, turns: int, newest_first: bool
) -> None:
    """Whatever the template does: every answer is learnt and no question is, or the row is refused."""
    order = "{% for m in messages | reverse %}" if newest_first else "{% for m in messages %}"
    template = order + header + said + footer + "{% endfor %}{% if add_generation_prompt %}" + prompt + "{% endif %}"
    pairs = [
        ({"role": "user", "content": f" Q{n} "}, {"role": "assistant", "content": f" A{n} "}) for n in range(turns)
    ]
    try:
        texts = learnt(template, [message for pair in pairs for message in pair])
    except UserError as error:
        assert "rewrites the conversation" in str(error)
        return
    assert len(texts) == turns
    assert all(f"A{n}" in text and "Q" not in text for n, text in enumerate(texts))
    assert not (newest_first and turns > 1) and said != "said"
