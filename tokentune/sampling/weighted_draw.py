"""Draws of a fixed size in which each token has exactly the probability that its score gives, for a whole batch.

    B sequences, S tokens of the padded batch

There are two steps. First, probabilities in proportion to the scores, none above 1, whose sum is the row's count. Then
systematic sampling (Madow, "On the Theory of Systematic Sampling II", 1949): tokens lie side by side on a line, each as
long as its probability, and points at distance 1 choose them; the first point is random. A draw then has the row's
count, and each token exactly its probability, for any order on the line. The order is random within two groups, target
positions before the others, so that a draw has a target wherever the targets' probabilities sum up to 1.
"""

import torch
from torch import Tensor

# The part of a draw that is uniform over the candidates, for any scores. A row that draws c of n candidates then gives
# each at least FLOOR * c / n: no loss has more than 1 / FLOOR = 10 times its weight in a uniform draw. Without it, a
# token with score 0 would never be learnt from, and the weight of one near 0 would have no bound.
FLOOR = 0.1
_LARGEST = 1e30  # larger scores count as this one, so that a row with an infinite score has finite sums


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, in which rounding does not matter; float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def one_number_per_row(uniform: Tensor, real: Tensor) -> Tensor:
    """(B, S) uniform numbers -> (B, 1) uniform in [0, 1), independent of their order within the row.

    The sum's fraction: modulo 1 a sum of uniform numbers is uniform, and as it is the same for every order of its
    terms, it is independent of who is the largest.
    """
    wide = uniform.to(wide_dtype(uniform.device)).masked_fill(~real, 0.0)
    return wide.sum(-1, keepdim=True).frac()


def mixed_scores(scores: Tensor, candidates: Tensor) -> Tensor:
    """Shares of the row, (1 - FLOOR) in proportion to the scores and FLOOR evenly: (B, S), 0 outside of candidates."""
    wide = scores.to(wide_dtype(scores.device)).clamp(0, _LARGEST).masked_fill(~candidates, 0.0)
    total = wide.sum(-1, keepdim=True)
    even = candidates / candidates.sum(-1, keepdim=True).clamp(min=1)
    in_proportion = torch.where(total > 0, wide / total.where(total > 0, torch.ones_like(total)), even)
    return (1 - FLOOR) * in_proportion + FLOOR * even


def inclusion_probabilities(shares: Tensor, counts: Tensor) -> Tensor:
    """(B, S): min(1, c * share) of shares (B, S) >= 0, with the row's c for which they sum up to its count, of (B,).

    A row with fewer positive shares gives each of them probability 1.
    """
    largest, order = shares.sort(dim=-1, descending=True)
    counts = torch.minimum(counts, (shares > 0).sum(-1)).unsqueeze(-1)  # (B, 1)
    # With the m largest capped at 1 the others get c = (count - m) / (their sum). The right m is the first for which
    # the largest of the others stays within 1; sums from the small end, so that equal shares give equal sums.
    left = largest.flip(-1).cumsum(-1).flip(-1)  # (B, S): the sum from the m-th largest on
    m = torch.arange(shares.shape[1], device=shares.device)  # (S,)
    within = (counts - m) * largest <= left * (1 + 1e-12)
    capped = torch.where(within.any(-1, keepdim=True), within.int().argmax(-1, keepdim=True), counts)  # (B, 1)
    remaining = left.gather(1, capped.clamp(max=shares.shape[1] - 1))
    scale = (counts - capped) / remaining.clamp(min=torch.finfo(shares.dtype).tiny)
    probabilities = torch.where(m < capped, torch.ones_like(largest), (scale * largest).clamp(max=1.0))
    probabilities = probabilities.masked_fill(counts == 0, 0.0)
    return torch.zeros_like(shares).scatter(1, order, probabilities)


def with_a_target(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Raises the targets' probabilities to a sum of 1 where it is below 1, and lowers the others'. All (B, S).

    The row's sum does not change, nor do rows without a target of positive probability, or with a sum below 1.
    """
    of_targets = probabilities.masked_fill(~targets, 0.0).sum(-1, keepdim=True)  # (B, 1)
    total = probabilities.sum(-1, keepdim=True)
    short = (of_targets > 0) & (of_targets < 1) & (total > 1 - 1e-9)
    one = torch.ones_like(total)
    up = one.where(~short, 1 / of_targets.where(of_targets > 0, one))
    others = total - of_targets
    down = one.where(~short, (total - 1).clamp(min=0) / others.where(others > 0, one))
    return (probabilities * torch.where(targets, up, down)).clamp(max=1.0)


def systematic_draw(probabilities: Tensor, uniform: Tensor, start: Tensor, first: Tensor) -> Tensor:
    """(B, S) bool: tokens chosen with these probabilities (B, S), as many as they sum up to in the row.

    `uniform` (B, S) is the tokens' random order within each group, `first` (B, S) bool the group in front, and `start`
    (B, 1) in [0, 1) is independent of that order.
    """
    order = uniform.argsort(dim=-1, stable=True)
    order = order.gather(1, (~first).gather(1, order).to(torch.uint8).argsort(dim=-1, stable=True))
    ends = probabilities.gather(1, order).cumsum(-1)  # (B, S)
    points = (ends - start).ceil()  # the number of points before a token's end
    before = torch.nn.functional.pad(points[:, :-1], (1, 0))
    return torch.zeros_like(first).scatter(1, order, points > before)
