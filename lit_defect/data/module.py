"""The base of all data modules: inspection, splits, leak guard, cache and loaders, whatever the layout.

A subclass says what is particular to its layout (`lit_defect.data.layout`); the order of events is always the
same, on every process with the same outcome:

    find_samples -> check (inspection) -> groups -> split -> leak guard -> loaders

A batch is a dict: `image` (B, 3, H, W) uint8 · `mask` (B, 1, H, W) uint8 {0, 1} when asked for · `label` and
`index` (B,) int64 · `path`, `name`, `category`, `defect_type`, `group`, `source`, lists of B strings.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lit_defect.data import guard
from lit_defect.data.images import Array, read_image, read_mask
from lit_defect.data.inspection import CheckResult, Problem, check, list_pictures, summary
from lit_defect.data.layout import Layout
from lit_defect.data.leakage import Leak
from lit_defect.data.loading import Batch, BatchLoader, DefectDataset, EvalBatchSampler, TrainBatchSampler
from lit_defect.data.samples import SPLITS, Sample
from lit_defect.data.settings import check_choices, check_settings
from lit_defect.data.splits import assign_splits, read_groups, read_split, without_defects, write_groups, write_split
from lit_defect.data.stores import Stores, open_stores
from lit_defect.errors import DataError

AUTO = "auto"


class DefectDataModule(Layout, LightningDataModule):
    """Samples of one data set, checked, split and served in batches.

    Args:
        batch_size: samples per process and training step.
        eval_batch_size: samples per process and evaluation step; as `batch_size` when not given.
        image_size: side of a square, or (height, width), in pixels; None keeps the native size.
        num_workers: processes that decode ahead; they are used with `cache=off` only.
        cache: where decoded pictures are kept: nowhere, in each process, or in a file shared by all.
        cache_dir: folder of that file and of what inspection remembers; by default the environment
            variable LIT_DEFECT_CACHE, else ~/.cache/lit_defect.
        with_masks: check the masks and put them into the batches.
        seed: decides the splits and the order of training.
        val_fraction: share of the training samples that validates.
        test_fraction: share of the samples that tests, where the layout prescribes no test split.
        folds: cut the samples into this many parts instead; part `fold` tests.
        fold: which part tests.
        shots: at most this many training samples of each class and type.
        split_file: a `splits.csv` of an earlier run, to repeat its split.
        group_file: CSV `path,group`; samples of one group (one physical part) stay in one split. `auto` takes the
            near-duplicates that the leak guard finds for photographs of one part.
        test: `mirrored_train` tests on the mirrored training samples, a leak by design that some papers
            report; to compare with them only.
        sampler: `balanced` draws all classes equally often.
        drop_last: leave out of a pass over the training samples what does not fill the last batch.
        batches_per_epoch: training steps of an epoch, of passes laid end to end, so that the epochs of a small data
            set are worth counting; by default an epoch is one pass.
        leakage: what to do about near-duplicates in different splits.
        on_bad_file: what to do about files that cannot be used; what is skipped is listed in `skipped.csv`.
        on_wrong_mode: convert 16-bit, transparent, CMYK and turned pictures, or treat them as bad files.
        predict_root: folder with new pictures for `predict`; the test split when not given.

    Attributes:
        samples: after `setup`, the samples of each split ("train", "val", "test", "predict").
        serve_images: set to False (before the first batch) by a task that needs identity and labels only;
            nothing is decoded then.
        leaks: near-duplicates across splits, the closest first.
    """

    def __init__(
        self,
        *,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        image_size: int | tuple[int, int] | None = None,
        num_workers: int = 0,
        cache: Literal["off", "ram", "disk"] = "ram",
        cache_dir: str | None = None,
        with_masks: bool = False,
        seed: int = 0,
        val_fraction: float = 0.2,
        test_fraction: float = 0.25,
        folds: int | None = None,
        fold: int = 0,
        shots: int | None = None,
        split_file: str | None = None,
        group_file: str | None = None,
        test: Literal["holdout", "mirrored_train"] = "holdout",
        sampler: Literal["shuffle", "balanced"] = "shuffle",
        drop_last: bool = True,
        batches_per_epoch: int | None = None,
        leakage: Literal["error", "warn", "off"] = "warn",
        on_bad_file: Literal["error", "skip"] = "error",
        on_wrong_mode: Literal["error", "convert"] = "error",
        predict_root: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        for key, value in self.hparams.items():
            if isinstance(value, Path):  # a checkpoint that opens with weights_only holds plain types
                self.hparams[key] = str(value)
        check_choices((c for c in reversed(type(self).__mro__) if issubclass(c, DefectDataModule)), self.hparams)
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.num_workers = num_workers
        self.cache = cache
        folder = cache_dir or os.environ.get("LIT_DEFECT_CACHE") or "~/.cache/lit_defect"
        self.cache_dir = Path(folder).expanduser()
        self.with_masks = with_masks
        self.seed = seed
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.folds = folds
        self.fold = fold
        self.shots = shots
        self.split_file = Path(split_file).expanduser() if split_file else None
        self.group_file = Path(group_file).expanduser() if group_file and group_file != AUTO else group_file
        self.test = test
        self.sampler = sampler
        self.drop_last = drop_last
        self.batches_per_epoch = batches_per_epoch
        self.leakage = leakage
        self.on_bad_file = on_bad_file
        self.on_wrong_mode = on_wrong_mode
        self.predict_root = Path(predict_root).expanduser() if predict_root else None
        check_settings(vars(self))

        self.serve_images = True
        self.samples: dict[str, list[Sample]] = {}
        self.leaks: list[Leak] = []
        self.layout_problems: list[Problem] = []  # found by find_samples, such as a mask without image
        self._checked: CheckResult | None = None  # of the data set
        self._divided: list[Sample] = []  # the same samples with their splits, unused ones too
        self._stores: Stores | None = None
        self._to_predict: CheckResult | None = None

    def assign(self, samples: list[Sample]) -> list[Sample]:
        """The samples with their splits: what the layout prescribes, and seeded draws for the rest."""
        return assign_splits(
            samples,
            seed=self.seed,
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction if self.test == "holdout" else 0.0,
            folds=self.folds,
            fold=self.fold,
            shots=self.shots,
        )

    # ---- Lightning's hooks --------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """The slow part, once per machine: look at every file, fill the cache on disk."""
        if self._only_predicts():
            return
        self._inspect()
        if self.cache == "disk":
            self._open_stores()

    def setup(self, stage: str) -> None:
        """Splits, the same on every process; `stage` matters only for `predict` with a folder of its own."""
        if self.predict_root and stage == "predict":
            self._to_predict = self._check(list_pictures(self.predict_root))
            self.samples["predict"] = self._to_predict.samples
        elif not self._divided:
            self._divide()
            self._guard()

    def train_dataloader(self) -> BatchLoader:
        """Shuffled or balanced batches; a resumed Trainer goes on where it stopped, also within an epoch."""
        samples = self._of("train")
        rank, world_size = self._rank()
        order = TrainBatchSampler(
            [sample.label for sample in samples],
            batch_size=self.batch_size,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            kind=self.sampler,
            drop_last=self.drop_last,
            batches=self.batches_per_epoch,
            fixed=self.trainer is not None and getattr(self.trainer, "overfit_batches", 0) > 0,
        )
        return self._loader("train", order, progress=self._batches_done)

    def val_dataloader(self) -> BatchLoader | list[BatchLoader]:
        """Every validation sample once; no loader when nothing validates."""
        return self.loader("val") if self.samples.get("val") else []

    def test_dataloader(self) -> BatchLoader:
        """Every test sample once."""
        return self.loader("test")

    def predict_dataloader(self) -> BatchLoader:
        """Every new picture of `predict_root` once, or every test sample."""
        return self.loader("predict")

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Moves the tensors; Lightning's own way looks at every string too, which costs more than a step."""
        asynchronous = device.type == "cuda"
        return {
            key: value.to(device, non_blocking=asynchronous) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }

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
            split: train, val, test or predict.
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

    def counts(self) -> dict[str, dict[str, int]]:
        """Number of samples by split and class name, for the splits that have any."""
        table = {}
        for split in ("train", "val", "test"):
            labels = Counter(sample.label for sample in self.samples.get(split, ()))
            if labels:
                table[split] = {name: labels[label] for label, name in enumerate(self.class_names)}
        return table

    def sample_key(self, sample: Sample) -> str:
        """What decides the pixels of a sample: its file (path, length, time of change), crop, mirror, size.

        Two samples with one key have the same image in a batch, so the key may index stored features.
        """
        stamp = next(
            checked.stamps[sample.path]
            for checked in (self._checked, self._to_predict)
            if checked and sample.path in checked.stamps
        )
        parts = (sample.path, *stamp, sample.box, sample.mirror, self.image_size, self.on_wrong_mode)
        return "|".join(map(str, parts))

    def write_records(self, folder: Path) -> None:
        """Writes splits.csv, and what was found: leakage.csv, leakage.png, groups.csv, skipped.csv.

        `groups.csv` joins the near-duplicates; as `data.group_file` of the next run it keeps them together.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if self._divided:
            write_split(folder / "splits.csv", self._divided)
        skipped = [p for checked in (self._checked, self._to_predict) if checked for p in checked.problems]
        if skipped:
            guard.write_csv(folder / "skipped.csv", Problem._fields, skipped)
        if self.leaks and self._checked:
            samples = [sample for split in self.samples.values() for sample in split]
            guard.write_leaks(folder, self.leaks, samples, self._convert)
            if self.test == "holdout":
                known = [sample.group for sample in self._divided]
                groups = guard.proposed_groups(self._checked, known, self.cache_dir)
                write_groups(folder / "groups.csv", [sample.name for sample in self._divided], groups)

    # ---- inside -------------------------------------------------------------------------------------------

    def _only_predicts(self) -> bool:
        return bool(self.predict_root and self.trainer and self.trainer.state.fn == TrainerFn.PREDICTING)

    def _inspect(self) -> CheckResult:
        if self._checked is None:
            self.layout_problems = []
            samples = self.find_samples()
            self._checked = self._check(
                samples,
                class_names=self.needed_classes,
                normal_class=self.normal_class,
                with_masks=self.with_masks,
                problems=self.layout_problems,
            )
        return self._checked

    def _check(self, samples: list[Sample], **kwargs: Any) -> CheckResult:
        checked = check(
            samples,
            on_bad_file=self.on_bad_file,
            on_wrong_mode=self.on_wrong_mode,
            cache_dir=self.cache_dir,
            **kwargs,
        )
        if checked.problems:
            text = f"Left out of the data set: {summary(checked.problems)}"
            rank_zero_warn(f"{text}; see skipped.csv in the run's folder.")
        return checked

    def _divide(self) -> None:
        checked = self._inspect()
        samples = checked.samples
        if isinstance(self.group_file, Path):
            samples = read_groups(self.group_file, samples)
        elif self.group_file:
            groups = guard.proposed_groups(checked, [sample.group for sample in samples], self.cache_dir)
            samples = [replace(sample, group=group) for sample, group in zip(samples, groups, strict=True)]
        if self.split_file:
            self._divided = read_split(self.split_file, samples)
        else:
            self._divided = self.assign(samples)
        if self.good_only:
            self._divided = without_defects(self._divided, self.normal_class)
        self.samples = {split: [s for s in self._divided if s.split == split] for split in SPLITS}
        if self.test == "mirrored_train":
            self.samples["test"] = guard.mirrored(self.samples["train"])
        self.samples["predict"] = self.samples["test"]
        guard.refuse_generated(self.samples)

    def _guard(self) -> None:
        """Looks for near-duplicates across the splits; on one process where the outcome only warns."""
        if self.leakage == "off" or (self.leakage == "warn" and self._rank()[0] > 0):
            return
        used = [sample for split in ("train", "val", "test") for sample in self.samples[split]]
        self.leaks = guard.leaks_between(used, self._inspect(), self.cache_dir)
        guard.judge(self.leaks, used, refuse=self.leakage == "error", by_design=self.test == "mirrored_train")

    def _of(self, split: str) -> list[Sample]:
        if split not in self.samples:
            raise DataError(f"there is no {split} split before setup.")
        if not self.samples[split]:
            remedy = {
                "train": "check what stands in the data set's own train split, or in data.split_file",
                "val": "set data.val_fraction or data.split_file",
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
            self._stores = self._open(self._inspect(), self.cache)
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
