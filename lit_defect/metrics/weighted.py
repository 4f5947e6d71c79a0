"""Classification metrics for many weightings of the same samples at once: what the bootstrap computes.

Each function takes weights (R, n), one row per resample, and returns (R,), nan where a row leaves the metric
undefined. A single row of ones gives the plain metric. Ties of scores are exact: samples of equal score are
one step of the curve. The scores are sorted once, whatever R is, which is what makes the bootstrap fast.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def mean(weights: Floats, values: Floats) -> Floats:
    """Mean of (n,) values."""
    return np.asarray(weights @ values / weights.sum(axis=1))


def auroc(weights: Floats, positive: Bools, scores: Floats) -> Floats:
    """P(score of a positive > score of a negative) + P(equal) / 2; positive and scores (n,)."""
    hits, misses = _steps(weights, positive, scores)
    below = misses.sum(axis=1, keepdims=True) - np.cumsum(misses, axis=1)
    area = np.einsum("ru,ru->r", hits, below + misses / 2)
    return _ratio(area, hits.sum(axis=1) * misses.sum(axis=1))


def average_precision(weights: Floats, positive: Bools, scores: Floats) -> Floats:
    """Sum over the steps of (R_u - R_{u-1}) P_u, recall R and precision P, without interpolation."""
    hits, misses = _steps(weights, positive, scores)
    found, false = np.cumsum(hits, axis=1), np.cumsum(misses, axis=1)
    precision = found / np.maximum(found + false, np.finfo(np.float64).tiny)  # 0 before the first weight
    area = np.einsum("ru,ru->r", hits, precision)
    return np.where(false[:, -1] > 0, _ratio(area, found[:, -1]), np.nan)


def one_against_rest(weights: Floats, truth: Ints, probs: Floats, curve: str) -> Floats:
    """Mean of `curve`, auroc or average_precision, of each class against the rest, where it is defined."""
    metric = {"auroc": auroc, "average_precision": average_precision}[curve]
    by_class = [metric(weights, truth == c, probs[:, c]) for c in range(probs.shape[1])]
    return _mean_defined(np.stack(by_class, axis=1))


def balanced_accuracy(weights: Floats, truth: Ints, predicted: Ints, classes: int) -> Floats:
    """Mean recall of the classes that occur."""
    hits, true, _ = _class_totals(weights, truth, predicted, classes)
    return _mean_defined(_ratio(hits, true))


def macro_f1(weights: Floats, truth: Ints, predicted: Ints, classes: int) -> Floats:
    """Mean of 2 TP / (2 TP + FP + FN) over the classes that occur in truth or prediction."""
    hits, true, claimed = _class_totals(weights, truth, predicted, classes)
    return _mean_defined(_ratio(2 * hits, true + claimed))


def _class_totals(weights: Floats, truth: Ints, predicted: Ints, classes: int) -> tuple[Floats, Floats, Floats]:
    """Weight (R, C) of the samples rightly predicted as each class, truly of it, and predicted as it."""
    unit = np.eye(classes)
    return weights @ (unit[truth] * unit[predicted]), weights @ unit[truth], weights @ unit[predicted]


def _steps(weights: Floats, positive: Bools, scores: Floats) -> tuple[Floats, Floats]:
    """Weight of positives and of negatives (R, u) at each of the u distinct scores, the highest first."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
    columns = weights[:, order]
    hits, misses = columns * positive[order], columns * ~positive[order]
    if len(starts) == len(ranked):
        return hits, misses
    return np.add.reduceat(hits, starts, axis=1), np.add.reduceat(misses, starts, axis=1)


def _ratio(part: Floats, whole: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(whole > 0, part / whole, np.nan)


def _mean_defined(values: Floats) -> Floats:
    """Mean over the classes (R, C) -> (R,), leaving out nan; nan where all are."""
    return _ratio(np.nansum(values, axis=1), np.isfinite(values).sum(axis=1).astype(np.float64))
