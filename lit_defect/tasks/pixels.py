"""What every task that names each pixel shares: classes from the masks, evaluation by picture, maps of new pictures.

Figures follow from small counts of each picture (`metrics.segmentation.MaskCounts`), so that any number of processes
gives the same, and a refined map is compared with its first stage on the same pictures.
"""

from __future__ import annotations

import os
import time
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_defect.errors import UserError
from lit_defect.metrics.masks import VOID, MaskCounts, count_masks
from lit_defect.metrics.uncertainty import Sparsification, error_agreement, sparsification
from lit_defect.reporting.overlays import Overlay
from lit_defect.tasks.base import Batch, DefectTask
from lit_defect.tasks.mask_files import MAPS, MASKS, MaskWriter
from lit_defect.tasks.pixel_report import Doubt, PixelEvaluation, Report, Shown
from lit_defect.tasks.views import VIEWS, random_light, unit_range, view

DEFECT_NAMES = ["background", "defect"]
Listed = Literal["none", "flip", "flips", "dihedral"]
_DOUBT = "uncertainty"
_CURVE_POINTS = 50


class Answer(NamedTuple):
    """What a task says of a batch: class ids (B, H, W) by method, probabilities (B, C, H, W), uncertainty (B, H, W)."""

    masks: dict[str, Tensor]
    probabilities: Tensor
    uncertainty: Tensor | None = None


def mask_names(data: Any) -> list[str]:
    """What the mask values 0, 1, ... of a data module mean."""
    return list(getattr(data, "mask_names", DEFECT_NAMES))


def targets(batch: Batch, classes: int) -> Tensor:
    """The masks of a batch as class ids (B, H, W) int64, 255 for void.

    Raises:
        UserError: the batch has no masks, or masks of other classes.
    """
    if "mask" not in batch:
        raise UserError("the pictures come without masks: set data.with_masks to true")
    mask: Tensor = batch["mask"]
    labels = mask[:, 0].long() if mask.ndim == 4 else mask.long()
    if ((labels >= classes) & (labels != VOID)).any():
        found = sorted(set(labels.unique().tolist()) - {VOID})
        raise UserError(f"the masks hold the classes {found}, and there are names for {classes} only")
    return labels


def augmented(parts: Sequence[Tensor | None], augment: Listed, crop: int | None) -> list[Any]:
    """The same random view and window of pictures, masks and maps, each (B, ..., H, W); by torch's global generator.

    Raises:
        UserError: quarter turns of pictures that are not square, or a window larger than they are.
    """
    chosen = [part for part in parts if part is not None]
    count, (height, width) = len(chosen[0]), chosen[0].shape[-2:]
    if crop is not None and crop > min(height, width):
        raise UserError(f"model.init_args.crop = {crop} is larger than the pictures, {height}x{width}")
    numbers = torch.randint(VIEWS[augment], (count,)).tolist()
    rows = torch.randint(max(1, height - (crop or height) + 1), (count,)).tolist()
    columns = torch.randint(max(1, width - (crop or width) + 1), (count,)).tolist()

    def change(part: Tensor) -> Tensor:
        changed = []
        for one, number, row, column in zip(part, numbers, rows, columns, strict=True):
            window = one[..., row : row + (crop or height), column : column + (crop or width)]
            changed.append(view(window[None], number)[0])
        return torch.stack(changed)

    return [None if part is None else change(part) for part in parts]


class PixelTask(DefectTask):
    """Base of the tasks that name each pixel.

    Args:
        augment: views that training draws from: `none`, `flip` (left-right), `flips` (both ways), `dihedral` (and
            quarter turns).
        light: share by which brightness and contrast of each training picture change, at most.
        crop: side of a random window that training cuts from each picture; null takes the whole picture.
        maps: whether `predict` writes the probability map of each picture, too (see `reporting/probabilities.py`).
        overlays: whether `predict` writes each picture with its mask laid over, too.
        channels_last: memory format of the networks; faster convolutions on most devices.
        compile: compile the network with torch.compile.
        class_names: names of the mask values; null takes them from the data module.
        kwargs: see `DefectTask`.
    """

    main: str  # the method that is reported first
    before: str | None = None  # the method that the others are compared with

    def __init__(
        self,
        *,
        augment: Listed = "flips",
        light: float = 0.0,
        crop: int | None = None,
        maps: bool = True,
        overlays: bool = True,
        channels_last: bool = True,
        compile: bool = False,
        class_names: list[str] | None = None,
        monitor: str | None = "val/iou",
        **kwargs: Any,
    ) -> None:
        super().__init__(monitor=monitor, **kwargs)
        if crop is not None and crop < 1:
            raise UserError(f"model.init_args.crop = {crop}: expected the side of a window in pixels, or null")
        if not 0 <= light < 1:
            raise UserError(f"model.init_args.light = {light}: expected a share, 0 <= light < 1")
        self.augment: Listed = augment
        self.light = light
        self.crop = crop
        self.maps = maps
        self.overlays = overlays
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.compile_network = compile
        self.class_names = class_names
        self._evaluation: PixelEvaluation
        self._seconds: dict[str, float] = {}
        self._writer: MaskWriter | None = None

    # --- what a subclass provides ---

    @abstractmethod
    def answer(self, batch: Batch, stage: str) -> Answer:
        """What the task says of a batch at stage fit (validation while training), val, test or predict."""

    @abstractmethod
    def validation_loss(self, batch: Batch, labels: Tensor, answer: Answer) -> Tensor:
        """The loss of a validation batch."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """Settings and sizes to be written beside the figures; `network_calls` and `parameters` among them."""

    # --- construction ---

    @property
    def names(self) -> list[str]:
        """The classes, known after `setup`."""
        if self.class_names is None:
            raise UserError("the classes are not known yet: pass class_names, a data module, or load a checkpoint")
        return self.class_names

    @property
    def classes(self) -> int:
        """How many."""
        return len(self.names)

    def setup(self, stage: str) -> None:
        """Take the classes from the data module, or check that they are the checkpoint's.

        Raises:
            UserError: no masks, other classes, nothing to learn from, or a precision without float32 weights.
        """
        super().setup(stage)
        data, name = self.data, type(self).__name__
        if data is None:
            raise UserError(f"{name} takes its classes and pictures from a data module: pass datamodule=")
        if stage != "predict" and not data.with_masks:
            raise UserError(f"{name} learns and is judged by masks: set data.with_masks to true")
        names = mask_names(data)
        own_pictures = stage == "predict" and data.predict_root is not None
        if self.class_names is None:
            self.class_names = names
        elif list(self.class_names) != names and not own_pictures:
            raise UserError(f"the model's classes are {self.class_names}, the data's are {names}")
        self.hparams.update(class_names=self.class_names)
        if self.trainer.precision in ("16-true", "bf16-true", "64-true"):
            raise UserError(f"trainer.precision = {self.trainer.precision}: take 32-true, bf16-mixed or 16-mixed")
        if stage == "fit":
            samples = data.samples["train"]
            if data.normal_class is not None and all(sample.label == data.normal_class for sample in samples):
                raise UserError(
                    f"none of the {len(samples)} training pictures has a defect, so {name} would learn to find none: "
                    "set data.setting to supervised or few_shot"
                )
        elif stage == "validate" and not data.samples.get("val"):
            raise UserError("there is no validation split: set data.val_fraction, or use `test`")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Look whether the checkpoint goes with the data and with the network at hand.

        Raises:
            UserError: other classes, or tensors of another network.
        """
        names = checkpoint.get("hyper_parameters", {}).get("class_names")
        if names is not None and list(names) != list(self.class_names or names):
            raise UserError(f"the checkpoint's classes are {names}, the data's are {self.class_names}")
        shapes = [
            {key: value.shape for key, value in state.items()}
            for state in (self.state_dict(), checkpoint["state_dict"])
        ]
        misfit = sorted({key for key, _ in shapes[0].items() ^ shapes[1].items()})
        if misfit:
            raise UserError(
                f"the checkpoint does not fit this {type(self).__name__}: {len(misfit)} tensors are missing, left over "
                f"or of another shape, such as {misfit[0]}; take the model's options from the config.yaml of its run"
            )

    def training_pictures(self, batch: Batch, *others: Tensor | None) -> list[Any]:
        """Pictures in random light, their masks, and `others`, all in the same random views and windows."""
        images = self.pixels(batch)
        images = random_light(images, self.light) if self.light else images
        return augmented([images, targets(batch, self.classes), *others], self.augment, self.crop)

    def pixels(self, batch: Batch) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1]."""
        return unit_range(batch["image"])

    # --- evaluation ---

    def timed(self, what: str, since: float) -> None:
        """Add the time since `since` (`clock()`) to what the evaluation has spent on `what`."""
        self._seconds[what] = self._seconds.get(what, 0.0) + self.clock() - since

    def clock(self) -> float:
        """Seconds, when the device has done all it was asked."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def on_validation_epoch_start(self) -> None:
        """Forget the times of another evaluation."""
        self._seconds = {}

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count the pixels of a batch."""
        fitting = self.trainer.state.fn == "fit"
        answer = self.answer(batch, "fit" if fitting else "val")
        labels = targets(batch, self.classes)
        if fitting:
            loss = self.validation_loss(batch, labels, answer)
            self.log("val/loss", loss, batch_size=len(labels), sync_dist=True)
            shown = {name: mask for name, mask in answer.masks.items() if name in (self.main, self.before)}
            answer = answer._replace(masks=shown, uncertainty=None)
        self._tally(batch, labels, answer, distances=not fitting)

    def on_validation_epoch_end(self) -> None:
        """Log the figures of the whole split, or keep them for the verb `validate`."""
        evaluation = self._gather("val")
        if self.trainer.state.fn == "fit":
            self.log_dict(evaluation.watched("val"), sync_dist=True)
        else:
            self._evaluation = evaluation

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Count the pixels of a batch, by every method."""
        self._tally(batch, targets(batch, self.classes), self.answer(batch, "test"))

    def on_test_epoch_end(self) -> None:
        """All figures of the test split."""
        self._evaluation = self._gather("test")
        self.log_dict(self._evaluation.watched(self.results_name("test")), sync_dist=True)

    def _tally(self, batch: Batch, labels: Tensor, answer: Answer, *, distances: bool = True) -> None:
        """Keep the counts of each picture."""
        truth = labels.cpu().numpy()
        kept: dict[str, Tensor] = {"index": batch["index"]}
        for method, mask in answer.masks.items():
            counts = count_masks(mask.cpu().numpy(), truth, self.classes, distances=distances)
            kept |= {f"{method}/{name}": torch.from_numpy(value) for name, value in vars(counts).items()}
        if answer.uncertainty is not None:
            wrong = answer.masks[self.main] != labels
            kept |= _doubt_of(answer.uncertainty, wrong, labels != VOID)
        self.collect(**kept)

    def _gather(self, stage: str) -> PixelEvaluation:
        """The counts of all processes."""
        found = {key: value.numpy() for key, value in self.gathered().items()}
        positions = found.pop("index").tolist()
        split = self.data.samples[stage]
        arrays: dict[str, dict[str, Any]] = {}
        for key, value in found.items():
            method, _, name = key.rpartition("/")
            arrays.setdefault(method, {})[name] = value
        doubt = arrays.pop(_DOUBT, None)
        return PixelEvaluation(
            samples=[split[position] for position in positions],
            positions=positions,
            counts={method: MaskCounts(**parts) for method, parts in arrays.items()},
            class_names=self.names,
            main=self.main,
            before=self.before,
            doubt=None if doubt is None else _mean_doubt(**doubt),
        )

    def write_results(self, folder: Path, stage: str) -> None:
        """Figures, one line a picture, and the best and worst pictures of the last evaluation; rank 0 only."""
        if stage == "predict":
            print(f"\nmasks  {folder / MASKS}" + (f"\nmaps   {folder / MAPS}\n" if self.maps else "\n"))
            return
        loader = self.data.loader(stage)
        about = {
            "training_seed": int(os.environ.get("PL_GLOBAL_SEED", 0)),
            "split_seed": getattr(self.data, "seed", None),
            **self.about(),
            "ms_per_image": self._times(),
        }
        near = {leak.name_b for leak in getattr(self.data, "leaks", ()) if leak.split_b == stage}
        look = partial(self._look, loader, stage)
        Report(folder, self.results_name(stage), type(self).__name__, self._evaluation, about, near, look).write()

    def look_at(self, stage: str, positions: Iterable[int]) -> list[Overlay]:
        """These samples of a split with their true masks and those of each method; on one process."""
        loader = self.data.loader(stage)
        names = {**dict(enumerate(self.names)), VOID: "void"}
        seen = []
        for position in positions:
            shown = self._look(loader, stage, position)
            name = self.data.samples[stage][position].name
            seen.append(Overlay(name, shown.picture, {"ground_truth": shown.truth, **shown.masks}, names))
        return seen

    @torch.no_grad()
    def _look(self, loader: Any, stage: str, position: int) -> Shown:
        batch = self.data.transfer_batch_to_device(loader.batch([position]), self.device, 0)
        with self.trainer.precision_plugin.forward_context():  # as the figures were computed
            answer = self.answer(batch, stage)
        picture = (255 * self.pixels(batch)[0]).round().byte().permute(1, 2, 0).cpu().numpy()
        masks = {method: mask[0].cpu().numpy() for method, mask in answer.masks.items()}
        uncertainty = None if answer.uncertainty is None else answer.uncertainty[0].float().cpu().numpy()
        return Shown(picture, targets(batch, self.classes)[0].cpu().numpy(), masks, uncertainty)

    def _times(self) -> dict[str, float]:
        """Milliseconds a picture, of this process's share of the evaluation."""
        share = max(1, len(self._evaluation.samples) // self.trainer.world_size)
        return {what: round(1000 * seconds / share, 3) for what, seconds in self._seconds.items()}

    # --- new pictures ---

    def on_predict_start(self) -> None:
        """Make room for the files of the prediction."""
        self._writer = None
        if not getattr(self.trainer, "fast_dev_run", False):
            folder = Path(self.trainer.default_root_dir)
            self._writer = MaskWriter(folder, self.names, self.maps, self.overlays)
            if self.trainer.is_global_zero:
                self._writer.begin()
        self.trainer.strategy.barrier("an earlier prediction kept")

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Probabilities (B, C, H, W); masks, overlays and maps go to the run's folder."""
        answer = self.answer(batch, "predict")
        for row, (position, name) in enumerate(zip(batch["index"].tolist(), batch["name"], strict=True)):
            if self._writer is not None:
                picture, _ = self.data.original("predict", position)
                unsure = None if answer.uncertainty is None else answer.uncertainty[row]
                self._writer.write(name, picture, answer.probabilities[row], unsure)
        return answer.probabilities


def _doubt_of(uncertainty: Tensor, wrong: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """What `Doubt` is made of, for each picture of a batch (B, H, W)."""
    columns: dict[str, list[Any]] = {"auroc": [], "found": [], "error": [], "oracle": []}
    parts = (part.cpu().numpy() for part in (uncertainty.float(), wrong, valid))
    for values, failed, counted in zip(*parts, strict=True):
        agreement = error_agreement(values, failed, counted)
        curve = sparsification(values, failed, counted, steps=_CURVE_POINTS)
        for name, value in (("auroc", agreement.auroc), ("found", agreement.found)):
            columns[name].append(value)
        columns["error"].append(curve.error)
        columns["oracle"].append(curve.oracle)
    return {f"{_DOUBT}/{name}": torch.from_numpy(np.array(column)) for name, column in columns.items()}


def _mean_doubt(auroc: Any, found: Any, error: Any, oracle: Any) -> Doubt:
    shares = np.arange(_CURVE_POINTS) / _CURVE_POINTS
    curves = [Sparsification(shares, *pair) for pair in zip(error, oracle, strict=True)]
    return Doubt(auroc, found, Sparsification.mean(curves))
