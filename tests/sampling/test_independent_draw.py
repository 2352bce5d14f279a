"""Draws of each token on its own: probabilities, independence, weights, how rows are filled up, and what is refused."""

from itertools import combinations
from math import comb
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tokentune.sampling.independent import count_at_quantile, why_not_independent
from tokentune.sampling.sampler import Selection, select_tokens
from tokentune.sampling.schedule import Answers, Schedule
from tokentune.sampling.strategies import strategy_names

ROWS = 40_000
TARGETS = torch.tensor([False, False, True, True, False, False, False])
REAL = torch.tensor([1, 1, 1, 1, 1, 0, 0])


def many(size: float | Answers, strategy: str = "random", **options: Tensor) -> Selection:
    generator = torch.Generator().manual_seed(0)
    options = {name: value.expand(ROWS, -1) for name, value in options.items()}
    real, targets = REAL.expand(ROWS, -1), TARGETS.expand(ROWS, -1)
    return select_tokens(
        real, size, targets=targets, strategy=strategy, generator=generator, independent=True, **options
    )


def of_position(drawn: Selection, values: Tensor) -> Tensor:
    """Values (B, K) of the drawn tokens at their positions, (B, S); 0 elsewhere."""
    own = torch.ones_like(drawn.positions, dtype=torch.bool) if drawn.fillers is None else ~drawn.fillers
    return torch.zeros(len(values), len(REAL), dtype=values.dtype).scatter(1, drawn.positions, values * own) * REAL


@pytest.mark.parametrize(
    ("size", "strategy", "probability"),
    [
        (0.3, "random", [0.3] * 5),
        (2, "random", [2 / 5] * 5),
        (9, "random", [1.0] * 5),
        (1.0, "random", [1.0] * 5),
        (Answers(0.3), "random", [0.3, 0.3, 1.0, 1.0, 0.3]),
        (Answers(0.3), "supervised", [0.3, 0.3, 1.0, 1.0, 0.3]),
    ],
)
def test_each_token_has_its_probability_whatever_else_is_drawn(size, strategy, probability) -> None:
    drawn = many(size, strategy)
    chosen = of_position(drawn, torch.ones(drawn.positions.shape))
    pi = torch.tensor(probability, dtype=torch.float64)
    assert not chosen[:, 5:].any()  # padding
    bound = 4.5 / ROWS**0.5  # standard deviations of at most 1/2
    assert (chosen[:, :5].mean(0) - pi).abs().max() <= bound / 2
    for one, other in combinations(range(5), 2):
        both = (chosen[:, one] * chosen[:, other]).mean()
        assert abs(both - pi[one] * pi[other]) <= bound / 2
    assert drawn.probabilities.dtype == torch.float64
    found = of_position(drawn, drawn.probabilities)
    assert torch.equal(found[:, :5], pi * chosen[:, :5])


def test_weights_are_one_over_the_probability_and_no_target_is_there_by_force() -> None:
    drawn = many(0.25)
    weights = of_position(drawn, drawn.weights)
    assert set(weights[:, TARGETS].unique().tolist()) == {0.0, 4.0}
    assert not weights[:, ~TARGETS].any() and not drawn.weights[drawn.fillers].any()
    assert (drawn.probabilities[drawn.fillers] == 1).all()
    assert (weights.sum(1) == 0).float().mean() == pytest.approx(0.75**2, abs=0.01)
    assert many(Answers(0.25)).weights is None  # all 1


def test_what_is_always_selected_has_probability_1() -> None:
    always = torch.tensor([True] + [False] * 6)
    drawn = many(0.25, always=always)
    chosen = of_position(drawn, torch.ones(drawn.positions.shape))
    assert (chosen[:, 0] == 1).all() and (drawn.probabilities[:, 0] == 1).all()
    assert chosen[:, 1:5].mean() == pytest.approx(0.25, abs=0.01)


def test_rows_are_filled_up_and_do_not_depend_on_their_batch() -> None:
    real = torch.tensor([[1] * 6, [1] * 6, [1] * 4 + [0] * 2])
    uniform = torch.tensor([[0.1, 0.2, 0.9, 0.1, 0.2, 0.9], [0.9] * 6, [0.1, 0.9, 0.1, 0.9, 0.0, 0.0]])
    drawn = select_tokens(real, 0.5, strategy="random", scores=uniform, independent=True)
    assert drawn.positions.tolist() == [[0, 1, 3, 4], [0, 1, 2, 3], [0, 2, 4, 5]]
    assert drawn.fillers.tolist() == [[False] * 4, [True] * 4, [False] * 4]
    assert drawn.probabilities.tolist() == [[0.5] * 4, [1.0] * 4, [0.5, 0.5, 1.0, 1.0]]
    alone = select_tokens(real[2:, :4], 0.5, strategy="random", scores=uniform[2:, :4], independent=True)
    assert alone.positions.tolist() == [[0, 2]] and alone.fillers is None
    nothing = select_tokens(real[1:2], 0.5, strategy="random", scores=uniform[1:2], independent=True)
    assert nothing.positions.shape == (1, 1) and nothing.fillers.all()


def test_what_is_sure_is_drawn_by_any_number() -> None:
    """A uniform number of float64 may be rounded up to 1 in float32."""
    drawn = select_tokens(torch.ones(1, 3), 1.0, strategy="random", scores=torch.ones(1, 3), independent=True)
    assert drawn.positions.tolist() == [[0, 1, 2]] and drawn.fillers is None


# --- which strategies -------------------------------------------------------------------------------------------------

OWN = """import torch
from tokentune.sampling.strategies import Choice

def own(tokens):
    return Choice(tokens.uniform, torch.full(tokens.real.shape, 0.25), independent=True)

def dependent(tokens):
    return Choice(tokens.uniform, torch.full(tokens.real.shape, 0.25))
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def test_a_strategy_of_ones_own_says_that_it_is_independent(file: Path) -> None:
    name = f"{file}:own"
    assert why_not_independent(name, 0.5) is None and why_not_independent(name, Answers(0.5)) is None
    drawn = many(0.5, name)
    assert (drawn.probabilities[~drawn.fillers & (drawn.positions < 5)] == 0.25).all()
    chosen = of_position(drawn, torch.ones(drawn.positions.shape))
    assert chosen[:, :5].mean() == pytest.approx(0.25, abs=0.01)
    beside = many(Answers(0.5), name)
    assert of_position(beside, beside.probabilities)[:, TARGETS].unique().tolist() == [1.0]
    positions, *_ = select_tokens(REAL[None], 0.5, strategy=name)
    assert positions.shape == (1, 3)  # without the correction it draws as many as ever
    assert "does not draw each token independently" in why_not_independent(f"{file}:dependent", 0.5)


@pytest.mark.parametrize("strategy", [name for name in strategy_names() if name != "random"])
@pytest.mark.parametrize("size", [0.3, 2])
def test_what_depends_on_other_tokens_is_refused_in_the_draw_too(strategy: str, size: float) -> None:
    reason = why_not_independent(strategy, size)
    assert reason.startswith(strategy) and "take random, or a prefix_length of answers+0.1" in reason
    scores = {name: torch.rand(1, 7) for name in ("loss", "excess_loss", "gradient", "attention")}
    with pytest.raises(ValueError, match="gradient_correction: "):
        select_tokens(REAL[None], size, strategy=strategy, token_scores=scores, independent=True)


@pytest.mark.parametrize("size", [Answers(), Schedule(Answers(0.3), Answers())])
def test_answers_alone_leave_nothing_to_correct(size: Answers | Schedule) -> None:
    assert "add a share" in why_not_independent("supervised", size)
    with pytest.raises(ValueError, match="add a share"):
        select_tokens(REAL[None], Answers(), strategy="supervised", independent=True)


# --- how many ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "length"), [(0.3, 20), (0.1, 200), (7, 50), (0.999, 12), (0.001, 3), (1, 2)])
def test_the_quantile_of_a_row_s_count(size: float, length: int) -> None:
    p = size if isinstance(size, float) else size / length
    within = [sum(comb(length, n) * p**n * (1 - p) ** (length - n) for n in range(k + 1)) for k in range(length + 1)]
    assert count_at_quantile(size, length) == max(1, next(k for k, share in enumerate(within) if share >= 0.999))


def test_the_quantile_of_long_rows_and_of_whole_ones() -> None:
    assert 39_321 < count_at_quantile(0.3, 131_072) < 39_321 + 4 * 166  # mean and standard deviation
    assert count_at_quantile(1.0, 9) == count_at_quantile(100, 9) == 9
