"""Parallel coordinates: a line for each trial through all of its parameters, coloured by what it reached."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lit_defect.report.axes import Scale, full, percent, place
from lit_defect.report.blocks import Parallel
from lit_defect.report.charts import HEIGHT, UNITS, empty, stretched, trail
from lit_defect.report.markup import Markup, element, prose
from lit_defect.reporting.palette import short_names, shorten

COLOURS = 7  # classes q0 (worst) to q6 (best) of page.css
_ROW = 15  # pixels of a choice, at least
_MOST_CHOICES = 60  # that are written


@dataclass(frozen=True)
class _Choices:
    """An axis of words, the first one on top."""

    words: Sequence[str]

    def share(self, value: str | float) -> float:
        return 1 - (self.words.index(_word(value)) + 0.5) / len(self.words)


Value = float | str | None


def parallel(block: Parallel) -> Markup:
    """The chart; lines of trials without an objective are grey and dashed, a missing value breaks its line."""
    columns = [[_finite(line[i]) for line in block.lines] for i in range(len(block.axes))]
    axes = [_axis(column, axis in block.log) for axis, column in zip(block.axes, columns, strict=True)]
    if not any(value is not None for column in columns for value in column):
        return empty(block.caption)
    choices = max((len(axis.words) for axis in axes if isinstance(axis, _Choices)), default=0)
    height = max(HEIGHT, _ROW * min(choices, _MOST_CHOICES))
    across = [0.5 if len(axes) == 1 else i / (len(axes) - 1) for i in range(len(axes))]
    ranks = [_quality(value, axes[-1], block.better) for value in columns[-1]]
    order = sorted(range(len(block.lines)), key=lambda i: -1.0 if ranks[i] is None else ranks[i] or 0.0)  # best on top
    drawn = []
    for i in order:
        path = _path([column[i] for column in columns], axes, across, height)
        rank = ranks[i]
        colour = "failed" if rank is None else f"q{min(int(rank * COLOURS), COLOURS - 1)}"
        tip = "\n".join(f"{axis}: {_told(column[i])}" for axis, column in zip(block.axes, columns, strict=True))
        drawn.append(
            element(
                "g",
                element("title", tip),
                element("path", d=path, class_="hit"),
                element("path", d=path, class_="line"),
                class_=f"trial {colour} best" if i == order[-1] and rank is not None else f"trial {colour}",
            )
        )
    svg = element(
        "svg",
        stretched(height, *drawn),
        *(
            _draw_axis(title, short, axis, x, height)
            for title, short, axis, x in zip(block.axes, _titles(block.axes), axes, across, strict=True)
        ),
        class_=f"plot n{min(len(axes), 12)}",
        height=place(height),
        role="img",
        aria_label=f"{len(block.lines)} lines over {', '.join(block.axes)}: {block.caption}",
        xmlns="http://www.w3.org/2000/svg",
    )
    box = element("div", svg, class_="scroll", tabindex=0, role="region", aria_label=block.caption)
    return element("figure", element("figcaption", prose(block.caption)), box, _key(block), class_="chart parallel")


def _finite(value: Value) -> Value:
    return None if isinstance(value, float | int) and not math.isfinite(value) else value


def _axis(column: Sequence[Value], log: bool) -> Scale | _Choices | None:
    given = [value for value in column if value is not None]
    if any(isinstance(value, str | bool) for value in given):
        return _Choices(sorted({_word(value) for value in given}, key=_by_number))
    return Scale.around((float(value) for value in given), log=log)


def _word(value: str | float) -> str:
    return value if isinstance(value, str) else full(value)


def _by_number(word: str) -> tuple[bool, float, str]:
    try:
        return False, -float(word), word  # the largest on top, as on an axis of numbers
    except ValueError:
        return True, 0.0, word


def _place(axis: Scale | _Choices | None, value: Value, height: float) -> float | None:
    if axis is None or value is None:
        return None
    if isinstance(axis, _Choices):
        return height * (1 - axis.share(value))
    number = float(value)
    return height * (1 - axis.share(number)) if axis.shows(number) else None


def _quality(value: Value, axis: Scale | _Choices | None, better: str) -> float | None:
    """0 for the worst, 1 for the best; None without an objective."""
    if value is None or axis is None:
        return None
    share = axis.share(value) if isinstance(axis, _Choices) else axis.share(float(value))
    return share if better == "larger" else 1 - share


def _path(
    values: Sequence[Value], axes: Sequence[Scale | _Choices | None], across: Sequence[float], height: float
) -> str:
    pieces: list[list[tuple[float, float]]] = [[]]
    for value, axis, x in zip(values, axes, across, strict=True):
        y = _place(axis, value, height)
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append((UNITS * x, y))
    return "".join(trail(piece) if len(piece) > 1 else f"{trail(piece)}h0" for piece in pieces if piece)


def _titles(axes: Sequence[str]) -> list[str]:
    """The last words of dotted names, as long as they stay distinct."""
    last = [axis.rsplit(".", 1)[-1] for axis in axes]
    return short_names([word if last.count(word) == 1 else axis for word, axis in zip(last, axes, strict=True)], 16)


def _draw_axis(title: str, short: str, axis: Scale | _Choices | None, across: float, height: float) -> Markup:
    x = percent(across)
    parts = [element("line", x1=x, x2=x, y1=0, y2=place(height), class_="axis")]
    parts.append(element("text", element("title", title), short, x=x, y=-24, class_="title middle"))
    if isinstance(axis, Scale) and axis.log:
        parts.append(element("text", "log", x=x, y=-9, class_="tick middle"))
    if isinstance(axis, _Choices):
        stride = math.ceil(len(axis.words) / _MOST_CHOICES)
        marks = [(axis.share(word), shorten(word, 16), word) for word in axis.words[::stride]]
    elif axis is not None:
        marks = [(axis.share(tick.value), tick.label, tick.label) for tick in axis.ticks()]
    else:
        marks = []
    for share, label, whole in marks:
        y = place(height * (1 - share))
        if isinstance(axis, Scale):
            parts.append(element("circle", cx=x, cy=y, r=2.5, class_="notch"))
        tip = element("title", whole) if whole != label else None
        parts.append(element("text", tip, label, x=x, y=y, dx=7, dy="0.35em", class_="tick halo"))
    return element("g", *parts)


def _key(block: Parallel) -> Markup:
    """What the colours say."""
    steps = (element("rect", x=14 * i, y=0, width=14, height=10, class_=f"q{i}") for i in range(COLOURS))
    bar = element("svg", *steps, class_="scale", width=14 * COLOURS, height=10, aria_hidden="true")
    return element(
        "p",
        f"{block.axes[-1]}: worse ",
        bar,
        f" better ({block.better} is better; the best line is thick, dashed lines reached none)",
        class_="key",
    )


def _told(value: Value) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else full(value)
