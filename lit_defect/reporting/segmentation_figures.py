"""Figures of segmentation: what a refiner gains, IoU by class or type, whether uncertainty finds the errors, sweeps.

Each function returns a matplotlib Figure whose title says what is seen. Shares (IoU, error) are given in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import ArrayLike, NDArray

from lit_defect.metrics.intervals import t_interval
from lit_defect.reporting.style import (
    DEFECTIVE,
    GOOD,
    INK,
    MUTED,
    PALETTE,
    new_figure,
    set_title,
    short_names,
    shorten,
    styled,
)

Floats = NDArray[np.float64]

METHODS = {
    "stage1": "stage 1",
    "sampled": "sampled",
    "one_step": "one step",
    "refined": "refined",
    "segmenter": "segmenter",
}
"""Method in a result, and what it is called."""

_BINS = 10  # of stage-1 IoU
_FEW = 3  # images, or parts, in a bin below which its mean is not drawn
_TYPES = 8  # told apart by colour
_EQUAL = 1e-12  # differences below are rounding
_WIDE = 20  # largest value of an option over its smallest from which on the axis is logarithmic


@styled
def gain_figure(
    before: ArrayLike,
    after: ArrayLike,
    *,
    types: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    label: str = "the refiner",
) -> Figure:
    """What each image gained, over its IoU before: Ando's figure 6, with counts and means by tenths of the IoU.

    No image can gain more than 1 - IoU nor lose more than its IoU; both limits are drawn, for near them a slope is
    no merit of the method.

    Args:
        before: (N,) IoU of each image in stage 1; images where it is nan are left out.
        after: (N,) of the same images.
        types: (N,) class or kind of defect; at most eight are told apart by colour.
        groups: (N,) part behind each image; the mean of a tenth then counts each part once, and so does its interval.
        label: what the gain is due to.

    Raises:
        ValueError: shapes differ.
    """
    x, y = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or any(n is not None and len(n) != len(x) for n in (types, groups)):
        raise ValueError(f"expected two IoU of shape (N,), not {x.shape} and {y.shape}, and one type, group for each")
    known = np.isfinite(x) & np.isfinite(y)
    names = None if types is None else np.asarray(types, dtype=str)[known]
    parts = np.arange(len(x))[known] if groups is None else np.asarray(groups, dtype=str)[known]
    x, gain = x[known], (y - x)[known]
    figure, axes = new_figure(6.2, 4.6)
    _draw_limits(axes)
    _draw_dots(axes, x, gain, names)
    _draw_bins(axes, x, gain, parts)
    low, high = (float(gain.min()), float(gain.max())) if len(gain) else (-1.0, 1.0)
    axes.set(xlabel="IoU of stage 1", ylabel=f"gain by {label}, points of IoU", xlim=(-0.02, 1.02))
    axes.set_ylim(min(-0.05, 1.15 * low), max(0.05, 1.15 * high))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=""))
    figure.legend(loc="outside lower center", ncols=3)
    set_title(figure, _gain_summary(gain))
    return figure


@styled
def iou_by_class_figure(
    methods: Mapping[str, Mapping[str, Mapping[str, Any]]],
    *,
    overall: Mapping[str, Mapping[str, Any]] | None = None,
    label: str = "class",
    figure_name: str = "IoU per image",
) -> Figure:
    """Mean IoU of each class (or type) with its interval, the methods beside each other, the lowest class on top.

    Args:
        methods: {method: {class: {value, low, high, n}}}, None where undefined; the first method sets the order.
        overall: {method: {value, low, high, n}} over all classes, drawn as the last row.
        label: what the rows are, `class` or `type`.
        figure_name: what is shown.

    Raises:
        ValueError: no methods.
    """
    if not methods:
        raise ValueError("expected at least one method")
    first = next(iter(methods.values()))
    names = sorted({name for by_class in methods.values() for name in by_class}, key=lambda name: _value(first, name))
    rows: list[tuple[str, dict[str, Mapping[str, Any]]]] = [
        (name, {method: by_class[name] for method, by_class in methods.items() if name in by_class}) for name in names
    ]
    if overall:
        rows.append(("all", dict(overall)))
    step = 0.8 / max(2, len(methods))
    figure, axes = new_figure(6.6, 1.4 + max(0.34, 0.17 * len(methods)) * max(1, len(rows)))
    for place, (_, entries) in enumerate(rows):
        if place % 2:
            axes.axhspan(place - 0.5, place + 0.5, color="#F6F6F6", zorder=0)
        for i, method in enumerate(methods):
            if method in entries:
                offset = (i - (len(methods) - 1) / 2) * step
                _draw_entry(axes, entries[method], place + offset, PALETTE[i % len(PALETTE)])
    for i, method in enumerate(methods):
        axes.plot([], [], "o", color=PALETTE[i % len(PALETTE)], markersize=5, label=METHODS.get(method, method))
    short = short_names([name for name, _ in rows], 24)
    counts = [max((entry.get("n") or 0 for entry in entries.values()), default=0) for _, entries in rows]
    axes.set_yticks(range(len(rows)), [f"{s}  ({n})" if n else s for s, n in zip(short, counts, strict=True)])
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel=f"{figure_name}, mean over images with 95 % interval")
    axes.set_xlim(-0.01, 1.01)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=min(4, len(methods)))
    set_title(figure, _class_summary(methods, overall, label))
    return figure


@styled
def sparsification_figure(
    curve: ArrayLike, oracle: ArrayLike, random: ArrayLike | float, label: str, *, shares: ArrayLike | None = None
) -> Figure:
    """Error that remains when the most uncertain pixels are left out (Ilg et al., ECCV 2018).

    The area between the curve and that of the best order is the AUSE.

    Args:
        curve: (K,) mean error with a rising share of pixels left out, the most uncertain first.
        oracle: (K,) the same, the wrong pixels first.
        random: (K,) the same in random order, or the one error that this leaves on average.
        label: of the uncertainty, such as `variance of 4 samples`.
        shares: (K,) share left out; without it, evenly from 0 up to, but not including, 1.

    Raises:
        ValueError: shapes differ or there are fewer than two points.
    """
    found, best = np.asarray(curve, dtype=np.float64), np.asarray(oracle, dtype=np.float64)
    if found.ndim != 1 or found.shape != best.shape or len(found) < 2:
        raise ValueError(f"expected two curves of shape (K,), K > 1, not {found.shape} and {best.shape}")
    x = np.linspace(0, 1, len(found), endpoint=False) if shares is None else np.asarray(shares, dtype=np.float64)
    chance = np.broadcast_to(np.asarray(random, dtype=np.float64), found.shape)
    figure, axes = new_figure(5.6, 4.2)
    axes.plot(x, chance, color=MUTED, linewidth=1.2, linestyle=(0, (4, 2)), label="left out at random")
    axes.plot(x, found, color=DEFECTIVE, label=f"by {label}")
    axes.plot(x, best, color=GOOD, label="wrong pixels first (best possible)")
    axes.fill_between(x, best, found, color=DEFECTIVE, alpha=0.12, linewidth=0)
    axes.set(xlabel="pixels left out, the most uncertain first", ylabel="wrong among the remaining pixels")
    axes.set(xlim=(0, float(x[-1])), ylim=(0, None))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    figure.legend(loc="outside lower center", ncols=1)
    area, most = np.trapezoid(found - best, x), np.trapezoid(chance - best, x)
    share = f"\n{100 * (1 - area / most):.0f} % of the way from random to the best order" if most > 0 else ""
    set_title(figure, f"The most uncertain pixels left out first: AUSE {area:.4f}{share}")
    return figure


@styled
def sweep_figure(
    series: Mapping[str, Sequence[tuple[float, Mapping[str, Any]]]],
    *,
    x_label: str,
    y_label: str = "IoU per image",
    baselines: Mapping[str, float] | None = None,
) -> Figure:
    """A figure of merit over an option: strength, number of steps, network calls.

    Args:
        series: {name: [(x, {value, low, high}), ...]}; points without a value are left out.
        x_label: of the option.
        y_label: of the figure.
        baselines: {name: value}, drawn as level lines.

    Raises:
        ValueError: no point has a value.
    """
    figure, axes = new_figure(6.0, 4.0)
    best: tuple[float, float, str] | None = None
    for i, (name, points) in enumerate(series.items()):
        known = sorted((p for p in points if p[1].get("value") is not None), key=lambda point: point[0])
        colour = PALETTE[i % len(PALETTE)]
        axes.plot([x for x, _ in known], [e["value"] for _, e in known], "o-", color=colour, markersize=4, label=name)
        for x, entry in known:
            if entry.get("low") is not None:
                axes.plot([x, x], [entry["low"], entry["high"]], color=colour, linewidth=1.1, alpha=0.6)
            if best is None or entry["value"] > best[0]:
                best = entry["value"], x, name
    if best is None:
        raise ValueError("no point of the sweep has a value")
    for i, (name, value) in enumerate((baselines or {}).items()):
        axes.axhline(
            value, color=MUTED, linewidth=1.1, linestyle=(0, (4 - i % 3, 2)), label=f"{name} {100 * value:.1f} %"
        )
    axes.set(xlabel=x_label, ylabel=y_label)
    places = sorted({x for points in series.values() for x, _ in points})
    if places[0] > 0 and places[-1] > _WIDE * places[0]:
        axes.set_xscale("log")
        axes.set_xticks(places, [f"{x:g}" for x in places])
        axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    figure.legend(loc="outside lower center", ncols=3)
    set_title(figure, f"Highest {y_label}: {100 * best[0]:.1f} % at {x_label} {best[1]:g} ({best[2]})")
    return figure


def _draw_limits(axes: Axes) -> None:
    """No change, and the most that an image can gain or lose."""
    limit: dict[str, Any] = {"color": MUTED, "linewidth": 0.9, "linestyle": (0, (1, 2)), "zorder": 1}
    axes.plot([0, 1], [1, 0], **limit, label="all there is to gain, to lose")
    axes.plot([0, 1], [0, -1], **limit)
    axes.axhline(0, color=INK, linewidth=1.0, zorder=1)


def _draw_dots(axes: Axes, x: Floats, gain: Floats, names: NDArray[np.str_] | None) -> None:
    dots: dict[str, Any] = {"markersize": 6, "markeredgewidth": 0, "alpha": 0.55 if len(x) < 500 else 0.3}
    if names is None:
        for members, colour in ((gain >= -_EQUAL, GOOD), (gain < -_EQUAL, DEFECTIVE)):
            axes.plot(x[members], gain[members], ".", color=colour, **dots)
        return
    found, counts = np.unique(names, return_counts=True)
    order = [str(name) for name in found[np.argsort(-counts, kind="stable")]]
    for i, name in enumerate(order[:_TYPES]):
        members = names == name
        axes.plot(
            x[members], gain[members], ".", color=PALETTE[i], label=f"{shorten(name, 20)} ({members.sum()})", **dots
        )
    rest = ~np.isin(names, order[:_TYPES])
    if rest.any():
        axes.plot(x[rest], gain[rest], ".", color=MUTED, label=f"others ({rest.sum()})", **dots)


def _draw_bins(axes: Axes, x: Floats, gain: Floats, parts: NDArray[Any]) -> None:
    """Mean gain of each tenth of the stage-1 IoU with its t interval over parts, over the width of the bin."""
    edges = np.linspace(0, 1, _BINS + 1)
    place = np.clip((x * _BINS).astype(np.int64), 0, _BINS - 1)
    label: str | None = "mean of a tenth, 95 % interval"
    for i, (left, right) in enumerate(pairwise(edges)):
        _, part = np.unique(parts[place == i], return_inverse=True)
        members = np.bincount(part, weights=gain[place == i]) / np.bincount(part)
        if len(members) < _FEW:
            continue
        mean = t_interval(members)
        axes.plot([left, right], [mean.value] * 2, color=INK, linewidth=2.0, zorder=4, label=label)
        axes.plot([(left + right) / 2] * 2, [mean.low, mean.high], color=INK, linewidth=1.0, zorder=4)
        label = None


def _draw_entry(axes: Axes, entry: Mapping[str, Any], place: float, colour: str) -> None:
    if entry.get("value") is None:
        return
    axes.plot(entry["value"], place, "o", color=colour, markersize=4.5)
    if entry.get("low") is not None:
        axes.plot([entry["low"], entry["high"]], [place, place], color=colour, linewidth=1.4)


def _value(by_class: Mapping[str, Mapping[str, Any]], name: str) -> float:
    value = by_class.get(name, {}).get("value")
    return math.inf if value is None else float(value)


def _gain_summary(gain: Floats) -> str:
    if not len(gain):
        return "No image has an IoU before and after"
    better, worse = int((gain > _EQUAL).sum()), int((gain < -_EQUAL).sum())
    equal = len(gain) - better - worse
    mean = 100 * float(gain.mean())
    return f"{better} images better, {worse} worse, {equal} equal; mean gain {mean:+z.1f} points of IoU"


def _class_summary(
    methods: Mapping[str, Mapping[str, Mapping[str, Any]]],
    overall: Mapping[str, Mapping[str, Any]] | None,
    label: str,
) -> str:
    """Where the last method stands to the first."""
    (first, before), (last, after) = next(iter(methods.items())), list(methods.items())[-1]
    if len(methods) == 1:
        known = [name for name in before if before[name].get("value") is not None]
        if not known:
            return f"IoU by {label}"
        low, high = min(known, key=lambda n: _value(before, n)), max(known, key=lambda n: _value(before, n))
        ends = f"Hardest {label}: {low}, {100 * _value(before, low):.1f} %"
        return ends if low == high else f"{ends}; easiest: {high}, {100 * _value(before, high):.1f} %"
    shared = [n for n in before if math.isfinite(_value(before, n)) and math.isfinite(_value(after, n))]
    higher = sum(_value(after, name) > _value(before, name) for name in shared)
    text = (
        f"{METHODS.get(last, last)} is above {METHODS.get(first, first)} in {higher} of {len(shared)} {_plural(label)}"
    )
    start, end = (_value(overall or {}, method) for method in (first, last))
    if math.isfinite(start) and math.isfinite(end):
        text += f";\nover all {100 * start:.1f} % become {100 * end:.1f} %"
    return text[0].upper() + text[1:]


def _plural(word: str) -> str:
    return f"{word}es" if word.endswith("s") else f"{word}s"
