"""Rows one after another, as dicts with their place for messages, from wherever `--dataset_name_or_path` leads.

`load_records` (`records.py`) makes one table of all rows, which needs columns of one type each; here every row stands
for itself, nested values stay as the file has them, and memory holds a few rows at a time.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import pyarrow.parquet
from datasets import Dataset, IterableDataset

from tokentune.data.json_files import BoundedLines, read_json, read_json_lines
from tokentune.data.records import (
    CSV_ERRORS,
    csv_error,
    is_saved_dataset,
    load_from_hub,
    load_saved,
    local_path,
    split_files,
    unknown_suffix,
)
from tokentune.data.sources import first_line
from tokentune.errors import UserError

ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class RecordSource:
    """One data set of the command line, opened: files, or a table of the `datasets` library.

    Iterating reads it from its beginning, whenever that is done.
    """

    name: str
    flag: str
    files: tuple[Path, ...] = ()
    table: Dataset | IterableDataset | None = None

    @property
    def where(self) -> str:
        """For messages about the whole of it."""
        return f"{self.flag} {self.name}"

    def peek(self) -> tuple[list[str], dict[str, Any]]:
        """The names of its columns, those of the first row in JSON, and the first row.

        Raises:
            UserError: it cannot be read, or holds no rows.
        """
        for _, record in self.records():
            return list(record), record
        raise UserError(f"{self.where}: holds no rows to train on.")

    def records(self, columns: Sequence[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """("file, row 3", row) for every row, in order; of tables only the given columns.

        Raises:
            UserError: malformed content, with file and line or row.
        """
        if self.table is not None:
            rows = _rows_of_table(self.table, columns, self.where)
            yield from ((f"{self.name}, row {number}", row) for number, row in enumerate(rows, start=1))
        for file in self.files:
            rows = _rows_of_file(file, columns, self.flag)
            yield from ((f"{file}, row {number}", row) for number, row in enumerate(rows, start=1))

    def fingerprint(self) -> str:
        """Changes when the content does: a hash of all files' bytes, and of what `datasets` made of tables."""
        digest, files = hashlib.sha256(), list(self.files)
        if isinstance(self.table, Dataset):
            files += [Path(file["filename"]) for file in self.table.cache_files]
        for file in files:
            with open(file, "rb") as opened:
                content = hashlib.file_digest(opened, "sha256")
            digest.update(f"{file.suffix.lower()} {content.hexdigest()}\n".encode())
        if isinstance(self.table, Dataset):
            digest.update(self.table._fingerprint.encode())
        return digest.hexdigest()


def open_source(name: str, *, flag: str, split: str, streaming: bool = False) -> RecordSource:
    """Finds a data set; of the hub's, downloads it, or with `streaming` only looks at it.

    Args:
        name: as `load_records` takes it.
        flag: the flag that named it.
        split: as `load_records` takes it.

    Raises:
        UserError: not found, unreachable or gated; no file of a known type, no such split.
    """
    path = local_path(name, flag)
    if path is None:
        return RecordSource(name, flag, table=load_from_hub(name, flag, split, streaming=streaming))
    if path.is_dir() and is_saved_dataset(path):
        return RecordSource(name, flag, table=load_saved(path, flag, split))
    return RecordSource(name, flag, files=tuple(split_files(path, flag, split) if path.is_dir() else [path]))


def _rows_of_file(path: Path, columns: Sequence[str] | None, flag: str) -> Iterator[dict[str, Any]]:
    readers = {
        ".json": read_json,
        ".jsonl": read_json_lines,
        ".csv": _rows_of_csv,
        ".parquet": lambda p: _rows_of_parquet(p, columns),
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise unknown_suffix(path, flag)
    try:
        yield from reader(path)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read: {error.strerror or first_line(error)}.") from error


def _rows_of_csv(path: Path) -> Iterator[dict[str, Any]]:
    try:
        # Every cell is text, as it stands: an answer "42", "NA" or "None" too. Only an empty one is missing.
        chunks = pandas.read_csv(
            BoundedLines(path),
            encoding="utf-8-sig",
            dtype=object,
            keep_default_na=False,
            na_values=[""],
            chunksize=ROWS_AT_ONCE,
        )
        with chunks:
            for frame in chunks:
                if not isinstance(frame.index, pandas.RangeIndex):  # pandas took surplus first cells for row names
                    raise UserError(f"{path}: the rows have more cells than the header has names.")
                yield from frame.where(frame.notna(), None).to_dict("records")
    except CSV_ERRORS as error:
        raise csv_error(path, error) from error


def _rows_of_parquet(path: Path, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty.")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            chosen = None if columns is None else [name for name in file.schema_arrow.names if name in columns]
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=chosen):
                yield from map(_without_nulls, batch.to_pylist())
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise UserError(f"{path}: not a valid Parquet file: {first_line(error)}") from error


def _rows_of_table(
    table: Dataset | IterableDataset, columns: Sequence[str] | None, where: str
) -> Iterator[dict[str, Any]]:
    names = table.column_names  # None: a streamed table that does not know them before its first row
    if columns is not None and names is not None:
        table = table.select_columns([name for name in names if name in columns])
    try:
        yield from map(_without_nulls, table)
    except (pyarrow.ArrowException, ValueError, OSError, RuntimeError) as error:
        raise UserError(f"{where}: cannot be read: {first_line(error)}") from error


def _without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """Arrow gives every struct of a column the same keys, null where it had none: those are left out again."""

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: clean(inner) for key, inner in value.items() if inner is not None}
        return [clean(inner) for inner in value] if isinstance(value, list) else value

    return {name: clean(value) for name, value in row.items()}
