"""What every anomaly detector shares: scores fitted to normal pictures, evaluation, maps of new pictures.

A subclass turns pictures into features and feature maps (`embed`) and trains what does so. At the end of the
training a `Detector` is fitted to the plain normal training pictures, and each score gets the threshold that the
allowed share of the good validation pictures reaches. Nothing is chosen on defective pictures: the last state is
the result.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lit_defect.errors import UserError
from lit_defect.metrics.anomaly import threshold_for_overkill
from lit_defect.reporting.overlays import Overlay
from lit_defect.scoring.detector import SCORES, Detector
from lit_defect.tasks.anomaly_scoring import ScoringTask
from lit_defect.tasks.processes import joined
from lit_defect.tasks.views import resize


class AnomalyTask(ScoringTask):
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
        kwargs: pixel figures, thresholds and what `predict` writes as for `ScoringTask`, the schedule as for
            `DefectTask`.

    Raises:
        UserError: an option out of range.
    """

    score_names = SCORES

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
        **kwargs: Any,
    ) -> None:
        super().__init__(monitor=None, score=score, **kwargs)
        if not 0 <= smoothing < 1:
            raise UserError(f"model.init_args.smoothing = {smoothing}: expected a share, 0 <= s < 1")
        for key, number in (("neighbours", neighbours), ("map_dimensions", map_dimensions)):
            if number < 1:
                raise UserError(f"model.init_args.{key} = {number}: expected at least 1")
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if self.image_size is not None and min(self.image_size) < 1:
            raise UserError(f"model.init_args.image_size = {image_size}: expected pixels, at least 1")
        self.neighbours = neighbours
        self.map_strides = (8, 16, 32) if map_strides is None else tuple(map_strides)
        self.map_positions = map_positions
        self.map_dimensions = map_dimensions
        self.smoothing = smoothing

    # --- what a subclass provides ---

    @abstractmethod
    def embed(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Pictures (B, 3, H, W) in [0, 1] -> features (B, D) and a map (B, C, h, w) for each of `map_strides`."""

    @property
    @abstractmethod
    def pose_is_free(self) -> bool:
        """Whether the product lies in any direction, so that no place of its maps is like itself."""

    # --- construction ---

    def setup(self, stage: str) -> None:
        """Also check that the splits allow what is asked for.

        Raises:
            UserError: no good class, defective or too few pictures to train on.
        """
        super().setup(stage)
        data = self.data
        if stage != "predict" and data.normal_class is None:  # new pictures need no data set beside them
            raise UserError(f"{type(self).__name__} learns what is normal, and this data module has no good class")
        if stage == "fit":
            self._check_training(data.samples["train"], data.normal_class)

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
        return resize(super().pixels(images), self.image_size)

    def enlarge(self, grid: Tensor, size: tuple[int, int]) -> Tensor:
        """Grid (B, h, w) -> smoothed map (B, H, W)."""
        return self.detector.enlarge(grid, size)

    # --- fitting ---

    def on_train_epoch_start(self) -> None:
        """Also forget scores that were fitted to other weights."""
        super().on_train_epoch_start()
        if self.detector.fitted:
            self.detector = self.make_detector().to(self.device)
            self.thresholds.fill_(torch.nan)

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
        self.share_buffers()  # each process has seen other batches in the last step
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

    def look_at(self, stage: str, positions: Iterable[int]) -> list[Overlay]:
        """Nothing while the training has fitted no scores yet."""
        return super().look_at(stage, positions) if self.detector.fitted else []

    def begin(self, stage: str) -> None:
        """Also make sure that there are scores."""
        if not self.detector.fitted:
            if not self.data.samples.get("train"):
                raise UserError(
                    "the checkpoint was written before the training ended and holds no fitted scores: take last.ckpt "
                    "of a finished run, or finish this one by --resume"
                )
            rank_zero_warn("the checkpoint was written before the training ended: its scores are fitted now")
            with torch.inference_mode(False):
                self._fit_detector()
        super().begin(stage)
