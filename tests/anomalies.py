"""A maker of pseudo-anomalies that shows what is done with its kinds and with what it rejects."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_defect.anomalies import PseudoAnomalies, PseudoAnomaly


class Stripes(PseudoAnomaly):
    """Black rows in the first kind, white ones in the second; bright pictures are rejected."""

    kinds = 2
    uniforms_of_picture = 1

    def generate(self, images: Tensor, uniforms: Tensor) -> PseudoAnomalies:
        made = torch.cat([images, images])
        made[: len(images), :, ::4] = 0
        made[len(images) :, :, ::4] = 1
        masks = torch.zeros_like(made[:, :1], dtype=torch.bool)
        masks[:, :, ::4] = True
        accepted = (images.mean((1, 2, 3)) < 0.9).repeat(2)
        one = made.new_ones(len(made))
        kind = torch.arange(1, 3, device=made.device).repeat_interleave(len(images))
        return PseudoAnomalies(made, masks, one, accepted, one, kind, one[:, None], one[:, None])
