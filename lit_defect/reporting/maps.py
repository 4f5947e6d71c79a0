"""Maps of anomaly scores: written to files that give the scores back, and drawn over their pictures.

A map holds one score per pixel, higher where the picture is stranger, on whatever scale its scorer has. Two kinds
of file, told apart by the suffix:

    .npy             float32, every bit of it
    .tif, .tiff      grey of 16 bits, which image viewers open: level = round(score / full_scale * 65535)

The TIFF says in its ImageDescription, as JSON, which score the white is; scores beyond black or white are held
there and counted. `read_map` gives the scores of either file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from scipy import ndimage

from lit_defect.errors import UserError
from lit_defect.files import whole_file
from lit_defect.reporting.gallery import overlay_heat
from lit_defect.reporting.sheets import Picture

Map = NDArray[np.float32]
Scale = tuple[float, float]
"""The scores at which the colours begin and end."""

LEVELS = 65535
CONTOUR = "#56E0F5"  # on none of the heat's colours, nor on most materials
_TIFF = (".tif", ".tiff")
_DESCRIPTION = 270  # TIFF tag ImageDescription
_KIND = "lit_defect score map"


def write_map(path: Path, scores: ArrayLike, *, full_scale: float | None = None) -> int:
    """Write a score map, so that a reader sees the whole file or none; folders are made.

    Args:
        path: ends in .npy, .tif or .tiff.
        scores: (H, W).
        full_scale: the score that is white in a TIFF; one for all maps that are to be compared. Needed there,
            without meaning for .npy.

    Returns:
        How many pixels lie below 0 or above `full_scale` and were held at black or white; 0 for .npy.

    Raises:
        UserError: nan among the scores, or a scale that is none.
        ValueError: not a (H, W) map, another suffix, or a TIFF without a scale.
    """
    values = np.asarray(scores, dtype=np.float32)
    suffix = path.suffix.lower()
    if values.ndim != 2 or not values.size:
        raise ValueError(f"expected a score map of shape (H, W), not {values.shape}")
    if suffix not in (".npy", *_TIFF):
        raise ValueError(f"{path}: score maps are written as .npy, .tif or .tiff")
    if np.isnan(values).any():
        raise UserError(f"{path}: the score map contains nan; the training diverged, or the picture holds nan")
    if suffix == ".npy":
        with whole_file(path) as file:
            np.save(file, values, allow_pickle=False)
        return 0
    if full_scale is None:
        raise ValueError(f"{path}: a TIFF needs the score that is its white, full_scale")
    if not (math.isfinite(full_scale) and full_scale > 0):
        raise UserError(f"{path}: white cannot be the score {full_scale}; a finite number above 0 is needed")
    return _write_tiff(path, values, float(full_scale))


def read_map(path: Path) -> Map:
    """The scores (H, W) float32 of a file that `write_map` wrote; of a TIFF within half a level of what they were.

    Raises:
        UserError: no such file, or not a score map.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        values, scale = _read_tiff(path) if path.suffix.lower() in _TIFF else (np.load(path, allow_pickle=False), None)
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no score map ({error})") from None
    if values.ndim != 2 or values.dtype != (np.float32 if scale is None else np.uint16):
        raise UserError(f"{path} is no score map, but an array of shape {values.shape} and type {values.dtype}")
    return values if scale is None else (values * (scale / LEVELS)).astype(np.float32)


def colour_scale(maps: Iterable[ArrayLike]) -> Scale:
    """Where the colours begin and end so that maps of one scorer can be compared with each other.

    They begin at the typical pixel (the median of the maps' medians), so that the picture shows through there, and
    end at the largest of the maps' 99.5 % quantiles: one stray pixel does not darken the others.
    """
    finite = [values[np.isfinite(values)] for values in (np.asarray(scores, dtype=np.float64) for scores in maps)]
    quantiles = np.array([np.quantile(values, (0.5, 0.995)) for values in finite if values.size])
    if not len(quantiles):
        return 0.0, 1.0
    low, high = float(np.median(quantiles[:, 0])), float(quantiles[:, 1].max())
    return low, high if high > low else low + 1.0  # all the same: nothing stands out, and nothing is drawn warm


def overlay(
    picture: Picture,
    scores: ArrayLike,
    *,
    scale: Scale | None = None,
    threshold: float | None = None,
    line: int | None = None,
) -> Picture:
    """Lay a score map over its picture, with a line around what reaches the threshold.

    Args:
        picture: (H, W, 3) uint8.
        scores: (h, w), stretched to the picture.
        scale: scores at which the colours begin and end; without it, those of `colour_scale` for this map alone.
        threshold: on a pixel's score.
        line: its width in pixels; without it, one that suits the picture's size.

    Returns:
        (H, W, 3) uint8.
    """
    values = np.asarray(scores, dtype=np.float32)
    low, high = scale or colour_scale([values])
    mixed = overlay_heat(picture, (values - low) / (high - low))
    if threshold is None:
        return mixed
    side = (picture.shape[1], picture.shape[0])
    stretched = np.asarray(Image.fromarray(values).resize(side, Image.Resampling.BILINEAR))
    return outline(mixed, stretched >= threshold, CONTOUR, line)


def outline(picture: Picture, region: ArrayLike, colour: str, line: int | None = None) -> Picture:
    """Draw a line around a region, just outside of it, so that also a region of one pixel stays visible.

    Args:
        picture: (H, W, 3) uint8.
        region: (H, W), not 0 inside.
        colour: of the line, as #RRGGBB.
        line: its width in pixels; without it, one that suits the picture's size.

    Returns:
        (H, W, 3) uint8, a copy. A dark seam on the outside keeps the line visible on any ground.
    """
    inside = np.asarray(region, dtype=bool)
    width = max(1, round(max(inside.shape) / 300)) if line is None else line
    around = _grown(inside, width)
    drawn = picture.copy()
    drawn[_grown(around, (width + 1) // 2) & ~around] //= 3
    # Where the region touches the picture's edge, there is no outside: the line runs within.
    within = inside & ~_shrunk(inside, width, beyond=False) & _shrunk(inside, width, beyond=True)
    drawn[(around & ~inside) | within] = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return drawn


def _grown(region: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    return np.asarray(ndimage.maximum_filter(region, size=2 * width + 1, mode="constant", cval=0))


def _shrunk(region: NDArray[np.bool_], width: int, *, beyond: bool) -> NDArray[np.bool_]:
    """The region without its edge; `beyond`: whether the region goes on outside of the picture."""
    return np.asarray(ndimage.minimum_filter(region, size=2 * width + 1, mode="constant", cval=beyond))


def _write_tiff(path: Path, values: Map, full_scale: float) -> int:
    saturated = int(((values < 0) | (values > full_scale)).sum())
    levels = np.rint(np.clip(values.astype(np.float64) / full_scale, 0, 1) * LEVELS).astype(np.uint16)
    description = {"kind": _KIND, "full_scale": full_scale, "levels": LEVELS, "saturated": saturated}
    with whole_file(path) as file:
        tags = {_DESCRIPTION: json.dumps(description)}
        Image.fromarray(levels).save(file, format="TIFF", compression="tiff_adobe_deflate", tiffinfo=tags)
    return saturated


def _read_tiff(path: Path) -> tuple[NDArray[Any], float]:
    with Image.open(path) as image:
        description = json.loads(image.tag_v2.get(_DESCRIPTION, "{}"))  # type: ignore[attr-defined]
        if description.get("kind") != _KIND:
            raise ValueError("its ImageDescription tells no scale")
        return np.asarray(image), float(description["full_scale"])
