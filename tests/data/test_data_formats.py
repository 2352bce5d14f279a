"""Columns beside those that a format needs: read where another tool defines them, refused or named elsewhere."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
from chat_tokenizers import TOOLS, chat_tokenizer
from datasets import Dataset
from instruction_rows import CHAT, SHAREGPT, load, refused, stream, write

from tokentune.data.formats.data_formats import FORMATS
from tokentune.data.prompts import PromptTemplate
from tokentune.errors import UserError
from tokentune.sources import listed

TOKENIZER = chat_tokenizer(TOOLS)
USER, ASSISTANT = "<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>assistant\n{}<|im_end|>\n"
SYSTEM = "<|im_start|>system\n{}<|im_end|>\n"
HELLO = USER.format("Hi") + ASSISTANT.format("ok")
FUNCTION = {"name": "f", "parameters": {"x": None}}


def texts(name: str, words: str = "") -> list[str]:
    return [TOKENIZER.decode(row["input_ids"]) for row in load(name, words=words, tokenizer=TOKENIZER).train]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": CHAT, "system": "s"}, SYSTEM.format("s") + HELLO),
        ({"messages": CHAT, "system": [{"type": "text", "text": "s"}]}, SYSTEM.format("s") + HELLO),  # Anthropic's
        ({"messages": CHAT, "system": "", "system_prompt": None, "tools": []}, HELLO),
        ({"messages": [{"role": "system", "content": "s"}, *CHAT], "system": "s"}, SYSTEM.format("s") + HELLO),
        ({"conversations": SHAREGPT, "system_prompt": "s"}, SYSTEM.format("s") + HELLO),  # OpenHermes'
        ({"conversations": SHAREGPT, "system_prompt": "s", "system": "s"}, SYSTEM.format("s") + HELLO),
        ({"prompt": CHAT[:1], "completion": CHAT[1:], "system": "s"}, SYSTEM.format("s") + HELLO),
        ({"instruction": "Hi", "output": "ok", "system": "s"}, SYSTEM.format("s") + HELLO),  # LLaMA-Factory's
        (
            {"instruction": "And", "input": "you?", "output": "ok", "history": [["a", "b"], ["c", "d"]]},
            "".join(USER.format(q) + ASSISTANT.format(a) for q, a in (("a", "b"), ("c", "d"), ("And\nyou?", "ok"))),
        ),
        ({"instruction": "Hi", "output": "ok", "system": "", "history": []}, "<s>Hi|ok"),  # the prompt template
    ],
)
def test_columns_that_other_tools_define_are_read(row: dict, expected: str, tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.jsonl", [row])) == [expected]


@pytest.mark.parametrize("form", [{"messages": CHAT}, {"conversations": SHAREGPT}])
def test_functions_of_openai_s_older_form(form: dict, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": FUNCTION}]
    expected = texts(write(tmp_path / "a.jsonl", [form | {"tools": tools}]))
    assert '"x": null' in expected[0]
    for functions in ([FUNCTION], json.dumps([FUNCTION])):
        assert texts(write(tmp_path / "b.jsonl", [form | {"functions": functions}])) == expected


def test_every_answer_of_a_history_is_learnt(tmp_path: Path) -> None:
    """As in LLaMA-Factory; one row with a history makes chats of all, so that none is put into another form."""
    rows = [{"instruction": "Hi", "output": "ok"}, {"instruction": "x", "output": "y", "history": [["a", "b"]]}]
    data = load(write(tmp_path / "a.jsonl", rows), tokenizer=TOKENIZER)
    assert data.sources[0].data_format == "alpaca_chat"
    learnt = [[label for label in row["labels"] if label != -100] for row in data.train]
    assert [TOKENIZER.decode(ids) for ids in learnt] == ["ok<|im_end|>", "b<|im_end|>y<|im_end|>"]


def test_a_history_in_every_kind_of_file(tmp_path: Path) -> None:
    rows = [{"instruction": "x", "output": "y", "history": [["a", "b"]]}, {"instruction": "z", "output": "y"}]
    expected = texts(write(tmp_path / "a.jsonl", rows))
    pandas.DataFrame(rows).to_parquet(tmp_path / "b.parquet")
    assert texts(str(tmp_path / "b.parquet")) == expected
    cells = [row | {"history": json.dumps(row.get("history"))} for row in rows]
    pandas.DataFrame(cells).to_csv(tmp_path / "c.csv", index=False)
    assert texts(str(tmp_path / "c.csv")) == expected


@pytest.mark.parametrize(
    ("row", "words", "told"),
    [
        (
            {"prompt": "a", "completion": "b", "system": "s"},
            "",
            "has 'system', which is not read beside a prompt",
        ),
        ({"prompt": "a", "completion": "b", "tools": [FUNCTION]}, "", "row 1: has 'tools'"),
        ({"messages": CHAT, "history": [["a", "b"]]}, "", "row 1: has 'history', which this format does not read"),
        ({"instruction": "a", "output": "b", "system": "s"}, "--data_format alpaca", "--data_format alpaca_chat makes"),
        (
            {"messages": CHAT, "system": "a", "system_prompt": "b"},
            "",
            "'system' and 'system_prompt', which mean",
        ),
        ({"messages": CHAT, "tools": [FUNCTION], "functions": [FUNCTION] * 2}, "", "'tools' and 'functions'"),
        ({"messages": CHAT, "functions": "f"}, "", "'functions' is text that is not JSON: 'f'"),
        ({"messages": CHAT, "functions": {"f": 1}}, "", "'functions' is {'f': 1}, not a list"),
        ({"messages": CHAT, "system": 5}, "", "row 1: 'system' is 5, not text"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "", "'history' is ['c'], not a list of pairs"),
        ({"instruction": "a", "output": None, "history": [["c", "d"]]}, "", "row 1: 'output' is missing"),
        ({"instruction": "a", "output": "b", "history": [["c", None]]}, "", "row 1, message 2: 'content' is missing"),
    ],
)
def test_what_has_no_place_is_refused_by_name(row: dict, words: str, told: str, tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", [row])
    message = refused(name, words=words, tokenizer=TOKENIZER)
    assert message.startswith(f"{name}, row 1") and told in message


ALPACA = {"instruction": "a", "output": "b"}


@pytest.mark.parametrize("form", [{"messages": CHAT}, {"conversations": SHAREGPT}, ALPACA, {"text": "whole"}])
def test_rows_that_are_not_to_be_learnt_are_refused(form: dict, tmp_path: Path) -> None:
    no = [("weight", 0), ("weight", 0.0), ("train", False), ("train", "False"), ("training", False), ("loss", False)]
    no += [("loss_mask", value) for value in (0, [1, 0], "[0, 1]", [True, False])]
    for name, value in no:
        told = refused(write(tmp_path / "a.jsonl", [form, form | {name: value}]), tokenizer=TOKENIZER)
        assert f"row 2: has {name!r}: {value!r}" in told and "--bad_rows skip" in told
    for row in ({"weight": 1, "train": True, "loss_mask": [1, 1]}, {"loss": 0.0, "train": None, "weight": 0.5}):
        load(write(tmp_path / "a.jsonl", [form | row]), tokenizer=TOKENIZER)


@pytest.mark.parametrize("form", [{"messages": CHAT}, {"prompt": "a", "completion": "b"}, ALPACA])
def test_answers_that_are_not_wanted_are_refused(form: dict, tmp_path: Path) -> None:
    """TRL's and LLaMA-Factory's data for learning from both. The label of a text is a class."""
    for name, value in (("label", False), ("label", "False"), ("kto_tag", False), ("kto_tag", 0)):
        told = refused(write(tmp_path / "a.jsonl", [form, form | {name: value}]), tokenizer=TOKENIZER)
        assert f"row 2: has {name!r}: {value!r}" in told
    for row in (form | {"label": True}, form | {"label": 0}, {"text": "x", "label": False}):
        load(write(tmp_path / "a.jsonl", [row]), tokenizer=TOKENIZER)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "stream"])
def test_all_columns_that_are_not_read_are_in_the_log(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / ("a.csv" if kind == "csv" else "a.jsonl")
    row = {"prompt": "a", "completion": "b", "id": "5", "chosen": "c", "preamble": "p"}
    pandas.DataFrame([row]).to_csv(path, index=False) if kind == "csv" else write(path, [row, row])
    with caplog.at_level(logging.INFO, logger="tokentune"):
        stream(str(path)) if kind == "stream" else load(str(path))
    assert "; not read: 'id', 'preamble'" in caplog.text
    assert ("not read: the columns 'chosen'" in caplog.text) == (kind != "stream")  # told when the row is drawn


@pytest.mark.parametrize("kind", ["csv", "parquet", "stream"])
def test_rows_that_are_not_to_be_learnt_in_other_files(kind: str, tmp_path: Path) -> None:
    table = pandas.DataFrame([ALPACA | {"weight": 1}, ALPACA | {"weight": 0}])
    if kind == "stream":
        name = write(tmp_path / "a.jsonl", table.to_dict("records"))
        with pytest.raises(UserError, match="row 2: has 'weight': 0"):
            list(zip(range(9), stream(name), strict=False))
        return
    path = tmp_path / f"a.{kind}"
    table.to_csv(path, index=False) if kind == "csv" else table.to_parquet(path)
    assert "row 2: has 'weight': " in refused(str(path))


def test_a_column_that_a_later_row_alone_has(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}] * 3 + [{"prompt": "a", "completion": "b", "system_prompt": "s"}]
    assert "row 4: has 'system_prompt'" in refused(write(tmp_path / "a.jsonl", rows))


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"text": "whole", "system": "s"}, "'system'"),
        ({"text": "whole", "context": "c", "id": 5}, "'context'"),
        ({"messages": CHAT, "documents": [], "images": []}, "'documents', 'images'"),
        ({"messages": CHAT, "System": "s", "Tools": []}, "'System', 'Tools'"),
        ({"messages": CHAT, "system_message": "s", "developer": "d"}, "'system_message', 'developer'"),
        ({"conversations": SHAREGPT, "sys_prompt": "s", "systemPrompt": "s"}, "'sys_prompt', 'systemPrompt'"),
        (ALPACA | {"available_tools": [], "tool_schema": {}}, "'available_tools', 'tool_schema'"),
        ({"messages": CHAT, "thought": "t", "image": "i"}, "'thought', 'image'"),
        ({"messages": CHAT, "weight": 0.5, "loss_mask": [1]}, "'weight', 'loss_mask'"),
    ],
)
def test_what_may_be_meant_is_named(row: dict, named: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load(write(tmp_path / "a.jsonl", [row]), tokenizer=TOKENIZER)
    assert f"not read: the columns {named}" in caplog.text


@pytest.mark.parametrize("written", [list, json.dumps])
def test_keys_of_turns_that_are_not_read_are_named(
    written: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    turns = [
        SHAREGPT[0] | {"images": ["a"], "weight": 1},
        SHAREGPT[1] | {"thought": "t", "reasoning": "", "x": None, "id": 3},
    ]
    with caplog.at_level(logging.WARNING):
        load(write(tmp_path / "a.jsonl", [{"conversations": written(turns)}] * 2), tokenizer=TOKENIZER)
    (record,) = [r for r in caplog.messages if "not read" in r]
    assert "row 1: not read: the keys 'images', 'thought' of turns" in record and "(and 1 more)" in record


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"prompt": "a", "completion": "b", "input": "i"}, ["input"]),
        ({"instruction": "a", "output": "b", "documents": ["d"], " Input": "i"}, ["documents", " Input"]),
        ({"messages": CHAT, "Context": "c"}, ["Context"]),
        ({"text": "whole", "system": "s"}, ["system"]),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "saved", "mixed", "stream"])
def test_what_a_later_row_alone_has_is_named(
    row: dict, named: list[str], kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = {name: value for name, value in row.items() if name not in named}
    rows = [plain] * 70 + [row]  # more than are tokenized together
    path = tmp_path / ("a.jsonl" if kind == "stream" else f"a.{kind}")
    if kind == "csv":
        cells = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in r.items()} for r in rows]
        pandas.DataFrame(cells).to_csv(path, index=False)
    elif kind == "parquet":
        pandas.DataFrame(rows).to_parquet(path)
    elif kind == "saved":
        Dataset.from_pandas(pandas.DataFrame(rows)).save_to_disk(path)
    elif kind == "mixed":
        path.mkdir()
        write(path / "a.jsonl", rows[:70])
        pandas.DataFrame(rows[70:]).to_parquet(path / "b.parquet")
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if kind != "json" else json.dumps(rows))
    with caplog.at_level(logging.WARNING):
        if kind == "stream":
            list(zip(range(500), stream(str(path)), strict=False))
        else:
            load(str(path), tokenizer=TOKENIZER)
    assert caplog.text.count(f"not read: the columns {listed(named)}") == 1
    if kind in ("jsonl", "json", "stream"):
        assert f"{path}, row 71: not read" in caplog.text


def test_a_kept_warning_is_given_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = write(tmp_path / "a.jsonl", [{"messages": CHAT}, {"messages": CHAT, "documents": ["d"]}])
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            load(name, words=f"--data_cache {tmp_path / 'cache'}", tokenizer=TOKENIZER)
        assert f"{name}, row 2: not read: the columns 'documents'" in caplog.text
    assert "tokens of an earlier run" in caplog.text


def test_a_later_row_that_fits_another_format_too(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b", "messages": CHAT}]
    name = write(tmp_path / "a.jsonl", rows)
    told = f"{name}, row 2: its columns fit several formats (prompt_completion, messages)"
    assert refused(name, tokenizer=TOKENIZER).startswith(told)
    with pytest.raises(UserError, match=re.escape(told)):
        list(zip(range(5), stream(name), strict=False))
    assert len(load(name, words="--data_format prompt_completion", tokenizer=TOKENIZER).train) == 2
    rows[1]["messages"] = None
    assert len(load(write(tmp_path / "b.jsonl", rows), tokenizer=TOKENIZER).train) == 2


# ---- messages as JSON text -------------------------------------------------------------------------------------------

TAKEN_AS_TEXT = "the column {!r} holds a list of messages written out as text"


@pytest.mark.parametrize("written", [json.dumps, str])
@pytest.mark.parametrize("messages", [CHAT, SHAREGPT])
@pytest.mark.parametrize("column", ["instruction", "input", "output", "text"])
def test_messages_that_are_taken_as_text_are_told(
    column: str, messages: list, written: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = {"text": "a"} if column == "text" else {"instruction": "a", "input": "b", "output": "c"}
    name = write(tmp_path / "a.jsonl", [plain, plain | {column: written(messages)}])
    with caplog.at_level(logging.WARNING):
        data = load(name, tokenizer=TOKENIZER)
    assert f"{name}, row 2: {TAKEN_AS_TEXT.format(column)}" in caplog.text and "column 'messages'" in caplog.text
    assert written(messages) in TOKENIZER.decode(data.train[1]["input_ids"])


@pytest.mark.parametrize(
    "answer",
    [
        '[{"role": "CEO", "name": "Ann"}]',
        '[{"role": "user", "rights": ["read"]}]',
        '[{"from": "Rome", "value": 3}, {"from": "human", "value": 4}]',
        '[{"role": "user", "content": "a"}, {"id": 5}]',
        '{"role": "user", "content": "a"}',
        '[{"role": "user", "content": "a"}',
        'As JSON: [{"role": "user", "content": "a"}]',
        "[]",
    ],
)
def test_answers_in_json_are_texts(answer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        data = load(write(tmp_path / "a.jsonl", [{"instruction": "a", "output": answer}]), tokenizer=TOKENIZER)
    assert "written out" not in caplog.text
    assert TOKENIZER.decode(data.train[0]["input_ids"]).endswith(answer)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"prompt": [], "completion": CHAT},
        {"messages": CHAT, "system": [{"type": "text", "text": "s"}]},
        {"conversations": CHAT},
        {"conversations": SHAREGPT, "tools": [FUNCTION]},
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_messages_in_a_cell_are_read_as_those_of_a_list(row: dict, suffix: str, tmp_path: Path) -> None:
    expected = load(write(tmp_path / "a.jsonl", [row]), tokenizer=TOKENIZER)
    cells, path = {name: json.dumps(value) for name, value in row.items()}, tmp_path / f"b.{suffix}"
    if suffix == "csv":
        pandas.DataFrame([cells]).to_csv(path, index=False)
    elif suffix == "parquet":
        pandas.DataFrame([cells]).to_parquet(path)
    else:
        write(path, [cells])
    found = load(str(path), tokenizer=TOKENIZER)
    assert found.train[:] == expected.train[:]
    assert found.sources[0].data_format == expected.sources[0].data_format


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": json.dumps(CHAT[:1]), "completion": "ok"}, "must be both texts or both lists of messages"),
        ({"prompt": "Hi", "completion": json.dumps(CHAT[1:])}, "must be both texts or both lists of messages"),
        ({"prompt": str(CHAT[:1]), "completion": str(CHAT[1:])}, "'prompt' looks like messages, and is not JSON"),
        ({"prompt": json.dumps(CHAT[0]), "completion": "ok"}, "'prompt' is {'role': 'user'"),
        ({"messages": str(CHAT)}, "the conversation is text that is not JSON"),
        ({"messages": json.dumps(CHAT), "system": "[{'type': 'text', 'text': 's'}]"}, "'system' is text that is not"),
    ],
)
def test_messages_in_a_cell_that_cannot_be_read(row: dict, told: str, tmp_path: Path) -> None:
    pandas.DataFrame([row]).to_csv(tmp_path / "a.csv", index=False)
    assert told in refused(str(tmp_path / "a.csv"), tokenizer=TOKENIZER)


@pytest.mark.parametrize(
    "text", ["[INST] Hi", '[{"name": "Ann", "role": "actor"}]', '{"a": 1}', "[1, 2]", "[]", "{{x}}"]
)
def test_other_json_is_a_text(text: str, tmp_path: Path) -> None:
    data = load(write(tmp_path / "a.jsonl", [{"prompt": text, "completion": text}]), tokenizer=TOKENIZER)
    learnt = [label for label in data.train[0]["labels"] if label != -100]
    assert TOKENIZER.decode(learnt) == text


def test_rows_of_a_stream_are_of_the_first_one_s_form(tmp_path: Path) -> None:
    """Not all rows can be looked at beforehand: one of the other form is refused where the stream comes to it."""
    turn: dict[str, Any] = {"instruction": "a", "output": "b"}
    name = write(tmp_path / "a.jsonl", [turn, turn | {"history": [["c", "d"]]}])
    with pytest.raises(UserError, match="has 'history', which the prompt template has no place for"):
        list(zip(range(5), stream(name), strict=False))
    other = stream(write(tmp_path / "b.jsonl", [turn | {"history": [["c", "d"]]}, turn]))
    assert other.sources[0].encoder.data_format is FORMATS["alpaca_chat"]


def test_no_format_reads_what_it_ignores() -> None:
    template = PromptTemplate("{instruction}{input}", "{instruction}", "")
    item = FORMATS["alpaca"].read({"instruction": "a", "output": "b", "history": "[]", "system": " "}, "f", template)
    assert item == ("a", "b")
