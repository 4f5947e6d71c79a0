"""From the samples of a split to batches: loaders that know their process, pictures decoded once, originals."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import PIL
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lit_defect.data.images import Array, read_image, read_mask
from lit_defect.data.inspection import CheckResult
from lit_defect.data.layout import Layout
from lit_defect.data.loading import Batch, BatchLoader, DefectDataset, EvalBatchSampler, TrainBatchSampler
from lit_defect.data.samples import REAL, Sample
from lit_defect.data.stores import Stores, open_stores
from lit_defect.data.synthetic import SYNTHETIC_VAL, Recipe, turns
from lit_defect.errors import DataError, UserError
from lit_defect.transfer import sent


class Serving(Layout, LightningDataModule):
    """The serving half of `DefectDataModule`, which sets the attributes below."""

    batch_size: int
    global_batch_size: int | None
    eval_batch_size: int
    image_size: tuple[int, int] | None
    num_workers: int
    cache: Literal["off", "ram", "disk"]
    cache_dir: Path
    with_masks: bool
    seed: int
    sampler: Literal["shuffle", "balanced"]
    drop_last: bool
    batches_per_epoch: int | None
    on_wrong_mode: Literal["error", "convert"]
    predict_split: Literal["test", "val", "train", "all"]
    serve_images: bool
    synthetic: Recipe | None
    samples: dict[str, list[Sample]]
    _checked: CheckResult | None  # of the data set
    _generated: CheckResult | None  # of the generated pictures that are used
    _to_predict: CheckResult | None  # of the pictures of `predict_root`
    _stores: Stores | None

    @abstractmethod
    def _used(self) -> CheckResult:
        """What the data set holds and the generated pictures that are used, checked once."""

    # ---- Lightning's hooks --------------------------------------------------------------------------------

    def train_dataloader(self) -> BatchLoader:
        """Shuffled or balanced batches; a resumed Trainer goes on where it stopped, also within an epoch."""
        samples = self._of("train")
        rank, world_size = self._rank()
        labels: list[int] = [sample.label for sample in samples]
        weights = None
        if self.synthetic and self.synthetic.share and any(sample.source != REAL for sample in samples):
            if self.sampler != "balanced":
                raise UserError("data.synthetic.share is a share of balanced batches: set data.sampler to balanced")
            labels, weights = turns(samples, self.normal_class, self.synthetic.share)
        order = TrainBatchSampler(
            labels,
            batch_size=self.batch_size,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            kind=self.sampler,
            drop_last=self.drop_last,
            batches=self.batches_per_epoch,
            together=self.trainer.accumulate_grad_batches if self.trainer and self.global_batch_size else 1,
            fixed=self.trainer is not None and getattr(self.trainer, "overfit_batches", 0) > 0,
            weights=weights,
        )
        return self._loader("train", order, progress=self._batches_done)

    def val_dataloader(self) -> BatchLoader | list[BatchLoader]:
        """Every validation sample once; no loader when nothing validates."""
        return self.loader("val") if self.samples.get("val") else []

    def test_dataloader(self) -> BatchLoader:
        """Every test sample once."""
        return self.loader("test")

    def predict_dataloader(self) -> BatchLoader:
        """Every new picture of `predict_root` once, or every sample of `predict_split`."""
        return self.loader("predict")

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Moves the tensors; Lightning's own way looks at every string too, which costs more than a step."""
        return {key: sent(value, device) if isinstance(value, Tensor) else value for key, value in batch.items()}

    # ---- for tasks, callbacks and the command line --------------------------------------------------------

    def loader(self, split: str, *, batch_size: int | None = None) -> BatchLoader:
        """Every sample of a split once, in their order; under several processes, each its share.

        Raises:
            DataError: the split is empty, or has fewer samples than there are processes.
        """
        samples = self._of(split)
        rank, world_size = self._rank()
        size = batch_size or self.eval_batch_size
        order = EvalBatchSampler(len(samples), batch_size=size, rank=rank, world_size=world_size)
        return self._loader(split, order)

    def original(self, split: str, position: int) -> tuple[Array, npt.NDArray[Any] | None]:
        """A picture and its mask at their own size, decoded from their files, as maps are measured and drawn on.

        Args:
            split: train, val, test, predict or synthetic_val.
            position: place in the split, the `index` of a batch.

        Returns:
            (H, W, 3) uint8, upright, cropped and mirrored as in a batch, and the mask (H, W) with the values of a
            batch ({0, 1} uint8, but for Pascal VOC); zeros where nothing is marked, None where the data set is
            used without masks.
        """
        sample = self._of(split)[position]
        picture = read_image(sample.path, box=sample.box, mirror=sample.mirror, convert=self._convert)
        if not self.with_masks or self._new(split):
            return picture, None
        values = np.zeros(picture.shape[:2], np.uint8)
        if sample.mask:
            values = read_mask(sample.mask, box=sample.box, mirror=sample.mirror)
        return picture, self.prepare_mask(values, sample).reshape(values.shape)

    def photograph(self, split: str, position: int) -> Array:
        """The whole photograph (H, W, 3) uint8, upright, that a sample is a crop of."""
        sample = self._of(split)[position]
        return read_image(sample.path, convert=self._convert)

    def sample_key(self, sample: Sample) -> str:
        """What decides the pixels of a sample: its file (path, length, time of change), crop, mirror, size, and Pillow.

        Two samples with one key have the same image in a batch, so the key may index stored features. Versions of
        Pillow scale differently: 13 takes the columns of tall pictures first, 12 always the rows.
        """
        stamp = next(
            checked.stamps[sample.path]
            for checked in (self._checked, self._generated, self._to_predict)
            if checked and sample.path in checked.stamps
        )
        pillow = PIL.__version__ if self.image_size else ""
        parts = (sample.path, *stamp, sample.box, sample.mirror, self.image_size, self.on_wrong_mode, pillow)
        return "|".join(map(str, parts))

    def decoded_bytes(self) -> int:
        """Size of all decoded pictures and masks, as a cache holds them."""
        stores = self._open(self._used(), "off")
        kept = [store for store in (stores.images, stores.masks) if store is not None]
        return sum(prod(shape) for store in kept for shape in store.shapes)

    # ---- inside -------------------------------------------------------------------------------------------

    def _of(self, split: str) -> list[Sample]:
        if split == SYNTHETIC_VAL and split not in self.samples and self.samples:
            raise DataError("no generated pictures are held out: set data.synthetic.holdout above 0.")
        if split not in self.samples:
            raise DataError(f"there is no {split} split before setup.")
        if not self.samples[split]:
            if split == "predict" and self.predict_split != "all":
                split = self.predict_split
            remedy = {
                "train": "check what stands in the data set's own train split, or in data.split_file",
                "val": "set data.val_fraction or data.split_file",
                SYNTHETIC_VAL: "its pictures cannot be used, see skipped.csv",
            }.get(split, "fill the data set's own test split, or set data.test_fraction or data.split_file")
            raise DataError(f"no samples in the {split} split: {remedy}.")
        return self.samples[split]

    def _rank(self) -> tuple[int, int]:
        """Number of this process, and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _batches_done(self) -> int:
        """How many batches of the current epoch the Trainer has behind it."""
        if self.trainer is None or not self.trainer.training:
            return 0
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def _loader(self, split: str, order: TrainBatchSampler | EvalBatchSampler, **kwargs: Any) -> BatchLoader:
        workers = self.num_workers if self.cache == "off" or self._new(split) else 0
        pin = torch.cuda.is_available()
        return BatchLoader(partial(self._dataset, split), order, num_workers=workers, pin_memory=pin, **kwargs)

    def _dataset(self, split: str) -> DefectDataset:
        samples = self.samples[split]
        if not self.serve_images:
            return DefectDataset(samples)
        new = self._new(split)
        stores = self._open(new, "off") if new else self._open_stores()
        return DefectDataset(
            samples,
            rows=stores.rows_of(samples),
            images=stores.images,
            masks=stores.masks,
            prepare_mask=self.prepare_mask,
        )

    def _new(self, split: str) -> CheckResult | None:
        """The pictures of `predict_root`, if this split holds them; they are not of the data set."""
        return self._to_predict if split == "predict" else None

    def _open_stores(self) -> Stores:
        if self._stores is None:
            self._stores = self._open(self._used(), self.cache)
        return self._stores

    def _open(self, checked: CheckResult, cache: Literal["off", "ram", "disk"]) -> Stores:
        return open_stores(
            checked,
            image_size=self.image_size,
            convert=self._convert,
            with_masks=self.with_masks and checked is not self._to_predict,
            cache=cache,
            cache_dir=self.cache_dir,
            key=self.sample_key,
            copies=self.trainer.num_devices if self.trainer else 1,
        )

    @property
    def _convert(self) -> bool:
        return self.on_wrong_mode == "convert"
