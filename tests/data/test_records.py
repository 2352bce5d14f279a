"""Local files of every kind, folders, the hub's failures, and what is wrong with bad files, where."""

import json
from pathlib import Path
from types import SimpleNamespace

import pandas
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetNotFoundError

from tokentune.cli.command import run_command
from tokentune.data.formats import records
from tokentune.data.formats.records import load_records, open_source, require_columns
from tokentune.errors import UserError

ROWS = [
    {"instruction": "Add.", "input": "1 2", "output": "3", "id": 7},
    {"instruction": "Grüße 😀", "input": "", "output": 'a "b",\nc', "id": 8},
    {"instruction": "None", "input": None, "output": "NA", "id": 9},
]


def json_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def refused(path: str | Path, **options: str) -> str:
    with pytest.raises(UserError) as error:
        load_records(str(path), **options)
    message = str(error.value)
    assert message.count("\n") < 3
    return message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", json_lines(ROWS)),
        ("bom.jsonl", "\ufeff" + json_lines(ROWS)),
        ("blank_lines.jsonl", "\n" + json_lines(ROWS).replace("\n", "\r\n  \n") + "\n"),
        ("a.JSONL", json_lines(ROWS).rstrip()),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("bom.json", "\ufeff" + json.dumps(ROWS)),
        ("data.json", json.dumps({"version": 1, "data": ROWS})),
        ("lines.json", json_lines(ROWS)),
    ],
)
def test_json_of_all_shapes(tmp_path: Path, name: str, content: str) -> None:
    dataset = load_records(write(tmp_path / name, content))
    assert dataset.column_names == ["instruction", "input", "output", "id"]
    assert dataset.to_list() == ROWS


def test_one_object_in_a_json_file(tmp_path: Path) -> None:
    assert load_records(write(tmp_path / "a.json", json.dumps(ROWS[0], indent=1))).to_list() == ROWS[:1]


def test_csv_keeps_text_as_it_is_and_empty_cells_as_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    pandas.DataFrame(ROWS).to_csv(path, index=False, encoding="utf-8-sig")
    assert load_records(str(path)).to_list() == [{**row, "input": row["input"] or None} for row in ROWS]


def test_csv_columns_of_numbers_with_gaps(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "instruction,output,score\n1,01,0.5\n2,nan,\n")
    assert load_records(path).to_list() == [
        {"instruction": "1", "output": "01", "score": 0.5},
        {"instruction": "2", "output": "nan", "score": None},
    ]


def test_parquet(tmp_path: Path) -> None:
    pandas.DataFrame(ROWS).to_parquet(tmp_path / "a.parquet")
    assert load_records(str(tmp_path / "a.parquet")).to_list() == ROWS


def test_columns_that_some_rows_lack(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d", "input": "e", "extra": [1]}]
    dataset = load_records(write(tmp_path / "a.jsonl", json_lines(rows)))
    assert dataset["input"][:] == [None, "e"]
    assert dataset["extra"][:] == [None, [1]]


def test_values_of_several_types_stay_what_they_are(tmp_path: Path) -> None:
    values = [1, "b", None, {"x": [None]}, 2**70]
    path = write(tmp_path / "a.jsonl", json_lines([{"a": value} for value in values]))
    assert load_records(path)["a"][:4] == values[:4]


def test_a_parquet_file_with_a_name_twice(tmp_path: Path) -> None:
    names = ["output", "instruction", "output"]
    pyarrow.parquet.write_table(pyarrow.table([["a"]] * 3, names=names), tmp_path / "a.parquet")
    assert "a.parquet: the name 'output' occurs twice among its columns" in refused(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="occurs twice among its columns"):
        open_source(str(tmp_path / "a.parquet"), flag="--x").peek(["output"])


def test_columns_that_no_one_can_read(tmp_path: Path) -> None:
    """Types that `datasets` has no name for are left out; a date beyond Python's range is not converted."""
    table = pyarrow.table(
        {
            "text": ["a"],
            "id": pyarrow.array([bytes(16)], pyarrow.uuid()),
            "created": pyarrow.array([4_000_000_000_000_000], pyarrow.timestamp("ms")),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    rows = load_records(str(tmp_path / "a.parquet"))
    assert rows.column_names == ["text", "created"] and rows["text"][:] == ["a"]
    ((_, row),) = open_source(str(tmp_path / "a.parquet"), flag="--x").rows(["text"])
    assert row == {"text": "a"}


def test_csv_files_of_old_programs_and_of_spreadsheets(tmp_path: Path) -> None:
    expected = [{"instruction": "a,\r\nb", "output": "1"}, {"instruction": "c", "output": None}]
    for end in ("\n", "\r\n", "\r"):
        text = end.join(["instruction,,output", '"a,\r\nb",x,1', "", "  ", "c", ""])
        assert load_records(write(tmp_path / "a.csv", "\ufeff" + text)).to_list() == expected


def test_nan_in_json_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"instruction": "a", "input": NaN, "output": "b", "score": NaN}\n')
    assert load_records(path).to_list() == [{"instruction": "a", "input": None, "output": "b", "score": None}]


def test_line_separators_within_a_text_end_no_line(tmp_path: Path) -> None:
    rows = [{"instruction": "a\u2028b", "output": "c\x85d"}]
    assert load_records(write(tmp_path / "a.jsonl", json_lines(rows))).to_list() == rows


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    for name in "hbeagcfd":
        write(tmp_path / f"{name}.jsonl", json_lines([{"instruction": name, "output": "x"}]))
    assert load_records(str(tmp_path))["instruction"][:] == list("abcdefgh")


def test_the_columns_of_a_folder_are_those_of_all_its_files(tmp_path: Path) -> None:
    for name, more in (("a", {}), ("b", {"system": ["s"]})):
        pandas.DataFrame({"output": ["x"], **more}).to_parquet(tmp_path / f"{name}.parquet")
        pandas.DataFrame({"output": ["x"], **more}).to_csv(tmp_path / f"{name}.csv", index=False)
    for kind in ("csv", "parquet"):
        files = tuple(sorted(tmp_path.glob(f"*.{kind}")))
        assert records.RecordSource("name", "--flag", files).columns() == ["output", "system"]
    write(tmp_path / "c.jsonl", '{"output": "x", "history": []}')
    assert records.RecordSource("name", "--flag", (*files, tmp_path / "c.jsonl")).columns() is None


def test_a_folder_of_different_kinds_of_files(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", json_lines(ROWS[1:2]))
    write(tmp_path / "a.json", json.dumps(ROWS[:1]))
    write(tmp_path / "c" / "x.csv", "output,instruction,input,id\nNA,None,,9\n")
    write(tmp_path / "README.md", "# no data")
    write(tmp_path / "dataset_infos.json", '{"default": {}}')
    write(tmp_path / ".cache" / "old.jsonl", "{broken")
    assert load_records(str(tmp_path)).to_list() == ROWS


@pytest.mark.parametrize("pattern", ["{}.jsonl", "data/{}-00000-of-00001.jsonl", "{}/part.jsonl", "alpaca.{}.jsonl"])
def test_a_folder_with_splits(tmp_path: Path, pattern: str) -> None:
    for row, split in zip(ROWS, ("train", "validation", "test"), strict=True):
        write(tmp_path / pattern.format(split), json_lines([row]))
    assert load_records(str(tmp_path)).to_list() == ROWS[:1]
    assert load_records(str(tmp_path), role="validation").to_list() == ROWS[1:2]


def test_a_folder_without_the_split(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", json_lines(ROWS))
    assert "only test" in refused(tmp_path)


def test_saved_data_sets(tmp_path: Path) -> None:
    dataset = Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "one")
    DatasetDict({"train": dataset.select([0]), "test": dataset}).save_to_disk(tmp_path / "two")
    assert load_records(str(tmp_path / "one")).to_list() == ROWS
    assert load_records(str(tmp_path / "two")).to_list() == ROWS[:1]
    assert "no split 'validation', only train, test" in refused(tmp_path / "two", role="validation")


@pytest.mark.parametrize(
    ("name", "content", "messages"),
    [
        ("a.jsonl", "", ["the file is empty"]),
        ("a.jsonl", " \n\n", ["the file is empty"]),
        ("a.json", "", ["the file is empty"]),
        ("a.csv", "", ["the file is empty"]),
        ("a.parquet", "", ["the file is empty"]),
        ("a.json", "[]", ["no rows"]),
        ("a.json", "{}", ["no rows"]),
        ("a.csv", "instruction,output\n", ["no rows"]),
        ("a.jsonl", '{"a": 1}\n\n{"a": 2\n{"a": 3}', ["line 3", "not valid JSON"]),
        ("a.json", '[{"a": 1},\n {"a": 2}\n {"a": 3}]', ["line 3", "not valid JSON"]),
        ("a.json", '{"a": 1}\n{"a": 2}\noops', ["line 3", "not valid JSON"]),
        ("a.json", '[{"a": 1}]\n[{"a": 2}]', ["line 2", "not valid JSON"]),
        ("a.jsonl", '{"a": 1}\n[1, 2]\n', ["line 2", "expected an object", "array"]),
        ("a.jsonl", '{"a": 1}\n"text"\n', ["line 2", "expected an object", "string"]),
        ("a.jsonl", "null\n", ["line 1", "expected an object", "null"]),
        ("a.json", '[{"a": 1}, 2]', ["row 2", "expected an object", "number"]),
        ("a.json", "true", ["boolean", "expected an array"]),
        ("a.csv", 'instruction,output\na,b\n"c,d\n', ["not valid CSV"]),
        ("a.csv", "instruction,output\na,b\nc,d,e\n", ["line 3", "3 cells, and the header 2 names"]),
        ("a.csv", "instruction,output\na,b,c\nc,d,e\n", ["2 of 2 rows are bad", "line 2: has 3 cells", "line 3"]),
        ("a.csv", 'instruction,output\n"a"b,c\n', ["line 2", "not valid CSV"]),
        ("a.csv", "output,instruction,output\na,b,c\n", ["the name 'output' occurs twice in the header"]),
        ("a.csv.gz", b"no gzip", ["cannot be read"]),
        ("a.parquet.gz", b"x", ["unknown file type", "compressed: .json, .jsonl, .csv alone"]),
        ("a.parquet", "PAR1 and no more", ["not a valid Parquet file"]),
        ("a.jsonl", b'{"a": "\xff\xfe"}', ["not UTF-8", "byte 7"]),
        ("a.csv", b"instruction,output\na,\xff\n", ["not UTF-8"]),
        ("a.txt", "text", ["unknown file type", ".jsonl"]),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str | bytes, messages: list[str]) -> None:
    path = write(tmp_path / name, content)
    message = refused(path)
    assert all(part in message for part in [path, *messages])


def test_an_error_in_a_folder_names_the_file(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", json_lines(ROWS))
    bad = write(tmp_path / "b.jsonl", json_lines(ROWS) + "{")
    assert f"{bad}, line 4" in refused(tmp_path)


def test_columns_of_different_types_are_nobody_s(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A column that is not read breaks nothing: JSON keeps its values, of Parquet files it is left out and named."""
    for folder, kind in (("lines", "jsonl"), ("tables", "parquet")):
        (tmp_path / folder).mkdir()
        for name, value in (("a", 1), ("b", [{"x": 1}])):
            rows = [{"instruction": name, "id": value}]
            if kind == "jsonl":
                write(tmp_path / folder / f"{name}.jsonl", json_lines(rows))
            else:
                pandas.DataFrame(rows).to_parquet(tmp_path / folder / f"{name}.parquet")
    assert load_records(str(tmp_path / "lines"))["id"][:] == [1, [{"x": 1}]]
    assert load_records(str(tmp_path / "tables")).to_list() == [{"instruction": "a"}, {"instruction": "b"}]
    assert "with different types: 'id'" in caplog.text


@pytest.mark.parametrize("name", ["./missing", "/no/such/data.json", "data.jsonl", "a/b/c", "~/missing"])
def test_a_path_that_does_not_exist(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "load_dataset", lambda *_, **__: pytest.fail("asked the hub for a path"))
    message = refused(name, flag="--eval_dataset_name_or_path")
    assert f"--eval_dataset_name_or_path {name}: no such file or folder" in message


def test_a_folder_without_data(tmp_path: Path) -> None:
    assert "no .json, .jsonl, .csv, .parquet file" in refused(tmp_path)


def test_hub_data_offline() -> None:
    message = refused("nobody/nothing", flag="--eval_dataset_name_or_path")
    assert message.startswith("--eval_dataset_name_or_path nobody/nothing: ")
    assert "HF_HUB_OFFLINE" in message


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub. Ask."), "HF_TOKEN"),
        (ValueError("Unknown split \"train\". Should be one of ['test'].\nmore"), "Should be one of ['test']"),
        (RuntimeError("Dataset scripts are no longer supported, but found b.py"), "scripts are no longer supported"),
    ],
)
def test_hub_failures(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, split: str) -> None:
        raise error

    monkeypatch.setattr(records, "load_dataset", fail)
    assert message in refused("a/b")


def test_hub_data(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None = None, *, split: str) -> Dataset:
        asked.append((name, config, split))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr(records, "load_dataset", load_dataset)
    assert load_records("a/b", role="validation").to_list() == ROWS
    load_records("a/b", split="train_sft", config="main")
    assert asked == [("a/b", None, "validation"), ("a/b", "main", "train_sft")]


def test_several_configurations_of_a_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = "Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']\nExample"
    monkeypatch.setattr(records, "load_dataset", lambda *_, **__: raised(ValueError(missing)))
    message = refused("a/b", role="validation")
    assert "['main', 'socratic']" in message and "Choose one with --eval_dataset_config" in message
    unknown = "Unknown split \"train\". Should be one of ['train_sft', 'train_gen']."
    monkeypatch.setattr(records, "load_dataset", lambda *_, **__: raised(ValueError(unknown)))
    message = refused("a/b")
    assert "'train_gen'" in message and "Choose one with --dataset_split" in message


@pytest.mark.parametrize("card", [False, True])
def test_folders_of_a_hub_data_set_that_its_readme_does_not_tell_apart(
    card: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` joins them, unless the README says which belong together."""
    files = [f"hf://datasets/a/b@0af3/{name}/train-00000-of-00001.parquet" for name in ("main", "socratic")]
    builder = SimpleNamespace(config=SimpleNamespace(data_files={"train": files}))
    cards = SimpleNamespace(load=lambda _: SimpleNamespace(data={"configs": ["all"]} if card else {}))
    monkeypatch.setattr(records, "load_dataset", lambda *_, **__: Dataset.from_list(ROWS))
    monkeypatch.setattr(records, "load_dataset_builder", lambda _: builder)
    monkeypatch.setattr(records, "DatasetCard", cards)
    if card:
        assert load_records("a/b").to_list() == ROWS
    else:
        assert "several configurations (main, socratic)" in refused("a/b")


def raised(error: Exception) -> None:
    raise error


def test_require_columns() -> None:
    dataset = Dataset.from_list([{"question": "a", "answer": "b", "input": "c"}])
    require_columns(dataset, ("question",), "here")
    with pytest.raises(UserError) as error:
        require_columns(dataset, ("instruction", "output", "input"), "--dataset_name_or_path x")
    assert str(error.value).startswith("--dataset_name_or_path x: no column 'instruction', 'output'. It has 'question'")


def test_run_command(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> None:
        raise error

    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: fail(UserError("file x, line 3: broken")))
    assert exit_.value.code == 2
    assert capsys.readouterr() == ("", "error: file x, line 3: broken\n")
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: fail(KeyboardInterrupt()))
    assert exit_.value.code == 130
    with pytest.raises(ZeroDivisionError):  # a defect keeps its traceback
        run_command(lambda: fail(ZeroDivisionError()))
    done = []
    run_command(lambda: done.append(1))
    assert done == [1]


def test_real_data(shared: Path) -> None:
    dataset = load_records(str(shared / "data" / "alpaca_en.train.jsonl"))
    assert dataset.num_rows == 900
    require_columns(dataset, ("instruction", "input", "output"), "alpaca")
