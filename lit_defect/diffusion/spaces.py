"""Where a refiner's states live: the label map itself, or the latents of an autoencoder of label maps."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor
from torch.nn import functional as F

from lit_defect.diffusion import labels


class Space(Protocol):
    """Label maps (B, n, H, W) in [-1, 1] and pictures (B, 3, H, W) in [-1, 1] as channels of a state, and back.

    Attributes:
        classes: n.
        channels: of the labels in a state.
        image_channels: of the picture.
        factor: pixels along a side of one place of a state.
        limit: a prediction of x_0 is clipped to -limit ... limit.
    """

    classes: int
    channels: int
    image_channels: int
    factor: int
    limit: float

    def encode(self, labels: Tensor) -> Tensor:
        """(B, n, H, W) -> (B, channels, H / factor, W / factor)."""

    def decode(self, state: Tensor) -> Tensor:
        """(B, channels, h, w) -> probabilities (B, n, H, W)."""

    def image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, image_channels, h, w)."""


class PixelSpace:
    """States are label maps (Ando)."""

    image_channels = 3
    factor = 1
    limit = 1.0

    def __init__(self, classes: int) -> None:
        self.classes = self.channels = classes

    def encode(self, labels: Tensor) -> Tensor:
        """As it is."""
        return labels

    def decode(self, state: Tensor) -> Tensor:
        """(x + 1) / 2, as probabilities."""
        return labels.decode(state)

    def image(self, images: Tensor) -> Tensor:
        """As it is."""
        return images


class LatentSpace:
    """States are latents of a label autoencoder (after Rombach et al., CVPR 2022).

    The picture needs no autoencoder of its own: each block of factor x factor pixels becomes channels, which loses
    nothing.

    Args:
        autoencoder: a `LabelAutoencoder`, frozen.
    """

    def __init__(self, autoencoder: Any) -> None:
        self.autoencoder = autoencoder
        self.classes = int(autoencoder.classes)
        self.channels = int(autoencoder.latent_channels)
        self.factor = int(autoencoder.factor)
        self.limit = float(autoencoder.limit)
        self.image_channels = 3 * self.factor**2

    def encode(self, labels: Tensor) -> Tensor:
        """By the autoencoder, scaled to unit variance."""
        latents: Tensor = self.autoencoder.encode(labels)
        return latents

    def decode(self, state: Tensor) -> Tensor:
        """By the autoencoder."""
        probabilities: Tensor = self.autoencoder.decode(state).float().softmax(1)
        return probabilities

    def image(self, images: Tensor) -> Tensor:
        """Blocks to channels."""
        return F.pixel_unshuffle(images, self.factor)
