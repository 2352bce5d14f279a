"""The folder of a run: its name, what may be written there, and what an earlier run left in it."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tokentune.errors import UserError
from tokentune.file_names import CURVES_NAME, PREDICTIONS_NAME, SCORES_NAME, SUMMARY_NAME
from tokentune.settings.model import AdapterArguments, SelectionArguments
from tokentune.sources import DATA_SUFFIXES, is_local_path

# What --overwrite_output_dir replaces: everything that a run leaves in its folder.
RUN_FILES = (
    *(SUMMARY_NAME, CURVES_NAME, SCORES_NAME, PREDICTIONS_NAME, "seed-*", "checkpoint-*"),
    *("adapter_model.*", "adapter_config.json", "model*.safetensors*"),
    *(".checkpoint-*", "broken-checkpoint-*", ".result.partial", "nan_batch*.json"),
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


def check_run_folder(run_folder: Path, *, overwrite: bool, resuming: bool = False, can_resume: bool = False) -> None:
    """Refuses, UserError, a folder that cannot be written to, or that holds a run already; leaves nothing behind.

    Args:
        resuming: the run that it holds is resumed.
        can_resume: the command has --resume_from_checkpoint.
    """
    if run_folder.is_dir() and not overwrite and not resuming:
        finished = any((run_folder / name).exists() for name in (SUMMARY_NAME, SCORES_NAME))  # a run's last files
        if finished or any(run_folder.glob("checkpoint-*")) or any(run_folder.glob("seed-*")):
            what = "a finished run" if finished else "the checkpoints of an unfinished run"
            cure = "Give another --model_save_path, or --overwrite_output_dir to replace it."
            if can_resume and not finished:
                cure = "Go on with it: --resume_from_checkpoint. " + cure
            raise UserError(f"{run_folder} already holds {what}.\n{cure}")
    check_writable(run_folder)


def check_writable(run_folder: Path) -> None:
    """Refuses, UserError, a folder that cannot be written, or made; leaves nothing behind."""
    existing = next(path for path in (run_folder.absolute(), *run_folder.absolute().parents) if path.exists())
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


def clear_run_folder(run_folder: Path, *, keep_broken: bool = False) -> None:
    """Removes what an earlier run left. `keep_broken`: except damaged checkpoints that were renamed."""
    for pattern in RUN_FILES:
        for path in run_folder.glob(pattern):
            if not (keep_broken and path.name.startswith("broken-")):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
