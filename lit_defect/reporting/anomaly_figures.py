"""Figures of anomaly detection: scores on any scale, AUROC by kind of defect, what the SSIM gate discards.

Each function returns a matplotlib Figure whose title says what is seen. The ROC is `figures.roc_figure`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter
from numpy.typing import ArrayLike, NDArray

from lit_defect.metrics.intervals import wilson
from lit_defect.reporting.figures import Floats, score_histograms
from lit_defect.reporting.style import DEFECTIVE, GOOD, INK, MUTED, new_figure, set_title, short_names, styled

_BINS = 40
_HEAVY_TAIL = 20  # largest score over the median from which on a linear axis would hide the bulk
_AREA_BINS = 8
_DOTS = 3000  # of the candidates, in the scatter plot


def score_histogram_figure(scores: ArrayLike, is_defect: ArrayLike, threshold: float | None, label: str) -> Figure:
    """Histograms of an anomaly score, which has no fixed scale, of good and of defective pictures.

    The axis is logarithmic where the scores are positive and the largest is far from the bulk.

    Args:
        scores: (n,) higher means stranger.
        is_defect: (n,) the truth.
        threshold: pictures that reach it are rejected; None for none.
        label: of the score, such as `Mahalanobis distance`.

    Raises:
        ValueError: shapes do not fit, no scores, or scores that are not finite.
    """
    score = np.asarray(scores, dtype=np.float64)
    if score.ndim != 1 or score.shape != np.shape(is_defect) or not len(score):
        raise ValueError(f"expected scores and truth of shape (n,), not {score.shape} and {np.shape(is_defect)}")
    if not np.isfinite(score).all():
        raise ValueError("the scores are not all finite")
    marks = [threshold] if threshold is not None and math.isfinite(threshold) else []
    low, high = min(score.min(), *marks, math.inf), max(score.max(), *marks, -math.inf)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    logarithmic = low > 0 and high > _HEAVY_TAIL * np.median(score)
    edges = (np.geomspace if logarithmic else np.linspace)(low, high, _BINS + 1)
    edges[[0, -1]] = low, high  # rounding must not leave out the outermost
    figure = score_histograms(score, is_defect, threshold, label=label, edges=edges)
    if logarithmic:
        axes = figure.axes[0]
        axes.set(xscale="log", xlim=(low / 1.05, high * 1.05))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")  # the default one writes formulas, which this style does not set
        axes.xaxis.set_minor_formatter(NullFormatter())
    return figure


@styled
def auroc_by_type_figure(
    by_type: Mapping[str, Mapping[str, Any]],
    overall: Mapping[str, Any] | None = None,
    counts: Mapping[str, int] | None = None,
) -> Figure:
    """AUROC of each kind of defect against all good pictures, with its interval, the lowest on top.

    Args:
        by_type: {kind: {value, low, high, reason}}, None where undefined.
        overall: of all defects, drawn as a line.
        counts: pictures of each kind.
    """
    rows = sorted(by_type.items(), key=lambda row: math.inf if row[1]["value"] is None else row[1]["value"])
    labels = short_names([name for name, _ in rows], 24)
    if counts:
        labels = [f"{label}  ({counts[name]})" for label, (name, _) in zip(labels, rows, strict=True)]
    figure, axes = new_figure(6.2, 1.3 + 0.32 * max(1, len(rows)))
    lowest = 1.0
    for place, (_, entry) in enumerate(rows):
        beside: dict[str, Any] = {"xytext": (8, 0), "textcoords": "offset points", "va": "center", "fontsize": 8.5}
        side = ("axes fraction", "data")
        if entry["value"] is None:
            axes.annotate(f"undefined: {entry.get('reason', '')}", (0, place), xycoords=side, color=MUTED, **beside)
            continue
        axes.plot(entry["value"], place, "o", color=DEFECTIVE, markersize=5)
        axes.annotate(f"{entry['value']:.3f}", (1, place), xycoords=side, color=INK, **beside)
        lowest = min(lowest, entry["value"])
        if entry["low"] is not None:
            axes.plot([entry["low"], entry["high"]], [place, place], color=DEFECTIVE, linewidth=1.4)
            lowest = min(lowest, entry["low"])
    dashed: dict[str, Any] = {"color": MUTED, "linewidth": 1.0}
    if lowest < 0.6:
        axes.axvline(0.5, linestyle=(0, (1, 2)), label="chance", **dashed)
    if overall and overall["value"] is not None:
        lowest = min(lowest, overall["value"])
        axes.axvline(overall["value"], linestyle=(0, (4, 2)), label=f"all defects {overall['value']:.3f}", **dashed)
    margin = 0.05 * (1 - lowest) + 0.005
    axes.set(xlabel="AUROC against all good pictures", xlim=(max(-0.01, lowest - margin), 1 + margin / 2))
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=2)
    set_title(figure, _hardest(rows))
    return figure


@styled
def discard_figure(areas: ArrayLike, ssim: ArrayLike, threshold: float, label: str = "SSIM") -> Figure:
    """How alike the candidates are to their sources, and the share that the gate discards, by edited area.

    Args:
        areas: (n,) or (M, K) share of the picture that each candidate edits, above 0.
        ssim: of the same shape; discarded are those that reach the threshold.
        threshold: of the gate.
        label: of the similarity, which may be that of the patch or that of the whole picture.

    Raises:
        ValueError: shapes differ, or no candidate has an area and a similarity.
    """
    area, alike = (np.asarray(values, dtype=np.float64).ravel() for values in (areas, ssim))
    if np.shape(areas) != np.shape(ssim):
        raise ValueError(f"expected one similarity for each area, not {np.shape(ssim)} for {np.shape(areas)}")
    known = np.isfinite(area) & np.isfinite(alike) & (area > 0)
    area, alike = area[known], alike[known]
    if not len(area):
        raise ValueError("no candidate has an area above 0 and a similarity")
    discarded = alike >= threshold
    edges = _area_edges(area)
    place = np.clip(np.searchsorted(edges, area, side="right") - 1, 0, len(edges) - 2)
    figure = Figure(figsize=(6.2, 5.2), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[3, 2], sharex=True)

    step = -(-len(area) // _DOTS)
    for members, name, colour in ((~discarded, "kept", GOOD), (discarded, "discarded", DEFECTIVE)):
        x, y = area[::step][members[::step]], alike[::step][members[::step]]
        dots: dict[str, Any] = {"markersize": 4, "alpha": 0.5, "markeredgewidth": 0, "color": colour}
        above.plot(x, y, ".", label=f"{name} ({members.sum()})", **dots)
    above.axhline(threshold, color=INK, linewidth=1.2, linestyle=(0, (4, 2)), label=f"threshold {threshold:.3g}")
    above.set(ylabel=label, xscale="log")
    above.legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=3, markerscale=2.5)

    _draw_rates(below, [discarded[place == i] for i in range(len(edges) - 1)], edges)
    below.set(xlabel="edited share of the picture (numbers: candidates)", ylabel="discarded", ylim=(0, 1.15))
    below.set_yticks([0, 0.25, 0.5, 0.75, 1])
    below.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    below.set_xticks(edges, [f"{100 * edge:.2g} %" for edge in edges])
    below.set_xticks([], minor=True)
    set_title(figure, _discard_summary(discarded, area))
    return figure


def _draw_rates(axes: Axes, bins: list[NDArray[np.bool_]], edges: Floats) -> None:
    """The share of each bin with its interval, and how many the bin holds."""
    for (left, right), hits in zip(pairwise(edges), bins, strict=True):
        if not len(hits):
            continue
        rate = wilson(int(hits.sum()), len(hits))
        middle = math.sqrt(left * right)
        axes.bar(left, rate.value, right - left, align="edge", color=DEFECTIVE, alpha=0.3, edgecolor="white")
        axes.plot([middle, middle], [rate.low, rate.high], color=DEFECTIVE, linewidth=1.2)
        axes.plot(middle, rate.value, "o", color=DEFECTIVE, markersize=4)
        axes.annotate(f"{len(hits)}", (middle, 1.04), ha="center", color=MUTED, fontsize=8)


def _area_edges(area: Floats) -> Floats:
    """Bins of equal width on the logarithmic axis."""
    low, high = float(area.min()), float(area.max())
    if high < 1.05 * low:  # patches of one size: one bin
        return np.array([low / 1.1, high * 1.1])
    edges = np.geomspace(low, high, _AREA_BINS + 1)
    edges[[0, -1]] = low, high
    return edges


def _hardest(rows: list[tuple[str, Mapping[str, Any]]]) -> str:
    defined = [(name, entry["value"]) for name, entry in rows if entry["value"] is not None]
    if not defined:
        return "AUROC by kind of defect"
    (worst, low), (best, high) = defined[0], defined[-1]
    ends = f"Hardest to find: {worst}, AUROC {low:.3f}"
    return ends if len(defined) == 1 else f"{ends}; easiest: {best}, {high:.3f}"


def _discard_summary(discarded: NDArray[np.bool_], area: Floats) -> str:
    title = f"{100 * discarded.mean():.0f} % of {len(discarded)} candidates are too alike to their source"
    smaller = area < np.median(area)
    if not smaller.any():  # one size only
        return title
    halves = (100 * discarded[half].mean() for half in (smaller, ~smaller))
    return f"{title}:\n" + "{:.0f} % of the smaller half, {:.0f} % of the larger half".format(*halves)
