"""The strategies: what each promises, in any batch; draws by score have the probabilities that they say."""

from math import sqrt
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokentune.sampling import meanings, strategies
from tokentune.sampling.resolver import find_strategy
from tokentune.sampling.sampler import counts_of_rows, draw_scores, select_positions, select_tokens
from tokentune.sampling.strategies import REGISTRY, StrategyError, strategy, strategy_names, tokenseek_score
from tokentune.sampling.weighted_draw import FLOOR, inclusion_probabilities, mixed_scores

SCORED = ["loss", "excess_loss", "gradient", "attention", "tokenseek"]
PLAIN = ["random", "reference", "supervised", "labelled", "stratified", "contiguous"]
ALL = [(name, "proportional") for name in PLAIN] + [(name, draw) for name in SCORED for draw in strategies.DRAWS]


def batch_of(lengths: list[int], size: int, seed: int = 0, *, side: str = "right", share: float = 0.3) -> dict:
    """Arguments of `select_tokens` for rows with random targets and scores; a score is 0 where there is no target."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(size)
    mask = torch.stack([place < n if side == "right" else place >= size - n for n in lengths]).long()
    targets = (torch.rand(len(lengths), size, generator=generator) < share) & mask.bool()
    losses = torch.rand(len(lengths), size, generator=generator).pow(3) * targets
    excess = (torch.rand(len(lengths), size, generator=generator) - 0.5) * targets
    attention = torch.rand(len(lengths), size, generator=generator).pow(2) * mask
    return {
        "attention_mask": mask,
        "targets": targets,
        "input_ids": torch.randint(0, 50, mask.shape, generator=generator),
        "labels": torch.where(targets, 1, -100),
        "token_scores": {"loss": losses, "gradient": losses.sqrt(), "excess_loss": excess, "attention": attention},
    }


def widened(batch: dict, size: int) -> dict:
    """The same rows with more padding on the right."""

    def wide(tensor: Tensor) -> Tensor:
        value = -100 if tensor is batch["labels"] else 0
        return torch.nn.functional.pad(tensor, (0, size - tensor.shape[1]), value=value)

    scores = {name: wide(score) for name, score in batch["token_scores"].items()}
    return {name: wide(value) for name, value in batch.items() if name != "token_scores"} | {"token_scores": scores}


def test_the_registry_holds_what_the_help_promises() -> None:
    assert strategy_names(scored=False)[: len(PLAIN)] == PLAIN
    assert strategy_names(scored=True)[: len(SCORED)] == SCORED
    assert [*meanings.UNSCORED, *meanings.SCORED] == [name for name in PLAIN + SCORED if name != "labelled"]


@pytest.mark.parametrize(("name", "draw"), ALL)
@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 14), min_size=1, max_size=5),
    spare=st.integers(0, 3),
    prefix_length=st.sampled_from([1, 3, 6, 100, 0.01, 0.1, 0.3, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 10_000),
    share=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
)
def test_any_batch_any_strategy(name, draw, lengths, spare, prefix_length, seed, share) -> None:
    size = max(1, max(lengths) + spare)
    batch = batch_of(lengths, size, seed, share=share)
    uniform = draw_scores([seed + row for row in range(len(lengths))], size + 5)
    positions, weights, *_ = select_tokens(
        **batch, prefix_length=prefix_length, strategy=name, draw=draw, scores=uniform[:, :size]
    )
    mask, targets = batch["attention_mask"], batch["targets"]
    counts = counts_of_rows(prefix_length, mask.sum(-1), name)
    assert positions.shape == (len(lengths), max(1, int(counts.max())))
    assert ((positions >= 0) & (positions < size)).all() and (positions.diff(dim=-1) > 0).all()
    assert torch.equal(mask.gather(1, positions).sum(-1), counts)  # real tokens where there are any
    drawn = targets.gather(1, positions)
    if name != "reference":
        assert torch.equal(drawn.any(-1), targets.any(-1))
    assert (weights is None) == (name in PLAIN or draw == "top")
    if weights is not None:
        assert weights.isfinite().all() and (weights >= 0).all() and (weights[~drawn] == 0).all()

    again, *_ = select_tokens(
        **widened(batch, size + 5), prefix_length=prefix_length, strategy=name, draw=draw, scores=uniform
    )
    for row, count in enumerate(counts.tolist()):  # deterministic, and the same however far the row is padded
        assert again[row, :count].tolist() == [p for p in positions[row].tolist() if mask[row, p]]


@pytest.mark.parametrize(("name", "draw"), [(name, draw) for name, draw in ALL if name != "reference"])
def test_left_padding_one_target_and_rows_of_padding(name: str, draw: str) -> None:
    batch = batch_of([9, 4, 0], 10, side="left")
    batch["targets"][:] = False
    batch["targets"][:2, 9] = True
    batch["token_scores"]["loss"][:] = batch["token_scores"]["gradient"][:] = 0.0  # the one target scored 0 as well
    positions, weights, *_ = select_tokens(**batch, prefix_length=3, strategy=name, draw=draw)
    assert positions[:2, -1].tolist() == [9, 9]
    assert batch["attention_mask"].gather(1, positions).sum(-1).tolist() == [3, 3, 0]
    if weights is not None:
        assert weights[:2, -1].tolist() == [1.0, 1.0]  # it is in every draw
        assert weights[2].tolist() == [0.0] * 3


# ---- without scores --------------------------------------------------------------------------------------------------


def frequencies(name: str, length: int, count: int, targets: list[int], rows: int = 20_000) -> Tensor:
    """How often each position is drawn."""
    mask = torch.ones(rows, length, dtype=torch.int64)
    chosen = torch.zeros(rows, length, dtype=torch.bool)
    chosen[:, targets] = True
    generator = torch.Generator().manual_seed(3)
    positions = select_positions(mask, count, targets=chosen, strategy=name, generator=generator)
    return torch.bincount(positions.flatten(), minlength=length) / rows


def assert_within_binomial_bounds(found: Tensor, expected: Tensor, rows: int) -> None:
    bound = 4.5 * (expected * (1 - expected) / rows).sqrt() + 1e-9
    assert ((found - expected).abs() <= bound).all(), (found - expected).abs().max()


@pytest.mark.parametrize("count", [1, 3, 4, 7, 11])
def test_stratified_is_uniform_and_even(count: int) -> None:
    found = frequencies("stratified", 11, count, targets=list(range(11)))
    assert_within_binomial_bounds(found, torch.full((11,), count / 11), 20_000)
    positions = select_positions(torch.ones(500, 40), 8, strategy="stratified")
    gaps = positions.diff(dim=-1)
    assert gaps.max() < 2 * 5 and gaps.float().mean() > 4.5  # 8 parts of 5 tokens
    assert select_positions(torch.ones(500, 40), 8).diff(dim=-1).max() > 12  # as other draws are not


def test_contiguous_is_a_window_that_holds_a_target() -> None:
    for lengths, targets in (([12, 7, 3], [0, 5]), ([12, 7, 3], [])):
        batch = batch_of(lengths * 50, 14, side="left")
        batch["targets"][:] = False
        batch["targets"][:, [14 - 3 + p for p in range(3)][-1:] if targets else []] = True
        positions = select_positions(batch["attention_mask"], 4, targets=batch["targets"], strategy="contiguous")
        real = batch["attention_mask"].gather(1, positions).bool()
        for row, kept in zip(positions.tolist(), real.tolist(), strict=True):
            window = [p for p, inside in zip(row, kept, strict=True) if inside]
            assert window == list(range(window[0], window[-1] + 1))
            assert not targets or 13 in window
    # Of the windows that hold target 1 of 8, each equally often: they begin at 0 and 1.
    found = frequencies("contiguous", 8, 3, targets=[1])
    assert_within_binomial_bounds(found, torch.tensor([0.5, 1, 1, 0.5, 0, 0, 0, 0]), 20_000)
    assert_within_binomial_bounds(frequencies("contiguous", 4, 3, targets=[]), torch.tensor([0.5, 1, 1, 0.5]), 20_000)


def test_labelled_is_another_name_of_supervised() -> None:
    batch = batch_of([12, 9], 12)
    uniform = draw_scores([1, 2], 12)
    drawn = [select_tokens(**batch, prefix_length=5, strategy=name, scores=uniform)[0] for name in PLAIN[2:4]]
    assert torch.equal(*drawn)


# ---- with scores -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCORED)
def test_top_takes_the_highest_scores_then_targets_then_others(name: str) -> None:
    batch = batch_of([20], 24, share=0.5)
    scores, real, targets = batch["token_scores"], batch["attention_mask"].bool(), batch["targets"]
    score = scores.get(name, tokenseek_score(scores["attention"], scores["gradient"], real))
    candidates = real if name in ("attention", "tokenseek") else targets
    best = score.masked_fill(~candidates, -torch.inf)[0].argsort(descending=True).tolist()
    number = int(candidates.sum())
    for count in (2, number - 1, min(20, number + 2)):
        positions, weights, *_ = select_tokens(**batch, prefix_length=count, strategy=name, draw="top")
        expected = set(best[: min(count, number)])
        if not targets[0, list(expected)].any():  # the best target then replaces the last
            expected = set(best[: count - 1]) | {next(p for p in best if targets[0, p])}
        found = set(positions[0].tolist())
        assert weights is None and len(found) == count
        assert found >= expected if count > number else found == expected


def test_tokenseek_is_the_papers_formula() -> None:
    attention, gradient = torch.tensor([[1.0, 2.0, 8.0, 0.0]]), torch.tensor([[0.0, 5.0, 10.0, 99.0]])
    real = torch.tensor([[True, True, True, False]])
    found = tokenseek_score(attention, gradient, real)[0, :3]
    expected = attention[0, :3].double().log() + torch.tensor([0.0, 0.5, 1.0])
    assert torch.allclose(found, expected)
    weighed = tokenseek_score(attention, gradient, real, alpha=2.0, beta=4.0)[0, :3]
    assert torch.allclose(weighed, 2 * attention[0, :3].double().log() + 4 * torch.tensor([0.0, 0.5, 1.0]))


def water_filled(shares: list[float], count: int) -> list[float]:
    """min(1, c * share) that sum up to count, by bisection of c."""
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(min(1.0, middle * s) for s in shares) < count else (low, middle)
    return [min(1.0, high * share) for share in shares]


@settings(max_examples=100, deadline=None)
@given(
    shares=st.lists(st.floats(1e-6, 1e6) | st.sampled_from([0.0, 1.0]), min_size=1, max_size=12),
    count=st.integers(0, 13),
)
def test_inclusion_probabilities_cap_at_one(shares: list[float], count: int) -> None:
    found = inclusion_probabilities(torch.tensor([shares], dtype=torch.float64), torch.tensor([count]))[0]
    positive = sum(share > 0 for share in shares)
    expected = [float(share > 0) for share in shares] if count >= positive else water_filled(shares, count)
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=1e-6)
    assert abs(float(found.sum()) - min(count, positive)) < 1e-9


def test_the_floor_bounds_the_weights() -> None:
    """No token's loss weighs more than 1 / FLOOR times what it does in a uniform draw of as many candidates."""
    scores = torch.tensor([[1e9, 1.0, 0.0, 0.0, 1e-9, 3.0, float("inf"), 2.0]])
    candidates = torch.tensor([[True] * 7 + [False]])
    for some in (scores, torch.zeros_like(scores)):
        found = inclusion_probabilities(mixed_scores(some, candidates), torch.tensor([2]))
        assert (found[candidates] >= FLOOR * 2 / 7 - 1e-12).all() and found[0, 7] == 0
    assert torch.allclose(found[candidates], torch.tensor(2 / 7, dtype=torch.float64))  # all 0: uniform


@pytest.mark.parametrize("name", SCORED)
@pytest.mark.parametrize("count", [1, 3, 8])
def test_draws_have_the_probabilities_they_say(name: str, count: int) -> None:
    """Each token as often as its probability, and the weighted sum of any losses is unbiased."""
    rows = 20_000
    one = batch_of([16], 18, seed=7, share=0.4)
    many = {key: value.expand(rows, -1) for key, value in one.items() if key != "token_scores"}
    many["token_scores"] = {key: value.expand(rows, -1) for key, value in one["token_scores"].items()}
    generator = torch.Generator().manual_seed(11)
    positions, weights, *_ = select_tokens(**many, prefix_length=count, strategy=name, generator=generator)
    targets = one["targets"][0]
    assert targets[positions].any(-1).all()  # a target in every draw

    drawn = torch.zeros(rows, 18).scatter(1, positions, 1.0)
    of_position = torch.zeros(rows, 18).scatter(1, positions, weights)
    assert (of_position.amax(0)[~targets] == 0).all()
    probability = 1 / of_position.amax(0)[targets]  # 1 / weight, the same whenever it is drawn
    assert torch.equal(of_position, (drawn * of_position.amax(0)))
    assert_within_binomial_bounds(drawn.mean(0)[targets], probability.clamp(max=1.0), rows)

    losses = torch.linspace(-1, 5, 18)
    sums = (of_position * losses)[:, targets].sum(-1)
    assert abs(sums.mean() - losses[targets].sum()) <= 4.5 * sums.std() / sqrt(rows) + 1e-4
    if name == "loss" and count == 1:  # and in proportion to the scores, beside the floor
        shares = one["token_scores"]["loss"][0, targets]
        expected = (1 - FLOOR) * shares / shares.sum() + FLOOR / int(targets.sum())
        assert torch.allclose(probability, expected, rtol=1e-5)


def test_probabilities_know_what_is_selected_always() -> None:
    rows = 20_000
    one = batch_of([12], 12, seed=1, share=1.0)
    many = {key: value.expand(rows, -1) for key, value in one.items() if key != "token_scores"}
    many["token_scores"] = {key: value.expand(rows, -1) for key, value in one["token_scores"].items()}
    always = torch.zeros(rows, 12, dtype=torch.bool)
    always[:, 4] = True
    positions, weights, *_ = select_tokens(**many, prefix_length=4, strategy="loss", always=always)
    of_position = torch.zeros(rows, 12).scatter(1, positions, weights)
    assert (of_position[:, 4] == 1).all()
    assert_within_binomial_bounds((of_position > 0).float().mean(0), (1 / of_position.amax(0)).clamp(max=1.0), rows)


def test_a_target_that_is_there_by_force_weighs_nothing() -> None:
    """A strategy that draws uniformly over the row misses the only target in 3 of 4 draws: its weight's mean is 1."""

    @strategy("uniform_with_probability")
    def uniform(tokens: strategies.Tokens) -> strategies.Choice:
        return strategies.Choice(tokens.uniform, torch.full(tokens.real.shape, 2 / 8))

    try:
        targets = torch.zeros(8000, 8, dtype=torch.bool)
        targets[:, 3] = True
        options = {"targets": targets, "strategy": "uniform_with_probability"}
        positions, weights, *_ = select_tokens(torch.ones(8000, 8), 2, **options)
        assert (positions == 3).any(-1).all()
        assert set(weights.sum(-1).tolist()) == {0.0, 4.0}
        assert abs(weights.sum(-1).mean() - 1) < 0.08  # 4 standard errors of a mean of 8,000
    finally:
        del REGISTRY["uniform_with_probability"]


def test_scores_that_are_no_numbers_still_draw() -> None:
    """A model whose loss overflowed: the run ends with its loss, not in the draw."""
    batch = batch_of([8], 8, share=1.0)
    batch["token_scores"]["loss"][0, 2], batch["token_scores"]["loss"][0, 5] = float("nan"), float("inf")
    for draw in strategies.DRAWS:
        positions, *_ = select_tokens(**batch, prefix_length=3, strategy="loss", draw=draw)
        assert 5 in positions[0]


def test_missing_scores_and_unknown_draws_are_refused() -> None:
    with pytest.raises(ValueError, match="needs scores of a pass over all tokens: attention, gradient"):
        select_positions(torch.ones(1, 4), 2, strategy="tokenseek")
    with pytest.raises(ValueError, match="unknown draw 'best': one of proportional, top"):
        select_positions(torch.ones(1, 4), 2, draw="best")


# ---- names, and strategies of one's own ------------------------------------------------------------------------------


def test_unknown_names_are_told_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"gradients: there is no such strategy\. Did you mean gradient\? Known are"):
        find_strategy("gradients")
    with pytest.raises(ValueError, match=r"zzz: there is no such strategy\. Known are"):
        find_strategy("zzz")


def test_a_name_is_taken_once() -> None:
    def mine(tokens: strategies.Tokens) -> Tensor:
        return tokens.uniform

    with pytest.raises(ValueError, match="there is a strategy 'random' already"):
        strategy("random")(mine)
    with pytest.raises(ValueError, match="needs entropy: there are loss, excess_loss"):
        strategy("surprising", needs=("entropy",))


FIVE_LINES = """from tokentune.sampling.strategies import Tokens, strategy

@strategy("rare_{name}")
def rare(tokens: Tokens):
    return tokens.input_ids + tokens.uniform
"""


def test_five_lines_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "rare.py"
    file.write_text(FIVE_LINES.format(name="five"))
    name = f"{file}:rare"
    assert find_strategy(name).name == name and find_strategy(name) is find_strategy(name)
    ids = torch.tensor([[5, 90, 7, 80, 95, 1]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    assert select_positions(mask, 2, strategy=name, input_ids=ids).tolist() == [[1, 3]]
    assert select_positions(mask, 2, strategy="rare_five", input_ids=ids).tolist() == [[1, 3]]
    assert str(tmp_path) not in __import__("sys").path


def test_plain_functions_and_needs_come_from_a_file_too(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "from tokentune.sampling.strategies import strategy\n"
        "def first(tokens):\n    return -tokens.real.cumsum(-1)\n"
        "@strategy('surprising_ones', needs=('loss',))\n"
        "def surprising(tokens):\n    return tokens.scores['loss']\n"
    )
    assert select_positions(torch.ones(1, 5), 2, strategy=f"{file}:first").tolist() == [[0, 1]]
    assert find_strategy(f"{file}:surprising").needs == ("loss",)


@pytest.mark.parametrize(
    ("text", "function", "message"),
    [
        ("x = 1\n", "f", "own.py has no function f"),
        ("f = 3\n", "f", "own.py has no function f"),
        ("import nothing_of_this_name\n", "f", "ended in ModuleNotFoundError: No module named"),
        ("def f(:\n", "f", "ended in SyntaxError"),
        ("raise SystemExit(3)\n", "f", "ended in SystemExit: 3"),
        ("def f(tokens):\n    return tokens.wrong\n", "f", "it ended in AttributeError"),
        ("def f():\n    return 1\n", "f", r"it ended in TypeError: f\(\) takes 0"),
        ("def f(tokens):\n    return tokens.uniform[:, :2]\n", "f", r"a tensor of \(2, 6\), not a tensor of \(2, 2\)"),
        ("def f(tokens):\n    return [1, 2]\n", "f", r"a tensor of \(2, 6\), not a list"),
        ("def f(tokens):\n    return tokens.uniform, tokens.uniform\n", "f", "not a tuple"),
        ("def f(tokens):\n    return tokens.uniform / 0 * 0\n", "f", "its priorities hold NaN"),
        (
            "from tokentune.sampling.strategies import Choice\n"
            "def f(tokens):\n    return Choice(tokens.uniform, tokens.uniform + 1)\n",
            "f",
            "its probabilities are not all between 0 and 1",
        ),
        ("x = 1\n", "", "named file.py:function"),
    ],
)
def test_files_that_hold_no_strategy_are_refused(tmp_path: Path, text: str, function: str, message: str) -> None:
    file = tmp_path / "own.py"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        find_strategy(f"{file}:{function}")
    assert str(file) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no Python file .*nowhere\.py"):
        find_strategy(f"{tmp_path / 'nowhere.py'}:f")


def test_priorities_may_be_anything_but_nan() -> None:
    answers = {
        "big": lambda tokens: tokens.uniform * 1e30 - 5e29,
        "ties": lambda tokens: torch.zeros(tokens.real.shape),
        "infinite": lambda tokens: torch.where(tokens.real.cumsum(-1) > 2, -torch.inf, torch.inf),
        "truth": lambda tokens: tokens.real.cumsum(-1) == 3,
        "whole": lambda tokens: tokens.real.cumsum(-1),
    }
    uniform = draw_scores(range(400), 6)
    mask = torch.ones(400, 6)
    try:
        for name, choose in answers.items():
            strategy(name)(choose)
        drawn = {name: select_positions(mask, 2, strategy=name, scores=uniform) for name in answers}
        assert torch.equal(drawn["ties"], select_positions(mask, 2, scores=uniform))  # broken by the uniform numbers
        assert torch.equal(drawn["big"], drawn["ties"])
        assert (drawn["infinite"] == torch.tensor([0, 1])).all() and (drawn["whole"] == torch.tensor([4, 5])).all()
        assert (drawn["truth"] == 2).any(-1).all() and drawn["truth"].unique().numel() == 6
        strategy("broken")(lambda tokens: tokens.uniform.log() * 0 + torch.nan)
        with pytest.raises(StrategyError, match="--selection broken: its priorities hold NaN"):
            select_positions(mask, 2, strategy="broken")
    finally:
        for name in [*answers, "broken"]:
            REGISTRY.pop(name, None)
