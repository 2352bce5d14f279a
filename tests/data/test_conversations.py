"""Conversations of both forms to messages, and what is said of those that are none."""

import json
from typing import Any

import pytest

from tokentune.data.formats.conversations import (
    messages_in,
    openai_conversation,
    sharegpt_conversation,
    system_in_user,
    text_of,
)
from tokentune.errors import UserError

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
HUMAN, GPT = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}


def openai(value: Any, tools: Any = None, **options: int) -> Any:
    return openai_conversation(value, tools, "f.jsonl, row 7", **options)


def sharegpt(value: Any, system: Any = None, tools: Any = None) -> Any:
    return sharegpt_conversation(value, system, tools, "f.jsonl, row 7")


def test_openai_s_form() -> None:
    parts = [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]
    messages = [{"role": "system", "content": parts}, USER | {"name": "Ann", "tool_calls": None}, ASSISTANT]
    found = openai(messages)
    assert found.messages == [{"role": "system", "content": "xy"}, USER | {"name": "Ann"}, ASSISTANT]
    assert found.tools is None and found.learnt == (2,)
    assert openai(json.dumps(messages)) == found  # a CSV cell


def test_arguments_of_tools_are_parsed() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": null}'}}
    tools = [{"type": "function", "function": {"name": "f"}}]
    found = openai([USER, {"role": "assistant", "content": None, "tool_calls": [call]}], json.dumps(tools))
    assert found.messages[1]["tool_calls"] == [{**call, "function": {"name": "f", "arguments": {"x": None}}}]
    assert found.messages[1]["content"] == "" and found.tools == tools
    assert openai([USER, ASSISTANT], []).tools is openai([USER, ASSISTANT], "").tools is None


def test_what_is_learnt() -> None:
    chat = [USER, ASSISTANT, USER, ASSISTANT | {"weight": 0}, USER, ASSISTANT | {"weight": 1}]
    assert openai(chat).learnt == (1, 5)
    assert openai(chat, learn_from=2).learnt == (5,)
    assert all("weight" not in message for message in openai(chat).messages)


@pytest.mark.parametrize("key", ["train", "training", "loss"])
def test_answers_that_are_not_to_be_trained_on_are_context(key: str) -> None:
    chat = [USER, ASSISTANT | {key: False}, USER, ASSISTANT | {key: True}, USER | {key: False}, ASSISTANT]
    assert openai(chat).learnt == (3, 5)
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", key: False}]
    assert sharegpt(turns + turns[:1] + [{"from": "gpt", "value": "c", key: 0.7}]).learnt == (3,)


def test_what_a_turn_of_sharegpt_s_form_holds_besides() -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "reasoning_content": "hm", "id": 3}]
    assert sharegpt(turns).messages[1] == {"role": "assistant", "content": "b", "reasoning_content": "hm"}
    for name in ("Function_Call", "function_call "):
        call = {"from": name, "value": '{"name": "f", "arguments": {}}'}
        assert sharegpt([turns[0], call]).messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}
    with pytest.raises(UserError, match="row 7, message 2: has 'tool_calls', which"):
        sharegpt([turns[0], {"from": "gpt", "value": "", "tool_calls": [{"name": "f"}]}])


def test_a_name_twice_in_json_within_a_text() -> None:
    told = r"is text that is JSON but cannot be read \(the name 'a' occurs twice\)"
    twice = '{"a": 1, "a": 2}'
    with pytest.raises(UserError, match=f"message 2: a tool call's 'arguments' {told}"):
        openai([USER, ASSISTANT | {"tool_calls": [{"function": {"name": "f", "arguments": twice}}]}])
    with pytest.raises(UserError, match=f"message 2: a function_call's 'value' {told}"):
        sharegpt([{"from": "human", "value": "a"}, {"from": "function_call", "value": twice}])
    with pytest.raises(UserError, match=f"the conversation {told}"):
        openai('[{"role": "user", "content": "hi", "a": 1, "a": 2}]')
    with pytest.raises(UserError, match=r"is JSON but cannot be read \(the name 'role'"):
        messages_in('[{"role": "user", "role": "user", "content": "hi"}]', "'prompt'")


def test_calls_in_both_forms_at_once_are_refused() -> None:
    call = {"name": "f", "arguments": "{}"}
    both = ASSISTANT | {"function_call": call, "tool_calls": [{"type": "function", "function": call | {"name": "g"}}]}
    with pytest.raises(UserError, match="message 2: has 'function_call' and 'tool_calls'"):
        openai([USER, both])
    assert "tool_calls" in openai([USER, both | {"tool_calls": []}]).messages[1]


def test_sharegpt_s_form() -> None:
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}
    found = sharegpt([HUMAN, call, {"from": "observation", "value": "2"}, GPT], system="s")
    assert [message["role"] for message in found.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert found.messages[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert found.learnt == (2, 4)
    assert sharegpt([HUMAN, GPT]).messages == openai([USER, ASSISTANT]).messages


def test_speakers_in_capitals_and_by_other_names() -> None:
    expected = openai([USER, ASSISTANT]).messages
    for asks, answers in (("Human", "GPT"), ("USER", "Assistant"), ("user", "ChatGPT"), ("human", "model")):
        assert sharegpt([{"from": asks, "value": "a"}, {"from": answers, "value": "b"}]).messages == expected
        assert sharegpt([{"role": asks, "value": "a"}, {"role": answers, "value": "b"}]).messages == expected
        assert openai([{"role": asks, "content": "a"}, {"role": answers, "content": "b"}]).messages == expected


def test_openai_s_older_form_of_calls() -> None:
    call = {"name": "f", "arguments": '{"x": 1}'}
    found = openai(
        [
            USER,
            {"role": "assistant", "content": None, "function_call": call},
            {"role": "function", "name": "f", "content": "2"},
            ASSISTANT,
        ]
    )
    today = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
    }
    assert found.messages == [USER, today, {"role": "tool", "name": "f", "content": "2"}, ASSISTANT]


def test_arguments_that_are_no_text_are_none() -> None:
    for arguments in ("", " \n", "{}"):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        found = openai([USER, ASSISTANT | {"tool_calls": [call]}])
        assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == {}


def test_several_system_messages_are_the_template_s_matter() -> None:
    system = {"role": "system", "content": "s"}
    assert openai([system, USER, ASSISTANT, system, USER, ASSISTANT]).learnt == (2, 5)


def test_system_messages_in_front_of_the_user_s() -> None:
    system, developer = {"role": "system", "content": "s"}, {"role": "developer", "content": "d"}
    found = system_in_user(openai([system, developer, USER, ASSISTANT, system, ASSISTANT, developer]))
    assert found.messages == [
        {"role": "user", "content": "s\n\nd\n\na"},
        ASSISTANT,
        {"role": "user", "content": "s"},
        ASSISTANT,
        {"role": "user", "content": "d"},
    ]
    assert found.learnt == (1, 3)
    plain = openai([USER, ASSISTANT])
    assert system_in_user(plain) == plain


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (None, "the conversation is missing"),
        (5, "the conversation is a JSON number"),
        ("hello", "text that is not JSON"),
        ([], "the conversation is empty"),
        (["hi"], "message 1: expected an object with role and content, found 'hi'"),
        ([{"content": "x"}], "message 1: no 'role', only 'content'"),
        ([HUMAN], "--data_format sharegpt"),
        ([USER, {"role": "bot", "content": "x"}], "message 2: unknown role 'bot'; known are system"),
        ([USER, {"role": ["user"], "content": "x"}], "message 2: unknown role ['user']"),
        ([USER, {"role": "assistant"}], "message 2: 'content' is missing"),
        ([USER, {"role": "assistant", "content": 5}], "message 2: 'content' is 5, not text"),
        ([USER, {"role": "assistant", "content": {"x": 1}}], "message 2: 'content' is {'x': 1}, not text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "message 1: a part of its content is 'image_url'"),
        ([{"role": "user", "content": ["x"]}], "message 1: a part of its content is 'x'"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "a part of its content is 1, not text"),
        ([USER], "no message of the assistant"),
        ([USER, ASSISTANT | {"weight": 0.5}], "message 2: 'weight' is 0.5"),
        ([USER, ASSISTANT | {"tool_calls": "x"}], "text that is not JSON"),
        ([USER, ASSISTANT | {"tool_calls": [1]}], "message 2: a tool call is 1, not an object"),
        ([USER, ASSISTANT | {"tool_calls": [{"function": {}}]}], "without the name of a function"),
        ([USER, ASSISTANT | {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "text that is not JSON"),
        ([USER, {"role": "assistant", "content": "\ud800"}], "message 2: 'content' holds \\ud800"),
        ([USER, ASSISTANT | {"name": "\udc00"}], "the conversation holds \\udc00"),
    ],
)
def test_bad_conversations(value: Any, part: str) -> None:
    with pytest.raises(UserError) as error:
        openai(value)
    assert str(error.value).startswith("f.jsonl, row 7") and part in str(error.value)


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ([USER], "--data_format messages"),
        ([{"from": "human"}], "message 1: needs 'from' and 'value', has 'from'"),
        ([HUMAN, {"from": "bing bot", "value": "x"}], "message 2: unknown speaker 'bing bot'; known are"),
        ([HUMAN, {"from": "gpt", "value": None}], "message 2: 'value' is missing"),
        (
            [HUMAN, {"from": "function_call", "value": "f(1)"}],
            "message 2: a function_call's 'value' is text that is not",
        ),
        ([HUMAN, {"from": "function_call", "value": "{}"}], "message 2: a tool call without the name"),
        ([HUMAN], "no message of the assistant"),
        ([7], "message 1: expected an object with from and value"),
    ],
)
def test_bad_sharegpt(value: Any, part: str) -> None:
    with pytest.raises(UserError) as error:
        sharegpt(value)
    assert str(error.value).startswith("f.jsonl, row 7") and part in str(error.value)


def test_tools_that_are_none() -> None:
    for tools in ("x", "[", 5, [1], {"a": 1}):
        with pytest.raises(UserError, match="row 7: 'tools' is"):
            openai([USER, ASSISTANT], tools)


def test_texts() -> None:
    assert text_of("a\x00\u2028😀", "x") == "a\x00\u2028😀"
    with pytest.raises(UserError, match="x is missing"):
        text_of(None, "x")
