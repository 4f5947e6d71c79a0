"""How sure a figure is: confidence intervals and paired tests for metrics on one test set.

Proportions (accuracy, recall, escape rate) take Wilson's interval and the binary AUROC takes DeLong's; for
everything else there is the bootstrap, in its own file. Photographs of the same physical part are not
independent: with `groups` each method counts parts, not pictures.

A figure that cannot be had (one class only, no samples) is nan and says why; nothing here raises for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]

_ROUNDING = 1e-12  # values that differ by less differ by rounding


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its confidence limits; `k` of `n` for proportions; `reason` when something is nan."""

    value: float
    low: float = math.nan
    high: float = math.nan
    k: int | None = None
    n: int | None = None
    reason: str = ""

    def as_dict(self) -> dict[str, float | int | str | None]:
        """Plain types for JSON: nan becomes None, and what is not known is left out."""
        entry: dict[str, float | int | str | None] = {
            name: float(number) if math.isfinite(number) else None
            for name, number in (("value", self.value), ("low", self.low), ("high", self.high))
        }
        if self.n is not None:
            entry |= {"k": self.k, "n": self.n}
        return entry | ({"reason": self.reason} if self.reason else {})


def wilson(k: int, n: int, level: float = 0.95) -> Interval:
    """Score interval of a proportion of `k` hits in `n` trials (Wilson, JASA 1927).

    Never leaves [0, 1] and has a sensible width at 0 and `n` hits, where the normal one collapses.
    """
    if not 0 <= k <= n:
        raise ValueError(f"k must lie between 0 and n, not k={k}, n={n}")
    if n == 0:
        return Interval(math.nan, k=0, n=0, reason="no samples")
    low, high = _score_limits(k / n, n, stats.norm.isf((1 - level) / 2))
    return Interval(k / n, low, high, k=k, n=n)


def wilson_clustered(hits: ArrayLike, groups: ArrayLike, level: float = 0.95) -> Interval:
    """Wilson's interval for a proportion over samples that come in groups.

    The number of trials is replaced by the effective one, p (1 - p) / var(p), with var(p) the between-group
    (linearised ratio) variance, and z by Student's t on G - 1 degrees of freedom (Korn & Graubard 1998;
    Dean & Pagano 2015). Where p is 0 or 1 that variance says nothing, and each group counts as one trial.

    Args:
        hits: (n,) booleans.
        groups: (n,) name or number of the group of each sample.
        level: confidence level.
    """
    hit = np.asarray(hits, dtype=np.float64)
    unit = unit_index(groups, len(hit))
    n, k = len(hit), int(hit.sum())
    if n == 0:
        return Interval(math.nan, k=0, n=0, reason="no samples")
    count = int(unit.max()) + 1
    if count == 1:
        return Interval(k / n, k=k, n=n, reason="one group only")
    p = k / n
    if k in (0, n):
        effective = float(count)
    else:
        residuals = np.bincount(unit, weights=hit - p)
        variance = count / (count - 1) * float(residuals @ residuals) / n**2
        effective = min(float(n), p * (1 - p) / variance) if variance > 0 else float(n)
    low, high = _score_limits(p, effective, stats.t.isf((1 - level) / 2, count - 1))
    return Interval(p, low, high, k=k, n=n)


def mean_of_independent(parts: Sequence[Interval]) -> Interval:
    """Interval of the mean of independent estimates from their own (MOVER: Zou & Donner, Stat. Med. 2008).

    For the balanced accuracy, the mean of the recalls: with Wilson's limits it has a width at 1, too.
    """
    if not parts:
        return Interval(math.nan, reason="no samples")
    value, low, high = np.array([(part.value, part.low, part.high) for part in parts]).T
    mean, count = float(value.mean()), len(parts)
    below = float(np.linalg.norm(value - low)) / count
    above = float(np.linalg.norm(high - value)) / count
    return Interval(mean, mean - below, mean + above, reason=next((p.reason for p in parts if p.reason), ""))


def auroc_delong(
    labels: ArrayLike, scores: ArrayLike, *, groups: ArrayLike | None = None, level: float = 0.95
) -> Interval:
    """Area under the ROC curve with DeLong's interval (Biometrics 1988), set on the logit scale.

    The structural components come from mid-ranks (Sun & Xu, IEEE SPL 2014), so a hundred thousand samples
    take milliseconds. With `groups` they are summed per group first (Obuchowski, Biometrics 1997). Perfect
    separation has no estimable variance: the min(positives, negatives) disjoint pairs, or groups, are then
    counted as trials that all succeeded, and Wilson's limit is taken, which is conservative.

    Args:
        labels: (n,) 1 for positive, 0 for negative.
        scores: (n,) higher means more positive.
        groups: (n,) group of each sample, or None when all are independent.
        level: confidence level.
    """
    truth, score = np.asarray(labels).astype(bool), np.asarray(scores, dtype=np.float64)
    same_length(truth, score)
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if positives == 0 or negatives == 0:
        return Interval(math.nan, reason="one class only" if len(truth) else "no samples")

    rank = stats.rankdata(score)
    component = np.empty(len(score))  # V10 of the positives, V01 of the negatives
    component[truth] = (rank[truth] - stats.rankdata(score[truth])) / negatives
    component[~truth] = 1 - (rank[~truth] - stats.rankdata(score[~truth])) / positives
    area = float(component[truth].mean())

    trials = min(positives, negatives)
    if groups is None:
        if trials == 1:
            return Interval(area, reason="one sample only in a class")
        variance = component[truth].var(ddof=1) / positives + component[~truth].var(ddof=1) / negatives
        quantile = stats.norm.isf((1 - level) / 2)
    else:
        unit = unit_index(groups, len(score))
        count = int(unit.max()) + 1
        trials = min(len(np.unique(unit[truth])), len(np.unique(unit[~truth])))
        if trials == 1:
            return Interval(area, reason="one group only in a class")
        influence = (component - area) / np.where(truth, positives, negatives)
        variance = count / (count - 1) * float(np.square(np.bincount(unit, weights=influence)).sum())
        quantile = stats.t.isf((1 - level) / 2, count - 1)

    if area in (0.0, 1.0):
        low, high = _score_limits(area, trials, quantile)
        return Interval(area, low, high)
    centre, half = math.log(area / (1 - area)), quantile * math.sqrt(variance) / (area * (1 - area))
    return Interval(area, expit(centre - half), expit(centre + half))


@dataclass(frozen=True, slots=True)
class McNemar:
    """`only_a` samples only model a has right, `only_b` only model b; two-sided exact `p_value`."""

    only_a: int
    only_b: int
    p_value: float


def mcnemar(correct_a: ArrayLike, correct_b: ArrayLike) -> McNemar:
    """Exact McNemar test (1947) of two classifiers on the same (n,) samples, which must be independent."""
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    same_length(a, b)
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    tail = stats.binom.cdf(min(only_a, only_b), only_a + only_b, 0.5)
    return McNemar(only_a, only_b, min(1.0, 2 * float(tail)))


def t_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Mean over runs (seeds) with Student's t interval; without limits for one run.

    Nor has it limits where all runs say the same: they tell nothing of the spread of others, and an interval of no
    width would say that there is none.
    """
    x = np.asarray(values, dtype=np.float64)
    if len(x) == 0:
        return Interval(math.nan, reason="no runs")
    if len(x) == 1:
        return Interval(float(x[0]), reason="one run only")
    mean = float(x.mean())
    if np.ptp(x) <= _ROUNDING * max(1.0, float(np.abs(x).max())):
        return Interval(mean, reason="the same in every run")
    half = float(stats.t.isf((1 - level) / 2, len(x) - 1)) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return Interval(mean, mean - half, mean + half)


def _score_limits(p: float, n: float, z: float) -> tuple[float, float]:
    centre, scale = p + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At 0 and 1 the limit is the value itself; rounding must not leave it a hair inside.
    low = 0.0 if p == 0 else (centre - half) / scale
    return float(low), float(1.0 if p == 1 else (centre + half) / scale)


def unit_index(names: ArrayLike, size: int) -> NDArray[np.int64]:
    """(n,) numbers 0..G-1 of the named groups."""
    array = np.asarray(names)
    if array.shape != (size,):
        raise ValueError(f"expected one group or stratum for each of {size} samples, not shape {array.shape}")
    return np.unique(array, return_inverse=True)[1].astype(np.int64)


def same_length(*arrays: NDArray[np.generic]) -> None:
    """Raise ValueError unless all arrays have the same number of rows."""
    lengths = {len(array) for array in arrays}
    if len(lengths) != 1:
        raise ValueError(f"arrays differ in length: {sorted(lengths)}")


def expit(x: float) -> float:
    """1 / (1 + exp(-x)), without overflow."""
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0
