"""Sheets of generated defects beside real ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from lit_defect.reporting.sheets import Cell, Picture, Words, fit, sheet

_SIZE, _COLUMNS = 176, 4
_OUTLINE = (230, 60, 40)


@dataclass(frozen=True)
class GeneratedTile:
    """One defect: picture (H, W, 3), mask (H, W), and the normal picture it was made of, if it was made."""

    kind: str
    picture: Picture
    mask: NDArray[np.bool_]
    source: Picture | None = None
    generated: bool = False


def defect_sheet(tiles: Sequence[GeneratedTile]) -> Image.Image:
    """Real defects of each type, then generated ones; every picture plain, and with its mask's outline.

    Generated ones have their normal picture before them.
    """
    cells: list[Cell] = []
    before: tuple[str, bool] | None = None
    for tile in tiles:
        if before not in (None, (tile.kind, tile.generated)):  # a new row
            cells += [Cell([], [[Words("")]])] * (-len(cells) % _COLUMNS)
        before = tile.kind, tile.generated
        panels = [fit(tile.picture, _SIZE), outlined(tile.picture, tile.mask, _SIZE)]
        if tile.source is not None:
            panels.insert(0, fit(tile.source, _SIZE))
        what = f"generated {tile.kind}: normal, result, mask" if tile.generated else f"real {tile.kind}"
        cells.append(Cell(panels, [[Words(what, bold=not tile.generated)]]))
    return sheet(cells, title="Real and generated defects", columns=_COLUMNS, size=_SIZE)


def outlined(picture: Picture, mask: NDArray[np.bool_], size: int) -> Picture:
    """A picture fitted into a square of `size` pixels with its mask's outline around the defect, drawn at that size."""
    marked = np.repeat(mask[..., None].astype(np.uint8) * 255, 3, axis=2)
    shown, where = fit(picture, size).copy(), fit(marked, size)[..., 0] >= 128
    shown[ndimage.binary_dilation(where, iterations=2) & ~where] = _OUTLINE
    return shown
