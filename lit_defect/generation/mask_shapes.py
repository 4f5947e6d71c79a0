"""Shapes of masks: brought to another size, and changed a little, without losing the small and the thin ones."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from lit_defect.generation.files import Bools

Floats = NDArray[np.float64]

TURN = math.radians(20)  # either way; the authors of AnomalyDiffusion augment so, and flip
SCALE = 1.25  # larger or smaller, as a factor
BEND = 0.04  # standard deviation of the elastic shifts, of the shape's diagonal
KNOTS = 4  # of the grid of elastic shifts, along each side
_DETAIL = 4  # pixels of a real mask per pixel of the picture that are looked at, along each side


def keep_area(coverage: Floats) -> Bools:
    """The pixels (H, W) that a shape covers most, as many as its area makes, at least one; pixels alike share a fate.

    For a large shape that is a threshold of a half, which would lose small and thin ones.

    Args:
        coverage: (H, W), the share of each pixel that the shape covers.
    """
    coverage = coverage.round(6)  # pixels alike but for rounding
    count = max(1, round(float(coverage.sum())))
    least = np.partition(coverage.ravel(), -count)[-count]
    return np.asarray((coverage >= least) & (coverage > 0))


def fit_mask(mask: Bools, size: tuple[int, int]) -> Bools:
    """A mask (H, W) brought to `size` (height, width), its share of the picture kept."""
    if mask.shape == size:
        return mask
    shrinks = size[0] <= mask.shape[0] and size[1] <= mask.shape[1]
    method = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
    image = Image.fromarray(mask.astype(np.float32))
    return keep_area(np.asarray(image.resize((size[1], size[0]), method), dtype=np.float64))


def vary(mask: Bools, size: tuple[int, int], rng: np.random.Generator) -> tuple[Bools, tuple[bool, ...]]:
    """A variant of a mask's shape: flipped, turned, scaled and bent at random.

    Args:
        mask: (H, W), not empty.
        size: (height, width) of the picture that it is for.
        rng: the randomness.

    Returns:
        (h, w) bool, the shape alone, cut where it is larger than the picture; and which edges of the picture the
        mask touched: top, bottom, left, right, after the flips.
    """
    if mask.shape[0] > _DETAIL * size[0] or mask.shape[1] > _DETAIL * size[1]:
        mask = fit_mask(mask, (_DETAIL * size[0], _DETAIL * size[1]))
    flips = rng.random(2) < 0.5
    turn, grow = rng.uniform(-TURN, TURN), SCALE ** rng.uniform(-1, 1)
    knots = rng.normal(size=(2, KNOTS, KNOTS))
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    stretch = np.array(size) / mask.shape * grow  # of the source's pixels
    extent = np.array([rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1])
    centre = np.array([rows[0] + rows[-1], columns[0] + columns[-1]]) / 2

    cos, sin = math.cos(turn), math.sin(turn)
    turned = np.abs(np.array([[cos, sin], [-sin, cos]])) @ (extent * stretch)
    diagonal = float(np.linalg.norm(extent * stretch))
    box = np.ceil(turned + 6 * BEND * diagonal).astype(int) + 2
    fine = max(1, math.ceil(1 / stretch.min()))  # no pixel of the source is passed over
    at = _points(box, fine)  # (2, h, w) from the centre of the box, in pixels of the picture
    at = at + _bend(knots, at.shape[1:]) * BEND * diagonal
    back = np.stack([cos * at[0] - sin * at[1], sin * at[0] + cos * at[1]])
    sign = np.where(flips, -1, 1)
    place = centre[:, None, None] + (sign / stretch)[:, None, None] * back
    read = ndimage.map_coordinates(mask.astype(np.float64), place, order=1, mode="grid-constant")
    coverage = read.reshape(box[0], fine, box[1], fine).mean(axis=(1, 3))
    shape = _trimmed(keep_area(coverage))

    touched = [mask[0].any(), mask[-1].any(), mask[:, 0].any(), mask[:, -1].any()]
    edges = (*(touched[1::-1] if flips[0] else touched[:2]), *(touched[:1:-1] if flips[1] else touched[2:]))
    return _cut(shape, size), tuple(bool(edge) for edge in edges)


def _points(box: NDArray[np.int_], fine: int) -> Floats:
    """(2, h * fine, w * fine) y and x from the centre of a box (h, w), `fine` points along each pixel."""
    y, x = ((np.arange(side * fine) + 0.5) / fine - side / 2 for side in box)
    return np.stack(np.meshgrid(y, x, indexing="ij"))


def _bend(knots: Floats, shape: tuple[int, ...]) -> Floats:
    """(2, h, w) shifts that run smoothly through those of a coarse grid (2, KNOTS, KNOTS)."""
    y, x = (np.linspace(0, KNOTS - 1, side) for side in shape)
    grid = np.stack(np.meshgrid(y, x, indexing="ij"))
    return np.stack([ndimage.map_coordinates(shifts, grid, order=3, mode="nearest") for shifts in knots])


def _trimmed(shape: Bools) -> Bools:
    rows, columns = np.flatnonzero(shape.any(axis=1)), np.flatnonzero(shape.any(axis=0))
    return shape[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _cut(shape: Bools, size: tuple[int, int]) -> Bools:
    """The middle of a shape, no larger than `size`."""
    top, left = (max(0, (have - room) // 2) for have, room in zip(shape.shape, size, strict=True))
    return shape[top : top + size[0], left : left + size[1]]
