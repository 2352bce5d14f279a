"""Columns of type JSON, which `datasets` makes of mixed values: the same rows from every kind of file."""

import datetime
import json
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from chat_tokenizers import TOOLS, chat_tokenizer
from datasets import Audio, Dataset, Features, Image, Json, List, Value, load_dataset
from instruction_rows import load, write

from tokentune.data.formats.record_files import rows_of_table
from tokentune.data.formats.records import RecordSource, load_records, open_source
from tokentune.errors import UserError

ARGUMENTS = [{"city": "Rome", "unit": None}, {"when": 5, "where": [None, {"x": None}]}]
CALLS = [{"type": "function", "function": {"name": "f", "arguments": arguments}} for arguments in ARGUMENTS]
ROWS = [{"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "tool_calls": [c]}]} for c in CALLS]


def rows_of(name: Path | str, columns: tuple[str, ...] = ("messages",)) -> list[dict]:
    return [row for _, row in open_source(str(name), flag="--x").rows(columns)]


@pytest.mark.parametrize("features", ["by itself", {"messages": List(Json())}, {"messages": Json()}])
def test_json_in_parquet_saved_and_streamed_tables(features: dict | str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    if features == "by itself":
        table = load_dataset("json", data_files=path, split="train", cache_dir=str(tmp_path / "cache"))
    else:
        table = Dataset.from_list(ROWS, features=Features(features))
    assert "Json" in str(table.features)
    table.to_parquet(tmp_path / "b.parquet")
    table.save_to_disk(tmp_path / "saved")
    assert rows_of(path) == ROWS
    assert rows_of(tmp_path / "b.parquet") == rows_of(tmp_path / "saved") == ROWS
    assert list(rows_of_table(table.to_iterable_dataset(), ["messages"], "x")) == ROWS
    expected = load(path, tokenizer=chat_tokenizer(TOOLS)).train[:]
    for other in ("b.parquet", "saved"):
        assert load(str(tmp_path / other), tokenizer=chat_tokenizer(TOOLS)).train[:] == expected


def test_json_within_a_struct(tmp_path: Path) -> None:
    """The struct's keys are the same in all rows, null where a row had none; the JSON's nulls are its own."""
    rows = [{"tools": [{"name": "f", "parameters": {"x": None}}]}, {"tools": [{"parameters": {"y": [None]}}]}]
    features = Features({"tools": List({"name": Value("string"), "parameters": Json()})})
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet", ("tools",)) == rows


def test_json_that_is_none_is_a_bad_row(tmp_path: Path) -> None:
    texts = pyarrow.array(["[1]", "{", '{"a": 1, "a": 2}', None], pyarrow.string())
    column = pyarrow.ExtensionArray.from_storage(pyarrow.json_(), texts)
    pyarrow.parquet.write_table(pyarrow.table({"messages": column}), tmp_path / "a.parquet")
    first, *bad, last = rows_of(tmp_path / "a.parquet")
    assert first == {"messages": [1]} and last == {"messages": None}
    assert [isinstance(row, UserError) for row in bad] == [True, True]
    assert "a.parquet, row 2: a value of type JSON cannot be read" in str(bad[0]) and "occurs twice" in str(bad[1])


@pytest.mark.parametrize("kind", ["parquet", "saved", "streamed"])
def test_columns_that_are_not_read_are_not_converted(kind: str, tmp_path: Path) -> None:
    """A date that Python has not, sound without a decoder, an image that is none."""
    stored = pyarrow.array(
        [{"bytes": b"RIFF", "path": None}], pyarrow.struct({"bytes": pyarrow.binary(), "path": "str"})
    )
    table = pyarrow.table({"text": ["a"], "clip": stored, "picture": stored})
    table = table.append_column("created", pyarrow.array([4 * 10**15], pyarrow.timestamp("ms")))
    features = Features(text=Value("string"), clip=Audio(), picture=Image(), created=Value("timestamp[ms]"))
    described = {"huggingface": json.dumps({"info": {"features": features.to_dict()}})}
    table = Dataset(table.replace_schema_metadata(described))
    if kind == "streamed":
        assert list(rows_of_table(table.to_iterable_dataset(), ["text"], "x")) == [{"text": "a"}]
        return
    path = tmp_path / f"a.{kind}"
    if kind == "saved":
        table.save_to_disk(path)
    else:
        pyarrow.parquet.write_table(table.data.table, path)
    data = load(str(path))
    assert data.sources[0].data_format == "text" and len(data.train) == 1
    assert load_records(str(path))["text"][:] == ["a"]


FAR = {
    "date": pyarrow.array([10**8], pyarrow.date32()),
    "time": pyarrow.array([4 * 10**15], pyarrow.timestamp("ms")),
    "span": pyarrow.array([10**15], pyarrow.duration("s")),
    "zone": pyarrow.array([4], pyarrow.timestamp("ms", tz="Foo/Bar")),
}


def far_messages(key: str) -> pyarrow.Table:
    """Two rows of two messages; the first row's answer has a value that Python cannot represent."""
    value = pyarrow.concat_arrays([pyarrow.nulls(1, FAR[key].type), FAR[key], pyarrow.nulls(2, FAR[key].type)])
    roles, texts = pyarrow.array(["user", "assistant"] * 2), pyarrow.array(["Hi", "ok"] * 2)
    messages = pyarrow.StructArray.from_arrays([roles, texts, value], ["role", "content", key])
    return pyarrow.table({"messages": pyarrow.ListArray.from_arrays([0, 2, 4], messages)})


@pytest.mark.parametrize("key", [*FAR])
def test_a_key_that_python_cannot_represent(key: str, tmp_path: Path) -> None:
    """Only a template that writes it cannot be used."""
    path, kind = tmp_path / "a.parquet", str(FAR[key].type)
    pyarrow.parquet.write_table(far_messages(key), path)
    plain = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "ok"}]
    first, second = (row["messages"] for row in rows_of(path))
    assert second == plain and first[0] == plain[0] and repr(first[1][key]).startswith("a value of type ")
    template = TOOLS + f"{{{{ messages[1].{key} }}}}"
    found = load(str(path), tokenizer=chat_tokenizer(TOOLS))
    expected = load(write(tmp_path / "b.jsonl", [{"messages": plain}]), tokenizer=chat_tokenizer(TOOLS)).train[0]
    assert [*found.train] == [expected] * 2
    with pytest.raises(UserError) as error:
        load(str(path), tokenizer=chat_tokenizer(template))
    assert f"a.parquet, row 1, message 2: the chat template writes the key {key!r}, and its value" in str(error.value)
    assert f"(a value of type {kind} that Python cannot represent) is not JSON" in str(error.value)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("key", [*FAR])
def test_streams_of_values_that_python_cannot_represent(key: str, suffix: str, tmp_path: Path) -> None:
    """In a column that nobody reads, in a key of the messages that nobody reads, and in a text."""
    table, path = far_messages(key).append_column("created", [pyarrow.concat_arrays([FAR[key]] * 2)]), tmp_path / "a"
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as file:
            file.write_table(table)
    streamed = load_dataset(suffix, data_files=str(path), split="train", streaming=True)
    plain = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "ok"}]
    first, second = (row["messages"] for row in rows_of_table(streamed, ["messages"], "x"))
    assert second == plain and first[0] == plain[0] and repr(first[1][key]).startswith("a value of type ")
    (*_, last) = rows_of_table(streamed, None, "x")
    assert last["messages"] == plain and repr(last["created"]).endswith(" that Python cannot represent")
    source = RecordSource("x", "--dataset_name_or_path", table=streamed)
    assert source.peek(("tools",)) == (["messages", "created"], {})


def test_dates_that_a_template_writes_are_refused(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "ok", "when": datetime.date(2024, 1, 2)}
    table = pyarrow.Table.from_pylist([{"messages": [{"role": "user", "content": "<date>"}, answer]}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert len(load(str(tmp_path / "a.parquet"), tokenizer=chat_tokenizer(TOOLS)).train) == 1
    with pytest.raises(UserError, match=r"message 2: the chat template writes the key 'when', and its value \(date"):
        load(str(tmp_path / "a.parquet"), tokenizer=chat_tokenizer(TOOLS + "{{ messages[1].when }}"))
    call = {"function": {"name": "f", "arguments": {"when": datetime.date(2024, 1, 2)}}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    table = pyarrow.Table.from_pylist([{"messages": [{"role": "user", "content": "Hi"}, answer]}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="row 1, message 2: a tool call holds a value that JSON has not"):
        load(str(tmp_path / "a.parquet"), tokenizer=chat_tokenizer(TOOLS))


def test_texts_that_python_cannot_represent(tmp_path: Path) -> None:
    broken = pyarrow.array([b"ok", b"\xff"], pyarrow.binary()).view(pyarrow.string())
    messages = pyarrow.StructArray.from_arrays([pyarrow.array(["user", "assistant"]), broken], ["role", "content"])
    table = pyarrow.table({"messages": pyarrow.ListArray.from_arrays([0, 2], messages)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": FAR["date"]}), tmp_path / "b.parquet")
    for name, told in (
        ("a", "row 1, message 2: 'content' is a value of type string that Python cannot represent, not text"),
        ("b", "row 1: 'text' is a value of type date32[day] that Python cannot represent, not text"),
    ):
        with pytest.raises(UserError) as error:
            load(str(tmp_path / f"{name}.parquet"), tokenizer=chat_tokenizer(TOOLS))
        assert told in str(error.value)


def test_a_name_twice_within_a_column(tmp_path: Path) -> None:
    twice = pyarrow.StructArray.from_arrays([pyarrow.array([1]), pyarrow.array([2])], ["a", "a"])
    table = pyarrow.table({"messages": pyarrow.ListArray.from_arrays([0, 1], twice), "text": ["x"], "meta": twice})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: the name 'a' occurs twice within a column"):
        rows_of(tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet", ("text",)) == [{"text": "x"}]


def test_rows_without_a_column_that_is_asked_for(tmp_path: Path) -> None:
    table = Dataset.from_list([{"a": 1}] * 3)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    for name in ("a.parquet", "saved"):
        assert open_source(str(tmp_path / name), flag="--x").peek(["b"]) == (["a"], {})
        assert rows_of(tmp_path / name, ("b",)) == [{}] * 3
