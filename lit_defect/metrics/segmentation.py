"""Every figure of a segmentation on one test set, with 95 % intervals, and of one method against another.

The headline is the IoU of each image, averaged over the images (Ando). An image's IoU is the mean over the foreground
classes that its truth has, so that all methods are averaged over the same images and pairs are complete; where the
truth has none it is not defined, and false alarms on such images are counted on their own. The foreground is class 1
where there are two classes (an animal, a defect, against background), and all classes otherwise.

Beside it stands the pooled IoU of PASCAL VOC: TP / (TP + FP + FN) of the pixels of all images together, averaged over
the classes, background included.

Intervals come from the bootstrap over images; with `groups` (pictures of one part, neighbouring slices) whole groups
are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from lit_defect.metrics.bootstrap import Limits, Statistic, bootstrap_all, percentile_limits
from lit_defect.metrics.intervals import Interval, unit_index, wilson, wilson_clustered
from lit_defect.metrics.masks import VOID, MaskCounts, confusion_of, count_masks

__all__ = [
    "VOID",
    "MaskCounts",
    "class_iou",
    "compare_masks",
    "confusion_of",
    "count_masks",
    "evaluate_masks",
    "foreground_of",
    "image_iou",
]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

LEVEL = 0.95
_EQUAL = 1e-12  # differences below are rounding


def foreground_of(class_names: Sequence[str]) -> list[int]:
    """Classes that figures are averaged over: class 1 alone where there are two, all otherwise."""
    if len(class_names) < 2:
        raise ValueError(f"expected at least two classes, the background first, not {list(class_names)}")
    return [1] if len(class_names) == 2 else list(range(len(class_names)))


def class_iou(confusion: Ints) -> Floats:
    """IoU of each class in each image, (N, C, C) -> (N, C); nan where the truth of the image lacks the class."""
    hits, true, claimed = _totals(confusion)
    return _ratio(hits, np.where(true > 0, true + claimed - hits, 0))


def image_iou(counts: MaskCounts, foreground: Sequence[int]) -> Floats:
    """IoU of each image (N,): mean over the foreground classes its truth has; nan where it has none."""
    return _mean_known(class_iou(counts.confusion)[:, list(foreground)])


def evaluate_masks(
    counts: MaskCounts,
    class_names: Sequence[str],
    *,
    types: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """All figures of one method.

    Args:
        counts: of N images with C classes.
        class_names: C names, the background first.
        types: (N,) name of each image's kind, for figures by kind.
        groups: (N,) part behind each image; the intervals then count parts.
        resamples: of the bootstrap; 0 leaves the intervals out.
        seed: of the bootstrap.

    Returns:
        Plain: `n`, `n_defined` (images whose IoU is defined), `n_groups`, `level`, `seed`.
        Intervals {value, low, high}, with `reason` where something is None:
        `iou`, `dice`, `boundary_iou`: of each image, averaged over the images where defined.
        `iou_by_class`, `iou_by_type`: the same by name, with `n` images behind each; by type only with `types`.
        `pooled_iou`: of all pixels together, mean over the classes that truth or prediction have anywhere, with
        `pooled_iou_by_class` {name: value, None where neither has it}.
        `hd95`: 95 % Hausdorff distance in pixels, mean over an image's foreground classes and over the `n` images
        that have one; `undefined` counts the foreground classes of images that the prediction misses altogether.
        `pixel_accuracy`: share of all pixels that are right.
        `false_alarms`: share (k of n) of the images without foreground in which any pixel is called foreground;
        only for two classes, and where there are such images.

    Raises:
        ValueError: lengths do not fit.
    """
    kind, group = _checked(counts, class_names, types, groups)
    foreground = foreground_of(class_names)
    hits, true, claimed = _totals(counts.confusion)
    by_class = class_iou(counts.confusion)
    iou = image_iou(counts, foreground)
    averaged = {
        "iou": iou,
        "dice": _mean_known(_ratio(2 * hits, np.where(true > 0, true + claimed, 0))[:, foreground]),
        "boundary_iou": _boundary_iou(counts, foreground),
        "hd95": _mean_known(counts.distance[:, foreground]),
    }
    parts = _parts(by_class, iou, class_names, foreground, kind)
    drawn = _bootstrap(
        {name: _mean_of(values) for name, values in (averaged | parts).items()}
        | {"pooled_iou": _pooled_of(hits, true, claimed), "pixel_accuracy": _share_of(hits.sum(1), true.sum(1))},
        len(counts),
        group,
        resamples,
        seed,
    )
    pooled = _ratio(hits.sum(0), (true + claimed - hits).sum(0))
    missed = int(((true > 0) & (claimed == 0))[:, foreground].sum())
    figures = {
        "n": len(counts),
        "n_defined": int(np.isfinite(iou).sum()),
        "n_groups": None if group is None else len(np.unique(group)),
        "level": LEVEL,
        "seed": seed,
        **{name: drawn[name].as_dict() for name in ("iou", "dice", "boundary_iou", "pooled_iou", "pixel_accuracy")},
        "pooled_iou_by_class": {name: _plain(value) for name, value in zip(class_names, pooled, strict=True)},
        "hd95": drawn["hd95"].as_dict() | {"n": int(np.isfinite(averaged["hd95"]).sum()), "undefined": missed},
        "iou_by_class": _part_figures("class", parts, drawn),
    }
    if kind is not None:
        figures["iou_by_type"] = _part_figures("type", parts, drawn)
    alarms = _false_alarms(true, claimed, group)
    return figures | ({} if alarms is None else {"false_alarms": alarms.as_dict()})


def compare_masks(
    before: MaskCounts,
    after: MaskCounts,
    class_names: Sequence[str],
    *,
    types: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """How much better `after` is than `before` on the same images; arguments as of `evaluate_masks`.

    Returns:
        Intervals of after - before, both on the same resamples: `iou`, `pooled_iou`, `boundary_iou`, `by_class` and
        `by_type` (IoU of an image, by name, with `n` images; by type only with `types`).
        `wilcoxon_p`: two-sided signed-rank test (Wilcoxon 1945) of the differences in image IoU, of their means over
        groups with `groups`; None where no image differs.
        `better`, `worse`, `equal`: numbers of images by their IoU. `n`, `n_defined`, `level` and `seed` as before.

    Raises:
        ValueError: lengths do not fit, or the truth of the two differs.
    """
    kind, group = _checked(before, class_names, types, groups)
    true = before.confusion.sum(axis=2)
    if not np.array_equal(true, after.confusion.sum(axis=2)):
        raise ValueError("the two methods were not counted on the same images with the same truth")
    foreground = foreground_of(class_names)
    gain = _gain(image_iou(before, foreground), image_iou(after, foreground))
    by_class = _gain(class_iou(before.confusion), class_iou(after.confusion))
    averaged = {
        "iou": gain,
        "boundary_iou": _gain(_boundary_iou(before, foreground), _boundary_iou(after, foreground)),
    }
    parts = _parts(by_class, gain, class_names, foreground, kind)
    pooled_before, pooled_after = (_pooled_of(*_totals(counts.confusion)) for counts in (before, after))
    drawn = _bootstrap(
        {name: _mean_of(values) for name, values in (averaged | parts).items()}
        | {"pooled_iou": lambda weights: pooled_after(weights) - pooled_before(weights)},
        len(before),
        group,
        resamples,
        seed,
    )
    figures = {
        "n": len(before),
        "n_defined": int(np.isfinite(gain).sum()),
        "level": LEVEL,
        "seed": seed,
        **{name: drawn[name].as_dict() for name in ("iou", "pooled_iou", "boundary_iou")},
        "wilcoxon_p": _wilcoxon(gain, group),
        "better": int((gain > 0).sum()),
        "worse": int((gain < 0).sum()),
        "equal": int((gain == 0).sum()),
        "by_class": _part_figures("class", parts, drawn),
    }
    return figures if kind is None else figures | {"by_type": _part_figures("type", parts, drawn)}


# One image


def _totals(confusion: Ints) -> tuple[Ints, Ints, Ints]:
    """Pixels (N, C) rightly called each class, truly of it, and called it."""
    return np.diagonal(confusion, axis1=1, axis2=2), confusion.sum(axis=2), confusion.sum(axis=1)


def _boundary_iou(counts: MaskCounts, foreground: list[int]) -> Floats:
    """Mean (N,) over the foreground classes that the truth of the image has."""
    true = counts.confusion.sum(axis=2) > 0
    by_class = _ratio(counts.boundary[..., 0], np.where(true, counts.boundary[..., 1], 0))
    return _mean_known(by_class[:, foreground])


def _gain(before: Floats, after: Floats) -> Floats:
    difference = after - before
    return np.where(np.abs(difference) < _EQUAL, 0.0, difference)


def _ratio(part: NDArray[Any], whole: NDArray[Any]) -> Floats:
    """Nan where the whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)


def _mean_known(values: Floats) -> Floats:
    """Mean of each row (n, C) -> (n,) over what is not nan; nan where all are."""
    return _ratio(np.nansum(values, axis=1), np.isfinite(values).sum(axis=1))


# All images

Weighted = Statistic
"""`statistic(weights (R, N)) -> (R,)`, the images being bound."""


def _mean_of(values: Floats) -> Weighted:
    """Mean over the images where the value is known."""
    known = np.isfinite(values)
    filled, counted = np.where(known, values, 0.0), known.astype(np.float64)
    return lambda weights: _ratio(weights @ filled, weights @ counted)


def _share_of(part: Ints, whole: Ints) -> Weighted:
    return lambda weights: _ratio(weights @ part.astype(np.float64), weights @ whole.astype(np.float64))


def _pooled_of(hits: Ints, true: Ints, claimed: Ints) -> Weighted:
    """Mean IoU, of the pixels of all images, over the classes that truth or prediction have there."""
    found, union = hits.astype(np.float64), (true + claimed - hits).astype(np.float64)
    return lambda weights: _mean_known(_ratio(weights @ found, weights @ union))


def _bootstrap(
    statistics: Mapping[str, Weighted], size: int, groups: NDArray[Any] | None, resamples: int, seed: int
) -> dict[str, Interval]:
    limited: dict[str, tuple[Statistic, Limits]] = {
        name: ((lambda weights, _images, statistic=statistic: statistic(weights)), percentile_limits)
        for name, statistic in statistics.items()
    }
    return bootstrap_all(limited, [np.arange(size)], groups=groups, n=resamples, seed=seed, level=LEVEL)


def _parts(
    by_class: Floats, of_image: Floats, class_names: Sequence[str], foreground: list[int], kind: NDArray[Any] | None
) -> dict[str, Floats]:
    """Values (N,) of each foreground class, `class/NAME`, and of each kind, `type/NAME`; nan elsewhere."""
    parts = {f"class/{class_names[number]}": by_class[:, number] for number in foreground}
    if kind is not None:
        for name in np.unique(kind[np.isfinite(of_image)]):
            parts[f"type/{name}"] = np.where(kind == name, of_image, np.nan)
    return parts


def _part_figures(prefix: str, parts: dict[str, Floats], drawn: dict[str, Interval]) -> dict[str, Any]:
    return {
        name.removeprefix(f"{prefix}/"): drawn[name].as_dict() | {"n": int(np.isfinite(values).sum())}
        for name, values in parts.items()
        if name.startswith(f"{prefix}/")
    }


def _false_alarms(true: Ints, claimed: Ints, groups: NDArray[Any] | None) -> Interval | None:
    """Images of background alone in which any pixel is called foreground; None where there are none."""
    free = (true[:, 0] > 0) & (true[:, 1] == 0)
    if true.shape[1] != 2 or not free.any():
        return None
    alarm = claimed[free, 1] > 0
    if groups is None:
        return wilson(int(alarm.sum()), len(alarm), LEVEL)
    return wilson_clustered(alarm, groups[free], LEVEL)


def _wilcoxon(gain: Floats, groups: NDArray[Any] | None) -> float | None:
    known = np.isfinite(gain)
    differences = gain[known]
    if groups is not None and len(differences):
        unit = unit_index(groups[known], len(differences))
        differences = np.bincount(unit, weights=differences) / np.bincount(unit)
        differences = np.where(np.abs(differences) < _EQUAL, 0.0, differences)
    if not differences.any():
        return None
    return float(stats.wilcoxon(differences).pvalue)


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _checked(
    counts: MaskCounts, class_names: Sequence[str], types: ArrayLike | None, groups: ArrayLike | None
) -> tuple[NDArray[Any] | None, NDArray[Any] | None]:
    if len(class_names) != counts.classes:
        raise ValueError(f"{len(class_names)} class names for counts of {counts.classes} classes")
    if len(set(class_names)) != len(class_names):
        raise ValueError(f"class names must differ, not {list(class_names)}")
    kind = None if types is None else np.asarray(types).astype(str)
    group = None if groups is None else np.asarray(groups)
    for name, values in (("type", kind), ("group", group)):
        if values is not None and values.shape != (len(counts),):
            raise ValueError(f"expected one {name} for each of {len(counts)} images, not shape {values.shape}")
    return kind, group
