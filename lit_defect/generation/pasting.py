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


class Place:
    """Where a defect goes into a normal picture; the candidates for it share what does not depend on them.

    With `reconstructed` it is the change that goes in, generated minus reconstructed, added to the normal picture: what
    the autoencoder and the smaller size have lost of its grain stays, and where nothing was generated nothing changes.

    Where the normal picture is grey (three equal channels) the defect becomes grey, too: a tint would give it away.

    Args:
        normal: (H, W, 3) uint8.
        mask: (h, w) bool.
        feather: pixels of the normal picture from the mask's border to where only the generated picture counts.
        reconstructed: (h, w, 3) in [0, 1], the normal picture as the autoencoder gives it back; None to put in the
            generated picture itself.

    Attributes:
        mask: (H, W) bool.
    """

    def __init__(self, normal: Picture, mask: Bools, feather: float, reconstructed: Floats | None = None) -> None:
        self.normal = normal
        self._size = normal.shape[:2]
        self.mask = fit_mask(mask, self._size)
        self._box = _around(self.mask)  # a defect is a small part of a large picture, whose other pixels cost time
        self._weight = feathered(self.mask, feather)[self._box][..., None]
        self._grey = bool((normal == normal[..., :1]).all())
        self._reconstructed = None if reconstructed is None else self.enlarged(reconstructed)

    def enlarged(self, generated: Floats) -> Floats:
        """What `blended` takes of a picture (h, w, 3) in [0, 1]: the mask's box at the normal one's size."""
        return 255 * resized(generated, self._size, self._box)

    def blended(self, enlarged: Floats, gain: float = 1.0) -> Picture:
        """The inside of the mask in the normal picture: (H, W, 3) uint8, equal to `normal` outside the mask.

        Args:
            enlarged: what `enlarged` made of a generated picture; what is not a number leaves the normal one as it is.
            gain: factor of the change.
        """
        before, result = self.normal[self._box], self.normal.copy()
        defect = enlarged if self._reconstructed is None else before + gain * (enlarged - self._reconstructed)
        if self._grey:
            defect = np.repeat(defect.mean(axis=2, keepdims=True), 3, axis=2)
        mixture = np.where(np.isfinite(defect), self._weight * defect + (1 - self._weight) * before, before)
        inside = self.mask[self._box][..., None]
        result[self._box] = np.where(inside, np.rint(mixture).clip(0, 255), before).astype(np.uint8)
        return result


def feathered(mask: Bools, feather: float) -> NDArray[np.float64]:
    """(H, W) weights: 0 outside a mask (H, W), rising from its border to 1 `feather` pixels inside.

    Where the mask is too thin for that, weights rise faster, so that its middle has 1 everywhere: of a crack of two
    pixels no less remains than of a large stain. The picture's frame is no border.
    """
    if feather <= 0 or mask.all():
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
    """The box of a mask (H, W), a pixel wider on each side where the picture is: distances in it are the same.

    Of an empty mask it is a corner.
    """
    spans = []
    for side, axis in zip(mask.shape, (1, 0), strict=True):
        found = np.flatnonzero(mask.any(axis=axis))
        spans.append(slice(max(0, int(found[0]) - 1), min(side, int(found[-1]) + 2)) if len(found) else slice(0, 1))
    return spans[0], spans[1]


def repair_label(normal: Picture, result: Picture, mask: Bools, least: float) -> Bools:
    """Where the picture has really changed within the mask; what a change encloses belongs to it, as annotators see it.

    Args:
        normal, result: (H, W, 3) uint8.
        mask: (H, W) bool.
        least: grey levels, mean over the channels, from which on a pixel has changed.

    Returns:
        (H, W) bool, a part of the mask, which may be empty.
    """
    label, box = np.zeros_like(mask), _around(mask)
    difference = np.abs(result[box].astype(np.int16) - normal[box]).mean(axis=2)
    changed = np.pad((difference >= least) & mask[box], 1)  # the frame must not hinder the closing
    closed = ndimage.binary_fill_holes(ndimage.binary_closing(changed, structure=np.ones((3, 3))))[1:-1, 1:-1]
    label[box] = closed & mask[box]
    return label


def resized(picture: Floats, size: tuple[int, int], box: tuple[slice, slice]) -> NDArray[np.float64]:
    """The box of (h, w, 3) at `size`: bicubic when enlarged, antialiased when reduced; values stay between 0 and 1."""
    if picture.shape[:2] == size:
        return picture[box].astype(np.float64)
    (top, bottom), (left, right) = (
        (span.start * old / new, span.stop * old / new)
        for span, old, new in zip(box, picture.shape[:2], size, strict=True)
    )
    shape = (box[1].stop - box[1].start, box[0].stop - box[0].start)
    channels = [
        Image.fromarray(np.ascontiguousarray(channel, dtype=np.float32)) for channel in np.moveaxis(picture, 2, 0)
    ]
    # The filter also takes what lies around the part, so that its border is as in the whole picture.
    scaled = [one.resize(shape, Image.Resampling.BICUBIC, box=(left, top, right, bottom)) for one in channels]
    return np.clip(np.stack([np.asarray(one) for one in scaled], axis=2).astype(np.float64), 0, 1)
