"""Views of a picture: the flips and quarter turns that can be listed, and the random changes that cannot.

The listed views are what a frozen backbone's features are cached for, so training on cached features
and training on recomputed ones draw from the same views.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_defect.errors import UserError

Augment = Literal["none", "flip", "flips", "dihedral", "strong"]
VIEWS: dict[str, int] = {"none": 1, "flip": 2, "flips": 4, "dihedral": 8, "strong": 8}


def view(images: Tensor, number: int) -> Tensor:
    """(B, C, H, W) -> view 0 to 7: bit 0 flips left-right, bit 1 upside down, bit 2 swaps the axes.

    Raises:
        UserError: a quarter turn of pictures that are not square.
    """
    if number & 4:
        _check_square(images)
    dims = [dim for bit, dim in ((1, -1), (2, -2)) if number & bit]
    images = images.flip(dims) if dims else images
    return images.transpose(-1, -2) if number & 4 else images


def random_views(images: Tensor, augment: Augment, numbers: Tensor) -> Tensor:
    """Give each picture the view of its number; `strong` then changes it as no list could.

    Args:
        images: (B, 3, H, W) float in [0, 1].
        augment: which views there are.
        numbers: (B,) view of each picture, below `VIEWS[augment]`.

    Raises:
        UserError: quarter turns of pictures that are not square.
    """
    if VIEWS[augment] > 4:  # at the first batch, whatever its views are
        _check_square(images)
    out = torch.empty_like(images)
    for number in numbers.unique().tolist():
        chosen = numbers == number
        out[chosen] = view(images[chosen], number)
    return _strong()(out).clamp(0, 1) if augment == "strong" else out


def _check_square(images: Tensor) -> None:
    height, width = images.shape[-2:]
    if height != width:
        raise UserError(
            "model.init_args.augment = dihedral and strong turn pictures, which must be square; they are "
            f"{height}x{width}: use flips, or set image_size"
        )


@lru_cache(maxsize=1)
def _strong() -> Callable[[Tensor], Tensor]:
    """Small shifts, turns, zooms and changes of light: none of them may erase a defect."""
    import kornia.augmentation as K

    return K.AugmentationSequential(
        K.RandomAffine(degrees=10, translate=(0.05, 0.05), scale=(0.9, 1.1), padding_mode="reflection", p=0.8),
        K.ColorJiggle(brightness=0.2, contrast=0.2, p=0.8),
    )


def resize(images: Tensor, size: tuple[int, int] | None) -> Tensor:
    """(B, 3, H, W) -> (B, 3, *size), bilinear with antialiasing; unchanged where it fits already."""
    if size is None or tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)


def unit_range(images: Tensor) -> Tensor:
    """Bytes -> float32 in [0, 1]; floats stay as they are."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images
