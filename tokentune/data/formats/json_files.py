"""JSON and JSON Lines: records one after another, each with its place in the file, in bounded memory.

A JSON Lines file is read line by line, and a line is refused before more than `MOST_LINE_BYTES` of it are in memory. A
JSON array has to be held whole, so files above `MOST_JSON_BYTES` are to be converted.

A row that is wrong while the file can be read on is yielded as the `UserError` that describes it, so that the caller
can count such rows; what makes the rest of the file unreadable is raised.
"""

import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow

from tokentune.errors import UserError
from tokentune.sources import COMPRESSIONS, first_line

MOST_LINE_BYTES = 64 * 2**20  # a document of a million words has 6 MB
MOST_JSON_BYTES = 2**30  # about five times as much once it is parsed
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # as Windows programs write it; no text


class RepeatedName(ValueError):
    """A JSON object that has a name twice: which of the values is meant cannot be told."""


def read_json_lines(path: Path) -> Iterator[dict | UserError]:
    """The objects of a JSON Lines file, blank lines left out.

    Yields:
        An object, or what is wrong with a line (with its number) that is no JSON or no object.

    Raises:
        UserError: a line that is too long, no UTF-8 (with its place); an empty file.
        OSError: the file cannot be read.
    """
    found = False
    for number, line in text_lines(path):
        if line.strip():
            found = True
            yield _parse_line(line, path, number)
    if not found:
        raise UserError(f"{path}: the file is empty.")


def read_json(path: Path) -> Iterator[dict | UserError]:
    """The objects of a `.json` file: an array, {"data": array}, one object, or JSON Lines under a wrong name.

    Yields:
        An object, or what is wrong with an element that is none.

    Raises:
        UserError, OSError: as `read_json_lines`; no JSON; larger than `MOST_JSON_BYTES` and no JSON Lines.
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
        if isinstance(record, dict):
            yield record
        else:
            yield UserError(f"{path}, row {row}: expected an object, found a JSON {json_type(record)}.")


def open_bytes(path: Path) -> BinaryIO:
    """A file's content, decompressed where its name ends in one of `COMPRESSIONS`. Raises OSError."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return open(path, "rb")
    # Arrow reports a file that is cut short, which some readers take for the end of the data.
    return io.BufferedReader(pyarrow.CompressedInputStream(str(path), compression))


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text with its line break) of every line, without a byte order mark.

    Lines end at a line feed alone: JSON allows U+2028 and the like within a text.

    Raises:
        UserError: a line that is too long, or no UTF-8.
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
            mark = len(BYTE_ORDER_MARK) if number == 1 and line.startswith(BYTE_ORDER_MARK) else 0
            try:
                yield number, line[mark:].decode("utf-8")
            except UnicodeDecodeError as error:
                raise not_text(path, offset + mark + error.start) from error
            offset += len(line)


def parse_json(text: str) -> Any:
    """What a JSON text holds; NaN, which JSON has not but Python writes (pandas' missing values), is null.

    Raises:
        json.JSONDecodeError: no JSON.
        RepeatedName: an object that has a name twice.
        ValueError: JSON that Python does not take: nested too deeply, or an integer of thousands of digits.
    """
    try:
        return json.loads(text, parse_constant=lambda _: None, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise RepeatedName(name_twice(name for name, _ in pairs))
    return record


def name_twice(names: Iterable[str]) -> str | None:
    """What to say of the first name that occurs more than once; None where none does."""
    return next((f"the name {name!r:.60} occurs twice" for name, n in Counter(names).items() if n > 1), None)


def json_type(value: Any) -> str:
    """JSON's word for the type of a parsed value."""
    names = {list: "array", dict: "object", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def not_text(path: Path, byte: int) -> UserError:
    """What to say of a file with a byte that no UTF-8 text has."""
    return UserError(f"{path}: not UTF-8 text (byte {byte}). Convert it, e.g. with iconv.")


def _parsed(text: str, path: Path, line: int | None = None) -> Any:
    """What a line, or without one the whole file, holds. Raises UserError."""
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        reason = f"{error.msg.removesuffix(' at')} (column {error.colno})"  # a position follows the parser's own "at"
        raise UserError(f"{path}, line {line or error.lineno}: not valid JSON: {reason}.") from error
    except ValueError as error:
        where = path if line is None else f"{path}, line {line}"
        raise UserError(f"{where}: cannot be read: {first_line(error)}.") from error


def _parse_line(line: str, path: Path, number: int) -> dict | UserError:
    try:
        record = _parsed(line, path, number)
    except UserError as error:
        return error
    if not isinstance(record, dict):
        return UserError(f"{path}, line {number}: expected an object, found a JSON {json_type(record)}.")
    return record


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


def _parse_whole(path: Path) -> Any:
    content = bytearray()
    with open_bytes(path) as file:
        while chunk := file.read(2**20):
            content += chunk
            if len(content) > MOST_JSON_BYTES:
                raise UserError(
                    f"{path}: more than {MOST_JSON_BYTES / 2**30:.1f} GiB of JSON in one piece would have to be held "
                    "in memory whole. Convert it to JSON Lines (one row in each line, .jsonl)."
                )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_text(path, error.start) from error
    if not text.strip():
        raise UserError(f"{path}: the file is empty.")
    return _parsed(text, path)
