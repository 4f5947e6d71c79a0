"""Local pseudo-anomalies: a small patch of the picture, a little turned, shifted and changed in colour.

Source: Honda & Yamauchi, section 3.1. The paper gives no ranges. Here areas are spread evenly on a logarithmic scale,
so that as many candidates are a scratch as are a dent, and the patch goes back to about where it came from: the
change stays small, and the gate decides whether it can be seen.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lit_defect.anomalies.base import Edit, GatedEdit
from lit_defect.anomalies.colour import DRAWS, Strengths
from lit_defect.anomalies.draws import between, check_number, check_range, log_between, rectangle, whole
from lit_defect.anomalies.pasting import Paste, paste
from lit_defect.anomalies.pixels import Boxes


class LocalPseudoAnomaly(GatedEdit):
    """A patch cut, slightly changed and put back nearby.

    Args:
        area: share of the picture that the patch covers, from and to; logarithmic.
        aspect: width over height, from and to; logarithmic.
        angle: degrees of turn, either way, at most 180.
        shift: share of the picture's height and width by which it moves, either way.
        brightness: factor 1 +- at most this.
        contrast: factor 1 +- at most this, about the patch's mean grey.
        saturation: factor 1 +- at most this.
        hue: turn of the hue, either way, as a share of a full turn; 0.5 at most.
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
        area: tuple[float, float] = (0.005, 0.15),
        aspect: tuple[float, float] = (0.3, 3.3),
        angle: float = 15.0,
        shift: float = 0.05,
        brightness: float = 0.2,
        contrast: float = 0.2,
        saturation: float = 0.2,
        hue: float = 0.02,
        candidates: int = 4,
        ssim_scope: Literal["image", "patch", "off"] = "patch",
        ssim_threshold: float | None = None,
    ) -> None:
        super().__init__(candidates=candidates, ssim_scope=ssim_scope, ssim_threshold=ssim_threshold)
        check_range("area", area, 0, 1)
        check_range("aspect", aspect, 0, math.inf)
        check_number("angle", angle, 0, 180)
        check_number("shift", shift, 0, 0.5)
        self.area, self.aspect, self.angle, self.shift = area, aspect, angle, shift
        self.strengths = Strengths(brightness, contrast, saturation, hue).checked()

    def edit(self, images: Tensor, owner: Tensor, uniforms: Tensor) -> Edit:
        rows, columns = images.shape[-2:]
        area, aspect, top, left, down, right, turn = uniforms[:, :7].unbind(1)
        height, width = rectangle(log_between(area, *self.area), log_between(aspect, *self.aspect), rows, columns)
        top, left = whole(top, rows - height + 1), whole(left, columns - width + 1)
        new_top = _moved(top, height, rows, down, self.shift)
        new_left = _moved(left, width, columns, right, self.shift)
        angle = torch.deg2rad(between(turn, -self.angle, self.angle))
        plan = Paste(Boxes(top, left, top + height, left + width), new_top, new_left, angle)
        return paste(images, owner, plan, uniforms[:, 7:], self.strengths)


def _moved(place: Tensor, length: Tensor, side: int, u: Tensor, shift: float) -> Tensor:
    """Places moved either way by at most `shift` of the side; the middle of the patch stays in the picture."""
    moved = place + between(u, -shift * side, shift * side).round().long()
    return moved.maximum(-((length - 1) // 2)).minimum(side - 1 - length // 2)
