"""Draws of a gradient against the gradient that they stand for: direction, size, bias, variance, by part of the model.

    g  the full gradient          x_1 .. x_D  the draws, each over the same rows with a selection of its own
    m  the mean of the draws      V           their variance: sum of |x_d - m|^2 / (D - 1), over all weights
    R  rows of the batch          T           variance between rows: R n_i g_i / N summed over i as V is

The mean of D draws still holds V / D of their variance. What is told of the draws' expectation is freed from it:

    |m|^2     - V / D    is an unbiased estimate of the expectation's square
    |m - g|^2 - V / D    is one of the squared bias; few draws may bring it below zero, which is then reported as it is

How many rows of full training are as noisy as a batch of B rows with a selection (its noise scale, McCandlish et al.
2018, arXiv 1812.06162: variance over the squared norm of the signal): a full gradient over B rows has variance T / B.
A selection adds R V / B, as rows draw independently of each other, and scales the signal by c = <m, g> / |g|^2, and
with it the rows' own variance by c^2. Equal noise for equal signal: B' / B = T / (T + R V / c^2).

Sums are float64, over pieces of the weights, whatever type these have; no draw is kept but in the running mean (Welford
1962).
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokentune.gradients.parts import Part, kinds_in_order

Gradient = Mapping[str, Tensor]  # by weight, on the CPU, float32 or float64
_PIECE = 2**22  # numbers that are widened to float64 at once


def inner(first: Tensor, second: Tensor) -> float:
    """The inner product of two tensors of one shape, in float64."""
    pairs = zip(first.flatten().split(_PIECE), second.flatten().split(_PIECE), strict=True)
    return sum(float(a.double() @ b.double()) for a, b in pairs)


def squared_distance(first: Tensor, second: Tensor) -> float:
    """The square of the difference's norm, in float64."""
    pairs = zip(first.flatten().split(_PIECE), second.flatten().split(_PIECE), strict=True)
    return sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)


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
        self.full, self.parts = full, parts
        self.groups = list(dict.fromkeys(parts[name] for name in full))  # the finest division; all others are sums
        self._place = {part: place for place, part in enumerate(self.groups)}
        self._mean = {name: torch.zeros_like(tensor) for name, tensor in full.items()}
        self._full_squares = self._by_group((name, inner(tensor, tensor)) for name, tensor in full.items())
        self._spread = np.zeros(len(self.groups))  # the sum of |x_d - m|^2
        self._products: list[np.ndarray] = []  # <x_d, g>
        self._squares: list[np.ndarray] = []  # |x_d|^2
        self._errors: list[np.ndarray] = []  # |x_d - g|^2

    def _by_group(self, terms: Iterable[tuple[str, float]]) -> np.ndarray:
        sums = np.zeros(len(self.groups))
        for name, term in terms:
            sums[self._place[self.parts[name]]] += term
        return sums

    @property
    def draws(self) -> int:
        return len(self._products)

    def add(self, draw: Gradient) -> None:
        """One more draw: every weight of the full gradient, in any order."""
        full = self.full
        self._products.append(self._by_group((name, inner(draw[name], full[name])) for name in full))
        self._squares.append(self._by_group((name, inner(draw[name], draw[name])) for name in full))
        self._errors.append(self._by_group((name, squared_distance(draw[name], full[name])) for name in full))
        before = self._by_group((name, squared_distance(draw[name], self._mean[name])) for name in full)
        count = len(self._products)
        for name, mean in self._mean.items():
            mean.lerp_(draw[name], 1 / count)
        # |x - m_before|^2 (count - 1) / count is <x - m_before, x - m_after>, Welford's update.
        self._spread += before * (count - 1) / count

    def result(self, row_variance: float | None = None, rows: int | None = None) -> dict[str, Any]:
        """Figures that docs/selection.md and `gradients/report.py` describe: of the whole, by layer and by kind.

        Args:
            row_variance, rows: T and R, for the effective batch; None leaves it out.
        """
        products = self._by_group((name, inner(mean, self.full[name])) for name, mean in self._mean.items())
        squares = self._by_group((name, inner(mean, mean)) for name, mean in self._mean.items())
        errors = self._by_group((name, squared_distance(mean, self.full[name])) for name, mean in self._mean.items())
        of_mean = np.stack([products, squares, errors])
        everything = np.ones(len(self.groups), dtype=bool)
        whole = self._figures(everything, of_mean)
        if row_variance is not None:
            scale = float(products.sum() / self._full_squares.sum())  # c
            added = rows * self._spread.sum() / (self.draws - 1)
            whole["effective_batch"] = _ratio(row_variance, row_variance + _ratio(added, scale**2, math.inf))
        layers = sorted({part.layer for part in self.groups if part.layer is not None})
        kinds = kinds_in_order({part.kind for part in self.groups})
        return {
            "whole": whole,
            "by_layer": [{"layer": layer} | self._chosen(of_mean, layer=layer) for layer in layers],
            "by_kind": [{"kind": kind} | self._chosen(of_mean, kind=kind) for kind in kinds],
        }

    def _chosen(self, of_mean: np.ndarray, **wanted: Any) -> dict[str, Any]:
        ((name, value),) = wanted.items()
        return self._figures(np.array([getattr(part, name) == value for part in self.groups]), of_mean)

    def _figures(self, chosen: np.ndarray, of_mean: np.ndarray) -> dict[str, Any]:
        """The figures over some groups; null where the full gradient is zero there."""
        full = float(self._full_squares[chosen].sum())
        product, square, error = (float(values[chosen].sum()) for values in of_mean)
        variance = float(self._spread[chosen].sum()) / (self.draws - 1)
        held = variance / self.draws  # of the variance, by the mean
        draws = [np.stack(values)[:, chosen].sum(1) for values in (self._products, self._squares, self._errors)]
        cosines = [_ratio(p, math.sqrt(s * full)) for p, s in zip(draws[0], draws[1], strict=True)]
        errors = [_root(_ratio(e, full)) for e in draws[2]]
        return {
            "full_norm": math.sqrt(full),
            "cosine": _mean_and_error(cosines),
            "relative_error": _mean_and_error(errors),
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
