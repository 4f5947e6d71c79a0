"""Patches cut from a picture, turned, changed in colour and pasted into the same picture.

A pixel of the picture belongs to the pasted patch where its centre, turned back, lies inside the cut rectangle; its
colour is then read there, between pixels. So a turned patch has no empty corners, and one that is not turned is
copied exactly. Which pixels these are is worked out strip by strip, on the CPU and in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_defect.anomalies.base import Edit
from lit_defect.anomalies.colour import Strengths, jitter
from lit_defect.anomalies.pixels import Boxes, Pixels, Strips


class Paste(NamedTuple):
    """n rectangles to cut and where they go; (n,) each, on the CPU."""

    cut: Boxes  # within the picture
    top: Tensor  # int64, pixels: of the upright rectangle at its new place, which may lie partly outside
    left: Tensor
    angle: Tensor  # float64, radians, about the centre


def paste(images: Tensor, owner: Tensor, plan: Paste, colour: Tensor, strengths: Strengths) -> Edit:
    """Cut and paste one patch for each of n rows.

    Args:
        images: (B, 3, H, W) float32 in [0, 1].
        owner: (n,) picture of each patch.
        plan: from where and to where.
        colour: (n, 4) uniforms of `colour.jitter`.
        strengths: of `colour.jitter`.
    """
    if plan.angle.any():
        pixels, values = _turned(images, owner, plan)
    else:
        pixels, values = _upright(images, owner, plan)
    return Edit(pixels, jitter(values, pixels, colour, strengths))


def _upright(images: Tensor, owner: Tensor, plan: Paste) -> tuple[Pixels, Tensor]:
    """The pixels that n patches go to and what lies on them, copied as it is."""
    cut = plan.cut
    new = Boxes(plan.top, plan.left, plan.top + cut.height, plan.left + cut.width).clipped(*images.shape[-2:])
    pixels = Pixels(new, owner, images.shape, images.device)
    strips = pixels.strips
    down, right = (cut.top - plan.top)[strips.region], (cut.left - plan.left)[strips.region]
    return pixels, pixels.read(images, pixels.along(pixels.start(strips.y + down, strips.left + right, 3)))


def _turned(images: Tensor, owner: Tensor, plan: Paste) -> tuple[Pixels, Tensor]:
    """The pixels that n patches go to and what lies on them, read between pixels."""
    height, width = images.shape[-2:]
    cut, cos, sin = plan.cut, plan.angle.cos(), plan.angle.sin()
    half_y, half_x = cut.height / 2, cut.width / 2
    new_y, new_x = plan.top + half_y, plan.left + half_x  # the centre
    reach_y, reach_x = cos.abs() * half_y + sin.abs() * half_x, cos.abs() * half_x + sin.abs() * half_y
    corners = (new_y - reach_y).floor(), (new_x - reach_x).floor(), (new_y + reach_y).ceil(), (new_x + reach_x).ceil()
    box = Boxes(*(corner.long() for corner in corners)).clipped(height, width)

    rows = box.strips()
    region = rows.region
    cos, sin = cos[region], sin[region]  # (R,) from here on
    y = rows.y + 0.5 - new_y[region]  # of the centres of the strip's pixels, from that of the patch
    # Turned back, a pixel at x lies at (cos y + sin x, cos x - sin y): within the rectangle where both are.
    first = _solve(sin, cos * y, half_y[region])
    second = _solve(cos, -sin * y, half_x[region])
    low = torch.maximum(first[0], second[0]) + new_x[region] - 0.5
    high = torch.minimum(first[1], second[1]) + new_x[region] - 0.5
    left = low.ceil().clamp(box.left[region], box.right[region]).long()
    right = high.ceil().clamp(box.left[region], box.right[region]).long()
    strips = Strips(region, rows.y, left, (right - left).clamp(min=0))
    pixels = Pixels(box, owner, images.shape, images.device, strips)

    x = strips.left + 0.5 - new_x[region]  # where the strip begins
    from_y = cos * y + sin * x + (cut.top + half_y)[region] - 0.5
    from_x = cos * x - sin * y + (cut.left + half_x)[region] - 0.5
    return pixels, _between(images, pixels, torch.stack((from_y, from_x, sin, cos)).float())


def _solve(slope: Tensor, offset: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """The x between which -half <= slope x + offset < half; without slope all of them or none."""
    flat = slope.abs() < 1e-12
    ends = torch.stack((-half - offset, half - offset)) / slope.where(~flat, 1)
    low, high = ends.amin(dim=0), ends.amax(dim=0)
    everywhere = flat & (offset >= -half) & (offset < half)
    nowhere = flat & ~everywhere
    low = low.where(~everywhere, -torch.inf).where(~nowhere, torch.inf)
    return low, high.where(~everywhere, torch.inf).where(~nowhere, -torch.inf)


def _between(images: Tensor, pixels: Pixels, lines: Tensor) -> Tensor:
    """(3, N) colours between pixels, bilinear.

    Args:
        images: (B, 3, H, W).
        pixels: N pixels of R strips, to be given the colours.
        lines: (4, R) y and x in the picture where each strip begins to read, and their steps from pixel to pixel.
    """
    height, width = images.shape[-2:]
    step = pixels.along(torch.zeros_like(pixels.strips.y))  # (N,) from the beginning of the strip
    y, x, step_y, step_x = pixels.each(lines)
    y = torch.addcmul(y, step, step_y).clamp_(0, height - 1)
    x = torch.addcmul(x, step, step_x).clamp_(0, width - 1)
    above, before = y.clamp(max=height - 2).long(), x.clamp(max=width - 2).long()
    y, x = y.sub_(above), x.sub_(before)  # weight of the lower and of the right neighbour
    place = pixels.spread(pixels.owner * images[0].numel()).add_(above, alpha=width).add_(before)
    upper = pixels.read(images, place).lerp_(pixels.read(images, place + 1), x)
    lower = pixels.read(images, place + width).lerp_(pixels.read(images, place + (width + 1)), x)
    return upper.lerp_(lower, y)
