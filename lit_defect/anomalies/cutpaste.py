"""CutPaste: a patch of the picture pasted elsewhere, as a rectangle or as a thin turned scar.

Source: Li et al., CutPaste, CVPR 2021 (arXiv 2104.04015), with the published ranges as defaults. `CutPaste3Way` makes
both of each picture, for the three-way classifier normal / patch / scar. The paper knows no gate, so it is off.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lit_defect.anomalies.base import Edit, GatedEdit, PseudoAnomalies, PseudoAnomaly
from lit_defect.anomalies.colour import DRAWS, Strengths
from lit_defect.anomalies.draws import between, check_number, check_range, rectangle, whole
from lit_defect.anomalies.pasting import Paste, paste
from lit_defect.anomalies.pixels import Boxes

_PUBLISHED_SIDE = 256  # pixels; the picture for which the sizes of a scar are given


class CutPaste(GatedEdit):
    """A rectangle pasted at a random place.

    Args:
        area: share of the picture that the patch covers, from and to.
        aspect: shorter side over longer side, from and to; either side may be the longer one.
        jitter: strength of the change in brightness, contrast, saturation and hue, at most 0.5.
        candidates: see `PseudoAnomaly`.
        ssim_scope: see `PseudoAnomaly`.
        ssim_threshold: see `PseudoAnomaly`.

    Raises:
        UserError: a number out of range.
    """

    uniforms = 7 + DRAWS

    def __init__(
        self,
        *,
        area: tuple[float, float] = (0.02, 0.15),
        aspect: tuple[float, float] = (0.3, 1.0),
        jitter: float = 0.1,
        candidates: int = 4,
        ssim_scope: Literal["image", "patch", "off"] = "off",
        ssim_threshold: float | None = None,
    ) -> None:
        super().__init__(candidates=candidates, ssim_scope=ssim_scope, ssim_threshold=ssim_threshold)
        check_range("area", area, 0, 1)
        check_range("aspect", aspect, 0, 1)
        check_number("jitter", jitter, 0, 0.5)
        self.area, self.aspect, self.strengths = area, aspect, Strengths(jitter, jitter, jitter, jitter)

    def edit(self, images: Tensor, owner: Tensor, uniforms: Tensor) -> Edit:
        rows, columns = images.shape[-2:]
        area, aspect, lying, *places = uniforms[:, :7].unbind(1)
        shape = between(aspect, *self.aspect)
        shape = shape.where(lying < 0.5, 1 / shape)
        height, width = rectangle(between(area, *self.area), shape, rows, columns)
        plan = _anywhere(places, height, width, torch.zeros_like(area), (rows, columns))
        return paste(images, owner, plan, uniforms[:, 7:], self.strengths)


class CutPasteScar(GatedEdit):
    """A long thin rectangle, turned and pasted at a random place.

    Args:
        width: pixels, from and to, in a picture of 256x256; in proportion in one of another size.
        length: likewise; upright before it is turned.
        angle: degrees of turn, either way.
        jitter: strength of the change in brightness, contrast, saturation and hue, at most 0.5.
        candidates: see `PseudoAnomaly`.
        ssim_scope: see `PseudoAnomaly`.
        ssim_threshold: see `PseudoAnomaly`.

    Raises:
        UserError: a number out of range.
    """

    uniforms = 7 + DRAWS

    def __init__(
        self,
        *,
        width: tuple[float, float] = (2.0, 16.0),
        length: tuple[float, float] = (10.0, 25.0),
        angle: float = 45.0,
        jitter: float = 0.1,
        candidates: int = 4,
        ssim_scope: Literal["image", "patch", "off"] = "off",
        ssim_threshold: float | None = None,
    ) -> None:
        super().__init__(candidates=candidates, ssim_scope=ssim_scope, ssim_threshold=ssim_threshold)
        check_range("width", width, 0, _PUBLISHED_SIDE)
        check_range("length", length, 0, _PUBLISHED_SIDE)
        check_number("angle", angle, 0, 180)
        check_number("jitter", jitter, 0, 0.5)
        self.width, self.length, self.angle = width, length, angle
        self.strengths = Strengths(jitter, jitter, jitter, jitter)

    def edit(self, images: Tensor, owner: Tensor, uniforms: Tensor) -> Edit:
        rows, columns = images.shape[-2:]
        across, along, turn, *places = uniforms[:, :7].unbind(1)
        scale = math.sqrt(rows * columns) / _PUBLISHED_SIDE
        height = (scale * between(along, *self.length)).round().long().clamp(1, rows)
        width = (scale * between(across, *self.width)).round().long().clamp(1, columns)
        angle = torch.deg2rad(between(turn, -self.angle, self.angle))
        plan = _anywhere(places, height, width, angle, (rows, columns))
        return paste(images, owner, plan, uniforms[:, 7:], self.strengths)


class CutPaste3Way(PseudoAnomaly):
    """Of each picture a patch (kind 1, `CutPaste`) and a scar (kind 2, `CutPasteScar`), with the published ranges.

    Args:
        jitter: strength of the change in brightness, contrast, saturation and hue, at most 0.5.
        candidates: see `PseudoAnomaly`.
        ssim_scope: see `PseudoAnomaly`.
        ssim_threshold: see `PseudoAnomaly`.

    Raises:
        UserError: a number out of range.
    """

    kinds = 2

    def __init__(
        self,
        *,
        jitter: float = 0.1,
        candidates: int = 4,
        ssim_scope: Literal["image", "patch", "off"] = "off",
        ssim_threshold: float | None = None,
    ) -> None:
        super().__init__(candidates=candidates, ssim_scope=ssim_scope, ssim_threshold=ssim_threshold)
        self.patch = CutPaste(
            jitter=jitter, candidates=candidates, ssim_scope=ssim_scope, ssim_threshold=ssim_threshold
        )
        self.scar = CutPasteScar(
            jitter=jitter, candidates=candidates, ssim_scope=ssim_scope, ssim_threshold=ssim_threshold
        )

    @property
    def uniforms_of_picture(self) -> int:
        return self.patch.uniforms_of_picture + self.scar.uniforms_of_picture

    def generate(self, images: Tensor, uniforms: Tensor) -> PseudoAnomalies:
        of_patch = self.patch.uniforms_of_picture
        patches = self.patch.generate(images, uniforms[:, :of_patch])
        scars = self.scar.generate(images, uniforms[:, of_patch:])
        scars = scars._replace(kind=torch.full_like(scars.kind, 2))
        return PseudoAnomalies(*(torch.cat(pair) for pair in zip(patches, scars, strict=True)))


def _anywhere(places: list[Tensor], height: Tensor, width: Tensor, angle: Tensor, size: tuple[int, int]) -> Paste:
    """From any place to any place, such that the turned rectangle lies within the picture where it fits."""
    rows, columns = size
    from_y, from_x, to_y, to_x = places
    top, left = whole(from_y, rows - height + 1), whole(from_x, columns - width + 1)
    cut = Boxes(top, left, top + height, left + width)
    cos, sin = angle.cos().abs(), angle.sin().abs()
    reach_y, reach_x = cos * height + sin * width, cos * width + sin * height  # of the turned rectangle
    new_top, new_left = _fitting(to_y, height, reach_y, rows), _fitting(to_x, width, reach_x, columns)
    return Paste(cut, new_top, new_left, angle)


def _fitting(u: Tensor, length: Tensor, reach: Tensor, side: int) -> Tensor:
    """Where a rectangle of this length begins, such that `reach` around its middle fits, or else in the middle."""
    slack = side - length
    free = (slack - 2 * ((reach - length) / 2).ceil().long()).clamp(min=0).minimum(slack)
    return whole(u, free + 1) + (slack - free) // 2
