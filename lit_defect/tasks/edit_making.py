"""Edits pictures: masks and frames, the pipeline's call, the choice among candidates, paste-back, the data set."""

from __future__ import annotations

import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lit_defect.editing.content import blurred
from lit_defect.editing.options import KEY, NO_MASK, Edit
from lit_defect.editing.running import Request, check_steps, reconstruct, run, unheeded_negative
from lit_defect.editing.samplers import warn_of_content
from lit_defect.errors import DataError, UserError
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
from lit_defect.generation.mask_sources import no_larger
from lit_defect.generation.pasting import Place, repair_label
from lit_defect.generation.store import About, GeneratedStore
from lit_defect.tasks.descriptors import descriptor
from lit_defect.tasks.edit_inputs import EditInputs, Ready
from lit_defect.tasks.edit_pixels import of_whole, plain, to_bytes, wider, within
from lit_defect.tasks.editing_plan import EditJob
from lit_defect.tasks.processes import joined_by_key

UNFIT = "picture or mask unfit"  # the reason of candidates that were not even tried
_MEASURED = ("change_inside", "change_outside", "covered", "contrast", "likeness", "area", "most_outside",
             "most_after", "share_changed", "seam")  # fmt: skip
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
        self.opened = task.open()
        strengths = set(map(self.edit.strength_of, self._kinds()))
        check_steps(self.opened, self.edit, strengths)
        self.inputs = EditInputs(task, sources, pairs, self.opened.multiple)
        defects = [pair for pair in pairs if pair not in self.normal]
        self.real = {pair: self._descriptors(pair) for pair in defects}
        self.rules = {pair: self._rule(pair) for pair in pairs}
        self.shapes = self.inputs.mask_rules(defects)
        self._warned: set[str] = set()
        self._warn_of_cut(self.edit.negative_prompt, "negative_prompt")
        self.unfit: dict[EditJob, DataError] = {}  # what is wrong with pictures that cannot be edited
        for reason in (warn_of_content(self.edit.content, min(strengths)), unheeded_negative(self.opened, self.edit)):
            if reason:
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
                "vae_tiling": task.network.vae_tiling,
                "pictures": self.inputs.listed(),
                "foreign": self.data.predict_root is not None,
                "files": self.inputs.files(),
            },
            seed=task.seed,
        )
        self.store = GeneratedStore(task.root, about, self.opened.trained_on | self.inputs.looks(self.real), rank)
        self.done = self.store.done()

    def _label_of(self, kind: str) -> int:
        label = self.data.label_of(kind)
        if label is None:
            raise UserError(
                f"{KEY}.result = {kind!r}: no type of this data set; its classes: {', '.join(self.data.class_names)}. "
                "Name one of them; a new type takes one real picture in the data set"
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
        if not latents.isfinite().all():  # half precision has overflowed
            with self.opened.in_float32():
                latents = self.opened.encode(pixels[None].to(self.task.device)).cpu()
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
            try:
                ready = self.inputs.prepare(job)
            except DataError as problem:
                self.unfit[job] = problem
                continue
            self._warn_of_cut(ready.prompt)
            alike[ready.frame.padded, self.edit.strength_of(job.kind)].append(ready)
        for bucket in alike.values():
            self._make(bucket)

    def finish(self) -> None:
        """Write a rejected line for each picture that no process could edit; another run does not try it again.

        Raises:
            DataError: there is no other picture, so it is an option that is wrong.
        """
        unfit = {job.number: (job, str(problem)) for job, problem in self.unfit.items()}
        if self.task.trainer.world_size > 1:
            unfit = joined_by_key(unfit)
        done = self.store.done()
        left = [unfit[number] for number in sorted(unfit.keys() - done)]
        if left and not done:  # on all processes alike: none has written a line
            raise DataError(f"no picture could be edited: {left[0][1]}")
        for job, problem in left if self.task.trainer.is_global_zero else ():
            name = self.data.samples[self.sources][job.source].name
            warnings.warn(f"{name} is not edited: {problem}", stacklevel=2)
            line: Any = {**self._asked(job), "rejected": {UNFIT: self.edit.candidates}, "reason": problem}
            self.store.add(line)

    def _warn_of_cut(self, prompt: str, key: str = "prompt") -> None:
        """Once for each: the words that the text encoder does not see."""
        if prompt not in self._warned and (cut := self.opened.cut_words(prompt)):
            warnings.warn(
                f'{KEY}.{key}: "{cut}" of "{prompt}" does not fit and is cut off; take fewer words', stacklevel=2
            )
        self._warned.add(prompt)

    def _make(self, bucket: Sequence[Ready]) -> None:
        """Make candidates for jobs of one size and strength, and write the best of each."""
        edit, count = self.edit, self.edit.candidates
        strength = edit.strength_of(bucket[0].job.kind)
        marks = [self._marks(one) if one.drawn else None for one in bucket]
        requests = [
            Request(
                picture=one.pixels,
                mask=mark,
                prompt=one.prompt,
                negative_prompt=edit.negative_prompt,
                words=(*one.job.seed, _SAMPLE, number),
                strength=strength,
                reference=one.reference,
            )
            for one, mark in zip(bucket, marks, strict=True)
            for number in range(count)
        ]
        made = run(self.opened, requests, edit)
        pictures = made.pictures.unflatten(0, (len(bucket), count))
        for row, one in enumerate(bucket):
            if one.job.number not in self.done:
                own = slice(row * count, (row + 1) * count)
                self._write(one, pictures[row], made.spoilt[own], sum(made.retried[own]))

    def _marks(self, one: Ready) -> Tensor:
        """(1, h, w): where the network may draw: the mask, and what its blur covers by half, as between two parts."""
        soft = blurred(one.mask, self.edit.mask_blur) >= 0.5
        return torch.from_numpy(one.frame.cut_mask(one.mask | soft).astype(np.float32))[None]

    def _write(self, one: Ready, pictures: Tensor, black: Sequence[bool], retried: int) -> None:
        """Judge the candidates (N, 3, h, w) of a job, of which some may be black, and write the best."""
        unchanged = self._unchanged(one)
        place = Place(one.picture, one.mask, self.edit.feather, unchanged if self.edit.paste == "change" else None)
        candidates = [self._candidate(one, place, unchanged, picture) for picture in pictures]
        measured = [replace(c.measures, black=spoilt) for c, spoilt in zip(candidates, black, strict=True)]
        verdict = self.rules[one.job.pair].judge(measured)
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
            photograph=self._put_back(one, shown.picture) if taken and self.edit.put_back else None,
            area=one.mask if one.drawn else None,
        )
        self.done.add(one.job.number)

    def _unchanged(self, one: Ready) -> Any:
        """(H, W, 3) in [0, 1], the source as the autoencoder gives it back; None where nothing asks for it."""
        if self.edit.paste != "change" and (one.drawn or not self._repairs(one)):
            return None
        return within(one, one.frame.back(plain(reconstruct(self.opened, one.pixels))))

    def _candidate(self, one: Ready, place: Place, unchanged: Any, generated: Tensor) -> Candidate:
        """Paste a picture (3, h, w) of the network back, and measure what it has changed."""
        edit, native = self.edit, one.picture
        whole = within(one, one.frame.back(plain(generated)))  # (H, W, 3) in [0, 1]
        raw = to_bytes(whole)
        result = raw if edit.paste == "none" else place.blended(place.enlarged(whole))
        edited = self._edited(one, result, raw, unchanged)
        repairs = edited is not None and self._repairs(one)
        if edited is not None and repairs and edit.paste != "none":
            result = np.where(edited[..., None], result, native)  # what changed too little to be marked, has not
        looked_at = edited if edited is not None and repairs and not one.drawn else one.mask
        box = wider(one.frame.box, looked_at.shape)  # nothing changes elsewhere
        inside, _ = change(native[box] / 255.0, result[box] / 255.0, looked_at[box])
        spilt = of_whole(outside(native[box], raw[box], one.mask[box]), one.mask[box], one.mask)
        real = self.real.get(one.job.pair)
        alike = 0.0
        if real is not None and edited is not None and edited.any() and not edited.all():
            alike = likeness(self._described(generated.cpu(), one.frame.cut_mask(edited))[0], real)
        measures = Measures(
            change_inside=inside,
            change_outside=spilt.mean,
            covered=covered(one.mask, edited) if edited is not None and repairs and one.drawn else 1.0,
            seam=seam(result[box], looked_at[box], native[box]),
            likeness=alike,
            contrast=self._contrast(one, result, edited),
            mask_fault=self._fault(one, edited) if repairs else None,
        )
        label = edited if edited is None or one.own is None else edited | one.own
        return Candidate(result, label, measures, spilt)

    def _contrast(self, one: Ready, result: Picture, label: Bools | None) -> float:
        """How far a defect stands out by what the edit did, grey levels: a place may have stood out before."""
        if label is None:
            return math.inf
        found = stands_out(result, label)
        before = 0.0 if self._is_variant(one) else stands_out(one.picture, label)
        return min(abs(found), abs(found - before)) if math.isfinite(found) else math.inf

    def _repairs(self, one: Ready) -> bool:
        """Whether the label of a defect is looked for in what has changed: not that of a variant in its own place."""
        looks = self.edit.repair and self.data.with_masks
        return looks and one.job.pair not in self.normal and not self._is_variant(one)

    def _is_variant(self, one: Ready) -> bool:
        """Whether a defect is edited where it is, and stays what it is."""
        return one.job.kind == one.job.pair[1] and self.edit.masks in (NO_MASK, "own")

    def _edited(self, one: Ready, result: Picture, raw: Picture, unchanged: Any) -> Bools | None:
        """Where the defect is that was edited, (H, W); None for normal pictures, and where that is not known.

        A variant in its own place keeps the mask of its source. An edit of all of a picture is looked for in what the
        network made (`raw`) against what the autoencoder makes of the source, whose loss is everywhere.
        """
        if one.job.pair in self.normal:
            return None
        if self._is_variant(one):
            another = self.task.mode == "variation" and not one.drawn  # whose defect lies anywhere
            return None if another or one.own is None or not one.own.any() else one.own
        least = self.edit.least_change
        if one.drawn:
            return repair_label(one.picture, result, one.mask, least) if self._repairs(one) else one.mask
        if unchanged is not None and self._repairs(one):
            return repair_label(to_bytes(unchanged), raw, one.mask, least)
        return None

    def _fault(self, one: Ready, label: Bools | None) -> str | None:
        """What rule of the real masks the label of an unmasked edit breaks; masks that were asked for are as asked."""
        rules = self.shapes.get(one.job.pair)
        if rules is None or one.drawn or label is None or not label.any():
            return None
        return rules.fault(no_larger(label), np.ones_like(no_larger(label)))

    def _put_back(self, one: Ready, picture: Picture) -> Picture | None:
        """The photograph that a crop was cut from, with the edited crop; None where it is no crop."""
        sample = self.data.samples[self.sources][one.job.source]
        if sample.box is None:
            return None
        whole = self.data.photograph(self.sources, one.job.source)
        x, y, width, height = sample.box
        whole[y : y + height, x : x + width] = picture
        return whole

    def _asked(self, job: EditJob) -> Any:
        """The line of a picture of which nothing is made."""
        sample, edit = self.data.samples[self.sources][job.source], self.edit
        return {
            "number": job.number,
            "source": sample.name,
            "source_group": sample.group,
            "category": job.pair[0],
            "defect_type": job.pair[1],
            "seed": job.seed[0],
            "prompt": "",
            "base": self.opened.fingerprint,
            "tokens": "",
            "sampler": edit.sampler,
            "steps": edit.steps,
            "strength": edit.strength_of(job.kind),
            "guidance": edit.guidance,
            "reweight": "",
            "mask_source": edit.masks,
            "candidates": edit.candidates,
            **dict.fromkeys(_MEASURED, math.nan),
            "accepted": False,
            "mode": self.task.mode,
            "retried": 0,
        }

    def _line(self, one: Ready, shown: Candidate, rejected: Counter[str], reason: str, retried: int) -> Any:
        measures = shown.measures
        return {
            **self._asked(one.job),
            "prompt": one.prompt,
            "mask_source": one.drawn.source if one.drawn else NO_MASK,
            "rejected": dict(rejected),
            "change_inside": round(measures.change_inside, 3),
            "change_outside": round(measures.change_outside, 3),
            "covered": measures.covered,
            "contrast": round(measures.contrast, 3),
            "likeness": round(measures.likeness, 3),
            "area": float((one.mask if shown.label is None else shown.label).mean()),
            "accepted": not reason,
            "reason": reason,
            "most_outside": round(shown.spilt.most, 3),
            "most_after": outside(one.picture, shown.picture, one.mask).most,
            "share_changed": outside(one.picture, shown.picture).share,
            "seam": round(measures.seam, 3),
            "retried": retried,
        }


def _most_changed(candidates: Sequence[Candidate]) -> int:
    """Which candidate to tell of when none is taken."""
    figures = [c.measures.change_inside for c in candidates]
    return int(np.argmax([-math.inf if math.isnan(figure) else figure for figure in figures]))
