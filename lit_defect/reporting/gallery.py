"""Galleries of pictures with captions, such as a classifier's worst mistakes with their heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from lit_defect.reporting.sheets import Cell, Picture, Words, sheet
from lit_defect.reporting.style import DEFECTIVE, INK, MUTED


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
    return sheet([_cell(tile) for tile in tiles], title=title, columns=columns, size=size)


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


def _cell(tile: Tile) -> Cell:
    heat = [] if tile.heat is None else [overlay_heat(tile.picture, tile.heat)]
    colour = INK if tile.truth == tile.predicted else DEFECTIVE
    caption = (
        [Words(tile.name, MUTED, shrink=True)],
        [Words("true ", MUTED), Words(tile.truth, bold=True, shrink=True)],
        [
            Words("called ", MUTED),
            Words(tile.predicted, colour, bold=True, shrink=True),
            Words(f", {_percent(tile.probability)}"),
        ],
    )
    return Cell([tile.picture, *heat], caption)


def _percent(probability: float) -> str:
    """Never "100 %" for what is not certain."""
    if 0.995 <= probability < 1:
        return ">99 %"
    return f"{100 * probability:.0f} %"
