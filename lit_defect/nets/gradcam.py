"""Grad-CAM (Selvaraju et al. 2017): where in the picture the evidence for a class lies.

With A the last feature map (C channels of h x w) and y the logit of the class,
1. alpha_k = mean over i, j of dy / dA_kij      (eq. 1: how much the class wants channel k)
2. L = ReLU(sum over k of alpha_k A_k)          (eq. 2: evidence for, not against)
3. L is enlarged to the image and divided by its maximum.

For a network that ends in average pooling and one linear layer this is CAM (Zhou et al. 2016). For a
ViT, A is what the last block attends to; the map is a rougher guide there, and may be empty.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from lit_defect.errors import UserError
from lit_defect.nets.backbones import Backbone


def grad_cam(backbone: Backbone, images: Tensor, target: Tensor | Callable[[Tensor], Tensor]) -> Tensor:
    """Class-activation maps of a batch; or maps of what raises any other score of the features.

    Runs in eval mode, leaves the network's mode and gradients as they were, and works inside
    `torch.inference_mode`.

    Args:
        backbone: a network with a head, or without one for a score of the features.
        images: (B, 3, H, W), normalised.
        target: (B,) int64, the class to explain for each image; or a function of the features (B, D) -> (B,).
    Returns:
        (B, H, W) float32 in [0, 1]; all zero where nothing speaks for the class.
    Raises:
        UserError: the network has no feature map in space that we know how to find.
    """
    training = backbone.training
    try:
        with torch.inference_mode(False), torch.enable_grad():
            maps, features = _maps_and_features(backbone.eval(), images.clone())
            if isinstance(target, Tensor):
                logits = backbone.head(features)
                evidence = logits.gather(1, target.clone().to(logits.device)[:, None])
            else:
                evidence = target(features)
            (gradient,) = torch.autograd.grad(evidence.sum(), maps)
    finally:
        backbone.train(training)
    size = (images.shape[-2], images.shape[-1])
    a = _channels_first(backbone, maps.detach(), size).float()  # (B, C, h, w)
    alpha = _channels_first(backbone, gradient, size).float().mean((2, 3), keepdim=True)
    cam = (alpha * a).sum(1, keepdim=True).relu()  # (B, 1, h, w)
    cam = functional.interpolate(cam, size, mode="bilinear", align_corners=False).squeeze(1)
    return cam / cam.amax((1, 2), keepdim=True).clamp_min(torch.finfo(cam.dtype).tiny)


def _maps_and_features(backbone: Backbone, images: Tensor) -> tuple[Tensor, Tensor]:
    """The map A as a leaf of the graph, and the features (B, D) that follow from it."""
    with torch.no_grad():
        maps = backbone.feature_map(images)
    if maps.ndim == 4:
        maps = maps.requires_grad_()
        return maps, backbone.pool(maps)
    # Tokens: after the last attention the class token alone may decide, and the gradient at the other
    # tokens is zero. What the last block attends to is still a map.
    network = backbone.model
    layer = getattr(network.blocks[-1], "norm1", None) if hasattr(network, "blocks") else None
    if layer is None or not hasattr(network, "patch_embed"):
        raise UserError(f"Grad-CAM: there is no feature map of {backbone.name} that has a place in the picture.")
    kept: list[Tensor] = []

    def keep(_module: object, _inputs: object, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[0]

    handle = layer.register_forward_hook(keep)
    try:
        features = backbone.features(images)
    finally:
        handle.remove()
    return kept[0], features


def _channels_first(backbone: Backbone, maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, h, w), (B, h, w, C) or tokens (B, N, C) -> (B, C, h, w)."""
    if maps.ndim == 3:
        patch = backbone.model.patch_embed.patch_size
        h, w = size[0] // patch[0], size[1] // patch[1]
        maps = maps[:, maps.shape[1] - h * w :]  # class and register tokens come first
        return maps.transpose(1, 2).unflatten(2, (h, w))
    return maps if maps.shape[1] == backbone.model.num_features else maps.permute(0, 3, 1, 2)
