"""What every task shares that gives a picture anomaly scores and a map: evaluation, reports, maps of new pictures.

A subclass says what the scores and the map of a picture are (`forward`, `enlarge`), however they were learned. All
pictures of a split are scored once, by however many processes; figures follow from the scores of the whole split.
"""

from __future__ import annotations

import math
import os
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from PIL import Image
from torch import Tensor

from lit_defect.errors import UserError
from lit_defect.reporting.maps import Map, Scale
from lit_defect.reporting.overlays import Overlay
from lit_defect.runs import keep_previous
from lit_defect.tasks.anomaly_maps import MapWriter
from lit_defect.tasks.anomaly_pixels import PixelsByKind
from lit_defect.tasks.anomaly_report import AnomalyEvaluation, Shown, latency, write_report
from lit_defect.tasks.base import Batch, DefectTask
from lit_defect.tasks.views import unit_range

_TIMED = 30  # single pictures that the latency is measured on


class ScoringTask(DefectTask):
    """Base of the tasks with anomaly scores and maps.

    Args:
        score: which of `score_names` is reported first and decides.
        pixel_metrics: `exact` (all scores are kept), `binned` (constant memory) or `off`.
        allowed_overkill: share of the good validation pictures that may be rejected; sets the thresholds.
        maps: what `predict` writes of each picture beside the scores: `npy`, `tiff`, or `off`.
        overlays: whether `predict` also writes each picture with its map laid over.
        kwargs: see `DefectTask`.

    Raises:
        UserError: an option out of range.
    """

    score_names: tuple[str, ...]  # `map_max`, the largest of the map, among them
    map_scale: Scale | None = None  # the maps' range, where they have one

    thresholds: Tensor  # (len(score_names),) float64; nan without validation pictures
    minutes: Tensor  # () of training, over all its parts

    def __init__(
        self,
        *,
        score: str,
        pixel_metrics: Literal["exact", "binned", "off"] = "exact",
        allowed_overkill: float = 0.05,
        maps: Literal["npy", "tiff", "off"] = "npy",
        overlays: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 <= allowed_overkill < 1:
            raise UserError(f"model.init_args.allowed_overkill = {allowed_overkill}: expected a share, 0 <= s < 1")
        self.score = score
        self.pixel_metrics = pixel_metrics
        self.allowed_overkill = allowed_overkill
        self.maps = maps
        self.overlays = overlays
        self.register_buffer("thresholds", torch.full((len(self.score_names),), torch.nan, dtype=torch.float64))
        self.register_buffer("minutes", torch.zeros((), dtype=torch.float64))
        self._pixels: PixelsByKind | None = None
        self._evaluation: AnomalyEvaluation
        self._since = 0.0
        self._maps: MapWriter | None = None

    # --- what a subclass provides ---

    @abstractmethod
    def forward(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Pictures (B, 3, H, W), uint8 or float in [0, 1] -> scores (B,) by name, and the grid (B, h, w) of places."""

    @abstractmethod
    def enlarge(self, grid: Tensor, size: tuple[int, int]) -> Tensor:
        """Grid (B, h, w) -> map (B, H, W)."""

    def about(self) -> dict[str, Any]:
        """Settings to be written beside the figures."""
        return {}

    def explain(self, images: Tensor) -> Tensor | None:
        """Pictures (B, 3, H, W) in [0, 1] -> what their scores rest on (B, H, W) in [0, 1], if it can be told."""
        return None

    # --- construction ---

    def setup(self, stage: str) -> None:
        """Check that there are data, and weights in float32.

        Raises:
            UserError: no data module or validation split, or a precision without float32 weights.
        """
        super().setup(stage)
        if self.data is None:
            raise UserError(f"{type(self).__name__} takes its pictures from a data module: pass datamodule=")
        if self.trainer.precision in ("16-true", "bf16-true", "64-true"):
            raise UserError(f"trainer.precision = {self.trainer.precision}: take 32-true, bf16-mixed or 16-mixed")
        if stage == "validate" and not self.data.samples.get("val"):
            raise UserError("there is no validation split: set data.val_fraction, or use `test`")

    def pixels(self, images: Tensor) -> Tensor:
        """Pictures as a batch holds them -> float in [0, 1], at the size of the network's input, on its device."""
        return unit_range(images.to(self.device))

    def threshold_of(self, name: str) -> float | None:
        """From which score on a picture is rejected; None where that is unknown."""
        limit = float(self.thresholds[self.score_names.index(name)])
        return limit if math.isfinite(limit) else None

    # --- for the factory ---

    def for_factory(self, images: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        """The score that decides, whether it reaches its threshold, and the map (B, H, W)."""
        scores, grid = self(images)
        score = scores[self.score]
        limit = self.thresholds[self.score_names.index(self.score)]
        return {"score": score, "defective": score >= limit, "map": self.enlarge(grid, size)}

    def factory_facts(self) -> dict[str, Any]:
        """Which score it is, and the thresholds."""
        return {
            "class_names": ["good", "defective"],
            "normal_class": 0,
            "score": self.score,
            "threshold": self.threshold_of(self.score),
            "map_threshold": self.threshold_of("map_max"),
        }

    def decide_at(self, threshold: float) -> None:
        """Reject from this value of the score that decides on."""
        self.thresholds[self.score_names.index(self.score)] = threshold

    # --- the time of the training ---

    def on_train_start(self) -> None:
        """Begin; a resumed run may go on within an epoch, which has no start then."""
        self.on_train_epoch_start()

    def on_train_epoch_start(self) -> None:
        """Start the clock after a validation."""
        self._since = time.monotonic()

    def on_train_batch_end(self, *_: Any) -> None:
        """Count the time of the step, so that a checkpoint within an epoch knows it."""
        now = time.monotonic()
        self.minutes += (now - self._since) / 60
        self._since = now

    # --- evaluation ---

    def share_buffers(self) -> None:
        """Give all processes the running statistics of the first one, whose state is saved."""
        for buffer in self.buffers() if self.trainer.world_size > 1 else ():
            if buffer.numel():
                torch.distributed.broadcast(buffer, src=0)

    def begin(self, stage: str) -> None:
        """Prepare the pixel metrics of an evaluation at stage val, test or predict."""
        self._pixels = None
        if self.pixel_metrics != "off" and self.data.with_masks and stage != "predict":
            kinds = {self._kind_of(sample) for sample in self.data.samples[stage]}
            self._pixels = PixelsByKind(self.pixel_metrics, kinds, self.device)

    def on_validation_start(self) -> None:
        """Before the verb `validate`."""
        if self.trainer.state.fn == "validate":
            self.begin("val")

    def on_test_start(self) -> None:
        """Before a test."""
        self.begin("test")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Score the pictures and their pixels."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Batch, stage: str) -> Tensor:
        """Keep the scores of a batch, and those of its pixels where there are masks; gives the grid (B, h, w)."""
        scores, grid = self(batch["image"])
        self.collect(index=batch["index"], label=batch["label"], **scores)
        if self._pixels is not None:
            samples = [self.data.samples[stage][position] for position in batch["index"].tolist()]
            for sample, (scored, marked) in zip(samples, self.measured(batch, grid, stage), strict=True):
                self._pixels.update(self._kind_of(sample), scored, marked)
        return grid

    def measured(self, batch: Batch, grid: Tensor, stage: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Map and mask (H, W), at which the pixels' figures are measured: here at the mask's own size."""
        for position, cells in zip(batch["index"].tolist(), grid, strict=True):
            _, mask = self.data.original(stage, position)
            marked = torch.from_numpy(mask).to(self.device) > 0
            yield self.enlarge(cells[None], (marked.shape[0], marked.shape[1]))[0], marked

    def _kind_of(self, sample: Any) -> str:
        """The kind of defect of a sample; empty where it has none."""
        return "" if sample.label == self.data.normal_class else sample.defect_type or "defective"

    def on_validation_epoch_end(self) -> None:
        """All figures of the validation split, for the verb `validate`."""
        if self.trainer.state.fn == "validate":
            self._keep_result("val")

    def on_test_epoch_end(self) -> None:
        """All figures of the test split."""
        self._keep_result("test")
        self.log_dict(self._evaluation.watched(self.results_name("test")), sync_dist=True)

    # --- new pictures ---

    def on_predict_start(self) -> None:
        """Make room for the maps; those of an earlier prediction are kept under a number."""
        self.begin("predict")
        folder = Path(self.trainer.default_root_dir) / "predict_maps"
        self._maps = None
        if self.maps != "off" and not getattr(self.trainer, "fast_dev_run", False):
            if self.trainer.is_global_zero:
                keep_previous(folder)
            limit = self.threshold_of("map_max")
            self._maps = MapWriter(folder, self.maps, self.overlays, limit, self.map_scale)
        self.trainer.strategy.barrier("maps of an earlier prediction kept")

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Scores (B,) by name; each picture's map and overlay go to the run's folder `predict_maps`."""
        grid = self._evaluate(batch, "predict")
        if self._maps is not None:
            for position, name, cells in zip(batch["index"].tolist(), batch["name"], grid, strict=True):
                picture, _ = self.data.original("predict", position)
                scored = self.enlarge(cells[None], (picture.shape[0], picture.shape[1]))[0]
                self._maps.write(name, picture, scored.cpu().numpy())
        return {name: value for name, value in self._evaluated[-1].items() if name in self.score_names}

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
        pixel, by_type = self._pixels.figures() if self._pixels else ({}, {})
        self._evaluation = self.result(stage, pixel, by_type)

    def result(
        self, stage: str, pixel: dict[str, float], pixel_by_type: dict[str, dict[str, float]]
    ) -> AnomalyEvaluation:
        """The scores that all processes have collected, beside figures of the pixels."""
        found = self.gathered()
        samples = self.data.samples[stage]
        positions = found["index"].tolist()
        labels = found["label"].numpy()
        normal = self.data.normal_class if (labels >= 0).any() else 0
        return AnomalyEvaluation(
            samples=[samples[position] for position in positions],
            positions=positions,
            is_defect=labels != normal,
            known=bool((labels >= 0).all()),
            scores={name: found[name].double().numpy() for name in self.score_names},
            thresholds=dict(zip(self.score_names, self.thresholds.tolist(), strict=True)),
            score=self.score,
            pixel=pixel,
            pixel_by_type=pixel_by_type,
            map_scale=self.map_scale,
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
            write_report(folder, self.results_name(stage), self._evaluation, about, near, look)

    def look_at(self, stage: str, positions: Iterable[int]) -> list[Overlay]:
        """These samples of a split with their true masks, their maps and what these reject; on one process."""
        loader, limit, seen = self.data.loader(stage), self.threshold_of("map_max"), []
        for position in positions:
            picture, mask = self.data.original(stage, position)
            with self.trainer.precision_plugin.forward_context():  # as the scores were computed
                heat = self._map_of(loader.batch([position])["image"])
            height, width = picture.shape[:2]
            heat = np.asarray(Image.fromarray(heat).resize((width, height), Image.Resampling.BILINEAR))
            masks = {} if mask is None else {"ground_truth": (mask > 0).astype(np.uint8)}
            if limit is not None:
                masks["prediction"] = (heat >= limit).astype(np.uint8)
            name = self.data.samples[stage][position].name
            seen.append(Overlay(name, picture, masks, {0: "good", 1: "defect"}, heat, self.map_scale, limit))
        return seen

    @torch.no_grad()
    def _map_of(self, image: Tensor) -> Map:
        """The map (H, W) of a picture (1, 3, H, W), at the size of the network's input."""
        _, grid = self(image)
        height, width = self.pixels(image).shape[-2:]
        return self.enlarge(grid, (height, width))[0].cpu().numpy()
