"""Losses of AnomalyDiffusion (Hu et al., AAAI 2024), and what later papers add to them.

    m     = latent_mask(masks, size, "max")                   (B, 1, h, w), the mask at the resolution of the latents
    loss  = masked_mse(output, target, m, normalised=True)    the paper's masked loss, divided by the mask's area
          + weight * alignment_loss(maps, masks)              the learnt tokens are attended to inside the mask

`latent_mask(..., "bilinear")` with `masked_mse(..., normalised=False)` is what the authors train with: a defect that
covers less than half of a cell is then nowhere, and one of 1 % of the picture weighs a hundredth of a large one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from lit_defect.errors import UserError

MaskMethod = Literal["max", "bilinear"]


def latent_mask(masks: Tensor, size: Sequence[int], how: MaskMethod = "max") -> Tensor:
    """Masks (B, 1, H, W) in {0, 1} at the resolution of latents, (B, 1, h, w) in {0, 1}.

    Args:
        masks: (B, 1, H, W), float.
        size: (h, w).
        how: `max`: a cell counts if any of its pixels does; `bilinear`: interpolated without smoothing and cut at
            0.5, as the authors do.
    """
    if how == "max":
        return F.adaptive_max_pool2d(masks, tuple(size))
    if how == "bilinear":
        return (F.interpolate(masks, tuple(size), mode="bilinear", align_corners=False) >= 0.5).to(masks.dtype)
    raise UserError(f"model.init_args.latent_mask = {how!r}: expected max or bilinear")


def masked_mse(
    output: Tensor, target: Tensor, mask: Tensor | None = None, normalised: bool = True, weights: Tensor | None = None
) -> Tensor:
    """Squared error e^2 = (output - target)^2 inside a mask m.

        normalised   mean over pictures of  sum(m e^2) / (C sum m)   an empty mask gives 0
        otherwise    mean over everything of  (m e)^2                as the authors compute it
        no mask      mean over everything of  e^2

    Args:
        output, target: (B, C, h, w).
        mask: (B, 1, h, w) in {0, 1}, or None. Normalised, any weights of the places w >= 0 do as well:
            sum(w e^2) / (C sum w).
        normalised: whether each picture is divided by its own mask's area.
        weights: (B,) factor of each picture, such as `min_snr_weights`.

    Returns:
        scalar, float32 under autocast too.

    Raises:
        ValueError: the shapes do not match.
    """
    if output.shape != target.shape or (mask is not None and mask.shape != (len(output), 1, *output.shape[2:])):
        shapes = [tuple(tensor.shape) for tensor in (output, target, mask) if tensor is not None]
        raise ValueError(f"output, target and mask of shapes {shapes}: expected (B, C, h, w) twice and (B, 1, h, w)")
    error = (output.float() - target.float()).square()  # (B, C, h, w)
    if mask is not None:
        error = error * mask
    loss = error.flatten(1).mean(dim=1)  # (B,)
    if mask is not None and normalised:
        loss = loss / mask.float().flatten(1).mean(dim=1).clamp(min=1 / mask[0].numel())
    return (loss if weights is None else loss * weights).mean()


def min_snr_weights(alpha_bar: Tensor, gamma: float, prediction: str = "epsilon") -> Tensor:
    """Weights that bound what the easy steps, almost without noise, add to the loss.

    With SNR = alpha_bar / (1 - alpha_bar), the loss on x_0 weighs min(SNR, gamma); for networks that answer otherwise
    it is divided by what turns their error into one of x_0 (Hang et al., ICCV 2023):

        sample  min(SNR, gamma)        epsilon  min(SNR, gamma) / SNR        v_prediction  min(SNR, gamma) / (SNR + 1)

    Args:
        alpha_bar: (B,) at the steps of the batch.
        gamma: 5 in the paper.
        prediction: what the network answers.

    Returns:
        (B,)

    Raises:
        UserError: gamma <= 0, or an unknown prediction.
    """
    if gamma <= 0:
        raise UserError(f"model.init_args.min_snr_gamma = {gamma}: expected more than 0 (5 in the paper), or null")
    snr = alpha_bar / (1 - alpha_bar)
    if prediction == "epsilon":
        return (gamma / snr).clamp(max=1)  # min(SNR, gamma) / SNR, also where SNR = 0
    if prediction == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    if prediction == "sample":
        return snr.clamp(max=gamma)
    raise UserError(f"no min-SNR weights are known for a network that predicts {prediction!r}")


def offset_noise(noise: Tensor, strength: float, generator: Generator | None = None) -> Tensor:
    """Noise (B, C, h, w) plus one number per channel, of standard deviation `strength`.

    So a network learns to change the mean of a picture, which independent noise hardly hides (N. Guttenberg, 2023).
    """
    if not strength:
        return noise
    device = noise.device if generator is None else generator.device
    shift = torch.randn((*noise.shape[:2], 1, 1), generator=generator, device=device)
    return noise + strength * shift.to(noise)


def alignment_loss(maps: Sequence[Tensor], masks: Tensor) -> Tensor:
    """How much of the attention to the learnt tokens falls outside the defect (after DefectFill and SeaS, 2025).

    Args:
        maps: (B, h_l, w_l) of each layer, as `diffusion.attention` records them.
        masks: (B, 1, H, W) in {0, 1}, float; brought to each layer's grid by max-pooling.

    Returns:
        scalar: the mean over layers and pictures of 1 - (attention inside the mask) / (all of it).

    Raises:
        ValueError: no maps.
    """
    if not maps:
        raise ValueError("no attention was recorded")
    outside = []
    for attention in maps:
        inside = attention.float() * latent_mask(masks, attention.shape[1:])[:, 0]
        total = attention.float().sum(dim=(1, 2)).clamp(min=torch.finfo(torch.float32).tiny)
        outside.append(1 - inside.sum(dim=(1, 2)) / total)  # (B,)
    return torch.stack(outside).mean()
