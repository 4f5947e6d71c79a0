"""What a report is made of, whatever it is written as: sections of text, tables, charts and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Cell = str | float | int | None
"""A number is written with the digits of its column; None is an empty place; a str stands as it is."""


@dataclass(frozen=True)
class Text:
    """A paragraph; plain text, in which `words` between backticks are code.

    Attributes:
        kind: `note` for what explains, `warning` for what a reader must not miss.
        items: of a list behind the text, in the same box.
    """

    text: str
    kind: Literal["plain", "note", "warning"] = "plain"
    items: Sequence[str] = ()


@dataclass(frozen=True)
class Code:
    """Commands or a configuration, to be copied."""

    text: str
    caption: str = ""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: its head.
        digits: behind the point, of its numbers.
        help: what it means, in a sentence.
        better: which of its numbers are good ones; None where neither is.
    """

    name: str
    digits: int = 3
    help: str = ""
    better: Literal["larger", "smaller"] | None = None


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: of its CSV and LaTeX files, such as `arms`; unique in the report.
        rows: a cell for each column.
        caption: what it shows.
        strong: (row, column) of cells that stand out, such as the best ones.
        folded: how many rows are shown at first; None for all.
    """

    name: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    strong: Sequence[tuple[int, int]] = ()
    folded: int | None = 50


@dataclass(frozen=True)
class Curve:
    """A line of a chart; `low` and `high` bound its band, where there is one. nan breaks it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Lines:
    """Curves over one axis, such as a metric over steps."""

    caption: str
    x_name: str
    y_name: str
    curves: Sequence[Curve]
    log_x: bool = False


@dataclass(frozen=True)
class Interval:
    """A line of a chart of intervals: a value, its limits, and the single values that it was made of."""

    name: str
    value: float
    low: float
    high: float
    points: Sequence[float] = ()


@dataclass(frozen=True)
class Intervals:
    """Values side by side with intervals and single values; `reference` is drawn as a line, such as no difference."""

    caption: str
    x_name: str
    intervals: Sequence[Interval]
    reference: float | None = None
    published: Sequence[tuple[str, float]] = ()


@dataclass(frozen=True)
class Bars:
    """Shares or weights, the largest first, such as the importance of parameters."""

    caption: str
    x_name: str
    bars: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Parallel:
    """Parallel coordinates: each line is a trial, coloured by its last axis.

    Attributes:
        axes: names; the last one is the objective.
        lines: a value for each axis; a str on axes of choices, None where a trial lacks it.
        log: axes with a logarithmic scale.
        better: which end of the last axis is good.
        options: that all axes but the last one stand for, in full, by which W&B finds them.
    """

    caption: str
    axes: Sequence[str]
    lines: Sequence[Sequence[float | str | None]]
    log: Sequence[str] = ()
    better: Literal["larger", "smaller"] = "larger"
    options: Sequence[str] = ()


@dataclass(frozen=True)
class Picture:
    """A picture of a run folder."""

    path: Path
    caption: str = ""


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side, such as one figure of each arm."""

    pictures: Sequence[Picture]
    caption: str = ""


@dataclass(frozen=True)
class Details:
    """What is folded away until somebody wants it."""

    summary: str
    blocks: Sequence[Block]


Block = Text | Code | Table | Lines | Intervals | Bars | Parallel | Pictures | Details


@dataclass(frozen=True)
class Section:
    """A part of a report with a heading."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Report:
    """A whole report.

    Attributes:
        title: of the page.
        summary: what it comes to, in a sentence or three, shown first.
        sections: in their order.
        made: who made it from what: command, date, commit, number of runs.
    """

    title: str
    summary: str
    sections: Sequence[Section]
    made: Sequence[str] = field(default_factory=tuple)
