"""One wrapper around every timm network: features, head, frozen parts, parameter groups.

    images in [0, 1] -> normalise -> feature_map -> features (B, D) -> head -> logits (B, C)

What each step is, by family:

| family | features | last block |
|---|---|---|
| VGG | 4096 values after fc7 (and its ReLU) | fc6 and fc7 |
| ResNet | pooled `layer4` | `layer4` |
| EfficientNet, MobileNetV2 | pooled `conv_head` | last stage and `conv_head` |
| MobileNetV3 | `conv_head` after pooling | `conv_head` |
| ConvNeXt, Swin | pooled and normalised last stage | last stage and the final norm |
| DenseNet | pooled `norm5` | `denseblock4` and `norm5` |
| ViT | class token, or the mean of the tokens, as timm pools | last transformer block and the final norm |

`maps` gives the features and, from the same pass, the last map of each stride: `layer2`, `layer3` and `layer4`
of a ResNet for 8, 16 and 32 pixels; a plain ViT has one stride only, and its map is the last block's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from lit_defect.errors import UserError
from lit_defect.nets.fitting import fingerprint
from lit_defect.nets.weights import create_model

Part = Literal["head", "last_block", "all"]


class Backbone(nn.Module):
    """A timm network cut before its classifier.

    `forward` is `head(features(images))`, which equals the timm network itself. The state_dict is the
    network's (prefix `model.`), the mean and the std, so that a checkpoint carries its normalisation.

    Args:
        name: timm name, such as `vgg19`.
        weights: null, `hub`, `hub:TAG`, a file, or `package:NAME` (see `weights.py`).
        num_classes: C, the width of the head; 0 for features alone (the head is then the identity).
        image_size: height and width of the images, for networks that are built for one size (ViT,
            Swin); null for the size of the weights. Convolutional networks take any size.
        drop_rate: dropout before the classifier (and, in VGG, between fc6 and fc7).
    Attributes:
        model: the timm network.
        input_size: (height, width) that the weights were trained with, or `image_size` where given.
        num_features: D, width of the features.
    Raises:
        UserError: unknown name, unavailable weights, a size that the network does not take, or a
            network without a single linear classifier.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        *,
        weights: str | None = None,
        num_classes: int = 0,
        image_size: int | tuple[int, int] | None = None,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.name = name
        self.model: Any = _create(name, weights, num_classes, size, drop_rate)
        config = self.model.pretrained_cfg
        self.input_size: tuple[int, int] = size or tuple(config["input_size"][1:])
        self.num_features: int = self.model.head_hidden_size
        self.classifier: str = config["classifier"]
        self.register_buffer("mean", torch.tensor(config["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(3, 1, 1))
        self._part: Part | int = "all"
        self._norms_rest = False

    # --- forward ---

    def normalise(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> the same, centred and scaled as the weights expect."""
        return (images - self.mean) / self.std

    def feature_map(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> the last map as the network lays it out.

        (B, C, h, w) for most, (B, h, w, C) for Swin, (B, N, C) for the tokens of a ViT.

        Raises:
            UserError: the network is built for pictures of another size.
        """
        self._check_size(images)
        return self.model.forward_features(images)

    def pool(self, feature_map: Tensor) -> Tensor:
        """What `feature_map` gives -> (B, D)."""
        return self.model.forward_head(feature_map, pre_logits=True)

    def features(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> (B, D), what the classifier sees."""
        return self.pool(self.feature_map(images))

    def head(self, features: Tensor) -> Tensor:
        """(B, D) -> logits (B, C)."""
        return self.model.get_classifier()(features)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> logits (B, C)."""
        return self.head(self.features(images))

    def maps(self, images: Tensor, strides: Sequence[int] = (8, 16, 32)) -> tuple[Tensor, list[Tensor]]:
        """The features, and the maps that lie on the way to them, in one forward pass.

        Args:
            images: normalised, (B, 3, H, W).
            strides: pixels of the image per step in the map. Of several layers with one stride the last
                is taken, as it is: of ViT, Swin and ConvNeXt before the final norm.
        Returns:
            `features(images)` (B, D), and one map (B, C, h, w) for each stride, in the order of `strides`
            and in this layout whatever the network's own; h and w are about H / stride and W / stride, as
            the network's padding has it.
        Raises:
            UserError: the network has no layer of a stride; the message names those that it has. Or it is built
                for pictures of another size.
        """
        self._check_size(images)
        places = self._places(strides)
        ascending = sorted(set(places))
        last, taken = self.model.forward_intermediates(images, indices=ascending, output_fmt="NCHW")
        found = dict(zip(ascending, taken, strict=True))
        return self.pool(last), [found[place] for place in places]

    def _check_size(self, images: Tensor) -> None:
        patches: Any = getattr(self.model, "patch_embed", None)
        height, width = images.shape[-2:]
        if getattr(patches, "strict_img_size", False) and (height, width) != tuple(patches.img_size):
            wanted = "x".join(map(str, patches.img_size))
            raise UserError(
                f"backbone: {self.name} is built for pictures of {wanted}, and these are {height}x{width}: "
                "set model.init_args.image_size to the size that they are to have"
            )

    def map_layers(self, strides: Sequence[int] = (8, 16, 32)) -> list[str]:
        """Names of the layers whose maps `maps` gives, such as `layer2`; raises what `maps` raises."""
        return [self._layers[place][1] for place in self._places(strides)]

    @property
    def _layers(self) -> list[tuple[int, str]]:
        """Stride and name of each layer that timm can show, first to last; none where it shows none."""
        shown = getattr(self.model, "feature_info", ()) if hasattr(self.model, "forward_intermediates") else ()
        return [(layer["reduction"], layer["module"]) for layer in getattr(shown, "info", shown)]

    def _places(self, strides: Sequence[int]) -> list[int]:
        """Position among `_layers` of the last layer of each stride."""
        last = {stride: place for place, (stride, _) in enumerate(self._layers)}
        if not last:
            raise UserError(
                f"backbone: timm gives no maps of {self.name}; choose another, such as resnet18, or a newer timm."
            )
        missing = [stride for stride in strides if stride not in last]
        if missing or not strides:
            raise UserError(
                f"strides of the maps: {list(strides)}, but {self.name} has maps at strides {sorted(last)}. "
                "Choose among these, or another backbone."
            )
        return [last[stride] for stride in strides]

    # --- transfer ---

    def unfreeze(self, part: Part) -> Self:
        """Train `part` and keep everything before it as it is.

        `head`: the linear classifier. `last_block`: also the last group of layers by timm's coarse
        `group_matcher` that holds a weight matrix or kernel beside the classifier's (table above), and
        all that follows it. `all`: everything. Frozen layers stay in eval mode: BatchNorm keeps its
        running statistics, and with `head` the features of an image are constant.
        """
        if part not in get_args(Part):
            raise UserError(f"part to train: {part!r} is none of {', '.join(get_args(Part))}.")
        self._part = part
        trained = self._names_in(part)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trained)
        return self.train(self.training)

    def freeze(self, stages: int, *, norms: bool = False) -> Self:
        """Train everything but the first stages.

        Args:
            stages: how many of timm's coarse groups of layers stay as they are, counted from the input; the
                stem is the first (ResNet: stem, layer1 to layer4; EfficientNet: stem, blocks 0 to 6, head).
            norms: keep the running statistics of every BatchNorm, of the trained stages too.

        Raises:
            UserError: there are fewer stages.
        """
        groups = self._groups()
        if not 0 <= stages < len(groups):
            raise UserError(
                f"frozen_stages = {stages}: {self.name} has {len(groups)}, and one at least must be trained"
            )
        kept = {name for group in groups[:stages] for name in group}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name not in kept)
        self._part, self._norms_rest = stages, norms
        return self.train(self.training)

    @property
    def constant_features(self) -> bool:
        """Whether training leaves `features` as they are, so that they can be computed once."""
        return self._part == "head"

    def train(self, mode: bool = True) -> Self:
        """Training mode for what trains; the frozen layers stay in eval mode."""
        super().train(mode)
        if self._part == "head":
            self.model.eval()  # also the dropout that some networks apply as a function of their own mode
        elif mode:
            _eval_frozen(self.model)
            for module in self.model.modules() if self._norms_rest else ():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def _names_in(self, part: Part) -> set[str]:
        names = {name for name, _ in self.model.named_parameters()}
        if part == "all":
            return names
        head = {name for name in names if name.startswith(f"{self.classifier}.")}
        if part == "head":
            return head
        groups = self._groups()
        shapes = dict(self.model.named_parameters())
        blocks = [i for i, group in enumerate(groups) if any(shapes[n].ndim > 1 for n in group if n not in head)]
        return head.union(*groups[blocks[-1] :])

    def _groups(self) -> list[list[str]]:
        """Names of the parameters of each of timm's coarse groups of layers, first to last."""
        from timm.models import group_parameters

        groups = group_parameters(self.model, self.model.group_matcher(coarse=True))
        return [groups[number] for number in sorted(groups)]

    def parameter_groups(
        self, *, lr: float, weight_decay: float, layer_decay: float = 1.0, by_layer: bool = False
    ) -> list[dict[str, Any]]:
        """Groups of the trainable parameters, for `timm.optim.create_optimizer_v2` or any optimiser.

        A layer k steps before the last learns at `lr * layer_decay ** k`, counted by timm's fine
        `group_matcher` (discriminative fine-tuning, Howard & Ruder 2018). Norms, biases and what the
        network itself excepts (position embeddings) have no weight decay. Layers that learn alike are one group, or
        with `by_layer` a group each, as in states that earlier versions have saved.
        """
        from timm.optim import param_groups_layer_decay

        excepted = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else ()
        groups = param_groups_layer_decay(
            self.model, weight_decay=weight_decay, no_weight_decay_list=excepted, layer_decay=layer_decay
        )
        # A plain `lr` in place of timm's `lr_scale`, which only timm's own schedulers read. One group for layers that
        # learn alike: an optimizer's step costs a GPU as many launches as it has groups.
        alike: dict[tuple[float, float, int], list[nn.Parameter]] = {}
        for number, group in enumerate(groups):
            kind = (lr * group["lr_scale"], group["weight_decay"], number * by_layer)
            alike.setdefault(kind, []).extend(group["params"])
        return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay, _), params in alike.items()]

    def fingerprint(self) -> str:
        """Identity of the map from normalised images to features: equal for equal networks and weights."""
        body = {k: v for k, v in self.model.state_dict().items() if not k.startswith(f"{self.classifier}.")}
        return fingerprint(body, prefix=self.name)


def _create(name: str, weights: str | None, num_classes: int, size: tuple[int, int] | None, drop_rate: float) -> Any:
    import timm

    arguments: dict[str, Any] = {"drop_rate": drop_rate} if drop_rate else {}
    config = timm.models.get_pretrained_cfg(name) if timm.is_model(name) else None
    if size and config and config.fixed_input_size:
        arguments["img_size"] = size
    try:
        model = create_model(name, weights, num_classes=num_classes, **arguments)
        classifier = model.get_classifier()
    except (TypeError, ValueError, AssertionError, AttributeError) as error:
        raise UserError(f"backbone: timm cannot build {name} with {arguments}: {error}") from error
    if not isinstance(classifier, nn.Linear if num_classes else nn.Identity):
        raise UserError(f"backbone: {name} does not end in one linear classifier; choose another.")
    return model


def _eval_frozen(module: nn.Module) -> None:
    """Put every part whose parameters are all frozen into eval mode, with all that it contains.

    Parts without parameters (dropout, pooling) go with the part around them.
    """
    flags = {parameter.requires_grad for parameter in module.parameters()}
    if flags == {False}:
        module.eval()
    elif flags == {True, False}:
        for child in module.children():
            _eval_frozen(child)
