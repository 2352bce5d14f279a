"""Several processes: whose checkpoints a run can go on from, and equal work for all.

    accelerate launch --config_file scripts/launch/fsdp2.yaml ./tokentune/finetune.py ...
    torchrun --nproc_per_node 8 ./tokentune/finetune.py ...

The engines are others' (torch's DistributedDataParallel and `fully_shard`, DeepSpeed), set up by accelerate and the
Trainer. A run has to be the same on any number of processes, and two things are needed for it. The loss is divided by
the targets of all processes (the Trainer's `average_tokens_across_devices`, its default). And every row counts once:
where a loader would fill the last batch up with rows that were there already, `EvenSampler` puts rows without targets.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer

from tokentune.data.collators import CausalCollator, ClassificationCollator, SeededRows
from tokentune.data.packing import PackedCollator, PackedRows
from tokentune.errors import UserError
from tokentune.processes import DEEPSPEED, FSDP, engine, process_count
from tokentune.settings.flags import require

logger = logging.getLogger(__name__)


def check_checkpoint(checkpoint: Path) -> None:
    """Refuses a checkpoint that FSDP or DeepSpeed wrote in parts where another engine goes on, and the other way round.

    The number of processes may be another one, but for DeepSpeed.
    """
    names = [path.name for path in checkpoint.iterdir()]
    known = ((FSDP, "pytorch_model_fsdp"), (DEEPSPEED, "global_step"))
    wrote = next((of for of, start in known if any(name.startswith(start) for name in names)), None)
    chosen = engine() if engine() in (FSDP, DEEPSPEED) else None
    if wrote != chosen:
        by = f"by {wrote}" if wrote else f"without {chosen}"
        now = f"with {chosen}" if wrote is None else f"without {'it' if chosen is None else wrote}"
        raise UserError(
            f"{checkpoint} was written {by}, and cannot be gone on from {now}: launch the run as it was launched"
            + (", on any number of processes" if wrote != DEEPSPEED else "")
        )
    parts = len(list(checkpoint.glob("global_step*/*zero_pp_rank_*_optim_states.pt")))
    require(
        wrote != DEEPSPEED or parts == process_count(),
        f"{checkpoint} was written by {parts} processes of DeepSpeed, which cannot go on from it with "
        f"{process_count()}: launch as many, or take FSDP (LAUNCH=fsdp2) from the start",
    )


class EvenSampler(Sampler):
    """The order of a run in one process, and behind it None's, up to the same number of full batches per process.

    A None stands for a row without targets (`collators.SeededRows`): its loss is 0. accelerate would begin the rows
    again, some of which would then count twice in the last step of the epoch.
    """

    def __init__(self, order: Sampler, together: int) -> None:
        """`together`: rows of one micro-batch of all processes."""
        self.order = order
        self.blanks = -len(order) % together

    def __iter__(self) -> Iterator[int | None]:
        yield from self.order
        yield from [None] * self.blanks

    def __len__(self) -> int:
        return len(self.order) + self.blanks

    def set_epoch(self, epoch: int) -> None:
        self.order.set_epoch(epoch)


def even_sampler(trainer: Trainer, order: Sampler | None) -> EvenSampler | None:
    """The training order of several processes; None in one, and where a row without targets would count.

    Args:
        order: of the rows; None: random.
    """
    rows, settings, collator = trainer.train_dataset, trainer.args, trainer.data_collator
    if settings.world_size == 1 or not isinstance(rows, SeededRows | PackedRows):
        return None
    by_target = trainer.model_accepts_loss_kwargs and isinstance(collator, CausalCollator | PackedCollator)
    if isinstance(collator, ClassificationCollator):
        by_target = trainer.compute_loss_func is not None and not isinstance(rows.rows[0]["labels"], float)
    if not by_target:
        if len(rows) % (settings.train_batch_size * settings.world_size):
            logger.warning("the last batch of an epoch is filled up with its first rows, which then count twice")
        return None
    if order is None:
        order = SeedableRandomSampler(range(len(rows)), data_seed=settings.data_seed)
    return EvenSampler(order, settings.train_batch_size * settings.world_size)


def as_often_as_others(loader: DataLoader, rows: Any, collate: Any) -> Iterator[dict[str, Tensor]]:
    """The batches of a loader that gives each row to one process; then some without targets, up to the others' number.

    Where the weights are split, each forward pass is one of all processes: one that stops early leaves the others
    waiting for ever.

    Args:
        loader: of `rows`, of this process's share.
        collate: makes a batch of rows, "labels" (B, S) among it.
    """
    rounds, batch = -(-len(rows) // loader.total_batch_size), None
    for batch in loader:
        yield batch
        rounds -= 1
    for _ in range(rounds):
        if batch is None:
            batch = {name: tensor.to(loader.device) for name, tensor in collate([rows[0]]).items()}
        yield {**batch, "labels": torch.full_like(batch["labels"], -100)}
