"""What an editing puts into the pipeline: pictures, masks, frames, prompts, references."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_defect.editing.captioner import Captioner
from lit_defect.editing.content import blurred
from lit_defect.editing.frames import Frame
from lit_defect.editing.options import KEY, NO_MASK, Edit
from lit_defect.editing.prompts import Prompts
from lit_defect.errors import DataError, UserError
from lit_defect.generation.files import Bools, Picture, contents, read_picture
from lit_defect.generation.foreground import Foreground
from lit_defect.generation.judgement import stands_out
from lit_defect.generation.mask_rules import MaskRules
from lit_defect.generation.mask_sources import AugmentedMasks, Drawn, MaskSource, rules_of
from lit_defect.generation.placed_masks import OwnMasks, PlacedMasks, RandomMasks, read_placed
from lit_defect.tasks.editing_plan import EditJob

_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
_MASK, _PROMPT, _REFERENCE = 1, 3, 4  # every kind of draw of a job has its own random stream


class Ready(NamedTuple):
    """A job with everything that its candidates share.

    Attributes:
        picture: (H, W, 3) uint8, the source.
        own: (H, W) what the source's own mask marks; None where the data set is used without masks.
        mask: (H, W) where it is edited.
        drawn: where the mask came from; None for no mask.
        frame: the part that goes through the network.
        pixels: (3, h, w) in [0, 1], that part.
        prompt: in words.
        reference: (3, h, w) in [0, 1], what is followed; None in most modes.
    """

    job: EditJob
    picture: Picture
    own: Bools | None
    mask: Bools
    drawn: Drawn | None
    frame: Frame
    pixels: Tensor
    prompt: str
    reference: Tensor | None


class EditInputs:
    """Prepares the jobs of an editing.

    Args:
        task: a `StableDiffusionEditor` on its device.
        sources: split of the data module that holds the pictures to edit.
        pairs: category and type of what comes out.
        multiple: of what the sides of a frame must be multiples.

    Raises:
        UserError, DataError: masks or references that are not there.
    """

    def __init__(self, task: Any, sources: str, pairs: Iterable[tuple[str, str]], multiple: int) -> None:
        self.task, self.data, self.sources, self.multiple = task, task.data, sources, multiple
        self.edit: Edit = task.edit
        self.prompts = Prompts(self.edit.prompt)
        self.captioner = Captioner(self.edit.captioner, task.device) if self._captions() else None
        self.foreground = Foreground(self.edit.foreground, f"{KEY}.foreground")
        self.followed: set[tuple[str, str]] = set()  # name and group of the data set's pictures in what is named
        self.masks = self._mask_source(set(pairs))
        self.references = self._references()

    def prepare(self, job: EditJob) -> Ready:
        """Everything that the candidates of a job share.

        Raises:
            DataError: this picture, its mask or its object's mask does not do; others may.
        """
        sample = self.data.samples[self.sources][job.source]
        picture, values = self.data.original(self.sources, job.source)
        own = None if values is None else np.asarray(values > 0)
        mask, drawn = self._mask(job, sample, picture)
        frame = self.frame(picture, mask if drawn else None)
        caption = self.captioner.caption([picture])[0] if self.captioner else ""
        prompt = self.prompts.of(*job.pair, np.random.default_rng([*job.seed, _PROMPT]), caption)
        pixels = torch.from_numpy(frame.cut(picture)).permute(2, 0, 1)
        return Ready(job, picture, own, mask, drawn, frame, pixels, prompt, self._reference(job, frame))

    def _mask(self, job: EditJob, sample: Any, picture: Picture) -> tuple[Bools, Drawn | None]:
        """Where a picture is edited, all of it where there is no mask."""
        if self.masks is None:
            return np.ones(picture.shape[:2], dtype=np.bool_), None
        rng = np.random.default_rng([*job.seed, _MASK])
        placed = isinstance(self.masks, MaskSource | RandomMasks)  # the others lie where somebody put them
        area = self.foreground.of(sample.name, picture) if placed else np.ones(picture.shape[:2], dtype=np.bool_)
        drawn = self.masks.draw_for(sample.name, job.pair, rng, area)
        return drawn.mask, drawn

    def frame(self, picture: Picture, mask: Bools | None) -> Frame:
        """What of a picture with a mask goes through the network; the box is that of the blurred mask."""
        edit = self.edit
        return Frame.of(
            picture.shape[:2],
            None if mask is None else blurred(mask, edit.mask_blur) > 0,
            area=edit.area,
            padding=edit.padding,
            size=edit.size,
            multiple=self.multiple,
            stretch=edit.stretch,
        )

    def _reference(self, job: EditJob, frame: Frame) -> Tensor | None:
        """(3, h, w) in [0, 1]: one of those to follow, of its defect where only the mask's box is looked at."""
        if self.references is None:
            return None
        choice = self.references.get("" if "" in self.references else job.pair[0])
        if not choice:
            raise UserError(f"{KEY}.references = {self.edit.references}: none of {job.pair[0]} trains")
        one = choice[int(np.random.default_rng([*job.seed, _REFERENCE]).integers(len(choice)))]
        picture, values = one if "" in self.references else self.data.original(*one)
        marked = values is not None and (values > 0).any() and self.edit.area == "only_masked"
        part = Frame.of(
            picture.shape[:2],
            values > 0 if marked else None,
            area="only_masked" if marked else "whole",
            padding=self.edit.padding,
            size=frame.padded,
            multiple=self.multiple,
            stretch=self.edit.stretch,
        )
        return torch.from_numpy(part.cut(picture)).permute(2, 0, 1)

    def _captions(self) -> bool:
        """Whether pictures are described."""
        wanted, captioner = self.prompts.needs_caption, self.edit.captioner
        if wanted and captioner is None:
            raise UserError(f"{KEY}.prompt has a {{caption}}: name a model that makes one by {KEY}.captioner")
        if captioner is not None and not wanted:
            raise UserError(
                f"{KEY}.captioner = {captioner}: no {KEY}.prompt has a {{caption}} for its words; write one, or leave "
                "the captioner out"
            )
        return wanted

    def _mask_source(self, pairs: set[tuple[str, str]]) -> PlacedMasks | None:
        """What draws masks; None where there are none."""
        named = self.edit.masks
        if named == NO_MASK:
            return None
        if named in ("own", "augmented") and not self.data.with_masks:
            raise UserError(f"{KEY}.masks = {named}: this data set is used without masks (data.init_args.with_masks)")
        if named == "own":
            places = {sample.name: i for i, sample in enumerate(self.data.samples[self.sources])}
            return OwnMasks(lambda name: self._own_mask(self.sources, places[name]))
        if named == "random":
            return RandomMasks(self.edit.mask_area)
        if named == "augmented":
            masks = {pair: self._real_masks(pair) for pair in pairs}
            return AugmentedMasks(masks, rules_of(masks))
        path = Path(named).expanduser()
        if path.is_dir():
            self.followed |= self.data.learnt_from(path, f"{KEY}.masks")
        names = {sample.name for sample in self.data.samples[self.sources]}
        return read_placed(path, names, pairs, self.mask_rules(pairs), self.edit.mask_threshold)

    def _real_masks(self, pair: tuple[str, str]) -> list[tuple[str, Bools]]:
        """Of the real training defects of a category and type; none where the data set is used without masks."""
        defects = self.defects(pair) if self.data.with_masks else []
        found = [(sample.name, self._own_mask("train", position)) for position, sample in defects]
        return [(name, mask) for name, mask in found if mask is not None and mask.any()]

    def defects(self, pair: tuple[str, str]) -> list[tuple[int, Any]]:
        """Positions and samples of the real training pictures of a category and type."""
        return [
            (position, sample)
            for position, sample in enumerate(self.data.samples["train"])
            if (sample.category, sample.defect_type, sample.source) == (*pair, "real")
        ]

    def mask_rules(self, pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], MaskRules]:
        """Of each category and type that has two real training masks, but for those of all of a picture."""
        masks = {pair: [(name, mask) for name, mask in self._real_masks(pair) if not mask.all()] for pair in pairs}
        return rules_of({pair: found for pair, found in masks.items() if len(found) > 1})

    def contrasts(self, pair: tuple[str, str]) -> list[float]:
        """How the real training defects of a category and type stand out, in grey levels; none without masks."""
        if not self.data.with_masks:
            return []
        found = []
        for position, _ in self.defects(pair):
            picture, values = self.data.original("train", position)
            if values is not None and values.any():
                found.append(stands_out(picture, values > 0))
        return found

    def _own_mask(self, split: str, position: int) -> Bools | None:
        _, values = self.data.original(split, position)
        return None if values is None else np.asarray(values > 0)

    def _references(self) -> dict[str, list[Any]] | None:
        """Pictures to follow with their masks, by category; by "" those of a folder."""
        if self.task.mode not in ("reference_only", "ip_adapter"):
            return None
        named = str(self.edit.references)
        found = defaultdict(list)
        for position, sample in enumerate(self.data.samples["train"]):
            if sample.defect_type == named and sample.source == "real":
                found[sample.category].append(("train", position))
                self.followed.add((sample.name, sample.group))
        if found:
            return dict(found)
        folder = Path(named).expanduser()
        if not folder.is_dir():
            kinds = sorted({sample.defect_type for sample in self.data.samples["train"]})
            raise UserError(f"{KEY}.references = {named}: no type that trains, and no folder: {', '.join(kinds)}")
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _PICTURES and path.name[0] != ".")
        if not files:
            raise DataError(f"{folder} has no pictures to follow ({KEY}.references)")
        self.followed |= self.data.learnt_from(folder, f"{KEY}.references", files)
        return {"": [(read_picture(path), None) for path in files]}

    def looks(self, pairs: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
        """Name and group of every training picture whose look or mask goes into others, or is compared with them."""
        compared = pairs if self.data.with_masks else ()
        looks = {(sample.name, sample.group) for pair in compared for _, sample in self.defects(pair)}
        return looks | self.followed | (self.masks.learnt_from if self.masks else set())

    def files(self) -> dict[str, str]:
        """What the files and folders hold that the options name, by option: other contents make other pictures."""
        edit = self.edit
        named = {"masks": edit.masks, "foreground": edit.foreground, "captioner": edit.captioner}
        if self.references and "" in self.references:
            named["references"] = edit.references
        words = ("none", "own", "random", "augmented", "auto", "all", None)
        paths = {key: Path(value).expanduser() for key, value in named.items() if value not in words and value}
        return {key: contents(path) for key, path in paths.items() if path.exists()}

    def listed(self) -> str:
        """What is edited: the numbers of a set that is gone on with must mean the same pictures."""
        names = [(sample.name, sample.defect_type) for sample in self.data.samples[self.sources]]
        return f"{len(names)} pictures of {hashlib.sha256(repr(names).encode()).hexdigest()[:16]}"
