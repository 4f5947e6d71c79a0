"""Values beside one another, a row each: intervals with single seeds and published values, and bars.

A row is a row of a table: name, drawing, figures. So it reads aloud, breaks long names and fits a phone; the drawings
share one axis, at the foot, since their column has one width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lit_defect.report.axes import Scale, fixed, full, percent
from lit_defect.report.blocks import Bars, Interval, Intervals
from lit_defect.report.charts import empty
from lit_defect.report.markup import Markup, element, join, name, prose
from lit_defect.report.series import Arms, look_classes

_HEIGHT, _MIDDLE = 26, 13
_SPARE = 8  # by which upright lines reach into the rows above and below, should those be taller
FOLDED = 40  # rows shown at first


def intervals(block: Intervals, arms: Arms) -> Markup:
    """The chart of intervals."""
    numbers = [number for row in block.intervals for number in (row.value, row.low, row.high, *row.points)]
    numbers += [value for _, value in block.published]
    scale = Scale.around(numbers if block.reference is None else [*numbers, block.reference])
    if scale is None or not block.intervals:
        return empty(block.caption)
    names = {row.name for row in block.intervals}
    guides = [(label, value) for label, value in block.published if label not in names and math.isfinite(value)]
    ticks = {label: value for label, value in block.published if label in names}
    back = _lines_through(scale, block.reference, guides)
    rows = [
        _row(
            row.name,
            arms,
            join(back, _interval(row, scale, arms.look(row.name), ticks.get(row.name))),
            _figures(row, scale.digits()),
        )
        for row in block.intervals
    ]
    bounded = any(math.isfinite(row.low) and math.isfinite(row.high) for row in block.intervals)
    notes = []
    if block.reference is not None:
        notes.append(f"line at {full(block.reference)}" + (": no difference" if block.reference == 0 else ""))
    notes += [f"dashed: {label} {full(value)}" for label, value in guides]
    notes += ["diamonds: published values"] if ticks else []
    return _table(
        block.caption, block.x_name, rows, scale, "; ".join(notes), "value [interval]" if bounded else "value"
    )


def bars(block: Bars) -> Markup:
    """The chart of bars; they start at zero."""
    scale = Scale.around([0.0, *(value for _, value in block.bars)], margin=0.0)
    if scale is None or not any(math.isfinite(value) for _, value in block.bars):
        return empty(block.caption)
    rows = [_row(label, None, _bar(label, value, scale), fixed(value, scale.digits())) for label, value in block.bars]
    return _table(block.caption, block.x_name, rows, scale, "", "value")


def _table(caption: str, x_name: str, rows: Sequence[Markup], scale: Scale, notes: str, figures: str) -> Markup:
    head = element(
        "tr",
        element("th", element("span", "name", class_="unseen"), scope="col"),
        element("th", x_name, scope="col", class_="strip"),
        element("th", figures, scope="col", class_="number"),
    )
    axis = element("tr", element("td"), element("td", _axis(scale), class_="strip"), element("td"), class_="foot")
    rest = element("tbody", *rows[FOLDED:], class_="rest") if len(rows) > FOLDED else None
    table = element(
        "table",
        element("caption", prose(caption)),
        element("thead", head),
        element("tbody", *rows[:FOLDED]),
        rest,
        element("tfoot", axis, aria_hidden="true"),
        class_="strips bare" if figures == "value" else "strips",
        data_folds=len(rows) if rest else None,
    )
    return element("figure", table, element("p", notes, class_="key") if notes else None, class_="chart")


def _row(label: str, arms: Arms | None, drawing: Markup | None, figures: str) -> Markup:
    svg = element(
        "svg", drawing, height=_HEIGHT, class_="strip", aria_hidden="true", xmlns="http://www.w3.org/2000/svg"
    )
    return element(
        "tr",
        element("th", name(label, 80), scope="row"),
        element("td", svg, class_="strip"),
        element("td", figures, class_="number"),
        data_arm=arms.key(label) if arms else None,
    )


def _lines_through(scale: Scale, reference: float | None, guides: Sequence[tuple[str, float]]) -> Markup:
    drawn = []
    if reference is not None and math.isfinite(reference):
        drawn.append(_upright(scale, reference, "reference", f"{full(reference)}"))
    drawn += [_upright(scale, value, "guide", f"{label}: {full(value)}") for label, value in guides]
    return join(*drawn)


def _upright(scale: Scale, value: float, class_: str, tip: str) -> Markup:
    x = percent(scale.share(value))
    return element("line", element("title", tip), x1=x, x2=x, y1=-_SPARE, y2=_HEIGHT + _SPARE, class_=class_)


def _interval(row: Interval, scale: Scale, look: int | None, published: float | None) -> Markup:
    marks = []
    if math.isfinite(row.low) and math.isfinite(row.high):
        low, high = percent(scale.share(row.low)), percent(scale.share(row.high))
        tip = element("title", f"{row.name}\n{full(row.low)} to {full(row.high)}")
        marks.append(element("line", tip, x1=low, x2=high, y1=_MIDDLE, y2=_MIDDLE, class_="range"))
        marks += [element("line", x1=x, x2=x, y1=_MIDDLE - 4, y2=_MIDDLE + 4, class_="range") for x in (low, high)]
    marks += [
        _disc(scale, point, 3.5, "seed", f"{row.name}, single value\n{full(point)}")
        for point in row.points
        if math.isfinite(point)
    ]
    if published is not None and math.isfinite(published):
        tip = element("title", f"{row.name}, published\n{full(published)}")
        diamond = element("path", tip, d=f"M0 {_MIDDLE - 7}l5 7l-5 7l-5 -7Z", class_="published")
        marks.append(element("svg", diamond, x=percent(scale.share(published)), class_="open"))
    if math.isfinite(row.value):
        marks.append(_disc(scale, row.value, 5, "mean", f"{row.name}\n{_told(row)}"))
    return element("g", *marks, class_="interval" if look is None else f"interval {look_classes(look)}")


def _disc(scale: Scale, value: float, radius: float, class_: str, tip: str) -> Markup:
    return element("circle", element("title", tip), cx=percent(scale.share(value)), cy=_MIDDLE, r=radius, class_=class_)


def _bar(label: str, value: float, scale: Scale) -> Markup | None:
    if not math.isfinite(value):
        return None
    start, end = sorted((scale.share(0.0), scale.share(value)))
    tip = element("title", f"{label}\n{full(value)}")
    return element("rect", tip, x=percent(start), width=percent(end - start), y=5, height=16, class_="bar")


def _axis(scale: Scale) -> Markup:
    marks = []
    for i, tick in enumerate(scale.ticks()):
        x = percent(scale.share(tick.value))
        marks.append(element("line", x1=x, x2=x, y1=0, y2=5, class_="axis"))
        odd = " odd" if i % 2 else ""
        marks.append(element("text", tick.label, x=x, y=19, class_=f"tick middle{odd}"))
    line = element("line", x1=0, x2="100%", y1=0, y2=0, class_="axis")
    return element("svg", line, *marks, height=24, class_="strip")


def _figures(row: Interval, digits: int) -> str:
    value = fixed(row.value, digits)
    if not (math.isfinite(row.low) and math.isfinite(row.high)):
        return value
    return f"{value} [{fixed(row.low, digits)}, {fixed(row.high, digits)}]"


def _told(row: Interval) -> str:
    limits = f" [{full(row.low)}, {full(row.high)}]" if math.isfinite(row.low) and math.isfinite(row.high) else ""
    return f"{full(row.value)}{limits}"
