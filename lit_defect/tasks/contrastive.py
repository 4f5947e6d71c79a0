"""Anomaly detection by self-supervision: normal pictures against pseudo-anomalies made of them.

Source: Honda & Yamauchi (SimCLR on local pseudo-anomalies). The paper leaves the loss, the score and the schedule
open; each gap is an option here, with CutPaste (Li et al., CVPR 2021) as one setting of them:

1. A `PseudoAnomaly` makes a defective twin of each normal picture of the batch.
2. Two mild views of each are sent through backbone and projection, and one of the losses keeps them apart.
3. At the end of the training a `Detector` is fitted to the plain normal pictures: Gaussian, nearest neighbours and
   kernel density of the pooled features, and a Gaussian for every place of the feature maps.

Only normal pictures are trained on; nothing is chosen on defective ones. The last state is the result.
"""

from __future__ import annotations

import math
import os
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from lit_defect.anomalies import LocalPseudoAnomaly, PseudoAnomalies, PseudoAnomaly, explain_rejection
from lit_defect.errors import UserError
from lit_defect.losses.contrastive import ntxent, ntxent_hard, one_class
from lit_defect.nets.backbones import Backbone
from lit_defect.nets.gradcam import grad_cam
from lit_defect.tasks.anomaly import AnomalyTask
from lit_defect.tasks.anomaly_report import write_preview
from lit_defect.tasks.base import Batch
from lit_defect.tasks.processes import joined_with_gradient
from lit_defect.tasks.views import Pose, contrastive_views

Loss = Literal["ntxent", "ntxent_hard", "one_class", "classifier", "none"]

# MVTec AD's products that lie in any direction; the others always lie the same way.
FREE_POSE = ("bottle", "hazelnut", "metal_nut", "screw", "carpet", "grid", "leather", "tile", "wood")
_AREAS = (0.0, 0.01, 0.03, 0.1, 1.0)  # shares of the picture, between which the discarded candidates are counted
_PROBED = 64  # pictures whose pseudo-anomalies are looked at before the training


class SimCLR(AnomalyTask):
    """Contrastive learning of normal pictures against pseudo-anomalies, with scoring and localisation.

    Args:
        backbone: timm name of the network.
        weights: `hub`, `hub:TAG`, a file, `package:NAME`, or null to train from scratch (see `nets/weights.py`).
        anomaly: makes the pseudo-anomalies; null takes `LocalPseudoAnomaly` with its defaults.
        loss: `ntxent_hard`, `one_class` or `ntxent` (see `losses/contrastive.py`; the last takes no notice of
            the pseudo-anomalies), `classifier` (cross-entropy over normal and each kind of anomaly: CutPaste),
            or `none` to score with the network as it was loaded.
        temperature: of the contrastive losses.
        beta: weight of the pseudo-anomalies among the negatives of `ntxent_hard`.
        projection: width of the two fully connected layers behind the backbone; the second one is as wide as
            there are classes with the loss `classifier`.
        frozen_stages: so many of timm's stages, from the stem on, keep the weights that were loaded.
        norms: `train`, or `frozen` to keep the running statistics of all BatchNorms: with pretrained weights.
        pose: `fixed`, `flips` or `free`: which views show the same product. `auto` knows MVTec AD's categories
            and takes others as fixed.
        channels_last: memory format of the network.
        kwargs: sizes, scores, maps and thresholds as for `AnomalyTask`, the schedule as for `DefectTask`.

    Raises:
        UserError: options out of range.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        weights: str | None = None,
        anomaly: PseudoAnomaly | None = None,
        loss: Loss = "ntxent_hard",
        temperature: float = 0.2,
        beta: float = 1.0,
        projection: tuple[int, int] = (512, 128),
        frozen_stages: int = 0,
        norms: Literal["train", "frozen"] = "train",
        pose: Literal["auto", "fixed", "flips", "free"] = "auto",
        channels_last: bool = True,
        optimizer: str = "momentum",
        lr: float = 0.03,
        weight_decay: float = 3e-5,
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, lr=lr, weight_decay=weight_decay, **kwargs)
        if not 0 < temperature < math.inf:
            raise UserError(f"model.init_args.temperature = {temperature}: expected a number > 0")
        if not 0 <= beta < math.inf:
            raise UserError(f"model.init_args.beta = {beta}: expected a number >= 0")
        if min(projection) < 1:
            raise UserError(f"model.init_args.projection = {list(projection)}: expected two widths, at least 1")
        self.save_hyperparameters(ignore=["anomaly"], logger=False)
        self.backbone_name = backbone
        self.weights = weights
        self.anomaly = anomaly or LocalPseudoAnomaly()
        self.loss_name = loss
        self.temperature = temperature
        self.beta = beta
        self.projection_widths = projection
        self.frozen_stages = frozen_stages
        self.norms = norms
        self.pose = pose
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.backbone: Backbone | None = None
        self.projection: nn.Module
        self._probe: tuple[list[int], PseudoAnomalies] | None = None

    # --- construction ---

    @property
    def title(self) -> str:
        """What the start-up screen calls it."""
        return f"SimCLR on {self.backbone_name} ({self.weights or 'random'} weights), loss {self.loss_name}"

    def configure_model(self) -> None:
        """Build backbone, projection and scores; weights are fetched only where they will be used."""
        if self.backbone is not None:
            return
        backbone = Backbone(
            self.backbone_name, weights=self.weights if self.begins else None, num_classes=0, image_size=self.image_size
        )
        backbone.map_layers(self.map_strides)  # a stride that the network lacks is told now
        if self.loss_name == "none":
            backbone.requires_grad_(False)
        else:
            backbone.freeze(self.frozen_stages, norms=self.norms == "frozen")
        self.backbone = backbone.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        hidden, width = self.projection_widths
        classes = 1 + self.anomaly.kinds
        self.projection = nn.Sequential(
            nn.Linear(backbone.num_features, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes if self.loss_name == "classifier" else width),
        )
        self.detector = self.make_detector()

    @cached_property
    def _pose(self) -> Pose:
        """The pose, with `auto` looked up by the category."""
        if self.pose != "auto":
            return self.pose
        known = {} if self._trainer is None else self.data.samples  # a checkpoint says it where no data are at hand
        samples = known.get("train") or known.get("test") or ()
        categories = {sample.category for sample in samples}
        return "free" if categories and categories <= set(FREE_POSE) else "fixed"

    @property
    def network(self) -> Backbone:
        """The backbone, after `configure_model`."""
        if self.backbone is None:
            raise UserError("the network is not built yet: call configure_model, or load a checkpoint")
        return self.backbone

    def configure_optimizers(self) -> Any:
        """None where nothing is trained."""
        return None if self.loss_name == "none" else super().configure_optimizers()

    # --- what the scores rest on ---

    def embed(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Pictures (B, 3, H, W) in [0, 1] -> pooled features (B, D) and feature maps, of one forward pass."""
        return self.network.maps(self._prepare(images), self.map_strides)

    @property
    def pose_is_free(self) -> bool:
        """Whether the product lies in any direction."""
        return self._pose == "free"

    def about(self) -> dict[str, Any]:
        """Loss, pseudo-anomalies, weights and network."""
        used = self.loss_name not in ("none", "ntxent")
        return {
            "loss": self.loss_name,
            "anomaly": type(self.anomaly).__name__ if used else None,
            "weights": self.weights,
            "backbone": self.backbone_name,
        }

    def explain(self, images: Tensor) -> Tensor | None:
        """Grad-CAM of the Gaussian score (B, H, W); None where the network has no map in space."""
        try:
            return grad_cam(self.network, self._prepare(images), self.detector.gaussian)
        except UserError:
            return None

    def _prepare(self, images: Tensor) -> Tensor:
        return self.network.normalise(images).contiguous(memory_format=self.memory_format)

    # --- checkpoints ---

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the pose: new pictures have no category to look it up by."""
        checkpoint["pose"] = self._pose

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the pose that the scores were fitted for.

        Raises:
            UserError: the network was trained to tell other pseudo-anomalies.
        """
        width = len(checkpoint["state_dict"]["projection.3.weight"])
        if self.loss_name == "classifier" and width != 1 + self.anomaly.kinds:
            raise UserError(
                f"the checkpoint tells {width} classes, and with anomaly = {type(self.anomaly).__name__} there are "
                f"{1 + self.anomaly.kinds}: name the pseudo-anomaly that it was trained with"
            )
        if self.pose == "auto":
            self._pose = checkpoint.get("pose", self._pose)
            self.detector = self.make_detector().to(self.device)

    # --- training ---

    def on_fit_start(self) -> None:
        """Look at the first pseudo-anomalies before anything is trained on them.

        Raises:
            UserError: the SSIM gate rejects all of them, a picture holds values that are not numbers, or a batch of
                `ntxent` has nothing to compare.
        """
        self._look_at_norms()
        if self.loss_name == "ntxent" and self.data.batch_size * self.trainer.world_size < 2:
            raise UserError("data.batch_size = 1: the loss ntxent tells pictures of a batch apart, so it needs 2")
        if self.loss_name in ("none", "ntxent"):
            return
        positions = list(range(0, len(self.data.samples["train"]), max(1, len(self.data.samples["train"]) // _PROBED)))
        batch = self.data.loader("train").batch(positions[:_PROBED])
        images = self.pixels(batch["image"])
        _check_finite(images, batch["name"])
        made = self.anomaly(images, torch.Generator().manual_seed(int(os.environ.get("PL_GLOBAL_SEED", 0))))
        if not made.accepted.any():
            if self.anomaly.ssim_scope == "off":
                raise UserError("the pseudo-anomalies change no pixel of the training pictures: are these blank?")
            raise UserError(explain_rejection(made.tried_ssim, self.anomaly.ssim_threshold))
        self._probe = (positions[:_PROBED], PseudoAnomalies(*(part.cpu() for part in made)))

    def _look_at_norms(self) -> None:
        """Say so where BatchNorm lets each process see its own part of the batch, as the losses do not."""
        apart = any(isinstance(m, _BatchNorm) and not isinstance(m, nn.SyncBatchNorm) for m in self.modules())
        if apart and self.norms == "train" and self.trainer.world_size > 1 and self.device.type == "cuda":
            rank_zero_warn(
                "BatchNorm takes its statistics of each process's own pictures, unlike the loss, which joins them: set "
                "trainer.sync_batchnorm to true for the results of one device"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch of normal pictures and the pseudo-anomalies made of them.

        Raises:
            UserError: a picture holds values that are not numbers.
        """
        if self.loss_name == "none":
            self.trainer.should_stop = True  # one step is enough, however many epochs are asked for
            # Nothing, in a form that DDP takes: it wants parameters to train, and a gradient of each.
            loss = 0 * torch.stack([part.sum() for part in self.projection.parameters()]).sum()
        else:
            loss = self._loss(batch)
        self.log("train/loss", loss, batch_size=len(batch["label"]), prog_bar=True)
        return loss

    def _loss(self, batch: Batch, *, shared: bool = True) -> Tensor:
        """Of one batch; `shared` joins those of all processes, whose sizes must then be equal."""
        images = self.pixels(batch["image"])
        if batch["image"].is_floating_point():  # bytes are always numbers
            _check_finite(images, batch["name"])
        every = joined_with_gradient if shared and self.trainer.world_size > 1 else _own
        source = every(batch["index"], 0)
        if self.loss_name == "ntxent":
            return ntxent(every(self._twins(images), 1), temperature=self.temperature, source=source)
        made = self.anomaly(images, torch.Generator().manual_seed(int(torch.randint(2**62, ()))))
        if self.training:
            self._log_discards(made)
        if self.loss_name == "classifier":
            logits = self._project(contrastive_views(torch.cat([images, made.images]), self._pose)).float()
            kind = made.kind.masked_fill(~made.accepted, -100)  # of which the cross-entropy takes no notice
            return cross_entropy(every(logits, 0), every(torch.cat([kind.new_zeros(len(images)), kind]), 0))
        z = self._twins(torch.cat([images, made.images]))  # in one pass: BatchNorm sees both kinds together
        normal, anomaly = every(z[:, : len(images)], 1), every(z[:, len(images) :], 1)
        valid = every(made.accepted.int(), 0).bool()
        if self.loss_name == "one_class":
            return one_class(normal, anomaly, valid=valid, temperature=self.temperature)
        return ntxent_hard(normal, anomaly, valid=valid, beta=self.beta, temperature=self.temperature, source=source)

    def _log_discards(self, made: PseudoAnomalies) -> None:
        """The share of pictures that got no pseudo-anomaly, and of the candidates of each size that were discarded."""
        self.log("train/rejected", 1 - made.accepted.float().mean(), batch_size=len(made.accepted))
        if self.anomaly.ssim_scope == "off":
            return
        tried, similarity = torch.stack([made.tried, made.tried_ssim]).cpu()  # waits for the device once
        alike = (similarity >= self.anomaly.ssim_threshold).float()
        for low, high in pairwise(_AREAS):
            within = (tried >= low) & (tried < high)
            if within.any():
                self.log(f"discarded/area below {high:.0%}", alike[within].mean(), batch_size=int(within.sum()))

    def _twins(self, images: Tensor) -> Tensor:
        """Two views of each picture (N, 3, H, W) -> projections (2, N, D)."""
        both = torch.cat([contrastive_views(images, self._pose) for _ in range(2)])
        return self._project(both).unflatten(0, (2, -1))

    def _project(self, images: Tensor) -> Tensor:
        return self.projection(self.network.features(self._prepare(images)))

    def on_validation_epoch_start(self) -> None:
        """The same pseudo-anomalies and views of the validation pictures after each epoch."""
        torch.manual_seed(self.global_rank)  # every training batch seeds anew

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Within a fit the loss, to be watched; scores for the verb `validate`."""
        if self.trainer.state.fn == "validate":
            self._evaluate(batch, "val")
        elif self.loss_name != "none":
            for part in _cut(batch, self.data.batch_size):  # the loss grows with the number of negatives
                self.log("val/loss", self._loss(part, shared=False), batch_size=len(part["label"]), sync_dist=True)

    def write_preview(self, folder: Path) -> None:
        """The first pseudo-anomalies and what the gate discards, before the training; rank 0 only."""
        if self._probe is not None:
            positions, made = self._probe
            sources = self.pixels(self.data.loader("train").batch(positions)["image"])
            names = [self.data.samples["train"][position].name for position in positions]
            write_preview(folder, sources, names, made, self.anomaly)


def _own(part: Tensor, dim: int) -> Tensor:
    return part


def _cut(batch: Batch, size: int) -> list[Batch]:
    """Batches of `size` samples; what is left over is dropped, unless there is nothing else."""
    count = len(batch["label"])
    starts = range(0, max(count - size, 0) + 1, size)
    return [{key: values[start : start + size] for key, values in batch.items()} for start in starts]


def _check_finite(images: Tensor, names: list[str]) -> None:
    finite = images.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        bad = names[int((~finite).nonzero()[0])]
        raise UserError(f"{bad}: the picture holds values that are not numbers (nan or infinity)")
