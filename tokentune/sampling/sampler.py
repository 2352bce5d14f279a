"""Which token positions keep gradients: the draw, and the labels that remain.

A strategy (`sampling/strategies.py`) gives each token a priority. What is the same for every strategy is here: how many
tokens a row selects, that a row with supervised tokens selects at least one of them, which tokens are always selected,
and how shorter rows are filled up.

Legend: B sequences, S tokens of the padded batch, K selected positions per sequence. A *target position* is one whose
output has a loss: the token before a supervised one in a causal model, the supervised one itself otherwise.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokentune.sampling.independent import probabilities
from tokentune.sampling.resolver import find_strategy
from tokentune.sampling.schedule import Answers, Size
from tokentune.sampling.strategies import DRAWS, Registered, Tokens, answer_of
from tokentune.sampling.weighted_draw import wide_dtype

REFERENCE = "reference"  # the strategy with the counts of the released code
IGNORED_LABEL = -100  # torch.nn.functional.cross_entropy's default ignore_index


class Selection(NamedTuple):
    """A draw."""

    positions: Tensor  # (B, K) int64: distinct, ascending in each row
    weights: Tensor | None = None  # (B, K) float32, factors of the positions' losses; None: all 1
    fillers: Tensor | None = None  # (B, K) bool: real tokens that get no gradient; None: there are none
    # (B, K): with which each position was drawn, independently of the others, 1 at padding and fillers; None: not so
    probabilities: Tensor | None = None


def selected_count(prefix_length: int | float, length: int) -> int:
    """K of one sequence of `length` real tokens: min(number, length), or max(1, round(proportion * length)).

    Halves round up (Python's `round` would send 0.5 * 5 and 0.5 * 7 in opposite directions). 0 for an empty sequence.
    """
    count = max(1, int(prefix_length * length + 0.5)) if isinstance(prefix_length, float) else prefix_length
    return min(count, length)


def answers_count(answers: Answers, targets: int | np.ndarray, length: int | np.ndarray) -> np.int64 | np.ndarray:
    """K of a sequence of `length` real tokens, so many of which are target positions; or of each of several, (R,).

    Of an invocation in front of the targets, the last token is a target; the last one of the sequence is none.
    """
    held = targets + len(answers.invocation)
    return np.minimum(length, np.maximum(1, held + np.int64(answers.share * (length - targets) + 0.5)))


def _reference_count(prefix_length: int | float, length: int) -> int:
    """K of one sequence in the released code's draw: first and last token, and the others from positions 1 .. n-3."""
    others = int(prefix_length * max(length - 2, 0)) if isinstance(prefix_length, float) else prefix_length
    return min(length, 2 + min(others, max(length - 3, 0)))


def counts_of_rows(prefix_length: int | float, lengths: Tensor, strategy: str) -> Tensor:
    """`selected_count` or `_reference_count` of every row, on the rows' device: lengths (B,) -> counts (B,)."""
    # float64, so that a product rounds as in Python; MPS has no float64, and may differ by one on an exact half.
    wide = wide_dtype(lengths.device)
    proportion = isinstance(prefix_length, float)
    if strategy == REFERENCE:
        between = (lengths - 3).clamp(min=0)
        others = (prefix_length * (lengths - 2).clamp(min=0).to(wide)).long() if proportion else prefix_length
        others = torch.minimum(others, between) if proportion else between.clamp(max=prefix_length)
        return torch.minimum(lengths, 2 + others)
    if not proportion:
        return lengths.clamp(max=prefix_length)
    counts = (prefix_length * lengths.to(wide) + 0.5).long().clamp(min=1)
    return torch.minimum(counts, lengths)


def target_mask(labels: Tensor, *, causal: bool) -> Tensor:
    """(B, S) bool: the positions whose output has a loss, by labels (B, S), -100 where there is none.

    The output at position t predicts the label at t + 1 where `causal`, otherwise the label at t.
    """
    supervised = labels != IGNORED_LABEL
    if not causal:
        return supervised
    return torch.cat([supervised[:, 1:], torch.zeros_like(supervised[:, :1])], dim=1)


def _in_order(priority: Tensor, uniform: Tensor, real: Tensor) -> Tensor:
    """Each token's rank within its row, 0 for the highest priority: ties by `uniform`, padding last. All (B, S)."""
    order = uniform.argsort(dim=-1, descending=True, stable=True)
    for key in (priority, real.to(torch.uint8)):
        order = order.gather(1, key.gather(1, order).argsort(dim=-1, descending=True, stable=True))
    return order.argsort(dim=-1)


def select_tokens(
    attention_mask: Tensor,
    prefix_length: Size,
    *,
    targets: Tensor | None = None,
    always: Tensor | None = None,
    preferred: Tensor | None = None,
    strategy: str = "random",
    generator: torch.Generator | None = None,
    scores: Tensor | None = None,
    input_ids: Tensor | None = None,
    labels: Tensor | None = None,
    token_scores: dict[str, Tensor] | None = None,
    draw: str = "proportional",
    independent: bool = False,
) -> Selection:
    """Draws the positions that keep gradients, and the weights of their losses.

    Each row has its own count, of its own real tokens. K is the same for the whole batch: shorter rows are filled up
    with padding positions, which are masked in attention and have no loss. K is the count of the longest row where
    `attention_mask` is on the CPU. On other devices it is the count of a row of S tokens, because reading the lengths
    would make the host wait. For `Answers`, K is the count of the row that selects most: on other devices than the CPU
    the host waits for it once. A row without enough padding is then filled up with real tokens, its fillers.

    Args:
        attention_mask: (B, S), 1 at real tokens; padding may stand on either side.
        prefix_length: an int is a count of tokens, a float a proportion of each row's real tokens. `Answers` selects
            all of `targets`, `always` and what its invocation tells, at least one token, and the strategy draws the
            share of the others.
        targets: (B, S) bool, the target positions (`target_mask`). A row that has any gets at least one of them.
        always: (B, S) bool, real positions that are selected in any case (an encoder's pooled token). Where a row's
            count has no room for these and a target, these win.
        preferred: (B, S) bool, the targets that "supervised" selects before the others.
        strategy: a name that `find_strategy` knows. "reference" has counts of its own and promises no target.
        generator: draws the scores, on the device of `attention_mask`.
        scores: (B, S), uniform in [0, 1), instead of `generator`: the draw has no other source of chance.
        input_ids, labels, token_scores, draw: what strategies use (`strategies.Tokens`).
        independent: draw each token on its own (`sampling/independent.py`). A row may then have no target, or no token
            at all, and rows are filled up as for `Answers`.

    Returns:
        Positions, weights, fillers and probabilities, these where `independent`.
        Weights are None where the strategy knows no probabilities, and for `Answers`;
        otherwise 1 / probability at selected targets (at all selected real tokens where `targets` is None), 1 where
        they are always selected, 0 elsewhere. A sum of losses with these weights has the expectation of the sum
        over all targets. For that, a target that was added only because the row's draw had none has weight 0.

    Raises ValueError for an unknown strategy or draw, missing scores, an invalid answer of the strategy, or a strategy
    that cannot choose among the tokens beside the answers, or not independently.
    """
    registered = find_strategy(strategy)
    if draw not in DRAWS:
        raise ValueError(f"unknown draw {draw!r}: one of {', '.join(DRAWS)}")
    if missing := set(registered.needs) - set(token_scores or {}):
        raise ValueError(f"strategy {strategy!r} needs scores of a pass over all tokens: {', '.join(sorted(missing))}")
    real = attention_mask.bool()  # (B, S)
    lengths = real.sum(-1)  # (B,)
    if scores is None:
        scores = torch.rand(real.shape, generator=generator, device=real.device, dtype=torch.float32)
    targets = None if targets is None else targets & real
    always = None if always is None else always.bool() & real
    if isinstance(prefix_length, Answers):
        held = torch.zeros_like(real) if targets is None else targets
        held = held if always is None else held | always
        if prefix_length.invocation:
            held = held | (from_invocation(input_ids, prefix_length.invocation) & real)
        seen = Tokens(real, scores, lengths, input_ids, labels)
        return _answers_and_a_share(prefix_length, held, registered, seen, independent)

    longest = int(lengths.max()) if real.device.type == "cpu" else real.shape[1]
    count = _reference_count if strategy == REFERENCE else selected_count
    k = max(1, count(prefix_length, longest))  # 1 in a batch of nothing but padding, whose shapes then stay usable
    counts = counts_of_rows(prefix_length, lengths, strategy).clamp(max=k)  # (B,)
    seen = Tokens(real, scores, counts, input_ids, labels, targets, preferred, always, token_scores or {}, draw)
    if independent:
        return _one_by_one(probabilities(registered, prefix_length, seen), always, seen)
    priority, probability, _ = answer_of(registered, seen)

    counts = counts.unsqueeze(-1)  # (B, 1)
    place = _in_order(priority, scores, real)  # (B, S), 0 = first
    tokens = real.shape[1]
    forced = torch.zeros_like(real)
    if targets is not None and strategy != REFERENCE:
        # The first target goes to the front of its row. A draw with any target already has this one, so only draws
        # without a target change: in these, the target replaces the token that was drawn last.
        at = place.masked_fill(~targets, tokens)
        front = (at == at.amin(-1, keepdim=True)) & targets
        forced = front & (place >= counts)
        place = place - tokens * front
    if always is not None:
        place = place - 2 * tokens * always
    rank = place.argsort(dim=-1).argsort(dim=-1)
    # There is always enough padding to fill a row of n real tokens. The count c grows by at most 1 per token, so with
    # m <= S tokens in the row that K comes from, K - c(n) = c(m) - c(n) <= m - n <= S - n, the row's padding.
    padding_rank = (~real).cumsum(-1) - 1
    chosen = torch.where(real, rank < counts, padding_rank < k - counts)  # (B, S), K true in each row
    # A stable sort leaves the chosen positions ascending; nonzero() would synchronise.
    positions = chosen.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :k]  # (B, K)
    if probability is None:
        return Selection(positions)
    if always is not None:
        probability = probability.masked_fill(always, 1.0)
    counting = (real if targets is None else targets) & (probability > 0) & ~forced
    weights = torch.where(counting, 1 / probability.where(counting, torch.ones_like(probability)), 0.0)
    return Selection(positions, weights.gather(1, positions).float())


def select_positions(attention_mask: Tensor, prefix_length: int | float, **options: Any) -> Tensor:
    """The positions of `select_tokens`, (B, K), without the weights."""
    return select_tokens(attention_mask, prefix_length, **options).positions


def from_invocation(input_ids: Tensor, invocation: Sequence[int]) -> Tensor:
    """(B, S) bool: the tokens of `input_ids` (B, S) from the last occurrence of `invocation` on; none without one."""
    begins = torch.zeros_like(input_ids, dtype=torch.bool)
    if len(invocation) <= input_ids.shape[1]:
        windows = input_ids.unfold(1, len(invocation), 1)  # (B, S - n + 1, n)
        begins[:, : windows.shape[1]] = (windows == torch.tensor(invocation, device=input_ids.device)).all(-1)
    last = begins & (begins.flip(1).cumsum(1).flip(1) == 1)
    return last.cumsum(1) > 0


def require_drawing_beside_answers(strategy: str) -> None:
    """Raises ValueError for a strategy that cannot choose among the tokens beside the answers."""
    if strategy == REFERENCE or find_strategy(strategy).needs:
        has = "counts of its own" if strategy == REFERENCE else "scores of a pass over all tokens"
        raise ValueError(f"strategy {strategy!r} has {has}: with answers, take another one")


def _answers_and_a_share(
    answers: Answers, held: Tensor, registered: Registered, tokens: Tokens, independent: bool
) -> Selection:
    """The draw of `Answers`: all of `held` (B, S), and of each row's other tokens those that the strategy chooses.

    The strategy sees these others alone, as if they were the row.
    """
    require_drawing_beside_answers(registered.name)
    others = tokens.real & ~held
    number = others.sum(-1)  # (B,)
    counts = (answers.share * number.to(wide_dtype(number.device)) + 0.5).long()
    counts = torch.where(held.any(-1), counts, counts.clamp(min=1)).minimum(number)
    seen = replace(tokens, real=others, counts=counts)
    if independent:
        return _one_by_one(probabilities(registered, answers, seen), held, tokens)
    priority = answer_of(registered, seen).priority
    place = _in_order(priority, tokens.uniform, others)
    return fill_up(held | (others & (place < counts.unsqueeze(-1))), tokens.real)


def _one_by_one(probability: Tensor, held: Tensor | None, tokens: Tokens) -> Selection:
    """Draws each real token with its own probability (B, S), those of `held` (B, S) with 1, independent of the others.

    No target is there by force, and no drawn token is left out: each would make draws depend on one another.
    """
    if held is not None:
        probability = probability.masked_fill(held, 1.0)
    # Probability 1 is sure, also where a uniform number was rounded up to 1.
    chosen = tokens.real & ((tokens.uniform < probability) | (probability >= 1))
    positions, _, fillers, _ = fill_up(chosen, tokens.real)
    drawn = chosen.gather(1, positions)
    probability, weights = probability.gather(1, positions).where(drawn, 1.0), None
    if tokens.targets is not None:
        weights = (1 / probability).where(drawn & tokens.targets.gather(1, positions), 0.0)
    return Selection(positions, weights, fillers, probability)


def fill_up(chosen: Tensor, real: Tensor) -> Selection:
    """The chosen positions, any number in each row, and others up to the largest of these numbers.

    Padding fills a row up first, then its first unchosen real tokens: the fillers. Both arguments are (B, S) bool. On
    an accelerator the host waits once, for K.
    """
    counts = chosen.sum(-1)
    without_fillers = counts + (~real).sum(-1)
    k, room = torch.stack([counts.amax(), without_fillers.amin()]).tolist()
    k = max(1, k)  # as in a batch of nothing but padding
    unchosen = real & ~chosen
    order = (2 * unchosen.to(torch.uint8) + ~real).argsort(dim=-1, stable=True)
    positions = order[:, :k].sort(dim=-1).values
    return Selection(positions, fillers=unchosen.gather(1, positions) if k > room else None)


def mask_unselected_labels(labels: Tensor, positions: Tensor, *, causal: bool) -> Tensor:
    """A copy of labels (B, S) that has only those of the selected positions (B, K) int64, and -100 elsewhere.

    So the number of labels is the number of losses. `causal` as in `target_mask`.
    """
    selected = torch.zeros_like(labels, dtype=torch.bool).scatter(1, positions, True)  # (B, S)
    if causal:  # the label at t + 1 belongs to the output at t; the label at 0 to none
        selected = torch.cat([torch.zeros_like(selected[:, :1]), selected[:, :-1]], dim=1)
    return labels.masked_fill(~selected, IGNORED_LABEL)


def draw_scores(seeds: Sequence[int], length: int) -> Tensor:
    """Uniform scores for `select_positions` (B, S), float64 on the CPU, of B seeds in [0, 2**64).

    There is one generator per row. So a row has the same draw in every batch, batch size and worker, with any padding
    on the right (the first scores of a longer row are those of a shorter one). The generators are NumPy's, because a
    torch CPU generator uses only 32 bits of its seed.
    """
    return torch.from_numpy(np.stack([np.random.default_rng(seed).random(length) for seed in seeds]))
