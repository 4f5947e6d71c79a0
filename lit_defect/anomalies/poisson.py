"""Seamless patches: a part of the picture whose gradients are put elsewhere, so that no edge gives it away.

Source: Schlüter et al., Natural Synthetic Anomalies (NSA), ECCV 2022, with the blending of Pérez et al., Poisson Image
Editing, SIGGRAPH 2003.

1. A rectangle Omega is cut at one place and goes to another, both at least a pixel away from the border.
2. Inside, the new values f have the gradients v of the source (or, `mixed`, at each edge the larger one of source and
   target); around it they meet the picture f*. For each pixel p with its four neighbours q (Pérez, eq. 7):
       4 f_p - sum_{q in Omega} f_q = sum_{q not in Omega} f*_q + sum_q v_pq
3. On a rectangle the sine transform turns this into a division, so the solution is exact and takes four products of
   matrices; rectangles of similar size are solved together.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lit_defect.anomalies.base import Edit, GatedEdit
from lit_defect.anomalies.draws import check_range, log_between, rectangle, whole
from lit_defect.anomalies.pixels import Boxes, Pixels
from lit_defect.errors import UserError
from lit_defect.transfer import sent


class PoissonPatch(GatedEdit):
    """A patch blended seamlessly into another place of the same picture.

    Args:
        area: share of the picture that the patch covers, from and to; logarithmic.
        aspect: width over height, from and to; logarithmic.
        gradients: of the `source` alone, or `mixed`: the stronger ones of source and target.
        candidates: see `PseudoAnomaly`.
        ssim_scope: see `PseudoAnomaly`.
        ssim_threshold: see `PseudoAnomaly`.

    Raises:
        UserError: a number out of range.
    """

    uniforms = 6

    def __init__(
        self,
        *,
        area: tuple[float, float] = (0.005, 0.15),
        aspect: tuple[float, float] = (0.3, 3.3),
        gradients: Literal["source", "mixed"] = "source",
        candidates: int = 4,
        ssim_scope: Literal["image", "patch", "off"] = "patch",
        ssim_threshold: float | None = None,
    ) -> None:
        super().__init__(candidates=candidates, ssim_scope=ssim_scope, ssim_threshold=ssim_threshold)
        check_range("area", area, 0, 1)
        check_range("aspect", aspect, 0, math.inf)
        if gradients not in ("source", "mixed"):
            raise UserError(f"model.init_args.anomaly.init_args.gradients = {gradients}: expected source or mixed")
        self.area, self.aspect, self.gradients = area, aspect, gradients

    def edit(self, images: Tensor, owner: Tensor, uniforms: Tensor) -> Edit:
        rows, columns = images.shape[-2:]
        area, aspect, from_y, from_x, to_y, to_x = uniforms.unbind(1)
        height, width = rectangle(log_between(area, *self.area), log_between(aspect, *self.aspect), rows, columns)
        height, width = height.clamp(max=rows - 2), width.clamp(max=columns - 2)
        top, left = 1 + whole(to_y, rows - height - 1), 1 + whole(to_x, columns - width - 1)
        down = 1 + whole(from_y, rows - height - 1) - top
        right = 1 + whole(from_x, columns - width - 1) - left
        pixels = Pixels(Boxes(top, left, top + height, left + width), owner, images.shape, images.device)
        source = pixels.place + pixels.spread(down * columns + right)
        known = known_side(images, pixels, source, mixed=self.gradients == "mixed")
        return Edit(pixels, solve(known, pixels).float().clamp_(0, 1))


def known_side(images: Tensor, pixels: Pixels, source: Tensor, *, mixed: bool) -> Tensor:
    """(3, N) float64, the right side of the equation: neighbours outside the rectangle, and guiding gradients.

    Args:
        images: (B, 3, H, W).
        pixels: N pixels of the rectangles.
        source: (N,) where the gradients of each are, as an index in the flat pictures.
        mixed: take the stronger gradient.
    """
    strips, boxes = pixels.strips, pixels.boxes
    top, bottom = strips.y == boxes.top[strips.region], strips.y == boxes.bottom[strips.region] - 1
    x = pixels.along(strips.left)
    width = images.shape[-1]
    neighbours = (
        (-width, pixels.each(top)),
        (width, pixels.each(bottom)),
        (-1, x == pixels.spread(boxes.left)),
        (1, x == pixels.spread(boxes.right - 1)),
    )
    target_here, source_here = pixels.read(images).double(), pixels.read(images, source).double()
    total = torch.zeros_like(target_here)
    for step, outside in neighbours:
        target = pixels.read(images, pixels.place + step).double()
        guide = source_here - pixels.read(images, source + step)
        if mixed:
            own = target_here - target
            guide = guide.where(guide.abs() >= own.abs(), own)
        total += guide + target.where(outside, 0)
    return total


def solve(known: Tensor, pixels: Pixels) -> Tensor:
    """Solve 4 f_p - sum_{q in Omega} f_q = known_p on n rectangles.

    Args:
        known: (C, N) float64.
        pixels: N pixels of the rectangles.

    Returns:
        (C, N) float64.
    """
    height, width = pixels.boxes.height, pixels.boxes.width
    # Each rectangle gets a block with sides that are powers of two; blocks of one size stand together.
    block = torch.stack((height, width), dim=1).double().log2().ceil().exp2().long()  # (n, 2)
    sizes, kind = block.unique(dim=0, return_inverse=True)
    order = kind.argsort(stable=True)
    room = block.prod(dim=1)
    begin = torch.empty_like(room)
    begin[order] = room[order].cumsum(0) - room[order]
    strips = pixels.strips
    row = strips.y - pixels.boxes.top[strips.region]
    index = pixels.along(begin[strips.region] + row * block[strips.region, 1])  # (N,)
    blocks = known.new_zeros(len(known), int(room.sum())).index_copy_(1, index, known)
    done = 0
    for number, (rows, columns) in enumerate(sizes.tolist()):
        members = order[kind[order] == number]
        part = blocks[:, done : done + len(members) * rows * columns]
        part.copy_(
            _solve_blocks(part.view(-1, len(members), rows, columns), height[members], width[members]).view_as(part)
        )
        done += part.shape[1]
    return blocks.index_select(1, index)


def _solve_blocks(known: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """(C, m, rows, columns), of which the first height x width of each are meant -> the solution there."""
    down, down_values = (sent(part, known.device) for part in _sines(height, known.shape[-2]))
    across, across_values = (sent(part, known.device) for part in _sines(width, known.shape[-1]))
    waves = down @ known @ across / (down_values[:, :, None] + across_values[:, None, :])
    return down @ waves @ across


def _sines(length: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The eigenvectors and eigenvalues of the second difference 2 f_i - f_{i-1} - f_{i+1} with zero ends.

    Args:
        length: (m,) unknowns.
        size: to which they are padded with noughts.

    Returns:
        (m, size, size) symmetric and its own inverse, (m, size) positive.
    """
    number = torch.arange(1, size + 1, dtype=torch.float64)
    angle = math.pi * number / (length[:, None] + 1)  # (m, size)
    valid = number <= length[:, None]
    vectors = (angle[:, :, None] * number).sin() * (2 / (length[:, None, None] + 1)).sqrt()
    vectors *= valid[:, :, None] & valid[:, None, :]
    return vectors, (2 - 2 * angle.cos()).where(valid, 1)
