"""Sheets of pictures that a task has on its device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

from torch import Tensor

from lit_defect.reporting.sheets import Cell, Words, sheet

_SIZE, _LETTER = 160, 8  # pixels of a panel, and of a letter


def picture_sheet(path: Path, panels: Sequence[Tensor], captions: Sequence[str], title: str, columns: int = 6) -> None:
    """Write a sheet with a cell for each row of a batch.

    Args:
        path: the PNG.
        panels: pictures (B, 3, H, W) in [0, 1] that stand side by side in a cell.
        captions: of the cells; long ones are wrapped.
        title: above all.
        columns: cells in a row.
    """
    pixels = [(255 * panel.float()).round().byte().permute(0, 2, 3, 1).cpu().numpy() for panel in panels]
    letters = (_SIZE * len(panels)) // _LETTER
    cells = [
        Cell(list(row), [[Words(line)] for line in wrap(caption, letters)])
        for *row, caption in zip(*pixels, captions, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet(cells, title=title, columns=columns, size=_SIZE).save(path)
