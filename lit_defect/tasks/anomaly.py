"""What every anomaly detector shares: scores fitted to normal pictures, evaluation, maps of new pictures.

A subclass turns pictures into features and feature maps (`embed`) and trains what does so. At the end of the
training a `Detector` is fitted to the plain normal training pictures, and each score gets the threshold that the
allowed share of the good validation pictures reaches. Nothing is chosen on defective pictures: the last state is
the result.
"""

from __future__ import annotations

import math
import os
import time
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lit_defect.errors import UserError
from lit_defect.metrics.anomaly import threshold_for_overkill
from lit_defect.metrics.localization import BinnedPixelMetrics, PixelMetrics
from lit_defect.reporting.maps import Map
from lit_defect.runs import keep_previous
from lit_defect.scoring.detector import SCORES, Detector
from lit_defect.tasks.anomaly_maps import MapWriter
from lit_defect.tasks.anomaly_report import AnomalyEvaluation, Shown, latency, write_report
from lit_defect.tasks.base import Batch, DefectTask
from lit_defect.tasks.processes import joined
from lit_defect.tasks.views import resize, unit_range

_TIMED = 30  # single pictures that the latency is measured on


class AnomalyTask(DefectTask):
    """Base of the anomaly detectors.

    Args:
        image_size: side or (height, width) that pictures are resized to on the device; null takes them as
            the data module gives them.
        score: which one is reported first: `gaussian`, `knn`, `kde`, `map_max`, or `combined` of the first and the
            last. All are computed.
        neighbours: k of the score `knn`.
        map_strides: which feature maps the anomaly map is made of, by their stride in pixels; null for 8, 16, 32.
        map_positions: one Gaussian for each place (`aligned`) or for all (`shared`); `auto` leaves it to the task.
        map_dimensions: at most so many dimensions of each map.
        smoothing: standard deviation of the anomaly map's smoothing, as a share of the picture's longer side.
        pixel_metrics: `exact` (all scores are kept), `binned` (constant memory) or `off`; at the masks' own size.
        allowed_overkill: share of the good validation pictures that may be rejected; sets the thresholds.
        maps: what `predict` writes of each picture beside the scores: `npy`, `tiff`, or `off`.
        overlays: whether `predict` also writes each picture with its map laid over.
        kwargs: see `DefectTask`.

    Raises:
        UserError: an option out of range.
    """

    thresholds: Tensor  # (5,) on each of SCORES; nan without validation pictures
    minutes: Tensor  # () of training, over all its parts
    detector: Detector

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] | None = None,
        score: Literal["gaussian", "knn", "kde", "map_max", "combined"] = "gaussian",
        neighbours: int = 5,
        map_strides: list[int] | None = None,
        map_positions: Literal["auto", "aligned", "shared"] = "auto",
        map_dimensions: int = 64,
        smoothing: float = 4 / 256,
        pixel_metrics: Literal["exact", "binned", "off"] = "exact",
        allowed_overkill: float = 0.05,
        maps: Literal["npy", "tiff", "off"] = "npy",
        overlays: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(monitor=None, **kwargs)
        for key, share in (("allowed_overkill", allowed_overkill), ("smoothing", smoothing)):
            if not 0 <= share < 1:
                raise UserError(f"model.init_args.{key} = {share}: expected a share, 0 <= s < 1")
        for key, number in (("neighbours", neighbours), ("map_dimensions", map_dimensions)):
            if number < 1:
                raise UserError(f"model.init_args.{key} = {number}: expected at least 1")
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if self.image_size is not None and min(self.image_size) < 1:
            raise UserError(f"model.init_args.image_size = {image_size}: expected pixels, at least 1")
        self.score = score
        self.neighbours = neighbours
        self.map_strides = (8, 16, 32) if map_strides is None else tuple(map_strides)
        self.map_positions = map_positions
        self.map_dimensions = map_dimensions
        self.smoothing = smoothing
        self.pixel_metrics = pixel_metrics
        self.allowed_overkill = allowed_overkill
        self.maps = maps
        self.overlays = overlays
        self.register_buffer("thresholds", torch.full((len(SCORES),), torch.nan, dtype=torch.float64))
        self.register_buffer("minutes", torch.zeros((), dtype=torch.float64))
        self._pixels: PixelMetrics | BinnedPixelMetrics | None = None
        self._evaluation: AnomalyEvaluation
        self._since = 0.0
        self._maps: MapWriter | None = None

    # --- what a subclass provides ---

    @abstractmethod
    def embed(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Pictures (B, 3, H, W) in [0, 1] -> features (B, D) and a map (B, C, h, w) for each of `map_strides`."""

    @property
    @abstractmethod
    def pose_is_free(self) -> bool:
        """Whether the product lies in any direction, so that no place of its maps is like itself."""

    def about(self) -> dict[str, Any]:
        """Settings to be written beside the figures."""
        return {}

    def explain(self, images: Tensor) -> Tensor | None:
        """Pictures (B, 3, H, W) in [0, 1] -> what their scores rest on (B, H, W) in [0, 1], if it can be told."""
        return None

    # --- construction ---

    def setup(self, stage: str) -> None:
        """Check that the splits allow what is asked for.

        Raises:
            UserError: no good class, defective or too few pictures to train on, a precision without float32 weights.
        """
        super().setup(stage)
        data, name = self.data, type(self).__name__
        if data is None:
            raise UserError(f"{name} takes its pictures from a data module: pass datamodule=")
        if stage != "predict" and data.normal_class is None:  # new pictures need no data set beside them
            raise UserError(f"{name} learns what is normal, and this data module has no good class")
        if self.trainer.precision in ("16-true", "bf16-true", "64-true"):
            raise UserError(f"trainer.precision = {self.trainer.precision}: take 32-true, bf16-mixed or 16-mixed")
        if stage == "fit":
            self._check_training(data.samples["train"], data.normal_class)
        elif stage == "validate" and not data.samples.get("val"):
            raise UserError("there is no validation split: set data.val_fraction, or use `test`")

    def _check_training(self, samples: list[Any], normal: int) -> None:
        defective = [sample.name for sample in samples if sample.label != normal]
        if defective:
            raise UserError(
                f"{type(self).__name__} trains on good pictures only, and {len(defective)} of {len(samples)} training "
                f"pictures are defective, such as {defective[0]}: set data.setting to one_class"
            )
        if len(samples) < max(3, self.neighbours):
            raise UserError(
                f"{len(samples)} normal training pictures are too few: the Gaussian score needs 3, and "
                f"model.init_args.neighbours = {self.neighbours}; add pictures or lower data.val_fraction"
            )

    def make_detector(self) -> Detector:
        """The scores, to be fitted or loaded."""
        positions = self.map_positions
        if positions == "auto":
            positions = "shared" if self.pose_is_free else "aligned"
        return Detector(self.neighbours, positions, self.map_dimensions, self.smoothing)

    # --- forward ---

    def forward(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Pictures (B, 3, H, W), uint8 or float in [0, 1] -> scores (B,) by name, and the grid (B, h, w) of places."""
        images = self.pixels(images)
        features, maps = self.embed(images)
        return self.detector(features, maps, (images.shape[-2], images.shape[-1]))

    def pixels(self, images: Tensor) -> Tensor:
        """Pictures as a batch holds them -> float in [0, 1], at the size of the network's input, on its device."""
        return resize(unit_range(images.to(self.device)), self.image_size)

    # --- fitting ---

    def on_train_start(self) -> None:
        """Begin; a resumed run may go on within an epoch, which has no start then."""
        self.on_train_epoch_start()

    def on_train_epoch_start(self) -> None:
        """Start the clock after a validation; forget scores that were fitted to other weights."""
        self._since = time.monotonic()
        if self.detector.fitted:
            self.detector = self.make_detector().to(self.device)
            self.thresholds.fill_(torch.nan)

    def on_train_batch_end(self, *_: Any) -> None:
        """Count the time of the step, so that a checkpoint within an epoch knows it."""
        now = time.monotonic()
        self.minutes += (now - self._since) / 60
        self._since = now

    def on_train_epoch_end(self) -> None:
        """Fit the scores if the training ends here, before a checkpoint is written."""
        self.complete()

    def complete(self) -> None:
        """Fit the scores if the training is over; `LastCheckpoint` asks again when EarlyStopping has judged."""
        trainer = self.trainer
        ended = trainer.current_epoch + 1 == trainer.max_epochs or trainer.global_step == trainer.max_steps
        if (ended or trainer.should_stop) and not self.detector.fitted:
            self._fit_detector()

    def on_train_end(self) -> None:
        """Fit the scores where nobody has."""
        if not self.detector.fitted:
            self._fit_detector()

    @torch.no_grad()
    def _fit_detector(self) -> None:
        """Fit the scores to the training pictures as they are, and the thresholds to the validation pictures."""
        training = self.training
        self.eval()
        order: list[Tensor] = []

        def features() -> Iterator[tuple[Tensor, list[Tensor]]]:
            for batch in self.data.loader("train"):
                order.append(batch["index"].to(self.device))
                yield self.embed(self.pixels(batch["image"]))

        def gather(part: Tensor) -> Tensor:  # of all processes, in the order of the split
            return joined(part)[joined(torch.cat(order)).argsort()]

        def add_up(part: Tensor) -> Tensor:
            total: Any = self.trainer.strategy.reduce(part.clone(), reduce_op="sum")
            return total

        several = self.trainer.world_size > 1
        for buffer in self.buffers() if several else ():  # each process has seen other batches in the last step
            if buffer.numel():
                torch.distributed.broadcast(buffer, src=0)
        with self.trainer.precision_plugin.forward_context():
            self.detector.fit(features(), gather=gather if several else None, add_up=add_up if several else None)
            if self.data.samples.get("val"):
                self._fit_thresholds()
        self.train(training)

    def _fit_thresholds(self) -> None:
        """Of each score, what the allowed share of good validation pictures reaches; the weights of `combined`."""
        parts = []
        for batch in self.data.loader("val"):
            found, _ = self(batch["image"])
            good = (batch["label"] == self.data.normal_class).to(self.device)
            parts.append(torch.stack([found[name] for name in SCORES], dim=1)[good])  # (B, 5)
        rows = torch.cat(parts)
        rows = joined(rows) if self.trainer.world_size > 1 else rows
        columns = dict(zip(SCORES, rows.unbind(1), strict=True))
        pair = columns["gaussian"], columns["map_max"]
        self.detector.calibrate(*pair)
        columns["combined"] = self.detector.combine(*pair)  # as it will be from now on
        limits = [threshold_for_overkill(column.cpu().numpy(), self.allowed_overkill) for column in columns.values()]
        self.thresholds.copy_(torch.tensor(limits, dtype=torch.float64))

    def _begin(self, stage: str) -> None:
        """Make sure that there are scores, and prepare the pixel metrics."""
        if not self.detector.fitted:
            if not self.data.samples.get("train"):
                raise UserError(
                    "the checkpoint was written before the training ended and holds no fitted scores: take last.ckpt "
                    "of a finished run, or finish this one by --resume"
                )
            rank_zero_warn("the checkpoint was written before the training ended: its scores are fitted now")
            with torch.inference_mode(False):
                self._fit_detector()
        metrics = {"exact": PixelMetrics, "binned": BinnedPixelMetrics}.get(self.pixel_metrics)
        self._pixels = metrics().to(self.device) if metrics and self.data.with_masks and stage != "predict" else None

    def on_validation_start(self) -> None:
        """Before the verb `validate`."""
        if self.trainer.state.fn == "validate":
            self._begin("val")

    def on_test_start(self) -> None:
        """Before a test."""
        self._begin("test")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Score the pictures and their pixels."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Batch, stage: str) -> Tensor:
        """Keep the scores of a batch, and those of its pixels where there are masks; gives the grid (B, h, w)."""
        scores, grid = self(batch["image"])
        self.collect(index=batch["index"], label=batch["label"], **scores)
        if self._pixels is not None:
            for position, cells in zip(batch["index"].tolist(), grid, strict=True):
                _, mask = self.data.original(stage, position)
                marked = torch.from_numpy(mask).to(self.device)[None] > 0  # (1, H, W)
                scored = self.detector.enlarge(cells[None], (marked.shape[1], marked.shape[2]))
                self._pixels.update(scored, marked)
        return grid

    def on_validation_epoch_end(self) -> None:
        """All figures of the validation split, for the verb `validate`."""
        if self.trainer.state.fn == "validate":
            self._keep_result("val")

    def on_test_epoch_end(self) -> None:
        """All figures of the test split."""
        self._keep_result("test")
        self.log_dict(self._evaluation.watched("test"), sync_dist=True)

    # --- new pictures ---

    def on_predict_start(self) -> None:
        """Make room for the maps; those of an earlier prediction are kept under a number."""
        self._begin("predict")
        folder = Path(self.trainer.default_root_dir) / "predict_maps"
        self._maps = None
        if self.maps != "off" and not getattr(self.trainer, "fast_dev_run", False):
            if self.trainer.is_global_zero:
                keep_previous(folder)
            limit = float(self.thresholds[SCORES.index("map_max")])
            self._maps = MapWriter(folder, self.maps, self.overlays, limit if math.isfinite(limit) else None)
        self.trainer.strategy.barrier("maps of an earlier prediction kept")

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Scores (B,) by name; each picture's map and overlay go to the run's folder `predict_maps`."""
        grid = self._evaluate(batch, "predict")
        if self._maps is not None:
            for position, name, cells in zip(batch["index"].tolist(), batch["name"], grid, strict=True):
                picture, _ = self.data.original("predict", position)
                scored = self.detector.enlarge(cells[None], (picture.shape[0], picture.shape[1]))[0]
                self._maps.write(name, picture, scored.cpu().numpy())
        return {name: value for name, value in self._evaluated[-1].items() if name in SCORES}

    def on_predict_epoch_end(self) -> None:
        """Keep the scores of all processes."""
        self._keep_result("predict")
        if self._maps is None:
            return
        count: Any = torch.tensor(self._maps.saturated, device=self.device)
        saturated = int(self.trainer.strategy.reduce(count, reduce_op="sum"))  # type: ignore[arg-type]
        if saturated:
            rank_zero_warn(
                f"{saturated} pixels score above {self._maps.full_scale:g}, the white of the TIFFs, and were held "
                "there; --model.maps npy keeps every score"
            )

    # --- results ---

    def _keep_result(self, stage: str) -> None:
        found = self.gathered()
        samples = self.data.samples[stage]
        positions = found["index"].tolist()
        labels = found["label"].numpy()
        normal = self.data.normal_class if (labels >= 0).any() else 0
        pixel = {} if self._pixels is None else {key: float(value) for key, value in self._pixels.compute().items()}
        self._evaluation = AnomalyEvaluation(
            samples=[samples[position] for position in positions],
            positions=positions,
            is_defect=labels != normal,
            known=bool((labels >= 0).all()),
            scores={name: found[name].double().numpy() for name in SCORES},
            thresholds=dict(zip(SCORES, self.thresholds.tolist(), strict=True)),
            score=self.score,
            pixel=pixel,
        )

    def write_results(self, folder: Path, stage: str) -> None:
        """Figures, scores and pictures of the last evaluation, in the run folder; rank 0 only."""
        loader = self.data.loader(stage)

        def look(position: int, how: Literal["map", "grad_cam"]) -> Shown:
            image = loader.batch([position])["image"]
            picture, mask = self.data.original(stage, position)
            if how == "map":
                return picture, mask, self._map_of(image)
            heat = self.explain(self.pixels(image))
            return picture, mask, None if heat is None else heat[0].cpu().numpy()

        about: dict[str, Any] = {}
        if stage != "predict":
            seeds = {"training_seed": int(os.environ.get("PL_GLOBAL_SEED", 0)), "split_seed": self.data.seed}
            category = ", ".join(sorted({sample.category for sample in self.data.samples[stage]}))
            about = {**seeds, **self.about(), "category": category, "training_minutes": round(float(self.minutes), 2)}
        near = {leak.name_b for leak in getattr(self.data, "leaks", ()) if leak.split_b == stage}
        with self.trainer.precision_plugin.forward_context():  # as the scores were computed
            if about:
                first = range(min(_TIMED, len(self._evaluation.samples)))
                about["latency_ms"] = latency(self._map_of, (loader.batch([place])["image"] for place in first))
            write_report(folder, stage, self._evaluation, about, near, look)

    @torch.no_grad()
    def _map_of(self, image: Tensor) -> Map:
        """Smoothed map (H, W) of a picture (1, 3, H, W), at the size of the network's input."""
        _, grid = self(image)
        size = self.image_size or (image.shape[-2], image.shape[-1])
        return self.detector.enlarge(grid, size)[0].cpu().numpy()
