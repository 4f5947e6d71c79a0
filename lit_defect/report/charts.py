"""Curves as inline SVG: crisp at any width, every value in a tooltip.

Across, places are percents; down, they are pixels. So the page's width stretches a chart and leaves its text as it is.
Only the curves themselves need a coordinate system: a nested `svg` of `UNITS` units across that is stretched, with
strokes that are not. Ticks and titles stand outside the drawing's box, in margins that page.css leaves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lit_defect.report.axes import Scale, full, percent, place
from lit_defect.report.blocks import Curve, Lines
from lit_defect.report.markup import Markup, element, name, prose
from lit_defect.report.series import MOST_TOLD_APART, Arms, look_classes, swatch
from lit_defect.reporting.palette import short_names

UNITS = 1000
HEIGHT = 300
_MOST_POINTS = 400  # drawn of a curve
_MOST_TIPS = 1500  # places with a tooltip in a chart
_MOST_LABELS = 8  # beside the ends of curves
_LABEL_HEIGHT = 18


@dataclass(frozen=True)
class Point:
    """A point of a curve; its band is (nan, nan) where it has none."""

    x: float
    y: float
    low: float = math.nan
    high: float = math.nan


def empty(caption: str, why: str = "nothing to draw: no finite value") -> Markup:
    """What stands where a chart has nothing to show."""
    return element(
        "figure", element("figcaption", prose(caption)), element("p", why, class_="note"), class_="chart nothing"
    )


def lines(block: Lines, arms: Arms) -> Markup:
    """The chart of curves over one axis, with its legend; a table of their values stands beside it in the page."""
    pieces = [segments(curve, log_x=block.log_x) for curve in block.curves]
    points = [point for curve in pieces for piece in curve for point in piece]
    x_scale = Scale.around((point.x for point in points), log=block.log_x, margin=0.02)
    y_scale = Scale.around(value for point in points for value in (point.y, point.low, point.high))
    if x_scale is None or y_scale is None:
        return empty(block.caption)
    names = [curve.name for curve in block.curves]
    looks: Sequence[int | None] = arms.looks(names) if len(set(names)) <= MOST_TOLD_APART else [None] * len(names)
    stride = math.ceil(len(points) / _MOST_TIPS)
    drawn, dots = [], []
    for curve, look, parts in zip(block.curves, looks, pieces, strict=True):
        group = {"class_": "curve" if look is None else f"curve {look_classes(look)}", "data_arm": arms.key(curve.name)}
        drawn.append(element("g", *_paths(parts, x_scale, y_scale), **group))
        dots.append(element("g", *_dots(curve.name, block, parts, x_scale, y_scale, stride), **group))
    labels = _end_labels(names, looks, pieces, y_scale, arms) if 1 < len(names) <= _MOST_LABELS else None
    svg = element(
        "svg",
        _frame(block, x_scale, y_scale),
        stretched(HEIGHT, *drawn),
        *dots,
        labels,
        class_="plot",
        height=HEIGHT,
        role="img",
        aria_label=_told(block),
        xmlns="http://www.w3.org/2000/svg",
    )
    if len(set(names)) > MOST_TOLD_APART:
        below = element("p", f"{len(names)} curves; pointing at one tells its name", class_="key")
        classes = "chart lines many alike"
    else:
        below = _legend(names, looks, arms) if len(names) > 1 else Markup()
        classes = "chart lines many" if len(names) > _MOST_LABELS else "chart lines"
    return element("figure", element("figcaption", prose(block.caption)), svg, below, class_=classes)


def stretched(height: float, *children: str) -> Markup:
    """A nested drawing of UNITS by `height` that fills the width."""
    return element(
        "svg",
        *children,
        viewBox=f"0 0 {UNITS} {place(height)}",
        preserveAspectRatio="none",
        width="100%",
        height=place(height),
        class_="stretched",
    )


def segments(curve: Curve, *, log_x: bool = False) -> list[list[Point]]:
    """A curve's unbroken pieces: nan, infinity and what a logarithmic axis cannot show break it."""
    empty_band: Sequence[float] = [math.nan] * len(curve.y)
    low, high = (empty_band if limit is None else limit for limit in (curve.low, curve.high))
    pieces: list[list[Point]] = [[]]
    for x, y, lower, upper in zip(curve.x, curve.y, low, high, strict=True):
        point = Point(x, y, lower, upper)
        if math.isfinite(point.x) and math.isfinite(point.y) and (point.x > 0 or not log_x):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def thin(points: Sequence[Point], most: int = _MOST_POINTS) -> Sequence[Point]:
    """The ends, and the lowest and highest point of each stretch, so that no peak is lost."""
    if len(points) <= most:
        return points
    stretch = math.ceil((len(points) - 2) / ((most - 2) // 2))
    kept = {0, len(points) - 1}
    for start in range(1, len(points) - 1, stretch):
        places = range(start, min(start + stretch, len(points) - 1))
        kept |= {min(places, key=lambda i: points[i].y), max(places, key=lambda i: points[i].y)}
    return [points[i] for i in sorted(kept)]


def trail(places: Sequence[tuple[float, float]]) -> str:
    """A path's data through places (x, y)."""
    return "M" + "L".join(f"{place(x)} {place(y)}" for x, y in places)


def _paths(pieces: Sequence[Sequence[Point]], x_scale: Scale, y_scale: Scale) -> Iterator[Markup]:
    for piece in pieces:
        points = thin(piece)
        places = [UNITS * x_scale.share(point.x) for point in points]
        band = [
            (x, _down(y_scale, point.low), _down(y_scale, point.high))
            for x, point in zip(places, points, strict=True)
            if math.isfinite(point.low) and math.isfinite(point.high)
        ]
        if len(band) > 1:
            around = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
            yield element("path", d=trail(around) + "Z", class_="band")
        if len(points) > 1:
            line = [(x, _down(y_scale, point.y)) for x, point in zip(places, points, strict=True)]
            yield element("path", d=trail(line), class_="line")


def _dots(
    arm: str, block: Lines, pieces: Sequence[Sequence[Point]], x_scale: Scale, y_scale: Scale, stride: int
) -> Iterator[Markup]:
    for piece in pieces:
        last = len(piece) - 1
        extremes = {min(range(len(piece)), key=lambda i: piece[i].y), max(range(len(piece)), key=lambda i: piece[i].y)}
        for i, point in enumerate(piece):
            if i % stride and i != last and i not in extremes:
                continue
            band = f" ({full(point.low)} to {full(point.high)})" if math.isfinite(point.low + point.high) else ""
            tip = f"{arm}\n{block.x_name} {full(point.x)}: {full(point.y)}{band}"
            yield element(
                "circle",
                element("title", tip),
                cx=percent(x_scale.share(point.x)),
                cy=place(_down(y_scale, point.y)),
                r=3,
                class_="dot lone" if last == 0 else "dot",
            )


def _down(scale: Scale, value: float) -> float:
    return HEIGHT * (1 - scale.share(value))


def _frame(block: Lines, x_scale: Scale, y_scale: Scale) -> Markup:
    """Grid, ticks and titles."""
    marks = []
    for tick in y_scale.ticks():
        y = place(_down(y_scale, tick.value))
        marks.append(element("line", x1=0, x2="100%", y1=y, y2=y, class_="grid"))
        marks.append(element("text", tick.label, x=-8, y=y, dy="0.35em", class_="tick end"))
    for i, tick in enumerate(x_scale.ticks(7)):
        x = percent(x_scale.share(tick.value))
        marks.append(element("line", x1=x, x2=x, y1=HEIGHT, y2=HEIGHT + 5, class_="axis"))
        odd = " odd" if i % 2 else ""  # left out where the page is narrow
        marks.append(element("text", tick.label, x=x, y=HEIGHT + 20, class_=f"tick middle{odd}"))
    marks.append(element("line", x1=0, x2="100%", y1=HEIGHT, y2=HEIGHT, class_="axis"))
    marks.append(element("text", block.y_name, x=-50, y=-14, class_="title"))
    x_name = f"{block.x_name} (log)" if block.log_x else block.x_name
    marks.append(element("text", x_name, x="100%", y=HEIGHT + 40, class_="title end"))
    return element("g", *marks, aria_hidden="true")


def _legend(names: Sequence[str], looks: Sequence[int | None], arms: Arms) -> Markup:
    entries = [
        element("li", element("button", swatch(look), name(arm, 48), type="button", data_arm=arms.key(arm)))
        for arm, look in dict(zip(names, looks, strict=True)).items()
    ]
    return element("ul", *entries, class_="legend")


def _end_labels(
    names: Sequence[str],
    looks: Sequence[int | None],
    pieces: Sequence[Sequence[Sequence[Point]]],
    scale: Scale,
    arms: Arms,
) -> Markup:
    """Names beside the last points of the curves, moved apart where they would overlap."""
    shown = [i for i, parts in enumerate(pieces) if parts]
    short = dict(zip(shown, short_names([names[i] for i in shown], 20), strict=True))
    ends = {i: _down(scale, pieces[i][-1][-1].y) for i in shown}
    shown.sort(key=lambda i: ends[i])
    labels = []
    for i, y in zip(shown, spread([ends[i] for i in shown], _LABEL_HEIGHT, HEIGHT), strict=True):
        look = looks[i]
        labels.append(
            element(
                "g",
                element("title", names[i]),
                element("path", d=trail([(3, ends[i]), (16, y), (22, y)]), class_="lead"),
                element("text", short[i], x=27, y=place(y), dy="0.35em"),
                class_="" if look is None else look_classes(look),
                data_arm=arms.key(names[i]),
            )
        )
    return element("svg", *labels, x="100%", class_="labels", aria_hidden="true")


def spread(places: Sequence[float], distance: float, height: float) -> list[float]:
    """Ascending places moved little, so that neighbours are `distance` apart and all are within [0, height]."""
    groups: list[tuple[list[float], float]] = []  # places that touch, and where the first of them goes
    for place_ in places:
        group, start = [place_], place_
        while groups and groups[-1][1] + len(groups[-1][0]) * distance > start:
            group = groups.pop()[0] + group
            start = sum(group) / len(group) - distance * (len(group) - 1) / 2
            start = max(0.0, min(start, height - distance * (len(group) - 1)))
        groups.append((group, start))
    return [start + i * distance for group, start in groups for i in range(len(group))]


def _told(block: Lines) -> str:
    """The chart in a sentence, for who cannot see it."""
    return f"{block.y_name} over {block.x_name}, {len(block.curves)} curves: {block.caption}"
