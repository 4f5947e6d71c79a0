"""Views of a picture: the flips and quarter turns that can be listed, and the random changes that cannot.

The listed views are what a frozen backbone's features are cached for, so training on cached features
and training on recomputed ones draw from the same views.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_defect.errors import UserError
from lit_defect.transfer import sent

Augment = Literal["none", "flip", "flips", "dihedral", "strong"]
Pose = Literal["fixed", "flips", "free"]
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
        numbers: (B,) view of each picture, below `VIEWS[augment]`; on the CPU, as a GPU would have to be waited for.

    Raises:
        UserError: quarter turns of pictures that are not square.
    """
    if VIEWS[augment] > 4:  # at the first batch, whatever its views are
        _check_square(images)
    out = torch.empty_like(images)
    for number in numbers.unique().tolist():
        chosen = sent((numbers == number).nonzero()[:, 0], images.device)
        out[chosen] = view(images[chosen], number)
    return _strong()(out).clamp(0, 1) if augment == "strong" else out


def contrastive_views(images: Tensor, pose: Pose) -> Tensor:
    """A random view of each picture that keeps its defects: no blur, no grey, no strong crop or colour.

    At least 90 % of the picture stays in view, moved by at most 4 % of its side, brightness and contrast change
    by at most a tenth, all drawn from torch's global generator.

    Args:
        images: (B, 3, H, W) float in [0, 1].
        pose: `fixed` for products that always lie the same way, `flips` where mirror images are as good,
            `free` where quarter turns are, too (of pictures that are not square: flips).
    """
    count, device = len(images), images.device
    if pose != "fixed":
        square = images.shape[-1] == images.shape[-2]
        augment: Augment = "dihedral" if pose == "free" and square else "flips"
        images = random_views(images, augment, torch.randint(VIEWS[augment], (count,)))
    zoom, right, down, gain, lift = torch.rand(5, count, device=device).unbind()
    least = math.sqrt(0.9)  # of either side
    zoom = 1 - (1 - least) * zoom  # side of the part in view
    reach = (zoom + 1 - 2 * least).clamp(max=0.08)  # a picture spans 2: as far as the least share stays in view
    right, down = (reach * (2 * part - 1) for part in (right, down))
    still = torch.zeros_like(zoom)
    matrix = torch.stack([zoom, still, right, still, zoom, down], dim=1)
    grid = F.affine_grid(matrix.view(-1, 2, 3), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    return _relit(moved, 0.9 + 0.2 * gain, 0.9 + 0.2 * lift)


def random_light(images: Tensor, share: float) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] whose brightness and contrast each change by up to `share`, as exposures do."""
    gain, lift = (1 - share + 2 * share * torch.rand(2, len(images), device=images.device)).unbind()
    return _relit(images, gain, lift)


def _relit(images: Tensor, gain: Tensor, lift: Tensor) -> Tensor:
    """Contrast times `gain` (B,) around the mean of each picture, and the mean times `lift` (B,)."""
    mean = images.mean((1, 2, 3), keepdim=True)
    return ((images - mean) * gain.view(-1, 1, 1, 1) + mean * lift.view(-1, 1, 1, 1)).clamp(0, 1)


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
