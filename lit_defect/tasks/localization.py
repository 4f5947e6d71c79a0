"""Localisation learned from few defects: a U-Net marks the pixels, trained on real, generated and drawn anomalies.

Source: Hu et al. (AnomalyDiffusion, AAAI 2024), who judge generated defects by what a localiser learns from them; its
network and loss are those of DRAEM's discriminative half (Zavrtanik et al., ICCV 2021).

1. Normal and defective training pictures, real or of `data.synthetic`; some normal ones of each batch get a
   pseudo-anomaly, whose changed pixels are then the truth.
2. Focal loss of two classes, gamma 2; the map is the probability of the second.
3. The score of a picture is the highest mean of the map in a window, of 21 pixels in a picture of 256.

The paper takes the epoch that is best on the test pictures. Here held-out generated pictures choose, or nothing does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from lit_defect.anomalies import PseudoAnomaly
from lit_defect.errors import UserError
from lit_defect.losses.segmentation import make_mask_loss
from lit_defect.metrics.anomaly import threshold_for_overkill
from lit_defect.metrics.localization import BinnedPixelMetrics, PixelMetrics
from lit_defect.nets.segmenters import SegmentationNet, make_segmenter
from lit_defect.tasks.anomaly_pixels import METRICS
from lit_defect.tasks.anomaly_scoring import ScoringTask
from lit_defect.tasks.base import Batch
from lit_defect.tasks.pixels import Listed, augmented, targets
from lit_defect.tasks.pseudo import Preview, with_anomalies
from lit_defect.tasks.views import random_light

HELD_OUT = "synthetic_val"  # the split of generated pictures that a data module keeps from training
_WINDOW = 21 / 256  # of the image score, as a share of the picture's longer side
_MEASURE = "pixel_average_precision"
_MONITORED = {"auto": f"synthetic/{_MEASURE}", "synthetic": f"synthetic/{_MEASURE}", "val": f"val/{_MEASURE}"}


class AnomalyLocalizer(ScoringTask):
    """Marks the pixels of defects, of which few real ones are known.

    Args:
        architecture: of segmentation-models-pytorch, as for `Segmenter`.
        encoder: one of its encoders, or `tu-` and a timm name.
        weights: of the encoder: `hub`, `hub:TAG`, a file, `package:NAME`, or null for random ones.
        options: further arguments of the architecture, such as `encoder_depth` and `decoder_channels`.
        anomaly: makes pseudo-anomalies of normal training pictures; null makes none.
        pseudo: share of the normal pictures of a batch that get one.
        select: which epoch is the result: the best on generated pictures that are held out from training
            (`synthetic`), the best on the validation split (`val`), or the `last`; `auto` is `synthetic` where the data
            module holds some out (`data.synthetic.holdout`), else `last`.
        pixels_at: size at which the pixels' figures are measured: the pictures' in a `batch`, as papers do, or
            each mask's `own`.
        augment: views that training draws from: `none`, `flip` (left-right), `flips` (both ways), `dihedral` (and
            quarter turns).
        light: share by which brightness and contrast of each training picture change, at most.
        crop: side of a random window that training cuts from each picture; null takes the whole picture.
        kwargs: pixel figures, thresholds and what `predict` writes as for `ScoringTask`, the schedule as for
            `DefectTask`.

    Raises:
        UserError: an option out of range.
    """

    score_names = ("pooled_max", "map_max")
    map_scale = (0.0, 1.0)

    def __init__(
        self,
        architecture: str = "unet",
        encoder: str = "resnet34",
        weights: str | None = None,
        options: dict[str, Any] | None = None,
        anomaly: PseudoAnomaly | None = None,
        pseudo: float = 0.5,
        select: Literal["auto", "synthetic", "val", "last"] = "auto",
        pixels_at: Literal["batch", "own"] = "batch",
        augment: Listed = "flips",
        light: float = 0.0,
        crop: int | None = None,
        optimizer: str = "adam",
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            monitor=_MONITORED.get(select),
            score="pooled_max",
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            **kwargs,
        )
        if not 0 < pseudo <= 1:
            raise UserError(f"model.init_args.pseudo = {pseudo}: expected a share, 0 < pseudo <= 1")
        if not 0 <= light < 1:
            raise UserError(f"model.init_args.light = {light}: expected a share, 0 <= light < 1")
        if crop is not None and crop < 1:
            raise UserError(f"model.init_args.crop = {crop}: expected the side of a window in pixels, or null")
        self.save_hyperparameters(ignore=["anomaly"], logger=False)
        self.architecture = architecture
        self.encoder = encoder
        self.weights = weights
        self.options = options
        self.anomaly = anomaly
        self.pseudo = pseudo
        self.select = select
        self.pixels_at = pixels_at
        self.augment: Listed = augment
        self.light = light
        self.crop = crop
        self.loss = make_mask_loss("focal")
        self.network: SegmentationNet | None = None
        self._watched: PixelMetrics | BinnedPixelMetrics | None = None  # of the validation pictures, while training
        self._preview: Preview | None = None

    # --- construction ---

    @property
    def title(self) -> str:
        """What the start-up screen calls it."""
        made = f", {type(self.anomaly).__name__}" if self.anomaly else ""
        return f"AnomalyLocalizer: {self.architecture} on {self.encoder} ({self.weights or 'random'} weights){made}"

    @property
    def selected_by(self) -> str:
        """What `select` comes to with the data at hand."""
        return self.select if self.select != "auto" else "synthetic" if self.data.samples.get(HELD_OUT) else "last"

    def setup(self, stage: str) -> None:
        """Also check that there is something to learn from, and to select on.

        Raises:
            UserError: no good class, no masks or defects to learn from, nothing to select on.
        """
        super().setup(stage)
        if stage != "predict" and self.data.normal_class is None:
            raise UserError("AnomalyLocalizer tells defective from good, and this data module has no good class")
        if stage == "fit":
            self._check_training(self.data.samples["train"])
            self._settle_selection()

    def _check_training(self, samples: list[Any]) -> None:
        if not self.data.with_masks:
            raise UserError("AnomalyLocalizer learns from masks: set data.with_masks to true")
        defective = [sample for sample in samples if sample.label != self.data.normal_class]
        unmarked = [sample.name for sample in defective if not sample.mask]
        if unmarked:
            raise UserError(
                f"{len(unmarked)} defective training pictures have no mask, such as {unmarked[0]}: they would be "
                "learned as good; add masks, or leave these pictures out"
            )
        if not defective and self.anomaly is None:
            raise UserError(
                f"none of the {len(samples)} training pictures has a defect, so AnomalyLocalizer would learn to find "
                "none: set data.setting to few_shot, add generated pictures by data.synthetic, or set model.anomaly"
            )
        if self.anomaly is not None and len(defective) == len(samples):
            raise UserError("model.anomaly makes defects of good pictures, and no good one trains: leave it out")

    def _settle_selection(self) -> None:
        """Look for what is selected on; where `auto` finds nothing, the trainer keeps the latest state as the best."""
        if self.select == "synthetic" and not self.data.samples.get(HELD_OUT):
            raise UserError(
                "model.init_args.select = synthetic: no generated pictures are held out; set data.synthetic with a "
                "holdout above 0, or select: last"
            )
        held_out, processes = len(self.data.samples.get(HELD_OUT, ())), self.trainer.world_size
        if self.selected_by == "synthetic" and held_out < processes:
            raise UserError(
                f"data.synthetic.holdout holds out {held_out} pictures for {processes} processes: raise it, or set "
                "select: last"
            )
        validating = self.data.samples.get("val", ())
        if self.select == "val" and all(sample.label == self.data.normal_class for sample in validating):
            raise UserError(
                f"model.init_args.select = val: none of the {len(validating)} validation pictures has a defect; raise "
                "data.val_fraction, or select: last"
            )
        if self.selected_by == "last" and self.monitor is not None:
            for callback in self.trainer.checkpoint_callbacks:
                if getattr(callback, "monitor", None) == self.monitor[0]:
                    callback.monitor = None  # type: ignore[attr-defined]
            self.monitor = None

    def configure_model(self) -> None:
        """Build the network; weights are fetched only where they will be used."""
        if self.network is not None:
            return
        weights = self.weights if self.begins else None
        network = make_segmenter(self.architecture, self.encoder, weights, classes=2, options=self.options)
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    # --- forward ---

    def logits(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] -> logits (B, 2, H, W) float32: good, defective."""
        if self.network is None:
            raise UserError("the network is not built yet: call configure_model, or load a checkpoint")
        logits: Tensor = self.network(images.contiguous(memory_format=torch.channels_last))
        return logits.float()

    def forward(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Pictures (B, 3, H, W), uint8 or float in [0, 1] -> scores (B,) by name, and the map (B, H, W) in [0, 1]."""
        maps = self.logits(self.pixels(images)).softmax(1)[:, 1]
        return image_scores(maps), maps

    def enlarge(self, grid: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps (B, h, w) -> (B, H, W), bilinear."""
        return interpolate(grid[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]

    def measured(self, batch: Batch, grid: Tensor, stage: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Map and mask (H, W) of each picture, at the size that `pixels_at` names."""
        if self.pixels_at == "own":
            return super().measured(batch, grid, stage)
        return iter(zip(grid, targets(batch, 2) == 1, strict=True))

    # --- training ---

    def on_fit_start(self) -> None:
        """Look at the first pseudo-anomalies before anything is trained on them."""
        if self.anomaly is not None:
            self._preview = Preview(self.anomaly, self.data, self.pixels)

    def write_preview(self, folder: Path) -> None:
        """The first pseudo-anomalies and what the gate discards, before the training; rank 0 only."""
        if self._preview is not None:
            self._preview.write(folder)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch, some of whose normal pictures are changed, each in a random view and window."""
        images, masks = self._with_pseudo_anomalies(self.pixels(batch["image"]), targets(batch, 2), batch["label"])
        images = random_light(images, self.light) if self.light else images
        images, masks = augmented([images, masks], self.augment, self.crop)
        loss = self.loss(self.logits(images), masks)
        self.log("train/loss", loss, batch_size=len(images), prog_bar=True)
        return loss

    def _with_pseudo_anomalies(self, images: Tensor, masks: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, H, W) and masks (B, H, W), a share of the normal ones changed; one that fails stays good."""
        drawn = torch.rand(len(images), device=images.device) < self.pseudo
        rows = ((labels == self.data.normal_class) & drawn).nonzero()[:, 0]  # (n,)
        if self.anomaly is None or not len(rows):
            return images, masks
        images, changed, marked = with_anomalies(images, rows, self.anomaly)
        self.log("train/rejected", 1 - len(changed) / len(rows), batch_size=len(rows))
        return images, masks.index_copy(0, changed, marked.to(masks.dtype))

    # --- selection ---

    def on_train_epoch_end(self) -> None:
        """Measure what the best state is chosen by, before the callbacks that keep it."""
        if self.selected_by == "synthetic":
            self.log(_MONITORED["synthetic"], self._precision_on_synthetic(), sync_dist=True)

    @torch.no_grad()
    def _precision_on_synthetic(self) -> Tensor:
        """Average precision of the pixels of the generated pictures that are held out; scalar."""
        training = self.training
        self.eval()
        self.share_buffers()
        metric = self._metric()
        for batch in self.data.loader(HELD_OUT):
            batch = self.data.transfer_batch_to_device(batch, self.device, 0)
            with self.trainer.precision_plugin.forward_context():
                _, maps = self(batch["image"])
            metric.update(maps, targets(batch, 2) == 1)
        self.train(training)
        return metric.compute()[_MEASURE].float()

    def _metric(self) -> PixelMetrics | BinnedPixelMetrics:
        """Without pixel metrics at the end, what is selected by is exact."""
        return METRICS["binned" if self.pixel_metrics == "binned" else "exact"]().to(self.device)

    def on_validation_epoch_start(self) -> None:
        """Make room for the pixels of the validation pictures."""
        watched = self.pixel_metrics != "off" or self.select == "val"
        self._watched = self._metric() if self.trainer.state.fn == "fit" and watched else None

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Within a fit loss and scores of the plain pictures; all figures for the verb `validate`."""
        if self.trainer.state.fn == "validate":
            self._evaluate(batch, "val")
            return
        logits, masks = self.logits(self.pixels(batch["image"])), targets(batch, 2)
        self.log("val/loss", self.loss(logits, masks), batch_size=len(masks), sync_dist=True)
        maps = logits.softmax(1)[:, 1]
        self.collect(index=batch["index"], label=batch["label"], **image_scores(maps))
        if self._watched is not None:
            self._watched.update(maps, masks == 1)

    def on_validation_epoch_end(self) -> None:
        """Within a fit set the thresholds that go with these weights, and log the figures."""
        if self.trainer.state.fn == "validate":
            super().on_validation_epoch_end()
            return
        pixel = {key: float(value) for key, value in self._watched.compute().items()} if self._watched else {}
        self._watched = None
        evaluation = self.result("val", pixel, {})
        good = [values[~evaluation.is_defect] for values in evaluation.scores.values()]
        limits = [threshold_for_overkill(values, self.allowed_overkill) for values in good]
        self.thresholds.copy_(torch.tensor(limits, dtype=torch.float64))
        self.log_dict(evaluation.watched("val"), sync_dist=True)

    # --- results ---

    def about(self) -> dict[str, Any]:
        """Network, what it was trained on, how the state was chosen."""
        assert self.network is not None
        samples, normal = self.data.samples.get("train", []), self.data.normal_class
        real = Counter("good" if s.label == normal else "defective" for s in samples if s.source == "real")
        return {
            "task": type(self).__name__,
            "architecture": self.architecture,
            "encoder": self.encoder,
            "weights": self.weights,
            "loss": "focal",
            "anomaly": type(self.anomaly).__name__ if self.anomaly else None,
            "training_pictures": {**real, **Counter(s.source for s in samples if s.source != "real")},
            "select": self.selected_by,
            "pixels_at": self.pixels_at,
            "parameters": sum(parameter.numel() for parameter in self.network.parameters()),
        }


def image_scores(maps: Tensor) -> dict[str, Tensor]:
    """Maps (B, H, W) -> (B,) `pooled_max`, the highest mean in a window, and `map_max`, the highest value.

    The window is square and odd, 21 pixels where the longer side is 256; beyond the picture it meets zeros, as the
    paper's average pooling does.
    """
    side = 2 * round((_WINDOW * max(maps.shape[1:]) - 1) / 2) + 1
    reach = side // 2
    rows = avg_pool2d(maps[:, None], (side, 1), stride=1, padding=(reach, 0))  # one way, then the other: the same mean
    pooled = avg_pool2d(rows, (1, side), stride=1, padding=(0, reach))
    return {"pooled_max": pooled.amax((1, 2, 3)), "map_max": maps.amax((1, 2))}
