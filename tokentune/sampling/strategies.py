"""How tokens are chosen: the strategies of `--selection`, one function each, and how to add your own.

    B sequences, S tokens of the padded batch, K selected positions per sequence

A strategy gets a batch's `Tokens` and returns a priority (B, S): the real tokens of a row with the highest ones are
selected. What every draw needs (the row's count, padding, a supervised token where there is one) is done in
`sampling/sampler.py`, so that your own strategy has five lines:

    from tokentune.sampling.strategies import Tokens, strategy

    @strategy("rare")
    def rare(tokens: Tokens):
        return tokens.input_ids + tokens.uniform   # tokenizers give rare pieces high numbers

for `--selection rare.py:rare`, or by its name after the file was imported.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from tokentune.errors import UserError
from tokentune.sampling.meanings import NEEDS
from tokentune.sampling.weighted_draw import (
    inclusion_probabilities,
    mixed_scores,
    one_number_per_row,
    systematic_draw,
    wide_dtype,
    with_a_target,
)

SCORES = ("loss", "excess_loss", "gradient", "attention")  # what a strategy may need
DRAWS = ("proportional", "top")


@dataclass(frozen=True)
class Tokens:
    """A batch as a strategy gets it. All tensors are on one device."""

    real: Tensor  # (B, S) bool, False at padding
    uniform: Tensor  # (B, S) in [0, 1), random numbers of each row, equal for equal seeds
    counts: Tensor  # (B,) how many positions each row will get
    input_ids: Tensor | None = None  # (B, S) int64; None for images
    labels: Tensor | None = None  # (B, S) int64, -100 where no loss; (B,) classes; None where there are none
    targets: Tensor | None = None  # (B, S) bool, positions whose output has a loss; None: losses have no position
    preferred: Tensor | None = None  # (B, S) bool, the targets that matter most (words in entities); None: all alike
    always: Tensor | None = None  # (B, S) bool, real positions that are selected in any case
    # (B, S) float32 by name, those that the strategy `needs`: of each position's output ("loss", "excess_loss",
    # "gradient", 0 where there is no target), or of the token itself ("attention").
    scores: dict[str, Tensor] = field(default_factory=dict)
    draw: str = "proportional"  # to scores, and the probabilities are returned; "top": the highest scores win


class Choice(NamedTuple):
    """A strategy's answer where the probability of each position is known."""

    priority: Tensor  # (B, S)
    # (B, S) in [0, 1]: a loss has weight 1 / probability, so the mean of draws is the whole loss; None: not known
    probability: Tensor | None
    # Each position may also be drawn on its own, with this probability: so it is with `gradient_correction`, without a
    # look at the priority. The correction is exact where all probabilities are above 0.
    independent: bool = False


Strategy = Callable[[Tokens], Tensor | Choice]


class Registered(NamedTuple):
    name: str
    choose: Strategy
    needs: tuple[str, ...] = ()  # scores of a forward pass over all tokens that comes first


REGISTRY: dict[str, Registered] = {}
SECOND_NAMES = ("labelled",)


def strategy(name: str, needs: tuple[str, ...] = ()) -> Callable[[Strategy], Strategy]:
    """Registers a function under a name for `--selection`.

    Args:
        needs: of `SCORES`; see `Tokens.scores`.

    Raises ValueError for an unknown score, or the name of a strategy of another module.
    """
    if unknown := [score for score in needs if score not in SCORES]:
        raise ValueError(f"strategy {name!r} needs {', '.join(unknown)}: there are {', '.join(SCORES)}")

    def register(choose: Strategy) -> Strategy:
        if name in REGISTRY and REGISTRY[name].choose.__module__ != choose.__module__:
            raise ValueError(f"there is a strategy {name!r} already: give yours another name")
        REGISTRY[name] = Registered(name, choose, tuple(needs))
        return choose

    return register


class StrategyError(UserError, ValueError):
    """A strategy returned an invalid answer."""


def answer_of(registered: Registered, tokens: Tokens) -> Choice:
    """A strategy's answer, checked.

    Raises StrategyError for a wrong shape, NaN, or values that are no probabilities. On an accelerator the values are
    not checked, because the host would have to wait for them.
    """
    answer = registered.choose(tokens)
    parts = dict(
        zip(("priorities", "probabilities"), answer if isinstance(answer, Choice) else (answer,), strict=False)
    )
    for what, part in parts.items():
        if not isinstance(part, Tensor) or part.shape != tokens.real.shape or part.is_complex():
            got = f"a tensor of {tuple(part.shape)}" if isinstance(part, Tensor) else f"a {type(part).__name__}"
            sought = f"{what} of its tokens, a tensor of {tuple(tokens.real.shape)}"
            raise StrategyError(f"--selection {registered.name}: must return {sought}, not {got}")
        if part.device.type != "cpu" or is_fake(part):
            continue
        if bool((part.isnan() & tokens.real).any()):
            raise StrategyError(f"--selection {registered.name}: its {what} hold NaN")
        if what == "probabilities" and bool((((part < 0) | (part > 1 + 1e-6)) & tokens.real).any()):
            raise StrategyError(f"--selection {registered.name}: its probabilities are not all between 0 and 1")
    priority = parts["priorities"]
    priority = priority.to(torch.uint8) if priority.dtype == torch.bool else priority
    return Choice(priority, parts.get("probabilities"), isinstance(answer, Choice) and answer.independent)


def strategy_names(*, scored: bool | None = None) -> list[str]:
    """The registered names; with `scored` only those that need scores, or only the others."""
    return [entry.name for entry in REGISTRY.values() if scored is None or bool(entry.needs) == scored]


# ------------------------------------------------------------------------------------------------------ without scores


@strategy("random")
def _random(tokens: Tokens) -> Tensor:
    # arXiv 2501.18824, section "Token Selection"
    return tokens.uniform


@strategy("reference")
def _reference(tokens: Tokens) -> Tensor:
    order = tokens.real.cumsum(-1) - 1  # (B, S): 0 at the row's first real token
    last = tokens.real.sum(-1, keepdim=True) - 1
    priority = tokens.uniform.masked_fill(tokens.real & (order == last - 1), -0.5)
    return priority + 2.0 * (tokens.real & ((order == 0) | (order == last)))


@strategy("supervised")
def _supervised(tokens: Tokens) -> Tensor:
    if tokens.targets is None:
        return tokens.uniform
    preferred = torch.zeros_like(tokens.targets) if tokens.preferred is None else tokens.targets & tokens.preferred
    return tokens.uniform + tokens.targets + preferred


strategy("labelled")(_supervised)


@strategy("stratified")
def _stratified(tokens: Tokens) -> Tensor:
    # The row is closed to a ring, turned at random and cut into `count` parts of floor or ceil(n / count) tokens. Every
    # turn is equally likely, so every token is in a part of each size equally often: its probability is count / n.
    lengths = tokens.real.sum(-1, keepdim=True).clamp(min=1)  # (B, 1)
    turn = (one_number_per_row(tokens.uniform, tokens.real) * lengths).long()
    place = (tokens.real.cumsum(-1) - 1 + turn) % lengths  # (B, S)
    part = place * tokens.counts.unsqueeze(-1) // lengths
    # Ranks, not the numbers themselves, two of which may be equal in float32.
    rank = tokens.uniform.argsort(dim=-1, stable=True).argsort(dim=-1).masked_fill(~tokens.real, -1)
    best = torch.full_like(rank, -1).scatter_reduce(1, part, rank, "amax")
    return (rank == best.gather(1, part)) + tokens.uniform


@strategy("contiguous")
def _contiguous(tokens: Tokens) -> Tensor:
    real, counts = tokens.real, tokens.counts.unsqueeze(-1)  # (B, S), (B, 1)
    order = real.cumsum(-1) - 1
    starts = real & (order + counts <= real.sum(-1, keepdim=True))  # where a window of the row's count begins
    if tokens.targets is not None:
        targets = (tokens.targets & real).long()
        until = targets.cumsum(-1)
        ends = (torch.arange(real.shape[1], device=real.device) + counts - 1).clamp(0, real.shape[1] - 1)
        holding = starts & (until.gather(1, ends) - until + targets > 0)
        starts = torch.where(holding.any(-1, keepdim=True), holding, starts)
    start = order.gather(1, tokens.uniform.masked_fill(~starts, -1.0).argmax(-1, keepdim=True))  # (B, 1)
    return (order >= start) & (order < start + counts)


# --------------------------------------------------------------------------------------------------------- with scores


def _by_score(tokens: Tokens, scores: Tensor, candidates: Tensor) -> Tensor | Choice:
    """The highest scores of the candidates, or a draw in proportion to them; then other tokens at random."""
    scores = scores.nan_to_num(nan=0.0)  # training itself stops at a loss that is NaN
    if tokens.draw == "top":
        return scores.masked_fill(~candidates, -torch.inf)
    always = torch.zeros_like(tokens.real) if tokens.always is None else tokens.always & tokens.real
    targets = candidates if tokens.targets is None else tokens.targets & candidates
    free = (tokens.counts - always.sum(-1)).clamp(min=0)
    probability = inclusion_probabilities(mixed_scores(scores, candidates & ~always), free)
    held = (always & targets).any(-1, keepdim=True)  # rows that have a target anyway
    probability = with_a_target(probability, targets & ~held)
    start = one_number_per_row(tokens.uniform, tokens.real)
    chosen = systematic_draw(probability, tokens.uniform, start, targets)
    return Choice(chosen + tokens.uniform, probability.masked_fill(always, 1.0))


def _register_score_of_targets(name: str) -> None:
    @strategy(name, needs=NEEDS[name])
    def choose(tokens: Tokens) -> Tensor | Choice:
        targets = tokens.real if tokens.targets is None else tokens.real & tokens.targets
        return _by_score(tokens, tokens.scores[name], targets)


# The excess as Rho-1 takes it (Lin et al., arXiv 2404.07965); one below 0 counts as 0 in a draw.
for _name in ("loss", "excess_loss", "gradient"):
    _register_score_of_targets(_name)


@strategy("attention", needs=NEEDS["attention"])
def _attention(tokens: Tokens) -> Tensor | Choice:
    return _by_score(tokens, tokens.scores["attention"], tokens.real)


@strategy("tokenseek", needs=NEEDS["tokenseek"])
def _tokenseek(tokens: Tokens) -> Tensor | Choice:
    # Zeng et al., arXiv 2601.19739: log(attention received) + min-max normalised gradient, both weights 1 by default.
    # A draw uses the score minus the row's lowest one, because probabilities have to be positive.
    score = tokenseek_score(tokens.scores["attention"], tokens.scores["gradient"], tokens.real)
    lowest = score.masked_fill(~tokens.real, torch.inf).amin(-1, keepdim=True)
    return _by_score(tokens, score if tokens.draw == "top" else score - lowest, tokens.real)


def tokenseek_score(attention: Tensor, gradient: Tensor, real: Tensor, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """alpha * log(attention) + beta * (gradient - min) / (max - min), min and max of the row's real tokens: (B, S).

    TokenSeek's gradient is the sum of the components before the last layer; here it is the norm at the model's output.
    """
    dtype = wide_dtype(attention.device)
    gradient = gradient.to(dtype)
    low = gradient.masked_fill(~real, torch.inf).amin(-1, keepdim=True)
    high = gradient.masked_fill(~real, -torch.inf).amax(-1, keepdim=True)
    spread = (high - low).where(high > low, torch.ones_like(high))
    return alpha * attention.to(dtype).clamp(min=1e-12).log() + beta * ((gradient - low) / spread).masked_fill(~real, 0)
