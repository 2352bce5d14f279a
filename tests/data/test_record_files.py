"""Columns of type JSON, which `datasets` makes of mixed values: the same rows from every kind of file."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from chat_tokenizers import TOOLS, chat_tokenizer
from datasets import Audio, Dataset, Features, Image, Json, List, Value, load_dataset
from instruction_rows import load, write

from tokentune.data.formats.record_files import rows_of_table
from tokentune.data.formats.records import load_records, open_source
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


def test_rows_without_a_column_that_is_asked_for(tmp_path: Path) -> None:
    table = Dataset.from_list([{"a": 1}] * 3)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    for name in ("a.parquet", "saved"):
        assert open_source(str(tmp_path / name), flag="--x").peek(["b"]) == (["a"], {})
        assert rows_of(tmp_path / name, ("b",)) == [{}] * 3
