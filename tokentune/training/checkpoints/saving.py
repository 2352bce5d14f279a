"""Checkpoints and results on the disk: each is there whole or not at all, and a damaged one is noticed.

A checkpoint is written into a hidden folder beside its own (`.checkpoint-8.partial`), with a manifest of every file's
size and digest, flushed to the disk, and only then renamed, which file systems do at once or not at all. What a kill
leaves behind has a name that begins with a dot, counts as nothing, and is removed by the next run.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tokentune.reports.model_card import CARD_NAME, own_card

MANIFEST_NAME = "manifest.json"
PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")
_RESULT = ".result.partial"
# Torch's zip writer, and C++ streams, tell of a full disk in a RuntimeError of these words.
_STREAM_WORDS = ("PytorchStreamWriter", "unexpected pos", "iostream", "basic_ios", "file write failed", "write failed")


class StorageError(Exception):
    """A file could not be written: a full disk, a quota, a lost network share. The message is the system's reason."""


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turns what a failed write raises, which is not the same in Python, torch and safetensors, into `StorageError`."""
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


def partial_path(checkpoint: Path) -> Path:
    """Where a checkpoint is written until it is whole."""
    return checkpoint.with_name(f".{checkpoint.name}.partial")


def partial_folder(checkpoint: Path) -> Path:
    """Makes that folder anew, empty, and returns it."""
    partial = partial_path(checkpoint)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def with_usual_modes(folder: Path) -> None:
    """Gives the files in a folder the permissions of any new file: safetensors' are for their owner's eyes alone.

    Where a file system has no permissions, or the disk no room for a file to look at, they stay as they are.
    """
    new = folder / ".mode"
    with suppress(OSError):
        new.touch()
        mode = new.stat().st_mode & 0o777
        new.unlink()
        for path in folder.rglob("*"):
            if path.is_file():
                path.chmod(mode)


def seal(folder: Path) -> None:
    """Flushes every file of a folder to the disk and writes the manifest: {"files": {name: {bytes, blake2b}}}."""
    with_usual_modes(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # hashing releases Python's lock
        facts = list(pool.map(_flushed, paths))
    files = {path.relative_to(folder).as_posix(): fact for path, fact in zip(paths, facts, strict=True)}
    for inner in {path.parent for path in paths} - {folder}:
        _flush_folder(inner)
    write_whole(folder / MANIFEST_NAME, json.dumps({"files": files}, indent=1) + "\n")


def publish(partial: Path, checkpoint: Path) -> None:
    """Gives a sealed folder its name; a checkpoint that had it before is there up to that moment, or found again."""
    replaced = checkpoint.with_name(f".{checkpoint.name}.replaced")
    if checkpoint.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        checkpoint.rename(replaced)
    partial.rename(checkpoint)
    _flush_folder(checkpoint.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def rotate(run_folder: Path, keep: int, protected: set[Path]) -> None:
    """Deletes the oldest checkpoints, by their time of writing, until `keep` are left; never the protected ones."""
    found = [path for path in run_folder.glob("checkpoint-*") if step_of(path) is not None]
    found.sort(key=lambda path: (path.stat().st_mtime, step_of(path)))
    names = {path.name for path in protected}
    for checkpoint in [path for path in found if path.name not in names][: max(0, len(found) - keep)]:
        # Renamed first: half deleted under its own name, it would look like a damaged checkpoint.
        doomed = checkpoint.with_name(f".{checkpoint.name}.deleted")
        checkpoint.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def remove_best_checkpoints(run_folder: Path, save_steps: int) -> None:
    """Removes what was the best for a while, the last of which the run's folder holds; those of `save_steps` stay."""
    for path in run_folder.glob("checkpoint-*"):
        step = step_of(path)
        if step is not None and step % save_steps:
            shutil.rmtree(path)


@contextmanager
def written_into(folder: Path, *, writes: bool = True) -> Iterator[Path]:
    """A new folder whose files are moved into `folder` at the end, each at once, after all are on the disk.

    Args:
        writes: whether this process writes; of several only one does.

    Raises:
        StorageError: they could not be written; `folder` is then as it was.
    """
    partial = folder / _RESULT
    if not writes:
        yield partial
        return
    try:
        with storage_errors():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            if own_card(folder) is not None:  # peft writes a model card with every adapter
                (partial / CARD_NAME).unlink(missing_ok=True)
            with_usual_modes(partial)
            paths = [path for path in partial.rglob("*") if path.is_file()]
            for path in paths:
                _flushed(path)
            for path in paths:
                target = folder / path.relative_to(partial)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
            _flush_folder(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all, also when the machine stops."""
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    _flush_folder(path.parent)


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
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems flush files alone
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

    One that was just about to be replaced by a newer one of the same step counts where that one is not there.
    """
    whole = {step_of(path): path for path in run_folder.glob("checkpoint-*") if step_of(path) is not None}
    replaced = {step_of(path): path for path in run_folder.glob(".checkpoint-*.replaced")}
    return [path for _, path in sorted((replaced | whole).items(), reverse=True)]


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
        if name not in files and (checkpoint / name).exists():  # the Trainer would take it for the weights
            return f"was changed: {name}, a pickle file, was not written with it"
    for path, size, _ in expected:  # first what costs nothing
        if not path.is_file():
            return f"is damaged: {path.name} is missing"
        if path.stat().st_size != size:
            return f"is damaged: {path.name} has {path.stat().st_size:,} bytes of {size:,}"
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        faults = list(pool.map(lambda entry: _has_other_bytes(entry[0], entry[2]), expected))
    return next((f"is damaged: {fault}" for fault in faults if fault is not None), None)


def _has_other_bytes(path: Path, digest: str) -> str | None:
    try:
        with path.open("rb") as file:
            return None if _digest(file) == digest else f"{path.name} has other bytes than were written"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"


def set_aside(checkpoint: Path) -> Path:
    """Takes a damaged checkpoint out of the run's reach, under another name, which is returned."""
    aside = checkpoint.with_name(f"broken-checkpoint-{step_of(checkpoint)}")
    number = 1
    while aside.exists():
        number += 1
        aside = aside.with_name(f"broken-checkpoint-{step_of(checkpoint)}-{number}")
    return checkpoint.rename(aside)


def clear_leftovers(run_folder: Path) -> None:
    """Removes what a killed run left unfinished; a checkpoint that it was about to replace gets its name back."""
    for path in [*run_folder.glob(".checkpoint-*"), *run_folder.glob(_RESULT)]:
        whole = run_folder / f"checkpoint-{step_of(path)}"
        if step_of(path) is not None and not whole.exists():
            path.rename(whole)
        else:
            shutil.rmtree(path, ignore_errors=True)
