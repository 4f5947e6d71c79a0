"""What all pictures share: palette, typeface, short names, and how a figure is written."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lit_defect.files import whole_file
from lit_defect.reporting.palette import DEFECTIVE, FAINT, GOOD, GREY, INK, MUTED, PALETTE, short_names, shorten

__all__ = [
    "DEFECTIVE",
    "DPI",
    "FAINT",
    "GOOD",
    "GREY",
    "INK",
    "MUTED",
    "PALETTE",
    "STYLE",
    "new_figure",
    "save_figure",
    "set_title",
    "short_names",
    "shorten",
    "styled",
]

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "text.color": INK,
    "text.parse_math": False,  # a $ in a class name is a $
    "savefig.facecolor": "white",
}
DPI = 144
_P = ParamSpec("_P")


def styled(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    """Decorator: the function draws in this style, and the caller's matplotlib settings stay as they are."""

    @functools.wraps(draw)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of one pair of axes; inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def set_title(figure: Figure, text: str) -> None:
    """The figure's title at its left edge, broken into lines that fit."""
    width = int(figure.get_figwidth() * 72 / 6.6)
    lines = [line for part in text.split("\n") for line in textwrap.wrap(part, width)]
    figure.suptitle("\n".join(lines), x=0.012, ha="left", fontsize=10, fontweight="bold")


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG so that a reader never sees half of it; returns the path."""
    with whole_file(path) as file, matplotlib.rc_context(STYLE):  # ticks are made when they are drawn
        figure.savefig(file, dpi=DPI, format="png")
    return path
