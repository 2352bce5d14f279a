"""The draw of `answers` and `answers+q`: all target positions, a share of the others, and how rows are filled up."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokentune.sampling.sampler import select_tokens, target_mask
from tokentune.sampling.schedule import Answers, Schedule, parse_prefix_length
from tokentune.sampling.strategies import strategy_names

CHOOSING = [name for name in strategy_names(scored=False) if name != "reference"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("answers", Answers()),
        ("answers+0.1", Answers(0.1)),
        ("answers+1.0", Answers(1.0)),
        ("answers+0.3:answers", Schedule(Answers(0.3), Answers())),
    ],
)
def test_parsing(text: str, value: Answers | Schedule) -> None:
    assert parse_prefix_length(text) == value
    assert str(value) == text.replace(":", "-")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("answers+", "share of the other tokens"),
        ("answers+1", "share of the other tokens"),  # one token more, or all of them?
        ("answers+0.0", "above 0.0"),
        ("answers+1.5", "at most 1.0"),
        ("answers+x.y", "answers alone"),
        ("answer", "nor answers or answers"),
        ("0.3:answers", "one share beside the answers to another"),
        ("answers:16", "one share beside the answers to another"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_prefix_length(text)


def test_a_schedule_of_shares() -> None:
    schedule = Schedule(Answers(0.3), Answers(0.1))
    assert schedule.largest == Answers(0.3)
    assert [schedule.at(step, 3).share for step in range(3)] == pytest.approx([0.3, 0.2, 0.1])


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Tensor]:
    """Rows with real tokens side by side, targets anywhere, and some tokens that are always selected."""
    rows, size = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    bits = st.lists(st.booleans(), min_size=size, max_size=size)
    real, targets, always = (torch.zeros(rows, size, dtype=torch.bool) for _ in range(3))
    for row in range(rows):
        start = draw(st.integers(0, size))
        real[row, start : draw(st.integers(start, size))] = True
        targets[row], always[row] = torch.tensor(draw(bits)), torch.tensor(draw(bits)) & torch.tensor(draw(bits))
    return {"attention_mask": real.long(), "targets": targets & real, "always": always & real}


@settings(max_examples=150, deadline=None)
@given(batches(), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.sampled_from(CHOOSING), st.integers(0, 5))
def test_all_targets_a_share_of_the_others_and_fillers_where_padding_ends(
    batch: dict[str, Tensor], share: float, strategy: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn = select_tokens(**batch, prefix_length=Answers(share), strategy=strategy, generator=generator)
    real, held, sizes = batch["attention_mask"].bool(), batch["targets"] | batch["always"], []
    assert drawn.weights is None
    assert (drawn.positions.diff(dim=1) > 0).all()
    for row, positions in enumerate(drawn.positions.tolist()):
        fillers = [] if drawn.fillers is None else drawn.positions[row][drawn.fillers[row]].tolist()
        own = {p for p in positions if real[row, p]} - set(fillers)
        must = set(held[row].nonzero().flatten().tolist())
        others = int(real[row].sum()) - len(must)
        assert must <= own and not must & set(fillers)
        count = int(share * others + 0.5)
        assert len(own) == len(must) + count or (not must and count == 0 and len(own) == min(1, others))
        padding = {p for p in positions if not real[row, p]}
        assert len(padding) == min(len(positions) - len(own), int((~real[row]).sum()))  # padding comes first
        assert len(padding) + len(fillers) + len(own) == len(positions)
        sizes.append(len(own))
    assert drawn.positions.shape[1] == max(1, *sizes)
    assert drawn.fillers is None or drawn.fillers.any()


def test_a_row_s_draw_does_not_depend_on_its_batch() -> None:
    real = torch.tensor([[1] * 8, [1] * 8, [1] * 5 + [0] * 3])
    targets = torch.zeros(3, 8, dtype=torch.bool)
    targets[0, 6:], targets[1, 1:], targets[2, 3] = True, True, True
    uniform = torch.rand(3, 8)
    together = select_tokens(real, Answers(0.4), targets=targets, scores=uniform)
    assert together.fillers.sum(1).tolist() == [3, 0, 1]
    for row in range(3):
        n = int(real[row].sum())
        rows = slice(row, row + 1)
        alone = select_tokens(real[rows, :n], Answers(0.4), targets=targets[rows, :n], scores=uniform[rows, :n])
        own = real[row].gather(0, together.positions[row]).bool() & ~together.fillers[row]
        assert alone.fillers is None
        assert together.positions[row][own].tolist() == alone.positions[0].tolist()


def test_the_others_are_drawn_evenly() -> None:
    """Of positions 0 to 5, where 2 and 4 are targets, two more are drawn."""
    targets = torch.tensor([[False, False, True, False, True, False]] * 2000)
    drawn = select_tokens(
        torch.ones(2000, 6), Answers(0.5), targets=targets, generator=torch.Generator().manual_seed(0)
    )
    counts = Counter(drawn.positions.flatten().tolist())
    assert counts[2] == counts[4] == 2000
    assert all(abs(counts[other] - 1000) < 100 for other in (0, 1, 3, 5))


def test_strategies_choose_among_the_others() -> None:
    targets = target_mask(torch.tensor([[-100] * 6 + [7, -100]]), causal=True)  # position 5
    drawn = select_tokens(torch.ones(1, 8), Answers(0.4), targets=targets, strategy="contiguous")
    others = [p for p in drawn.positions[0].tolist() if p != 5]
    row = [p for p in range(8) if p != 5]
    assert others in [row[start : start + 3] for start in range(5)]


@pytest.mark.parametrize(("strategy", "why"), [("reference", "counts of its own"), ("loss", "scores")])
def test_strategies_that_cannot_choose_among_the_others(strategy: str, why: str) -> None:
    scores = {"loss": torch.zeros(1, 4)}
    with pytest.raises(ValueError, match=why):
        select_tokens(torch.ones(1, 4), Answers(0.5), strategy=strategy, token_scores=scores)
