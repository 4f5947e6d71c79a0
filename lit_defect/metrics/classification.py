"""Every figure of a classifier on one data set, with 95 % intervals, as one JSON-ready dictionary.

Terms of the factory: a part is rejected when its defect score, 1 - P(normal), reaches the threshold.

    escape rate     share of the defective parts that pass
    overkill rate   share of the good parts that are rejected

The threshold is chosen on validation data for a required recall (`threshold_for_recall`) and then applied to
the test data (`evaluate`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lit_defect.errors import UserError
from lit_defect.metrics import weighted
from lit_defect.metrics.bootstrap import (
    Limits,
    Statistic,
    basic_limits,
    bootstrap_all,
    logit_limits,
    percentile_limits,
)
from lit_defect.metrics.calibration import weighted_ece
from lit_defect.metrics.intervals import Interval, auroc_delong, mean_of_independent, wilson, wilson_clustered

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

LEVEL = 0.95
FIGURES = (
    "accuracy",
    "balanced_accuracy",
    "auroc",
    "average_precision",
    "f1",
    "defect_auroc",
    "defect_average_precision",
    "escape_rate",
    "overkill_rate",
    "ece",
    "brier",
    "nll",
)


def evaluate(
    probs: ArrayLike,
    labels: ArrayLike,
    class_names: Sequence[str],
    *,
    normal_class: int | None = None,
    threshold: float | None = None,
    groups: ArrayLike | None = None,
    seed: int = 0,
    resamples: int = 2000,
) -> dict[str, Any]:
    """All figures of a classifier; the predicted class is the most probable one.

    Two classes: AUROC, average precision and F1 are those of the defective class (of class 1 when there is
    no normal class). More classes: the mean of each class against the rest, over the classes that occur.

    Args:
        probs: (n, C) softmax probabilities; float64 keeps the ranking of very confident scores.
        labels: (n,) class indices.
        class_names: C names.
        normal_class: index of the good class; without one there is no defect score.
        threshold: on the defect score, from validation; None or nan leaves the two rates undefined.
        groups: (n,) physical part behind each sample; the intervals then count parts.
        seed: of the bootstrap.
        resamples: of the bootstrap; 0 leaves out its intervals (quick, for validation).

    Returns:
        Plain: `n`, `n_groups`, `level`, `seed`, `class_names`, `normal_class`, `threshold`, `counts` (by
        class) and `confusion` (rows are the truth).
        Intervals: `accuracy`, `balanced_accuracy`, `auroc`, `average_precision`, `f1`, `escape_rate`,
        `overkill_rate`, `ece`, `brier`, `nll`; `recall` and `precision`, one by class name; with more than
        two classes and a normal one also `defect_auroc` and `defect_average_precision`, good against any
        defect. An interval is {value, low, high}, with k and n for proportions, and `reason` where something
        is None.

    Raises:
        ValueError: shapes do not fit, labels out of range, or rows that are no probabilities.
        UserError: nan among the probabilities (the training diverged).
    """
    p, y = _checked(probs, labels, class_names, normal_class)
    n, classes = p.shape
    predicted = _predict(p)
    group = None if groups is None else np.asarray(groups)
    confusion = np.bincount(y * classes + predicted, minlength=classes**2).reshape(classes, classes)
    everyone = np.ones(n, dtype=bool)

    recall = [_rate(predicted == c, y == c, group) for c in range(classes)]
    precision = [_rate(y == c, predicted == c, group) for c in range(classes)]
    figures = {
        "accuracy": _rate(predicted == y, everyone, group),
        "balanced_accuracy": mean_of_independent([r for r in recall if r.n]),
    }
    statistics: dict[str, tuple[Statistic, Limits]] = {
        "ece": (_ece, basic_limits),
        "brier": (_brier, percentile_limits),
        "nll": (_nll, percentile_limits),
    }
    if classes == 2:
        positive = 1 if normal_class is None else 1 - normal_class
        figures["auroc"] = auroc_delong(y == positive, p[:, positive], groups=group, level=LEVEL)
        figures["f1"] = _binary_f1(y == positive, predicted == positive, group)
        statistics["average_precision"] = (partial(_average_precision_of, positive=positive), logit_limits)
    else:
        statistics["f1"] = (_macro_f1, percentile_limits)
        for curve in ("auroc", "average_precision"):
            statistics[curve] = (partial(_one_against_rest, curve=curve), logit_limits)
    if normal_class is not None and classes > 2:
        score = defect_score(p, normal_class)
        figures["defect_auroc"] = auroc_delong(y != normal_class, score, groups=group, level=LEVEL)
        precision_of_defects = partial(_defect_average_precision, normal_class=normal_class)
        statistics["defect_average_precision"] = (precision_of_defects, logit_limits)
    figures |= _factory_rates(p, y, normal_class, threshold, group)
    figures |= bootstrap_all(statistics, [p, y], groups=group, n=resamples, seed=seed, level=LEVEL)

    return {
        "n": n,
        "n_groups": None if group is None else len(np.unique(group)),
        "level": LEVEL,
        "seed": seed,
        "class_names": list(class_names),
        "normal_class": normal_class,
        "threshold": None if threshold is None or math.isnan(threshold) else float(threshold),
        "counts": dict(zip(class_names, np.bincount(y, minlength=classes).tolist(), strict=True)),
        **{name: figures[name].as_dict() for name in FIGURES if name in figures},
        "recall": {name: r.as_dict() for name, r in zip(class_names, recall, strict=True)},
        "precision": {name: r.as_dict() for name, r in zip(class_names, precision, strict=True)},
        "confusion": confusion.tolist(),
    }


def defect_score(probs: ArrayLike, normal_class: int) -> Floats:
    """1 - P(normal) of (n, C) probabilities -> (n,), summed over the defect classes.

    The sum keeps apart the small scores that 1 - P(normal) would round to the same number.
    """
    return np.asarray(np.delete(np.asarray(probs, dtype=np.float64), normal_class, axis=1).sum(axis=1))


def threshold_for_recall(defect_scores: ArrayLike, is_defect: ArrayLike, required_recall: float) -> float:
    """The largest threshold t at which, on these data, at least `required_recall` of the defects reach t.

    A part is rejected when its score >= t, so t is the k-th largest score among the defects, with k the
    least number whose share k / (number of defects) suffices. Parts of equal score are rejected together:
    with ties the recall may lie above what is required, never below.

    Args:
        defect_scores: (n,) higher means more defective, as `defect_score` gives.
        is_defect: (n,) booleans.
        required_recall: in (0, 1].

    Returns:
        The threshold; nan when there is no defect to choose it by.
    """
    if not 0 < required_recall <= 1:
        raise UserError(f"required_recall = {required_recall}: expected a share above 0 and at most 1")
    scores, defect = np.asarray(defect_scores, dtype=np.float64), np.asarray(is_defect, dtype=bool)
    if scores.shape != defect.shape or scores.ndim != 1:
        raise ValueError(f"expected scores and truth of shape (n,), not {scores.shape} and {defect.shape}")
    if np.isnan(scores).any():
        raise UserError("the defect scores contain nan: the training diverged")
    found = np.sort(scores[defect])[::-1]
    if not len(found):
        return math.nan
    shares = np.arange(1, len(found) + 1) / len(found)
    return float(found[np.searchsorted(shares, required_recall)])


def _checked(
    probs: ArrayLike, labels: ArrayLike, class_names: Sequence[str], normal_class: int | None
) -> tuple[Floats, Ints]:
    p, y = np.asarray(probs, dtype=np.float64), np.asarray(labels)
    classes = len(class_names)
    if p.ndim != 2 or p.shape[1] != classes or y.shape != p.shape[:1]:
        raise ValueError(f"expected (n, {classes}) probabilities and (n,) labels, not {p.shape} and {y.shape}")
    if classes < 2 or len(set(class_names)) != classes:
        raise ValueError(f"class names must be two or more, and distinct, not {list(class_names)}")
    if normal_class is not None and not 0 <= normal_class < classes:
        raise ValueError(f"normal_class {normal_class} is no index of {classes} classes")
    if len(y) and not (np.issubdtype(y.dtype, np.integer) and y.min() >= 0 and y.max() < classes):
        raise ValueError(f"labels must be integers from 0 to {classes - 1}")
    if np.isnan(p).any():
        raise UserError("the probabilities contain nan: the training diverged; lower the learning rate")
    if (p < 0).any() or (np.abs(p.sum(axis=1) - 1) > 0.02).any():
        raise ValueError("each row must hold probabilities that add up to 1 (softmax the logits first)")
    return p, y.astype(np.int64)


def _rate(hits: Bools, members: Bools, groups: NDArray[Any] | None) -> Interval:
    """Share of `hits` among the `members`."""
    if groups is None:
        return wilson(int((hits & members).sum()), int(members.sum()), LEVEL)
    return wilson_clustered(hits[members], groups[members], LEVEL)


def _binary_f1(truth: Bools, claimed: Bools, groups: NDArray[Any] | None) -> Interval:
    """F1 = 2 J / (1 + J), where J = TP / (TP + FP + FN) is a proportion and has its interval as such."""
    jaccard = _rate(truth & claimed, truth | claimed, groups)
    value, low, high = (2 * j / (1 + j) for j in (jaccard.value, jaccard.low, jaccard.high))
    reason = "neither truth nor prediction has positives" if not jaccard.n else jaccard.reason
    return Interval(value, low, high, reason=reason)


def _factory_rates(
    p: Floats, y: Ints, normal_class: int | None, threshold: float | None, groups: NDArray[Any] | None
) -> dict[str, Interval]:
    if normal_class is None or threshold is None or math.isnan(threshold):
        missing = Interval(math.nan, reason="no normal class" if normal_class is None else "no threshold")
        return {"escape_rate": missing, "overkill_rate": missing}
    rejected = defect_score(p, normal_class) >= threshold
    defective = y != normal_class
    return {
        "escape_rate": _rate(~rejected, defective, groups),
        "overkill_rate": _rate(rejected, ~defective, groups),
    }


def _predict(p: Floats) -> Ints:
    return np.asarray(p.argmax(axis=1), dtype=np.int64)


# The statistics of the bootstrap: weights w (R, n), probabilities p (n, C), labels y (n,) -> (R,).


def _ece(w: Floats, p: Floats, y: Ints) -> Floats:
    return weighted_ece(w, p.max(axis=1), _predict(p) == y)


def _brier(w: Floats, p: Floats, y: Ints) -> Floats:
    """Mean squared distance to the truth; halved for two classes, where it is the mean of (p_1 - y)^2."""
    squares = np.square(p - np.eye(p.shape[1])[y]).sum(axis=1)
    return weighted.mean(w, squares / 2 if p.shape[1] == 2 else squares)


def _nll(w: Floats, p: Floats, y: Ints) -> Floats:
    """Mean of -log P(truth), kept finite where float32 has rounded that probability to 0."""
    return weighted.mean(w, -np.log(np.clip(p[np.arange(len(y)), y], np.finfo(np.float32).tiny, 1)))


def _macro_f1(w: Floats, p: Floats, y: Ints) -> Floats:
    return weighted.macro_f1(w, y, _predict(p), p.shape[1])


def _average_precision_of(w: Floats, p: Floats, y: Ints, positive: int) -> Floats:
    return weighted.average_precision(w, y == positive, p[:, positive])


def _one_against_rest(w: Floats, p: Floats, y: Ints, curve: str) -> Floats:
    return weighted.one_against_rest(w, y, p, curve)


def _defect_average_precision(w: Floats, p: Floats, y: Ints, normal_class: int) -> Floats:
    return weighted.average_precision(w, y != normal_class, defect_score(p, normal_class))
