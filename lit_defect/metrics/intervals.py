"""How sure a figure is: confidence intervals and paired tests for metrics on one test set.

Proportions (accuracy, recall, escape rate) take Wilson's interval, the binary AUROC takes DeLong's, and
everything else the bootstrap. Photographs of the same physical part are not independent: with `groups`
each method counts parts, not pictures, and the intervals become as wide as they honestly are.

A figure that cannot be had (one class only, no samples) is nan and says why; nothing here raises for it.

    >>> wilson(45, 50)
    Interval(value=0.9, low=0.786..., high=0.956..., k=45, n=50, reason='')
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]
Statistic = Callable[..., Floats]
"""`statistic(weights (R, n), *arrays) -> (R,)`: R resamples at once, weights count the draws."""

_BLOCK = 4_000_000  # entries of one block of resampling weights: 32 MB


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
        hits: (n,) booleans. groups: (n,) names or numbers of the group of each sample.
    """
    hit = np.asarray(hits, dtype=np.float64)
    unit = _unit_index(groups, len(hit))
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
        labels: (n,) 1 for positive, 0 for negative. scores: (n,) higher means more positive.
        groups: (n,) group of each sample, or None when all are independent.
    """
    truth, score = np.asarray(labels).astype(bool), np.asarray(scores, dtype=np.float64)
    _same_length(truth, score)
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
        unit = _unit_index(groups, len(score))
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
    return Interval(area, _expit(centre - half), _expit(centre + half))


def bootstrap(
    statistic: Statistic,
    arrays: Sequence[NDArray[np.generic]],
    *,
    groups: ArrayLike | None = None,
    strata: ArrayLike | None = None,
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap of one statistic; see `bootstrap_all`."""
    options = {"groups": groups, "strata": strata, "n": n, "seed": seed, "level": level}
    return bootstrap_all({"": statistic}, arrays, **options)[""]  # type: ignore[arg-type]


def bootstrap_all(
    statistics: Mapping[str, Statistic],
    arrays: Sequence[NDArray[np.generic]],
    *,
    groups: ArrayLike | None = None,
    strata: ArrayLike | None = None,
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Percentile bootstrap (Efron 1979) of several statistics over the same `n` resamples.

    A resample is a row of counts, so a statistic is a weighted one and handles all rows at once: the mean of
    x is `lambda weights, x: weights @ x / weights.sum(1)`. One row of ones gives the value itself.

    Args:
        statistics: by name, `statistic(weights (R, N), *arrays) -> (R,)`, nan where undefined.
        arrays: each with N rows.
        groups: (N,) whole groups are drawn instead of samples.
        strata: (N,) each stratum keeps its number of units; a group lies in one stratum.

    Resamples in which a statistic is undefined are left out; when more than half are, there are no limits.
    """
    size = len(arrays[0])
    _same_length(*arrays)
    if size == 0:
        return {name: Interval(math.nan, reason="no samples") for name in statistics}
    drawn: dict[str, list[Floats]] = {name: [] for name in statistics}
    for weights in resamples(size, groups=groups, strata=strata, n=n, seed=seed):
        for name, statistic in statistics.items():
            drawn[name].append(statistic(weights, *arrays))
    ones = np.ones((1, size))
    value = {name: float(statistic(ones, *arrays)[0]) for name, statistic in statistics.items()}
    return {name: _percentiles(value[name], drawn[name], level) for name in statistics}


def paired_bootstrap(
    statistic: Statistic,
    arrays_a: Sequence[NDArray[np.generic]],
    arrays_b: Sequence[NDArray[np.generic]],
    *,
    groups: ArrayLike | None = None,
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Interval of statistic(b) - statistic(a) for two models on the same samples.

    Both are computed on the same resamples, so what the samples have in common cancels. The models differ
    at this level when the interval leaves out 0.
    """
    split = len(arrays_a)

    def difference(weights: Floats, *arrays: NDArray[np.generic]) -> Floats:
        return statistic(weights, *arrays[split:]) - statistic(weights, *arrays[:split])

    return bootstrap(difference, [*arrays_a, *arrays_b], groups=groups, n=n, seed=seed, level=level)


def resamples(
    size: int,
    *,
    groups: ArrayLike | None = None,
    strata: ArrayLike | None = None,
    n: int = 2000,
    seed: int = 0,
) -> Iterator[Floats]:
    """Blocks of bootstrap weights (R, size): how often each sample is in each of the `n` resamples."""
    unit = np.arange(size) if groups is None else _unit_index(groups, size)
    count = int(unit.max()) + 1
    stratum = np.zeros(count, dtype=np.int64)
    if strata is not None:
        sample_stratum = _unit_index(strata, size)
        stratum[unit] = sample_stratum
        if (stratum[unit] != sample_stratum).any():
            raise ValueError("a group lies in several strata; draw without strata")
    members = [np.flatnonzero(stratum == s) for s in range(int(stratum.max()) + 1)]

    rng = np.random.default_rng(seed)
    rows = max(1, _BLOCK // size)
    for start in range(0, n, rows):
        block = min(rows, n - start)
        counts = np.zeros((block, count))
        for member in members:
            picked = rng.integers(len(member), size=(block, len(member)))
            picked += np.arange(block)[:, None] * len(member)
            tally = np.bincount(picked.ravel(), minlength=block * len(member))
            counts[:, member] = tally.reshape(block, len(member))
        yield counts if groups is None else counts[:, unit]


@dataclass(frozen=True, slots=True)
class McNemar:
    """`only_a` samples only model a has right, `only_b` only model b; two-sided exact `p_value`."""

    only_a: int
    only_b: int
    p_value: float


def mcnemar(correct_a: ArrayLike, correct_b: ArrayLike) -> McNemar:
    """Exact McNemar test (1947) of two classifiers on the same (n,) samples, which must be independent."""
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    _same_length(a, b)
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    tail = stats.binom.cdf(min(only_a, only_b), only_a + only_b, 0.5)
    return McNemar(only_a, only_b, min(1.0, 2 * float(tail)))


def t_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Mean over runs (seeds) with Student's t interval; `n` is the number of runs."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) == 0:
        return Interval(math.nan, reason="no runs")
    if len(x) == 1:
        return Interval(float(x[0]), reason="one run only")
    mean = float(x.mean())
    half = float(stats.t.isf((1 - level) / 2, len(x) - 1)) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return Interval(mean, mean - half, mean + half)


def _score_limits(p: float, n: float, z: float) -> tuple[float, float]:
    centre, scale = p + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At 0 and 1 the limit is the value itself; rounding must not leave it a hair inside.
    low = 0.0 if p == 0 else (centre - half) / scale
    return float(low), float(1.0 if p == 1 else (centre + half) / scale)


def _percentiles(value: float, blocks: list[Floats], level: float) -> Interval:
    if not math.isfinite(value):
        return Interval(math.nan, reason="not defined on these samples")
    if not blocks:
        return Interval(value, reason="not resampled")
    drawn = np.concatenate(blocks)
    defined = drawn[np.isfinite(drawn)]
    if 2 * len(defined) <= len(drawn):
        return Interval(value, reason="not defined on most resamples")
    if np.ptp(defined) == 0:
        return Interval(value, reason="the same on every resample")
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def _unit_index(names: ArrayLike, size: int) -> NDArray[np.int64]:
    """(n,) numbers 0..G-1 of the named groups."""
    array = np.asarray(names)
    if array.shape != (size,):
        raise ValueError(f"expected one group or stratum for each of {size} samples, not shape {array.shape}")
    return np.unique(array, return_inverse=True)[1].astype(np.int64)


def _same_length(*arrays: NDArray[np.generic]) -> None:
    lengths = {len(array) for array in arrays}
    if len(lengths) != 1:
        raise ValueError(f"arrays differ in length: {sorted(lengths)}")


def _expit(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0
