"""`--resume_from_checkpoint`: where a run continues, and whether it is the same run.

A resumed run ends with the weights of one that was never interrupted: to the last bit on the CPU, where the same flags,
data and libraries give the same numbers. Flags that would make it another run are refused (`same_run.py`).
"""

import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from tokentune.errors import UserError
from tokentune.file_names import SUMMARY_NAME
from tokentune.settings.flags import require
from tokentune.training.checkpoints.run_folder import clear_run_folder
from tokentune.training.checkpoints.run_state import data_digest, read_run_state, versions
from tokentune.training.checkpoints.same_run import check_same_run
from tokentune.training.checkpoints.saving import checkpoints_of, clear_leftovers, fault_of, set_aside, step_of
from tokentune.training.distributed.engines import check_checkpoint
from tokentune.training.distributed.interruptions import Interrupted, defer_interruptions
from tokentune.training.grouping import units_digest

logger = logging.getLogger(__name__)


@dataclass
class Start:
    """Where a run begins.

    Attributes:
        checkpoint: the one that it continues from; None: from the beginning.
        in_place: it continues in the folder that it is written to.
        broken: damaged checkpoints of that folder, newer than `checkpoint`.
    """

    checkpoint: Path | None = None
    in_place: bool = False
    broken: list[Path] = field(default_factory=list)


def what_to_resume(flags: dict[str, Any], run_folder: Path) -> Start:
    """Finds the checkpoint that --resume_from_checkpoint asks for, and checks its files. Changes nothing.

    Args:
        flags: {name: value} of the command.

    Raises:
        UserError: there is none, it is damaged, or it is another run's.
        SystemExit: 0, where the run is complete.
    """
    asked = flags["resume_from_checkpoint"]
    if asked is None or flags["preview"] is not None:
        return Start()
    require(
        not flags["overwrite_output_dir"],
        "--overwrite_output_dir would delete what --resume_from_checkpoint goes on from: leave one of them out",
    )
    require(
        "lomo" not in flags["optim"],
        f"--optim {flags['optim']} keeps its state where no checkpoint can hold it: it cannot be resumed",
    )
    inside = asked == "last" or Path(asked).absolute().parent == run_folder.absolute()
    if inside and (run_folder / SUMMARY_NAME).exists():
        _end_complete(flags, run_folder)
    if asked == "last":
        return _newest_whole(flags, run_folder)
    checkpoint = Path(asked)
    if not checkpoint.is_dir() or step_of(checkpoint) is None:
        raise UserError(
            f"--resume_from_checkpoint {asked}: there is no such checkpoint; give last, or a folder checkpoint-<step>"
        )
    fault = fault_of(checkpoint)
    require(fault is None, f"--resume_from_checkpoint {asked}: it {fault}. Give an older one, or last")
    return _start_at(checkpoint, flags, Start(in_place=inside))


def _start_at(checkpoint: Path, flags: dict[str, Any], start: Start) -> Start:
    check_same_run(flags, read_run_state(checkpoint)["settings"], str(checkpoint))
    check_checkpoint(checkpoint)
    start.checkpoint = checkpoint
    return start


def _end_complete(flags: dict[str, Any], run_folder: Path) -> None:
    path = run_folder / SUMMARY_NAME
    try:
        settings = dict(json.loads(path.read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not the summary of a run, so whether it is complete cannot be told.\n"
            "Delete the file to go on from the last checkpoint, or give --overwrite_output_dir."
        ) from error
    check_same_run(flags, settings, f"the finished run in {run_folder}")
    logger.info("the run in %s is complete: nothing to do (--overwrite_output_dir would train it again)", run_folder)
    sys.exit(0)


def _newest_whole(flags: dict[str, Any], run_folder: Path) -> Start:
    start = Start(in_place=True)
    for checkpoint in checkpoints_of(run_folder):
        fault = fault_of(checkpoint)
        if fault is not None:
            logger.warning("%s %s: passed over, and kept aside as broken-%s", checkpoint, fault, checkpoint.name)
            start.broken.append(checkpoint)
            continue
        best = _best_of(checkpoint) if flags["load_best_model_at_end"] else checkpoint
        fault = fault_of(best) if best.name != checkpoint.name else None
        if fault is not None:
            logger.warning("%s is passed over: the best weights up to there, %s, %s", checkpoint, best, fault)
            continue
        _start_at(checkpoint, flags, start)
        logger.info("going on from %s", checkpoint)
        return start
    logger.info("%s holds no whole checkpoint yet: starting from the beginning", run_folder)
    return start


def _best_of(checkpoint: Path) -> Path:
    """The best checkpoint when this one was written; itself where there was none."""
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    step = state.get("best_global_step")
    return checkpoint if step is None else checkpoint.with_name(f"checkpoint-{step}")


def prepare_run_folder(run_folder: Path, start: Start) -> None:
    """Clears a run's folder but for what the run continues from; renames damaged checkpoints."""
    if not start.in_place:
        clear_run_folder(run_folder)
        return
    for checkpoint in start.broken:
        set_aside(checkpoint)
    if start.checkpoint is None:
        clear_run_folder(run_folder, keep_broken=True)
    else:
        clear_leftovers(run_folder)


def train_to_the_end(trainer: Trainer, start: Start) -> None:
    """Trains, from where `start` says.

    From here on a SIGTERM or Ctrl-C ends the run after its step, and not at all once only saving is left.

    Raises:
        UserError: the training data is not the checkpoint's.
        Interrupted: after a signal, with a checkpoint saved.
    """
    trainer.data_digest = data_digest(trainer.train_dataset)
    checkpoint = None
    if start.checkpoint is not None:
        # Under its own name, which an interrupted replacement had taken away.
        checkpoint = start.checkpoint.with_name(f"checkpoint-{step_of(start.checkpoint)}")
        trainer.accelerator.wait_for_everyone()
        saved = read_run_state(checkpoint)
        require(
            saved["data"] == trainer.data_digest,
            f"the training data is not what it was when {checkpoint} was written (file, template, tokenizer or their "
            "order changed): give the same, or start anew in another --model_save_path",
        )
        require(
            saved.get("grouping") == units_digest(trainer.units),
            f"--group_by_length puts other rows together than when {checkpoint} was written: start anew in another "
            "--model_save_path",
        )
        check_processes(trainer, saved)
        then = saved["versions"]
        for name, now in versions().items():
            if then.get(name) != now:
                logger.warning("the checkpoint was written with %s %s, this is %s", name, then.get(name), now)
    defer_interruptions()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except Interrupted:
        # Closes what callbacks hold open (the progress bar, TensorBoard's file), as the end of training does.
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        raise


def check_processes(trainer: Trainer, saved: dict[str, Any]) -> None:
    """Refuses, UserError, another number of processes where it would change the batches; warns where not."""
    before, now = saved["batch"]["processes"], trainer.args.world_size
    if before != now:
        require(
            saved["data"] is not None or trainer.args.dataloader_num_workers <= 1,
            f"the checkpoint was written by {before} process(es), and {now} go on: with --streaming and several "
            "--num_workers the batches would be others. Start as many again",
        )
        logger.warning(
            "the checkpoint was written by %d process(es), and %d go on: the same batches, but other dropout",
            *(before, now),
        )
