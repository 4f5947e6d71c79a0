"""The reverse process of a latent diffusion model, of a whole picture or of a region of a given one.

Blended latent diffusion (Avrahami et al., SIGGRAPH 2023): before every step the latents outside the mask are those of
the given picture, noised to that step:

    x_t <- m x_t + (1 - m) q(normal, t)
    x0  <- what the network thinks
    x_s <- one step of the sampler

AnomalyDiffusion (Hu et al., AAAI 2024) samples so. In its authors' code the mask is wider at first: a thin defect would
otherwise stand among normal latents from the first step on, which the network continues. The blend after the last step,
without which the region's neighbours are the network's, is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from lit_defect.diffusion.labels import draw_normal
from lit_defect.diffusion.process import Prediction
from lit_defect.diffusion.samplers import Sampler

Denoise = Callable[[Tensor, Tensor], Tensor]
"""States (B, C, h, w) and their steps t (B,) -> what the network answers (B, C, h, w)."""


class Region(NamedTuple):
    """What stays of a picture.

    Attributes:
        normal: (B, C, h, w), its clean latents.
        mask: (B, 1, h, w), 1 where it is replaced.
        grow: how far that reaches beyond the mask, as a share of the shorter side: 1.1 times this at the first of all
            steps, a tenth of it at the last.
    """

    normal: Tensor
    mask: Tensor
    grow: float = 0.0

    def at(self, step: int, steps: int) -> Tensor:
        """The mask (B, 1, h, w) at a step of so many: wider the noisier, as in the authors' code (their share: 1/4)."""
        cells = int((step / steps + 0.1) * self.grow * min(self.mask.shape[2:]))
        return F.max_pool2d(self.mask, 2 * cells + 1, stride=1, padding=cells) if cells else self.mask


class Look(NamedTuple):
    """What is known before a call of the network.

    Attributes:
        state: (B, C, h, w), x_t, which it will be given.
        mask: (B, 1, h, w), 1 where the picture is replaced at this step.
        x0: (B, C, h, w), what it thought last; None at the first call.
    """

    state: Tensor
    mask: Tensor
    x0: Tensor | None


def sample(
    denoise: Denoise,
    sampler: Sampler,
    prediction: Prediction,
    shape: Sequence[int],
    generators: list[Generator],
    like: Tensor,
    *,
    region: Region | None = None,
    before: Callable[[Look], None] | None = None,
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
        before: called before each call of the network.

    Returns:
        (B, C, h, w) clean latents; outside the region's mask exactly those of the given picture.
    """
    process, scheduler = sampler.process, sampler.begin()
    noise = draw_normal(shape, generators, like)
    state = noise
    if region is not None:
        if not sampler.timesteps:  # a strength of 0
            return region.normal
        if sampler.strength < 1:  # the last step of the forward process still carries a little of the picture
            state = process.add_noise(region.normal, noise, _steps(sampler.timesteps[0], noise))
    x0, mask = None, torch.ones_like(state[:, :1])
    for step in sampler.timesteps:
        t = _steps(step, state)
        if region is not None:
            if sampler.eta:  # a sampler that forgets its noise takes fresh one; another goes on with its own
                noise = draw_normal(shape, generators, like)
            mask = region.at(step, process.train_steps)
            state = _blend(state, process.add_noise(region.normal, noise, t), mask)
        if before is not None:
            before(Look(state, mask, x0))
        x0 = process.x0_of(denoise(state, t).float(), state, t, prediction)
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
