"""Several kinds of pseudo-anomaly in one training, each picture taking one of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_defect.anomalies.base import PseudoAnomalies, PseudoAnomaly
from lit_defect.anomalies.draws import KEY
from lit_defect.errors import UserError
from lit_defect.transfer import sent


class MixedAnomaly(PseudoAnomaly):
    """Makes of each picture the pseudo-anomaly of one of several makers, drawn with equal chances.

    Args:
        makers: each with one kind, and with its own gate.

    Raises:
        UserError: no makers, or one that makes several kinds.
    """

    def __init__(self, makers: list[PseudoAnomaly]) -> None:
        if not makers or any(maker.kinds > 1 for maker in makers):
            raise UserError(f"{KEY}.makers: expected one or more makers of one kind each, so not CutPaste3Way")
        gated = [maker for maker in makers if maker.ssim_scope != "off"]
        first = (gated or makers)[0]
        super().__init__(
            candidates=max(maker.candidates for maker in makers),
            ssim_scope=first.ssim_scope,
            ssim_threshold=first.ssim_threshold,
        )
        self.makers = makers

    @property
    def uniforms_of_picture(self) -> int:
        return 1 + max(maker.uniforms_of_picture for maker in self.makers)

    def generate(self, images: Tensor, uniforms: Tensor) -> PseudoAnomalies:
        choice = (uniforms[:, 0] * len(self.makers)).long()
        parts, order = [], []
        for number, maker in enumerate(self.makers):
            rows = (choice == number).nonzero().squeeze(1)
            if len(rows):
                made = maker.generate(
                    images[sent(rows, images.device)], uniforms[rows, 1 : 1 + maker.uniforms_of_picture]
                )
                missing = (0, self.candidates - made.tried.shape[1])  # of a maker that tries fewer
                tried, tried_ssim = (pad(part, missing, value=torch.nan) for part in (made.tried, made.tried_ssim))
                parts.append(made._replace(tried=tried, tried_ssim=tried_ssim))
                order.append(rows)
        back = sent(torch.cat(order).argsort(), images.device)
        return PseudoAnomalies(*(torch.cat(same)[back] for same in zip(*parts, strict=True)))
