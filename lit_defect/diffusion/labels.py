"""Label maps as what a diffusion model works on: one channel a class, +1 for the class of a pixel and -1 elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from lit_defect.transfer import sent

VOID = 255
LabelInput = Literal["sample", "argmax", "soft"]


def generators(seed: int, indices: Sequence[int], sample: int = 0) -> list[Generator]:
    """A random stream for each picture, by (seed, index of the picture, number of the sample) alone.

    What is drawn for a picture does not depend on its batch or its process, so any split of the work gives the same.
    """
    words = ([seed, index, sample] for index in indices)
    states = (np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] for entropy in words)
    return [Generator().manual_seed(int(state >> np.uint64(1))) for state in states]


def draw_normal(shape: Sequence[int], streams: Sequence[Generator], like: Tensor) -> Tensor:
    """(B, *shape) standard normal numbers, each picture's from its own stream."""
    return sent(torch.stack([torch.randn(*shape, generator=stream) for stream in streams]), like.device).to(like)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """(B, H, W) class ids -> (B, n, H, W) float32, +1 for the class, -1 for the others, 0 everywhere at void pixels."""
    void = labels == VOID
    hot = F.one_hot(labels.masked_fill(void, 0), classes).permute(0, 3, 1, 2).float()
    return (2 * hot - 1).masked_fill(void.unsqueeze(1), 0.0)


def sample_labels(probabilities: Tensor, streams: Sequence[Generator] | None = None) -> Tensor:
    """One class for each pixel, drawn by its probabilities (Ando, section 4): (B, n, H, W) -> (B, H, W) int64.

    Args:
        probabilities: sum to 1 over the classes.
        streams: one for each picture; None draws from torch's global generator.
    """
    count, classes, height, width = probabilities.shape
    if streams is None:
        level = torch.rand(count, 1, height, width, device=probabilities.device)
    else:
        drawn = [torch.rand(1, height, width, generator=stream) for stream in streams]
        level = sent(torch.stack(drawn), probabilities.device)
    above = probabilities.float().cumsum(1)
    # The last sum is 1 up to rounding; without it every level finds a class below n.
    return (level >= above[:, : classes - 1]).sum(1)


def encode(probabilities: Tensor, how: LabelInput, streams: Sequence[Generator] | None = None) -> Tensor:
    """Probabilities (B, n, H, W) of a first stage -> a label map (B, n, H, W) in [-1, 1].

    `sample` draws a class for each pixel (the paper), `argmax` takes the most probable, `soft` keeps 2 p - 1.
    """
    if how == "soft":
        return 2 * probabilities.float() - 1
    labels = sample_labels(probabilities, streams) if how == "sample" else probabilities.argmax(1)
    return one_hot(labels, probabilities.shape[1])


def decode(labels: Tensor) -> Tensor:
    """A label map (B, n, H, W) around [-1, 1] -> probabilities; uniform where every class is at -1 or below."""
    shares = ((labels.float() + 1) / 2).clamp(0, 1)
    total = shares.sum(1, keepdim=True)
    uniform = torch.full_like(shares, 1 / labels.shape[1])
    return torch.where(total > 1e-6, shares / total.clamp(min=1e-6), uniform)
