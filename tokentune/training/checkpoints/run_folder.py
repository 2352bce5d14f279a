"""The folder of a run: its name, what may be written there, and what an earlier run left in it."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tokentune.errors import UserError
from tokentune.file_names import (
    BASE_FINGERPRINT_NAME,
    CURVES_NAME,
    PREDICTIONS_NAME,
    RUN_STATE_NAME,
    SCORES_NAME,
    SUMMARY_NAME,
)
from tokentune.settings.model import AdapterArguments, SelectionArguments
from tokentune.sources import DATA_SUFFIXES, is_local_path
from tokentune.training.checkpoints.same_run import differences
from tokentune.training.checkpoints.saving import checkpoints_of

# What --overwrite_output_dir replaces: everything that a run leaves in its folder.
RUN_FILES = (
    *(SUMMARY_NAME, CURVES_NAME, SCORES_NAME, PREDICTIONS_NAME, "seed-*", "checkpoint-*"),
    *("adapter_model.*", "adapter_config.json", BASE_FINGERPRINT_NAME, "model*.safetensors*"),
    *(".checkpoint-*", "broken-checkpoint-*", ".result.partial", "nan_batch*.json"),
    *("chat_template.jinja", "additional_chat_templates"),
)


def run_folder_name(
    model: str,
    dataset: str | Sequence[str],
    adapters: AdapterArguments,
    selection: SelectionArguments,
    task: str | None = None,
) -> str:
    """The name as in the released scripts: `<model>-<data set>[-<task>][-lora][-qlora][-tokentune-<prefix length>]`.

    A hub id keeps its owner (`/` becomes `-`); of a local path the last component counts, without a data file's suffix.
    Several data sets are joined by `+`.
    """

    def short(name: str) -> str:
        if not is_local_path(name):
            return name.replace("/", "-")
        last = os.path.basename(os.path.abspath(name))
        return next((last.removesuffix(suffix) for suffix in DATA_SUFFIXES if last.endswith(suffix)), last)

    parts = [short(model), "+".join(short(name) for name in ([dataset] if isinstance(dataset, str) else dataset))]
    parts += [task] if task is not None else []
    parts += [f"lora{'-on-answers' * (adapters.lora_on == 'answers')}"] if adapters.lora else []
    parts += ["qlora"] if adapters.qlora else []
    parts += [f"tokentune-{selection.schedule or selection.selected}"] if selection.tokentune else []
    return "-".join(parts)


def check_run_folder(run_folder: Path, flags: dict[str, Any], *, resuming: bool = False) -> str | None:
    """Refuses, UserError, a folder that cannot be written to, or that holds a run already; leaves nothing behind.

    Args:
        flags: {name: value} of the command.
        resuming: the run that it holds is resumed.

    Returns:
        With `dry_run`, which writes nothing, what the run itself would be refused for; None: nothing.
    """
    held = None if flags["overwrite_output_dir"] or resuming else _held(run_folder, flags)
    if held is not None and not flags.get("dry_run"):
        raise UserError(held)
    check_writable(run_folder)
    return held


def _held(run_folder: Path, flags: dict[str, Any]) -> str | None:
    """Says which run a folder holds, which flags it has otherwise, and what to do; None: it holds none."""
    finished = any((run_folder / name).exists() for name in (SUMMARY_NAME, SCORES_NAME))  # a run's last files
    if not (finished or any(run_folder.glob("checkpoint-*")) or any(run_folder.glob("seed-*"))):
        return None
    what = "a finished run" if finished else "the checkpoints of an unfinished run"
    other = differences(flags, _flags_of(run_folder))
    cure = "Give this one a name of its own with --run_name, or --overwrite_output_dir to replace the other."
    if "resume_from_checkpoint" in flags and not finished:
        cure = f"Go on with it: {'its flags, and ' if other else ''}--resume_from_checkpoint. {cure}"
    if other:
        cure = f"Not as there: {other}.\n{cure}"
    return f"{run_folder} already holds {what}.\n{cure}"


def _flags_of(run_folder: Path) -> dict[str, Any]:
    """The flags of the run that a folder holds; none where its files do not say."""
    states = [checkpoint / RUN_STATE_NAME for checkpoint in checkpoints_of(run_folder)[:1]]
    for path in (run_folder / SUMMARY_NAME, run_folder / SCORES_NAME, *states):
        with suppress(OSError, ValueError, KeyError, TypeError):
            return dict(json.loads(path.read_text(encoding="utf-8"))["settings"])
    return {}


def existing_part(path: Path) -> Path:
    """The path itself, or the nearest folder above it that there is."""
    return next(part for part in (path.absolute(), *path.absolute().parents) if part.exists())


def check_writable(run_folder: Path) -> None:
    """Refuses, UserError, a folder that cannot be written, or made; leaves nothing behind."""
    existing = existing_part(run_folder)
    try:
        # Only a real attempt tells: permission bits say nothing to root, on read-only disks or on network shares.
        tempfile.TemporaryDirectory(dir=existing).cleanup()
    except OSError as error:
        raise UserError(
            f"the output folder {run_folder} cannot be written: {error.strerror} ({existing}).\n"
            "Give another --model_save_path."
        ) from error


@contextmanager
def no_empty_folders(folder: Path) -> Iterator[None]:
    """At its end removes those folders of a path that did not exist before and are empty."""
    new = [path for path in (folder.absolute(), *folder.absolute().parents) if not path.exists()]
    try:
        yield
    finally:
        for path in new:
            with suppress(OSError):
                path.rmdir()


def left_by_a_run(run_folder: Path, *, keep_broken: bool = False) -> list[Path]:
    """What an earlier run left. `keep_broken`: without damaged checkpoints that were renamed."""
    found = [path for pattern in RUN_FILES for path in run_folder.glob(pattern)]
    return [path for path in found if not (keep_broken and path.name.startswith("broken-"))]


def clear_run_folder(run_folder: Path, *, keep_broken: bool = False) -> None:
    """Removes what `left_by_a_run` lists."""
    for path in left_by_a_run(run_folder, keep_broken=keep_broken):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
