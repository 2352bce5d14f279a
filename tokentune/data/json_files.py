"""JSON and JSON Lines: records one after another, each with its place in the file, in bounded memory.

A JSON Lines file is read line by line, and a line is refused before more than `MOST_LINE_BYTES` of it are in memory. A
JSON array has to be held whole, so files above `MOST_JSON_BYTES` are to be converted.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tokentune.data.sources import first_line
from tokentune.errors import UserError

MOST_LINE_BYTES = 64 * 2**20  # a document of a million words has 6 MB
MOST_JSON_BYTES = 2**30  # about five times as much once it is parsed
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # as Windows programs write it; no text


def read_json_lines(path: Path) -> Iterator[dict]:
    """The objects of a JSON Lines file, blank lines left out.

    Raises:
        UserError: a line that is too long, no UTF-8, no JSON or no object (with its number); an empty file.
        OSError: the file cannot be read.
    """
    number = offset = found = 0
    with open(path, "rb") as file:
        while line := _next_line(file, path, number + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if line.strip():
                found += 1
                yield _parse_line(line, path, number, offset)
            offset = file.tell()
    if not found:
        raise UserError(f"{path}: the file is empty.")


def read_json(path: Path) -> Iterator[dict]:
    """The objects of a `.json` file: an array, {"data": array}, one object, or JSON Lines under a wrong name.

    Raises:
        UserError, OSError: as `read_json_lines`; larger than `MOST_JSON_BYTES` and no JSON Lines.
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
        if not isinstance(record, dict):
            raise UserError(f"{path}, row {row}: expected an object, found a JSON {json_type(record)}.")
        yield record


class BoundedLines(io.RawIOBase):
    """A binary file, for a reader that holds whole lines: refuses one that is longer than `MOST_LINE_BYTES`."""

    def __init__(self, path: Path) -> None:
        """Raises OSError: the file cannot be read."""
        super().__init__()
        self.path, self._file = path, open(path, "rb", buffering=0)  # noqa: SIM115 (closed with this object)
        self._line, self._length = 1, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """
        Raises:
            UserError: a line that is too long, with its number.
        """
        size = self._file.readinto(buffer)
        content = bytes(memoryview(buffer)[:size])
        end = content.find(b"\n")
        self._length += size if end < 0 else end
        if self._length > MOST_LINE_BYTES:
            raise line_too_long(self.path, self._line)
        if end >= 0:
            self._length = size - content.rfind(b"\n") - 1
            self._line += content.count(b"\n")
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def line_too_long(path: Path, number: int) -> UserError:
    """What to say of a line that would not fit into memory."""
    return UserError(
        f"{path}, line {number}: longer than {MOST_LINE_BYTES / 2**20:.0f} MiB. A line holds one row: split this one, "
        "or give the file the ending of what it is (.json for an array)."
    )


def parse_json(text: str) -> Any:
    """What a JSON text holds; NaN, which JSON has not but Python writes (pandas' missing values), is null.

    Raises:
        json.JSONDecodeError: no JSON.
        ValueError: JSON that Python does not take: nested too deeply, or an integer of thousands of digits.
    """
    try:
        return json.loads(text, parse_constant=lambda _: None)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def json_type(value: Any) -> str:
    """JSON's word for the type of a parsed value."""
    names = {list: "array", dict: "object", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def not_text(path: Path, byte: int) -> UserError:
    """What to say of a file with a byte that no UTF-8 text has."""
    return UserError(f"{path}: not UTF-8 text (byte {byte}). Convert it, e.g. with iconv.")


def _next_line(file: BinaryIO, path: Path, number: int) -> bytes:
    line = file.readline(MOST_LINE_BYTES + 1)  # not split at U+2028 and the like, which JSON allows within a text
    if len(line) > MOST_LINE_BYTES:
        raise line_too_long(path, number)
    return line


def _reason(error: json.JSONDecodeError) -> str:
    """What is wrong with the JSON and where; the parser's own words end in "at", for a position to follow."""
    return f"{error.msg.removesuffix(' at')} (column {error.colno})"


def _parse_line(line: bytes, path: Path, number: int, offset: int) -> dict:
    try:
        record = parse_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise not_text(path, offset + error.start) from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number}: not valid JSON: {_reason(error)}.") from error
    except ValueError as error:
        raise UserError(f"{path}, line {number}: cannot be read: {first_line(error)}.") from error
    if not isinstance(record, dict):
        raise UserError(f"{path}, line {number}: expected an object, found a JSON {json_type(record)}.")
    return record


def _holds_lines(path: Path) -> bool:
    """Whether the first line is a whole object, and more follows."""
    with open(path, "rb") as file:
        line = file.readline(MOST_LINE_BYTES).removeprefix(BYTE_ORDER_MARK)
        if not line.endswith(b"\n") or not line.lstrip().startswith(b"{"):
            return False
        try:
            parse_json(line.decode("utf-8"))
        except ValueError:
            return False
        return any(chunk.strip() for chunk in iter(lambda: file.read(2**16), b""))


def _parse_whole(path: Path) -> Any:
    size = path.stat().st_size
    if size > MOST_JSON_BYTES:
        raise UserError(
            f"{path}: {size / 2**30:.1f} GiB of JSON in one piece would have to be held in memory whole. "
            "Convert it to JSON Lines (one row in each line, .jsonl)."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
        if not text.strip():
            raise UserError(f"{path}: the file is empty.")
        return parse_json(text)
    except UnicodeDecodeError as error:
        raise not_text(path, error.start) from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON: {_reason(error)}.") from error
    except ValueError as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}.") from error
