"""JSON and JSON Lines: records one after another, each with its place in the file, in bounded memory.

A JSON Lines file is read line by line, and no more than `MOST_LINE_BYTES` of a line. A JSON array has to be held in
memory whole, so files above `MOST_JSON_BYTES` are refused.

A row that is wrong in a file that can be read on is yielded as the `UserError` that describes it, so that the caller
can count such rows. What makes the rest of the file unreadable is raised.
"""

import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow

from tokentune.errors import UserError
from tokentune.sources import COMPRESSIONS, first_line

MOST_LINE_BYTES = 64 * 2**20  # a document of a million words has 6 MB
MOST_JSON_BYTES = 2**30  # parsed, it takes about five times as much
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # which Windows programs write in front of the text


class RepeatedName(ValueError):
    """A JSON object that has a name twice: it is not known which of the values is meant."""


def read_json_lines(path: Path) -> Iterator[dict | UserError]:
    """The objects of a JSON Lines file, or what is wrong with a line; blank lines are skipped.

    Raises:
        UserError: a line that is too long or not UTF-8; an empty file, or one JSON array.
        OSError: the file cannot be read.
    """
    found = False
    for number, line in text_lines(path):
        if line.strip():
            if not found and line.lstrip().startswith("[") and _holds_array(path):
                name = path.name.replace(".jsonl", ".json")
                raise UserError(f"{path}: holds one JSON array, not a row in each line: rename it to {name}.")
            found = True
            try:
                yield _object(_parsed(line, path, number), f"{path}, line {number}")
            except UserError as error:
                yield error
    if not found:
        raise UserError(f"{path}: the file is empty.")


def count_json_lines(path: Path) -> int:
    """The number of lines that are not blank. Raises OSError."""
    with open_bytes(path) as file:
        return sum(not line.isspace() for line in iter(lambda: file.readline(MOST_LINE_BYTES), b""))


def read_json(path: Path) -> Iterator[dict | UserError]:
    """The objects of a `.json` file, or what is wrong with an element: an array, {"data": array}, one object, or JSON
    Lines with a wrong suffix.

    Raises:
        UserError, OSError: as `read_json_lines`; not JSON; larger than `MOST_JSON_BYTES` and not JSON Lines.
    """
    if _holds_lines(path):
        yield from read_json_lines(path)
        return
    content = _parse_whole(path)
    if isinstance(content, dict):
        content = content["data"] if isinstance(content.get("data"), list) else [content]
    if not isinstance(content, list):
        raise UserError(f"{path}: holds a JSON {json_type(content)}; expected an array of objects.")
    for row, record in enumerate(content, start=1):
        yield _object(record, f"{path}, row {row}")


def _object(value: Any, where: str) -> dict | UserError:
    if isinstance(value, dict):
        return value
    return UserError(f"{where}: expected an object, found a JSON {json_type(value)}.")


def open_bytes(path: Path) -> BinaryIO:
    """A file's content, decompressed if its name ends in one of `COMPRESSIONS`. Raises OSError."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return open(path, "rb")
    # Arrow raises where a file is cut short, which other readers take for the end of the data.
    return io.BufferedReader(pyarrow.CompressedInputStream(str(path), compression))


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text with its line feed) of every line. Other line breaks are text: JSON allows U+2028 in a string.

    Raises:
        UserError: a line that is too long or not UTF-8.
        OSError: the file cannot be read.
    """
    number = offset = 0
    with open_bytes(path) as file:
        while line := file.readline(MOST_LINE_BYTES + 1):
            number += 1
            if len(line) > MOST_LINE_BYTES:
                raise UserError(
                    f"{path}, line {number}: longer than {MOST_LINE_BYTES / 2**20:.0f} MiB. A line holds one row: "
                    "split this one, or give the file the ending of what it is (.json for an array)."
                )
            text = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            offset += len(line)
            yield number, _decoded(text, path, offset - len(text))


def parse_json(text: str) -> Any:
    """The value of a JSON text. NaN, which Python writes although it is not JSON (pandas' missing values), is null.

    Raises:
        json.JSONDecodeError: not JSON.
        RepeatedName: an object that has a name twice.
        ValueError: JSON that Python does not read: nested too deeply, or an integer of thousands of digits.
    """
    try:
        return json.loads(text, parse_constant=lambda _: None, object_pairs_hook=_without_repeats)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise RepeatedName(name_twice(name for name, _ in pairs))
    return record


def name_twice(names: Iterable[str]) -> str | None:
    """The message about the first name that occurs more than once; None where none does."""
    return next((f"the name {name!r:.60} occurs twice" for name, n in Counter(names).items() if n > 1), None)


def json_type(value: Any) -> str:
    """JSON's word for the type of a parsed value."""
    names = {list: "array", dict: "object", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _decoded(content: bytes, path: Path, offset: int = 0) -> str:
    """`offset`: bytes of the file in front of the content. Raises UserError."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = offset + error.start
        raise UserError(f"{path}: not UTF-8 text (byte {byte}). Convert it, e.g. with iconv.") from error


def _parsed(text: str, path: Path, line: int | None = None) -> Any:
    """The value of a line, or without a number of the whole file. Raises UserError."""
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        reason = f"{error.msg.removesuffix(' at')} (column {error.colno})"  # a position follows the parser's own "at"
        raise UserError(f"{path}, line {line or error.lineno}: not valid JSON: {reason}.") from error
    except ValueError as error:
        where = path if line is None else f"{path}, line {line}"
        raise UserError(f"{where}: cannot be read: {first_line(error)}.") from error


def _holds_lines(path: Path) -> bool:
    """Whether the first line is a whole object, and more follows."""
    with open_bytes(path) as file:
        line = file.readline(MOST_LINE_BYTES).removeprefix(BYTE_ORDER_MARK)
        if not line.endswith(b"\n") or not line.lstrip().startswith(b"{"):
            return False
        try:
            parse_json(line.decode("utf-8"))
        except RepeatedName:  # whole all the same
            pass
        except ValueError:
            return False
        return any(chunk.strip() for chunk in iter(lambda: file.read(2**16), b""))


def _holds_array(path: Path) -> bool:
    """Whether a file whose first line begins an array has nothing but this array."""
    lines = (line for _, line in text_lines(path) if line.strip())
    first = next(lines)
    try:
        parse_json(first)
    except json.JSONDecodeError as error:
        return error.pos >= len(first.rstrip())  # the line is right as far as it goes
    except ValueError:
        return False
    return next(lines, None) is None


def _parse_whole(path: Path) -> Any:
    with open_bytes(path) as file:
        pieces = iter(lambda: file.read(2**20), b"")
        content = b"".join(islice(pieces, MOST_JSON_BYTES // 2**20 + 1))
    if len(content) > MOST_JSON_BYTES:
        raise UserError(
            f"{path}: more than {MOST_JSON_BYTES / 2**30:.1f} GiB of JSON in one piece would have to be held in memory "
            "whole. Convert it to JSON Lines (one row in each line, .jsonl)."
        )
    text = content.removeprefix(BYTE_ORDER_MARK)
    text = _decoded(text, path, len(content) - len(text))
    if not text.strip():
        raise UserError(f"{path}: the file is empty.")
    return _parsed(text, path)
