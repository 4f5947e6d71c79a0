"""Whether a probability of 0.9 is right nine times in ten: reliability bins, ECE, temperature scaling.

Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017. The confidence of a sample is its
largest class probability; it is right when that class is the true one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

Floats = NDArray[np.float64]

BINS = 15
MAX_TEMPERATURE = 100.0


@dataclass(frozen=True, slots=True)
class Reliability:
    """Bins of equal width over the confidence: M bins, (M + 1,) `edges`; nan means where a bin is empty."""

    edges: Floats
    count: NDArray[np.int64]
    confidence: Floats
    accuracy: Floats

    @property
    def ece(self) -> float:
        """Expected calibration error, sum_m |B_m| / n |acc(B_m) - conf(B_m)| (eq. 3); nan without samples."""
        if not self.count.sum():
            return float("nan")
        gap = np.nan_to_num(np.abs(self.accuracy - self.confidence))
        return float(np.average(gap, weights=self.count))


def reliability(probs: ArrayLike, labels: ArrayLike, bins: int = BINS) -> Reliability:
    """Bin (n, C) probabilities by confidence into ((m - 1) / M, m / M] and compare with the (n,) labels."""
    p = np.asarray(probs, dtype=np.float64)
    confidence, correct = p.max(axis=1), p.argmax(axis=1) == np.asarray(labels)
    index = confidence_bins(confidence, bins)
    count = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(index, weights=confidence, minlength=bins) / count
        accuracy = np.bincount(index, weights=correct, minlength=bins) / count
    return Reliability(np.linspace(0, 1, bins + 1), count, mean_confidence, accuracy)


def weighted_ece(weights: Floats, confidence: Floats, correct: NDArray[np.bool_], bins: int = BINS) -> Floats:
    """ECE under each row of weights (R, n), for the bootstrap -> (R,)."""
    member = np.eye(bins)[confidence_bins(confidence, bins)]  # (n, M)
    gap = weights @ (member * (correct - confidence)[:, None])  # (R, M): |B_m| (acc - conf)
    return np.asarray(np.abs(gap).sum(axis=1) / weights.sum(axis=1))


def confidence_bins(confidence: Floats, bins: int = BINS) -> NDArray[np.int64]:
    """(n,) index of the bin ((m - 1) / M, m / M] of each confidence; 0 falls into the first."""
    inner = np.linspace(0, 1, bins + 1)[1:-1]
    return np.searchsorted(inner, confidence, side="left").astype(np.int64)


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> float:
    """The T > 0 for which softmax(logits / T) has the least negative log-likelihood (section 4.2).

    Fit on validation data; ranking and arg max do not change. T > 1 means that the model was over-confident.

    Args:
        logits: (n, C).
        labels: (n,).

    Returns:
        T within [1 / 100, 100]. Where every sample is right (or wrong) there is no minimum inside and T lies
        at that bound.
    """
    z, y = np.asarray(logits, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    if z.ndim != 2 or y.shape != z.shape[:1] or not len(y):
        raise ValueError(f"expected (n, C) logits and (n,) labels with n > 0, not {z.shape} and {y.shape}")
    if not np.isfinite(z).all():
        raise ValueError("logits must be finite")
    rows = np.arange(len(y))

    def loss(inverse: float) -> float:  # convex in 1 / T, so the bounded search finds the minimum
        return -float(log_softmax(z * inverse, axis=1)[rows, y].mean())

    bounds = (1 / MAX_TEMPERATURE, MAX_TEMPERATURE)
    # The scale of the logits is unknown: first locate the minimum on a logarithmic grid, then refine.
    grid = np.geomspace(*bounds, 41)
    best = int(np.argmin([loss(inverse) for inverse in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    refined = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-9}).x
    return 1 / float(min(refined, grid[best], key=loss))
