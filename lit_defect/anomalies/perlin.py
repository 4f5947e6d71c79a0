"""Perlin anomalies: regions of random, natural outline, filled with something that does not belong there.

Source: Zavrtanik et al., DRAEM, ICCV 2021, section 3.3: Perlin noise with 2^0 to 2^5 cells along each axis, turned by
up to 90 degrees and cut off at 0.5, gives the region; texture shines through the picture there with an opacity of
0.2 to 1. DRAEM takes its textures from a folder of photographs (DTD). Without one, the texture is the picture itself,
moved, mirrored, and changed in colour beyond recognition; a grey picture stays grey.

The gradients of the noise come from an integer hash of a seed and the cell, so one uniform number stands for a field.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from lit_defect.anomalies.base import Edit, GatedEdit
from lit_defect.anomalies.colour import DRAWS, Strengths, jitter
from lit_defect.anomalies.draws import KEY, between, check_number, check_range, whole
from lit_defect.anomalies.pixels import Boxes, Pixels, Strips
from lit_defect.errors import UserError
from lit_defect.transfer import sent

_FINEST = 5  # 2^5 cells along an axis
_REACH = math.ceil(2**_FINEST * math.sqrt(0.5))  # cells from the middle of the picture to a corner, when turned
_LATTICE = 2 * _REACH + 3  # corners of cells along an axis
_BITS = 2**32 - 1
_STRONG = Strengths(brightness=0.5, contrast=0.5, saturation=1.0, hue=0.5)
_TEXTURES = 512  # kept in memory at most


class PerlinAnomaly(GatedEdit):
    """A region of Perlin noise filled with texture.

    Args:
        threshold: of the noise, which lies within about +-1; higher gives smaller regions. Where the whole field is
            lower than that, 0.8 of its highest value is taken instead, so that there is always a region.
        opacity: of the texture, from and to.
        textures: a folder of photographs (with its subfolders); null takes the picture itself.
        candidates: see `PseudoAnomaly`.
        ssim_scope: see `PseudoAnomaly`; off, as DRAEM knows no gate. The box of `patch` holds all parts of the region
            and much between them that is unchanged, so it needs a threshold of its own, about 0.98.
        ssim_threshold: see `PseudoAnomaly`.

    Raises:
        UserError: a number out of range, a folder without pictures.
    """

    uniforms = 12 + DRAWS

    def __init__(
        self,
        *,
        threshold: float = 0.5,
        opacity: tuple[float, float] = (0.2, 1.0),
        textures: str | None = None,
        candidates: int = 4,
        ssim_scope: Literal["image", "patch", "off"] = "off",
        ssim_threshold: float | None = None,
    ) -> None:
        super().__init__(candidates=candidates, ssim_scope=ssim_scope, ssim_threshold=ssim_threshold)
        check_number("threshold", threshold, -1, 1)
        check_range("opacity", opacity, 0, 1)
        self.threshold, self.opacity, self.textures = threshold, opacity, textures
        self._files = None if textures is None else _pictures_in(textures)
        self._loaded: Tensor | None = None

    def edit(self, images: Tensor, owner: Tensor, uniforms: Tensor) -> Edit:
        rows, columns = images.shape[-2:]
        field = perlin_field(uniforms[:, :6], rows, columns, images.device)
        limit = (0.8 * field.amax(dim=(1, 2))).clamp(max=self.threshold)
        strips = strips_of(field > limit[:, None, None])
        pixels = Pixels(boxes_around(strips, len(owner)), owner, images.shape, images.device, strips)
        opacity = pixels.spread(between(uniforms[:, 6], *self.opacity).float())
        if self._files is None:
            texture = self._own_texture(images, pixels, uniforms[:, 7:])
        else:
            texture = self._photograph(pixels, uniforms[:, 7:10])
        return Edit(pixels, pixels.read(images).lerp_(texture, opacity))

    def _own_texture(self, images: Tensor, pixels: Pixels, uniforms: Tensor) -> Tensor:
        """(3, N) the picture moved around its border, mirrored, inverted or not, and changed in colour."""
        rows, columns = images.shape[-2:]
        down, right = whole(uniforms[:, 0], rows), whole(uniforms[:, 1], columns)
        upside_down, mirrored, inverted = (uniforms[:, 2:5] < 0.5).unbind(1)
        y = pixels.strips.y + down[pixels.strips.region]
        y = y.where(~upside_down[pixels.strips.region], -y) % rows
        x = pixels.along(pixels.strips.left + right[pixels.strips.region])
        x = x.where(~pixels.spread(mirrored), -x) % columns
        place = pixels.each(pixels.start(y, torch.zeros_like(y), 3)) + x
        texture = pixels.read(images, place)
        texture = texture.where(~pixels.spread(inverted), 1 - texture)
        return jitter(texture, pixels, uniforms[:, 5:], _STRONG)

    def _photograph(self, pixels: Pixels, uniforms: Tensor) -> Tensor:
        """(3, N) one of the photographs, moved around its border."""
        rows, columns = pixels.shape[2:]
        photographs = self._photographs(rows, columns, pixels.device)
        region = pixels.strips.region
        chosen = whole(uniforms[:, 0], len(photographs))
        y = (pixels.strips.y + whole(uniforms[:, 1], rows)[region]) % rows
        x = pixels.along(pixels.strips.left + whole(uniforms[:, 2], columns)[region]) % columns
        place = pixels.each((chosen[region] * 3 * rows + y) * columns) + x
        return pixels.read(photographs, place).float().div_(255)

    def _photographs(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """(T, 3, rows, columns) uint8, read once."""
        loaded = self._loaded
        if loaded is None or loaded.shape[2:] != (rows, columns) or loaded.device != device:
            assert self._files is not None
            loaded = self._loaded = torch.stack([_read(file, rows, columns) for file in self._files]).to(device)
        return loaded


def perlin_field(uniforms: Tensor, rows: int, columns: int, device: torch.device) -> Tensor:
    """Perlin noise within about [-1, 1], with mean 0.

    Args:
        uniforms: (n, 6) float64 on the CPU: cells down, cells across, turn, offset down, offset across, seed.
        rows: of the picture.
        columns: of the picture.
        device: of the result.

    Returns:
        (n, rows, columns) float32.
    """
    cells = 2 ** whole(uniforms[:, :2], _FINEST + 1)  # (n, 2)
    angle = math.pi * (uniforms[:, 2] - 0.5)
    start = _REACH + uniforms[:, 3:5]  # the middle of the picture on the lattice
    cos, sin = angle.cos(), angle.sin()
    lines = torch.column_stack(
        (cos * cells[:, 0], sin * cells[:, 0], start[:, 0], cos * cells[:, 1], -sin * cells[:, 1], start[:, 1])
    )
    down_y, across_y, start_y, across_x, down_x, start_x = sent(lines.float(), device).T[:, :, None, None]
    y = ((torch.arange(rows, device=device) + 0.5) / rows - 0.5)[:, None]
    x = (torch.arange(columns, device=device) + 0.5) / columns - 0.5
    v = down_y * y + across_y * x + start_y  # (n, rows, columns), in cells
    u = across_x * x + down_x * y + start_x
    i, j = v.long(), u.long()
    v, u = v.sub_(i), u.sub_(j)
    down, across = sent(_gradients((uniforms[:, 5] * 2**24).long()), device)  # (n * corners,) each
    corner = (torch.arange(len(cells), device=device)[:, None, None] * _LATTICE).add(i).mul_(_LATTICE).add_(j)

    def slope(below: int, right: int) -> Tensor:
        place = (corner + (below * _LATTICE + right)).flatten()
        rise = down.index_select(0, place).view_as(v) * (v - below)
        return rise.addcmul_(across.index_select(0, place).view_as(u), u - right)

    across_weight, down_weight = _fade(u), _fade(v)
    upper = slope(0, 0).lerp_(slope(0, 1), across_weight)
    lower = slope(1, 0).lerp_(slope(1, 1), across_weight)
    return upper.lerp_(lower, down_weight).mul_(math.sqrt(2))


def strips_of(masks: Tensor) -> Strips:
    """(n, H, W) bool -> the horizontal strips of what is true."""
    edges = pad(masks.cpu(), (1, 1)).diff(dim=-1).nonzero()  # where a strip begins or ends
    begin, end = edges[::2], edges[1::2]
    region, y, left = begin.unbind(1)
    return Strips(region, y, left, end[:, 2] - left)


def boxes_around(strips: Strips, count: int) -> Boxes:
    """The smallest boxes around `count` regions; one pixel for a region that is empty."""

    def extreme(values: Tensor, reduce: str, empty: int) -> Tensor:
        start = torch.full((count,), empty)
        return start.scatter_reduce_(0, strips.region, values, reduce, include_self=False)

    return Boxes(
        extreme(strips.y, "amin", 0),
        extreme(strips.left, "amin", 0),
        extreme(strips.y, "amax", 0) + 1,
        extreme(strips.left + strips.width, "amax", 1),
    )


def _gradients(seed: Tensor) -> Tensor:
    """(n,) int64 -> (2, n * corners) float32: components of a unit vector for each corner of the lattice."""
    number = torch.arange(_LATTICE * _LATTICE)
    h = (seed[:, None] * 0x9E3779B1 + number * 0x85EBCA6B) & _BITS
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        h = ((h ^ (h >> shift)) * factor) & _BITS
    angle = ((h ^ (h >> 15)).double() * (2 * math.pi / 2**32)).flatten()
    return torch.stack((angle.sin(), angle.cos())).float()


def _fade(t: Tensor) -> Tensor:
    """6 t^5 - 15 t^4 + 10 t^3: from 0 to 1 with slope and curvature 0 at both ends."""
    return ((6 * t).sub_(15).mul_(t).add_(10)).mul_(t).mul_(t).mul_(t)


def _pictures_in(folder: str) -> list[Path]:
    """Pictures of a folder and its subfolders; of too many, evenly spread ones.

    Raises:
        UserError: there are none.
    """
    known = Image.registered_extensions()
    files = sorted(file for file in Path(folder).expanduser().rglob("*") if file.suffix.lower() in known)
    if not files:
        raise UserError(f"{KEY}.textures = {folder}: no pictures there; give a folder of photographs, or null")
    return files if len(files) <= _TEXTURES else [files[index * len(files) // _TEXTURES] for index in range(_TEXTURES)]


def _read(file: Path, rows: int, columns: int) -> Tensor:
    """(3, rows, columns) uint8.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with Image.open(file) as picture:
            pixels = np.array(picture.convert("RGB").resize((columns, rows), Image.Resampling.BILINEAR))
    except OSError as error:
        raise UserError(f"{file}: not a picture that can be read ({error}); remove it from {KEY}.textures") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)
