"""Galleries of pictures with captions, such as a classifier's worst mistakes with their heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from lit_defect.reporting.style import DEFECTIVE, GREY, INK, MUTED

Picture = NDArray[np.uint8]

_GAP, _MARGIN, _FONT = 16, 24, 14
_ELLIPSIS = "…"


@dataclass(frozen=True)
class Tile:
    """One sample of a gallery.

    Attributes:
        picture: (H, W, 3) uint8.
        name: of the file.
        truth: the true class.
        predicted: the predicted class.
        probability: of the predicted class.
        heat: (h, w) in [0, 1], a class-activation map shown beside the picture; None for none.
    """

    picture: Picture
    name: str
    truth: str
    predicted: str
    probability: float
    heat: NDArray[np.floating] | None = None


def worst_mistakes(probs: ArrayLike, labels: ArrayLike, count: int) -> NDArray[np.int64]:
    """Positions of at most `count` wrong predictions, the least probable truth first.

    Args:
        probs: (n, C) probabilities.
        labels: (n,) class indices.
        count: at most so many.
    """
    p, y = np.asarray(probs, dtype=np.float64), np.asarray(labels)
    wrong = np.flatnonzero(p.argmax(axis=1) != y)
    order = np.argsort(p[wrong, y[wrong]], kind="stable")
    return np.asarray(wrong[order][:count], dtype=np.int64)


def gallery(tiles: Sequence[Tile], *, title: str, columns: int = 3, size: int = 224) -> Image.Image:
    """Draw the tiles in rows: picture, heat map beside it, and below name, truth and prediction.

    Args:
        tiles: in the order of reading; without any, the gallery says that there is nothing to show.
        title: above all.
        columns: tiles in a row, at most.
        size: side in pixels of the square into which each picture is fitted.
    """
    columns = max(1, min(columns, len(tiles)))
    rows = -(-len(tiles) // columns)
    panels = 2 if any(tile.heat is not None for tile in tiles) else 1
    regular, bold, heading = (
        _font("DejaVuSans"),
        _font("DejaVuSans-Bold"),
        _font("DejaVuSans-Bold", _FONT + 4),
    )
    line = _FONT + 7
    width = panels * size + (panels - 1) * 4
    height = size + 8 + 3 * line
    title_lines = _wrap(title, heading, max(columns * (width + _GAP) - _GAP, 420))
    top = _MARGIN + len(title_lines) * (line + 6) + 10
    full = max(columns * (width + _GAP) - _GAP, 420) + 2 * _MARGIN
    body = rows * (height + _GAP) - _GAP if tiles else line
    canvas = Image.new("RGB", (full, top + body + _MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for i, text in enumerate(title_lines):
        draw.text((_MARGIN, _MARGIN + i * (line + 6)), text, font=heading, fill=INK)
    if not tiles:
        draw.text((_MARGIN, top), "nothing to show", font=regular, fill=MUTED)

    for i, tile in enumerate(tiles):
        x = _MARGIN + (i % columns) * (width + _GAP)
        y = top + (i // columns) * (height + _GAP)
        _paste(canvas, tile.picture, (x, y), size)
        if tile.heat is not None:
            _paste(canvas, overlay_heat(tile.picture, tile.heat), (x + size + 4, y), size)
        y += size + 6
        draw.text((x, y), _fit(tile.name, regular, width), font=regular, fill=MUTED)
        colour = INK if tile.truth == tile.predicted else DEFECTIVE
        called = ("called ", tile.predicted, f", {_percent(tile.probability)}", colour)
        for row, (word, name, after, colour) in enumerate((("true ", tile.truth, "", INK), called), start=1):
            start = x + regular.getlength(word)
            room = width - regular.getlength(word) - regular.getlength(after)
            shown = _fit(name, bold, room)
            draw.text((x, y + row * line), word, font=regular, fill=MUTED)
            draw.text((start, y + row * line), shown, font=bold, fill=colour)
            draw.text((start + bold.getlength(shown), y + row * line), after, font=regular, fill=INK)
    return canvas


def overlay_heat(picture: Picture, heat: ArrayLike, strength: float = 0.55) -> Picture:
    """Lay a heat map over a picture: where it is cold, the grey picture shows through.

    Args:
        picture: (H, W, 3) uint8.
        heat: (h, w) in [0, 1], stretched to the picture.
        strength: opacity where the map is 1.
    """
    values = np.clip(np.nan_to_num(np.asarray(heat, dtype=np.float32)), 0, 1)
    side = (picture.shape[1], picture.shape[0])
    warm = np.asarray(Image.fromarray(values).resize(side, Image.Resampling.BILINEAR))[..., None]
    colour = matplotlib.colormaps["inferno"](warm[..., 0])[..., :3] * 255
    grey = picture.mean(axis=2, keepdims=True)
    opacity = strength * np.sqrt(warm)
    return np.asarray(np.round(grey * (1 - opacity) + colour * opacity), dtype=np.uint8)


def _paste(canvas: Image.Image, picture: Picture, corner: tuple[int, int], size: int) -> None:
    """Fit a picture into the square of side `size`, centred on pale grey, without changing its shape."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    scale = size / max(image.size)
    fitted = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    enlarged = scale > 2  # show the pixels of small pictures as they are
    image = image.resize(fitted, Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)
    x, y = corner
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((x, y, x + size - 1, y + size - 1), fill="#F2F2F2")
    canvas.paste(image, (x + (size - fitted[0]) // 2, y + (size - fitted[1]) // 2))
    draw.rectangle((x, y, x + size - 1, y + size - 1), outline=GREY)


def _percent(probability: float) -> str:
    """Never "100 %" for what is not certain."""
    if 0.995 <= probability < 1:
        return ">99 %"
    return f"{100 * probability:.0f} %"


def _font(name: str, size: int = _FONT) -> ImageFont.FreeTypeFont:
    """DejaVu, which matplotlib brings along, so that pictures look the same on every machine."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", size)


def _fit(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """Shorten a text in the middle until it is no wider than `room` pixels."""
    if font.getlength(text) <= room:
        return text
    for kept in range(len(text) - 1, 1, -1):
        short = text[: kept - kept // 2] + _ELLIPSIS + text[len(text) - kept // 2 :]
        if font.getlength(short) <= room:
            return short
    return _ELLIPSIS


def _wrap(text: str, font: ImageFont.FreeTypeFont, room: float) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= room:
            lines[-1] += f" {word}"
        else:
            lines.append(_fit(word, font, room))
    return lines
