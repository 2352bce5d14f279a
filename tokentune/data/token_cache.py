"""Tokens kept for the next run, under a key that changes with everything that the tokens depend on.

An entry is a folder: tables in Arrow's stream format, which are mapped into memory, and `entry.json` with counts and
each table's SHA-256. It is written under another name and renamed when it is complete, so that an interrupted run
leaves none; damage done later is detected by the hashes, and the entry is made again.
"""

import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from tokentune.data.formats.record_files import file_hash
from tokentune.data.formats.records import RecordSource
from tokentune.data.prompts import PromptTemplate
from tokentune.settings.data import DataArguments
from tokentune.sources import first_line

logger = logging.getLogger(__name__)

LIBRARIES = ("transformers", "tokenizers", "datasets", "jinja2", "pyarrow")
# Determines tokens and labels: after a change of it, no older entry may be used.
CODE = tuple(sorted(Path(__file__).parent.rglob("*.py")))
ENTRY = "entry.json"
ABANDONED_SECONDS = 24 * 3600  # an unfinished entry of this age is of a run that died


class Entry(NamedTuple):
    """Tables by name, and facts about them as JSON holds them."""

    tables: dict[str, Dataset]
    facts: dict[str, Any]


Build = Callable[[Path | None], Entry]  # makes an entry; writes its tables into the folder, if there is one


def cache_folder(data_cache: str) -> Path | None:
    """The folder that `--data_cache` means."""
    if data_cache == "none":
        return None
    if data_cache == "auto":
        return Path(datasets.config.HF_DATASETS_CACHE) / "tokentune"
    return Path(data_cache).expanduser()


def cache_key(
    source: RecordSource,
    data: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate,
    fraction: float | None,
    *,
    answers_apart: bool = False,
) -> str:
    """The key of a data set's tokens: a hash of its content and of everything that turns it into tokens.

    Args:
        fraction: share of the rows that is held out for validation.
        answers_apart: each answer is a row (`--lora_on answers`).
    """
    chat_template = json.dumps(tokenizer.chat_template)
    flags = ("data_format", "max_length", "long_rows", "add_eos_token", "system_in_user", "bad_rows")
    parts = {
        "content": source.fingerprint(),
        "tokenizer": _tokenizer_state(tokenizer),
        "chat_template": chat_template,
        "day": today() if "strftime_now" in chat_template else None,
        "prompt_template": asdict(template),
        "flags": {name: getattr(data, name) for name in flags},
        "fraction": fraction,
        "answers_apart": answers_apart,
        "versions": {name: version(name) for name in LIBRARIES},
        "code": [file_hash(file) for file in CODE],
    }
    return _hash_of(parts)[:32]


def today() -> str:
    """The date, which some chat templates write into a conversation."""
    return datetime.now().astimezone().date().isoformat()


def cached(folder: Path | None, key: str, build: Build, what: str, *, keep: bool = True) -> Entry:
    """The entry of this key, from the cache, or made now and kept there.

    Args:
        folder: of the cache; None: there is none.
        what: names the data in log lines.
        keep: False writes nothing.

    Raises:
        UserError: what `build` raises.
    """
    if folder is None:
        return build(None)
    if (entry := _open(folder / key)) is not None:
        logger.info("%s: tokens of an earlier run are used again (%s)", what, folder / key)
        return entry
    if (folder / key).exists():
        logger.warning("%s: the tokens kept in %s are broken; made again", what, folder / key)
    if keep:
        try:
            _write(folder, key, build)
        except OSError as error:
            logger.warning("--data_cache %s: cannot keep tokens there: %s", folder, error.strerror or first_line(error))
    return (_open(folder / key) if keep else None) or build(None)


def _write(folder: Path, key: str, build: Build) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("*.part-*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(left)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{key}.part-", dir=folder))
    try:
        entry = build(unfinished)
        hashes = {name: file_hash(unfinished / f"{name}.arrow") for name in entry.tables}
        (unfinished / ENTRY).write_text(json.dumps({"sha256": hashes, "facts": entry.facts}), encoding="utf-8")
        if (folder / key).exists() and _open(folder / key) is None:
            shutil.rmtree(folder / key, ignore_errors=True)
        try:
            unfinished.rename(folder / key)
        except OSError:
            if not (folder / key).exists():  # otherwise another process was faster
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _open(folder: Path) -> Entry | None:
    """The entry in a folder; None where there is none, or its parts are not what was written."""
    try:
        content = json.loads((folder / ENTRY).read_text(encoding="utf-8"))
        for name, expected in content["sha256"].items():
            if file_hash(folder / f"{name}.arrow") != expected:
                return None
        tables = {name: Dataset.from_file(str(folder / f"{name}.arrow")) for name in content["sha256"]}
        return Entry(tables, content["facts"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pyarrow.ArrowException):
        return None


def _hash_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that determines how a text is tokenized."""
    if getattr(tokenizer, "is_fast", False):
        state: Any = tokenizer.backend_tokenizer.to_str()
    else:
        state = [tokenizer.get_vocab(), repr(sorted(tokenizer.init_kwargs.items()))]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _hash_of([type(tokenizer).__name__, state, special, sorted(tokenizer.added_tokens_encoder.items())])
