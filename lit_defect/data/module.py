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
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_defect.data import guard
from lit_defect.data.fingerprint import fingerprint
from lit_defect.data.inspection import CheckResult, Problem, check, joined, list_pictures, summary
from lit_defect.data.known_files import KnownFiles
from lit_defect.data.leakage import Leak
from lit_defect.data.samples import REAL, SPLITS, Sample
from lit_defect.data.serving import Serving
from lit_defect.data.settings import check_choices, check_settings, share_of_step
from lit_defect.data.splits import assign_splits, read_groups, read_split, without_defects, write_groups, write_split
from lit_defect.data.stores import Stores
from lit_defect.data.synthetic import SYNTHETIC_VAL, Choice, Recipe, SyntheticOptions, alone, choose
from lit_defect.errors import UserError

AUTO = "auto"


class DefectDataModule(KnownFiles, Serving):
    """Samples of one data set, checked, split and served in batches.

    Args:
        batch_size: samples per process and training step.
        global_batch_size: samples of an optimizer step over all processes and accumulated gradients, in place of
            `batch_size`: a step then sees the same samples however many devices there are.
        eval_batch_size: samples per process and evaluation step; as `batch_size` when not given.
        image_size: side of a square, or (height, width), in pixels; None keeps the native size.
        num_workers: processes that decode ahead; they are used with `cache=off` only.
        cache: where decoded pictures are kept: nowhere, in each process, or in a file shared by all.
        cache_dir: folder of that file and of what inspection remembers; by default the environment
            variable LIT_DEFECT_CACHE, else ~/.cache/lit_defect.
        with_masks: check the masks and put them into the batches.
        seed: decides the splits and the order of training.
        val_seed: decides in place of `seed` which of the training samples validate, where the layout prescribes no
            validation split; the test split stays the same, so that a search can look at several validation splits
            and sees nothing of the test.
        val_fraction: share of the training samples that validates.
        test_fraction: share of the samples that tests, where the layout prescribes no test split.
        folds: cut the samples into this many parts instead; part `fold` tests.
        fold: which part tests.
        shots: at most this many training samples of each class and type.
        split_file: a `splits.csv` of an earlier run, to repeat its split.
        group_file: CSV `path,group`; samples of one group (one physical part) stay in one split. `auto` takes the
            near-duplicates that the leak guard finds for photographs of one part.
        test: `mirrored_train` tests on the mirrored training samples, a leak by design that some papers
            report; to compare with them only. Its results are called `mirrored_*`, not `test_*`.
        sampler: `balanced` draws all classes equally often.
        drop_last: leave out of a pass over the training samples what does not fill the last batch.
        batches_per_epoch: training steps of an epoch, of passes laid end to end, so that the epochs of a small data
            set are worth counting; by default an epoch is one pass.
        leakage: what to do about near-duplicates in different splits.
        on_bad_file: what to do about files that cannot be used; what is skipped is listed in `skipped.csv`.
        on_wrong_mode: convert 16-bit, transparent, CMYK and turned pictures, or treat them as bad files.
        predict_root: folder with new pictures for `predict`.
        predict_split: what `predict` runs over where there is no `predict_root`; `all` takes the pictures that train,
            validate and test, one after the other.
        synthetic: generated pictures that train, too: the folder of a generated data set, or that `path` with `ratio`,
            `types`, `per_type`, `holdout`, `share` and `alone` (`lit_defect.data.synthetic.SyntheticOptions`). They
            never validate nor test; what is held out is the split "synthetic_val".

    Attributes:
        samples: after `setup`, the samples of each split ("train", "val", "test", "predict"; "synthetic_val" where
            generated pictures are held out).
        serve_images: set to False (before the first batch) by a task that needs identity and labels only;
            nothing is decoded then, until the verb ends.
        leaks: near-duplicates across splits, the closest first.
    """

    def __init__(
        self,
        *,
        batch_size: int = 32,
        global_batch_size: int | None = None,
        eval_batch_size: int | None = None,
        image_size: int | tuple[int, int] | None = None,
        num_workers: int = 0,
        cache: Literal["off", "ram", "disk"] = "ram",
        cache_dir: str | None = None,
        with_masks: bool = False,
        seed: int = 0,
        val_seed: int | None = None,
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
        predict_split: Literal["test", "val", "train", "all"] = "test",
        synthetic: str | SyntheticOptions | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        for key, value in self.hparams.items():
            if isinstance(value, Path):  # a checkpoint that opens with weights_only holds plain types
                self.hparams[key] = str(value)
        if isinstance(synthetic, Mapping):
            self.hparams["synthetic"] = {**synthetic, "path": str(synthetic.get("path", ""))}
        check_choices((c for c in reversed(type(self).__mro__) if issubclass(c, DefectDataModule)), self.hparams)
        self.batch_size = batch_size
        self.global_batch_size = global_batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.num_workers = num_workers
        self.cache = cache
        folder = cache_dir or os.environ.get("LIT_DEFECT_CACHE") or "~/.cache/lit_defect"
        self.cache_dir = Path(folder).expanduser()
        self.with_masks = with_masks
        self.seed = seed
        self.val_seed = val_seed
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
        self.predict_split = predict_split
        self.synthetic = None if synthetic is None else Recipe.of(synthetic)
        check_settings(vars(self))

        self.serve_images = True
        self.samples: dict[str, list[Sample]] = {}
        self.leaks: list[Leak] = []
        self.layout_problems: list[Problem] = []  # found by find_samples, such as a mask without image
        self.unused_normal: set[str] = set()  # names of normal pictures that find_samples has left out
        self._checked: CheckResult | None = None  # of the data set
        self._generated: CheckResult | None = None  # of the generated pictures that are used
        self._choice: Choice | None = None  # how these were chosen
        self._divided: list[Sample] = []  # the data set's samples with their splits, unused ones too
        self._guarded = False
        self._stores: Stores | None = None
        self._to_predict: CheckResult | None = None
        self._own: tuple[int, dict[str, list[Sample]]] | None = None  # batch size and samples while a task has others

    def assign(self, samples: list[Sample]) -> list[Sample]:
        """The samples with their splits: what the layout prescribes, and seeded draws for the rest."""
        return assign_splits(
            samples,
            seed=self.seed,
            val_seed=self.val_seed,
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
        """Splits, the same on every process; `stage` matters only for `predict` with a folder of its own.

        Raises:
            UserError: `global_batch_size` cannot be shared by the processes.
        """
        if self.global_batch_size is not None and self.trainer is not None:
            self.batch_size = share_of_step(
                self.global_batch_size,
                self.trainer.world_size,
                self.trainer.accumulate_grad_batches,
                evenly=stage == TrainerFn.FITTING,
            )
        if self.predict_root and stage == "predict":
            self._to_predict = self._check(list_pictures(self.predict_root))
            self.samples["predict"] = self._to_predict.samples
        elif not self._guarded:
            self._divide()
            self._guard()
            self._guarded = True

    def teardown(self, stage: str) -> None:
        """Go on as before, whatever a task has asked for."""
        self.serve_images = True
        if self._own is not None:
            (self.eval_batch_size, self.samples), self._own = self._own, None

    def on_exception(self, exception: BaseException) -> None:
        """As `teardown`, which Lightning leaves out after an error."""
        self.teardown("")

    # ---- for tasks, callbacks and the command line --------------------------------------------------------

    def serve_places(self, **splits: list[Sample]) -> None:
        """Until the verb ends, have these splits too; serve one sample a batch, without its picture."""
        self._own = (self.eval_batch_size, self.samples)
        self.eval_batch_size, self.samples = 1, {**self.samples, **splits}
        self.serve_images = False

    def counts(self) -> dict[str, dict[str, int]]:
        """Number of samples by split and class name, for the splits that have any.

        "train" counts all that train; "train (synthetic)" those of them that are generated.
        """
        table = {}
        train = self.samples.get("train", [])
        parts = self.samples | {"train (synthetic)": [sample for sample in train if sample.source != REAL]}
        for split in ("train", "train (synthetic)", SYNTHETIC_VAL, "val", "test"):
            labels = Counter(sample.label for sample in parts.get(split, ()))
            if labels:
                table[split] = {name: labels[label] for label, name in enumerate(self.class_names)}
        return table

    def fingerprint(self) -> str:
        """Hash of what is in which split, the same on every machine; see `lit_defect.data.fingerprint`."""
        looked_at = (self._checked, self._generated)
        stamps = {path: stamp for checked in looked_at if checked for path, stamp in checked.stamps.items()}
        splits = {split: self.samples.get(split, ()) for split in ("train", SYNTHETIC_VAL, "val", "test")}
        return fingerprint(splits, lambda path: stamps[path].length if path in stamps else None)

    def write_records(self, folder: Path) -> None:
        """Writes splits.csv, and what was found: leakage.csv, leakage.png, groups.csv, skipped.csv, synthetic.csv.

        `groups.csv` joins the near-duplicates; as `data.group_file` of the next run it keeps them together.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if self._divided:
            write_split(folder / "splits.csv", self._divided)
        if self._choice and self._generated:
            self._choice.write(folder, self._generated.samples)
        looked_at = (self._checked, self._generated, self._to_predict)
        skipped = [problem for checked in looked_at if checked for problem in checked.problems]
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
        if self.synthetic and self.good_only:
            raise UserError(
                "data.synthetic adds defects to the training, and data.setting one_class trains on good pictures only; "
                "leave one of them out."
            )
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

    def _used(self) -> CheckResult:
        checked = self._inspect()
        if self.synthetic is None:
            return checked
        self._divide()  # which generated pictures are used depends on the splits
        return joined(checked, self._generated) if self._generated else checked

    def _divide(self) -> None:
        if self._divided:
            return
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
        if self.synthetic:
            self._add_synthetic(self.synthetic)
        shown = ("train", "val", "test") if self.predict_split == "all" else (self.predict_split,)
        self.samples["predict"] = [sample for split in shown for sample in self.samples[split]]
        guard.refuse_generated(self.samples)

    def _add_synthetic(self, recipe: Recipe) -> None:
        """Generated pictures join those that train, or are a split of their own; the real samples stay as they are."""
        self._choice = choose(
            recipe,
            self._divided,
            label_of=self.label_of,
            normal_class=self.normal_class,
            seed=self.seed,
            by_design=self.test == "mirrored_train",
            unused=self.unused_normal,
        )
        checked = self._check(self._choice.samples, normal_class=self.normal_class, with_masks=self.with_masks)
        self._generated = checked
        if recipe.alone:
            self._divided = alone(self._divided, checked.samples, self.normal_class)
            self.samples["train"] = [s for s in self._divided if s.split == "train"]
        self.samples["train"] += [sample for sample in checked.samples if sample.split == "train"]
        if recipe.holdout:
            self.samples[SYNTHETIC_VAL] = [sample for sample in checked.samples if sample.split == SYNTHETIC_VAL]

    def _guard(self) -> None:
        """Looks for near-duplicates across the splits; on one process where the outcome only warns."""
        if self.leakage == "off" or (self.leakage == "warn" and self._rank()[0] > 0):
            return
        used = [sample for split in ("train", "val", "test") for sample in self.samples[split]]
        self.leaks = guard.leaks_between(used, self._used(), self.cache_dir)
        guard.judge(self.leaks, used, refuse=self.leakage == "error", by_design=self.test == "mirrored_train")
