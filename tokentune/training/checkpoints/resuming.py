"""`--resume_from_checkpoint`: where a run goes on, and whether that is the same run at all.

A resumed run ends with the weights of one that was never interrupted: to the last bit on the CPU, where the same flags,
data and libraries give the same numbers. Flags that would make it another run are refused; flags that change the order
of sums alone are named in a warning; where things are written, and how often, may change.
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
from tokentune.settings.finetune import Arguments
from tokentune.settings.flags import require
from tokentune.sources import is_local_path
from tokentune.training.checkpoints.run_folder import clear_run_folder
from tokentune.training.checkpoints.run_state import data_digest, read_run_state, versions
from tokentune.training.checkpoints.saving import checkpoints_of, clear_leftovers, fault_of, set_aside, step_of
from tokentune.training.distributed.engines import check_checkpoint
from tokentune.training.distributed.interruptions import Interrupted, defer_interruptions

logger = logging.getLogger(__name__)

# What a run writes and watches, and where: nothing of it reaches the weights.
HARMLESS = {
    *("model_save_path", "overwrite_output_dir", "save_steps", "save_total_limit", "logging_steps", "logging_dir"),
    *("report_to", "print_run_folder", "resume_from_checkpoint", "preview", "dry_run", "report_memory", "offline"),
    *("memory_snapshot", "skip_memory_probe", "skip_verification", "num_workers", "tokenize_workers", "data_cache"),
    *("push_to_hub", "trust_remote_code", "allow_pickle", "fp16_opt_level", "hub_public"),
}
# The same numbers, added up in another order or rounded elsewhere; mostly what helps after running out of memory.
ROUNDING = {
    *("gradient_accumulation_steps", "auto_micro_batch", "gradient_checkpointing", "checkpoint_rest", "offload_kv"),
    *("chunked_loss", "attn_implementation", "use_liger_kernel", "model_parallel"),
}
# Not with a stream that several workers read: each fills the places of dropped rows with later ones of its own batches.
STREAMED = {"num_workers", "gradient_accumulation_steps"}
_BY_NAME = {  # files may have moved; whether the rows are the same is looked at when they are there
    *("model_name_or_path", "dataset_name_or_path", "eval_dataset_name_or_path", "prompt_template_name_or_path"),
    "chat_template",
}


@dataclass
class Start:
    """Where a run begins.

    Attributes:
        checkpoint: what it goes on from; None: from the beginning.
        in_place: it goes on in the folder that it is written to.
        broken: damaged checkpoints of that folder, newer than `checkpoint`.
    """

    checkpoint: Path | None = None
    in_place: bool = False
    broken: list[Path] = field(default_factory=list)


def what_to_resume(arguments: Arguments, run_folder: Path) -> Start:
    """Finds the checkpoint that --resume_from_checkpoint asks for, and looks whether it is whole. Changes nothing.

    Raises:
        UserError: there is none, it is damaged, or it is another run's.
        SystemExit: 0, where the run is complete.
    """
    asked = arguments.run.resume_from_checkpoint
    if asked is None or arguments.run.preview is not None:
        return Start()
    require(
        not arguments.output.overwrite_output_dir,
        "--overwrite_output_dir would delete what --resume_from_checkpoint goes on from: leave one of them out",
    )
    require(
        "lomo" not in arguments.optimization.optim,
        f"--optim {arguments.optimization.optim} keeps its state where no checkpoint can hold it: it cannot be resumed",
    )
    inside = asked == "last" or Path(asked).absolute().parent == run_folder.absolute()
    if inside and (run_folder / SUMMARY_NAME).exists():
        _end_complete(arguments, run_folder)
    if asked == "last":
        return _newest_whole(arguments, run_folder)
    checkpoint = Path(asked)
    if not checkpoint.is_dir() or step_of(checkpoint) is None:
        raise UserError(
            f"--resume_from_checkpoint {asked}: there is no such checkpoint; give last, or a folder checkpoint-<step>"
        )
    fault = fault_of(checkpoint)
    require(fault is None, f"--resume_from_checkpoint {asked}: it {fault}. Give an older one, or last")
    check_same_run(arguments, read_run_state(checkpoint)["settings"], str(checkpoint))
    check_checkpoint(checkpoint)
    return Start(checkpoint, in_place=inside)


def _end_complete(arguments: Arguments, run_folder: Path) -> None:
    path = run_folder / SUMMARY_NAME
    try:
        settings = dict(json.loads(path.read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not the summary of a run, so whether it is complete cannot be told.\n"
            "Delete the file to go on from the last checkpoint, or give --overwrite_output_dir."
        ) from error
    check_same_run(arguments, settings, f"the finished run in {run_folder}")
    logger.info("the run in %s is complete: nothing to do (--overwrite_output_dir would train it again)", run_folder)
    sys.exit(0)


def _newest_whole(arguments: Arguments, run_folder: Path) -> Start:
    start = Start(in_place=True)
    for checkpoint in checkpoints_of(run_folder):
        fault = fault_of(checkpoint)
        if fault is not None:
            logger.warning("%s %s: passed over, and kept aside as broken-%s", checkpoint, fault, checkpoint.name)
            start.broken.append(checkpoint)
            continue
        best = _best_of(checkpoint) if arguments.run.load_best_model_at_end else None
        fault = fault_of(best) if best is not None and best.name != checkpoint.name else None
        if fault is not None:
            logger.warning("%s is passed over: the best weights up to there, %s, %s", checkpoint, best, fault)
            continue
        check_same_run(arguments, read_run_state(checkpoint)["settings"], str(checkpoint))
        check_checkpoint(checkpoint)
        start.checkpoint = checkpoint
        logger.info("going on from %s", checkpoint)
        return start
    logger.info("%s holds no whole checkpoint yet: starting from the beginning", run_folder)
    return start


def _best_of(checkpoint: Path) -> Path | None:
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    step = state.get("best_global_step")
    return None if step is None else checkpoint.with_name(f"checkpoint-{step}")


def check_same_run(arguments: Arguments, before: dict[str, Any], where: str) -> None:
    """Refuses, UserError, flags that make another run of the one whose settings are given; warns of rounding."""
    now = json.loads(json.dumps(arguments.settings()))
    changed = {name: before[name] for name in now if name in before and not _same(name, before[name], now[name])}
    workers = max(settings.get("num_workers", 0) for settings in (before, now))
    bound = STREAMED if now.get("streaming") and workers > 1 else set()
    other = [name for name in changed if name not in (HARMLESS | ROUNDING) - bound]
    if other:
        listed = ", ".join(f"--{name} {_shown(now[name])} (there {_shown(changed[name])})" for name in other)
        raise UserError(
            f"{where} was made with other flags, and going on with these would be another run:\n{listed}.\n"
            "Give the same flags again, or start anew: another --model_save_path, or --overwrite_output_dir."
        )
    rounding = [name for name in changed if name in ROUNDING]
    if rounding:
        logger.warning(
            "%s: not as in %s; the result is the same up to rounding", ", ".join(f"--{n}" for n in rounding), where
        )


def _same(name: str, before: Any, now: Any) -> bool:
    if name in _BY_NAME:
        return _file_names(before) == _file_names(now)
    return before == now


def _file_names(value: Any) -> Any:
    if isinstance(value, list):
        return [_file_names(item) for item in value]
    return Path(value).name if isinstance(value, str) and is_local_path(value) else value


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def prepare_run_folder(run_folder: Path, start: Start) -> None:
    """Makes room for a run: what is gone on with stays, damaged checkpoints get another name, the rest goes."""
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

    From here on a SIGTERM or Ctrl-C ends the run after its step, and not at all once only the saving is left.

    Raises:
        UserError: the training data is not the checkpoint's.
        Interrupted: after a signal, with a checkpoint saved.
    """
    rows = trainer.train_dataset
    trainer.data_digest = data_digest(getattr(rows, "rows", rows))
    checkpoint = None
    if start.checkpoint is not None:
        # Under its own name, which an interrupted replacement had taken from it.
        checkpoint = start.checkpoint.with_name(f"checkpoint-{step_of(start.checkpoint)}")
        trainer.accelerator.wait_for_everyone()
        saved = read_run_state(checkpoint)
        require(
            saved["data"] == trainer.data_digest,
            f"the training data is not what it was when {checkpoint} was written (file, template, tokenizer or their "
            "order changed): give the same, or start anew in another --model_save_path",
        )
        check_processes(trainer, saved)
        _warn_of_versions(saved)
    defer_interruptions()
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except Interrupted:
        # What callbacks have open (the bar, TensorBoard's file) is closed, as at the end of training.
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        raise


def check_processes(trainer: Trainer, saved: dict[str, Any]) -> None:
    """Refuses, UserError, another number of processes where it would change the batches; warns where not."""
    if saved["batch"]["processes"] != trainer.args.world_size:
        require(
            saved["data"] is not None or trainer.args.dataloader_num_workers <= 1,
            f"the checkpoint was written by {saved['batch']['processes']} process(es), and {trainer.args.world_size} "
            "go on: with --streaming and several --num_workers the batches would be others. Start as many again",
        )
        logger.warning(
            "the checkpoint was written by %d process(es), and %d go on: the same batches, but other dropout",
            saved["batch"]["processes"],
            trainer.args.world_size,
        )


def _warn_of_versions(saved: dict[str, Any]) -> None:
    then, now = saved["versions"], versions()
    for name in now:
        if then.get(name) != now[name]:
            logger.warning("the checkpoint was written with %s %s, this is %s", name, then.get(name), now[name])
