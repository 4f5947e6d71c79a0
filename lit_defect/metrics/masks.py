"""Counts that every figure of a segmentation follows from: confusion, boundary bands, surface distances.

They are taken once for each image and class, and then only averaged, so that figures, their bootstrap intervals and
comparisons between methods never look at a pixel again.

A mask holds class ids 0..C-1; pixels whose truth is 255 are void. Void pixels belong to no class, in the truth as in
the prediction: whatever a method says there changes nothing, and a region ends where the void begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from lit_defect.errors import UserError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Box = tuple[slice, slice]

VOID = 255


@dataclass(frozen=True)
class MaskCounts:
    """Counts of N images with C classes; those of more images are joined, not added."""

    confusion: Ints
    """(N, C, C) pixels; rows truth, columns prediction."""
    boundary: Ints
    """(N, C, 2) pixels in the intersection and in the union of the two boundary bands."""
    distance: Floats
    """(N, C) Hausdorff distance in pixels, 95th percentile; nan where truth or prediction lack the class."""

    def __len__(self) -> int:
        return len(self.confusion)

    @property
    def classes(self) -> int:
        return self.confusion.shape[1]

    def take(self, rows: ArrayLike) -> MaskCounts:
        """Only these images: their numbers, or (N,) booleans."""
        chosen = np.asarray(rows)
        if chosen.dtype != np.bool_:
            chosen = chosen.astype(np.int64)
        return MaskCounts(self.confusion[chosen], self.boundary[chosen], self.distance[chosen])

    @staticmethod
    def join(parts: Sequence[MaskCounts]) -> MaskCounts:
        """All images of several batches, in order; the images may differ in size."""
        return MaskCounts(
            np.concatenate([part.confusion for part in parts]),
            np.concatenate([part.boundary for part in parts]),
            np.concatenate([part.distance for part in parts]),
        )


def count_masks(
    prediction: ArrayLike, truth: ArrayLike, classes: int, *, band: float = 0.02, distances: bool = True
) -> MaskCounts:
    """Count N images.

    1. Confusion matrix over the pixels that are not void.
    2. Boundary bands (Cheng et al., CVPR 2021): the pixels of a mask at most d from its outside, by d erosions with
       a 3 x 3 square; d is the share `band` of the image diagonal, rounded, at least 1 pixel. As in the reference
       implementation, what lies beyond the image is outside.
    3. Hausdorff distance (Huttenlocher et al., TPAMI 1993) of the two outlines, the larger of the two directed ones,
       with the 95th percentile in place of the maximum (as MONAI; MedPy pools both directions first). The outline
       is made of the pixels with an outside pixel among their four neighbours; distances go between pixel centres.

    Args:
        prediction: (N, H, W) class ids.
        truth: (N, H, W) class ids, 255 where void.
        classes: C.
        band: share of the image diagonal.
        distances: False leaves them nan, and most of the time unspent: for figures that are watched in each epoch.

    Raises:
        ValueError: shapes, types or predicted ids that do not fit.
        UserError: truth with ids that are no class.
    """
    predicted, true = _checked(prediction, truth, classes)
    count, height, width = true.shape
    reach = max(1, round(band * float(np.hypot(height, width))))
    boundary = np.zeros((count, classes, 2), dtype=np.int64)
    distance = np.full((count, classes), np.nan)
    for image in range(count):
        masks = np.stack([true[image], predicted[image]])
        masks[1, masks[0] == VOID] = VOID
        for number, box in enumerate(_boxes(masks, classes)):
            if box is None:
                continue
            pair = masks[:, *box] == number  # (2, h, w): truth, prediction; all outside the box is neither
            bands = pair & ~_eroded(pair, reach)
            boundary[image, number] = (bands[0] & bands[1]).sum(), (bands[0] | bands[1]).sum()
            if distances and pair.any(axis=(1, 2)).all():
                distance[image, number] = _hausdorff(pair)
    return MaskCounts(_confusion(predicted, true, classes), boundary, distance)


def confusion_of(prediction: ArrayLike, truth: ArrayLike, classes: int) -> Ints:
    """Confusion matrices (N, C, C) alone, as `count_masks` counts them: where nothing else is wanted."""
    return _confusion(*_checked(prediction, truth, classes), classes)


def _confusion(predicted: Ints, true: Ints, classes: int) -> Ints:
    image = np.arange(len(true))[:, None, None]
    cell = (image * classes + true) * classes + predicted
    tally = np.bincount(cell[true != VOID], minlength=len(true) * classes**2)
    return tally.reshape(len(true), classes, classes).astype(np.int64)


def _boxes(masks: Ints, classes: int) -> list[Box | None]:
    """For each class, the box around it in both masks (2, H, W); None where neither has it."""
    labels = np.where(masks == VOID, 0, masks + 1)
    found = ndimage.find_objects(labels, max_label=classes)
    return [None if box is None else (box[1], box[2]) for box in found]


def _eroded(masks: Bools, reach: int) -> Bools:
    """Pixels (2, h, w) whose square of 2 `reach` + 1 pixels lies within the mask; a square is eroded side by side."""
    kept = masks.view(np.uint8)
    for axis in (1, 2):
        kept = ndimage.minimum_filter1d(kept, 2 * reach + 1, axis=axis, mode="constant", cval=0)
    return kept.view(np.bool_)


def _hausdorff(pair: Bools) -> float:
    """95th percentile of the distances from one outline to the other, of (2, h, w) masks; the larger direction."""
    padded = np.pad(pair, ((0, 0), (1, 1), (1, 1)))
    inner = padded[:, :-2, 1:-1] & padded[:, 2:, 1:-1] & padded[:, 1:-1, :-2] & padded[:, 1:-1, 2:]
    first, second = (np.argwhere(outline) for outline in pair & ~inner)
    there, _ = cKDTree(second).query(first)
    back, _ = cKDTree(first).query(second)
    return max(float(np.percentile(there, 95)), float(np.percentile(back, 95)))


def _checked(prediction: ArrayLike, truth: ArrayLike, classes: int) -> tuple[Ints, Ints]:
    predicted, true = np.asarray(prediction), np.asarray(truth)
    if predicted.ndim != 3 or predicted.shape != true.shape:
        raise ValueError(
            f"expected predictions and truth (N, H, W), alike in shape, not {predicted.shape} and {true.shape}"
        )
    for mask in (predicted, true):
        if mask.dtype.kind not in "bui":
            raise ValueError(f"expected masks of whole numbers, not {mask.dtype}")
    predicted, true = predicted.astype(np.int64), true.astype(np.int64)
    if ((predicted < 0) | (predicted >= classes)).any():
        raise ValueError(f"expected predicted ids from 0 to {classes - 1}, not {predicted.min()} to {predicted.max()}")
    unknown = true[((true < 0) | (true >= classes)) & (true != VOID)]
    if unknown.size:
        raise UserError(
            f"the masks hold the value {unknown[0]}: expected class ids from 0 to {classes - 1}, or {VOID} for void; "
            "mend the masks, or name all of their classes"
        )
    return predicted, true
