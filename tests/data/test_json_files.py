"""JSON Lines and JSON: record by record, in bounded memory, with the place of whatever is wrong."""

import bz2
import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow
import pytest

from tokentune.data.formats import json_files
from tokentune.data.formats.json_files import parse_json, read_json, read_json_lines
from tokentune.errors import UserError


def refused(path: Path) -> str:
    """What is said of the file, or of its one bad row."""
    reader = read_json_lines if path.suffixes[0] == ".jsonl" else read_json
    try:
        (error,) = (row for row in reader(path) if isinstance(row, UserError))
    except UserError as raised:
        error = raised
    assert str(error).startswith(str(path))
    return str(error)


def test_a_line_of_a_gigabyte_is_refused_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"text": "fine"}\n{"text": "')
        file.truncate(2**30)  # a sparse file: the rest is zeros, and takes no disk
    tracemalloc.start()
    try:
        message = refused(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * json_files.MOST_LINE_BYTES
    finally:
        tracemalloc.stop()
    assert "line 2: longer than 64 MiB" in message


def test_the_longest_line_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "MOST_LINE_BYTES", 40)
    path = tmp_path / "a.jsonl"
    for size, fits in ((27, True), (28, False)):
        line = json.dumps({"text": "x" * size}) + "\n"
        assert (len(line) <= 40) is fits
        path.write_text(line)
        if fits:
            assert list(read_json_lines(path)) == [{"text": "x" * size}]
        else:
            assert "line 1: longer" in refused(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_lines_are_read_one_at_a_time(suffix: str, tmp_path: Path) -> None:
    """20 MB of JSON Lines, whatever the file is called, with one record in memory."""
    path = tmp_path / f"a{suffix}"
    line = json.dumps({"text": "x" * 100_000}) + "\n"
    with open(path, "w") as file:
        for _ in range(200):
            file.write(line)
    tracemalloc.start()
    try:
        assert sum(1 for _ in (read_json_lines if suffix == ".jsonl" else read_json)(path)) == 200
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()


def test_a_json_file_that_is_too_large_to_be_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "MOST_JSON_BYTES", 10)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "x"}]))
    assert "Convert it to JSON Lines" in refused(path)
    path.write_text('{"text": "x"}\n{"text": "y"}\n')
    assert len(list(read_json(path))) == 2


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 1: cannot be read: nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line 1: cannot be read: Exceeds the limit"),
        (b'{"a": 1}\n{"a": "\xff"}', "not UTF-8 text (byte 16)"),
        (b'\xef\xbb\xbf{"a": 1}\n{"a"}', "line 2: not valid JSON"),
        (b'{"a": 1}\r\n\x00\r\n', "line 2: not valid JSON"),
        (b'{"a": 1}{"a": 2}', "line 1: not valid JSON: Extra data"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8 text (byte 0)"),
        (b"\n \n", "the file is empty"),
    ],
)
def test_bad_lines(content: bytes, part: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert part in refused(path)


def test_bad_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content, part in (
        (b"[" * 100_000, "nested too deeply"),
        (b"[" + b"9" * 5000 + b"]", "Exceeds the limit"),
        (b'[{"a": 1},\n{"a": \xff}]', "not UTF-8 text (byte 17)"),
        (b'{"a": 1}\noops', "line 2"),
    ):
        path.write_bytes(content)
        assert part in refused(path)


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": 1, "b": 2, "a": 3}\n', "line 2: cannot be read: the name 'a' occurs twice"),
        ("a.jsonl", b'{"m": [{"role": "user", "role": "tool"}]}\n', "line 1: cannot be read: the name 'role' occurs"),
        ("a.json", b'[{"a": 1, "a": 1}]', "cannot be read: the name 'a' occurs twice"),
        ("a.json", b'{"a": 1, "a": 2}\n{"a": 3}\n', "line 1: cannot be read: the name 'a' occurs twice"),
    ],
)
def test_a_name_that_occurs_twice(name: str, content: bytes, part: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert part in refused(path)


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_is_no_json_lines(indent: int | None, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": "a"}, {"text": "b"}]
    path.write_text(json.dumps(rows, indent=indent) + "\n")
    assert refused(path) == f"{path}: holds one JSON array, not a row in each line: rename it to a.json."
    assert list(read_json(path.rename(tmp_path / "a.json"))) == rows
    path.write_text("[" + ",\n".join(map(json.dumps, rows)) + "]")
    assert "rename it to a.json" in refused(path)
    for first in (json.dumps(rows), "[oops]"):  # a bad row among others
        path.write_text(f'{first}\n{{"text": "a"}}\n')
        assert refused(path).startswith(f"{path}, line 1: ")


COMPRESSED = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda c: pyarrow.Codec("zstd").compress(c).to_pybytes(),
}


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_compressed_files(suffix: str, tmp_path: Path) -> None:
    rows = [{"text": "é" * n} for n in range(300)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for name, content in (("a.jsonl", lines), ("b.json", json.dumps(rows).encode()), ("c.json", lines)):
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(COMPRESSED[suffix](content))
        assert list((read_json_lines if name == "a.jsonl" else read_json)(path)) == rows
    path = tmp_path / f"bad.jsonl{suffix}"
    path.write_bytes(COMPRESSED[suffix](b'{"a": 1}\n{"a": "\xff"}'))
    assert "not UTF-8 text (byte 16)" in refused(path)


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_a_compressed_file_that_is_cut_short(suffix: str, tmp_path: Path) -> None:
    """Not the end of the data: some readers stop there without a word."""
    path = tmp_path / f"a.jsonl{suffix}"
    content = "".join(json.dumps({"n": str(n) * 9}) + "\n" for n in range(5000)).encode()
    path.write_bytes(COMPRESSED[suffix](content)[:-20])
    with pytest.raises(OSError, match="Truncated"):
        list(read_json_lines(path))


def test_numbers_that_json_has_not() -> None:
    assert parse_json('[NaN, -Infinity, 1e999, "\\u2028"]') == [None, None, float("inf"), "\u2028"]
