"""Reading data sets: from the hub, and local JSON, JSON Lines, CSV and Parquet files or folders of them.

`open_source` finds a data set, and `RecordSource` reads its rows one after another, with a few of them in memory, and
nested values as the file has them. `load_records` makes one table of them, whose columns have one type each.

Local files are not read by `datasets.load_dataset`: its errors name no line or row, it does not tell a `.json` array
from JSON Lines reliably, and it copies every file into a cache.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow
from datasets import Dataset, IterableDataset, load_dataset, load_dataset_builder, load_from_disk
from datasets.exceptions import DatasetsError
from huggingface_hub import DatasetCard
from huggingface_hub.errors import EntryNotFoundError

from tokentune.data.formats.bad_rows import BadRows
from tokentune.data.formats.dataset_layout import CHOICES, find_files, is_saved
from tokentune.data.formats.record_files import (
    columns_of_file,
    count_in_file,
    file_hash,
    kind_of_file,
    rows_of_file,
    rows_of_table,
    stem_of,
)
from tokentune.data.formats.record_tables import table_of_files
from tokentune.data.formats.split_names import labelled
from tokentune.errors import UserError
from tokentune.sources import first_line, hub_error, is_local_path, listed

logger = logging.getLogger(__name__)

TEXT_COLUMNS = ("instruction", "input", "output")  # of instruction data
# Parts of Open-Platypus that the released training leaves out: texts by other models, and LeetCode solutions.
DROPPED_SOURCES = ("airoboros", "leetcode_ne")
Placed = tuple[str, dict[str, Any] | UserError]  # ("file, row 3", the row or what is wrong with it)


@dataclass(frozen=True)
class RecordSource:
    """One data set of the command line, opened: files, or a table of the `datasets` library."""

    name: str
    flag: str
    files: tuple[Path, ...] = ()
    table: Dataset | IterableDataset | None = None

    @property
    def where(self) -> str:
        """How messages about it begin."""
        return f"{self.flag} {self.name}"

    @property
    def read_from(self) -> str:
        """For the log: the split or the files, unless the name tells it."""
        if self.table is not None:
            return "" if self.table.split is None else f" of the split {self.table.split}"
        if str(self.files[0]) == self.name:
            return ""
        names, count = listed([file.name for file in self.files], most=4), len(self.files)
        return f" of {count:,} file{'s' * (count > 1)} ({names})"

    def columns(self) -> tuple[list[str], bool]:
        """The names of the columns that are known before rows are read, and whether these are all (in JSON not)."""
        if self.table is not None:
            return self.table.column_names or [], self.table.column_names is not None
        of_files = [columns_of_file(file, self.flag) for file in self.files]
        return list(dict.fromkeys(name for names in of_files for name in names or ())), None not in of_files

    def count(self) -> int | None:
        """The number of rows, bad ones too; None where it is known only once they are parsed (CSV, JSON arrays,
        streams). Raises UserError: a file cannot be read."""
        if self.table is not None:
            return len(self.table) if isinstance(self.table, Dataset) else None
        counts = [count_in_file(file, self.flag) for file in self.files]
        return None if None in counts else sum(counts)

    def peek(self, columns: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
        """The names of the columns, with those of the first good row, and the given columns of this row. Raises
        UserError: it cannot be read, or holds no rows."""
        (names, _), bad = self.columns(), BadRows("stop")
        for _, row in self.rows(columns):
            if not isinstance(row, UserError):
                return list(dict.fromkeys([*names, *row])), row
            bad.add(row)
        bad.settle(self.where, bad.count)
        raise UserError(f"{self.where}: holds no rows to train on.")

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Placed]:
        """("file, row 3", row) for every row, in order: the row itself, or what is wrong with it.

        Args:
            columns: to be read; None: all. In JSON all are.

        Raises:
            UserError: the rest cannot be read.
        """
        parts = [] if self.table is None else [(self.name, rows_of_table(self.table, columns, self.where))]
        parts += [(str(file), rows_of_file(file, columns, self.flag)) for file in self.files]
        for name, rows in parts:
            for number, row in enumerate(rows, start=1):
                yield f"{name}, row {number}", row

    def fingerprint(self) -> str:
        """A hash of all files' bytes, and of the fingerprint that `datasets` gives a table."""
        files, made = list(self.files), ""
        if isinstance(self.table, Dataset):
            files += [Path(file["filename"]) for file in self.table.cache_files]
            made = self.table._fingerprint
        return hashlib.sha256(repr([made, *((kind_of_file(f), file_hash(f)) for f in files)]).encode()).hexdigest()


def open_source(
    name: str,
    *,
    flag: str,
    role: str = "train",
    split: str | None = None,
    config: str | None = None,
    streaming: bool = False,
) -> RecordSource:
    """Finds a data set. One of the hub is downloaded, unless `streaming`.

    Args:
        name: a hub id; a .json (array of objects, {"data": [...]}, or JSON Lines), .jsonl, .csv or .parquet file, the
            first three perhaps compressed; a folder of such files; a folder written by `save_to_disk`.
        flag: the flag that named it, for error messages.
        role: "train", "validation" or "test": the split that is meant where none is named. A single file is read whole.

    Raises:
        UserError: not found, unreachable or gated; no file of a known type, no such split, or several.
    """
    path = Path(name).expanduser()
    if not path.exists():
        if is_local_path(name):
            raise UserError(f"{flag} {name}: no such file or folder. Check the path (now in {Path.cwd()}).")
        table = _load_from_hub(name, flag, role, split or role, config, streaming=streaming)
        return RecordSource(name, flag, table=table)
    if path.is_dir():
        files = find_files(path, flag, role=role, split=split, config=config)
        if files and is_saved(files[0]):
            return RecordSource(name, flag, table=_load_saved(files[0], flag))
        return RecordSource(name, flag, files=tuple(files))
    for asked, what in ((split, "split"), (config, "config")):
        if asked is not None:
            asking = f"{CHOICES[role]}_{what} {asked}"
            raise UserError(f"{flag} {name}: is a single file, which is read whole: leave {asking} out.")
    return RecordSource(name, flag, files=(path,))


def _load_from_hub(
    name: str, flag: str, role: str, split: str, config: str | None, *, streaming: bool
) -> Dataset | IterableDataset:
    """A hub data set's split, downloaded, or with `streaming` read from there while it is iterated over."""
    options = {"streaming": True} if streaming else {}
    try:
        if config is None:
            _check_hub_files(name, flag, split)
        return load_dataset(name, *([] if config is None else [config]), split=split, **options)
    except OSError as error:  # not found, gated, offline and unreachable are all OSErrors here
        raise hub_error(name, error, flag) from error
    except (ValueError, RuntimeError, DatasetsError) as error:  # no such split, several configurations, a script
        # `datasets` lists what is there in the second line.
        said = " ".join(str(error).strip().splitlines()[:2]) or type(error).__name__
        what = next((what for what in ("config", "split") if what in said.lower()), None)
        cure = "" if what is None else f" Choose one with {CHOICES[role]}_{what}."
        raise UserError(f"{flag} {name}: the hub's data set cannot be read: {said:.300}{cure}") from error


def _check_hub_files(name: str, flag: str, split: str) -> None:
    """Refuses folders of configurations that `datasets` would join because no README names them."""
    try:
        files = load_dataset_builder(name).config.data_files or {}
        if DatasetCard.load(name).data.get("configs"):
            return
    except EntryNotFoundError:  # no README
        pass
    except (OSError, ValueError, RuntimeError, DatasetsError):  # loading it raises the same, with the cure
        return
    # hf://datasets/owner/name@revision/folder/file
    paths = {url: PurePosixPath(re.sub(r"^[^@]*@[^/]*/", "", url)) for url in map(str, files.get(split, []))}
    configs = [c for c in labelled({url: (stem_of(path), path.parts[:-1]) for url, path in paths.items()}) if c]
    if len(configs) > 1:
        raise UserError(
            f"{flag} {name}: holds several configurations ({', '.join(sorted(configs))}), and its README names none. "
            "Download it (hf download), and give the folder of one."
        )


def _load_saved(folder: Path, flag: str) -> Dataset:
    try:
        named = [part["filename"] for part in json.loads((folder / "state.json").read_text())["_data_files"]]
        if missing := [name for name in named if not (folder / name).is_file()]:
            raise UserError(
                f"{flag} {folder}: its state.json names data that is not there: {listed(missing)}. Copy or download "
                "it, or save the data set again."
            )
        return load_from_disk(folder)
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise UserError(f"{flag} {folder}: not a saved data set after all: {first_line(error)}") from error


# ---- tables of all rows ----------------------------------------------------------------------------------------------


def load_records(
    name_or_path: str,
    *,
    flag: str = "--dataset_name_or_path",
    role: str = "train",
    split: str | None = None,
    config: str | None = None,
    text_columns: Sequence[str] = TEXT_COLUMNS,
    bad: BadRows | None = None,
) -> Dataset:
    """Reads a data set with all its columns.

    Args:
        name_or_path, flag, role, split, config: as `open_source` takes them.
        text_columns: stay text where a CSV file has them ("42" is not a number there).
        bad: counts the rows that cannot be read, in whose place the table has rows without any value; None: they are
            refused.

    Raises:
        UserError: as `open_source`; malformed content (with file and line or row); no rows.
    """
    source = open_source(name_or_path, flag=flag, role=role, split=split, config=config)
    refused = BadRows("stop") if bad is None else bad
    dataset = source.table if source.table is not None else table_of_files(source.files, flag, text_columns, refused)
    if bad is None or refused.count >= len(dataset):
        refused.settle(source.where, max(refused.count, len(dataset)))
    if len(dataset) == 0:
        raise UserError(f"{source.where}: holds no rows to train on.")
    logger.info("%s: %s rows%s", source.where, f"{len(dataset):,}", source.read_from)
    return dataset
