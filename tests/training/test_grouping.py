"""--group_by_length: batches of rows that are alike, in an order that seed and epoch decide."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_trainer import arguments_for

from tokentune.data.collators import CausalCollator, SeededRows
from tokentune.errors import UserError
from tokentune.sampling.schedule import Answers
from tokentune.training.distributed.engines import EvenSampler
from tokentune.training.grouping import GroupedSampler, units_digest
from tokentune.training.trainer import SelectiveTrainer


def of_two_sizes() -> np.ndarray:
    """Two kinds of rows, by turns."""
    return np.array([[40, 4], [40, 60]] * 32)


def test_an_order_of_seed_and_epoch() -> None:
    sampler = GroupedSampler(of_two_sizes(), seed=3, together=4)
    order = list(sampler)
    assert sorted(order) == list(range(64)) and len(sampler) == 64
    assert list(sampler) == order == list(GroupedSampler(of_two_sizes(), seed=3, together=4))
    sampler.set_epoch(1)
    later = list(sampler)
    again = GroupedSampler(of_two_sizes(), seed=3, together=4)
    again.set_epoch(1)
    assert order != later == list(again) != list(GroupedSampler(of_two_sizes(), seed=4, together=4))


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 33, 63, 64, 65])
def test_every_row_comes_once_and_the_smaller_batch_last(rows: int) -> None:
    units = of_two_sizes()[:rows] if rows < 65 else np.repeat(of_two_sizes(), 2, axis=0)[:rows]
    order = list(GroupedSampler(units.reshape(-1, 2), seed=0, together=4))
    assert sorted(order) == list(range(rows))
    mixed = [len({*units[order[first : first + 4], 1]}) > 1 for first in range(0, rows, 4)]
    assert sum(mixed) <= max(1, -(-rows // 16))  # at most one of each window


def test_halves_are_made_by_what_differs_most() -> None:
    """Every length with every number of selected tokens: batches differ little in both."""
    units = np.array([[2 * n, 4 * k] for n in (10, 20, 30, 40) for k in (1, 2, 3, 4)] * 16)
    sampler = GroupedSampler(units, seed=1, together=4)
    order = list(sampler)
    of_batches = np.array([np.ptp(units[order[first : first + 4]], axis=0) for first in range(0, 256, 4)])
    lengths, selected = of_batches.mean(0)
    assert lengths < 20 and selected < 6  # of 60 and 12


def test_several_processes_fill_the_grouped_order_up() -> None:
    order = GroupedSampler(of_two_sizes()[:10], seed=3, together=4)
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
        total += sequences * (2 * length + 4 * selected)
    return total


def test_rows_of_one_length_are_told_apart_by_their_answers() -> None:
    """32 rows of 20 tokens with 1 answer token, as many with 15: 44 and 100 units. By length they mix; grouped by both
    at most one batch of each window does, in which the short answers are filled up."""
    shapes = [(20, 1), (20, 15)] * 32
    rows, units = rows_of(shapes), np.array([[2 * n, 4 * k] for n, k in shapes])
    own = 32 * (44 + 100)
    assert units.sum() == own
    for numbers, most in ((units, 4 * 3), (units * [1, 0], 32)):
        order = list(GroupedSampler(numbers, 0, 4))
        batches = [units[order[first : first + 4]].sum(1) for first in range(0, 64, 4)]
        filled_up = sum(int((batch == 44).sum()) for batch in batches if batch.max() == 100)
        assert padded(rows, order, 4) == own + filled_up * (100 - 44)
        assert (filled_up <= most) and (filled_up > 12) == (most == 32)


@pytest.mark.parametrize("accumulation", [1, 2, 8])
def test_micro_batches_do_not_change_the_order(
    accumulation: int, make_trainer: Callable[..., SelectiveTrainer]
) -> None:
    words = f"--global_batch_size 8 --gradient_accumulation_steps {accumulation} --group_by_length --tokentune"
    trainer = make_trainer(f"{words} --prefix_length answers", rows=40)
    lengths, targets = (np.array([f(row) for row in trainer.train_dataset.rows]) for f in (_length, _targets))
    assert trainer.units.T.tolist() == [(2 * lengths).tolist(), (4 * np.maximum(targets, 1)).tolist()]
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
