"""What stands for an arm in all of a page: one colour, one dash and one key under which a hover finds it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lit_defect.report.blocks import Block, Details, Intervals, Lines, Report
from lit_defect.report.markup import Markup, element
from lit_defect.reporting.palette import PALETTE

DASHES = ("", "7 3", "2 3", "9 3 2 3")
MOST_TOLD_APART = len(PALETTE) * len(DASHES)
"""Charts of more curves than these draw all of them alike, and a hover tells which is which."""


def blocks_of(report: Report) -> Iterator[Block]:
    """All blocks, those inside of details too."""

    def walk(blocks: Sequence[Block]) -> Iterator[Block]:
        for block in blocks:
            yield block
            if isinstance(block, Details):
                yield from walk(block.blocks)

    for section in report.sections:
        yield from walk(section.blocks)


class Arms:
    """The looks of all names that curves and intervals of a report have.

    A name keeps the look of the chart in which it comes first, unless another name of a later chart has it already.
    """

    def __init__(self, report: Report) -> None:
        self._keys: dict[str, str] = {}
        self._looks: dict[str, int] = {}
        for block in blocks_of(report):
            if isinstance(block, Lines):
                names = [curve.name for curve in block.curves]
            elif isinstance(block, Intervals):
                names = [interval.name for interval in block.intervals]
            else:
                continue
            for name in names:
                self._keys.setdefault(name, f"a{len(self._keys)}")
            if isinstance(block, Lines) and len(set(names)) <= MOST_TOLD_APART:
                for name, look in zip(names, self.looks(names), strict=True):
                    self._looks.setdefault(name, look)

    def key(self, name: str) -> str | None:
        """By which the page's script finds all that belongs to an arm; None for a name that is none."""
        return self._keys.get(name)

    def looks(self, names: Sequence[str]) -> list[int]:
        """A look for each curve of a chart; curves of one name share theirs."""
        taken: dict[str, int] = {}
        for name in names:  # who has one already chooses first
            look = self._looks.get(name)
            if look is not None and look not in taken.values():
                taken[name] = look
        free = (look for look in range(len(names) + len(taken) + 1) if look not in set(taken.values()))
        for name in names:
            if name not in taken:
                taken[name] = next(free)
        return [taken[name] for name in names]

    def look(self, name: str) -> int | None:
        """The look that the name has in charts of curves; None for a name that is in none."""
        return self._looks.get(name)


def look_classes(look: int) -> str:
    """Classes of page.css for a colour and a dash."""
    return f"c{look % len(PALETTE)} d{look // len(PALETTE) % len(DASHES)}"


def swatch(look: int | None) -> Markup:
    """A short line in a look, or a plain one."""
    line = element("line", x1=1, x2=21, y1=5, y2=5)
    classes = "swatch" if look is None else f"swatch {look_classes(look)}"
    return element("svg", line, class_=classes, width=22, height=10, aria_hidden="true")


def colour_rules() -> str:
    """The rules of page.css that depend on the palette; colours are lightened on a dark page."""
    light = "".join(f".c{i}{{color:{colour}}}" for i, colour in enumerate(PALETTE))
    dark = "".join(f".c{i}{{color:{_lighter(colour)}}}" for i, colour in enumerate(PALETTE))
    dashes = "".join(f".d{i}{{stroke-dasharray:{dash}}}" for i, dash in enumerate(DASHES) if dash)
    return f"{light}{dashes}\n@media screen and (prefers-color-scheme:dark){{{dark}}}\n"


def _lighter(colour: str, share: float = 0.35) -> str:
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(channel + (255 - channel) * share):02x}" for channel in channels)
