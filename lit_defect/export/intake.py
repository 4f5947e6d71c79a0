"""From the camera's bytes to what a network was trained on, inside the exported graph.

The data modules scale pictures with Pillow: bilinear, antialiased where it shrinks, one axis after the other, rounded
to bytes after each, with weights of 22 binary places. That is two matrix products of whole numbers, which float64
holds exactly: the bytes that come out are Pillow's own, in any runtime that keeps to IEEE 754. (The `Resize` of ONNX
Runtime and the `interpolate` of PyTorch differ from Pillow in every tenth pixel; where a side grows, the former by up
to 19 of 255 levels. One level has been seen to move a classifier's probability by 0.05.)

From version 13 on Pillow begins with the columns of pictures that lose more than twice as many rows as columns, which
changes every fifth byte of such a picture by one level. The graph does what the Pillow does that is installed.
"""

from __future__ import annotations

import PIL
import torch
from torch import Tensor, nn

from lit_defect.tasks.views import unit_range

Size = tuple[int, int]

_ONE = 2.0**22  # Pillow's fixed point
_COLUMNS_FIRST = int(PIL.__version__.split(".")[0]) >= 13


class Intake(nn.Module):
    """Pictures of a camera -> pictures as a task gets them from its data module and resizes them itself.

    Args:
        data_size: (height, width) that the data module scales to with Pillow; None leaves the size.
        task_size: (height, width) that the task then resizes floats to; None leaves the size.
    """

    def __init__(self, data_size: Size | None, task_size: Size | None) -> None:
        super().__init__()
        self.data_size = data_size
        self.task_size = task_size

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 -> (B, 3, h, w), uint8 or, where the task resizes, float32 in [0, 1]."""
        images = pictures.permute(0, 3, 1, 2)
        if self.data_size is not None:
            images = scaled_bytes(images, self.data_size)
        if self.task_size is not None:
            images = scaled(unit_range(images), self.task_size)
        return images


def scaled_bytes(images: Tensor, size: Size) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, 3, *size) uint8, equal to `data.images.resize_image` of each.

    Of sizes that are left open both orders are computed, since which one Pillow takes depends on them.
    """
    if _has(images, size):
        return images
    height, width = images.shape[-2:]
    down, across = (_fixed_point(_weights(*sides)) for sides in ((height, size[0]), (width, size[1])))
    pixels = images.double()
    orders = (
        lambda: _rounded(down @ _rounded(pixels @ across.T)),
        lambda: _rounded(_rounded(down @ pixels) @ across.T),
    )
    fewer_rows, fewer_columns = height - size[0], width - size[1]
    if not _COLUMNS_FIRST:
        scaled = orders[0]()
    elif isinstance(height, int) and isinstance(width, int):
        scaled = orders[fewer_rows > max(0, 2 * fewer_columns)]()
    else:
        rows, columns = (torch.scalar_tensor(number, dtype=torch.float64) for number in (fewer_rows, fewer_columns))
        scaled = torch.where(rows > (2 * columns).clamp(min=0), orders[1](), orders[0]())
    return scaled.to(torch.uint8)


def scaled(images: Tensor, size: Size) -> Tensor:
    """(B, 3, H, W) float -> (B, 3, *size), as `tasks.views.resize` by interpolation."""
    if _has(images, size):
        return images
    across, down = (_weights(images.shape[axis], size[axis]).to(images.dtype) for axis in (-1, -2))
    return down @ (images @ across.T)


def _has(images: Tensor, size: Size) -> bool:
    """Whether the pictures are known to have this size already; of a size that is left open nothing is known."""
    height, width = images.shape[-2:]
    return isinstance(height, int) and isinstance(width, int) and (height, width) == tuple(size)


def _weights(side: int, wanted: int) -> Tensor:
    """(wanted, side) float64: the triangle that weighs the pixels of a side for each pixel of the wanted one."""
    scale = torch.scalar_tensor(side, dtype=torch.float64) / wanted  # a plain number would be float32 in ONNX
    reach = scale.clamp(min=1)
    centres = (torch.arange(wanted, dtype=torch.float64) + 0.5) * scale
    apart = torch.arange(side, dtype=torch.float64) - centres[:, None] + 0.5
    weights = (1 - (apart / reach).abs()).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def _fixed_point(weights: Tensor) -> Tensor:
    return (weights * _ONE + 0.5).floor()


def _rounded(sums: Tensor) -> Tensor:
    """Sums in fixed point -> whole numbers from 0 to 255."""
    return ((sums + _ONE / 2) / _ONE).floor().clamp(0, 255)
