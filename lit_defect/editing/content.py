"""What stands inside a mask when sampling starts, and the mask as the network is given it.

By the names of Stable Diffusion's web interface. `fill` acts on the picture before it is encoded: its surroundings are
blurred, wider and wider, and laid into the mask. `latent_noise` and `latent_nothing` act on what was encoded: unit
noise, or zeros, in the mask.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from lit_defect.editing.options import Content
from lit_defect.generation.files import Bools, Picture

_BLURS = ((2, 2), (4, 4), (16, 2), (64, 1), (256, 1))
"""Standard deviation in pixels, and how often it is laid on; the web interface's, the uppermost first."""

_SEEN = 1e-3  # share of a pixel that what lies below may still have; less than half a grey level
_REACH = 2.5  # standard deviations to which a mask's blur goes


def fill(picture: Picture, mask: Bools) -> Picture:
    """The picture (H, W, 3) with the inside of the mask (H, W) painted by blurs of what surrounds it.

    A blur that is wide enough to reach a pixel is a layer there, as opaque as surroundings are within its reach; the
    narrower one lies above. Outside nothing changes. Where all is masked, its mean colour is laid in.
    """
    filled = picture.copy()
    if mask.all():
        filled[:] = np.rint(picture.mean(axis=(0, 1)))
    elif mask.any():
        filled[mask] = np.rint(_surroundings(picture, mask)).clip(0, 255)
    return filled


def started(latents: Tensor, mask: Tensor, content: Content, noise: Tensor) -> Tensor:
    """What sampling starts from, before the noise of its first step is added.

    Args:
        latents: (B, C, h, w), of the picture; where content is `fill`, of the filled one.
        mask: (B, 1, h, w) of 0 and 1.
        content: of the mask.
        noise: (B, C, h, w), standard normal, of `latent_noise`.
    """
    if content == "latent_noise":
        return torch.where(mask > 0, noise, latents)
    if content == "latent_nothing":
        return torch.where(mask > 0, torch.zeros_like(latents), latents)
    return latents


def blurred(mask: Bools, sigma: float) -> NDArray[np.float32]:
    """A mask (H, W) with soft borders, 0 to 1; it reaches 2.5 `sigma` pixels further, as in the web interface."""
    soft = mask.astype(np.float32)
    if sigma <= 0:
        return soft
    soft = ndimage.gaussian_filter(soft, sigma, mode="mirror", radius=int(_REACH * sigma + 0.5))
    return np.asarray(soft.clip(0, 1))


def latent_cells(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """The places of the latents that are edited, (B, 1, h, w) of 0 and 1.

    Those that the mask covers by half. A part of it that covers none so far takes the one that it covers most and those
    that it covers half as much as that: small and thin defects stay.

    Args:
        mask: (B, 1, H, W), 0 to 1; may be soft.
        size: (h, w), of which the sides of the mask are multiples.
    """
    cells = torch.stack([torch.from_numpy(_cells(one[0], size)) for one in mask.detach().cpu().float()])
    return cells[:, None].to(mask)


def _surroundings(picture: Picture, mask: Bools) -> NDArray[np.float64]:
    """(N, 3) colours of the N pixels of a mask."""
    # Colours times opacity, and opacity, which is 1 outside: their blurs' quotient knows the outside only.
    outside = np.dstack([picture * ~mask[..., None], ~mask]).astype(np.float64)  # (H, W, 4)
    layers = np.zeros((int(mask.sum()), 4))
    for sigma, repeats in _BLURS:
        below = 1 - layers[:, 3:]
        if below.max() < _SEEN:
            break
        layer = _blur_within(outside, mask, sigma)
        layers += below * layer * sum((1 - layer[:, 3:]) ** time for time in range(repeats))
    mean = outside[~mask].mean(axis=0)
    layers += 1e-6 * mean  # of pixels that no blur reaches
    return np.asarray(layers[:, :3] / layers[:, 3:])


def _blur_within(values: NDArray[np.float64], mask: Bools, sigma: int) -> NDArray[np.float64]:
    """(N, C) of the blur of (H, W, C) at the N pixels of a mask; three means in turn, as Pillow approximates it."""
    half = sigma  # three means of 2 sigma + 1 pixels have a variance of sigma^2 + sigma
    reach = 3 * half
    box: Any = tuple(
        slice(max(0, span.start - reach), span.stop + reach) for span in ndimage.find_objects(mask.astype(np.uint8))[0]
    )
    part = values[box]
    for _ in range(3):
        part = ndimage.uniform_filter(part, 2 * half + 1, mode="nearest", axes=(0, 1))
    return np.asarray(part[mask[box]])


def _cells(mask: Tensor, size: tuple[int, int]) -> NDArray[np.bool_]:
    """`latent_cells` of one mask (H, W)."""
    covered = _coverage(mask, size)
    cells = np.asarray(covered >= 0.5)
    values = mask.numpy()
    parts, _ = ndimage.label(values > 0, structure=np.ones((3, 3)))
    sides = (mask.shape[0] // size[0], mask.shape[1] // size[1])
    for number, box in enumerate(ndimage.find_objects(parts), start=1):
        # The places that it touches: with thousands of specks, each must not cost what the whole picture does.
        here = tuple(slice(span.start // side, -(-span.stop // side)) for span, side in zip(box, sides, strict=True))
        pixels = tuple(slice(span.start * side, span.stop * side) for span, side in zip(here, sides, strict=True))
        part = torch.from_numpy(np.where(parts[pixels] == number, values[pixels], 0))
        own = _coverage(part, (here[0].stop - here[0].start, here[1].stop - here[1].start))
        if not cells[here][own > 0].any():
            cells[here] |= own >= own.max() / 2
    return cells


def _coverage(mask: Tensor, size: tuple[int, int]) -> NDArray[np.float64]:
    """(h, w): the mean of a mask (H, W) over each place."""
    return np.asarray(F.interpolate(mask[None, None], size=size, mode="area")[0, 0].double().numpy())
