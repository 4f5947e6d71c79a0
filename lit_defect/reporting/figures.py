"""Figures of a classifier: confusion matrix, ROC, precision-recall, scores, reliability, training curves.

Each function returns a matplotlib Figure whose title says what is seen; `write_figures` draws all that apply.
No pyplot: nothing needs a display, and no state is left behind.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray

from lit_defect.metrics.calibration import Reliability, reliability
from lit_defect.metrics.classification import defect_score
from lit_defect.reporting.style import (
    DEFECTIVE,
    GOOD,
    GREY,
    INK,
    MUTED,
    PALETTE,
    new_figure,
    save_figure,
    set_title,
    short_names,
    shorten,
    styled,
)

Floats = NDArray[np.float64]
Curve = tuple[str, NDArray[np.bool_], Floats]
"""Name, is positive (n,), score (n,)."""

_NAMED_CURVES = 6  # more classes than this are drawn in grey, the worst ones named


def write_figures(
    folder: Path, probs: ArrayLike, labels: ArrayLike, result: dict[str, Any], prefix: str = ""
) -> list[Path]:
    """Draw every figure that the data allow.

    Args:
        folder: where the PNGs go.
        probs: (n, C) probabilities.
        labels: (n,) class indices.
        result: what `evaluate` returned for them.
        prefix: of the file names, such as `test_`.

    Returns:
        The files written; curves are left out when only one class occurs.
    """
    p, y = np.asarray(probs, dtype=np.float64), np.asarray(labels)
    names, normal = result["class_names"], result["normal_class"]
    figures = {"confusion": confusion_figure(result["confusion"], names)}
    if len(y):
        figures["reliability"] = reliability_figure(reliability(p, y))
    if len(names) == 2:
        positive = 1 if normal is None else 1 - normal
        curves: list[Curve] = [(names[positive], y == positive, p[:, positive])]
    else:
        curves = [(name, y == c, p[:, c]) for c, name in enumerate(names)]
    curves = [curve for curve in curves if curve[1].any() and not curve[1].all()]
    if curves:
        figures["roc"] = roc_figure(curves, result["auroc"])
        figures["precision_recall"] = precision_recall_figure(curves, result["average_precision"])
    if normal is not None and len(y):
        figures["scores"] = score_figure(defect_score(p, normal), y != normal, result["threshold"])
    return [save_figure(figure, folder / f"{prefix}{name}.png") for name, figure in figures.items()]


@styled
def confusion_figure(confusion: ArrayLike, class_names: Sequence[str]) -> Figure:
    """Counts (C, C), rows the truth; each cell is coloured by its share of the row."""
    counts = np.asarray(confusion, dtype=np.int64)
    classes, total = len(counts), int(counts.sum())
    per_row = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, per_row, out=np.zeros(counts.shape), where=per_row > 0)
    labels = short_names(list(class_names), 20)
    cell = 1.0 if classes <= 4 else 0.72 if classes <= 12 else max(0.26, 9 / classes)
    side = min(13.0, max(2.4, cell * classes))
    figure, axes = new_figure(side + 2.6, side + 2.0)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1.15, aspect="equal")

    turn = classes > 4 or max(map(len, labels)) > 10
    tick = 9 if classes <= 20 else max(4.5, 180 / classes)
    turned: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if turn else {}
    axes.set_xticks(range(classes), labels, fontsize=tick, **turned)
    truth = [f"{label}  ({n})" for label, n in zip(labels, per_row[:, 0], strict=True)]
    axes.set_yticks(range(classes), truth, fontsize=tick)
    axes.set(xlabel="predicted", ylabel="true (number of samples)")
    set_title(figure, _confusion_summary(counts, labels))
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks(np.arange(classes - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(classes - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5 if classes <= 12 else 0.6)
    axes.tick_params(which="minor", length=0)

    room = side / classes * 72  # points per cell
    digits = max(2, len(str(counts.max() if total else 0)))
    size = min(13.0, room / (0.75 * digits), room * 0.42)
    if size < 4:
        return figure
    for (row, column), count in np.ndenumerate(counts):
        if count == 0 and classes > 6:
            continue
        colour = "white" if share[row, column] > 0.6 else INK
        with_share = classes <= 12 and count > 0
        weight = "bold" if row == column else "normal"
        place: dict[str, Any] = {
            "textcoords": "offset points",
            "ha": "center",
            "va": "center",
            "color": colour,
        }
        lift = (0, 0.5 * size if with_share else 0)
        axes.annotate(str(count), (column, row), xytext=lift, fontsize=size, fontweight=weight, **place)
        if with_share:
            percent, small = f"{100 * share[row, column]:.0f} %", max(6.0, 0.65 * size)
            axes.annotate(percent, (column, row), xytext=(0, -0.75 * size), fontsize=small, **place)
    return figure


@styled
def roc_figure(curves: Sequence[Curve], interval: dict[str, Any]) -> Figure:
    """Share of positives found against share of negatives flagged, one curve for each class given."""
    figure, axes = new_figure(4.9, 4.7)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    drawn = []
    for name, positive, scores in curves:
        found, flagged = counts_above(positive, scores)
        x, y = flagged / flagged[-1], found / found[-1]
        drawn.append((name, x, y, float(np.trapezoid(y, x))))
    _draw_curves(axes, drawn)
    _count_samples(axes, curves)
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    set_title(figure, _with_interval("AUROC", interval, len(curves)))
    return figure


@styled
def precision_recall_figure(curves: Sequence[Curve], interval: dict[str, Any]) -> Figure:
    """Precision against recall, as steps; a single curve also has its chance level."""
    figure, axes = new_figure(4.9, 4.7)
    drawn = []
    for name, positive, scores in curves:
        found, flagged = counts_above(positive, scores)
        precision = found[1:] / (found + flagged)[1:]
        precision = np.append(precision[0], precision)
        recall = found / found[-1]
        drawn.append((name, recall, precision, float(np.sum(np.diff(recall) * precision[1:]))))
    if len(curves) == 1:
        axes.axhline(curves[0][1].mean(), color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    _draw_curves(axes, drawn, drawstyle="steps-pre")
    _count_samples(axes, curves)
    axes.set(xlabel="recall", ylabel="precision")
    set_title(figure, _with_interval("average precision", interval, len(curves)))
    return figure


def score_figure(scores: ArrayLike, is_defect: ArrayLike, threshold: float | None) -> Figure:
    """Histograms of the defect score of good and of defective samples, each as a share of its own class."""
    label = "defect score, 1 \N{MINUS SIGN} P(good)"
    return score_histograms(scores, is_defect, threshold, label=label, edges=np.linspace(0, 1, 41))


@styled
def score_histograms(
    scores: ArrayLike, is_defect: ArrayLike, threshold: float | None, *, label: str, edges: Floats
) -> Figure:
    """Histograms of good and of defective samples; the title says what the threshold lets pass and rejects.

    Args:
        scores: (n,) higher means more defective.
        is_defect: (n,) the truth.
        threshold: samples that reach it are rejected; one beyond the axis is drawn at its end.
        label: of the score.
        edges: (bins + 1,) of the bins.
    """
    score, defect = np.asarray(scores, dtype=np.float64), np.asarray(is_defect, dtype=bool)
    figure, axes = new_figure(6.2, 3.5)
    for members, name, colour in ((~defect, "good", GOOD), (defect, "defective", DEFECTIVE)):
        if not members.any():
            continue
        weights = np.full(members.sum(), 1 / members.sum())
        share, _ = np.histogram(score[members], bins=edges, weights=weights)
        axes.stairs(share, edges, fill=True, color=colour, alpha=0.25)
        axes.stairs(share, edges, color=colour, linewidth=1.4, label=f"{name} ({members.sum()})")
    margin = 0.01 * (edges[-1] - edges[0])
    axes.set(xlabel=label, ylabel="share of the class", xlim=(edges[0] - margin, edges[-1] + margin))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    title = "Scores of good and defective samples"
    if threshold is not None:
        shown = min(max(threshold, float(edges[0])), float(edges[-1]))
        name = f"threshold {threshold:.3g}"
        axes.axvline(shown, color=INK, linewidth=1.2, linestyle=(0, (4, 2)), label=name)
        parts = []
        if defect.any():
            parts.append(f"{100 * np.mean(score[defect] < threshold):.1f} % of the defects pass")
        if not defect.all():
            parts.append(f"{100 * np.mean(score[~defect] >= threshold):.1f} % of the good are rejected")
        title = ", ".join(parts)
    set_title(figure, title)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    return figure


@styled
def reliability_figure(bins: Reliability) -> Figure:
    """Accuracy in each bin of confidence, the gap to the diagonal, and how many samples each bin holds."""
    filled = bins.count > 0
    width = float(bins.edges[1])
    middle = (bins.edges[:-1] + width / 2)[filled]
    accuracy, confidence = bins.accuracy[filled], bins.confidence[filled]
    figure = Figure(figsize=(4.9, 5.4), layout="constrained")
    axes, below = figure.subplots(2, 1, height_ratios=[4, 1], sharex=True)
    axes.bar(middle, accuracy, 0.94 * width, color=GOOD, alpha=0.5, label="accuracy")
    gap: dict[str, Any] = {"color": DEFECTIVE, "alpha": 0.55}
    axes.bar(middle, confidence - accuracy, 0.94 * width, bottom=accuracy, label="gap to the confidence", **gap)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set(ylabel="accuracy", ylim=(0, 1.02), xlim=(max(0.0, middle.min() - 1.5 * width), 1))
    axes.legend(loc="upper left")
    total = bins.count.sum()
    below.bar(middle, bins.count[filled] / total, 0.94 * width, color=MUTED)
    below.set(xlabel="confidence (largest class probability)", ylabel="samples")
    below.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    below.yaxis.set_major_locator(MaxNLocator(3))
    lean = float(np.average(confidence - accuracy, weights=bins.count[filled]))
    word = "Over-confident" if lean > 0.01 else "Under-confident" if lean < -0.01 else "Calibrated on average"
    set_title(figure, f"{word}: ECE {bins.ece:.3f} ({total} samples)")
    return figure


@styled
def training_figure(metrics_csv: Path) -> Figure:
    """Curves of Lightning's metrics.csv: losses, figures between 0 and 1 that select a state, learning rate."""
    columns = _read_metrics(metrics_csv)
    columns = {name: c for name, c in columns.items() if not name.startswith("test/")}  # one point, no curve
    losses = {name: c for name, c in columns.items() if "loss" in name.rsplit("/", 1)[-1]}
    rates = {name: c for name, c in columns.items() if name.startswith("lr-") or name.endswith("/lr")}
    scores = {
        name: c for name, c in columns.items()
        if name.startswith(("val/", "synthetic/")) and name not in losses and (c[1] >= 0).all() and (c[1] <= 1).all()
    }  # fmt: skip
    panels = [p for p in (("loss", losses), ("validation", scores), ("learning rate", rates)) if p[1]]
    figure = Figure(figsize=(3.7 * max(1, len(panels)), 3.5), layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False)[0] if panels else []
    for axes, (title, curves) in zip(row, panels, strict=True):
        for i, (name, (x, y)) in enumerate(sorted(curves.items())):
            marker = "o" if len(x) <= 40 else None
            colour, dash = PALETTE[i % len(PALETTE)], "-" if i < len(PALETTE) else "--"
            axes.plot(x, y, dash, color=colour, marker=marker, markersize=3, linewidth=1.4, label=name)
        axes.set_title(title, fontweight="normal", fontsize=9, color=MUTED)
        axes.set(xlabel="training step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2 if len(curves) > 1 else 1)
    if "val/loss" in losses:
        x, y = losses["val/loss"]
        set_title(figure, f"Validation loss lowest at step {x[y.argmin()]:.0f} of {x[-1]:.0f}")
    if not panels:
        figure.text(0.5, 0.5, "no metrics were logged", ha="center", color=MUTED)
    return figure


def counts_above(positive: NDArray[np.bool_], scores: Floats) -> tuple[Floats, Floats]:
    """Positives and negatives at or above each distinct score, from none to all."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    found = np.cumsum(positive[order])[last]
    return np.append(0.0, found), np.append(0.0, last + 1 - found)


def _draw_curves(axes: Axes, drawn: list[tuple[str, Floats, Floats, float]], **style: Any) -> None:
    """Draw (name, x, y, area); of many curves only those with the least area have a colour and a name."""
    drawn = sorted(drawn, key=lambda curve: curve[3])
    named = drawn if len(drawn) <= _NAMED_CURVES else drawn[: _NAMED_CURVES - 1]
    for _, x, y, _ in drawn[len(named) :]:
        axes.plot(x, y, color=GREY, linewidth=0.8, **style)
    labels = short_names([name for name, *_ in named], 22)
    for i, ((_, x, y, area), label) in enumerate(zip(named, labels, strict=True)):
        colour = PALETTE[i] if len(drawn) > 1 else DEFECTIVE
        axes.plot(x, y, color=colour, label=f"{area:.3f}  {label}", **style)
    if len(drawn) > len(named):
        axes.plot([], [], color=GREY, label=f"{len(drawn) - len(named)} better classes")
    if len(drawn) > 1:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02), aspect="equal")


def _count_samples(axes: Axes, curves: Sequence[Curve]) -> None:
    """Say below a single curve how many samples stand behind it."""
    if len(curves) == 1:
        name, positive, _ = curves[0]
        text = f"{positive.sum()} {shorten(name, 24)}, {(~positive).sum()} others"
        axes.set_title(text, fontweight="normal", fontsize=8.5, color=MUTED, pad=4)


def _with_interval(name: str, interval: dict[str, Any], curves: int) -> str:
    if interval["value"] is None:
        return name
    title = f"{'mean ' if curves > 1 else ''}{name} {interval['value']:.3f}"
    if interval["low"] is not None:
        title += f"  [{interval['low']:.3f}, {interval['high']:.3f}]"
    return title[0].upper() + title[1:]


def _confusion_summary(counts: NDArray[np.int64], labels: list[str]) -> str:
    total = int(counts.sum())
    if not total:
        return "No samples"
    title = f"{100 * np.trace(counts) / total:.1f} % of {total} right"
    wrong = counts - np.diag(np.diag(counts))
    if not wrong.any():
        return title
    truth, taken = np.unravel_index(int(wrong.argmax()), wrong.shape)
    return f"{title}\nmost often: {labels[truth]} taken for {labels[taken]} ({wrong.max()})"


def _read_metrics(path: Path) -> dict[str, tuple[Floats, Floats]]:
    """Step and value of every column; a metric logged per step and per epoch is shown per epoch."""
    columns: dict[str, list[tuple[float, float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if not row.get("step"):
                continue
            for name, text in row.items():
                value = float(text) if text else math.nan
                if name not in ("step", "epoch") and math.isfinite(value):
                    columns.setdefault(name, []).append((float(row["step"]), value))
    kept = {name: points for name, points in columns.items() if f"{name.removesuffix('_step')}_epoch" not in columns}
    kept |= {name: points for name, points in columns.items() if name.endswith("_epoch")}
    return {
        name.removesuffix("_epoch"): (np.array([x for x, _ in points]), np.array([y for _, y in points]))
        for name, points in kept.items()
    }
