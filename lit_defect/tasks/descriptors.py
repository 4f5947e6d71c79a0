"""How a defect looks to an autoencoder: a few numbers of its latents, by which generated and real ones are compared."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_defect.losses.diffusion import latent_mask


def descriptor(latents: Tensor, mask: Tensor) -> Tensor:
    """How a defect differs from what is around it: latents (1, C, h, w), mask (1, 1, H, W) -> (1, 2 C).

    Of each channel the mean inside minus the mean outside, and the standard deviation inside.
    """
    latents = latents.float()
    inside = latent_mask(mask, latents.shape[2:])
    outside = 1 - inside
    mean_in, mean_out = (
        (latents * part).sum(dim=(2, 3)) / part.sum(dim=(2, 3)).clamp(min=1) for part in (inside, outside)
    )
    spread = ((latents - mean_in[..., None, None]).square() * inside).sum(dim=(2, 3)) / inside.sum(dim=(2, 3))
    return torch.cat([mean_in - mean_out, spread.sqrt()], dim=1)
