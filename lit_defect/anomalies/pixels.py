"""Regions of any size as one long list of pixels, so that a batch of patches is one computation.

1. `Boxes` holds the corners of n rectangles, `Strips` the horizontal strips that n regions consist of. They are made
   on the CPU and stay there: sizes are known without asking an accelerator.
2. `Pixels` walks through all strips, one region after another: N pixels on the device of the pictures.
3. Work on pixels is then elementwise on (N,), and a sum over a region is a sum over a segment of the list.

No region is padded to the size of another, and there is no loop over regions.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lit_defect.transfer import sent


class Boxes(NamedTuple):
    """n half-open rectangles in pixels: (n,) int64 each, on the CPU."""

    top: Tensor
    left: Tensor
    bottom: Tensor
    right: Tensor

    @property
    def height(self) -> Tensor:
        return self.bottom - self.top

    @property
    def width(self) -> Tensor:
        return self.right - self.left

    def grown(self, rows: Tensor | int, columns: Tensor | int) -> Boxes:
        """Every side moved outwards."""
        return Boxes(self.top - rows, self.left - columns, self.bottom + rows, self.right + columns)

    def clipped(self, height: int, width: int, margin: int = 0) -> Boxes:
        """The part inside a picture, at least `margin` pixels from its border."""
        return Boxes(
            self.top.clamp(min=margin),
            self.left.clamp(min=margin),
            self.bottom.clamp(max=height - margin),
            self.right.clamp(max=width - margin),
        )

    def strips(self) -> Strips:
        """The rows of each box."""
        region = torch.repeat_interleave(self.height)
        y = torch.arange(len(region)) - (self.height.cumsum(0) - self.bottom)[region]
        return Strips(region, y, self.left[region], self.width[region])


class Strips(NamedTuple):
    """R horizontal strips of pixels, region after region: (R,) int64 each, on the CPU."""

    region: Tensor  # which of the n regions
    y: Tensor
    left: Tensor
    width: Tensor  # 0 is allowed


class Pixels:
    """The N pixels of n regions in a row.

    Args:
        boxes: n boxes, one around each region, none of them empty.
        owner: (n,) int64 on the CPU, the picture that each region lies in.
        shape: (B, C, H, W) of the pictures.
        device: of the pictures.
        strips: what the regions consist of; all of the boxes by default.
    """

    def __init__(
        self, boxes: Boxes, owner: Tensor, shape: torch.Size, device: torch.device, strips: Strips | None = None
    ) -> None:
        self.boxes, self.owner, self.shape, self.device = boxes, owner, shape, device
        self.strips = strips = boxes.strips() if strips is None else strips
        self.lengths = torch.zeros_like(owner).index_add_(0, strips.region, strips.width)  # (n,)
        self.total = int(strips.width.sum())  # N
        self._begin = strips.width.cumsum(0) - strips.width  # (R,) where each strip begins in the list
        self._number = torch.arange(self.total, device=device)
        self._strip = torch.repeat_interleave(sent(strips.width, device), output_size=self.total)  # (N,)

    def along(self, start: Tensor) -> Tensor:
        """(R,) int64, a value where each strip begins -> (N,), counting up along the strip."""
        return self._number + self.each(start - self._begin)

    def each(self, of_strips: Tensor) -> Tensor:
        """(..., R), one for each strip -> (..., N), one for each pixel."""
        return sent(of_strips, self.device).index_select(-1, self._strip)

    def spread(self, of_regions: Tensor) -> Tensor:
        """(..., n), one for each region -> (..., N), one for each pixel."""
        return self.each(of_regions.index_select(-1, sent(self.strips.region, of_regions.device)))

    @cached_property
    def place(self) -> Tensor:
        """(N,) index of each pixel's first channel in the pictures, which lie flat."""
        return self.along(self.start(self.strips.y, self.strips.left, self.shape[1]))

    def start(self, y: Tensor, x: Tensor, channels: int) -> Tensor:
        """(R,) rows and columns, one for each strip -> (R,) index in flat pictures of so many channels."""
        height, width = self.shape[2:]
        return (self.owner[self.strips.region] * (channels * height) + y) * width + x

    def read(self, images: Tensor, place: Tensor | None = None) -> Tensor:
        """The colours (C, N) at these pixels, or at the other places (N,) that are given."""
        place = self.place if place is None else place
        flat, plane = images.flatten(), self.shape[2] * self.shape[3]
        colours = images.new_empty(self.shape[1], len(place))
        for channel, colour in enumerate(colours):
            torch.index_select(flat[channel * plane :], 0, place, out=colour)
        return colours

    def within(self, larger: Pixels) -> Tensor:
        """(N,) index of each pixel in the list of `larger`, which has all of its boxes, and they contain these."""
        region, outer = self.strips.region, larger.boxes
        begin = larger.lengths.cumsum(0) - larger.lengths
        row, column = self.strips.y - outer.top[region], self.strips.left - outer.left[region]
        return self.along(begin[region] + row * outer.width[region] + column)

    def sums(self, values: Tensor) -> Tensor:
        """(N,) -> (n,), the sum over each region, in the type of the values."""
        return torch.segment_reduce(values, "sum", lengths=sent(self.lengths, self.device), unsafe=True)
