"""Pictures that a latent diffusion model makes of prompts, for a look at what it has learnt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_defect.diffusion.labels import generators
from lit_defect.diffusion.latent_sampling import guided, sample
from lit_defect.diffusion.process import ForwardProcess, Prediction
from lit_defect.diffusion.samplers import Sampler

_GUIDANCE, _STEPS = 3.0, 25  # fewer steps if 25 do not divide T


@torch.no_grad()
def sample_prompts(
    unet: Any, told: Tensor, untold: Tensor, process: ForwardProcess, prediction: Prediction, shape: tuple[int, ...]
) -> Tensor:
    """Latents (B, C, h, w) by DDIM under guidance; the i-th is always drawn from the same noise.

    Args:
        unet: of diffusers.
        told: (B, L, D) text states of the prompts.
        untold: (1, L, D) of the empty one.
        process, prediction: that the network was trained with.
        shape: (C, h, w) of the latents.
    """
    count = len(told)
    steps = max(n for n in range(1, _STEPS + 1) if process.train_steps % n == 0)
    return sample(
        guided(unet, told, untold.expand(count, -1, -1), _GUIDANCE),
        Sampler("ddim", process, steps=steps, strength=1.0),
        prediction,
        shape,
        generators(0, range(count)),
        told,
    )
