"""The base of all data modules: inspection, splits, leak guard, cache and loaders, whatever the layout.

A subclass says which samples there are (`find_samples`) and what the classes are called; the order of
events is always the same, on every process with the same outcome:

    find_samples -> check (inspection) -> groups -> split -> leak guard -> loaders

A batch is a dict: `image` (B, 3, H, W) uint8 · `mask` (B, 1, H, W) uint8 {0, 1} when asked for · `label` and
`index` (B,) int64 · `path`, `name`, `category`, `defect_type`, `group`, `source`, lists of B strings.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lit_defect.data import guard
from lit_defect.data.images import Array
from lit_defect.data.inspection import CheckResult, Problem, check, list_pictures, summary
from lit_defect.data.leakage import Leak
from lit_defect.data.loading import Batch, BatchLoader, DefectDataset, EvalBatchSampler, TrainBatchSampler
from lit_defect.data.samples import SPLITS, Sample
from lit_defect.data.splits import assign_splits, read_groups, read_split, write_split
from lit_defect.data.stores import Stores, open_stores
from lit_defect.errors import DataError, UserError


class DefectDataModule(LightningDataModule, ABC):
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
        group_file: CSV `path,group`; samples of one group (one physical part) stay in one split.
        test: `mirrored_train` tests on the mirrored training samples, a leak by design that some papers
            report; to compare with them only.
        sampler: `balanced` draws all classes equally often.
        drop_last: leave out of an epoch what does not fill the last batch.
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
        self.group_file = Path(group_file).expanduser() if group_file else None
        self.test = test
        self.sampler = sampler
        self.drop_last = drop_last
        self.leakage = leakage
        self.on_bad_file = on_bad_file
        self.on_wrong_mode = on_wrong_mode
        self.predict_root = Path(predict_root).expanduser() if predict_root else None
        self._check_settings()

        self.serve_images = True
        self.samples: dict[str, list[Sample]] = {}
        self.leaks: list[Leak] = []
        self.layout_problems: list[Problem] = []  # found by find_samples, such as a mask without image
        self._checked: CheckResult | None = None  # of the data set
        self._divided: list[Sample] = []  # the same samples with their splits, unused ones too
        self._stores: Stores | None = None
        self._to_predict: CheckResult | None = None

    # ---- what a layout provides -------------------------------------------------------------------------

    @abstractmethod
    def find_samples(self) -> list[Sample]:
        """All samples of the data set; `split` is set where the layout prescribes one."""

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """Names of the labels 0, 1, ...; known after `setup` at the latest."""

    @property
    def normal_class(self) -> int | None:
        """Label of the good class, or None if there is none."""
        return None

    @property
    def needed_classes(self) -> list[str]:
        """Classes without which the data set is refused."""
        return self.class_names

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

    def prepare_mask(self, values: Array, sample: Sample) -> npt.NDArray[Any]:
        """The mask in the batch, made of the stored values (H, W): here (1, H, W) uint8, 1 where not 0."""
        return (values > 0)[None].astype(np.uint8)

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
                groups = [sample.group for sample in self._divided]
                guard.write_proposed_groups(folder / "groups.csv", self._checked, groups, self.cache_dir)

    # ---- inside -------------------------------------------------------------------------------------------

    def _check_settings(self) -> None:
        hints = {
            k: v
            for c in reversed(type(self).__mro__)
            if issubclass(c, DefectDataModule)
            for k, v in get_type_hints(c.__init__).items()
        }
        for key, value in self.hparams.items():  # the command line has checked this already, Python has not
            if get_origin(hints.get(key)) is Literal and value not in get_args(hints[key]):
                raise UserError(f"data.{key} is {value!r}; expected {' or '.join(map(repr, get_args(hints[key])))}.")
        for key, value in (("batch_size", self.batch_size), ("eval_batch_size", self.eval_batch_size)):
            if value < 1:
                raise UserError(f"data.{key} is {value}; expected at least 1.")
        if self.image_size is not None and (len(self.image_size) != 2 or min(self.image_size) < 1):
            raise UserError(f"data.image_size is {self.image_size}; expected a side or [height, width] in pixels.")
        if self.split_file and (self.folds is not None or self.shots is not None):
            raise UserError("data.split_file says who trains and tests: leave data.folds and data.shots out.")
        if self.num_workers < 0:
            raise UserError(f"data.num_workers is {self.num_workers}; expected 0 or more.")
        if self.test == "mirrored_train" and self.leakage == "error":
            raise UserError(
                "data.test=mirrored_train tests on the training pictures, which data.leakage=error forbids. "
                "Set data.test=holdout, or data.leakage=warn to repeat that protocol."
            )

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
        samples = self._inspect().samples
        if self.group_file:
            samples = read_groups(self.group_file, samples)
        if self.split_file:
            self._divided = read_split(self.split_file, samples)
        else:
            self._divided = self.assign(samples)
        self.samples = {split: [s for s in self._divided if s.split == split] for split in SPLITS}
        if self.test == "mirrored_train":
            rank_zero_warn(
                "data.test=mirrored_train: the test pictures are the mirrored training pictures. The result "
                "says how well the model remembers, not how well it judges new parts."
            )
            self.samples["test"] = guard.mirrored(self.samples["train"])
        self.samples["predict"] = self.samples["test"]
        guard.refuse_generated(self.samples)

    def _guard(self) -> None:
        """Looks for near-duplicates across the splits; on one process where the outcome only warns."""
        if self.leakage == "off" or (self.leakage == "warn" and self._rank()[0] > 0):
            return
        used = [sample for split in ("train", "val", "test") for sample in self.samples[split]]
        self.leaks = guard.leaks_between(used, self._inspect(), self.cache_dir)
        if self.leaks and self.leakage == "error":
            raise DataError(
                f"{guard.warning(self.leaks, used)} Run once with data.leakage=warn and give the groups.csv of "
                "that run as data.group_file; pictures of one group stay in one split."
            )
        if self.leaks:
            remedy = "; its groups.csv as data.group_file keeps them together" if self.test == "holdout" else ""
            rank_zero_warn(f"{guard.warning(self.leaks, used)} See leakage.csv and leakage.png of this run{remedy}.")

    def _of(self, split: str) -> list[Sample]:
        if split not in self.samples:
            raise DataError(f"there is no {split} split before setup.")
        if not self.samples[split]:
            remedy = {
                "train": "check what stands in the data set's own train split, or in data.split_file",
                "val": "set data.val_fraction or data.split_file",
            }.get(split, "set data.test_fraction or data.split_file")
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
