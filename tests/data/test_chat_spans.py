"""Calls, results of tools, reasoning and ends of turns: what of them is learnt, in templates of several kinds."""

import logging
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import pytest
from chat_tokenizers import chat_tokenizer, learnt_texts
from tokenizers import AddedToken

from tokentune.data.chat import rendering as chat_rendering
from tokentune.data.chat.marks import BEGIN
from tokentune.data.chat.templates import ChatEncoder
from tokentune.data.formats.conversations import openai_conversation
from tokentune.data.prompts import encode_answers
from tokentune.errors import UserError

MARKERS = [
    "<think>",
    "</think>",
    "<|call>",
    "<call|>",
    "<|response>",
    "<response|>",
    "<|call|>",
    "<|return|>",
    "<|start|>",
]
MARKERS += ["<|observation|>", "<|system|>", "<turn|>", "<|turn>", "<|tool_call>", "<tool_call|>", "<|tool_response>"]
MARKERS += ["<tool_response|>"]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str = "", **more: object) -> dict:
    return {"role": "assistant", "content": text, **more}


def tool(text: str, name: str = "weather") -> dict:
    return {"role": "tool", "content": text, "tool_call_id": "c1", "name": name}


def call(name: str = "weather", **arguments: object) -> dict:
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}


def encoder(template: str, *, eos: str = "</s>", **options: object) -> ChatEncoder:
    tokenizer = chat_tokenizer(template, eos=eos)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKERS})
    return ChatEncoder(tokenizer, **options)


def learnt(template: str, messages: list[dict], **options: object) -> list[str]:
    encode = encoder(template, **options)
    row = encode(openai_conversation(messages, None, "row 1"), "row 1")
    return learnt_texts(encode.tokenizer, row.ids, row.labels)


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As long as there were renderings."""
    found: list[int] = []
    render = chat_rendering.render_jinja_template
    monkeypatch.setattr(chat_rendering, "render_jinja_template", lambda **options: found.append(1) or render(**options))
    return found


# Results of tools stand within the turn that called them, read ahead; the text beside a call comes behind them.
RESULTS_WITHIN = """{%- for m in messages if m.role != 'tool' %}
{{- '<|turn>' + m.role + '\\n' }}
{%- if m.tool_calls %}{% for c in m.tool_calls %}
{{- '<|call>' + c.function.name + c.function.arguments | tojson + '<call|>' }}
{%- endfor %}{% set ns = namespace(on=true, seen=false) %}
{%- for n in messages %}{% if n == m %}{% set ns.seen = true %}{% elif ns.seen and ns.on and n.role == 'tool' %}
{{- '<|response>' + n.content + '<response|>' }}{% elif ns.seen %}{% set ns.on = false %}{% endif %}
{%- endfor %}{% endif %}
{{- m.content + '<turn|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|turn>assistant\\n' }}{% endif %}"""
# The same without special tokens, where results stand on lines of their own behind the calls.
RESULT_LINES = """{%- for m in messages %}
{%- if m.role == 'user' %}{{ '\\nUser: ' + m.content + '\\nModel: ' }}
{%- elif m.role == 'tool' %}{{ '[' + m.content + ']' }}
{%- else %}{{ m.content }}
{%- for c in m.tool_calls or [] %}{{ '@' + c.function.name + c.function.arguments | tojson }}{% endfor %}
{%- if not m.tool_calls %}{{ '<|end|>' }}{% endif %}{% endif %}{% endfor %}"""
TWO_RESULTS = [
    user("Weather?"),
    assistant("Let me see.", tool_calls=[call(city="Rome"), call("sun", city="Oslo")]),
    *(tool("21 degrees"), tool("no sun"), assistant("Warm there."), user("Thanks."), assistant("Welcome.")),
]


def test_results_within_the_assistant_s_turn_are_not_learnt() -> None:
    calls = '<|call>weather{"city": "Rome"}<call|><|call>sun{"city": "Oslo"}<call|><|response>'
    expected = [calls, "Let me see.<turn|>", "Warm there.<turn|>", "Welcome.<turn|>"]
    assert learnt(RESULTS_WITHIN, TWO_RESULTS) == expected


def test_results_behind_the_calls_of_one_turn_are_not_learnt() -> None:
    expected = ['Let me see.@weather{"city": "Rome"}@sun{"city": "Oslo"}', "Warm there.<|end|>", "Welcome.<|end|>"]
    assert learnt(RESULT_LINES, TWO_RESULTS) == expected


@pytest.mark.parametrize("version", ["", "_v2", "_v3", "_v4", "_v5"])
def test_gemma_4_s_results_are_not_learnt(version: str) -> None:
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    template = (folder / f"gemma4{version}.jinja").read_text(encoding="utf-8")
    texts = learnt(template, TWO_RESULTS)
    assert not any("degrees" in text or "no sun" in text for text in texts)
    assert "Rome" in texts[0] and "Oslo" in texts[0] and "Welcome." in texts[-1]


# Text before a call is parted from it; reasoning stands behind the last question alone.
PARTED = """{%- set ns = namespace(last=0) %}{% for m in messages %}
{%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ m.content }}
{%- for c in m.tool_calls or [] %}
{{- ('\\n\\n' if m.content or not loop.first else '') + '<call>' + c.function | tojson }}
{%- endfor %}{{ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# A call has text or reasoning; the template fails on both. A call's end is another token than an answer's.
EXCLUSIVE = """{%- for m in messages %}
{%- if m.role != 'assistant' %}{{ '<|start|>' + m.role + ':' + m.content + '<|end|>' }}
{%- elif m.tool_calls %}{% if m.content and m.thinking %}{{ raise_exception('text or reasoning') }}{% endif %}
{%- if m.thinking %}{{ '<|start|>assistant:' + m.thinking + '<|end|>' }}{% endif %}
{%- set f = m.tool_calls[0].function %}
{{- '<|start|>assistant to=' + f.name + ':' + f.arguments | tojson + '<|call|>' }}
{%- else %}{{ '<|start|>assistant:' + m.content + ('<|return|>' if loop.last else '<|end|>') }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""
# The generation prompt opens the reasoning; earlier answers have none.
OPENING = PARTED.replace("'<|im_start|>assistant\\n' }}", "'<|im_start|>assistant\\n<think>\\n' }}")
ONE_CALL = [user("Weather?"), assistant(tool_calls=[call(city="Rome", days=3)]), tool("21"), assistant("It is 21.")]
ONE_CALL += [user("Thanks."), assistant("Welcome.")]


def test_a_call_is_learnt_from_its_beginning() -> None:
    called = '<call>{"name": "weather", "arguments": {"city": "Rome", "days": 3}}<|im_end|>'
    expected = [called, "It is 21.<|im_end|>", "<think>\n\n</think>\n\nWelcome.<|im_end|>"]
    assert learnt(PARTED, ONE_CALL) == expected


def test_a_call_without_the_space_that_texts_begin_with() -> None:
    """As Mistral's templates write it, which have no generation prompt."""
    template = """{%- for m in messages %}
{%- if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}
{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}
{%- elif m.tool_calls %}{{ '[TOOL_CALLS] ' + m.tool_calls[0].function | tojson + eos_token }}
{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"""
    chat = [user("Weather?"), assistant(tool_calls=[call(city="Rome")]), tool("21 degrees"), assistant("Warm.")]
    called = '[TOOL_CALLS] {"name": "weather", "arguments": {"city": "Rome"}}</s>'
    assert learnt(template, [*chat, *chat]) == [called, " Warm.</s>"] * 2


def test_a_call_under_a_prompt_that_opens_reasoning() -> None:
    called = '<call>{"name": "weather", "arguments": {"city": "Rome", "days": 3}}<|im_end|>'
    assert learnt(OPENING, ONE_CALL) == [
        called,
        "It is 21.<|im_end|>",
        "\n\n</think>\n\nWelcome.<|im_end|>",
    ]  # its line breaks are one token


def test_a_call_whose_reasoning_excludes_text() -> None:
    thought = [ONE_CALL[0], ONE_CALL[1] | {"thinking": "Call it."}, *ONE_CALL[2:4]]
    called = ' to=weather:{"city": "Rome", "days": 3}<|call|>'
    assert learnt(EXCLUSIVE, ONE_CALL[:4]) == [called, ":It is 21.<|return|>"]
    assert learnt(EXCLUSIVE, thought) == [f":Call it.<|end|><|start|>assistant{called}", ":It is 21.<|return|>"]


def test_calls_without_arguments_or_with_numbers_alone() -> None:
    for arguments, written in (({}, "{}"), ({"n": 1, "on": True, "x": None}, '{"n": 1, "on": true, "x": null}')):
        chat = [user("a"), assistant(tool_calls=[call(**arguments)]), tool("b"), assistant("c")]
        chat += [user("d"), assistant(tool_calls=[call(**arguments)]), tool("e"), assistant("f")]
        texts = learnt(EXCLUSIVE, chat)
        assert texts == [
            f" to=weather:{written}<|call|>",
            ":c<|end|>",
            f" to=weather:{written}<|call|>",
            ":f<|return|>",
        ]


def test_an_answer_that_says_nothing_is_an_end_to_learn() -> None:
    chat = [user("a"), assistant(), user("b"), assistant("c")]
    assert learnt(PARTED, chat) == ["<|im_end|>", "<think>\n\n</think>\n\nc<|im_end|>"]


# ---- what ends a turn ------------------------------------------------------------------------------------------------

NO_END = """{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|user|>\\n' + m.content }}
{%- elif m.role == 'tool' %}{{ '<|observation|>\\n' + m.content }}
{%- else %}{{ '<|assistant|>\\n' + m.content }}
{%- for c in m.tool_calls or [] %}{{ '\\n<call>' + c.function.name + '</call>' }}
{%- endfor %}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
LAST_END = NO_END.replace(
    "{%- if add_gen", "{%- if not add_generation_prompt %}{{ eos_token }}{% endif %}{%- if add_gen"
)


@pytest.mark.parametrize(("template", "last"), [(NO_END, ""), (LAST_END, "</s>")])
def test_the_next_turn_s_mark_ends_calls_and_texts(template: str, last: str) -> None:
    expected = ["<call>weather</call><|observation|>", "It is 21.<|user|>", f"Welcome.{last}"]
    assert [text.lstrip() for text in learnt(template, ONE_CALL)] == expected
    assert learnt(template, ONE_CALL, add_eos_token=True)[-1] == "Welcome.</s>"


def test_an_end_of_its_own_is_not_followed_by_the_next_turn_s_mark() -> None:
    ended = NO_END.replace("{%- endfor %}{% endif %}", "{%- endfor %}{{ '<|end|>' }}{% endif %}")
    texts = [text.lstrip() for text in learnt(ended, ONE_CALL)]
    assert texts == ["<call>weather</call><|end|>", "It is 21.<|end|>", "Welcome.<|end|>"]


# ---- special tokens that take the white space beside them ------------------------------------------------------------


def greedy_encoder(template: str, **sides: bool) -> ChatEncoder:
    tokenizer = chat_tokenizer(template)
    names = ["<|usr|>", "<|ast|>", "<|stop|>"]
    tokens = [AddedToken(name, special=True, normalized=False, **sides) for name in names]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    return ChatEncoder(tokenizer)


@pytest.mark.parametrize("sides", [{"rstrip": True}, {"lstrip": True}, {"lstrip": True, "rstrip": True}])
def test_white_space_that_special_tokens_take_decides_nothing(sides: dict[str, bool]) -> None:
    template = """{%- for m in messages %}{{ '<|usr|>\\n' if m.role == 'user' else '<|ast|>\\n' }}
{{- m.content + '<|stop|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|ast|>\\n' }}{% endif %}"""
    encode = greedy_encoder(template, **sides)
    chat = [user("a?"), assistant(" b. "), user("c?"), assistant("d.")]
    row = encode(openai_conversation(chat, None, "row 1"), "row 1")
    tokens = encode.tokenizer.convert_ids_to_tokens(row.ids)
    runs = groupby(zip(tokens, row.labels, strict=True), key=lambda pair: pair[1] != -100)
    spoken = [[token for token, _ in run if token not in ("Ġ", "Ċ")] for on, run in runs if on]
    assert spoken == [["b", ".", "<|stop|>"], ["d", ".", "<|stop|>"]]


def test_a_prompt_that_ends_with_such_a_token() -> None:
    tokenizer = greedy_encoder("{{ messages }}", rstrip=True).tokenizer
    (row,) = encode_answers([("q<|ast|>", "\n b")], tokenizer, add_eos_token=False)
    header = row.ids.index(tokenizer.convert_tokens_to_ids("<|ast|>"))
    assert row.labels[header] == -100 and row.labels[-1] == row.ids[-1]


# ---- forms of arguments ----------------------------------------------------------------------------------------------


def test_a_template_that_takes_arguments_as_text() -> None:
    joining = PARTED.replace("c.function | tojson", "c.function.name + ' ' + c.function.arguments")
    printing = PARTED.replace("c.function | tojson", "c.function.name ~ ' ' ~ c.function.arguments")
    for template in (joining, printing):  # the one fails on an object, the other writes it as Python does
        assert learnt(template, ONE_CALL)[0] == '<call>weather {"city": "Rome", "days": 3}<|im_end|>'


@pytest.mark.parametrize("arguments", ["", " ", "{}"])
def test_no_arguments_are_an_empty_object(arguments: str) -> None:
    function = {"name": "weather", "arguments": arguments}
    chat = [user("a"), assistant(tool_calls=[{"type": "function", "function": function}])]
    assert learnt(EXCLUSIVE, chat) == [" to=weather:{}<|call|>"]


# ---- how much is rendered --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [PARTED, EXCLUSIVE, RESULTS_WITHIN, NO_END, OPENING])
def test_as_many_renderings_for_long_chats_as_for_short_ones(template: str, rendered: list) -> None:
    counts = []
    for calls in (4, 40):
        steps = [(assistant(f"Step {n}." * (n % 2), tool_calls=[call(n=n)]), tool(f"r{n}")) for n in range(calls)]
        chat = [
            user("Go."),
            *(message for step in steps for message in step),
            assistant("Done."),
            user("?"),
            assistant("!"),
        ]
        rendered.clear()
        texts = learnt(template, chat)
        assert len(texts) >= calls + 2
        counts.append(len(rendered))
    assert counts[0] == counts[1] <= 24


def test_white_space_at_texts_ends_needs_no_renderings_of_its_own() -> None:
    chat = [message for n in range(6) for message in (user(" a\n" * (n % 3 + 1)), assistant(f" {n} \n"))]
    plain = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    prompt = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    assert learnt(plain + prompt, chat) == [f" {n} \n<|im_end|>" for n in range(6)]
    trimmed = plain.replace("m.content", "(m.content | trim)")
    assert learnt(trimmed + prompt, chat) == [f"{n}<|im_end|>" for n in range(6)]


def test_texts_that_hold_the_marks_themselves_are_found_without() -> None:
    chat = [user("a"), assistant(f"b{BEGIN}"), user("c"), assistant("d")]
    plain = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    prompt = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    assert learnt(plain + prompt, chat) == [f"b{BEGIN}<|im_end|>", "d<|im_end|>"]


def test_an_answer_twice_is_refused() -> None:
    twice = "{% for m in messages %}{{ m.role + ':' + m.content + '|' + m.content + '<|im_end|>' }}{% endfor %}"
    with pytest.raises(UserError, match=r"row 1, message 2: the chat template rewrites"):
        learnt(twice, [user("a"), assistant("b")])


# ---- tags in answers, names twice, results that say nothing ----------------------------------------------------------

# The prompt closes the reasoning at once (Qwen 3.5's, not thinking).
CLOSED = OPENING.replace("<think>\\n' }}", "<think>\\n\\n</think>\\n\\n' }}").replace(
    "{{ '<think>\\n\\n</think>\\n\\n' }}", "{{ '<think>\\n' + (m.reasoning or '') + '\\n</think>\\n\\n' }}"
)


@pytest.mark.parametrize("template", [OPENING, CLOSED])
def test_tags_in_an_answer_are_no_reasoning(template: str) -> None:
    chat = [user("a"), assistant("Use <b>bold</b> here."), user("b"), assistant("c")]
    assert learnt(template, chat)[0] == "Use <b>bold</b> here.<|im_end|>"
    chat = [user("a"), assistant("<i>vector<int></i>"), user("b"), assistant("c")]
    assert learnt(template, chat)[0] == "<i>vector<int></i><|im_end|>"


def test_reasoning_under_a_prompt_that_closes_it() -> None:
    chat = [user("a"), assistant("b"), user("c"), assistant("d <b>e</b>", reasoning="hm")]
    assert learnt(CLOSED, chat) == ["b<|im_end|>", "<think>\nhm\n</think>\n\nd <b>e</b><|im_end|>"]
    chat[-1] = assistant("<think>hm</think>d")
    assert learnt(CLOSED.replace("loop.index0 > ns.last", "false"), chat)[1] == "<think>hm</think>d<|im_end|>"


def test_reasoning_that_stands_otherwise_than_the_prompt_opens_it() -> None:
    chat = [user("a"), assistant("<think>hm</think>b <b>c</b>")]
    assert learnt(OPENING.replace("loop.index0 > ns.last", "false"), chat) == ["hm</think>b <b>c</b><|im_end|>"]


# Calls name their function at the beginning and once more; results say whose they are.
NAMED_TWICE = """{%- for m in messages %}
{%- if m.role == 'tool' %}{{ '<|start|>functions.' + m.name + ' to=assistant:' + m.content + '<|end|>' }}
{%- else %}{{ '<|start|>' + m.role }}{%- for c in m.tool_calls or [] %}{% set f = c.function %}
{{- ' to=' + f.name + ':<call name="' + f.name + '">' + f.arguments | tojson + '<|call|>' }}
{%- else %}{{ ':' + m.content + '<|end|>' }}{%- endfor %}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""


@pytest.mark.parametrize("arguments", [{}, {"n": 3}, {"city": "Rome"}])
def test_a_call_that_is_named_twice(arguments: dict) -> None:
    chat = [user("a"), assistant(tool_calls=[call(**arguments)]), tool("b"), assistant("c")]
    written = str(arguments).replace("'", '"')
    assert learnt(NAMED_TWICE, chat) == [f' to=weather:<call name="weather">{written}<|call|>', ":c<|end|>"]


def test_an_answer_to_a_result_that_says_nothing_begins_where_the_others_do() -> None:
    named = NAMED_TWICE.replace(
        "functions.' + m.name", "functions.' + messages[loop.index0 - 1].tool_calls[0].function.name"
    )
    for template in (NAMED_TWICE, named):
        chat = [user("a"), assistant(tool_calls=[call(city="Rome")]), tool(""), assistant("c")]
        chat += [user("d"), assistant(tool_calls=[call("sun", city="Oslo")]), tool(" "), assistant("e")]
        texts = learnt(template, chat)
        assert [texts[1], texts[3]] == [":c<|end|>", ":e<|end|>"]


def test_answers_of_white_space_or_tags_alone_under_a_template_without_a_generation_prompt() -> None:
    plain = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    for text in ("", " ", "<b></b>"):
        chat = [user("a"), assistant(text), user("b"), assistant("c")]
        assert learnt(plain, chat) == [f"{text}<|im_end|>", "c<|im_end|>"]


# A result's header names its call only where their ids agree.
NAMED_BY_ID = NAMED_TWICE.replace(
    "functions.' + m.name", "' + (c[0].function.name if c and c[0].id == m.tool_call_id else 'unknown')"
).replace("{%- for m in messages %}", "{%- for m in messages %}{% set c = messages[loop.index0 - 1].tool_calls %}", 1)


def test_a_name_in_the_first_result_s_header_and_none_in_the_second_s() -> None:
    chat = [user("a")]
    for result in (tool("b"), tool("c") | {"tool_call_id": "c2"}):
        chat += [assistant(tool_calls=[call(city="Rome")]), result, assistant("d"), user("e")]
    called = ' to=weather:<call name="weather">{"city": "Rome"}<|call|>'
    assert learnt(NAMED_BY_ID, chat) == [called, ":d<|end|>"] * 2


# ---- white space and tags at the end of what is answered -------------------------------------------------------------


@pytest.mark.parametrize("step", [1, -1])
@pytest.mark.parametrize("name", ["gptoss", "muse_glimmer", "qwen3_5_think", "llama3"])
def test_an_answer_begins_alike_however_the_text_before_it_ends(name: str, step: int) -> None:
    ends = ["", "\n", " \n\n", "</div>", "</div>\n", "<b>", " ", "\n"][::step]
    answers = learnt(published(name), [m for end in ends for m in (user(f"q{end}"), assistant("a"))])
    assert len({*answers[:-1]}) == 1 and len(answers) == len(ends)
    if name == "llama3":  # writes a call in another way than as a text
        return
    steps = [(assistant(tool_calls=[call(city="Rome")]), tool(f"r{end}"), assistant("a")) for end in ends]
    answers = learnt(published(name), [user("q"), *(message for step in steps for message in step)])
    assert len({*answers[1:-1:2]}) == 1 and len(answers) == 2 * len(ends)


@pytest.mark.parametrize("result", ["", "\n"])
def test_blank_results_beside_blank_questions_are_not_learnt(result: str) -> None:
    chat = [user("a"), assistant("b"), user(" "), assistant("See.", tool_calls=[call()]), tool(result), assistant("c")]
    assert not any("response:" in text for text in learnt(published("gemma4_v5"), chat))


# ---- marks of the template's own -------------------------------------------------------------------------------------

MARKED = """{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role != 'assistant' %}{{ m.content + '<|im_end|>' }}{% else %}
{%- if m.reasoning %}{% generation %}{{ m.reasoning }}{% endgeneration %}{{ '|' }}{% endif %}
{%- if m.content %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}
{%- for c in m.tool_calls or [] %}{{ '<|call>' + c.function | tojson }}{% endfor %}{{ '<|im_end|>' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def test_calls_that_marks_leave_out_are_found_without_them() -> None:
    for before in ("", "Weather of sun: weather."):
        chat = [user("a"), assistant(before, tool_calls=[call()]), tool("b"), assistant("The weather is sun.")]
        called = f'{before}<|call>{{"name": "weather", "arguments": {{}}}}<|im_end|>'
        assert learnt(MARKED, chat) == [called, "The weather is sun.<|im_end|>"]


@pytest.mark.parametrize("first", [True, False])
def test_marks_of_which_one_answer_has_two_and_another_none(first: bool) -> None:
    thoughtful, silent = assistant("b", reasoning="hm"), assistant("")
    answers = [thoughtful | {"weight": 0}, silent] if first else [silent | {"weight": 0}, thoughtful]
    expected = ["<|im_end|>"] if first else ["hm|b<|im_end|>"]
    assert learnt(MARKED, [user("a"), answers[0], user("c"), answers[1]]) == expected


@pytest.mark.parametrize("result", ["", " ", "<b>"])
def test_a_result_without_words_within_the_assistant_s_turn_is_not_learnt(result: str) -> None:
    chat = [user("a"), assistant("See.", tool_calls=[call()]), tool(result), assistant("b")]
    assert learnt(RESULTS_WITHIN, chat) == ["<|call>weather{}<call|><|response>", "See.<turn|>", "b<turn|>"]
    assert learnt(RESULT_LINES, chat) == ["See.@weather{}", "b<|end|>"]


# ---- how much is rendered: published templates, whatever the turns are -----------------------------------------------

PUBLISHED = [
    "gemma4",
    "gemma4_v3",
    "gemma4_v5",
    "diffusion_gemma",
    "glm4moe",
    "gptoss",
    "qwen3_vl",
    "llama3",
    "smolvlm",
    "gemma4_v2",
    "muse_glimmer",
    "qwen3_8",
]
UNITS = {
    "calls": lambda n: [assistant(tool_calls=[call(city=f"C{n}")]), tool(f"r{n}")],
    "calls and texts": lambda n: [assistant(f"Step {n}.", tool_calls=[call(city=f"C{n}")]), tool(f"r{n}")],
    "calls of many names": lambda n: [assistant(tool_calls=[call(f"f{n}", city="C")]), tool("r") | {"name": f"f{n}"}],
    "calls of many names, blank results": lambda n: [
        assistant(tool_calls=[call("f" * (n + 1), city="C")]),
        tool(" " * n, "f" * (n + 1)),
    ],
    "blank questions": lambda n: [user(" " * n), assistant(f"A{n}")],
    "empty answers": lambda n: [user(f"Q{n}"), assistant(f"A{n}" * (n % 2))],
    "blank answers": lambda n: [user(f"Q{n}"), assistant(" "), user("x"), assistant(f"A{n}")],
    "system messages": lambda n: [user(f"Q{n}"), {"role": "system", "content": f"S{n}"}, assistant(f"A{n}")],
    "reasoning": lambda n: [user(f"Q{n}"), assistant(f"A{n}", reasoning_content=f"hm {n}")],
}


def published(name: str) -> str:
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    return (folder / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates_are_rendered_as_often_for_long_chats(name: str, unit: str, rendered: list) -> None:
    counts = []
    for length in (6, 20):
        turns = [message for n in range(length) for message in UNITS[unit](n)]
        rendered.clear()
        with suppress(UserError):  # roles or calls that this template does not take
            learnt(published(name), [user("Go."), assistant("Yes."), user("And?"), *turns])
        counts.append(len(rendered))
    assert counts[0] == counts[1] <= 24


# ---- where one answer follows another within a turn ------------------------------------------------------------------


def test_gemma_4_s_texts_beside_chained_calls() -> None:
    steps = [[assistant(f"Step {n}.", tool_calls=[call(n=n)]), tool(f"r{n}")] for n in range(2)]
    chat = [user("Go."), *steps[0], *steps[1], assistant("Done.")]
    texts = learnt(published("gemma4_v5"), chat)
    calls = [f"<|tool_call>call:weather{{n:{n}}}<tool_call|><|tool_response>" for n in range(2)]
    assert texts == [calls[0], f"Step 0.{calls[1]}", "Step 1.Done.<turn|>"]


def test_the_next_answer_s_header_is_no_end() -> None:
    chat = [user("Go."), assistant("Wait.", tool_calls=[call(n=1)]), tool("r"), assistant("Done.")]
    texts = learnt(published("diffusion_gemma"), chat)
    assert texts == ["<|tool_call>call:weather{n:1}<tool_call|><|tool_response>", "Wait.", "Done.<turn|>"]


# ---- texts that the template transforms ------------------------------------------------------------------------------

CHANGED = "{% for m in messages %}{{ m.role + ': ' + m.content | FILTER + '<|im_end|>' }}{% endfor %}"


@pytest.mark.parametrize("change", ["capitalize", "upper", "title", "length | string", "replace('b', 'c')", "trim"])
@pytest.mark.parametrize("text", ["Hello", "B", "1", "a b"])
def test_no_header_is_learnt_of_texts_that_are_transformed(change: str, text: str) -> None:
    template = CHANGED.replace("m.content | FILTER", f"(m.content | {change})")
    chat = [user("q"), assistant(text), user("r"), assistant(text)]
    try:
        texts = learnt(template, chat)
    except UserError as error:
        assert "rewrites the conversation" in str(error)
    else:
        assert len(texts) == 2 and not any("assistant" in said for said in texts)


def test_capitalized_texts_need_no_renderings_of_their_own(rendered: list) -> None:
    template = CHANGED.replace("m.content | FILTER", "(m.content | capitalize)")
    chat = [message for n in range(40) for message in (user(f"q {n}"), assistant(f"yes {n}"))]
    assert learnt(template, chat) == [f"Yes {n}<|im_end|>" for n in range(40)]
    assert len(rendered) <= 24


def test_a_transformed_text_that_stays_the_same_is_learnt_without_its_header() -> None:
    template = CHANGED.replace("m.content | FILTER", "(m.content | capitalize)")
    assert learnt(template, [user("q"), assistant("Hello")]) == ["Hello<|im_end|>"]


# ---- content as a list of parts --------------------------------------------------------------------------------------

PARTS = """{%- for m in messages %}{{ m.role + ':' }}{%- for part in m.content %}
{%- if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""


@pytest.mark.parametrize("indexed", [False, True])
def test_templates_that_take_parts_alone(indexed: bool) -> None:
    template = PARTS.replace("{%- for part", "{% if m.content[0].type == 'image' %}?{% endif %}{%- for part")
    chat = [user("a"), assistant("s <b>x</b> "), user(""), assistant(""), user("c"), assistant("d")]
    expected = ["s <b>x</b> <|im_end|>", "<|im_end|>", "d<|im_end|>"]
    assert learnt(template if indexed else PARTS, chat) == expected


# Parts for the user, texts for the assistant.
MIXED = PARTS.replace("{{ m.role + ':' }}", "{{ m.role + ':' }}{% if m.role == 'user' %}").replace(
    "{% endfor %}{{ '<|im_end|>'", "{% endfor %}{% else %}{{ m.content | trim }}{% endif %}{{ '<|im_end|>'"
)


def test_templates_that_take_one_role_s_texts_in_parts() -> None:
    chat = [user("a"), assistant("b"), user("c "), assistant(""), user("d"), assistant("e")]
    assert learnt(MIXED, chat) == ["b<|im_end|>", "<|im_end|>", "e<|im_end|>"]
    encode = encoder(MIXED)
    row = encode(openai_conversation(chat, None, "row 1"), "row 1")
    assert encode.tokenizer.decode(row.ids).startswith("user:a<|im_end|>assistant:b<|im_end|>user:c <|im_end|>")
    assert not encode.notes.found
    encode = encoder(MIXED.replace("part.text", "''"))  # neither a text nor a part is written
    encode(openai_conversation(chat, None, "row 1"), "row 1")
    ((sentence, (level, where, _)),) = encode.notes.found.items()
    assert "messages of the role 'user', which the model is therefore not shown" in sentence
    assert (level, where) == (logging.WARNING, "row 1, message 1")


def test_parts_are_not_given_to_templates_that_write_them_out() -> None:
    for form in ("m.content[0].type + m.content", "m.content | tojson if m.content is not string else ''"):
        with pytest.raises(UserError):
            learnt("{% for m in messages %}{{ " + form + " }}{% endfor %}", [user("a"), assistant("b")])


@pytest.mark.parametrize("name", ["smolvlm", "idefics3", "llava_next"])
def test_published_templates_of_vision_models_take_texts(name: str) -> None:
    texts = learnt(published(name), [user("a"), assistant("b c"), user("d"), assistant("e")])
    assert [text.strip().removesuffix("<end_of_utterance>").removesuffix("</s>") for text in texts] == ["b c", "e"]
