"""Files as one table in memory, whose columns have one type each."""

import json
import logging
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet
from datasets import Dataset, Features, concatenate_datasets

from tokentune.data.formats.bad_rows import BadRows
from tokentune.data.formats.record_files import kind_of_file, parquet_schema, readable, rows_of_file
from tokentune.errors import UserError
from tokentune.sources import first_line, listed

logger = logging.getLogger(__name__)

CSV_TYPES = (pyarrow.int64(), pyarrow.float64(), pyarrow.bool_())  # of a CSV file's column, besides text


def table_of_files(files: Sequence[Path], flag: str, text_columns: Sequence[str], bad: BadRows) -> Dataset:
    """All rows, with all columns that can be used.

    Args:
        text_columns: stay text where a CSV file has them.
        bad: counts the rows that cannot be read; in their place the table has rows without any value.

    Raises:
        UserError: a file cannot be read, or the files do not fit together.
    """
    parts: list[Dataset] = []
    for parquet, group in groupby(files, key=lambda file: kind_of_file(file) == ".parquet"):
        if parquet:
            parts += [_parquet_table(file, flag) for file in group]
        else:
            parts.append(_table_of_rows(group, flag, text_columns, bad, sum(map(len, parts))))
    return _joined(parts, flag)


def _parquet_table(path: Path, flag: str) -> Dataset:
    """A Parquet file without the columns whose type `datasets` does not know."""
    with readable(path, flag):
        known = [field.name for field in parquet_schema(path) if _has_feature(field)]
        return Dataset(pyarrow.parquet.read_table(path, columns=known))


def _has_feature(field: pyarrow.Field) -> bool:
    try:
        return bool(Features.from_arrow_schema(pyarrow.schema([field])))
    except ValueError:
        return False


def _joined(parts: list[Dataset], where: str) -> Dataset:
    """The tables as one, without the columns whose type differs between them."""
    try:
        return concatenate_datasets(parts)
    except (ValueError, TypeError, pyarrow.ArrowException):
        names = dict.fromkeys(name for part in parts for name in part.column_names)
        types = {name: [part.features[name] for part in parts if name in part.column_names] for name in names}
        differing = [name for name, kinds in types.items() if any(kind != kinds[0] for kind in kinds)]
    logger.warning("%s: not read, as the files have them with different types: %s", where, listed(differing))
    try:
        return concatenate_datasets([part.remove_columns([*set(differing) & {*part.column_names}]) for part in parts])
    except (ValueError, TypeError, pyarrow.ArrowException) as error:
        raise UserError(f"{where}: the files' columns do not fit together: {first_line(error)}") from error


def _table_of_rows(files: Iterable[Path], flag: str, text_columns: Sequence[str], bad: BadRows, first: int) -> Dataset:
    """The rows of files: every column that any row has, None where a row lacks it.

    Args:
        first: number of the first row in the data set, from 0.
    """
    rows: list[dict[str, Any]] = []
    for file in files:
        start = len(rows)
        for row in rows_of_file(file, None, flag):
            if isinstance(row, UserError):
                bad.add(row, first + len(rows))
            rows.append({} if isinstance(row, UserError) else row)
        if kind_of_file(file) == ".csv":
            _set_types(rows[start:], text_columns)
    names = dict.fromkeys(name for row in rows for name in row)
    return Dataset(pyarrow.table({name: _array([row.get(name) for row in rows]) for name in names}))


def _set_types(rows: Sequence[dict[str, Any]], text_columns: Sequence[str]) -> None:
    """Makes the cells of a CSV column numbers or truth values, where all of them are."""
    for name in dict.fromkeys(name for row in rows for name in row if name not in text_columns):
        cells = pyarrow.array([row.get(name) for row in rows], pyarrow.string())
        for kind in CSV_TYPES:
            try:
                values = pyarrow.compute.utf8_trim_whitespace(cells).cast(kind).to_pylist()
            except pyarrow.ArrowException:
                continue
            for row, value in zip(rows, values, strict=True):
                row[name] = value
            break


def _array(values: list) -> pyarrow.Array:
    try:
        return pyarrow.array(values)
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError):  # of several types: kept as JSON
        texts = [None if value is None else json.dumps(value) for value in values]
        return pyarrow.ExtensionArray.from_storage(pyarrow.json_(), pyarrow.array(texts, pyarrow.string()))
