"""The reverse process of a latent diffusion model, of a whole picture or of a region of a given one.

Blended latent diffusion (Avrahami et al., SIGGRAPH 2023): before every step the latents outside the mask are those of
the given picture, noised to that step:

    x_t <- m x_t + (1 - m) q(normal, t)
    x0  <- what the network thinks
    x_s <- one step of the sampler

AnomalyDiffusion (Hu et al., AAAI 2024) samples so. The blend after the last step, without which the region's
neighbours are the network's, is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from lit_defect.diffusion.labels import draw_normal
from lit_defect.diffusion.process import Prediction
from lit_defect.diffusion.samplers import Sampler

Denoise = Callable[[Tensor, Tensor], Tensor]
"""States (B, C, h, w) and their steps t (B,) -> what the network answers (B, C, h, w)."""
Look = Callable[[Tensor, Tensor], None]
"""Told x_0 and the state x_t that it was predicted from, both (B, C, h, w)."""


class Region(NamedTuple):
    """What stays of a picture: its clean latents (B, C, h, w), and the mask (B, 1, h, w), 1 where it is replaced."""

    normal: Tensor
    mask: Tensor


def sample(
    denoise: Denoise,
    sampler: Sampler,
    prediction: Prediction,
    shape: Sequence[int],
    generators: list[Generator],
    like: Tensor,
    *,
    region: Region | None = None,
    after: Look | None = None,
) -> Tensor:
    """Run the reverse process.

    Args:
        denoise: the network.
        sampler: which steps, and how they are done; its strength says how far a region's own picture is noised.
        prediction: what the network answers.
        shape: (C, h, w) of the latents.
        generators: B random streams of the CPU.
        like: a tensor on the network's device, of the type that the states shall have.
        region: what stays; None makes a whole picture from noise.
        after: called after each network call.

    Returns:
        (B, C, h, w) clean latents; outside the region's mask exactly those of the given picture.
    """
    process, scheduler = sampler.process, sampler.begin()
    noise = draw_normal(shape, generators, like)
    state = noise
    if region is not None:
        if not sampler.timesteps:  # a strength of 0
            return region.normal
        state = process.add_noise(region.normal, noise, _steps(sampler.timesteps[0], noise))
    for step in sampler.timesteps:
        t = _steps(step, state)
        if region is not None:
            if sampler.eta:  # a sampler that forgets its noise takes fresh one; another goes on with its own
                noise = draw_normal(shape, generators, like)
            state = _blend(state, process.add_noise(region.normal, noise, t), region.mask)
        x0 = process.x0_of(denoise(state, t).float(), state, t, prediction)
        if after is not None:
            after(x0, state)
        state = sampler.step(scheduler, x0, step, state, generators)
    return state if region is None else _blend(state, region.normal, region.mask)


def guided(unet: Any, told: Tensor, untold: Tensor, scale: float) -> Denoise:
    """A U-Net of diffusers under classifier-free guidance (Ho & Salimans, 2022): e_u + scale (e_c - e_u).

    Args:
        unet: (states, t, text states) -> what has the answer as its `sample`; called once a step, with a batch of
            2 B whose first half is without condition.
        told: (B, L, D) text states of the condition.
        untold: (B, L, D) text states of none.
        scale: 1 for no guidance; then the batch is B, all of it with condition.
    """
    if scale == 1:
        return lambda state, t: unet(state, t, told).sample
    states = torch.cat([untold, told])

    def denoise(state: Tensor, t: Tensor) -> Tensor:
        both: Tensor = unet(state.repeat(2, 1, 1, 1), t.repeat(2), states).sample
        plain, asked = both.chunk(2)
        return plain + scale * (asked - plain)

    return denoise


def _steps(step: int, like: Tensor) -> Tensor:
    return torch.full((len(like),), step, device=like.device)


def _blend(inside: Tensor, outside: Tensor, mask: Tensor) -> Tensor:
    """`where`, and no sum of products: outside the mask nothing but the given latents, to the last bit."""
    return torch.where(mask > 0, inside, outside)
