"""Every figure of anomaly scores on one test set, with 95 % intervals, as one JSON-ready dictionary.

A score is a number of any range, higher meaning more defective; a part is rejected when its score reaches the
threshold. Without defects to learn from, the threshold comes from good parts: `threshold_for_overkill` on validation
data sets it by how many good parts may be rejected, and `evaluate_scores` then says how many defects pass.

    escape rate     share of the defective parts that pass
    overkill rate   share of the good parts that are rejected
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lit_defect.errors import UserError
from lit_defect.metrics import weighted
from lit_defect.metrics.bootstrap import bootstrap, logit_limits
from lit_defect.metrics.intervals import Interval, auroc_delong, wilson, wilson_clustered

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

LEVEL = 0.95


def evaluate_scores(
    scores: ArrayLike,
    is_defect: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    defect_types: ArrayLike | None = None,
    threshold: float | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """All figures of one anomaly score.

    Args:
        scores: (n,) higher means more defective.
        is_defect: (n,) booleans.
        groups: (n,) physical part behind each sample; the intervals then count parts.
        defect_types: (n,) name of each sample's kind of defect; what stands at good samples is not looked at.
        threshold: from validation; None or nan leaves the two rates undefined.
        resamples: of the bootstrap; 0 leaves out its interval (quick, for validation).
        seed: of the bootstrap.

    Returns:
        Plain: `n`, `n_groups`, `level`, `seed`, `counts` {good, defective}, `threshold`.
        Intervals: `auroc` (DeLong), `average_precision` (bootstrap), `escape_rate`, `overkill_rate` (Wilson), and
        `auroc_by_type`, for each kind of defect against all good samples, by name ({} without types). An interval
        is {value, low, high}, with k and n for proportions, and `reason` where something is None.
        `f1_max`: {value, score}: the best F1 of all thresholds and the score where it is reached, the highest if
        there are several. It has chosen its threshold on these very samples, so it gets no interval.

    Raises:
        ValueError: shapes do not fit.
        UserError: nan among the scores.
    """
    score, defect = _checked(scores, is_defect)
    group = None if groups is None else np.asarray(groups)
    limit = math.nan if threshold is None else float(threshold)
    precision = bootstrap(
        weighted.average_precision,
        [defect, score],
        limits=logit_limits,
        groups=group,
        n=resamples,
        seed=seed,
        level=LEVEL,
    )
    return {
        "n": len(score),
        "n_groups": None if group is None else len(np.unique(group)),
        "level": LEVEL,
        "seed": seed,
        "counts": {"good": int((~defect).sum()), "defective": int(defect.sum())},
        "threshold": limit if math.isfinite(limit) else None,
        "auroc": auroc_delong(defect, score, groups=group, level=LEVEL).as_dict(),
        "average_precision": precision.as_dict(),
        "f1_max": _f1_max(score, defect),
        "escape_rate": _rate(score < limit, defect, group, limit).as_dict(),
        "overkill_rate": _rate(score >= limit, ~defect, group, limit).as_dict(),
        "auroc_by_type": _auroc_by_type(score, defect, group, defect_types),
    }


def threshold_for_overkill(normal_scores: ArrayLike, allowed: float) -> float:
    """The smallest threshold t at which, on these data, at most the share `allowed` of the good parts is rejected.

    A part is rejected when its score >= t, so t lies just above the (m + 1)-th largest score, with m the largest
    number whose share m / n is allowed: it is the next float32 above that score's own, so that comparing in single
    or in double precision decides the same. Good parts of equal score are rejected together or not at all: with
    ties the overkill rate may lie below what is allowed, never above.

    Args:
        normal_scores: (n,) scores of good samples.
        allowed: in [0, 1).

    Returns:
        The threshold; nan when there is no good sample to choose it by.

    Raises:
        UserError: `allowed` out of range, or scores that are not finite.
    """
    if not 0 <= allowed < 1:
        raise UserError(f"allowed overkill = {allowed}: expected a share of at least 0 and below 1")
    scores = np.sort(np.asarray(normal_scores, dtype=np.float64))[::-1]
    if scores.ndim != 1:
        raise ValueError(f"expected scores of shape (n,), not {scores.shape}")
    if not np.isfinite(scores).all():
        raise UserError("the anomaly scores of good samples contain nan or infinity: the training diverged")
    if not len(scores):
        return math.nan
    shares = np.arange(len(scores)) / len(scores)
    passing = scores[np.searchsorted(shares, allowed, side="right") - 1]  # the largest score that must pass
    return float(np.nextafter(np.float32(passing), np.float32(np.inf)))


def _checked(scores: ArrayLike, is_defect: ArrayLike) -> tuple[Floats, Bools]:
    score, defect = np.asarray(scores, dtype=np.float64), np.asarray(is_defect).astype(bool)
    if score.ndim != 1 or score.shape != defect.shape:
        raise ValueError(f"expected scores and truth of shape (n,), not {score.shape} and {defect.shape}")
    if np.isnan(score).any():
        raise UserError("the anomaly scores contain nan: the training diverged; lower the learning rate")
    return score, defect


def _rate(hits: Bools, members: Bools, groups: NDArray[Any] | None, threshold: float) -> Interval:
    """Share of `hits`, which the threshold decided, among the `members`."""
    if math.isnan(threshold):
        return Interval(math.nan, reason="no threshold")
    if groups is None:
        return wilson(int((hits & members).sum()), int(members.sum()), LEVEL)
    return wilson_clustered(hits[members], groups[members], LEVEL)


def _f1_max(score: Floats, defect: Bools) -> dict[str, Any]:
    """Largest 2 TP / (TP + FP + defects) over the thresholds at the scores that occur."""
    if not defect.any() or defect.all():
        return {"value": None, "score": None, "reason": "one class only" if len(score) else "no samples"}
    order = np.argsort(-score, kind="stable")
    ranked, found = score[order], np.cumsum(defect[order])
    f1 = 2 * found / (np.arange(1, len(score) + 1) + defect.sum())
    last = np.append(ranked[1:] != ranked[:-1], True)  # equal scores are rejected together
    best = int(np.argmax(np.where(last, f1, -1)))
    return {"value": float(f1[best]), "score": float(ranked[best]) if np.isfinite(ranked[best]) else None}


def _auroc_by_type(
    score: Floats, defect: Bools, groups: NDArray[Any] | None, defect_types: ArrayLike | None
) -> dict[str, Any]:
    if defect_types is None:
        return {}
    kind = np.asarray(defect_types).astype(str)
    if kind.shape != score.shape:
        raise ValueError(f"expected one defect type for each of {len(score)} samples, not shape {kind.shape}")
    figures = {}
    for name in np.unique(kind[defect]):
        chosen = ~defect | (kind == name)
        among = None if groups is None else groups[chosen]
        figures[str(name)] = auroc_delong(defect[chosen], score[chosen], groups=among, level=LEVEL).as_dict()
    return figures
