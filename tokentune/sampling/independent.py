"""Draws of each token on its own, with a probability that is known: what the gradient's correction needs.

    B sequences, S tokens

A corrected gradient is exact in expectation where the draw of one token tells nothing of that of another
(`core/attention/correction.py`). So with the correction each real token is drawn independently of all others:

    random              a proportion p: with probability p; a number c: with min(1, c / tokens of the row)
    answers+q           a target with probability 1, each other token with q
    a strategy's own    with the probabilities of a `Choice` that is `independent`

How many tokens a row selects is then random: none, or more than on average (`count_at_quantile`).
"""

from math import exp, lgamma, log, log1p

import torch
from torch import Tensor

from tokentune.sampling.resolver import find_strategy, try_strategy
from tokentune.sampling.schedule import Answers, Schedule, Size
from tokentune.sampling.strategies import Registered, StrategyError, Tokens, answer_of
from tokentune.sampling.weighted_draw import wide_dtype

QUANTILE = 0.999  # of a row's count, for which there has to be memory
_TARGETS_FIRST = ("supervised", "labelled")  # beside the answers they draw as `random` does
_CURE = "take random, or a prefix_length of answers+0.1, which selects all that has a loss and a tenth of the rest"


def why_not_independent(strategy: str, size: Size | Schedule) -> str | None:
    """Why a strategy cannot draw each token independently of the others, and what can; None where it can.

    Raises ValueError for an unknown strategy.
    """
    sizes = (size.start, size.end) if isinstance(size, Schedule) else (size,)
    if any(isinstance(one, Answers) and one.share == 0 for one in sizes):
        return "answers alone draws nothing by chance, and so leaves nothing to correct: add a share, as in answers+0.1"
    if _is_uniform(strategy, sizes[0]):
        return None
    registered = find_strategy(strategy)
    return None if not registered.needs and try_strategy(registered).independent else _why_dependent(strategy)


def probabilities(registered: Registered, size: Size, tokens: Tokens) -> Tensor:
    """With which each token is to be drawn on its own, (B, S). Raises ValueError where `why_not_independent`."""
    wide, shape = wide_dtype(tokens.real.device), tokens.real.shape
    if isinstance(size, Answers) and size.share == 0:
        raise ValueError(f"gradient_correction: {why_not_independent(registered.name, size)}")
    if not _is_uniform(registered.name, size):
        answer = answer_of(registered, tokens)
        if not answer.independent:
            raise StrategyError(f"gradient_correction: {_why_dependent(registered.name)}")
        return answer.probability.to(wide)
    if isinstance(size, int):
        lengths = tokens.real.sum(-1, keepdim=True).clamp(min=1)
        return (size / lengths.to(wide)).clamp(max=1.0).expand(shape)
    share = size.share if isinstance(size, Answers) else size
    return torch.full(shape, share, dtype=wide, device=tokens.real.device)


def count_at_quantile(size: int | float, length: int, quantile: float = QUANTILE) -> int:
    """The number of tokens that a row of `length` real ones exceeds with a probability of at most 1 - quantile.

    The binomial quantile of `random` with this size, at least 1 (a row that draws none is filled up).
    """
    probability = min(1.0, size if isinstance(size, float) else size / max(1, length))
    if probability == 1.0:
        return length
    ways, up_to = lgamma(length + 1), 0.0
    for count in range(length):  # summed up from below: about a microsecond for each selected token
        ways_of_count = ways - lgamma(count + 1) - lgamma(length - count + 1)
        up_to += exp(ways_of_count + count * log(probability) + (length - count) * log1p(-probability))
        if up_to >= quantile:
            return max(1, count)
    return length


def _is_uniform(strategy: str, size: Size) -> bool:
    return strategy == "random" or (isinstance(size, Answers) and strategy in _TARGETS_FIRST)


def _why_dependent(strategy: str) -> str:
    if strategy in _TARGETS_FIRST:
        return f"{strategy} selects what has a loss first, so that other tokens may have no chance: {_CURE}"
    return f"{strategy} does not draw each token independently of the others: {_CURE}"
