"""Checkpoints and results on disk: each one complete or absent, and a damaged one is noticed.

A checkpoint is written into a hidden folder beside its own (`.checkpoint-8.partial`), with a manifest of every file's
size and digest, and flushed to disk. Then it is renamed, which is atomic. What a killed process leaves behind has a
name that begins with a dot, is never read, and is removed by the next run.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tokentune.card_file import own_card
from tokentune.file_modes import with_usual_modes
from tokentune.file_names import CARD_NAME

MANIFEST_NAME = "manifest.json"
PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")
_RESULT = ".result.partial"
# How torch's zip writer and C++ streams report a full disk, in a RuntimeError.
_STREAM_WORDS = ("PytorchStreamWriter", "unexpected pos", "iostream", "basic_ios", "file write failed", "write failed")


class StorageError(Exception):
    """A file could not be written: a full disk, a quota, a lost network share. The message is the system's reason."""


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turns the errors of a failed write, which differ between Python, torch and safetensors, into `StorageError`."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise StorageError((error.strerror or str(error)) + where) from error
    except SafetensorError as error:
        raise StorageError(str(error)) from error
    except RuntimeError as error:
        if not any(words in str(error) for words in _STREAM_WORDS):
            raise
        raise StorageError(f"a write was cut short, as on a full disk ({str(error).splitlines()[0]})") from error


# ------------------------------------------------------------------------------------------------------------- writing


def hidden(checkpoint: Path, state: str) -> Path:
    """Where a checkpoint is while it is "partial", "replaced" or "deleted"."""
    return checkpoint.with_name(f".{checkpoint.name}.{state}")


def new_folder(folder: Path) -> None:
    """Makes a folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def seal(folder: Path) -> None:
    """Flushes every file of a folder to disk and writes the manifest: {"files": {name: {bytes, blake2b}}}."""
    write_whole(folder / MANIFEST_NAME, json.dumps({"files": _flush_files(folder)}, indent=1) + "\n")


def publish(partial: Path, checkpoint: Path) -> None:
    """Renames a sealed folder to a checkpoint; an older one of that name exists until then, or is found again."""
    replaced = hidden(checkpoint, "replaced")
    if checkpoint.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        checkpoint.rename(replaced)
    partial.rename(checkpoint)
    _flush_folder(checkpoint.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def written_into(folder: Path, *, writes: bool = True) -> Iterator[Path]:
    """A new folder whose files are moved into `folder` at the end, each atomically, once all are on disk.

    Args:
        writes: whether this process writes; of several only one does.

    Raises:
        StorageError: they could not be written; `folder` is then unchanged.
    """
    partial = folder / _RESULT
    if not writes:
        yield partial
        return
    try:
        with storage_errors():
            new_folder(partial)
            yield partial
            if own_card(folder) is not None:  # peft writes a model card with every adapter
                (partial / CARD_NAME).unlink(missing_ok=True)
            for name in _flush_files(partial):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(partial / name, folder / name)
            _flush_folder(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a file atomically: it is complete or unchanged, even after a power failure."""
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    _flush_folder(path.parent)


def _flush_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Flushes all files of a folder to disk; returns {relative path: {bytes, blake2b}}."""
    with_usual_modes(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # hashing releases Python's lock
        facts = list(pool.map(_flushed, paths))
    for inner in {path.parent for path in paths} - {folder}:
        _flush_folder(inner)
    return {path.relative_to(folder).as_posix(): fact for path, fact in zip(paths, facts, strict=True)}


def _flushed(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "blake2b": _digest(file)}


def _digest(file: Any) -> str:
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems only flush files
            raise
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------------------- finding


def step_of(checkpoint: Path) -> int | None:
    """The optimizer step in a checkpoint's name; None: it is no checkpoint's."""
    match = re.fullmatch(r"checkpoint-(\d+)|\.checkpoint-(\d+)\.replaced", checkpoint.name)
    return None if match is None else int(match[1] or match[2])


def checkpoints_of(run_folder: Path) -> list[Path]:
    """The checkpoints of a run, the newest step first.

    One that a killed process was about to replace counts where its replacement is missing.
    """
    replaced, whole = (
        {step_of(path): path for path in run_folder.glob(pattern) if step_of(path) is not None}
        for pattern in (".checkpoint-*.replaced", "checkpoint-*")
    )
    return [path for _, path in sorted((replaced | whole).items(), reverse=True)]


def rotate(run_folder: Path, keep: int, protected: set[Path]) -> None:
    """Deletes the oldest checkpoints, by their time of writing, until `keep` are left; never the protected ones."""
    found = [path for path in run_folder.glob("checkpoint-*") if step_of(path) is not None]
    found.sort(key=lambda path: (path.stat().st_mtime, step_of(path)))
    names = {path.name for path in protected}
    for checkpoint in [path for path in found if path.name not in names][: max(0, len(found) - keep)]:
        # Renamed first: half deleted under its own name, it would look damaged.
        deleted = hidden(checkpoint, "deleted")
        checkpoint.rename(deleted)
        shutil.rmtree(deleted, ignore_errors=True)


def remove_best_checkpoints(run_folder: Path, save_steps: int) -> None:
    """Removes the checkpoints that were saved as the best so far; those of every `save_steps` stay."""
    for path in run_folder.glob("checkpoint-*"):
        step = step_of(path)
        if step is not None and step % save_steps:
            shutil.rmtree(path)


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, as the end of a sentence that begins with its name; None: nothing."""
    manifest = checkpoint / MANIFEST_NAME
    if not manifest.is_file():
        return f"has no {MANIFEST_NAME}: it was not written by this project, or not to its end"
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        expected = [(checkpoint / name, facts["bytes"], facts["blake2b"]) for name, facts in files.items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"is damaged: {MANIFEST_NAME} cannot be read"
    for name in PICKLED_WEIGHTS:
        if name not in files and (checkpoint / name).exists():  # the Trainer would load it as the weights
            return f"was changed: {name}, a pickle file, was not written with it"
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        faults = list(pool.map(lambda entry: _fault_of_file(*entry), expected))
    return next((f"is damaged: {fault}" for fault in faults if fault is not None), None)


def _fault_of_file(path: Path, size: int, digest: str) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != size:
        return f"{path.name} has {path.stat().st_size:,} bytes of {size:,}"
    try:
        with path.open("rb") as file:
            return None if _digest(file) == digest else f"{path.name} has other bytes than were written"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"


def set_aside(checkpoint: Path) -> None:
    """Renames a damaged checkpoint, so that the run ignores it."""
    aside, number = checkpoint.with_name(f"broken-checkpoint-{step_of(checkpoint)}"), 1
    while aside.exists():
        number += 1
        aside = aside.with_name(f"broken-checkpoint-{step_of(checkpoint)}-{number}")
    checkpoint.rename(aside)


def clear_leftovers(run_folder: Path) -> None:
    """Removes what a killed run left unfinished; a checkpoint that it was about to replace gets its name back."""
    for path in [*run_folder.glob(".checkpoint-*"), *run_folder.glob(_RESULT)]:
        whole = run_folder / f"checkpoint-{step_of(path)}"
        if step_of(path) is not None and not whole.exists():
            path.rename(whole)
        else:
            shutil.rmtree(path, ignore_errors=True)
