"""What a template leaves out of a conversation is refused where nothing is left to learn, and noted otherwise."""

import logging

import pytest
from chat_tokenizers import TOOLS, chat_tokenizer

from tokentune.data.chat.templates import ChatEncoder
from tokentune.data.formats.conversations import openai_conversation
from tokentune.errors import UserError

CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome", "unit": "C"}}}
# Knows system (first), user and assistant; writes nothing for the rest.
FEW_ROLES = """{%- for m in messages %}{% if m.role in ('user', 'assistant') or (m.role == 'system' and loop.first) %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
STRIPPING = FEW_ROLES.replace("+ m.content +", "+ m.content.split('</think>')[-1] +")
CALLS_ONLY = FEW_ROLES.replace("m.content +", "('@' + m.tool_calls[0].function.name if m.tool_calls else m.content) +")
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + FEW_ROLES
TOOLS_GIVEN = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
Q, A = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Four."}


def notes(template: str, messages: list[dict], **options: object) -> list[tuple[int, str]]:
    encode = ChatEncoder(chat_tokenizer(template), **options)
    encode(openai_conversation(messages, None, "row 1"), "row 1")
    return [(level, f"{where}: {sentence}") for sentence, (level, where, _) in encode.notes.found.items()]


@pytest.mark.parametrize(
    ("template", "messages", "level", "part"),
    [
        (
            FEW_ROLES,
            [{"role": "developer", "content": "Be brief."}, Q, A],
            "WARNING",
            "message 1: … messages of the role 'developer'",
        ),
        (
            FEW_ROLES,
            [Q, {"role": "system", "content": "Be brief."}, Q, A],
            "WARNING",
            "message 2: … messages of the role 'system'",
        ),
        (
            FEW_ROLES,
            [Q, A, {"role": "tool", "content": "21"}, A],
            "WARNING",
            "message 3: … messages of the role 'tool'",
        ),
        (
            STRIPPING,
            [{"role": "user", "content": "<a>x</think>y"}, A],
            "WARNING",
            "message 1: … a part of messages of the role 'user'",
        ),
        (
            FEW_ROLES,
            [Q, A | {"reasoning_content": "hm"}],
            "WARNING",
            "the reasoning ('reasoning_content') of the last answer",
        ),
        (FEW_ROLES, [Q, A | {"thinking": "hm"}], "WARNING", "the reasoning ('thinking') of the last answer"),
        (
            FEW_ROLES,
            [Q, A | {"reasoning": "hm"}, Q, A],
            "INFO",
            "message 2: … the reasoning ('reasoning') of earlier answers",
        ),
        (
            STRIPPING,
            [Q, A | {"content": "<think>hm</think>Four."}],
            "WARNING",
            "the reasoning within the text of the last answer",
        ),
        (
            STRIPPING,
            [Q, A | {"content": "<think>hm</think>Four."}, Q, A],
            "INFO",
            "the reasoning within the text of earlier answers",
        ),
        (CALLS_ONLY, [Q, A | {"tool_calls": [CALL]}], "WARNING", "message 2: … the text beside a call"),
        (CALLS_ONLY, [Q, A | {"content": "", "tool_calls": [CALL]}], "WARNING", "message 2: … some arguments of calls"),
        (FEW_ROLES, [Q, A | {"weight": 0, "tool_calls": [CALL]}, Q, A], "WARNING", "message 2: … calls of tools"),
        (FEW_ROLES, [Q, A | {"refusal": "No."}], "WARNING", "message 2: … 'refusal' of answers"),
        (FEW_ROLES, [Q, A | {"tool_plan": "Look."}], "WARNING", "message 2: … 'tool_plan' of answers"),
    ],
)
def test_what_is_left_out_is_noted(template: str, messages: list[dict], level: str, part: str) -> None:
    found = notes(template, messages)
    part = part.replace("…", "the chat template leaves out")
    assert any(number == getattr(logging, level) and part in text for number, text in found), found


@pytest.mark.parametrize(
    ("messages", "part"),
    [
        (
            [Q, {"role": "assistant", "content": None, "refusal": "No."}],
            "writes nothing of this message, which has only 'refusal'",
        ),
        (
            [Q, {"role": "assistant", "content": "", "thinking": "hm"}, Q, A],
            "writes nothing of this message, which has only 'thinking'",
        ),
        (
            [Q, {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": "{}"}}],
            "leaves its call of 'f' out",
        ),
        ([Q, A | {"tool_calls": [CALL]}], "leaves its call of 'weather' out"),
    ],
)
def test_where_nothing_is_left_to_learn_it_is_refused(messages: list[dict], part: str) -> None:
    with pytest.raises(UserError) as error:
        notes(FEW_ROLES, messages)
    assert part in str(error.value) and str(error.value).startswith("row 1, message 2: ")


@pytest.mark.parametrize("message", [0, 1])
@pytest.mark.parametrize(
    ("key", "value", "level"),
    [
        *((key, "hm", "WARNING") for key in ("thought", "thoughts", "analysis", "reasoning_text", "channel", "name")),
        *((key, [{"a": 1}], "WARNING") for key in ("reasoning_details", "images", "documents", "citations", "tools")),
        ("audio", {"id": "a"}, "WARNING"),
        ("loss_mask", 0, "WARNING"),
        ("reasoning", ["hm"], "WARNING"),
        ("timestamp", 5, "INFO"),
        ("id", "m1", "INFO"),
    ],
)
def test_keys_that_are_not_read_are_noted(key: str, value: object, level: str, message: int) -> None:
    chat, role = [dict(Q), dict(A)], ("user", "assistant")[message]
    chat[message][key] = value
    sentence = f"message {message + 1}: the chat template leaves out the key {key!r} of messages of the role {role!r}"
    expected = [(getattr(logging, level), f"row 1, {sentence}")]
    assert notes(FEW_ROLES, chat) == expected
    for template in ("{{ messages[%d].%s }}", "{{ 'x' if messages[%d].%s is defined }}"):
        read = template % (message, key) + FEW_ROLES
        assert notes(read, chat) == []
        chat[message]["other"] = "y"
        assert [text.split("leaves out ")[1] for _, text in notes(read, chat)] == [
            f"the key 'other' of messages of the role {role!r}"
        ]
        del chat[message]["other"]
    for empty in (None, "", [], {}):
        chat[message][key] = empty
        assert notes(FEW_ROLES, chat) == []


def test_keys_that_a_template_needs_are_read() -> None:
    chat = [Q, A | {"name": "Al"}]
    named = "{{ messages[1].name or raise_exception('no name') }}" + FEW_ROLES
    assert notes(named, chat) == []
    assert notes(named, [Q | {"content": "What is a vector<str>?"}, A | {"name": "Al"}]) == []
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    answers = [{"role": "tool", "content": "21", "name": "weather", "tool_call_id": "c1"}, A]
    found = notes(TOOLS, [Q, call, *answers])
    assert all(level == logging.INFO and "'name' of messages of the role 'tool'" in text for level, text in found)


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("tools | tojson", []),
        ("tools[0].function.name", ["leaves out a part of the tools"]),
        ("tools[0].function.name + tools[0].function.description", ["leaves out a part of the tools"]),
        ("messages | length | string", ["does not write the tools"]),
        ("tools | tojson if messages[0].role == 'system' else ''", ["does not write the tools"]),
    ],
)
def test_tools_that_are_not_written_or_in_part(written: str, told: list[str]) -> None:
    """Also where the template wrote the last row's, and this row's call names the tool."""
    schema = {"type": "object", "properties": {"city": {"type": "string", "description": 'Whose\n "weather"'}}}
    tools = [{"type": "function", "function": {"name": "weather", "description": " Tells it. ", "parameters": schema}}]
    system = {"role": "system", "content": "Use the tool weather."}
    encode = ChatEncoder(chat_tokenizer(f"{{{{ {written} }}}}" + TOOLS.partition("{% endif %}")[2]))
    for messages in ([system, Q, A], [Q, A | {"tool_calls": [CALL]}, Q, A]):
        encode(openai_conversation(messages, tools, "row 1"), "row 1")
    found = [text for text, (level, _, _) in encode.notes.found.items() if "tools" in text and level == logging.WARNING]
    assert len(found) == len(told) and all(part in text for part, text in zip(told, found, strict=True))


def test_nothing_is_said_of_what_is_written() -> None:
    assert notes(FEW_ROLES, [{"role": "system", "content": "Be brief."}, Q, A]) == []
    assert notes(TOOLS, [Q, A | {"tool_calls": [CALL]}, {"role": "tool", "content": "21"}, A]) == []
    thoughts = FEW_ROLES.replace("+ m.content +", "+ (m.thinking or '') + m.content +")
    assert notes(thoughts, [Q, A | {"reasoning_content": "hm"}]) == []  # the same under another of its names


def test_a_thing_is_noted_once_with_how_often_it_came() -> None:
    encode = ChatEncoder(chat_tokenizer(FEW_ROLES))
    for row in (1, 2, 3):
        encode(openai_conversation([Q, A, {"role": "tool", "content": "21"}, A], None, f"row {row}"), f"row {row}")
    ((sentence, (_, where, times)),) = encode.notes.found.items()
    assert "'tool'" in sentence and where == "row 1, message 3" and times == 3


def test_a_template_without_a_system_role_names_the_cure() -> None:
    chat = [{"role": "system", "content": "Be brief."}, Q, A]
    with pytest.raises(UserError, match=r"no system role[\s\S]*--system_in_user"):
        notes(NO_SYSTEM, chat)
    encode = ChatEncoder(chat_tokenizer(NO_SYSTEM), system_in_user=True)
    row = encode(openai_conversation(chat, None, "row 1"), "row 1")
    assert "user\nBe brief.\n\nHi?<|im_end|>" in encode.tokenizer.decode(row.ids)
    with pytest.raises(UserError) as error:  # another reason: no cure that does not help
        notes("{{ raise_exception('never') }}", chat)
    assert "--system_in_user" not in str(error.value)


def test_developer_messages_go_in_front_of_the_user_s_too() -> None:
    assert notes(FEW_ROLES, [{"role": "developer", "content": "x"}, Q, A], system_in_user=True) == []


@pytest.mark.parametrize("place", ["question", "answer", "tools", "another call"])
def test_a_call_that_is_left_out_is_refused_though_its_name_stands_elsewhere(place: str) -> None:
    template = CALLS_ONLY if place == "another call" else "{{ tools | tojson if tools }}" + FEW_ROLES
    calling = {"role": "assistant", "content": "", "tool_calls": [CALL, CALL | {"id": "c2"}]}
    chat = [Q | {"content": "weather?"} if place == "question" else Q, calling, Q, A]
    chat += [Q, A | {"content": "The weather."}] if place == "answer" else []
    encode = ChatEncoder(chat_tokenizer(template))
    tools = TOOLS_GIVEN if place == "tools" else None
    with pytest.raises(UserError, match=r"row 1, message 2: the chat template leaves its call of 'weather' out"):
        encode(openai_conversation(chat, tools, "row 1"), "row 1")


@pytest.mark.parametrize("text", ["", " "])
def test_nothing_is_said_of_messages_that_say_nothing(text: str) -> None:
    chat = [{"role": "developer", "content": text}, Q, A, {"role": "tool", "content": text}, A]
    assert notes(FEW_ROLES, chat) == []
