"""Selective gradients against the full gradient that they estimate: direction, size, bias and variance, by part.

    g  the full gradient          x_1 .. x_D  the draws, each over the same rows with a selection of its own
    m  the mean of the draws      V           their variance: sum of |x_d - m|^2 / (D - 1), over all weights
    R  rows of the batch          T           variance between rows: R n_i g_i / N summed over i as V is

The mean of D draws still holds V / D of their variance. Estimates of the draws' expectation are freed from it:

    |m|^2     - V / D    is an unbiased estimate of the expectation's square
    |m - g|^2 - V / D    is one of the squared bias; with few draws it may be negative, and is reported as it is

The effective batch: how many rows of full training are as noisy as one row with a selection (by the noise scale of
McCandlish et al. 2018, arXiv 1812.06162: variance over squared norm). A full gradient over B rows has variance T / B.
A selection adds R V / B, as rows draw independently of each other, and scales the signal by c = <m, g> / |g|^2, and
with it the rows' own variance by c^2. Equal noise for equal signal: B' / B = T / (T + R V / c^2).

Sums are float64, over pieces of the weights, whatever type these have. Of the draws only the running mean is held
(Welford 1962).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokentune.gradients.parts import Part, kinds_in_order

Gradient = Mapping[str, Tensor]  # by weight, on the CPU, float32 or float64
_PIECE = 2**22  # numbers that are widened to float64 at once


def inner(first: Tensor, second: Tensor) -> float:
    """The inner product of two tensors of one shape, in float64."""
    return _summed(lambda a, b: a @ b, first, second)


def squared_distance(first: Tensor, second: Tensor) -> float:
    """The square of the difference's norm, in float64."""
    return _summed(lambda a, b: (a - b).square().sum(), first, second)


def _summed(term: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor) -> float:
    pairs = zip(first.flatten().split(_PIECE), second.flatten().split(_PIECE), strict=True)
    return sum(float(term(a.double(), b.double())) for a, b in pairs)


class RowVariance:
    """The variance between rows (T above): fed with each row's share of the full gradient, n_i g_i / N."""

    def __init__(self) -> None:
        self.rows, self._squares = 0, 0.0

    def add(self, share: Gradient) -> None:
        self.rows += 1
        self._squares += sum(inner(tensor, tensor) for tensor in share.values())

    def result(self, full_square: float) -> float:
        """T, unbiased. `full_square`: |g|^2, of the sum of the shares."""
        # With y_i = R times a share, whose mean is g: sum |y_i - g|^2 = sum |y_i|^2 - R |g|^2.
        return (self.rows**2 * self._squares - self.rows * full_square) / (self.rows - 1)


class DrawStatistics:
    """Takes draws one by one and tells how they relate to the full gradient."""

    def __init__(self, full: Gradient, parts: Mapping[str, Part]) -> None:
        """`parts`: of every weight in `full`."""
        self.full = full
        self.groups = list(dict.fromkeys(parts[name] for name in full))  # the finest division; all others are sums
        self._group_of = {name: self.groups.index(parts[name]) for name in full}
        self._mean = {name: torch.zeros_like(tensor) for name, tensor in full.items()}
        self._full_squares = self._sums(full)[1]
        self._spread = np.zeros(len(self.groups))  # the sum of |x_d - m|^2
        self._draws: list[np.ndarray] = []

    def _sums(self, gradient: Gradient) -> np.ndarray:
        """<x, g>, |x|^2 and |x - g|^2 of a gradient x, by group: (3, groups)."""
        sums = np.zeros((3, len(self.groups)))
        for name, full in self.full.items():
            x = gradient[name]
            sums[:, self._group_of[name]] += inner(x, full), inner(x, x), squared_distance(x, full)
        return sums

    def add(self, draw: Gradient) -> None:
        """One more draw: every weight of the full gradient, in any order."""
        self._draws.append(self._sums(draw))
        count = len(self._draws)
        before = np.zeros(len(self.groups))
        for name, mean in self._mean.items():
            before[self._group_of[name]] += squared_distance(draw[name], mean)
            mean.lerp_(draw[name], 1 / count)
        # |x - m_before|^2 (count - 1) / count is <x - m_before, x - m_after>, Welford's update.
        self._spread += before * (count - 1) / count

    def result(self, row_variance: float | None = None, rows: int | None = None) -> dict[str, Any]:
        """Figures that docs/selection.md and `gradients/report.py` describe: of the whole, by layer and by kind.

        Args:
            row_variance, rows: T and R, for the effective batch; None leaves it out.
        """
        of_mean = self._sums(self._mean)
        whole = self._figures(of_mean, lambda part: True)
        if row_variance is not None:
            scale = float(of_mean[0].sum() / self._full_squares.sum())  # c
            added = rows * self._spread.sum() / (len(self._draws) - 1)
            whole["effective_batch"] = _ratio(row_variance, row_variance + _ratio(added, scale**2, math.inf))
        layers = sorted({part.layer for part in self.groups if part.layer is not None})
        kinds = kinds_in_order({part.kind for part in self.groups})
        return {
            "whole": whole,
            "by_layer": [{"layer": at} | self._figures(of_mean, lambda part, at=at: part.layer == at) for at in layers],
            "by_kind": [{"kind": of} | self._figures(of_mean, lambda part, of=of: part.kind == of) for of in kinds],
        }

    def _figures(self, of_mean: np.ndarray, chosen: Callable[[Part], bool]) -> dict[str, Any]:
        """The figures over the chosen groups; null where the full gradient is zero there. `of_mean`: `_sums` of m."""
        mask = np.array([chosen(part) for part in self.groups])
        full = float(self._full_squares[mask].sum())
        product, square, error = (float(sums[mask].sum()) for sums in of_mean)
        variance = float(self._spread[mask].sum()) / (len(self._draws) - 1)
        held = variance / len(self._draws)  # of the variance, by the mean
        draws = np.stack(self._draws)[:, :, mask].sum(-1)  # (D, 3)
        return {
            "full_norm": math.sqrt(full),
            "cosine": _mean_and_error([_ratio(p, math.sqrt(s * full)) for p, s, _ in draws]),
            "relative_error": _mean_and_error([_root(_ratio(e, full)) for _, _, e in draws]),
            "variance": _ratio(variance, full),
            "mean_of_draws": {
                "cosine": _ratio(product, math.sqrt(square * full)),
                "cosine_corrected": _ratio(product, math.sqrt(max(square - held, 0.0) * full)),
                "relative_norm": _root(_ratio(square, full)),
                "relative_norm_corrected": _root(_ratio(square - held, full)),
                "bias_raw": _root(_ratio(error, full)),
                "bias": _root(_ratio(error - held, full)),
                "bias_squared": _ratio(error - held, full),
            },
        }


def _ratio(part: float, whole: float, otherwise: float | None = None) -> float | None:
    return float(part / whole) if whole > 0 else otherwise


def _root(value: float | None) -> float | None:
    """A root of what chance may have brought below zero, then 0."""
    return None if value is None else math.sqrt(max(value, 0.0))


def _mean_and_error(values: list[float | None]) -> dict[str, float | None]:
    """Mean over the draws, and the mean's standard error; null where a draw has no value."""
    if None in values:
        return {"mean": None, "standard_error": None}
    return {"mean": float(np.mean(values)), "standard_error": float(np.std(values, ddof=1) / math.sqrt(len(values)))}
