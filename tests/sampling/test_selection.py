"""The draw: its sizes, its distribution, its guarantees, and the labels it leaves."""

from collections import Counter
from itertools import combinations
from math import comb

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokentune.sampling.sampler import (
    _reference_count,
    counts_of_rows,
    draw_scores,
    mask_unselected_labels,
    parse_prefix_length,
    select_positions,
    selected_count,
    target_mask,
)
from tokentune.sampling.strategies import strategy_names

PREFIX_LENGTHS = [1, 3, 16, 100, 0.001, 0.1, 0.25, 0.3, 0.5, 0.7, 0.999, 1.0]


def padded_mask(lengths: list[int], size: int, side: str = "right") -> Tensor:
    """(B, S), ones at `lengths` real tokens of each row."""
    position = torch.arange(size)
    rows = [position < n if side == "right" else position >= size - n for n in lengths]
    return torch.stack(rows).long()


def draws(rows: int, mask: list[int], prefix_length: int | float, **options: object) -> Tensor:
    """Many draws over one mask, as the rows of a batch: (rows, K)."""
    options = {name: torch.tensor([v] * rows) if isinstance(v, list) else v for name, v in options.items()}
    generator = torch.Generator().manual_seed(5)
    return select_positions(torch.tensor([mask] * rows), prefix_length, generator=generator, **options)


def chi_square(counts: list[int], expected: list[float]) -> float:
    return sum((count - mean) ** 2 / mean for count, mean in zip(counts, expected, strict=True))


@pytest.mark.parametrize(
    ("text", "value"), [("16", 16), ("1", 1), ("0.3", 0.3), (".5", 0.5), ("1.0", 1.0), (" 8 ", 8), ("5000", 5000)]
)
def test_parse_prefix_length(text: str, value: int | float) -> None:
    parsed = parse_prefix_length(text)
    assert parsed == value
    assert type(parsed) is type(value)  # 1 is one token, 1.0 all of them


@pytest.mark.parametrize("text", ["0", "-1", "abc", "1.5", "0.0", "-0.3", "nan", "inf", "-inf", "", "16 tokens", "0,3"])
def test_parse_prefix_length_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r"number of tokens .* proportion"):
        parse_prefix_length(text)


@pytest.mark.parametrize(
    ("prefix_length", "length", "count"),
    [
        (16, 100, 16),
        (16, 7, 7),
        (16, 0, 0),
        (0.3, 10, 3),
        (0.3, 1, 1),
        (0.01, 10, 1),
        (1.0, 9, 9),
        (0.3, 0, 0),
        (0.5, 5, 3),
        (0.5, 7, 4),  # halves go up: Python's round() would give 2 and 4
    ],
)
def test_selected_count(prefix_length: int | float, length: int, count: int) -> None:
    assert selected_count(prefix_length, length) == count


@pytest.mark.parametrize(
    ("prefix_length", "length", "count"), [(16, 100, 18), (0.3, 12, 5), (100, 10, 9), (5, 2, 2), (5, 1, 1), (5, 3, 2)]
)
def test_reference_count(prefix_length: int | float, length: int, count: int) -> None:
    assert _reference_count(prefix_length, length) == count


@pytest.mark.parametrize("prefix_length", PREFIX_LENGTHS)
@pytest.mark.parametrize(("strategy", "count"), [("random", selected_count), ("reference", _reference_count)])
def testcounts_of_rows_agree_with_one_row_and_grow_by_at_most_one(strategy, count, prefix_length) -> None:
    """The second half is what the fill with padding rests on."""
    lengths = torch.arange(600)
    counts = counts_of_rows(prefix_length, lengths, strategy)
    assert counts.tolist() == [count(prefix_length, n) for n in range(600)]
    assert set(counts.diff().tolist()) <= {0, 1}


@pytest.mark.parametrize("strategy", strategy_names(scored=False))
@pytest.mark.parametrize("side", ["left", "right"])
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    spare=st.integers(0, 3),
    prefix_length=st.sampled_from(PREFIX_LENGTHS),
    seed=st.integers(0, 1000),
    with_targets=st.booleans(),
)
def test_any_batch_gets_its_counts_in_order(strategy, side, lengths, spare, prefix_length, seed, with_targets) -> None:
    size = max(1, max(lengths) + spare)
    mask = padded_mask(lengths, size, side)
    generator = torch.Generator().manual_seed(seed)
    targets = torch.rand(mask.shape, generator=generator) < 0.2 if with_targets else None
    positions = select_positions(mask, prefix_length, targets=targets, strategy=strategy, generator=generator)

    count = _reference_count if strategy == "reference" else selected_count
    assert positions.dtype == torch.int64
    assert positions.shape == (len(lengths), max(1, count(prefix_length, max(lengths))))
    assert ((positions >= 0) & (positions < size)).all()
    assert (positions.diff(dim=-1) > 0).all()
    chosen_real = mask.gather(1, positions).sum(-1)
    assert chosen_real.tolist() == [count(prefix_length, n) for n in lengths]
    if with_targets and strategy == "random":
        has_target = (targets & mask.bool()).any(-1)
        hit = (targets & mask.bool()).gather(1, positions).any(-1)
        assert torch.equal(hit, has_target)


def test_k_is_the_longest_rows_count_and_a_full_rows_where_lengths_cannot_be_read() -> None:
    mask = padded_mask([10, 4], 16)
    assert select_positions(mask, 0.5).shape == (2, 5)
    assert select_positions(mask.to("meta"), 0.5).shape == (2, 8)


def test_proportion_of_one_is_every_real_token() -> None:
    assert select_positions(padded_mask([4, 2], 6), 1.0)[:, :2].tolist() == [[0, 1], [0, 1]]
    assert select_positions(padded_mask([4, 4], 4), 1.0).tolist() == [[0, 1, 2, 3]] * 2


def test_unknown_strategy() -> None:
    with pytest.raises(ValueError, match="best: there is no such strategy"):
        select_positions(torch.ones(1, 4), 2, strategy="best")


@pytest.mark.parametrize("mask", [[1] * 8, [0] * 3 + [1] * 8, [1] * 8 + [0] * 3])
def test_draws_are_uniform_over_sets(mask: list[int]) -> None:
    """Every one of the C(8, 3) = 56 sets equally often: uniform positions, and independent ones."""
    rows = 28_000
    first = mask.index(1)
    counts = Counter(tuple(p - first for p in row) for row in draws(rows, mask, 3).tolist())
    sets = list(combinations(range(8), 3))
    statistic = chi_square([counts[s] for s in sets], [rows / len(sets)] * len(sets))
    assert statistic < 93.2  # chi-square with 55 degrees of freedom: 0.1 % lie above


def test_a_missing_target_changes_only_the_draws_that_missed() -> None:
    """Target 6 of 8 positions, 3 selected: sets without it put it in the place of one of their own, at random."""
    rows = 28_000
    counts = Counter(map(tuple, draws(rows, [1] * 8, 3, targets=[i == 6 for i in range(8)]).tolist()))
    assert all(6 in s for s in counts)
    sets = [s for s in combinations(range(8), 3) if 6 in s]
    assert len(counts) == len(sets) == comb(7, 2)
    assert chi_square([counts[s] for s in sets], [rows / 21] * 21) < 45.3  # 20 degrees of freedom, 0.1 %

    without = draws(rows, [1] * 8, 3)
    forced = draws(rows, [1] * 8, 3, targets=[i == 6 for i in range(8)])
    held = (without == 6).any(-1)
    assert 0.3 < held.float().mean() < 0.45  # 3 / 8
    assert torch.equal(without[held], forced[held])
    missed = zip(without[~held].tolist(), forced[~held].tolist(), strict=True)
    assert all(set(after) - set(before) == {6} for before, after in missed)


def test_a_forced_target_is_uniform_among_the_targets() -> None:
    targets = [i in (3, 4, 9) for i in range(12)]
    positions = draws(9000, [1] * 12, 1, targets=targets)
    counts = Counter(positions.flatten().tolist())
    assert set(counts) == {3, 4, 9}
    assert chi_square([counts[p] for p in (3, 4, 9)], [3000.0] * 3) < 13.8  # 2 degrees of freedom, 0.1 %


def test_a_row_without_targets_draws_as_if_none_were_asked_for() -> None:
    assert torch.equal(draws(500, [1] * 9, 3, targets=[False] * 9), draws(500, [1] * 9, 3))


def test_targets_on_padding_are_no_targets() -> None:
    positions = draws(200, [1, 1, 1, 1, 0, 0], 2, targets=[False] * 4 + [True] * 2)
    assert positions.max() < 4


def test_always_selected_positions() -> None:
    positions = draws(2000, [1] * 6 + [0, 0], 3, always=[True] + [False] * 7)
    assert (positions[:, 0] == 0).all()
    counts = Counter(positions[:, 1:].flatten().tolist())
    assert chi_square([counts[p] for p in range(1, 6)], [800.0] * 5) < 18.5  # 4 degrees of freedom, 0.1 %
    with_target = draws(200, [1] * 6, 2, always=[True] + [False] * 5, targets=[False] * 5 + [True])
    assert with_target.tolist() == [[0, 5]] * 200


def test_always_wins_over_a_target_where_there_is_room_for_one() -> None:
    assert draws(50, [1] * 6, 1, always=[True] + [False] * 5, targets=[False] * 5 + [True]).tolist() == [[0]] * 50


@pytest.mark.parametrize("prefix_length", [3, 0.3])
def test_reference_draw(prefix_length: int | float) -> None:
    """First and last always, the last but one never, the others uniformly from 1 .. n - 3 (here 1 .. 9)."""
    positions = draws(9000, [0, 0] + [1] * 12, prefix_length, strategy="reference") - 2
    assert positions.shape[1] == 5  # 2 + 3; int(0.3 * (12 - 2)) = 3
    assert (positions[:, 0] == 0).all()
    assert (positions[:, -1] == 11).all()
    counts = Counter(positions[:, 1:-1].flatten().tolist())
    assert set(counts) == set(range(1, 10))
    assert chi_square([counts[p] for p in range(1, 10)], [3000.0] * 9) < 26.2  # 8 degrees of freedom, 0.1 %


def test_target_mask() -> None:
    labels = torch.tensor([[-100, -100, 5, 6], [7, -100, -100, -100]])
    assert target_mask(labels, causal=True).tolist() == [[False, True, True, False], [False] * 4]
    assert target_mask(labels, causal=False).tolist() == [[False, False, True, True], [True, False, False, False]]


@pytest.mark.parametrize("causal", [True, False])
def test_labels_left_are_those_of_selected_targets(causal: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 50, (6, 11), generator=generator)
    labels[torch.rand(6, 11, generator=generator) < 0.4] = -100
    before = labels.clone()
    positions = select_positions(torch.ones_like(labels), 4, generator=generator)
    masked = mask_unselected_labels(labels, positions, causal=causal)
    assert torch.equal(labels, before)
    shift = 1 if causal else 0
    for row in range(6):
        read = {p + shift for p in positions[row].tolist()}  # the labels that the selected outputs are compared with
        assert masked[row].tolist() == [labels[row, t].item() if t in read else -100 for t in range(11)]


def test_rows_scores_depend_on_their_seed_alone() -> None:
    scores = draw_scores([7, 8, 9], 40)
    assert scores.shape == (3, 40)
    assert torch.equal(draw_scores([9, 7], 25), scores[[2, 0], :25])
    assert not torch.equal(draw_scores([7 + 2**32], 40), scores[:1])  # all 64 bits of a seed count
    assert scores.min() >= 0
    assert scores.max() < 1
    many = draw_scores(range(2000), 10)
    assert abs(many.mean() - 0.5) < 0.01
    assert abs(torch.corrcoef(many.T)[~torch.eye(10, dtype=torch.bool)]).max() < 0.1  # neighbouring seeds, no pattern


def test_given_scores_decide() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.2, 0.8, 0.99]])
    assert select_positions(padded_mask([4], 5), 2, scores=scores).tolist() == [[1, 3]]


def test_labelled_selects_preferred_targets_then_targets_then_the_rest() -> None:
    """Positions 2 and 5 are preferred, 1 and 6 targets, 0, 3 and 4 neither; 7 is padding."""
    mask, preferred, targets = [1, 1, 1, 1, 1, 1, 1, 0], [0, 0, 1, 0, 0, 1, 0, 0], [0, 1, 1, 0, 0, 1, 1, 0]
    options = {"preferred": [bool(v) for v in preferred], "targets": [bool(v) for v in targets]}
    for count, certain, among in ((1, set(), {2, 5}), (3, {2, 5}, {1, 6}), (5, {1, 2, 5, 6}, {0, 3, 4})):
        found = draws(300, mask, count, strategy="labelled", **options)
        others = Counter(p for row in found.tolist() for p in row if p not in certain)
        assert all(certain <= set(row) for row in found.tolist())
        assert set(others) == among
        assert min(others.values()) > 300 / len(among) / 2  # each of them about as often as the others
    always = draws(50, mask, 3, strategy="labelled", always=[n == 0 for n in range(8)], **options)
    assert all(row == [0, 2, 5] for row in always.tolist())
