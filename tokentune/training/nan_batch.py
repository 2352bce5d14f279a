"""The batch whose loss was not finite: found again from its place in the run, and written to a file.

Only its place is kept while training, one number on the device: reading every loss would make the host wait for the
GPU, and keeping batches would take memory. The order of the rows and their selection depend on seed and epoch alone, so
the place gives the batch back exactly.
"""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer

from tokentune.training.checkpoints.saving import write_whole

_NONE = torch.iinfo(torch.int64).max


class FirstBadLoss:
    """The number of the first micro-batch whose loss was not finite. Noting it does not wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self._number = torch.full((), _NONE, dtype=torch.int64, device=device)

    def note(self, loss: Tensor, number: int) -> None:
        """`loss` of the micro-batch `number`, both of one process."""
        self._number = torch.where(torch.isfinite(loss), self._number, self._number.clamp(max=number))

    def number(self) -> int | None:
        """None: every loss so far was finite. Waits for the device."""
        number = int(self._number)
        return None if number == _NONE else number


def write_nan_batch(trainer: Trainer, number: int) -> tuple[Path | None, int]:
    """Writes `nan_batch.json` into the run's folder.

    Args:
        number: the micro-batch's, counted over the whole run: optimizer step x accumulation + place in the step.

    Returns:
        The file (None: the batch cannot be made again) and the optimizer step, from 1.
    """
    settings = trainer.args
    step, place = divmod(number, settings.gradient_accumulation_steps)
    rows, batch = _batch_again(trainer, step, place)
    if batch is None:
        return None, step + 1
    facts = {"step": step + 1, "micro_batch": place + 1, "rows": rows, "sequences": _sequences(trainer, batch, rows)}
    rank = f"-rank{settings.process_index}" if settings.process_index else ""
    path = Path(settings.output_dir) / f"nan_batch{rank}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    return path, step + 1


def sampler_of(loader: DataLoader) -> Any:
    """The innermost sampler, which draws the order of the rows; None for a stream."""
    sampler = inner = getattr(loader, "batch_sampler", None)
    while inner is not None:
        sampler = inner
        inner = getattr(sampler, "batch_sampler", getattr(sampler, "sampler", None))
    return sampler


def _batch_again(trainer: Trainer, step: int, place: int) -> tuple[list[int] | None, dict[str, Any] | None]:
    """The numbers of a batch's rows (None of a stream), and the batch (None: it cannot be made again)."""
    loader, rows = trainer.get_train_dataloader(), trainer.train_dataset
    accumulation = trainer.args.gradient_accumulation_steps
    if not hasattr(rows, "__len__"):
        rows.set_epoch(0)
        return None, next(itertools.islice(loader, step * accumulation + place, None), None)
    sampler = sampler_of(loader)
    epoch, step = divmod(step, math.ceil(len(loader) / accumulation))
    sampler.set_epoch(epoch)
    rows.set_epoch(epoch)
    numbers = next(itertools.islice(loader.batch_sampler, step * accumulation + place, None))
    return numbers, trainer.data_collator([rows[number] for number in numbers])


def _sequences(trainer: Trainer, batch: dict[str, Any], rows: list[int] | None) -> list[dict[str, Any]]:
    """A batch's sequences, one by one, without their padding."""
    mask, tokenizer, count = batch.get("attention_mask"), trainer.processing_class, len(batch["labels"])
    values = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.ndim}
    sequences = []
    for index in range(count):
        length = int(mask[index].sum()) if mask is not None and mask.ndim == 2 else None
        entry: dict[str, Any] = {} if rows is None else {"row": rows[index]}
        for name, value in values.items():
            if value.is_floating_point() and value.ndim > 1:  # an image: its range says what is wrong with it
                row = value[index].float()
                entry[name] = {"shape": list(row.shape), "least": float(row.min()), "largest": float(row.max())}
            elif len(value) == count and name != "attention_mask":
                entry[name] = value[index][:length].tolist() if value.ndim == 2 else value[index].tolist()
            if name == "input_ids" and isinstance(tokenizer, PreTrainedTokenizerBase):
                entry["text"] = tokenizer.decode(entry["input_ids"])
        sequences.append(entry)
    return sequences
