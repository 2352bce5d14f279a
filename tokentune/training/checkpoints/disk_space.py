"""Whether the disk has room for a run's result and its checkpoints, told before the first step."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from tokentune.core.compat.fsdp import size_of
from tokentune.core.saved_tensors.saved_bytes import gib
from tokentune.errors import UserError
from tokentune.training.checkpoints.resuming import Start
from tokentune.training.checkpoints.run_folder import existing_part, left_by_a_run
from tokentune.training.checkpoints.saving import checkpoints_of
from tokentune.training.optimizers import state_bytes
from tokentune.training.trainer import SelectiveTrainer
from tokentune.training.trainer_arguments import Extent

logger = logging.getLogger(__name__)
BEGINNING = Start()
_BESIDE = 1.01  # of the weights: their names, the tokenizer, logs


@dataclass(frozen=True)
class DiskSpace:
    """What a run writes, in bytes, and what is free on the file system of its folder.

    Attributes:
        result: the trained model, or its adapters, at the end; of all seeds.
        checkpoint: one checkpoint: weights as they are trained, and the optimizer's states.
        most: how many of them are there at once; a new one is written before the oldest is deleted.
        needed: at once, at most, beside what is there already.
        free: with what the run clears away first.
        adapters: whether adapters alone are saved.
    """

    folder: Path
    result: int
    checkpoint: int
    most: int
    needed: int
    free: int
    adapters: bool

    def check(self) -> None:
        """Refuses, UserError, a run whose result does not fit; warns where it fits, but checkpoints may not."""
        if self.result > self.free:
            raise UserError(self.shortage)
        if self.shortage is not None:
            logger.warning(self.shortage)

    @property
    def shortage(self) -> str | None:
        """What does not fit, and what to do; None: all fits."""
        if max(self.result, self.needed) <= self.free:
            return None
        room = "Make room, or give a --model_save_path on a larger disk"
        if self.result > self.free:
            lora = "" if self.adapters else ", or --lora, which saves the adapters alone"
            return (
                f"the trained model could not be saved: it takes about {gib(self.result)}, and {gib(self.free)} are "
                f"free on the disk of {self.folder}.\n{room}{lora}."
            )
        return (
            f"checkpoints may not fit: up to {self.most} of about {gib(self.checkpoint)} are there at once, beside a "
            f"result of {gib(self.result)}, and {gib(self.free)} are free on the disk of {self.folder}.\n{room}, a "
            "lower --save_total_limit or a higher --save_steps. A checkpoint that does not fit is left out."
        )

    def __str__(self) -> str:
        """For the plan of a dry run."""
        each = f"up to {self.most} checkpoints of about {gib(self.checkpoint)} at once, " if self.most else ""
        said = f"{each}a result of about {gib(self.result)}; {gib(self.free)} are free"
        return said if self.shortage is None else f"{said}: {self.shortage}"


def disk_space(
    trainer: SelectiveTrainer,
    folder: Path,
    saved_dtype: torch.dtype,
    start: Start = BEGINNING,
    *,
    results: int = 1,
) -> DiskSpace:
    """What a run of this trainer, before `train()`, needs.

    Args:
        saved_dtype: of the result's floating-point weights, where it is a whole model.
        start: where the run begins: checkpoints that it goes on from are there already.
        results: how many are to be saved, with those of later seeds.
    """
    adapters = not isinstance(trainer.model, PreTrainedModel)
    saved = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad or not adapters]
    weights = sum(size_of(parameter) * parameter.element_size() for parameter in saved)
    result = weights if adapters else sum(map(size_of, saved)) * saved_dtype.itemsize
    result, checkpoint = round(results * _BESIDE * result), round(_BESIDE * (weights + _states(trainer)))
    written, kept = _checkpoints(trainer)
    most = min(written, kept + 1)
    free, there = shutil.disk_usage(existing_part(folder)).free, 0
    if start.in_place and start.checkpoint is not None:
        there = sum(bytes_in(path) for path in checkpoints_of(folder) if path not in start.broken)
    else:
        free += sum(map(bytes_in, left_by_a_run(folder, keep_broken=start.in_place)))
    needed = max(most * checkpoint, min(written, kept) * checkpoint + result) - there
    return DiskSpace(folder, result, checkpoint, most, needed, free, adapters)


def _states(trainer: SelectiveTrainer) -> float:
    """Bytes of a checkpoint besides the weights."""
    if trainer.args.save_only_model:
        return 0
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    each = {dtype: state_bytes(trainer.args, dtype) for dtype in {parameter.dtype for parameter in trained}}
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # which save what is trained once more
        each = {dtype: states + dtype.itemsize for dtype, states in each.items()}
    return sum(size_of(parameter) * each[parameter.dtype] for parameter in trained)


def _checkpoints(trainer: SelectiveTrainer) -> tuple[int, int]:
    """How many a run writes, at most, and how many of them are kept."""
    settings, extent = trainer.args, Extent.of(trainer.train_dataset, trainer.args)
    due, kept = extent.steps // settings.save_steps, settings.save_total_limit
    if settings.save_strategy != SaveStrategy.BEST:
        return due, kept
    each_epoch = settings.eval_strategy == IntervalStrategy.EPOCH
    best = extent.epochs if each_epoch else extent.steps // settings.eval_steps + 1  # any validation may be the best
    return due + best, max(kept, 2) if due else kept  # the best one stays beside the newest


def bytes_in(path: Path) -> int:
    """Of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file())
