"""A generated defect goes into the normal picture at that picture's own size; outside the mask no pixel changes."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from lit_defect.generation.files import Bools, Picture
from lit_defect.generation.mask_shapes import fit_mask

_NEAR = 1.5  # radii of a disc around its middle that reach into the corners of a square around it

Floats = NDArray[np.floating]


def paste_back(
    normal: Picture,
    generated: Floats,
    mask: Bools,
    feather: float,
    reconstructed: Floats | None = None,
    gain: float = 1.0,
) -> tuple[Picture, Bools]:
    """Blend the inside of the mask into the normal picture.

    With `reconstructed` it is the change that goes in, generated minus reconstructed, added to the normal picture: what
    the autoencoder and the smaller size have lost of its grain stays, and where nothing was generated nothing changes.

    Where the normal picture is grey (three equal channels) the defect becomes grey, too: a tint would give it away.

    Args:
        normal: (H, W, 3) uint8.
        generated: (h, w, 3) in [0, 1]; what is not a number leaves the normal picture as it is.
        mask: (h, w) bool.
        feather: pixels of the normal picture from the mask's border to where only the generated picture counts.
        reconstructed: (h, w, 3) in [0, 1], the normal picture as the autoencoder gives it back; None to put in the
            generated picture itself.
        gain: factor of the change.

    Returns:
        The picture (H, W, 3) uint8, equal to `normal` outside the mask; and the mask (H, W) bool.
    """
    size = normal.shape[:2]
    large, result = fit_mask(mask, size), normal.copy()
    if not large.any():
        return result, large
    box = _around(large)  # a defect is a small part of a large picture, whose other pixels cost most of the time
    before = normal[box]
    defect = _resized(generated, size, box) * 255
    if reconstructed is not None:
        defect = before + gain * (defect - _resized(reconstructed, size, box) * 255)
    if (normal == normal[..., :1]).all():
        defect = np.repeat(defect.mean(axis=2, keepdims=True), 3, axis=2)
    weight = feathered(large, feather)[box][..., None]
    blended = np.where(np.isfinite(defect), weight * defect + (1 - weight) * before, before)
    result[box] = np.where(large[box][..., None], np.rint(blended).clip(0, 255), before).astype(np.uint8)
    return result, large


def feathered(mask: Bools, feather: float) -> NDArray[np.float64]:
    """(H, W) weights: 0 outside a mask (H, W), rising from its border to 1 `feather` pixels inside.

    Where the mask is too thin for that, weights rise faster, so that its middle has 1 everywhere: of a crack of two
    pixels no less remains than of a large stain. The picture's frame is no border.
    """
    if not mask.any() or feather <= 0:
        return mask.astype(np.float64)
    weights = np.zeros(mask.shape)
    box = _around(mask)
    weights[box] = _feathered(mask[box], feather)
    return weights


def _feathered(mask: Bools, feather: float) -> NDArray[np.float64]:
    depth = np.asarray(ndimage.distance_transform_edt(mask)) if not mask.all() else np.full(mask.shape, np.inf)
    reach = np.full(mask.shape, 0.5)  # from the border to the middle of the largest disc within the mask near a pixel
    for radius in range(1, math.ceil(feather) + 2):
        middles = depth >= radius
        if not middles.any():
            break
        near = np.asarray(ndimage.distance_transform_edt(~middles)) < _NEAR * radius
        reach[near] = radius - 0.5
    weights = np.where(mask, np.clip((depth - 0.5) / np.minimum(reach, feather), 0, 1), 0.0)
    parts, _ = ndimage.label(mask)
    highest = ndimage.maximum(weights, parts, np.arange(parts.max() + 1))
    return np.asarray(weights / np.where(mask, highest[parts], 1.0))  # a speck beside a stain has a middle, too


def _around(mask: Bools) -> tuple[slice, slice]:
    """The box of a mask (H, W), a pixel wider on each side where the picture is: distances in it are the same."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return slice(max(0, rows[0] - 1), rows[-1] + 2), slice(max(0, columns[0] - 1), columns[-1] + 2)


def repair_label(normal: Picture, result: Picture, mask: Bools, least: float) -> Bools:
    """Where the picture has really changed within the mask; what a change encloses belongs to it, as annotators see it.

    Args:
        normal, result: (H, W, 3) uint8.
        mask: (H, W) bool.
        least: grey levels, mean over the channels, from which on a pixel has changed.

    Returns:
        (H, W) bool, a part of the mask, which may be empty.
    """
    label = np.zeros_like(mask)
    if mask.any():
        box = _around(mask)
        difference = np.abs(result[box].astype(np.int16) - normal[box]).mean(axis=2)
        changed = np.pad((difference >= least) & mask[box], 1)  # the frame must not hinder the closing
        closed = ndimage.binary_fill_holes(ndimage.binary_closing(changed, structure=np.ones((3, 3))))[1:-1, 1:-1]
        label[box] = closed & mask[box]
    return label


def _resized(picture: Floats, size: tuple[int, int], box: tuple[slice, slice]) -> NDArray[np.float64]:
    """The box of (h, w, 3) at `size`: bicubic when enlarged, antialiased when reduced; values stay between 0 and 1."""
    if picture.shape[:2] == size:
        return picture[box].astype(np.float64)
    channels = [
        Image.fromarray(np.ascontiguousarray(channel, dtype=np.float32)) for channel in np.moveaxis(picture, 2, 0)
    ]
    scaled = [np.asarray(one.resize((size[1], size[0]), Image.Resampling.BICUBIC))[box] for one in channels]
    return np.clip(np.stack(scaled, axis=2).astype(np.float64), 0, 1)
