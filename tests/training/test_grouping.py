"""--group_by_length: batches of rows that cost about as much, in an order that seed and epoch decide."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_trainer import arguments_for

from tokentune.data.collators import CausalCollator, SeededRows
from tokentune.data.step_work import units
from tokentune.errors import UserError
from tokentune.sampling.schedule import Answers
from tokentune.training.distributed.engines import EvenSampler
from tokentune.training.grouping import GroupedSampler, units_digest
from tokentune.training.trainer import SelectiveTrainer


def test_rows_are_sorted_within_windows_of_a_random_order() -> None:
    costs = np.arange(64) % 16
    sampler = GroupedSampler(costs, seed=3, together=4)
    order = list(sampler)
    assert sorted(order) == list(range(64)) and len(sampler) == 64
    for window in range(0, 64, 16):  # a quarter of the rows; the very first row may be the costliest of another window
        sorted_part = costs[order[window : window + 16]][1:]
        assert (np.diff(sorted_part[window > 0 :]) <= 0).sum() >= 14
    assert list(sampler) == order == list(GroupedSampler(costs, seed=3, together=4))
    sampler.set_epoch(1)
    assert list(sampler) != order
    again = GroupedSampler(costs, seed=3, together=4)
    again.set_epoch(1)
    assert list(again) == list(sampler)


def test_several_processes_fill_the_grouped_order_up() -> None:
    order = GroupedSampler(np.arange(10), seed=3, together=4)
    filled = EvenSampler(order, together=4)
    assert list(filled) == [*order, None, None]
    filled.set_epoch(2)
    assert order.epoch == 2


def rows_of(shapes: list[tuple[int, int]]) -> SeededRows:
    """Rows of so many tokens and target positions."""
    ids = [torch.randint(3, 90, (length,)).tolist() for length, _ in shapes]
    labels = [[-100] * (n - k) + row[n - k :] for (n, k), row in zip(shapes, ids, strict=True)]
    return SeededRows([{"input_ids": row, "labels": of_row} for row, of_row in zip(ids, labels, strict=True)], seed=0)


def padded(rows: SeededRows, order: list[int], micro_batch: int) -> int:
    """The units of an epoch's batches with their padding, as the collator makes them."""
    collate, total = CausalCollator(0, Answers()), 0
    for first in range(0, len(order), micro_batch):
        batch = collate([rows[row] for row in order[first : first + micro_batch]])
        (sequences, length), selected = batch["input_ids"].shape, batch["selected_positions"].shape[1]
        total += sequences * units(length, selected, lora=False)
    return total


def test_rows_of_one_length_are_told_apart_by_their_answers() -> None:
    """32 rows of 20 tokens with 1 answer token, as many with 15: 44 and 100 units. By length they mix; by cost at most
    one batch of each window does, in which the short answers are filled up."""
    shapes = [(20, 1), (20, 15)] * 32
    rows, lengths = rows_of(shapes), np.full(64, 20)
    costs = units(lengths, np.array([k for _, k in shapes]), lora=False)
    own = 32 * (44 + 100)
    assert costs.sum() == own
    by_cost, by_length = (list(GroupedSampler(numbers, 0, 4)) for numbers in (costs, lengths))
    windows = [by_cost[first : first + 16] for first in range(0, 64, 16)]
    filled_up = sum(-int((costs[window] == 100).sum()) % 4 for window in windows)
    assert padded(rows, by_cost, 4) == own + filled_up * (100 - 44)
    mixed = [by_length[first : first + 4] for first in range(0, 64, 4)]
    filled_up_by_length = sum(int((costs[batch] == 44).sum()) for batch in mixed if costs[batch].max() == 100)
    assert padded(rows, by_length, 4) == own + filled_up_by_length * (100 - 44)
    assert filled_up_by_length > 2 * filled_up


@pytest.mark.parametrize("accumulation", [1, 2, 8])
def test_micro_batches_do_not_change_the_order(
    accumulation: int, make_trainer: Callable[..., SelectiveTrainer]
) -> None:
    words = f"--global_batch_size 8 --gradient_accumulation_steps {accumulation} --group_by_length --tokentune"
    trainer = make_trainer(f"{words} --prefix_length answers", rows=40)
    lengths, targets = (np.array([f(row) for row in trainer.train_dataset.rows]) for f in (_length, _targets))
    assert trainer.units.tolist() == (2 * lengths + 4 * np.maximum(targets, 1)).tolist()
    expected = list(GroupedSampler(trainer.units, trainer.args.data_seed, 8))
    shapes = [tuple(batch["input_ids"].shape) for batch in trainer.get_train_dataloader()]
    size = 8 // accumulation
    parts = [expected[first : first + size] for first in range(0, 40, size)]
    assert shapes == [(len(part), lengths[part].max()) for part in parts]


def _length(row: dict) -> int:
    return len(row["input_ids"])


def _targets(row: dict) -> int:
    return sum(label != -100 for label in row["labels"][1:])


def test_without_the_flag_rows_come_in_random_order(make_trainer: Callable[..., SelectiveTrainer]) -> None:
    trainer = make_trainer("--global_batch_size 8 --tokentune --prefix_length answers")
    assert trainer.units is None and units_digest(trainer.units) is None


def test_streams_cannot_be_grouped(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--streaming with --group_by_length"):
        arguments_for(tiny_llama_dir, tmp_path, "--streaming --max_steps 3 --group_by_length")
