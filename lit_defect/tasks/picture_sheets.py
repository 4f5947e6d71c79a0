"""Sheets of pictures that a task has on its device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from lit_defect.reporting.sheets import Cell, Words, sheet


def picture_sheet(path: Path, panels: Sequence[Tensor], captions: Sequence[str], title: str, columns: int = 6) -> None:
    """Write a sheet with a cell for each row of a batch.

    Args:
        path: the PNG.
        panels: pictures (B, 3, H, W) in [0, 1] that stand side by side in a cell.
        captions: B lines.
        title: above all.
        columns: cells in a row.
    """
    pixels = [(255 * panel.float()).round().byte().permute(0, 2, 3, 1).cpu().numpy() for panel in panels]
    cells = [Cell(list(row), [[Words(caption)]]) for *row, caption in zip(*pixels, captions, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet(cells, title=title, columns=columns, size=160).save(path)
