"""Bootstrap intervals of any metric, over samples or over whole groups of them (Efron 1979).

A resample is written as weights: how often each sample was drawn. A metric that takes weights (weighted.py)
handles a block of resamples in a few matrix operations, so 2000 of them take a fraction of a second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from lit_defect.metrics.intervals import Interval, expit, same_length, unit_index

Floats = NDArray[np.float64]
Statistic = Callable[..., Floats]
"""`statistic(weights (R, n), *arrays) -> (R,)`: R resamples at once, weights count the draws."""
Limits = Callable[[float, Floats, float], tuple[float, float]]
"""`limits(value, drawn (R,), level) -> (low, high)`."""

_BLOCK = 4_000_000  # entries of one block of resampling weights: 32 MB


def percentile_limits(value: float, drawn: Floats, level: float) -> tuple[float, float]:
    """Quantiles of the resampled statistic (Efron 1979)."""
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def logit_limits(value: float, drawn: Floats, level: float) -> tuple[float, float]:
    """Normal limits on the logit scale, with the bootstrap's standard error: for areas below a curve.

    Near 1 the percentiles of the average precision lie too low; these limits keep their coverage.
    """
    if not 0 < value < 1:
        return percentile_limits(value, drawn, level)
    half = float(stats.norm.isf((1 - level) / 2)) * float(drawn.std(ddof=1)) / (value * (1 - value))
    centre = math.log(value / (1 - value))
    return expit(centre - half), expit(centre + half)


def basic_limits(value: float, drawn: Floats, level: float) -> tuple[float, float]:
    """Percentiles reflected about the value, for statistics >= 0 that noise pushes up, such as the ECE.

    The resampled ECE is larger than the ECE by about what that exceeds the truth, so that the percentiles may
    leave out even the value itself. Cut at 0 and widened to hold the value.
    """
    low, high = percentile_limits(value, drawn, level)
    return min(value, max(0.0, 2 * value - high)), max(value, 2 * value - low)


def bootstrap_all(
    statistics: Mapping[str, tuple[Statistic, Limits]],
    arrays: Sequence[NDArray[np.generic]],
    *,
    groups: ArrayLike | None = None,
    strata: ArrayLike | None = None,
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Bootstrap intervals of several statistics over the same `n` resamples.

    A resample is a row of counts, so a statistic is a weighted one and handles all rows at once: the mean of
    x is `lambda weights, x: weights @ x / weights.sum(1)`. One row of ones gives the value itself.

    Args:
        statistics: by name, `statistic(weights (R, N), *arrays) -> (R,)`, nan where undefined, and how to
            draw its limits.
        arrays: each with N rows.
        groups: (N,) whole groups are drawn instead of samples.
        strata: (N,) each stratum keeps its number of units; a group lies in one stratum.
        n: number of resamples.
        seed: of the draws.
        level: confidence level.

    Resamples in which a statistic is undefined are left out; when more than half are, there are no limits.
    """
    size = len(arrays[0])
    same_length(*arrays)
    if size == 0:
        return {name: Interval(math.nan, reason="no samples") for name in statistics}
    drawn: dict[str, list[Floats]] = {name: [] for name in statistics}
    for weights in resamples(size, groups=groups, strata=strata, n=n, seed=seed):
        for name, (statistic, _) in statistics.items():
            drawn[name].append(statistic(weights, *arrays))
    ones = np.ones((1, size))
    return {
        name: _resampled(float(statistic(ones, *arrays)[0]), drawn[name], limits, level)
        for name, (statistic, limits) in statistics.items()
    }


def bootstrap(
    statistic: Statistic,
    arrays: Sequence[NDArray[np.generic]],
    *,
    limits: Limits = percentile_limits,
    groups: ArrayLike | None = None,
    strata: ArrayLike | None = None,
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Bootstrap interval of one statistic; see `bootstrap_all`."""
    return bootstrap_all({"": (statistic, limits)}, arrays, groups=groups, strata=strata, n=n, seed=seed, level=level)[
        ""
    ]


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
    unit = np.arange(size) if groups is None else unit_index(groups, size)
    count = int(unit.max()) + 1
    stratum = np.zeros(count, dtype=np.int64)
    if strata is not None:
        sample_stratum = unit_index(strata, size)
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


def _resampled(value: float, blocks: list[Floats], limits: Limits, level: float) -> Interval:
    if not math.isfinite(value):
        return Interval(math.nan, reason="not defined on these samples")
    if not blocks:
        return Interval(value, reason="not resampled")
    drawn = np.concatenate(blocks)
    defined = drawn[np.isfinite(drawn)]
    if 2 * len(defined) <= len(drawn):
        return Interval(value, reason="not defined on most resamples")
    if np.ptp(defined) < 1e-12:
        return Interval(value, reason="the same on every resample")
    return Interval(value, *limits(value, defined, level))
