"""The folder of a run: what may be written there, and what an earlier run left in it."""

import shutil
import tempfile
from pathlib import Path

from tokentune.errors import UserError

SUMMARY_NAME, CURVES_NAME = "training_summary.json", "training_curves.png"
SCORES_NAME, PREDICTIONS_NAME = "classification_summary.json", "predictions.jsonl"
# What a run leaves in its folder: everything that --overwrite_output_dir replaces.
RUN_FILES = (
    *(SUMMARY_NAME, CURVES_NAME, SCORES_NAME, PREDICTIONS_NAME, "seed-*", "checkpoint-*"),
    *("adapter_model.*", "adapter_config.json", "model*.safetensors*"),
)


def check_run_folder(run_folder: Path, *, overwrite: bool) -> None:
    """Refuses a folder that cannot be written to, or that holds a run already; leaves nothing behind.

    Raises:
        UserError: with what to change.
    """
    if run_folder.is_dir() and not overwrite:
        finished = any((run_folder / name).exists() for name in (SUMMARY_NAME, SCORES_NAME))
        if finished or any(run_folder.glob("checkpoint-*")) or any(run_folder.glob("seed-*")):
            what = "a finished run" if finished else "the checkpoints of an unfinished run"
            raise UserError(
                f"{run_folder} already holds {what}.\n"
                "Give another --model_save_path, or --overwrite_output_dir to replace it."
            )
    existing = next(path for path in (run_folder.absolute(), *run_folder.absolute().parents) if path.exists())
    try:
        # Only a real attempt tells: permission bits say nothing to root, on read-only disks or on network shares.
        tempfile.TemporaryDirectory(dir=existing).cleanup()
    except OSError as error:
        raise UserError(
            f"the output folder {run_folder} cannot be written: {error.strerror} ({existing}).\n"
            "Give another --model_save_path."
        ) from error


def clear_run_folder(run_folder: Path) -> None:
    """Removes what an earlier run left.

    Checkpoints are rotated by their step: old ones with a higher step would push the new ones out.
    """
    for pattern in RUN_FILES:
        for path in run_folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
