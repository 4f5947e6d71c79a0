"""Shapes of masks: brought to another size, and changed a little, without losing the small and the thin ones."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

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
_MORE = 2.0  # times the area; many specks would fill a small mask
_DETAIL = 2  # pixels of a real mask per pixel of the picture that are looked at, along each side


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
    """A mask (H, W) brought to `size` (height, width), the share of the picture kept of each of its parts.

    Each part (neighbours by edge or corner) stays, were it smaller than a pixel; the largest come first, and where
    specks would make the mask more than `_MORE` times as large, the smallest go.
    """
    if mask.shape == size:
        return mask
    parts, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    boxes = ndimage.find_objects(parts)
    areas = np.bincount(parts.ravel())[1:]
    fitted: Bools = np.zeros(size, dtype=np.bool_)
    count, most = 0, _MORE * mask.mean() * fitted.size
    for number in np.argsort(-areas, kind="stable"):
        if count and count >= most:
            break
        rows, columns = (
            _reach(span, full, new) for span, full, new in zip(boxes[number], mask.shape, size, strict=True)
        )
        window = fitted[rows.new, columns.new]
        added = keep_area(_scaled(parts, number + 1, rows, columns)) & ~window
        window |= added
        count += int(added.sum())
    return fitted


class _Reach(NamedTuple):
    """A range of new rows (or columns), and what it is of the old ones."""

    new: slice
    old: tuple[float, float]


def _reach(span: slice, full: int, new: int) -> _Reach:
    """The new rows around a span of the `full` old ones, of which there are to be `new`."""
    step = full / new
    first, last = max(0, math.floor(span.start / step) - 2), min(new, math.ceil(span.stop / step) + 2)
    return _Reach(slice(first, last), (first * step, min(full, last * step)))


def _scaled(parts: Any, number: int, rows: _Reach, columns: _Reach) -> Floats:
    """(h, w) the share of each of the new pixels that a part covers; parts (H, W) holds their numbers."""
    size = rows.new.stop - rows.new.start, columns.new.stop - columns.new.start
    (top, bottom), (left, right) = rows.old, columns.old
    shrinks = size[0] <= bottom - top and size[1] <= right - left
    method = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
    y, x = math.floor(top), math.floor(left)
    seen = parts[y : math.ceil(bottom), x : math.ceil(right)] == number
    window = Image.fromarray(seen.astype(np.float32))
    box = (left - x, top - y, min(right - x, window.width), min(bottom - y, window.height))
    return np.asarray(window.resize(size[::-1], method, box), dtype=np.float64)


def vary(mask: Bools, size: tuple[int, int], rng: np.random.Generator) -> tuple[Bools, Bools]:
    """A variant of a mask's shape: flipped, turned, scaled and bent at random.

    Where the mask touches an edge of its picture it is taken to go on beyond, and the variant is cut there again: a
    band from edge to edge stays one when it is turned.

    Args:
        mask: (H, W), not empty.
        size: (height, width) of the picture that it is for.
        rng: the randomness.

    Returns:
        (h, w) bool, the shape alone, cut where it is larger than the picture, empty where bending took a thin rim
        beyond the edge; and (2, 2) bool, the edges that it is to
        touch: top and bottom, left and right.
    """
    if mask.shape[0] > _DETAIL * size[0] or mask.shape[1] > _DETAIL * size[1]:
        mask = fit_mask(mask, (_DETAIL * size[0], _DETAIL * size[1]))
    flips = rng.random(2) < 0.5
    turn, grow = rng.uniform(-TURN, TURN), SCALE ** rng.uniform(-1, 1)
    knots = rng.normal(size=(2, KNOTS, KNOTS))
    first, last = _ends(mask)
    edges = np.stack([first == 0, last == np.array(mask.shape) - 1], axis=1)
    edges = np.where(flips[:, None], edges[:, ::-1], edges)
    spans: Bools = np.all(edges, axis=1)  # and still will
    stretch = np.array(size) / mask.shape * np.where(spans, 1.0, grow)  # of the source's pixels

    half = (last - first + 1) * stretch / 2
    bend = BEND * 2 * float(np.linalg.norm(half))
    cos, sin = abs(math.cos(turn)), abs(math.sin(turn))
    box = np.ceil(2 * np.array([[cos, sin], [sin, cos]]) @ half + 6 * bend).astype(int) + 2
    box += (box + np.rint(2 * half).astype(int)) % 2  # so that upright edges lie between two pixels
    fine = max(1, math.ceil(1 / stretch.min()))  # no pixel of the source is passed over
    points = _points(box, fine)
    points = points + bend * _smooth(knots, points.shape[1:])
    read = _read(mask, (first + last) / 2, points, turn, np.where(flips, -stretch, stretch))
    coverage = read.reshape(box[0], fine, box[1], fine).mean(axis=(1, 3))
    shape = keep_area(coverage[np.ix_(*(_within(*sides) for sides in zip(box, half, edges, strict=True)))])
    return _cut(_trimmed(shape, spans), size), edges


def _read(mask: Bools, centre: Floats, points: Floats, turn: float, stretch: Floats) -> Floats:
    """(h, w) what a mask has at points (2, h, w) counted from its `centre` (2,) after stretch (2,) and turn."""
    y, x = points
    back = np.stack([math.cos(turn) * y - math.sin(turn) * x, math.sin(turn) * y + math.cos(turn) * x])
    place = back / stretch[:, None, None] + centre[:, None, None]
    return np.asarray(ndimage.map_coordinates(mask.astype(np.float64), place, order=1, mode="nearest"))


def _ends(mask: Bools) -> tuple[NDArray[np.int_], NDArray[np.int_]]:
    """First and last row and column (2,) of what a mask marks."""
    marked = [np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0)]
    return np.array([found[0] for found in marked]), np.array([found[-1] for found in marked])


def _within(side: int, half: float, edges: Bools) -> Bools:
    """Which pixels (side,) of a box lie within the picture, whose edges, where touched, are `half` from its middle."""
    centres = np.arange(side) + 0.5 - side / 2
    return np.asarray((~edges[0] | (centres > -half)) & (~edges[1] | (centres < half)))


def _points(box: NDArray[np.int_], fine: int) -> Floats:
    """(2, h * fine, w * fine) y and x from the centre of a box (h, w), `fine` points along each pixel."""
    y, x = ((np.arange(side * fine) + 0.5) / fine - side / 2 for side in box)
    return np.stack(np.meshgrid(y, x, indexing="ij"))


def _smooth(knots: Floats, shape: tuple[int, ...]) -> Floats:
    """(2, h, w) values that run smoothly through those of a coarse grid (2, KNOTS, KNOTS)."""
    y, x = (np.linspace(0, KNOTS - 1, side) for side in shape)
    grid = np.stack(np.meshgrid(y, x, indexing="ij"))
    return np.stack([ndimage.map_coordinates(values, grid, order=3, mode="nearest") for values in knots])


def _trimmed(shape: Bools, spans: Bools) -> Bools:
    """A shape without empty rows and columns around it, but not along an axis on which it spans the picture."""
    if not shape.any():
        return shape
    first, last = _ends(shape)
    first, last = np.where(spans, 0, first), np.where(spans, np.array(shape.shape) - 1, last)
    return shape[first[0] : last[0] + 1, first[1] : last[1] + 1]


def _cut(shape: Bools, size: tuple[int, int]) -> Bools:
    """The middle of a shape, no larger than `size`."""
    top, left = (max(0, (have - room) // 2) for have, room in zip(shape.shape, size, strict=True))
    return shape[top : top + size[0], left : left + size[1]]
