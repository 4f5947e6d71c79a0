"""Run a network that takes certain sizes only on images of any size: padded, and in overlapping tiles if asked.

1. The image is padded below and to the right to the next multiple, by reflection, or by repeating the border
   where the side is too small to be reflected. It is cut back in the end.
2. An image larger than a tile is covered by the smallest number of equal tiles whose neighbours share the
   asked part of a tile, spread evenly. Tiles begin at multiples too, so that a network's strides fall
   on the same pixels with tiles and without.
3. The outputs are blended: each tile has the weight of a Hann window, which fades towards its borders, where the
   network saw the least, divided by the sum of all tiles' windows, so that the weights of a pixel add up to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lit_defect.errors import UserError
from lit_defect.transfer import sent


class Canvas:
    """Calls a network on images of any size.

    Args:
        multiple: what height and width must be divisible by for the network.
        tile: side of a tile in pixels, rounded up to a multiple; null for the whole image at once.
        overlap: part of a tile that neighbours share at least, 0 <= overlap < 1.
        tiles_at_once: places of tiles that one call of the network sees, for each image of the batch; memory
            grows with it.
    Attributes:
        tile: the side as it is used.
    Raises:
        UserError: a tile without a pixel, an overlap out of range, or one that leaves no step between tiles.
    """

    def __init__(
        self, multiple: int = 1, tile: int | None = None, overlap: float = 0.25, *, tiles_at_once: int = 1
    ) -> None:
        if multiple < 1 or tiles_at_once < 1:
            raise ValueError(f"multiple = {multiple}, tiles_at_once = {tiles_at_once}: expected at least 1")
        if tile is not None and tile < 1:
            raise UserError(f"model.init_args.tile = {tile}: expected a side in pixels, or null for no tiles")
        if not 0 <= overlap < 1:
            raise UserError(f"model.init_args.overlap = {overlap}: expected a part of a tile, 0 <= overlap < 1")
        self.multiple = multiple
        self.tile = None if tile is None else _round_up(tile, multiple)
        self.overlap = overlap
        self.tiles_at_once = tiles_at_once
        if self.tile is not None and self._stride(self.tile) < 1:
            least = multiple * math.ceil(1 / (1 - overlap) - 1e-9)
            raise UserError(
                f"model.init_args.tile = {tile}: sides must be divisible by {multiple} for this network, and with "
                f"overlap {overlap} that leaves no step from tile to tile; use {least} or more, or a smaller overlap"
            )

    def __call__(self, network: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """Inputs (B, C, H, W) -> outputs (B, C', H, W).

        Args:
            network: (N, C, h, w) -> (N, C', h, w) for h and w divisible by `multiple`.
            inputs: images or any other maps.

        Raises:
            ValueError: the network changes height or width.
        """
        height, width = inputs.shape[-2:]
        padded = self.pad(inputs)
        sides = padded.shape[-2:]
        if self.tile is None or max(sides) <= self.tile:
            return _same_size(network, padded)[..., :height, :width]
        return self._blend(network, padded)[..., :height, :width]

    def pad(self, inputs: Tensor) -> Tensor:
        """(B, C, H, W) -> the same with height and width rounded up to the multiple."""
        for axis in (-2, -1):
            side = inputs.shape[axis]
            places = _padded_places(side, _round_up(side, self.multiple))
            if len(places) > side:
                inputs = inputs.index_select(axis, sent(places, inputs.device))
        return inputs

    def _stride(self, tile: int) -> int:
        """Largest step between neighbours, in multiples."""
        return math.floor(tile / self.multiple * (1 - self.overlap) + 1e-9)

    def starts(self, side: int) -> list[int]:
        """First pixels of the tiles along a padded side, the last of which ends with the side."""
        if self.tile is None or side <= self.tile:
            return [0]
        rest = (side - self.tile) // self.multiple  # multiples that the first tile leaves
        steps = math.ceil(rest / self._stride(self.tile))
        return [i * rest // steps * self.multiple for i in range(steps + 1)]

    def _blend(self, network: Callable[[Tensor], Tensor], padded: Tensor) -> Tensor:
        batch, _, height, width = padded.shape
        tile_h, tile_w = min(height, self.tile or height), min(width, self.tile or width)
        rows, columns = self.starts(height), self.starts(width)
        row_weights = sent(_window_weights(rows, tile_h, height), padded.device)  # (R, tile_h)
        column_weights = sent(_window_weights(columns, tile_w, width), padded.device)  # (S, tile_w)
        places = [(r, s) for r in range(len(rows)) for s in range(len(columns))]
        total: Tensor | None = None
        for first in range(0, len(places), self.tiles_at_once):
            group = places[first : first + self.tiles_at_once]
            cuts = [padded[..., rows[r] :, columns[s] :][..., :tile_h, :tile_w] for r, s in group]
            outputs = _same_size(network, torch.cat(cuts)).unflatten(0, (len(group), -1))
            for (r, s), output in zip(group, outputs, strict=True):
                weight = row_weights[r][:, None] * column_weights[s]  # (tile_h, tile_w)
                if total is None:
                    kind, exact = output.dtype, torch.promote_types(output.dtype, torch.float32)
                    total = output.new_zeros(batch, output.shape[1], height, width, dtype=exact)
                total[..., rows[r] : rows[r] + tile_h, columns[s] : columns[s] + tile_w] += weight * output
        assert total is not None
        return total.to(kind)


def _round_up(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple


def _padded_places(side: int, padded: int) -> Tensor:
    """(padded,) where each pixel of a padded side is taken from.

    Indices, since torch's padding by reflection has no deterministic gradient on a GPU.
    """
    places = torch.arange(padded)
    if padded - side < side:  # the border pixel itself is not repeated
        return torch.where(places < side, places, 2 * (side - 1) - places)
    return places.clamp(max=side - 1)


def _window_weights(starts: list[int], tile: int, side: int) -> Tensor:
    """(number of tiles, tile) weights along one side that add up to 1 at each pixel."""
    window = torch.sin(math.pi * (torch.arange(tile, dtype=torch.float64) + 0.5) / tile).square()  # nowhere 0
    total = torch.zeros(side, dtype=torch.float64)
    for start in starts:
        total[start : start + tile] += window
    return torch.stack([window / total[start : start + tile] for start in starts]).float()


def _same_size(network: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    outputs = network(inputs)
    if outputs.shape[-2:] != inputs.shape[-2:]:
        got, expected = tuple(outputs.shape[-2:]), tuple(inputs.shape[-2:])
        raise ValueError(f"the network turned maps of {expected} into {got}; expected the same height and width")
    return outputs
