"""Near-duplicate pictures on both sides of a split: the leak that makes a test result too good."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from lit_defect.errors import DataError

SIDE = 32  # the picture is averaged down to SIDE x SIDE
LOW = 12  # and its LOW x LOW lowest frequencies are kept
GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601 luma


def perceptual_code(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Low frequencies of a picture: its area average on 32 x 32, then the 2-D DCT-II, 12 x 12 of it.

    Averaging and DCT are linear, so both are one small matrix per side: C = B_H X B_W^T.

    Args:
        image: (H, W) or (H, W, 3) uint8.

    Returns:
        (144,) float32, orthonormal coefficients in grey levels, row by row; the first is the mean.

    Raises:
        DataError: if the array has another shape or type.
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) or not image.size:
        raise DataError(f"a picture must be (H, W) or (H, W, 3) uint8, not {image.shape} {image.dtype}")
    height, width = image.shape[:2]
    rows = _basis(height) @ image.reshape(height, -1).astype(np.float32)  # (12, W) or (12, W * 3)
    if image.ndim == 3:
        rows = rows.reshape(LOW, width, 3) @ GREY
    return (rows @ _basis(width).T).ravel()


@lru_cache(maxsize=256)
def _basis(length: int) -> npt.NDArray[np.float32]:
    """(12, length): area average of `length` pixels onto 32 cells, then the low rows of the DCT-II."""
    edges = np.arange(SIDE + 1) * length / SIDE
    pixels = np.arange(length)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    average = np.clip(overlap, 0, None) * SIDE / length  # (32, length), every row sums to one
    k, n = np.arange(LOW)[:, None], np.arange(SIDE)
    dct = np.cos(np.pi * k * (2 * n + 1) / (2 * SIDE)) * np.sqrt(np.where(k == 0, 1, 2) / SIDE)
    return (dct @ average).astype(np.float32)
