"""Edits pictures: masks and frames, the pipeline's call, the choice among candidates, paste-back, the data set."""

from __future__ import annotations

import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lit_defect.editing.content import blurred
from lit_defect.editing.options import KEY, NO_MASK, Edit
from lit_defect.editing.pipelines import open_pipeline
from lit_defect.editing.running import Request, reconstruct, run
from lit_defect.editing.samplers import warn_of_content
from lit_defect.errors import UserError
from lit_defect.generation.files import Bools, Picture
from lit_defect.generation.judgement import (
    Contrasts,
    EditRule,
    Measures,
    Outside,
    change,
    covered,
    likeness,
    outside,
    seam,
    stands_out,
)
from lit_defect.generation.pasting import Place, repair_label
from lit_defect.generation.store import About, GeneratedStore
from lit_defect.tasks.descriptors import descriptor
from lit_defect.tasks.edit_inputs import EditInputs, Ready
from lit_defect.tasks.editing_plan import EditJob

_SAMPLE = 2  # its random stream; those of masks, prompts and references have other numbers


class Candidate(NamedTuple):
    """One attempt.

    Attributes:
        picture: (H, W, 3) uint8, pasted back.
        label: (H, W), where the defect is, if that is known.
        measures: that the rule looks at.
        spilt: what the network had changed outside the mask.
    """

    picture: Picture
    label: Bools | None
    measures: Measures
    spilt: Outside


class EditMaking:
    """Carries out the jobs of an editing.

    Args:
        task: a `StableDiffusionEditor` on its device.
        sources: split of the data module that holds the pictures to edit.
        pairs: category and type of what comes out.
        rank: of this process.

    Raises:
        UserError, DataError: a pipeline that cannot be opened or does not fit, masks or references that are not there,
            another set in the task's folder.
    """

    def __init__(self, task: Any, sources: str, pairs: Iterable[tuple[str, str]], rank: int) -> None:
        self.task, self.data, self.sources = task, task.data, sources
        self.edit: Edit = task.edit
        self.normal = {pair for pair in pairs if self._label_of(pair[1]) == self.data.normal_class}
        self.opened = open_pipeline(task.base_source, task.mode, task.network, task.device, str(task.trainer.precision))
        self.inputs = EditInputs(task, sources, pairs, self.opened.multiple)
        defects = [pair for pair in pairs if pair not in self.normal]
        self.real = {pair: self._descriptors(pair) for pair in defects}
        self.rules = {pair: self._rule(pair) for pair in pairs}
        self._warned: set[str] = set()
        if reason := warn_of_content(self.edit.content, min(map(self.edit.strength_of, self._kinds()))):
            rank_zero_warn(reason)
        about = About(
            generator=f"StableDiffusionEditor {task.mode}",
            base={"source": task.base_source, "fingerprint": self.opened.fingerprint},
            tokens="",
            options={
                "mode": task.mode,
                **self.edit.resolved(),
                "lora_scale": task.network.lora_scale,
                "ip_adapter_scale": task.network.ip_adapter_scale,
                "dtype": str(self.opened.dtype).removeprefix("torch."),
                "pictures": self.inputs.listed(),
            },
            seed=task.seed,
        )
        self.store = GeneratedStore(task.root, about, self.opened.trained_on | self.inputs.looks(self.real), rank)
        self.done = self.store.done()

    def _label_of(self, kind: str) -> int:
        label = self.data.label_of(kind)
        if label is None:
            raise UserError(
                f"{KEY}.result = {kind!r}: no type of this data set; its classes: {', '.join(self.data.class_names)}"
            )
        return int(label)

    def _kinds(self) -> set[str]:
        return {job.kind for group in self.task.groups for job in group}

    def _rule(self, pair: tuple[str, str]) -> EditRule:
        """When an edit to this type counts: it stands out as most real defects do, where their masks are known."""
        edit = self.edit
        real = [] if pair in self.normal else self.inputs.contrasts(pair)
        return EditRule(
            edit.least_change,
            edit.least_covered,
            least_contrast=Contrasts.of(real, edit.least_contrast, 0.0).least,
            most_change=edit.most_change,
            most_seam=edit.most_seam,
        )

    @torch.no_grad()
    def _descriptors(self, pair: tuple[str, str]) -> Any:
        """(n, 2 C) of the real training defects of a pair; None for fewer than two that have masks."""
        if not self.data.with_masks:
            return None
        found = []
        for position, _ in self.inputs.defects(pair):
            picture, values = self.data.original("train", position)
            if values is not None and values.any() and not (values > 0).all():
                frame = self.inputs.frame(picture, values > 0)
                pixels = torch.from_numpy(frame.cut(picture)).permute(2, 0, 1)
                found.append(self._described(pixels, frame.cut_mask(values > 0)))
        return np.concatenate(found) if len(found) > 1 else None

    def _described(self, pixels: Tensor, mask: Any) -> Any:
        latents = self.opened.encode(pixels[None].to(self.task.device)).float().cpu()
        small = torch.from_numpy(np.asarray(mask, dtype=np.float32))[None, None]
        return descriptor(latents, small).numpy()

    # --- a group of jobs ---

    @torch.no_grad()
    def make(self, jobs: Sequence[EditJob]) -> None:
        """Make the pictures of a group, judge them and write those that are not there yet."""
        if all(job.number in self.done for job in jobs):
            return
        alike: defaultdict[Any, list[Ready]] = defaultdict(list)
        for job in jobs:
            ready = self.inputs.prepare(job)
            self._warn_of_cut(ready.prompt)
            alike[ready.frame.padded, self.edit.strength_of(job.kind)].append(ready)
        for bucket in alike.values():
            self._make(bucket)

    def _warn_of_cut(self, prompt: str) -> None:
        """Once for each: the words that the text encoder does not see."""
        if prompt not in self._warned and (cut := self.opened.cut_words(prompt)):
            warnings.warn(
                f'{KEY}.prompt: "{cut}" of "{prompt}" does not fit and is cut off; take fewer words', stacklevel=2
            )
        self._warned.add(prompt)

    def _make(self, bucket: Sequence[Ready]) -> None:
        """Make candidates for jobs of one size and strength, and write the best of each."""
        edit, count = self.edit, self.edit.candidates
        strength = edit.strength_of(bucket[0].job.kind)
        requests = [
            Request(
                picture=one.pixels,
                mask=torch.from_numpy(blurred(one.frame.cut_mask(one.mask), edit.mask_blur))[None]
                if one.drawn
                else None,
                prompt=one.prompt,
                negative_prompt=edit.negative_prompt,
                words=(*one.job.seed, _SAMPLE, number),
                strength=strength,
                reference=one.reference,
            )
            for one in bucket
            for number in range(count)
        ]
        made = run(self.opened, requests, edit)
        pictures = made.pictures.unflatten(0, (len(bucket), count))
        before: Any = [None] * len(bucket)
        if edit.paste == "change":
            before = (reconstruct(self.opened, one.pixels) for one in bucket)
        for row, (one, same) in enumerate(zip(bucket, before, strict=True)):
            if one.job.number not in self.done:
                retried = sum(made.retried[row * count : (row + 1) * count])
                self._write(one, pictures[row], same, retried)

    def _write(self, one: Ready, pictures: Tensor, same: Tensor | None, retried: int) -> None:
        """Judge the candidates (N, 3, h, w) of a job and write the best."""
        box = one.frame.box
        unchanged = None if same is None else one.frame.back(_plain(same))
        place = Place(one.picture[box], one.mask[box], self.edit.feather, unchanged)
        candidates = [self._candidate(one, place, picture) for picture in pictures]
        verdict = self.rules[one.job.pair].judge([candidate.measures for candidate in candidates])
        told = verdict.chosen if verdict.chosen is not None else _most_changed(candidates)
        shown, taken = candidates[told], verdict.chosen is not None
        kept = {}
        if self.edit.keep_rejected:
            kept = {n: c.picture for n, c in enumerate(candidates) if verdict.reasons[n] is not None}
        drawn = one.drawn.rejected if one.drawn else {}
        rejected = Counter(verdict.rejected) + Counter({f"mask drawn again: {k}": n for k, n in drawn.items()})
        self.store.add(
            self._line(one, shown, rejected, verdict.reason if not taken else "", retried),
            shown.picture if taken else None,
            shown.label if taken else None,
            kept,
            self._put_back(one, shown.picture) if taken and self.edit.put_back else None,
        )
        self.done.add(one.job.number)

    def _candidate(self, one: Ready, place: Place, generated: Tensor) -> Candidate:
        """Paste a picture (3, h, w) of the network back, and measure what it has changed."""
        edit, box, native = self.edit, one.frame.box, one.picture
        inside_box = one.frame.back(_plain(generated))
        raw = native.copy()
        raw[box] = np.rint(255 * inside_box.clip(0, 1)).astype(np.uint8)
        result = raw
        if edit.paste != "none":
            result = native.copy()
            result[box] = place.blended(place.enlarged(inside_box))
        label = self._label(one, result)
        if label is not None and self._repairs(one) and edit.paste != "none":
            result = np.where(label[..., None], result, native)  # what changed too little to be marked, has not
        spilt = outside(native, raw, one.mask)
        inside, _ = change(native / 255.0, result / 255.0, one.mask)
        real = self.real.get(one.job.pair)
        alike = 0.0
        if real is not None and label is not None and label.any() and not label.all():
            alike = likeness(self._described(generated.cpu(), one.frame.cut_mask(label))[0], real)
        measures = Measures(
            change_inside=inside,
            change_outside=spilt.mean,
            covered=covered(one.mask, label) if label is not None and self._repairs(one) else 1.0,
            seam=seam(result, one.mask, native),
            likeness=alike,
            contrast=math.inf if label is None else abs(stands_out(result, label)),
        )
        return Candidate(result, label, measures, spilt)

    def _repairs(self, one: Ready) -> bool:
        """Whether the label of a new defect is looked for in what has changed."""
        return self.edit.repair and one.job.pair not in self.normal and one.job.kind != one.job.pair[1]

    def _label(self, one: Ready, result: Picture) -> Bools | None:
        """Where the defect is, (H, W); None for normal pictures, and where that is not known."""
        if one.job.pair in self.normal:
            return None
        own = one.own if one.own is not None and one.own.any() else None
        if one.job.kind == one.job.pair[1]:
            return own  # a variant of the same defect
        if not one.drawn and not self.data.with_masks:
            return None
        new = repair_label(one.picture, result, one.mask, self.edit.least_change) if self.edit.repair else one.mask
        return new if own is None else new | own

    def _put_back(self, one: Ready, picture: Picture) -> Picture | None:
        """The photograph that a crop was cut from, with the edited crop; None where it is no crop."""
        sample = self.data.samples[self.sources][one.job.source]
        if sample.box is None:
            return None
        whole = self.data.photograph(self.sources, one.job.source)
        x, y, width, height = sample.box
        whole[y : y + height, x : x + width] = picture
        return whole

    def _line(self, one: Ready, shown: Candidate, rejected: Counter[str], reason: str, retried: int) -> Any:
        sample, edit, measures = self.data.samples[self.sources][one.job.source], self.edit, shown.measures
        return {
            "number": one.job.number,
            "source": sample.name,
            "source_group": sample.group,
            "category": one.job.pair[0],
            "defect_type": one.job.pair[1],
            "seed": one.job.seed[0],
            "prompt": one.prompt,
            "base": self.opened.fingerprint,
            "tokens": "",
            "sampler": edit.sampler,
            "steps": edit.steps,
            "strength": edit.strength_of(one.job.kind),
            "guidance": edit.guidance,
            "reweight": "",
            "mask_source": one.drawn.source if one.drawn else NO_MASK,
            "candidates": edit.candidates,
            "rejected": dict(rejected),
            "change_inside": round(measures.change_inside, 3),
            "change_outside": round(measures.change_outside, 3),
            "covered": measures.covered,
            "contrast": round(measures.contrast, 3),
            "likeness": round(measures.likeness, 3),
            "area": float((one.mask if shown.label is None else shown.label).mean()),
            "accepted": not reason,
            "reason": reason,
            "mode": self.task.mode,
            "most_outside": round(shown.spilt.most, 3),
            "share_changed": outside(one.picture, shown.picture).share,
            "seam": round(measures.seam, 3),
            "retried": retried,
        }


def _most_changed(candidates: Sequence[Candidate]) -> int:
    """Which candidate to tell of when none is taken."""
    figures = [c.measures.change_inside for c in candidates]
    return int(np.argmax([-math.inf if math.isnan(figure) else figure for figure in figures]))


def _plain(picture: Tensor) -> Any:
    return picture.float().clamp(0, 1).permute(1, 2, 0).cpu().numpy()
