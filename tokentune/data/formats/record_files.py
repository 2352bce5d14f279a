"""The rows of one file or table, one after another: JSON, JSON Lines, CSV and Parquet, and tables of `datasets`.

As in `data/formats/json_files.py`, a row that is wrong in a file that can be read on is yielded as a `UserError`.
"""

import csv
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice, zip_longest
from pathlib import Path, PurePath
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Dataset, IterableDataset

from tokentune.data.formats.json_files import (
    MOST_LINE_BYTES,
    RepeatedName,
    count_json_lines,
    name_twice,
    parse_json,
    read_json,
    read_json_lines,
    text_lines,
)
from tokentune.errors import UserError
from tokentune.sources import COMPRESSIONS, DATA_SUFFIXES, KINDS, first_line

ROWS_AT_ONCE = 1000
NOT_CONVERTED = (pyarrow.ArrowException, ValueError, OverflowError, LookupError)  # LookupError: an unknown time zone
Rows = Iterator[dict[str, Any] | UserError]


def chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of so many items; the last may be shorter."""
    items = iter(items)
    return iter(lambda: list(islice(items, size)), [])


def kind_of_file(path: Path) -> str | None:
    """The one of `sources.KINDS` in a file's name, compressed or not; None for a file that cannot be read."""
    ending = path.name[len(stem_of(path)) :].lower()
    return next((kind for kind in KINDS if kind in (ending, ending[: ending.rfind(".")])), None)


def stem_of(path: PurePath) -> str:
    """A file's name without the suffixes of its kind and compression."""
    ends = [suffix for suffix in DATA_SUFFIXES if path.name.lower().endswith(suffix)]
    return path.name[: -len(ends[0])] if ends else path.name


def file_hash(file: Path) -> str:
    """The SHA-256 of its content. Raises OSError."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def rows_of_file(path: Path, columns: Sequence[str] | None, flag: str) -> Rows:
    """The rows of a file, with the given columns alone (of JSON, with all). Raises UserError: as `readable`."""
    with readable(path, flag) as kind:
        if kind == ".parquet":
            yield from _rows_of_parquet(path, columns)
        elif kind == ".csv":
            yield from _rows_of_csv(path, columns)
        else:
            yield from read_json(path) if kind == ".json" else read_json_lines(path)


def columns_of_file(path: Path, flag: str) -> list[str] | None:
    """The names of a file's columns; None for JSON, whose rows have names of their own. Raises UserError."""
    with readable(path, flag) as kind:
        if kind == ".parquet":
            return parquet_schema(path).names
        return [name for name in next(_csv_records(path))[1] if name] if kind == ".csv" else None


def count_in_file(path: Path, flag: str) -> int | None:
    """The number of a file's rows, where no row has to be parsed for it; else None. Raises UserError."""
    with readable(path, flag) as kind:
        if kind == ".parquet":
            return pyarrow.parquet.read_metadata(path).num_rows
        return count_json_lines(path) if kind == ".jsonl" else None


@contextmanager
def readable(path: Path, flag: str) -> Iterator[str]:
    """To read a file within, of which it yields the kind. Raises UserError: it is of no known kind, or cannot be
    read."""
    kind = kind_of_file(path)
    if kind is None:
        compressed = "" if path.suffix.lower() not in COMPRESSIONS else f" (compressed: {', '.join(KINDS[:-1])} alone)"
        raise UserError(f"{flag} {path}: unknown file type; {', '.join(KINDS)} can be read{compressed}.")
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty.")
        yield kind
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read: {error.strerror or first_line(error)}.") from error
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        if kind != ".parquet":
            raise
        raise UserError(f"{path}: not a valid Parquet file: {first_line(error)}") from error


# ---- CSV -------------------------------------------------------------------------------------------------------------


def _rows_of_csv(path: Path, columns: Sequence[str] | None) -> Rows:
    """Every cell is text, unchanged: also an answer "42", "NA" or "None". Only an empty one is missing."""
    records = _csv_records(path)
    _, names = next(records)
    read = {name for name in names if name and (columns is None or name in columns)}
    for line, cells in records:
        if len(cells) > len(names):
            yield UserError(f"{path}, line {line}: has {len(cells)} cells, and the header {len(names)} names.")
        else:
            yield {name: cell or None for name, cell in zip_longest(names, cells) if name in read}


def _csv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of the header and of every row."""
    csv.field_size_limit(MOST_LINE_BYTES)
    # Some programs end lines with a carriage return alone. Within quotes the reader joins the pieces again.
    pieces = (piece for _, line in text_lines(path) for piece in re.split(r"(?<=\r)(?!\n)", line))
    reader = csv.reader(pieces, strict=True)
    names = None
    try:
        for cells in reader:
            if not cells or (len(cells) == 1 and cells[0].isspace()):
                continue
            if names is None and (twice := name_twice(filter(None, cells))):
                raise UserError(f"{path}: {twice} in the header. Rename or remove one of the columns.")
            names = names or cells
            yield reader.line_num, cells
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not valid CSV: {first_line(error)}.") from error
    if names is None:
        raise UserError(f"{path}: the file is empty.")


# ---- Arrow -----------------------------------------------------------------------------------------------------------


def parquet_schema(path: Path) -> pyarrow.Schema:
    """The columns of a Parquet file. Raises UserError: a name that occurs twice."""
    schema = pyarrow.parquet.read_schema(path)
    if twice := name_twice(schema.names):
        raise UserError(f"{path}: {twice} among its columns. Rename or remove one of them.")
    return schema


def _rows_of_parquet(path: Path, columns: Sequence[str] | None) -> Rows:
    chosen = [name for name in parquet_schema(path).names if columns is None or name in columns]
    with pyarrow.parquet.ParquetFile(path) as file:
        batches = file.iter_batches(batch_size=ROWS_AT_ONCE, columns=chosen)
        yield from _rows_of_arrow(map(pyarrow.table, batches), str(path))


def rows_of_table(table: Dataset | IterableDataset, columns: Sequence[str] | None, where: str) -> Rows:
    """The rows of a table of `datasets`, of which only the given columns are converted. Raises UserError: a value that
    cannot be converted; a stream that breaks off."""
    names = table.column_names  # None: a streamed table whose columns are not known before its first row
    if columns is not None and names is not None:
        chosen = [name for name in names if name in columns]
        if not chosen and isinstance(table, Dataset):  # a table without columns has no rows
            yield from ({} for _ in range(len(table)))
            return
        table = table.select_columns(chosen)
    # A stream's batches may differ in their types and cannot be joined. Unlike its `__iter__`, which gives each worker
    # of a loader some of the files, its `iter` reads all rows.
    size = ROWS_AT_ONCE if isinstance(table, Dataset) else 1
    try:
        yield from _rows_of_arrow(table.with_format("arrow").iter(batch_size=size), where)
    except (pyarrow.ArrowException, ValueError, OverflowError, OSError, RuntimeError) as error:
        raise UserError(f"{where}: cannot be read: {first_line(error)}") from error


def _rows_of_arrow(tables: Iterable[pyarrow.Table], where: str) -> Rows:
    number = 0
    for table in tables:
        try:
            shapes = _shapes(table.schema)
        except RepeatedName as error:
            raise UserError(f"{where}: {error} within a column. Rename or remove one of them.") from error
        for row in _converted(table) if table.num_columns else [{}] * len(table):
            number += 1
            try:
                yield {name: _cleaned(value, shapes[name]) for name, value in row.items()}
            except ValueError as error:
                yield UserError(f"{where}, row {number}: a value of type JSON cannot be read: {first_line(error)}.")


class Unconverted:
    """A value that Python has no value for, such as a date after the year 9999: whoever needs it refuses it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __repr__(self) -> str:
        return f"a value of type {self.kind} that Python cannot represent"


def _converted(table: pyarrow.Table) -> list[dict[str, Any]]:
    with suppress(*NOT_CONVERTED):
        return table.to_pylist()
    columns = [[_python_value(scalar) for scalar in column] for column in table.columns]
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]


def _python_value(scalar: pyarrow.Scalar) -> Any:
    with suppress(*NOT_CONVERTED):
        return scalar.as_py()
    if isinstance(scalar, pyarrow.StructScalar):
        return {name: _python_value(scalar[name]) for name in scalar}
    if isinstance(scalar, pyarrow.ListScalar) and not isinstance(scalar, pyarrow.MapScalar):
        return [_python_value(item) for item in scalar.values]
    return Unconverted(str(scalar.type))


_JSON = "json"


def _shapes(schema: pyarrow.Schema) -> dict[str, Any]:
    return {field.name: _shape(field.type) for field in schema}


def _shape(kind: pyarrow.DataType) -> Any:
    """Where a type has JSON in it: `_JSON` itself, {field: shape}, [shape of the items], or None for nowhere.

    Raises:
        RepeatedName: by a struct.
    """
    if isinstance(kind, pyarrow.JsonType):
        return _JSON
    if pyarrow.types.is_struct(kind):
        if twice := name_twice(field.name for field in kind):
            raise RepeatedName(twice)
        shapes = {field.name: _shape(field.type) for field in kind}
        return shapes if any(shapes.values()) else None
    item = _shape(kind.value_type) if hasattr(kind, "value_type") else None
    return None if item is None else [item]


def _cleaned(value: Any, shape: Any) -> Any:
    """The value as in a JSON Lines file.

    In Arrow every struct of a column has the same keys, null where a row had none: these are removed. JSON, which Arrow
    keeps as text, keeps its nulls.
    """
    if shape is _JSON:
        return parse_json(value) if isinstance(value, str) else value
    if isinstance(value, Mapping):
        shapes = shape or {}
        return {k: _cleaned(v, shapes.get(k)) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        item = shape[0] if shape else None
        return [_cleaned(inner, item) for inner in value]
    return value
