"""The second inversion of AnomalyDiffusion (Hu et al., AAAI 2024): new masks, by vectors learnt from the real ones.

The masks themselves are the pictures, and the loss is that of the whole picture. `predict` samples masks from noise,
cuts them at a threshold and keeps those that the rules of their type allow; `AnomalyDiffusion` takes the folder as
`generation.masks`, and looks there whether a mask lies on the object.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lit_defect.diffusion.labels import generators
from lit_defect.diffusion.latent_sampling import guided, sample
from lit_defect.diffusion.samplers import Sampler
from lit_defect.errors import UserError
from lit_defect.generation.files import read_mask
from lit_defect.generation.mask_rules import MaskRules
from lit_defect.generation.mask_sources import rules_of
from lit_defect.generation.mask_store import Asked, MaskStore, count
from lit_defect.generation.options import KEY
from lit_defect.generation.store import About
from lit_defect.losses.diffusion import masked_mse
from lit_defect.reporting.sheets import Cell, Words, sheet
from lit_defect.tasks.base import Batch
from lit_defect.tasks.defect_generation import make_sampler
from lit_defect.tasks.few_shots import defect_positions, mask_of
from lit_defect.tasks.generation_plan import choose_pairs
from lit_defect.tasks.set_maker import InversionMaker


@dataclass(frozen=True)
class MaskGeneration:
    """Options of a generation of masks.

    The authors sample by 100 steps of DDIM with eta 1, and cut at 0.8 of the decoder's -1 to 1, a share of 0.9.

    Attributes:
        count: masks of each (category, defect type).
        types: defect types, or null for all that were learnt.
        sampler: `ddpm`, `ddim`, `dpmsolver` or `unipc`.
        steps: of it.
        eta: share of DDPM's noise in each step of DDIM; null for none.
        guidance: scale of classifier-free guidance; 1 for none.
        threshold: share of white above which a pixel is marked.
        tries: how often a mask is drawn, until one keeps the rules of its type.
        batch: masks that go through the network together, twice under guidance.
        output: folder; null for `masks` in the run's folder.

    Raises:
        UserError: a number out of range.
    """

    count: int = 100
    types: list[str] | None = None
    sampler: Literal["ddpm", "ddim", "dpmsolver", "unipc"] = "ddim"
    steps: int = 25
    eta: float | None = None
    guidance: float = 5.0
    threshold: float = 0.9
    tries: int = 5
    batch: int = 8
    output: str | None = None

    def __post_init__(self) -> None:
        for key in ("count", "tries", "batch"):
            if getattr(self, key) < 1:
                raise UserError(f"{KEY}.{key} = {getattr(self, key)}: expected at least 1")
        if not 0 < self.threshold < 1:
            raise UserError(f"{KEY}.threshold = {self.threshold}: expected 0 < threshold < 1")
        if not self.guidance >= 1:
            raise UserError(f"{KEY}.guidance = {self.guidance}: expected 1 (none) or more")


class MaskDiffusion(InversionMaker):
    """One joint model of the masks of all (category, defect type) pairs.

    Args:
        base: hub name, folder of a pipeline of diffusers, or run of a `LatentDiffusion` (trained with `masks` > 0).
        anomaly_tokens: k' vectors for each pair; 4 in the paper.
        generation: what `predict` makes.
        kwargs: see `Inversion` and `DefectTask`.

    Raises:
        UserError: an option out of range.
    """

    folder = "masks"

    def __init__(
        self, base: str, anomaly_tokens: int = 4, generation: MaskGeneration | None = None, **kwargs: Any
    ) -> None:
        if kwargs.get("spatial_tokens"):
            raise UserError("model.init_args.spatial_tokens: MaskDiffusion makes masks, it is not told any; leave it 0")
        super().__init__(base, anomaly_tokens=anomaly_tokens, **kwargs)
        self.save_hyperparameters(ignore=["generation"], logger=False)
        self.generation = generation or MaskGeneration()
        self._jobs: list[Asked] = []
        self._done: set[Asked] = set()
        self._rules: dict[tuple[str, str], MaskRules] = {}
        self._store: MaskStore
        self._sampler: Sampler

    def shown(self, images: Tensor, masks: Tensor) -> Tensor:
        """The masks."""
        return masks.expand(-1, 3, -1, -1)

    def loss(self, output: Tensor, target: Tensor, masks: Tensor, weights: Tensor | None) -> Tensor:
        """Squared error of the whole picture."""
        return masked_mse(output, target, None, weights=weights)

    # --- generation ---

    def setup(self, stage: str) -> None:
        """For `predict`, serve the groups in place of a split.

        Raises:
            UserError: as for every `Inversion`; pictures of one's own, of which no mask is made.
        """
        super().setup(stage)
        if stage == "predict":
            if self.data.predict_root is not None:
                raise UserError("data.predict_root: MaskDiffusion makes masks of noise, it takes no pictures; leave it")
            self.serve_groups()

    def plan_groups(self) -> None:
        """The types take turns: more masks of each come behind those that were asked for before."""
        assert self.pairs is not None
        options, categories = self.generation, {category for category, _ in self.pairs}
        chosen = choose_pairs(self.pairs, options.types, categories)
        self._jobs = [Asked(category, kind, number) for number in range(options.count) for category, kind in chosen]
        groups = max(-(-len(self._jobs) // options.batch), self.trainer.world_size)  # no process may be without one
        # One sample stands for a group: the loader gives each process its share of them.
        self.data.samples["predict"] = [self.data.samples["train"][0]] * groups

    def on_predict_start(self) -> None:
        """Open the folder; what is there already is not made again."""
        self._sampler = make_sampler(self.network, {**self._deciding(), "strength": 1.0})
        positions = defect_positions(self, {job[:2] for job in self._jobs})
        masks = {pair: [(name, self.data.original("train", i)[1] > 0) for i, name in found]
                 for pair, found in positions.items()}  # fmt: skip
        self._rules = rules_of(masks)
        with self.beginning():
            self._store = self._open()
        self._done = self._store.done(self.generation.tries)

    def _deciding(self) -> dict[str, Any]:
        """The options that decide the masks; not how many, nor how often one is drawn anew."""
        return {key: getattr(self.generation, key) for key in ("sampler", "steps", "eta", "guidance", "threshold")}

    def _open(self) -> MaskStore:
        about = About(
            generator=type(self).__name__,
            base={"source": self.network.source, "fingerprint": self.network.fingerprint},
            tokens=self.tokens_hash(),
            options={**self._deciding(), "template": self.template, "image_size": list(self.data.image_size),
                     "prompt_noise": self.prompt_noise},
            seed=self.seed,
        )  # fmt: skip
        ruled = {(s.name, s.group) for s in self.defects("train") if (s.category, s.defect_type) in (self.pairs or ())}
        return MaskStore(self.root, about, self.learnt_from | ruled, self.trainer.global_rank)

    @torch.no_grad()
    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Make some groups of masks; the groups' numbers."""
        size = self.generation.batch
        for group in batch["index"].tolist():
            self._make(self._jobs[group * size : (group + 1) * size])
        groups: Tensor = batch["index"]
        return groups

    def _make(self, jobs: list[Asked]) -> None:
        """The masks of a group go through the network together, also those that are there: they come out the same."""
        rejected = {job: Counter[str]() for job in jobs if job not in self._done}
        for attempt in range(self.generation.tries):
            if not rejected:
                return
            for job, mask in zip(jobs, self._sampled(jobs, attempt), strict=True):
                if job not in rejected:
                    continue
                fault = self._rules[job[:2]].fault(mask, np.ones_like(mask))
                if fault is None:
                    self._store.add(job, mask, rejected.pop(job))
                else:
                    rejected[job][fault] += 1
        for job, faults in rejected.items():
            self._store.add(job, None, faults)

    def _sampled(self, jobs: list[Asked], attempt: int) -> Any:
        """(J, H, W) bool."""
        base, options = self.network, self.generation
        assert self.pairs is not None
        height, width = self.data.image_size
        rows = [self.pairs.index(job[:2]) for job in jobs]
        streams = [
            generators(self.seed, [job.number], attempt * len(self.pairs) + row)[0]
            for job, row in zip(jobs, rows, strict=True)
        ]
        pairs = torch.tensor(rows)

        def draw(*shape: int) -> Tensor:
            return torch.stack([torch.randn(*shape[1:], generator=stream) for stream in streams])

        told = self.states(pairs, torch.zeros(len(jobs), 1, height, width, device=self.device), draw)
        latents = sample(
            guided(base.unet, told, self.unconditional(len(jobs)), options.guidance),
            self._sampler,
            base.prediction,
            (base.channels, height // base.factor, width // base.factor),
            streams,
            told,
        )
        white = ((base.decode(latents) + 1) / 2).mean(dim=1)
        return (white > options.threshold).cpu().numpy()

    def write_results(self, folder: Path, stage: str) -> None:
        """Counts, and a sheet of real and new masks; rank 0 only."""
        lines = self._store.lines()
        asked = [(job, lines[job]) for job in sorted(self._jobs)]
        cells, told = [], []
        for pair, found in count(asked)["pairs"].items():
            why = ", ".join(f"{times} {fault}" for fault, times in found["rejections"].most_common())
            told.append(f"{pair:30} {found['made']} of {found['asked']}" + (f"   rejected: {why}" if why else ""))
        for key in sorted({job[:2] for job in self._jobs}):
            cells += self._cells(key, [self.root / line.mask for job, line in asked if job[:2] == key and line.mask])
        figure = folder / "figures" / "masks.png"
        figure.parent.mkdir(parents=True, exist_ok=True)
        sheet(cells, title="Real and generated masks", columns=2, size=96).save(figure)
        print("\n" + "\n".join(told) + f"\n\nmasks   {self.root}\nfigure  {figure}\n")

    def _cells(self, pair: tuple[str, str], paths: list[Path]) -> list[Cell]:
        samples, size = self.data.samples["train"], self.data.image_size
        real = [i for i, s in enumerate(samples) if (s.category, s.defect_type, s.source) == (*pair, "real")][:8]
        there = [path for path in paths if path.is_file()][:8]  # whoever has looked them through may have deleted some
        panels = [mask_of(self.data, "train", i, size).numpy() > 0 for i in real], [read_mask(p) for p in there]
        return [
            Cell([np.repeat(255 * mask.astype(np.uint8)[..., None], 3, 2) for mask in masks] or ["none"],
                 [[Words(f"{what} {pair[1]}")]])
            for what, masks in zip(("real", "generated"), panels, strict=True)
        ]  # fmt: skip
