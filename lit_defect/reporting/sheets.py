"""Sheets of pictures: cells in a grid, each some panels side by side above lines of caption.

What a gallery shows is decided by its caller, which makes one `Cell` for each sample; here is only how a sheet
is laid out: title, an optional key below it, then the cells row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from lit_defect.reporting.style import GREY, INK, MUTED

Picture = NDArray[np.uint8]
Font = ImageFont.FreeTypeFont

LINE = 21  # pixels from one line of text to the next
_GAP, _MARGIN = 16, 24
SEAM = 4  # pixels between the panels of a cell
_FONT = 14
_LEAST_WIDTH = 420
_ELLIPSIS = "…"
_PAPER = "#F2F2F2"  # around a picture that is not square


@dataclass(frozen=True)
class Words:
    """Words of one style within a line; of a line too long, those that may `shrink` lose their middle."""

    text: str
    colour: str = INK
    bold: bool = False
    shrink: bool = False


@dataclass(frozen=True)
class Cell:
    """One sample: panels, each a picture (H, W, 3) uint8 or a word instead of one, and lines of words."""

    panels: Sequence[Picture | str]
    caption: Sequence[Sequence[Words]]


def sheet(cells: Sequence[Cell], *, title: str, columns: int, size: int, key: Image.Image | None = None) -> Image.Image:
    """Draw the cells in rows.

    Args:
        cells: in the order of reading; without any, the sheet says that there is nothing to show.
        title: above all.
        columns: cells in a row, at most.
        size: side in pixels of the square into which each panel is fitted.
        key: drawn below the title.
    """
    columns = max(1, min(columns, len(cells)))
    rows = -(-len(cells) // columns)
    panels = max((len(cell.panels) for cell in cells), default=1)
    width = panels * size + (panels - 1) * SEAM
    height = size + 8 + LINE * max((len(cell.caption) for cell in cells), default=0)
    full = max(columns * (width + _GAP) - _GAP, _LEAST_WIDTH, key.width if key else 0)
    heading = font(bold=True, size=_FONT + 4)
    lines = _wrap(title, heading, full)
    top = _MARGIN + len(lines) * (LINE + 6) + 10 + (key.height + 14 if key else 0)
    body = rows * (height + _GAP) - _GAP if cells else LINE
    canvas = Image.new("RGB", (full + 2 * _MARGIN, top + body + _MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for i, text in enumerate(lines):
        draw.text((_MARGIN, _MARGIN + i * (LINE + 6)), text, font=heading, fill=INK)
    if key:
        canvas.paste(key, (_MARGIN, top - key.height - 14))
    if not cells:
        draw.text((_MARGIN, top), "nothing to show", font=font(), fill=MUTED)
    for i, cell in enumerate(cells):
        corner = _MARGIN + (i % columns) * (width + _GAP), top + (i // columns) * (height + _GAP)
        _draw_cell(canvas, cell, corner, size, width)
    return canvas


def font(*, bold: bool = False, size: int = _FONT) -> Font:
    """DejaVu, which matplotlib brings along, so that pictures look the same on every machine."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def fit(picture: Picture, size: int) -> Picture:
    """The picture (H, W, 3), fitted into a square of side `size`; a much enlarged one shows its pixels."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    scale = size / max(image.size)
    fitted = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return np.asarray(image.resize(fitted, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS))


def _draw_cell(canvas: Image.Image, cell: Cell, corner: tuple[int, int], size: int, width: int) -> None:
    x, y = corner
    for i, panel in enumerate(cell.panels):
        _draw_panel(canvas, panel, (x + i * (size + SEAM), y), size)
    for i, line in enumerate(cell.caption):
        _draw_line(ImageDraw.Draw(canvas), line, (x, y + size + 6 + i * LINE), width)


def _draw_panel(canvas: Image.Image, panel: Picture | str, corner: tuple[int, int], size: int) -> None:
    """A picture centred on pale grey, or a word there."""
    x, y = corner
    frame = (x, y, x + size - 1, y + size - 1)
    draw = ImageDraw.Draw(canvas)
    draw.rectangle(frame, fill=_PAPER)
    if isinstance(panel, str):
        draw.text((x + size / 2, y + size / 2), panel, font=font(), fill=MUTED, anchor="mm")
    else:
        image = Image.fromarray(fit(panel, size))
        canvas.paste(image, (x + (size - image.width) // 2, y + (size - image.height) // 2))
    draw.rectangle(frame, outline=GREY)


def _draw_line(draw: ImageDraw.ImageDraw, line: Sequence[Words], corner: tuple[int, int], width: float) -> None:
    x: float = corner[0]
    fixed = sum(font(bold=words.bold).getlength(words.text) for words in line if not words.shrink)
    room = (width - fixed) / max(1, sum(words.shrink for words in line))
    for words in line:
        face = font(bold=words.bold)
        text = _shorten(words.text, face, room) if words.shrink else words.text
        draw.text((x, corner[1]), text, font=face, fill=words.colour)
        x += face.getlength(text)


def _shorten(text: str, face: Font, room: float) -> str:
    """Leave out the middle of a text until it is no wider than `room` pixels."""
    if face.getlength(text) <= room:
        return text
    for kept in range(len(text) - 1, 1, -1):
        short = text[: kept - kept // 2] + _ELLIPSIS + text[len(text) - kept // 2 :]
        if face.getlength(short) <= room:
            return short
    return _ELLIPSIS


def _wrap(text: str, face: Font, room: float) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and face.getlength(f"{lines[-1]} {word}") <= room:
            lines[-1] += f" {word}"
        else:
            lines.append(_shorten(word, face, room))
    return lines
