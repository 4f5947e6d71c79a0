"""Makes pictures with defects of normal ones: masks, blended sampling, the choice among candidates, the data set."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from lit_defect.diffusion.attention import Reweight, official_weights, paper_weights
from lit_defect.diffusion.latent_sampling import Look, Region, guided, sample
from lit_defect.diffusion.samplers import Sampler
from lit_defect.errors import UserError
from lit_defect.generation.foreground import Foreground
from lit_defect.generation.judgement import (
    Contrasts,
    Measures,
    Rule,
    Verdict,
    change,
    contrast_gain,
    covered,
    likeness,
    outside,
    seam,
    stands_out,
    weakened,
)
from lit_defect.generation.mask_rules import MaskRules
from lit_defect.generation.mask_shapes import fit_mask
from lit_defect.generation.mask_sources import (
    AugmentedMasks,
    Drawn,
    MaskFolder,
    MaskSource,
    Pair,
    no_larger,
    rules_of,
)
from lit_defect.generation.options import KEY, Generation
from lit_defect.generation.pasting import Place, repair_label
from lit_defect.generation.store import About, GeneratedStore
from lit_defect.losses.diffusion import latent_mask
from lit_defect.tasks.descriptors import descriptor
from lit_defect.tasks.few_shots import defect_positions
from lit_defect.tasks.generation_plan import Job
from lit_defect.tasks.views import resize, unit_range

_MASK, _SAMPLE, _CONTRAST = 1, 2, 3  # every kind of draw of a job has its own random stream


class Candidate(NamedTuple):
    """One attempt: the picture (H, W, 3) uint8 and label (H, W) at the source's size, and what was measured."""

    picture: Any
    label: Any
    measures: Measures
    most_outside: float  # grey levels, before the paste-back


class Original(NamedTuple):
    """A normal picture, and what the network has of it.

    Attributes:
        picture: (H, W, 3) uint8.
        area: (H, W) its object.
        before: (h, w, 3) in [0, 1], what a candidate is compared with.
        mask: (h, w), where the defect goes.
    """

    picture: Any
    area: Any
    before: Any
    mask: Any


class DefectGeneration:
    """Carries out the jobs of a generation.

    Args:
        task: an `AnomalyDiffusion` that is ready, on its device.
        options: see `Generation`.
        seed: of the generation.
        root: folder of the data set.
        sources: the split of the data module that holds the normal pictures.
        rank: of this process.
        pairs: of the jobs to come; None for all that were learnt.

    Raises:
        UserError: options out of range, another generation in `root`, a type without usable masks.
    """

    def __init__(
        self,
        task: Any,
        options: Generation,
        seed: int,
        root: Path,
        sources: str,
        rank: int,
        pairs: Iterable[Pair] | None = None,
    ) -> None:
        self.task, self.options, self.sources = task, options, sources
        self.settings = options.resolved()
        self.base = task.network
        self.size: tuple[int, int] = task.data.image_size
        self.sampler = make_sampler(self.base, self.settings)
        self.foreground = Foreground(options.foreground, f"{KEY}.foreground")
        positions = defect_positions(task, pairs)
        masks = {pair: [(name, task.data.original("train", i)[1] > 0) for i, name in found]
                 for pair, found in positions.items()}  # fmt: skip
        self.rules: dict[tuple[str, str], MaskRules] = rules_of(masks)
        real = {pair: self._measured([i for i, _ in found]) for pair, found in positions.items()}
        self.contrasts = {
            pair: Contrasts.of(own, options.least_contrast, options.most_contrast) for pair, (own, _, _) in real.items()
        }
        self.judges = {
            pair: Rule(options.least_change, options.least_covered, own.least) for pair, own in self.contrasts.items()
        }
        restores = options.restore and options.paste == "change"
        self.gains = {pair: contrast_gain(*both) if restores else 1.0 for pair, (*both, _) in real.items()}
        self.real = {pair: descriptors for pair, (_, _, descriptors) in real.items()}
        self.masks: MaskSource = (
            AugmentedMasks(masks, self.rules)
            if options.masks == "augmented"
            else MaskFolder(Path(options.masks).expanduser(), self.rules)
        )
        self.tokens = task.tokens_hash()
        about = About(
            generator="AnomalyDiffusion",
            base={"source": self.base.source, "fingerprint": self.base.fingerprint},
            tokens=self.tokens,
            options={**self.settings, "template": task.template, "image_size": list(self.size),
                     "prompt_noise": task.prompt_noise, "sources": self._sources()},
            seed=seed,
        )  # fmt: skip
        varied = {(s.name, s.group) for s in task.defects("train") if (s.category, s.defect_type) in task.pairs}
        self.store = GeneratedStore(root, about, task.learnt_from | varied | self.masks.learnt_from, rank)
        self.done = self.store.done()

    def _sources(self) -> str:
        """What defects are put onto: the numbers of a set that is gone on with must mean the same pictures."""
        if self.task.data.predict_root is None:
            return "normal training pictures"  # of any category: another one may join them
        files = sorted((s.name, Path(s.path).stat().st_size) for s in self.task.data.samples[self.sources])
        return f"{len(files)} pictures of {hashlib.sha256(repr(files).encode()).hexdigest()[:16]}"

    # --- a group of jobs ---

    @torch.no_grad()
    def make(self, jobs: Sequence[Job]) -> None:
        """Make the pictures of a group, judge them and write those that are not there yet."""
        if all(job.number in self.done for job in jobs):
            return
        samples = self.task.data.samples[self.sources]
        originals = [self.task.data.original(self.sources, job.source)[0] for job in jobs]
        objects = [
            self.foreground.of(samples[job.source].name, picture) for job, picture in zip(jobs, originals, strict=True)
        ]
        drawn = [
            self.masks.draw(job.pair, np.random.default_rng([*job.seed, _MASK]), area)
            for job, area in zip(jobs, objects, strict=True)
        ]
        normal = torch.cat([self._small(picture) for picture in originals])  # (J, 3, H, W) in [0, 1]
        small = [fit_mask(found.mask, self.size) for found in drawn]  # what the network is told
        masks = torch.from_numpy(np.stack(small))[:, None].float().to(self.task.device)
        clean = self.base.encode(2 * normal - 1)  # (J, C, h, w)
        pictures, latents = self.generate(jobs, normal, clean, masks)  # (J, N, ...)
        # What a candidate is compared with: the normal picture, or what the autoencoder makes of it.
        before = _plain(normal if self.options.paste == "picture" else (self.base.decode(clean) + 1) / 2)
        for row, job in enumerate(jobs):
            if job.number not in self.done:
                original = Original(originals[row], objects[row], before[row], small[row])
                self._write(job, drawn[row], original, _plain(pictures[row]), latents[row])

    def generate(self, jobs: Sequence[Job], normal: Tensor, clean: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """N candidates of J pictures with defects.

        Args:
            jobs: J of them.
            normal: (J, 3, H, W) in [0, 1], with latents `clean` (J, C, h, w).
            masks: (J, 1, H, W), where the defects go.

        Returns:
            Pictures (J, N, 3, H, W) about [0, 1], all of them the autoencoder's; and their latents (J, N, C, h, w),
            outside the masks those of the normal pictures.
        """
        task, base, count = self.task, self.base, int(self.settings["candidates"])
        streams = [_stream([*job.seed, _SAMPLE, number]) for job in jobs for number in range(count)]
        pairs = torch.tensor([task.learnt["tokens"].row_of(*job.pair) for job in jobs for _ in range(count)])
        clean = clean.float().repeat_interleave(count, dim=0)  # (J N, C, h, w)
        marks = masks.repeat_interleave(count, dim=0)
        told = task.states(pairs, marks, lambda *shape: _draws(shape, streams))
        pixels = (2 * normal - 1).repeat_interleave(count, dim=0)
        places = latent_mask(marks, clean.shape[2:])
        try:
            latents = sample(
                guided(base.unet, told, task.unconditional(len(told)), self.settings["guidance"]),
                self.sampler,
                base.prediction,
                tuple(clean.shape[1:]),
                streams,
                clean,
                region=Region(clean, places, self.settings["grow"]),
                before=self._reweighting(pixels, clean, marks),
            )
        finally:
            task.cross.reweight = None
        pictures = (base.decode(latents) + 1) / 2
        split = (len(jobs), count)
        return pictures.unflatten(0, split), latents.unflatten(0, split)

    def _reweighting(self, normal: Tensor, clean: Tensor, masks: Tensor) -> Callable[[Look], None] | None:
        """Attention that rises where the picture is still normal (Hu et al., section 3.4).

        Args:
            normal: (B, 3, H, W) in [-1, 1], with latents `clean` (B, C, h, w).
            masks: (B, 1, H, W).

        Returns:
            What looks at the picture before each call of the U-Net; the paper's weights need what it thought last, so
            its first call has none.
        """
        task, mode = self.task, self.settings["reweight"]
        if mode == "off":
            return None

        def look(seen: Look) -> None:
            if mode == "official":
                weights = official_weights(seen.state, clean, seen.mask)
            elif seen.x0 is not None:
                weights = paper_weights(self.base.decode(seen.x0), normal, masks)
            else:
                return
            if self.settings["guidance"] != 1:  # the first half of a call is without condition
                weights = torch.cat([torch.ones_like(weights), weights])
            task.cross.reweight = Reweight(weights, task.positions, mode)

        return look

    def _write(self, job: Job, drawn: Drawn, original: Original, pictures: Any, latents: Tensor) -> None:
        """Judge the candidates (N, H, W, 3) of a job and write the best."""
        places = torch.from_numpy(original.mask)[None, None].float()
        reference = original.before if self.options.paste == "change" else None
        place = Place(original.picture, drawn.mask, self.options.feather, reference)
        candidates = [
            self._candidate(job, place, original, picture, descriptor(latent[None].cpu(), places)[0].numpy())
            for picture, latent in zip(pictures, latents, strict=True)
        ]
        verdict = self.judges[job.pair].judge([candidate.measures for candidate in candidates])
        told = verdict.chosen if verdict.chosen is not None else _best_of(candidates)
        shown = candidates[told]
        made = self._line(job, drawn, original.picture, shown, verdict)
        taken = verdict.chosen is not None
        kept = {}
        if self.options.keep_rejected:
            kept = {n: c.picture for n, c in enumerate(candidates) if verdict.reasons[n] is not None}
        self.store.add(made, shown.picture if taken else None, shown.label if taken else None, kept)
        self.done.add(job.number)

    def _candidate(self, job: Job, place: Place, original: Original, picture: Any, descriptor: Any) -> Candidate:
        native, asked = original.picture, place.mask
        gain, wished = self.gains[job.pair], self.contrasts[job.pair]
        enlarged = place.enlarged(picture)
        result = place.blended(enlarged, gain)
        found = stands_out(result, asked)
        if self.options.paste == "change" and wished.most < abs(found) < math.inf:
            wanted = wished.one(np.random.default_rng([*job.seed, _CONTRAST]))
            gain = weakened(gain, stands_out(native, asked), found, wanted)
            result = place.blended(enlarged, gain)
        label = repair_label(native, result, asked, self.options.least_change) if self.options.repair else asked
        result = np.where(label[..., None], result, native)  # what changed too little to be marked, has not
        inside, beside = change(original.before, picture, original.mask)
        measures = Measures(
            change_inside=inside,
            change_outside=beside,
            covered=covered(asked, label),
            contrast=abs(stands_out(result, label)),
            likeness=likeness(descriptor, self.real[job.pair]),
            mask_fault=self.rules[job.pair].fault(no_larger(label), no_larger(original.area)),
        )
        return Candidate(result, label, measures, outside(255 * original.before, 255 * picture, original.mask).most)

    def _line(self, job: Job, drawn: Drawn, normal: Any, shown: Candidate, verdict: Verdict) -> Any:
        sample_of = self.task.data.samples[self.sources][job.source]
        measures = shown.measures
        rejected = Counter(verdict.rejected) + Counter({f"mask drawn again: {k}": n for k, n in drawn.rejected.items()})
        return {
            "number": job.number,
            "source": sample_of.name,
            "source_group": sample_of.group,
            "category": job.pair[0],
            "defect_type": job.pair[1],
            "seed": job.seed[0],
            "prompt": self.task.prompts[job.pair[0]].text,
            "base": self.base.fingerprint,
            "tokens": self.tokens,
            "sampler": self.settings["sampler"],
            "steps": self.settings["steps"],
            "strength": self.settings["strength"],
            "guidance": self.settings["guidance"],
            "reweight": self.settings["reweight"],
            "mask_source": drawn.source,
            "candidates": self.settings["candidates"],
            "rejected": dict(rejected),
            "change_inside": round(measures.change_inside, 3),
            "change_outside": round(measures.change_outside, 3),
            "covered": measures.covered,
            "contrast": round(measures.contrast, 3),
            "likeness": round(measures.likeness, 3),
            "area": float(shown.label.mean()),
            "accepted": verdict.chosen is not None,
            "reason": verdict.reason,
            "mode": "",
            "most_outside": round(shown.most_outside, 3),
            "most_after": 0.0,  # what is outside the mask is the normal picture
            "share_changed": outside(normal, shown.picture).share,
            "seam": round(seam(shown.picture, shown.label, normal), 3),
            "retried": 0,
        }

    # --- the real defects ---

    @torch.no_grad()
    def _measured(self, positions: Sequence[int]) -> tuple[list[float], list[float], Any]:
        """Of n real training defects, each encoded once.

        Returns:
            How they stand out; how they do when the autoencoder has had them at its size; their descriptors (n, 2 C).
        """
        real, reconstructed, descriptors = [], [], []
        for position in positions:
            picture, values = self.task.data.original("train", position)
            mask = values > 0
            latents = self.base.encode(2 * self._small(picture) - 1)
            back = 255 * resize((self.base.decode(latents).clamp(-1, 1) + 1) / 2, picture.shape[:2])
            real.append(stands_out(picture, mask))
            reconstructed.append(stands_out(back[0].permute(1, 2, 0).cpu().numpy(), mask))
            small = torch.from_numpy(fit_mask(mask, self.size))[None, None].float()
            descriptors.append(descriptor(latents.cpu(), small))
        return real, reconstructed, torch.cat(descriptors).numpy()

    def _small(self, picture: Any) -> Tensor:
        """A picture (H, W, 3) uint8 as the base takes it: (1, 3, h, w) in [0, 1], in whole grey levels."""
        whole = unit_range(torch.from_numpy(picture).permute(2, 0, 1)[None].to(self.task.device))
        return (255 * resize(whole, self.size)).round() / 255


def make_sampler(base: Any, settings: Any) -> Sampler:
    """The sampler of a generation's options.

    Raises:
        UserError: a step, strength or eta out of range, or no step at all.
    """
    try:
        made = Sampler(
            settings["sampler"], base.process,
            steps=settings["steps"], strength=settings["strength"], eta=settings["eta"],
        )  # fmt: skip
    except UserError as error:
        raise UserError(str(error).replace("model.init_args.", f"{KEY}.", 1)) from None
    if made.calls == 0:
        raise UserError(f"{KEY}.strength = 0 changes nothing: expected a share of the steps, above 0")
    return made


def _best_of(candidates: Sequence[Candidate]) -> int:
    """Which candidate to tell of when none is taken: the one that changed most."""
    figures = [c.measures.change_inside for c in candidates]
    return int(np.argmax([-math.inf if math.isnan(figure) else figure for figure in figures]))


def _stream(words: Sequence[int]) -> Generator:
    state = np.random.SeedSequence(list(words)).generate_state(1, np.uint64)[0]
    return Generator().manual_seed(int(state >> np.uint64(1)))


def _draws(shape: Sequence[int], streams: Sequence[Generator]) -> Tensor:
    return torch.stack([torch.randn(*shape[1:], generator=stream) for stream in streams])


def _plain(pictures: Tensor) -> Any:
    return pictures.float().clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
