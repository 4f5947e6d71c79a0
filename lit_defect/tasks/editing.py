"""Editing without training: a ready diffusion model makes defects on normal pictures, or variants of pictures.

The functions that Chowa Giken tried on hazelnuts (img2img, inpainting, instruct-pix2pix, image variation, reference
only), IP-Adapter as the maintained successor of the last, and the augmentation of Zheng & Nagata, over diffusers'
pipelines. What their users did by hand is done here: masks, crops at a size at which small defects are possible, the
choice among several draws by a written rule, and paste-back, so that outside its mask a picture is the original one to
the last bit. `predict` writes a data set with a manifest, which `data.synthetic` of every data module takes. Of the
pictures of `data.predict_root` nobody knows whether they show parts that test, so keep such out of that folder; the
data module's search for near-duplicates (`data.leakage`) compares what was made of them with the test, too.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lit_defect.editing.options import KEY, Edit, Mode, Network
from lit_defect.editing.pipelines import Opened, open_pipeline
from lit_defect.errors import UserError
from lit_defect.generation.placed_masks import strange_masks, with_masks
from lit_defect.generation.store import count
from lit_defect.tasks.base import Batch
from lit_defect.tasks.edit_making import EditMaking
from lit_defect.tasks.edit_report import write_edited
from lit_defect.tasks.editing_plan import EditJob, plan_edits
from lit_defect.tasks.set_maker import SetMaker

SOURCES = "sources"  # split of the data module that holds the pictures to be edited


class StableDiffusionEditor(SetMaker):
    """Edits the training pictures of a data module, or pictures of one's own, with a pipeline of diffusers.

    Args:
        base: hub name, folder of a pipeline, or run of a `LatentDiffusion`.
        mode: `img2img`, `inpaint`, `instruct_pix2pix`, `variation`, `reference_only` or `ip_adapter`.
        edit: what of a picture is edited, and how.
        network: how the pipeline is opened.

    Raises:
        UserError: options that contradict each other.
    """

    verbs = ("predict",)
    judged_by = "what it makes (python -m lit_defect.quality)"
    learns = False
    folder = "edited"
    counted_by = f"{KEY}.count"

    def __init__(
        self, base: str, mode: Mode = "inpaint", edit: Edit | None = None, network: Network | None = None
    ) -> None:
        super().__init__(monitor=None)
        self.base_source = base
        self.mode: Mode = mode
        self.edit = edit or Edit()
        self.network = network or Network()
        self.groups: list[list[EditJob]] = []
        self._making: EditMaking | None = None
        if mode in ("reference_only", "ip_adapter") and self.edit.references is None:
            raise UserError(f"{KEY}.references is missing: {mode} needs pictures to follow, a type or a folder")
        if mode == "inpaint" and self.edit.masks == "none":
            raise UserError(f"{KEY}.masks = none: inpainting needs masks; or set model.init_args.mode to img2img")

    @property
    def output(self) -> str | None:
        """As the options say."""
        return self.edit.output

    @property
    def title(self) -> str:
        """What the start-up screen calls it."""
        number = sum(map(len, self.groups))
        return f"StableDiffusionEditor, {self.mode} of {number} pictures by {self.base_source}"

    def setup(self, stage: str) -> None:
        """Find the pictures to edit, and serve their groups in place of a split.

        Raises:
            UserError: no such pictures, or a split that is not taken.
        """
        super().setup(stage)
        data = self.data
        if data is None:
            raise UserError("StableDiffusionEditor edits the pictures of a data module: pass datamodule=")
        if data.predict_root is None and data.predict_split != "test":  # the default, of tasks that look at pictures
            raise UserError(
                f"data.predict_split = {data.predict_split}: StableDiffusionEditor edits training pictures, as what it "
                "makes may only train; leave it out, or name other pictures by data.predict_root"
            )
        chosen = self._masked(self._chosen())
        if data.predict_root is not None:
            data.setup("fit")  # real defects, whose looks and masks are followed
            self._check_foreign(chosen)
        data.serve_places(**{SOURCES: chosen})
        self.plan_groups()

    def open(self) -> Opened:
        """The pipeline with what is put on top of it, on the device of the task.

        Raises:
            UserError: it cannot be had, or does not fit the mode.
        """
        return open_pipeline(self.base_source, self.mode, self.network, self.device, str(self.trainer.precision))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """It has none: Lightning, which comes before `setup`, would refuse in words of its own."""
        raise NotImplementedError

    def _chosen(self) -> list[Any]:
        """The pictures to edit, of training or of `predict_root`."""
        data, wanted = self.data, self.edit.sources
        if data.predict_root is not None:
            if wanted is not None:
                raise UserError(f"{KEY}.sources names types, which the pictures of data.predict_root do not have")
            if self.edit.result is None:
                raise UserError(f"{KEY}.result is missing: of what type will the pictures of data.predict_root be?")
            return list(data.samples["predict"])
        train = [sample for sample in data.samples["train"] if sample.source == "real"]
        if wanted is None:
            chosen = [sample for sample in train if sample.label == data.normal_class]
            if not chosen:
                raise UserError(f"there are no normal training pictures to edit: name types by {KEY}.sources")
            return chosen
        kinds = sorted({sample.defect_type for sample in train})
        for kind in wanted:
            if kind not in kinds:
                near = difflib.get_close_matches(kind, kinds, 1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise UserError(f"{KEY}.sources: no {kind!r} trains; there are {', '.join(kinds)}.{hint}")
        return [sample for sample in train if sample.defect_type in wanted]

    def _masked(self, chosen: list[Any]) -> list[Any]:
        """Those that have a mask, where masks are of single pictures."""
        named = self.edit.masks
        if named in ("none", "random", "augmented"):
            return chosen
        path = Path(named).expanduser()
        if named == "own":
            there = {sample.name for sample in chosen if sample.mask}
            if self.data.with_masks and not there:
                raise UserError(
                    f"{KEY}.masks = own: none of the {len(chosen)} pictures to edit has a mask of its own; edit types "
                    "of defects, or take other masks"
                )
        elif path.exists():
            there = with_masks(path, [sample.name for sample in chosen])
            self._warn_of_strays(path, [sample.name for sample in chosen])
        else:
            raise UserError(
                f"{KEY}.masks = {named}: there is no such folder of masks or list of boxes; correct the path, or "
                "choose one of none, own, random, augmented"
            )
        if there and len(there) < len(chosen):
            rank_zero_warn(
                f"{KEY}.masks = {named}: {len(chosen) - len(there)} of {len(chosen)} pictures have no mask there and "
                "are not edited"
            )
        return [sample for sample in chosen if sample.name in there] or chosen

    def _warn_of_strays(self, path: Path, chosen: list[str]) -> None:
        """Name the masks and boxes that belong to no picture, such as those whose path has a slip in it."""
        known = {*chosen, *(sample.name for split in ("train", "val", "test") for sample in self.data.samples[split])}
        if strays := strange_masks(path, known):
            near = difflib.get_close_matches(strays[0], sorted(known), 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            rank_zero_warn(
                f"{KEY}.masks = {path}: it has masks for {len(strays)} pictures that are not in the data set, such as "
                f"{strays[0]}.{hint}"
            )

    def _check_foreign(self, chosen: list[Any]) -> None:
        """Refuse pictures of the data set: what is made of those that are evaluated must not pass for foreign."""
        if own := self.data.samples_of(Path(sample.path) for sample in chosen):
            raise UserError(
                f"data.predict_root: {own[0].name} is a picture of the data set itself; leave predict_root out to edit "
                "training pictures, or name a folder of others"
            )

    def _identity(self, sample: Any) -> tuple[str, str]:
        """Category and type of a picture; those of `predict_root` are normal ones of the only category there is.

        Raises:
            UserError: there are several.
        """
        data = self.data
        if data.predict_root is None:
            return sample.category, sample.defect_type
        categories = sorted({s.category for s in data.samples["train"]})
        if len(categories) > 1:
            raise UserError(
                f"data.predict_root: are these pictures of {' or '.join(categories)}? Set data.category to theirs"
            )
        return categories[0], data.class_names[data.normal_class]

    def plan_groups(self) -> None:
        """The jobs in groups that go through the network together."""
        samples, edit = self.data.samples[SOURCES], self.edit
        results = [edit.result] if isinstance(edit.result, str) else edit.result
        jobs = plan_edits([self._identity(sample) for sample in samples], results, edit.count_of, self.seed)
        for kind in {job.kind for job in jobs}:
            edit.strength_of(kind)
        self.groups = [jobs[i : i + edit.batch] for i in range(0, len(jobs), edit.batch)]
        self.groups += [[]] * (self.trainer.world_size - len(self.groups))  # no process may be without one
        # One sample stands for a group: the loader gives each process its share of them.
        self.data.samples["predict"] = [samples[group[0].source if group else 0] for group in self.groups]

    def on_predict_start(self) -> None:
        """Open the pipeline and the data set; what is there already is not made again."""
        with self.beginning():
            pairs = {job.pair for group in self.groups for job in group}
            self._making = EditMaking(self, SOURCES, pairs, self.trainer.global_rank)
        self._store = self._making.store

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Make some groups of pictures; their numbers."""
        assert self._making is not None
        for group in batch["index"].tolist():
            self._making.make(self.groups[group])
        groups: Tensor = batch["index"]
        return groups

    def on_predict_epoch_end(self) -> None:
        """Join what the processes have written; what could not be edited is written down first."""
        assert self._making is not None
        self.trainer.strategy.barrier("all is tried")
        self._making.finish()
        super().on_predict_epoch_end()

    def write_results(self, folder: Path, stage: str) -> None:
        """Counts and contact sheets; rank 0 only."""
        rows = self._store.merge()
        write_edited(self, SOURCES, self.root, rows, count(rows), folder)
