"""Segmentation: a network that names each pixel, and the first stage of a refiner.

Any architecture and encoder of segmentation-models-pytorch; the default is the U-Net from scratch of Ando (section 5).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lit_defect.errors import UserError
from lit_defect.losses.segmentation import make_mask_loss
from lit_defect.nets.canvas import Canvas
from lit_defect.nets.segmenters import SegmentationNet, make_segmenter
from lit_defect.tasks.base import Batch
from lit_defect.tasks.mask_files import enlarged
from lit_defect.tasks.pixels import Answer, PixelTask


class Segmenter(PixelTask):
    """Names each pixel: a defect against the background, one class, or many, with void.

    Args:
        architecture: of segmentation-models-pytorch: `unet`, `unetplusplus`, `deeplabv3plus`, `fpn`, `segformer`, ...
        encoder: one of its encoders, or `tu-` and a timm name.
        weights: of the encoder: `hub`, `hub:TAG`, a file, `package:NAME`, or null for random ones.
        options: further arguments of the architecture, such as `encoder_depth` and `decoder_channels`.
        loss: `ce` (cross-entropy), `dice`, `focal`, `ce_dice` or `focal_dice`.
        class_weights: of every term of the loss, one a class; they are not brought to a mean of 1.
        encoder_lr: learning rate of the encoder, as a share of `lr`; 0 freezes it, which a few pictures may call for.
        tile: side of overlapping tiles that larger pictures are evaluated in; null takes them whole.
        overlap: of the tiles, as a share of their side.
        kwargs: see `PixelTask`.

    Raises:
        UserError: an option that is unknown or out of range.
    """

    main = "segmenter"

    def __init__(
        self,
        architecture: str = "unet",
        encoder: str = "resnet34",
        weights: str | None = None,
        options: dict[str, Any] | None = None,
        loss: Literal["ce", "dice", "focal", "ce_dice", "focal_dice"] = "ce",
        class_weights: list[float] | None = None,
        encoder_lr: float = 1.0,
        tile: int | None = None,
        overlap: float = 0.25,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters(logger=False)
        if encoder_lr < 0:
            raise UserError(f"model.init_args.encoder_lr = {encoder_lr}: expected a share of lr, 0 or more")
        self.encoder_lr = encoder_lr
        self.architecture = architecture
        self.encoder = encoder
        self.weights = weights
        self.options = options
        self.loss_name = loss
        self.loss = make_mask_loss(loss, class_weights=class_weights)
        self.class_weights = class_weights
        self.canvas = Canvas(1, tile, overlap)
        self.network: SegmentationNet | None = None

    @property
    def title(self) -> str:
        """What the start-up screen calls it."""
        return f"Segmenter: {self.architecture} on {self.encoder} ({self.weights or 'random'} weights)"

    def setup(self, stage: str) -> None:
        """Also check that the loss has a weight for each class."""
        super().setup(stage)
        if self.class_weights is not None and len(self.class_weights) != self.classes:
            raise UserError(
                f"model.init_args.class_weights has {len(self.class_weights)} numbers for {self.classes} classes "
                f"({', '.join(self.names)})"
            )

    def configure_model(self) -> None:
        """Build the network; weights are fetched only where they will be used."""
        if self.network is not None:
            return
        network = make_segmenter(
            self.architecture,
            self.encoder,
            self.weights if self.begins else None,
            classes=self.classes,
            options=self.options,
        )
        self.network = network.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        if self.encoder_lr == 0:
            self.network.model.encoder.requires_grad_(False)
        if self.compile_network:
            self.network.model.compile()

    def train(self, mode: bool = True) -> Segmenter:
        """A frozen encoder keeps the statistics of its norms, too."""
        super().train(mode)
        if self.network is not None and self.encoder_lr == 0:
            self.network.model.encoder.eval()
        return self

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The encoder's learning rate is a share of the others'."""
        assert self.network is not None
        inside = {id(parameter) for parameter in self.network.model.encoder.parameters()}
        groups = []
        for group in super().parameter_groups():
            for share, chosen in ((1.0, False), (self.encoder_lr, True)):
                kept = [parameter for parameter in group["params"] if (id(parameter) in inside) == chosen]
                groups.append({**group, "params": kept, "lr": share * group["lr"]})
        return groups

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1], of any size -> logits (B, C, H, W) float32."""
        if self.network is None:
            raise UserError("the network is not built yet: call configure_model, or load a checkpoint")
        logits: Tensor = self.network(images.contiguous(memory_format=self.memory_format))
        return logits.float()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch, each picture in a random view and window."""
        images, labels = self.training_pictures(batch)
        loss = self.loss(self(images), labels)
        self.log("train/loss", loss, batch_size=len(images), prog_bar=True)
        return loss

    def probabilities(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] -> (B, C, H, W) float32, in tiles where they are larger than one."""
        return self.canvas(self, images).softmax(1)

    def answer(self, batch: Batch, stage: str) -> Answer:
        """Probabilities, and the most probable class."""
        since = self.clock()
        probabilities = self.probabilities(self.pixels(batch))
        self.timed("segmenter", since)
        return Answer({"segmenter": probabilities.argmax(1)}, probabilities)

    def for_factory(self, images: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        """Probabilities (B, C, H, W) and the most probable class of each pixel, as `predict` writes them."""
        probabilities = enlarged(self.probabilities(self.pixels({"image": images})), size)
        return {"probabilities": probabilities, "mask": probabilities.argmax(1).byte()}

    def factory_facts(self) -> dict[str, Any]:
        """Classes of the pixels."""
        return {"class_names": list(self.names)}

    def validation_loss(self, batch: Batch, labels: Tensor, answer: Answer) -> Tensor:
        """The training loss of the plain pictures."""
        return self.loss(answer.probabilities.clamp(min=1e-12).log(), labels)

    def about(self) -> dict[str, Any]:
        """Network, weights and loss."""
        assert self.network is not None
        return {
            "architecture": self.architecture,
            "encoder": self.encoder,
            "weights": self.weights,
            "loss": self.loss_name,
            "network_calls": 1,
            "parameters": {"segmenter": sum(parameter.numel() for parameter in self.network.parameters())},
        }


def load_segmenter(path: str) -> Segmenter:
    """A `Segmenter` from its checkpoint, in evaluation mode, without a trainer.

    Raises:
        UserError: the file is no checkpoint of a Segmenter.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        settings = checkpoint["hyper_parameters"]
        kept = {key: settings[key] for key in ("architecture", "encoder", "options", "tile", "overlap", "class_names")}
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        raise UserError(f"{path} is no checkpoint of a Segmenter ({type(error).__name__}: {error})") from error
    segmenter = Segmenter(**kept)
    segmenter.configure_model()
    segmenter.load_state_dict(checkpoint["state_dict"])
    return segmenter.eval().requires_grad_(False)
