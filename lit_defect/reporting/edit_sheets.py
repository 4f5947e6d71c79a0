"""Edited pictures beside their sources: what changed, where, and whether it was accepted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from lit_defect.generation.files import Bools
from lit_defect.reporting.differences import difference, gain_of
from lit_defect.reporting.generated import outlined
from lit_defect.reporting.sheets import LINE, Cell, Picture, Words, fit, font, sheet
from lit_defect.reporting.style import DEFECTIVE, GOOD, INK, MUTED

Line = Mapping[str, Any]  # of a manifest; columns that are not there are not told
Box = tuple[slice, slice]

_SIZE = 190
_ROOM = 1.6  # side of a close-up, as a multiple of the mask's longer side
_LEAST = 24  # pixels of a close-up


@dataclass(frozen=True)
class EditTile:
    """One picture asked for.

    Attributes:
        source: (H, W, 3) uint8.
        result: (H, W, 3) uint8; None where nothing was accepted and nothing kept.
        mask: (H, W) bool, where the edit is; None for the whole picture.
        made: its line of the manifest.
        function: what edited it; empty for the line's `mode`.
    """

    source: Picture
    result: Picture | None
    mask: Bools | None
    made: Line
    function: str = ""

    @property
    def name(self) -> str:
        """Of the function."""
        return self.function or str(self.made.get("mode") or "edit")

    @property
    def group(self) -> tuple[str, str]:
        """Function and type: what a sheet is sorted by."""
        return self.name, str(self.made.get("defect_type", ""))


def edit_sheet(tiles: Sequence[EditTile], *, title: str, size: int = _SIZE) -> Image.Image:
    """Draw a row for each, function by function and type by type.

    Args:
        tiles: in any order.
        title: above all.
        size: side in pixels of the square into which each picture is fitted.
    """
    gain = gain_of((tile.source, tile.result) for tile in tiles if tile.result is not None)
    masked = any(tile.mask is not None for tile in tiles)
    cells = [_row(tile, gain, size, masked) for tile in sorted(tiles, key=lambda tile: tile.group)]
    told = f"source, mask, result, {_enlarged(gain)}; source and result close up"
    key = _key(told if masked else f"source, result, {_enlarged(gain)}") if tiles else None
    return sheet(cells, title=title, columns=1 if masked else 2, size=size, key=key)


def joined_sheet(rows: Sequence[Sequence[EditTile | None]], *, title: str, size: int = 150) -> Image.Image:
    """Draw a row for each source: itself, then what each function made of it, whole, close up, and the difference.

    Args:
        rows: of as many tiles each, one for each function; None where it was not asked for that source.
        title: above all.
        size: side in pixels of the square into which each picture is fitted.
    """
    gain = gain_of((t.source, t.result) for row in rows for t in row if t is not None and t.result is not None)
    cells = [cell for row in rows if any(row) for cell in _cells(row, gain, size)]
    key = _key(f"first the source; then of each function result, close-up, {_enlarged(gain)}") if cells else None
    return sheet(cells, title=title, columns=1 + max(map(len, rows), default=0), size=size, key=key)


def close_up(mask: Bools | None) -> Box | None:
    """A square around a mask (H, W), shifted to lie inside the picture; None without a mask."""
    if mask is None or not mask.any():
        return None
    (top, bottom), (left, right) = (np.flatnonzero(mask.any(axis=axis))[[0, -1]].tolist() for axis in (1, 0))
    side = max(_LEAST, round(_ROOM * (1 + max(bottom - top, right - left))))
    return _window(top, bottom, side, mask.shape[0]), _window(left, right, side, mask.shape[1])


def _row(tile: EditTile, gain: float, size: int, masked: bool) -> Cell:
    """With mask and close-ups where any tile of the sheet has them."""
    box = close_up(tile.mask)
    panels = [fit(tile.source, size), *([_masked(tile, size)] if masked else []), *_made(tile, gain, size)]
    if masked:
        panels += [_part(tile.source, box, size), _part(tile.result, box, size)]
    made = tile.made
    settings = [f"{made[key]}{unit}" for key, unit in (("sampler", ""), ("steps", " steps")) if key in made]
    settings += [f"{key} {made[key]:g}" for key in ("strength", "guidance") if key in made]
    heading = [Words(tile.name, bold=True, shrink=True), Words(f"   {tile.group[1]}   ", bold=True)]
    caption = [
        [*heading, Words(str(made.get("prompt", "")), shrink=True)],
        [Words(f"{made.get('source', '')}   ", MUTED, shrink=True), Words(", ".join(settings), MUTED)],
        [Words(_changes(tile)), _verdict(tile)],
    ]
    return Cell(panels, caption)


def _cells(row: Sequence[EditTile | None], gain: float, size: int) -> list[Cell]:
    """The source, then a cell for each function; without a mask of its own it is seen through the others' window."""
    asked = [tile for tile in row if tile is not None]
    first = next((tile for tile in asked if close_up(tile.mask)), asked[0])
    box = close_up(first.mask)
    of = [[Words("source", bold=True)], [Words(str(first.made.get("source", "")), MUTED, shrink=True)]]
    cells = [Cell([fit(first.source, size), _masked(first, size), _part(first.source, box, size)], of)]
    for tile in row:
        if tile is None:
            cells.append(Cell(["not asked"], [[Words("")]]))
            continue
        whole, differs = _made(tile, gain, size)
        panels = [whole, _part(tile.result, close_up(tile.mask) or box, size), differs]
        caption = [
            [Words(tile.name, bold=True, shrink=True), Words(f"   {tile.group[1]}")],
            [Words(_changes(tile, brief=True), shrink=True)],
            [_verdict(tile)],
        ]
        cells.append(Cell(panels, caption))
    return cells


def _made(tile: EditTile, gain: float, size: int) -> tuple[Picture | str, Picture | str]:
    """Result and difference."""
    if tile.result is None:
        return "none accepted", ""
    return fit(tile.result, size), fit(difference(tile.source, tile.result, gain), size)


def _masked(tile: EditTile, size: int) -> Picture | str:
    if tile.mask is not None:
        return outlined(tile.source, tile.mask, size)
    return "no mask" if tile.made.get("accepted", True) else "mask not kept"


def _part(picture: Picture | None, box: Box | None, size: int) -> Picture | str:
    return "" if picture is None or box is None else fit(picture[box], size)


def _changes(tile: EditTile, brief: bool = False) -> str:
    """`change inside 12.3, outside 0.8 (at most 14) before the paste, at most 0 in the result; seam 1.2`."""
    made = tile.made
    before = f"outside {_text(made, 'change_outside')} (at most {_text(made, 'most_outside', 0)})"
    after = _text(made, "most_after", 0)
    if brief:
        most = _text(made, "most_outside", 0)
        return (
            f"inside {_text(made, 'change_inside')}; outside {most} \N{RIGHTWARDS ARROW} {after}; "
            f"seam {_text(made, 'seam')}"
        )
    return (
        f"change inside {_text(made, 'change_inside')}, {before} before the paste, at most {after} in the result;   "
        f"seam {_text(made, 'seam')}   "
    )


def _text(made: Line, key: str, digits: int = 1) -> str:
    value = float(made.get(key, np.nan))
    return f"{value:.{digits}f}" if np.isfinite(value) else "-"


def _verdict(tile: EditTile) -> Words:
    if tile.made.get("accepted", True):
        return Words("accepted", GOOD)
    return Words(f"rejected: {tile.made.get('reason', '')}", DEFECTIVE, shrink=True)


def _window(first: int, last: int, side: int, length: int) -> slice:
    """`side` pixels around a span, as far as there are so many."""
    start = min(max(0, (first + last + 1 - side) // 2), max(0, length - side))
    return slice(start, min(start + side, length))


def _enlarged(gain: float) -> str:
    return f"difference \N{MULTIPLICATION SIGN} {gain:g} (grey: unchanged)"


def _key(text: str) -> Image.Image:
    key = Image.new("RGB", (round(font().getlength(text)), LINE), "white")
    ImageDraw.Draw(key).text((0, 0), text, font=font(), fill=INK)
    return key
