"""What a frozen base is asked in a training step: latents of pictures at a random step of its process."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_defect.diffusion.base_model import LatentBase
from lit_defect.losses.diffusion import min_snr_weights, offset_noise
from lit_defect.transfer import sent


class Asked(NamedTuple):
    """A question to the U-Net, and the answer.

    Attributes:
        state: (B, C, h, w), the noisy latents x_t.
        t: (B,) int64.
        target: (B, C, h, w), what the U-Net should say.
        weights: (B,) of min-SNR, or None.
    """

    state: Tensor
    t: Tensor
    target: Tensor
    weights: Tensor | None


def noised(base: LatentBase, moments: Tensor, offset: float, min_snr_gamma: float | None) -> Asked:
    """Draw latents, steps and noise by torch's global generator.

    Args:
        base: whose process and prediction it is.
        moments: (B, 2 C, h, w), mean and log variance of the latents.
        offset: strength of noise that is constant over a picture.
        min_snr_gamma: of min-SNR weighting; None weighs all steps alike.
    """
    latents = base.latents(moments, torch.randn_like(moments[:, : base.channels]))
    t = torch.randint(base.process.train_steps, (len(latents),), device=latents.device)
    noise = offset_noise(torch.randn_like(latents), offset)
    state = base.process.add_noise(latents, noise, t)
    weights = None
    if min_snr_gamma is not None:
        weights = min_snr_weights(sent(base.process.alpha_bar, t.device)[t], min_snr_gamma, base.prediction)
    return Asked(state, t, base.process.target(state, latents, t, base.prediction), weights)
