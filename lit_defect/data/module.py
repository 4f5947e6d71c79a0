"""The base of all data modules: inspection, splits, leak guard, cache and loaders, whatever the layout.

A subclass says which samples there are (`find_samples`) and what the classes are called; the order of
events is always the same, on every process with the same outcome:

    find_samples -> check (inspection) -> groups -> split -> leak guard -> loaders

A batch is a dict: `image` (B, 3, H, W) uint8 · `mask` (B, 1, H, W) uint8 {0, 1} when asked for · `label` and
`index` (B,) int64 · `path`, `name`, `category`, `defect_type`, `group`, `source`, lists of B strings.
"""

from __future__ import annotations

import csv
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_defect.data.cache import MaskReader, PictureReader, PixelStore, Read, Shape, disk_store, ram_store
from lit_defect.data.images import SUFFIXES, Array, read_image
from lit_defect.data.inspection import CheckResult, Problem, check, digest
from lit_defect.data.leakage import ORIENTATIONS, Leak, find_leaks, leak_picture, propose_groups
from lit_defect.data.loading import BatchLoader, DefectDataset, EvalBatchSampler, TrainBatchSampler
from lit_defect.data.samples import REAL, SPLITS, Sample
from lit_defect.data.splits import assign_splits, read_groups, read_split, write_groups, write_split
from lit_defect.errors import DataError, UserError

MIRRORED = "#mirrored"  # ends the names of the copies that `test="mirrored_train"` makes


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
        serve_images: set to False (before the loaders are made) by a task that needs identity and labels
            only; nothing is decoded then.
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
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.num_workers = num_workers
        self.cache = cache
        self.cache_dir = Path(cache_dir or os.environ.get("LIT_DEFECT_CACHE") or "~/.cache/lit_defect").expanduser()
        self.with_masks = with_masks
        self.seed = seed
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.folds = folds
        self.fold = fold
        self.shots = shots
        self.split_file = split_file
        self.group_file = group_file
        self.test = test
        self.sampler = sampler
        self.drop_last = drop_last
        self.leakage = leakage
        self.on_bad_file = on_bad_file
        self.on_wrong_mode = on_wrong_mode
        self.predict_root = predict_root
        self._check_settings()

        self.serve_images = True
        self.samples: dict[str, list[Sample]] = {}
        self.leaks: list[Leak] = []
        self.layout_problems: list[Problem] = []  # find_samples adds what it finds, such as a mask without image
        self._checked: CheckResult | None = None  # of the data set
        self._divided: list[Sample] = []  # the same samples with their splits, unused ones too
        self._stores: _Stores | None = None
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
        """(H, W) stored mask values -> the mask in the batch; here (1, H, W) uint8, 1 where a value is not 0."""
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
            self._to_predict = self._inspect_new_pictures(self.predict_root)
            self.samples["predict"] = self._to_predict.samples
        elif not self._divided:
            self._divide()
            self._guard()

    def train_dataloader(self) -> BatchLoader:
        """Shuffled (or balanced) batches; a resumed Trainer continues where it stopped, also within an epoch."""
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
            fixed=self.trainer is not None and self.trainer.overfit_batches > 0,
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

    # ---- for tasks, callbacks and the command line --------------------------------------------------------

    def loader(self, split: str, *, batch_size: int | None = None) -> BatchLoader:
        """Every sample of a split once, in their order; under several processes, each its share.

        Raises:
            DataError: the split is empty, or has fewer samples than there are processes.
        """
        samples = self._of(split)
        rank, world_size = self._rank()
        size = batch_size or self.eval_batch_size
        return self._loader(split, EvalBatchSampler(len(samples), batch_size=size, rank=rank, world_size=world_size))

    def counts(self) -> dict[str, dict[str, int]]:
        """split -> class name -> number of samples, for the splits that have any."""
        table = {}
        for split, samples in self.samples.items():
            labels = Counter(sample.label for sample in samples)
            if samples and set(labels) != {-1}:
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
            _write_csv(folder / "skipped.csv", Problem._fields, skipped)
        if self.leaks:
            fields = tuple(Leak.__slots__)
            _write_csv(folder / "leakage.csv", fields, [[getattr(leak, f) for f in fields] for leak in self.leaks])
            by_name = {sample.name: sample for samples in self.samples.values() for sample in samples}
            leak_picture(self.leaks, lambda name: self._read(by_name[name])).save(folder / "leakage.png")
        if self.leaks and self._checked and self.test == "holdout":
            names = [sample.name for sample in self._divided]
            groups = propose_groups(self._checked.codes, names, [sample.group for sample in self._divided])
            write_groups(folder / "groups.csv", names, groups)

    # ---- inside -------------------------------------------------------------------------------------------

    def _check_settings(self) -> None:
        for key, value in (("batch_size", self.batch_size), ("eval_batch_size", self.eval_batch_size)):
            if value < 1:
                raise UserError(f"data.{key} is {value}; expected at least 1.")
        if self.image_size is not None and min(self.image_size) < 1:
            raise UserError(f"data.image_size is {self.image_size}; expected at least 1 pixel.")
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
            self._checked = check(
                samples,
                class_names=self.needed_classes,
                normal_class=self.normal_class,
                with_masks=self.with_masks,
                problems=self.layout_problems,
                on_bad_file=self.on_bad_file,
                on_wrong_mode=self.on_wrong_mode,
                cache_dir=self.cache_dir,
            )
            self._warn_of_skipped(self._checked)
        return self._checked

    def _inspect_new_pictures(self, root: str) -> CheckResult:
        folder = Path(root).absolute()
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not paths:
            raise DataError(f"data.predict_root: no pictures ({' '.join(sorted(SUFFIXES))}) in {folder}.")
        samples = [Sample(path=str(p), name=p.relative_to(folder).as_posix(), label=-1, split="predict") for p in paths]
        checked = check(
            samples, on_bad_file=self.on_bad_file, on_wrong_mode=self.on_wrong_mode, cache_dir=self.cache_dir
        )
        self._warn_of_skipped(checked)
        return checked

    def _warn_of_skipped(self, checked: CheckResult) -> None:
        if checked.problems:
            kinds = ", ".join(f"{kind} {n}" for kind, n in Counter(p.kind for p in checked.problems).most_common())
            rank_zero_warn(f"{len(checked.problems)} files are left out ({kinds}); see skipped.csv.")

    def _divide(self) -> None:
        samples = self._inspect().samples
        if self.group_file:
            samples = read_groups(Path(self.group_file), samples)
        self._divided = read_split(Path(self.split_file), samples) if self.split_file else self.assign(samples)
        self.samples = {split: [s for s in self._divided if s.split == split] for split in SPLITS}
        if self.test == "mirrored_train":
            rank_zero_warn(
                "data.test=mirrored_train: the test pictures are the mirrored training pictures. The result says "
                "how well the model remembers, not how well it judges new parts."
            )
            self.samples["test"] = [
                replace(s, mirror=not s.mirror, name=s.name + MIRRORED, split="test") for s in self.samples["train"]
            ]
        self.samples["predict"] = self.samples["test"]
        for split in ("val", "test"):
            made = [s.name for s in self.samples[split] if s.source != REAL]
            if made:
                raise DataError(
                    f"{len(made)} generated pictures are in the {split} split, such as {made[0]}. "
                    "Generated pictures may only train; give their split as train."
                )

    def _guard(self) -> None:
        """Looks for near-duplicates across the splits, where the outcome matters."""
        if self.leakage == "off" or (self.leakage == "warn" and self._rank()[0] > 0):
            return
        checked = self._inspect()
        row = {(s.path, s.box): i for i, s in enumerate(checked.samples)}
        used = [s for split in ("train", "val", "test") for s in self.samples[split]]
        index, sign = ORIENTATIONS["mirrored"]
        straight = [checked.codes[row[s.path, s.box]] for s in used]
        codes = [code[index] * sign if s.mirror else code for code, s in zip(straight, used, strict=True)]
        self.leaks = find_leaks(
            np.array(codes), [s.name for s in used], [s.split for s in used], [s.group for s in used]
        )
        if not self.leaks:
            return
        first = self.leaks[0]
        text = (
            f"{len(self.leaks)} pairs of near-duplicate pictures stand in different splits, such as {first.name_a} "
            f"({first.split_a}) and {first.name_b} ({first.split_b}), {first.orientation}, distance "
            f"{first.distance:.2f}. A result on such a split is too good. "
        )
        if self.leakage == "error":
            raise DataError(
                text + "Run once with data.leakage=warn and give the groups.csv of that run as data.group_file; "
                "pictures of one group stay in one split."
            )
        rank_zero_warn(
            text + "See leakage.csv and leakage.png; with groups.csv as data.group_file they stay in one split."
        )

    def _of(self, split: str) -> list[Sample]:
        if not self.samples.get(split):
            raise DataError(f"the {split} split has no samples (has `setup` been called?).")
        return self.samples[split]

    def _rank(self) -> tuple[int, int]:
        """This process's number and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _batches_done(self) -> int:
        """How many batches of the current epoch the Trainer has behind it."""
        if self.trainer is None or not self.trainer.training:
            return 0
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def _loader(self, split: str, order: TrainBatchSampler | EvalBatchSampler, **kwargs: Any) -> BatchLoader:
        samples = self.samples[split]
        if not self.serve_images:
            return BatchLoader(DefectDataset(samples), order, **kwargs)
        new = split == "predict" and self._to_predict is not None
        stores = _Stores(self, self._to_predict, "off") if new and self._to_predict else self._open_stores()
        dataset = DefectDataset(
            samples,
            rows=[stores.row[sample.path, sample.box] for sample in samples],
            images=stores.images,
            masks=None if new else stores.masks,
            prepare_mask=self.prepare_mask,
        )
        workers = self.num_workers if self.cache == "off" or new else 0
        return BatchLoader(dataset, order, num_workers=workers, pin_memory=torch.cuda.is_available(), **kwargs)

    def _open_stores(self) -> _Stores:
        if self._stores is None:
            self._stores = _Stores(self, self._inspect(), self.cache)
        return self._stores

    def _read(self, sample: Sample) -> Array:
        return read_image(
            sample.path, box=sample.box, mirror=sample.mirror, convert=self.on_wrong_mode == "convert"
        )


class _Stores:
    """Where the pixels of a checked data set come from; a row for each (path, box)."""

    def __init__(self, module: DefectDataModule, checked: CheckResult, cache: str) -> None:
        first = {(s.path, s.box): i for i, s in reversed(list(enumerate(checked.samples)))}
        chosen = sorted(first.values())
        samples = [checked.samples[i] for i in chosen]
        sizes = [module.image_size or checked.shapes[i] for i in chosen]
        channels = 1 if all(checked.grey) else 3
        self.row = {(s.path, s.box): row for row, s in enumerate(samples)}
        keys = [module.sample_key(sample) for sample in samples]
        copies = module.trainer.num_devices if module.trainer else 1

        def open_store(shapes: Sequence[Shape], read: Read, what: object) -> PixelStore:
            if cache == "disk":
                return disk_store(module.cache_dir / f"pixels-{digest(keys, what).hex()}.u8", shapes, read)
            return ram_store(shapes, read, copies=copies) if cache == "ram" else PixelStore(shapes, read)

        convert = module.on_wrong_mode == "convert"
        read = PictureReader(samples, module.image_size, channels, convert)
        self.images = open_store([(*size, channels) for size in sizes], read, channels)
        self.masks = None
        if module.with_masks:
            stamps = [(s.mask, checked.stamps.get(s.mask or "")) for s in samples]
            self.masks = open_store(sizes, MaskReader(samples, sizes), stamps)


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])
