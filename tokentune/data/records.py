"""Reading data sets: from the hub, and local JSON, JSON Lines, CSV and Parquet files or folders of them.

Local files are read here instead of by `datasets.load_dataset`, whose errors tell no line or row number, which reads
a `.json` array and JSON Lines by guessing, and which leaves a copy of every file in a cache.
"""

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import pyarrow.parquet
from datasets import Dataset, DatasetDict, IterableDataset, concatenate_datasets, load_dataset, load_from_disk
from datasets.data_files import FILES_TO_IGNORE
from datasets.exceptions import DatasetsError

from tokentune.data.json_files import BoundedLines, not_text, read_json, read_json_lines
from tokentune.data.sources import DATA_SUFFIXES, first_line, hub_error, is_local_path, listed
from tokentune.errors import UserError

logger = logging.getLogger(__name__)

TEXT_COLUMNS = ("instruction", "input", "output")  # of instruction data
OPTIONAL_COLUMNS = ("input",)
# Parts of Open-Platypus that the released training leaves out: text by other models, and LeetCode solutions.
DROPPED_SOURCES = ("airoboros", "leetcode_ne")
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
# What pandas raises for a file that is no CSV; its ParserError and UnicodeDecodeError are ValueErrors.
CSV_ERRORS = (ValueError, OverflowError)


def load_records(
    name_or_path: str,
    *,
    flag: str = "--dataset_name_or_path",
    split: str = "train",
    config: str | None = None,
    text_columns: Sequence[str] = TEXT_COLUMNS,
) -> Dataset:
    """Reads a data set with all its columns.

    Args:
        name_or_path: a hub id; a .json (array of objects, {"data": [...]}, or JSON Lines), .jsonl, .csv or .parquet
            file; a folder of such files; a folder written by `Dataset.save_to_disk`.
        flag: the flag that named it, for error messages.
        split: the split of a hub data set. In a folder: the files whose names tell this split (`train.jsonl`,
            `data/test-00000.parquet`), or all files where no name tells any. A single file is read whole.
        config: of a hub data set that has several.
        text_columns: where these columns exist, they are read as text ("42" in a CSV file is no number).

    Returns:
        The rows, without those of `DROPPED_SOURCES` where there is a `data_source` column. The text columns hold text
        in every row, `input` text or None.

    Raises:
        UserError: not found, unreachable or gated; an unknown file type; malformed content (with file and line or
            row); no rows.
    """
    path = local_path(name_or_path, flag)
    if path is None:
        dataset = _with_text(load_from_hub(name_or_path, flag, split, config), f"{flag} {name_or_path}", text_columns)
    elif path.is_dir():
        dataset = _load_folder(path, flag, split, text_columns)
    else:
        dataset = _load_file(path, flag, text_columns)

    dataset = _without_dropped_sources(dataset, name_or_path)
    if len(dataset) == 0:
        raise UserError(f"{flag} {name_or_path}: holds no rows to train on.")
    return dataset


def require_columns(dataset: Dataset, columns: Sequence[str], where: str) -> None:
    """Checks that the data set has the columns.

    Args:
        where: what holds them (a flag and its value, a file), to start the message with.

    Raises:
        UserError: names the missing columns and those that are there.
    """
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise UserError(
            f"{where}: no column {', '.join(map(repr, missing))}. It has {listed(dataset.column_names)}; "
            "rename the columns that hold these texts."
        )


def tells_split(name_or_path: str, split: str) -> bool:
    """Whether a folder names the files of this split; a file does not, and of a hub data set loading it tells."""
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        return False
    if (folder / "dataset_dict.json").is_file():
        return (folder / split).is_dir()
    return any(_split_of(file.relative_to(folder)) == split for file in folder.rglob("*") if file.is_file())


# ---- where rows are --------------------------------------------------------------------------------------------------


def local_path(name_or_path: str, flag: str) -> Path | None:
    """The file or folder that a name means; None for a hub id.

    Raises:
        UserError: spelt like a path, and not there.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    if is_local_path(name_or_path):
        raise UserError(f"{flag} {name_or_path}: no such file or folder. Check the path (now in {Path.cwd()}).")
    return None


def load_from_hub(
    name: str, flag: str, split: str, config: str | None = None, *, streaming: bool = False
) -> Dataset | IterableDataset:
    """A hub data set's split, downloaded, or with `streaming` read from there while it is iterated over.

    Raises:
        UserError: not found, gated or unreachable; no such split or configuration; one that needs its own code.
    """
    options = {"streaming": True} if streaming else {}
    try:
        return load_dataset(name, *([] if config is None else [config]), split=split, **options)
    except OSError as error:  # not found, gated, offline and unreachable are all OSErrors here
        raise hub_error(name, error, flag) from error
    except (
        ValueError,
        RuntimeError,
        DatasetsError,
    ) as error:  # no such split, several configurations, a loading script
        raise UserError(f"{flag} {name}: the hub's data set cannot be read: {first_line(error)}") from error


def is_saved_dataset(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote the folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def load_saved(folder: Path, flag: str, split: str) -> Dataset:
    """The data set, or its split, of a folder that `save_to_disk` wrote.

    Raises:
        UserError: it cannot be read, or has no such split.
    """
    try:
        dataset = load_from_disk(folder)
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise UserError(f"{flag} {folder}: not a saved data set after all: {first_line(error)}") from error
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise UserError(f"{flag} {folder}: no split {split!r}, only {', '.join(dataset)}.")
        dataset = dataset[split]
    return dataset


def split_files(folder: Path, flag: str, split: str) -> list[Path]:
    """The data files of a folder that belong to the split, or all where no name tells any.

    Sorted, so that rows, and with them every seeded draw, keep their order on any file system.

    Raises:
        UserError: there are none.
    """
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in DATA_SUFFIXES and f.is_file())
    files = [file for file in files if file.name not in FILES_TO_IGNORE]  # descriptions of a data set, no data
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    if not files:
        raise UserError(f"{flag} {folder}: no {', '.join(DATA_SUFFIXES)} file in this folder.")
    splits = {file: _split_of(file.relative_to(folder)) for file in files}
    if any(splits.values()):
        files = [file for file in files if splits[file] == split]
    if not files:
        found = ", ".join(sorted({name for name in splits.values() if name}))
        raise UserError(f"{flag} {folder}: no file is named after the split {split!r}, only {found}. Name a file.")
    return files


def unknown_suffix(path: Path, flag: str) -> UserError:
    """What to say of a file that none of the readers is for."""
    return UserError(f"{flag} {path}: unknown file type; {', '.join(DATA_SUFFIXES)} can be read.")


def csv_error(path: Path, error: Exception) -> UserError:
    """What to say of a file that pandas cannot read as CSV."""
    if isinstance(error, pandas.errors.EmptyDataError):
        return UserError(f"{path}: the file is empty.")
    if isinstance(error, UnicodeDecodeError):
        return not_text(path, error.start)
    return UserError(f"{path}: not valid CSV: {first_line(error)}.")


def _split_of(path: Path) -> str | None:
    """The split that a file's name or, failing that, its folders' names tell; None when they tell none."""
    for word in reversed(re.findall("[a-z]+", str(path.with_suffix("")).lower())):
        for split, words in SPLIT_WORDS.items():
            if word in words:
                return split
    return None


# ---- tables of all rows ----------------------------------------------------------------------------------------------


def _load_folder(folder: Path, flag: str, split: str, text_columns: Sequence[str]) -> Dataset:
    if is_saved_dataset(folder):
        return _with_text(load_saved(folder, flag, split), f"{flag} {folder}", text_columns)
    files = split_files(folder, flag, split)
    parts = [_load_file(file, flag, text_columns) for file in files]
    needed = [c for c in text_columns if c not in OPTIONAL_COLUMNS and any(c in part.column_names for part in parts)]
    for file, part in zip(files, parts, strict=True):
        require_columns(part, needed, str(file))  # joining would fill the column with nulls
    try:
        return concatenate_datasets(parts)
    except (ValueError, TypeError, pyarrow.ArrowException) as error:
        raise UserError(f"{flag} {folder}: the files' columns do not fit together: {first_line(error)}") from error


def _load_file(path: Path, flag: str, text_columns: Sequence[str]) -> Dataset:
    readers: dict[str, Callable[[Path], Dataset]] = {
        ".json": lambda p: _dataset_of(read_json(p), p, text_columns),
        ".jsonl": lambda p: _dataset_of(read_json_lines(p), p, text_columns),
        ".csv": lambda p: _dataset_of(_read_csv(p, text_columns), p, text_columns),
        ".parquet": lambda p: _read_parquet(p, text_columns),
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise unknown_suffix(path, flag)
    try:
        return reader(path)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read: {error.strerror or first_line(error)}.") from error


def _read_csv(path: Path, text_columns: Sequence[str]) -> list[dict]:
    try:
        # An answer "42", "NA" or "None" is text. Only an empty cell is missing.
        frame = pandas.read_csv(
            BoundedLines(path),
            encoding="utf-8-sig",
            dtype=dict.fromkeys(text_columns, object),
            keep_default_na=False,
            na_values=[""],
        )
    except CSV_ERRORS as error:
        raise csv_error(path, error) from error
    if not isinstance(frame.index, pandas.RangeIndex):  # pandas took the surplus first cells for row names
        raise UserError(f"{path}: the rows have more cells than the header has names.")
    frame = frame.astype(object)
    return frame.where(frame.notna(), None).to_dict("records")


def _read_parquet(path: Path, text_columns: Sequence[str]) -> Dataset:
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty.")
    try:
        dataset = Dataset(pyarrow.parquet.read_table(path))
    except (pyarrow.ArrowException, ValueError) as error:
        raise UserError(f"{path}: not a valid Parquet file: {first_line(error)}") from error
    return _with_text(dataset, str(path), text_columns)


def _check_text(rows: Iterable[Mapping[str, Any]], where: str, text_columns: Sequence[str]) -> None:
    """Refuses a text that is not text, and an optional one that is neither text nor missing."""
    for number, row in enumerate(rows, start=1):
        for column in text_columns:
            # A column that this one row lacks is null there, unless all rows lack it (`require_columns` tells that).
            value = row.get(column, "")
            if isinstance(value, str) or (value is None and column in OPTIONAL_COLUMNS):
                continue
            found = "is missing" if value is None else f"is {value!r:.60}, not text"
            raise UserError(f"{where}, row {number}: {column!r} {found}.")


def _with_text(dataset: Dataset, where: str, text_columns: Sequence[str]) -> Dataset:
    """The data set itself, once its texts are checked."""
    present = [column for column in text_columns if column in dataset.column_names]
    if present:
        _check_text(dataset.select_columns(present), where, present)
    return dataset


def _dataset_of(rows: Iterable[dict], path: Path, text_columns: Sequence[str]) -> Dataset:
    """A data set in memory: every column that any row has, None where a row lacks it."""
    columns: dict[str, list] = {}
    for count, row in enumerate(rows):
        for name in row:
            if name not in columns:
                columns[name] = [None] * count
        for name, values in columns.items():
            values.append(row.get(name))
    texts = [name for name in text_columns if name in columns]
    values_of_rows = zip(*(columns[name] for name in texts), strict=True)
    _check_text((dict(zip(texts, values, strict=True)) for values in values_of_rows), str(path), texts)
    arrays = {}
    for name in list(columns):
        try:
            arrays[name] = pyarrow.array(columns.pop(name))
        except (pyarrow.ArrowException, ValueError, TypeError, OverflowError) as error:
            raise UserError(f"{path}: column {name!r} cannot be stored: {first_line(error)}") from error
    return Dataset(pyarrow.table(arrays))


def _without_dropped_sources(dataset: Dataset, name: str) -> Dataset:
    if "data_source" not in dataset.column_names:
        return dataset
    kept = [row for row, source in enumerate(dataset["data_source"]) if source not in DROPPED_SOURCES]
    dropped = len(dataset) - len(kept)
    if dropped == 0:
        return dataset
    logger.warning("%s: %d rows left out, data_source %s", name, dropped, " or ".join(DROPPED_SOURCES))
    return dataset.select(kept)
