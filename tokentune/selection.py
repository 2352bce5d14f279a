"""Which token positions keep gradients: the draw, and the labels that remain.

`random` is the paper's selection (arXiv 2501.18824, section "Token Selection"): K positions of each sequence,
uniformly and without replacement among its real (non-padding) tokens. `reference` repeats the draw of the authors'
released code, for comparison with it. `labelled` selects the target positions first, of these the preferred ones (the
words with an entity's label), and fills up at random.

Legend: B sequences, S tokens of the padded batch, K selected positions per sequence. A *target position* is one whose
output has a loss: the token before a supervised one in a causal model, the supervised one itself otherwise.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

STRATEGIES = ("random", "reference", "labelled")
IGNORED_LABEL = -100  # torch.nn.functional.cross_entropy's default ignore_index


def parse_prefix_length(text: str) -> int | float:
    """Reads `--prefix_length`: `16` is a count of tokens, `0.3` a proportion of each sequence, `1.0` all of it.

    Raises:
        ValueError: neither a count of at least 1 nor a proportion above 0 and at most 1.
    """
    try:
        value = int(text)
    except ValueError:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
    if isinstance(value, int) and value >= 1:
        return value
    if isinstance(value, float) and 0.0 < value <= 1.0:  # NaN fails both comparisons
        return value
    raise ValueError(
        f"{text!r} is neither a number of tokens (16, at least 1) nor a proportion of the sequence "
        "(0.3, above 0.0 and at most 1.0)"
    )


def selected_count(prefix_length: int | float, length: int) -> int:
    """K of one sequence of `length` real tokens: min(number, length), or max(1, round(proportion * length)).

    Halves round up (Python's `round` would send 0.5 * 5 and 0.5 * 7 in opposite directions). 0 for an empty sequence.
    """
    count = max(1, int(prefix_length * length + 0.5)) if isinstance(prefix_length, float) else prefix_length
    return min(count, length)


def _reference_count(prefix_length: int | float, length: int) -> int:
    """K of one sequence in the released code's draw: first and last token, and the others from positions 1 .. n-3."""
    others = int(prefix_length * max(length - 2, 0)) if isinstance(prefix_length, float) else prefix_length
    return min(length, 2 + min(others, max(length - 3, 0)))


def _counts_of_rows(prefix_length: int | float, lengths: Tensor, strategy: str) -> Tensor:
    """`selected_count` or `_reference_count` of every row, on the rows' device: lengths (B,) -> counts (B,)."""
    # float64, so that a product rounds as it does in Python; MPS has none, and may be one off on an exact half.
    wide = torch.float32 if lengths.device.type == "mps" else torch.float64
    proportion = isinstance(prefix_length, float)
    if strategy == "reference":
        between = (lengths - 3).clamp(min=0)
        others = (prefix_length * (lengths - 2).clamp(min=0).to(wide)).long() if proportion else prefix_length
        others = torch.minimum(others, between) if proportion else between.clamp(max=prefix_length)
        return torch.minimum(lengths, 2 + others)
    if not proportion:
        return lengths.clamp(max=prefix_length)
    counts = (prefix_length * lengths.to(wide) + 0.5).long().clamp(min=1)
    return torch.minimum(counts, lengths)


def target_mask(labels: Tensor, *, causal: bool) -> Tensor:
    """Positions whose output has a loss.

    Args:
        labels: (B, S) int64, -100 where no loss.
        causal: the output at position t predicts the label at t + 1; otherwise the label at t.

    Returns:
        (B, S) bool.
    """
    supervised = labels != IGNORED_LABEL
    if not causal:
        return supervised
    return torch.cat([supervised[:, 1:], torch.zeros_like(supervised[:, :1])], dim=1)


def _priority(real: Tensor, lengths: Tensor, scores: Tensor, targets: Tensor | None, strategy: str) -> Tensor:
    """Scores in which what must be selected comes first and what must not be comes last. (B, S) -> (B, S)"""
    if strategy == "reference":
        order = real.cumsum(-1) - 1  # (B, S): 0 at the row's first real token
        last = lengths.unsqueeze(-1) - 1
        scores = scores.masked_fill(real & (order == last - 1), -0.5)  # never drawn; still above padding's -1
        return scores + 2.0 * (real & ((order == 0) | (order == last)))
    if targets is None:
        return scores
    # The best-scored target goes to the front of its row. A draw that holds any target holds this one already (a draw
    # is the best scores of the row), so only draws that missed all targets change: theirs replaces the lowest score.
    of_targets = scores.masked_fill(~(targets & real), -1.0)
    best, at = of_targets.max(dim=-1, keepdim=True)  # (B, 1)
    front = (torch.arange(scores.shape[1], device=scores.device) == at) & (best >= 0)  # (B, S)
    return scores + front


def select_positions(
    attention_mask: Tensor,
    prefix_length: int | float,
    *,
    targets: Tensor | None = None,
    always: Tensor | None = None,
    preferred: Tensor | None = None,
    strategy: str = "random",
    generator: torch.Generator | None = None,
    scores: Tensor | None = None,
) -> Tensor:
    """Draws the positions that keep gradients, for every row of a padded batch at once.

    Each row takes its own count of its own real tokens. K is the batch's common size, and shorter rows are filled up
    to it with padding positions, which attention masks and which carry no loss. K is the count of the longest row
    where `attention_mask` is on the CPU, and that of a row of S tokens elsewhere, where looking at the lengths would
    stop the host until the device has caught up.

    Args:
        attention_mask: (B, S), 1 at real tokens; padding may stand on either side.
        prefix_length: an int is a count of tokens, a float a proportion of each row's real tokens.
        targets: (B, S) bool, the target positions (`target_mask`). A row that has any gets at least one of them.
        always: (B, S) bool, real positions that are selected in any case (an encoder's pooled token). Where a row's
            count has no room for these and a target, these win.
        preferred: (B, S) bool, the targets that "labelled" selects before the others.
        strategy: one of `STRATEGIES`. "reference" promises no target.
        generator: draws the scores, on the device of `attention_mask`.
        scores: (B, S), uniform in [0, 1), instead of `generator`: the highest of a row's real tokens are selected.

    Returns:
        (B, K) int64: distinct positions, ascending in each row.

    Raises:
        ValueError: unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown selection strategy {strategy!r}: one of {', '.join(STRATEGIES)}")
    real = attention_mask.bool()  # (B, S)
    lengths = real.sum(-1)  # (B,)
    if scores is None:
        scores = torch.rand(real.shape, generator=generator, device=real.device, dtype=torch.float32)

    longest = int(lengths.max()) if real.device.type == "cpu" else real.shape[1]
    count = _reference_count if strategy == "reference" else selected_count
    k = max(1, count(prefix_length, longest))  # 1 in a batch of nothing but padding, whose shapes then stay usable
    counts = _counts_of_rows(prefix_length, lengths, strategy).clamp(max=k).unsqueeze(-1)  # (B, 1)

    if strategy == "labelled" and targets is not None:
        # Three ranges of scores, one above the other, and below 1 in all: what comes first in any case stays above.
        first = targets.to(scores.dtype) + (0.0 if preferred is None else (targets & preferred).to(scores.dtype))
        scores = (scores + first) / 3
    priority = _priority(real, lengths, scores, targets, strategy)
    if always is not None:
        priority = priority + 2.0 * (always.bool() & real)
    rank = priority.masked_fill(~real, -1.0).argsort(dim=-1, descending=True).argsort(dim=-1)  # (B, S), 0 = first
    # There is always enough padding to fill a row of n real tokens. The count c grows by at most 1 per token, so with
    # m <= S tokens in the row that K comes from, K - c(n) = c(m) - c(n) <= m - n <= S - n, the row's padding.
    padding_rank = (~real).cumsum(-1) - 1
    chosen = torch.where(real, rank < counts, padding_rank < k - counts)  # (B, S), K true in each row
    # A stable sort leaves the chosen positions ascending; nonzero() would synchronise.
    return chosen.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :k]  # (B, K)


def mask_unselected_labels(labels: Tensor, positions: Tensor, *, causal: bool) -> Tensor:
    """Labels that leave a loss at the selected target positions alone, so that counting labels counts loss terms.

    Args:
        labels: (B, S) int64, -100 where no loss.
        positions: (B, K) int64, the selected positions.
        causal: as in `target_mask`.

    Returns:
        (B, S) int64; `labels` itself is left as it is.
    """
    selected = torch.zeros_like(labels, dtype=torch.bool).scatter(1, positions, True)  # (B, S)
    if causal:  # the label at t + 1 belongs to the output at t; the label at 0 to none
        selected = torch.cat([torch.zeros_like(selected[:, :1]), selected[:, :-1]], dim=1)
    return labels.masked_fill(~selected, IGNORED_LABEL)


def draw_scores(seeds: Sequence[int], length: int) -> Tensor:
    """Uniform scores for `select_positions` that depend on nothing but the row's own seed.

    One generator per row: a row keeps its draw whatever batch, batch size or worker it comes in, and however far it is
    padded on the right (the first scores of a longer row are those of a shorter one). NumPy's, because a torch CPU
    generator uses 32 bits of its seed.

    Args:
        seeds: B seeds, each in [0, 2**64).
        length: S, tokens of the padded batch.

    Returns:
        (B, S) float64 in [0, 1), on the CPU.
    """
    return torch.from_numpy(np.stack([np.random.default_rng(seed).random(length) for seed in seeds]))
