"""Changes of light and colour of a patch: one affine map of the colours for each patch.

With Y the grey of a colour v (Rec. 601) and m the patch's mean grey:

1. brightness: b v; contrast, about the mean grey: c (b v) + (1 - c) b m
2. saturation, about the pixel's own grey: Y + s (v - Y)
3. hue: a turn of v - Y by an angle t about the grey axis: cos t (v - Y) + sin t J v, with J v the colour a quarter
   of a turn further

All of it is p v + r J v + q Y + o, with four numbers per patch: p = b c s cos t, r = b c s sin t, q = b c - p,
o = (1 - c) b m. Values are clamped to [0, 1] once, at the end. A grey patch stays grey.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lit_defect.anomalies.draws import check_number
from lit_defect.anomalies.pixels import Pixels
from lit_defect.transfer import sent

DRAWS = 4  # uniforms for one patch
_LUMA = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
# Luma and the chroma axes I and Q; their printed digits do not quite sum to nought, so grey would have a colour.
_CHROMA = torch.tensor([[0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], dtype=torch.float64)
_YIQ = torch.cat((_LUMA[None], _CHROMA - _CHROMA.mean(dim=1, keepdim=True)))
_QUARTER = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
_J: list[list[float]] = (torch.linalg.inv(_YIQ) @ _QUARTER @ _YIQ).tolist()


class Strengths(NamedTuple):
    """How much each is changed at most."""

    brightness: float  # factors lie within 1 +- strength
    contrast: float
    saturation: float
    hue: float  # share of a full turn, either way

    def checked(self) -> Strengths:
        """Itself.

        Raises:
            UserError: a factor beyond 1, or more than half a turn of the hue.
        """
        for name, strength in self._asdict().items():
            check_number(name, strength, 0, 0.5 if name == "hue" else 1)
        return self


def jitter(values: Tensor, pixels: Pixels, uniforms: Tensor, strengths: Strengths) -> Tensor:
    """Change the colours of n patches, each by its own amounts.

    Args:
        values: (3, N) float32, what lies on the N pixels.
        pixels: of n patches.
        uniforms: (n, 4) float64 in [0, 1), on the CPU.
        strengths: the largest changes.

    Returns:
        (3, N) float32 in [0, 1].
    """
    amount = (2 * uniforms - 1) * torch.tensor(strengths, dtype=torch.float64)  # (n, 4)
    b, c, s = (1 + amount[:, :3]).unbind(1)
    turn = 2 * math.pi * amount[:, 3]
    grey = sum(weight * colour for weight, colour in zip(_LUMA.tolist(), values, strict=True))  # (N,)
    assert isinstance(grey, Tensor)
    mean = pixels.sums(grey) / sent(pixels.lengths.clamp(min=1), grey.device)  # (n,)
    p, r = b * c * s * turn.cos(), b * c * s * turn.sin()
    p_each, r_each, q_each = pixels.spread(torch.stack((p, r, b * c - p)).float())
    common = pixels.spread(mean * sent(((1 - c) * b).float(), mean.device)).addcmul_(q_each, grey)
    changed = torch.addcmul(common, values, p_each)  # (3, N)
    if strengths.hue:
        for row, target in zip(_J, changed, strict=True):
            for weight, colour in zip(row, values, strict=True):
                target.addcmul_(r_each, colour, value=weight)
    return changed.clamp_(0, 1)
