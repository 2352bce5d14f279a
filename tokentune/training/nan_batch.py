"""The batch whose loss was no number: found again from its place in the run, and written down for inspection.

Its place is all that is kept while training, one number on the device: reading every loss would make the host wait for
the GPU, and keeping batches would take the memory that the run is short of. The order of the rows and their selection
depend on seed and epoch alone, so the place gives the batch back, exactly.
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
    """The number of the first micro-batch whose loss was not finite. Noting it waits for nothing."""

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
        The file (None: the batch cannot be had again) and the optimizer step, from 1.
    """
    settings = trainer.args
    update, place = divmod(number, settings.gradient_accumulation_steps)
    found = _batch_again(trainer, update, place)
    if found is None:
        return None, update + 1
    rows, batch = found
    facts = {"step": update + 1, "micro_batch": place + 1, "rows": rows, "sequences": _sequences(trainer, batch, rows)}
    rank = f"-rank{settings.process_index}" if settings.process_index else ""
    path = Path(settings.output_dir) / f"nan_batch{rank}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    return path, update + 1


def sampler_of(loader: DataLoader) -> Any:
    """The innermost sampler, which draws the order of the rows; None for a stream."""
    sampler = getattr(loader, "batch_sampler", None)
    while sampler is not None:
        inner = next((getattr(sampler, name) for name in ("batch_sampler", "sampler") if hasattr(sampler, name)), None)
        if inner is None:
            return sampler
        sampler = inner
    return None


def _batch_again(trainer: Trainer, update: int, place: int) -> tuple[list[int] | None, dict] | None:
    loader = trainer.get_train_dataloader()
    rows = trainer.train_dataset
    if not hasattr(rows, "__len__"):
        rows.set_epoch(0)
        batches = itertools.islice(loader, update * trainer.args.gradient_accumulation_steps + place, None)
        batch = next(batches, None)
        return None if batch is None else (None, batch)
    sampler = sampler_of(loader)
    if not hasattr(sampler, "set_epoch"):  # grouped by length: drawn from the process's random numbers
        return None
    updates_per_epoch = math.ceil(len(loader) / trainer.args.gradient_accumulation_steps)
    epoch, update = divmod(update, updates_per_epoch)
    sampler.set_epoch(epoch)
    rows.set_epoch(epoch)
    index = update * trainer.args.gradient_accumulation_steps + place
    numbers = next(itertools.islice(loader.batch_sampler, index, None), None)
    return None if numbers is None else (numbers, trainer.data_collator([rows[number] for number in numbers]))


def _sequences(trainer: Trainer, batch: dict[str, Any], rows: list[int] | None) -> list[dict[str, Any]]:
    """A batch's sequences, one by one, without their padding."""
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    tokenizer = trainer.processing_class
    sequences = []
    for index in range(len(batch["labels"])):
        length = int(mask[index].sum()) if mask is not None and mask.ndim == 2 else None
        entry: dict[str, Any] = {} if rows is None else {"row": rows[index]}
        if ids is not None:
            entry["input_ids"] = ids[index][:length].tolist()
            if isinstance(tokenizer, PreTrainedTokenizerBase):
                entry["text"] = tokenizer.decode(entry["input_ids"])
        for name, value in batch.items():
            if name in ("input_ids", "attention_mask") or not isinstance(value, Tensor) or value.ndim == 0:
                continue
            if value.is_floating_point() and value.ndim > 1:  # an image: its range says what is wrong with it
                row = value[index].float()
                entry[name] = {"shape": list(row.shape), "least": float(row.min()), "largest": float(row.max())}
            elif len(value) == len(batch["labels"]):
                entry[name] = value[index][:length].tolist() if value.ndim == 2 else value[index].tolist()
        sequences.append(entry)
    return sequences
