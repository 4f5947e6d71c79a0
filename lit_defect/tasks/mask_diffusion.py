"""The second inversion of AnomalyDiffusion (Hu et al., AAAI 2024): new masks, by vectors learnt from the real ones.

The masks themselves are the pictures, and the loss is that of the whole picture. `predict` samples masks from noise,
cuts them at a threshold and keeps those that the rules of their type allow; `AnomalyDiffusion` takes the folder as
`generation.masks`, and looks there whether a mask lies on the object.
"""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lit_defect.diffusion.labels import generators
from lit_defect.diffusion.latent_sampling import guided, sample
from lit_defect.errors import UserError
from lit_defect.generation.files import png, read_mask, write_whole
from lit_defect.generation.mask_rules import MaskRules
from lit_defect.generation.mask_sources import rules_of
from lit_defect.losses.diffusion import masked_mse
from lit_defect.reporting.sheets import Cell, Words, sheet
from lit_defect.tasks.base import Batch
from lit_defect.tasks.defect_generation import defect_positions, make_sampler
from lit_defect.tasks.few_shots import mask_of
from lit_defect.tasks.generation_plan import choose_pairs
from lit_defect.tasks.inversion import Inversion

FOLDER = "masks"
COUNTS = "masks.csv"
KEY = "model.init_args.generation"


@dataclass(frozen=True)
class MaskGeneration:
    """Options of a generation of masks; the authors sample by 100 steps of DDIM.

    Attributes:
        count: masks of each (category, defect type).
        types: defect types, or null for all that were learnt.
        sampler: `ddpm`, `ddim`, `dpmsolver` or `unipc`.
        steps: of it.
        eta: of DDIM.
        guidance: scale of classifier-free guidance; 1 for none.
        threshold: share of white above which a pixel is marked.
        tries: how often a mask that breaks a rule is drawn anew.
        batch: masks that go through the network together.
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
    threshold: float = 0.8
    tries: int = 5
    batch: int = 8
    output: str | None = None

    def __post_init__(self) -> None:
        for key in ("count", "tries", "batch"):
            if getattr(self, key) < 1:
                raise UserError(f"{KEY}.{key} = {getattr(self, key)}: expected at least 1")
        if not 0 < self.threshold < 1:
            raise UserError(f"{KEY}.threshold = {self.threshold}: expected 0 < threshold < 1")
        if self.guidance < 1:
            raise UserError(f"{KEY}.guidance = {self.guidance}: expected 1 (none) or more")


class MaskDiffusion(Inversion):
    """One joint model of the masks of all (category, defect type) pairs.

    Args:
        base: hub name, folder of a pipeline of diffusers, or run of a `LatentDiffusion` (trained with `masks` > 0).
        anomaly_tokens: k' vectors for each pair; 4 in the paper.
        generation: what `predict` makes.
        kwargs: see `Inversion` and `DefectTask`.

    Raises:
        UserError: an option out of range.
    """

    def __init__(
        self, base: str, anomaly_tokens: int = 4, generation: MaskGeneration | None = None, **kwargs: Any
    ) -> None:
        if kwargs.get("spatial_tokens"):
            raise UserError("model.init_args.spatial_tokens: MaskDiffusion makes masks, it is not told any; leave it 0")
        super().__init__(base, anomaly_tokens=anomaly_tokens, **kwargs)
        self.save_hyperparameters(ignore=["generation"], logger=False)
        self.generation = generation or MaskGeneration()
        self._jobs: list[tuple[int, int]] = []  # row of the pair, number of the mask
        self._rules: dict[tuple[str, str], MaskRules] = {}
        self._rejected: dict[tuple[int, int], Counter[str]] = {}

    @property
    def title(self) -> str:
        """What the start-up screen calls it."""
        pairs = "" if self.pairs is None else f" of {len(self.pairs)} (category, type) pairs"
        return f"MaskDiffusion{pairs} on {self.base_source}" + (f", LoRA of rank {self.lora}" if self.lora else "")

    def shown(self, images: Tensor, masks: Tensor) -> Tensor:
        """The masks."""
        return masks.expand(-1, 3, -1, -1)

    def loss(self, output: Tensor, target: Tensor, masks: Tensor, weights: Tensor | None) -> Tensor:
        """Squared error of the whole picture."""
        return masked_mse(output, target, None, weights=weights)

    # --- generation ---

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """With the checkpoint the pairs are known, and what there is to make of them."""
        super().on_load_checkpoint(checkpoint)
        if self._trainer is not None and self._trainer.state.fn == "predict":
            assert self.pairs is not None
            categories = {category for category, _ in self.pairs}
            chosen = choose_pairs(self.pairs, self.generation.types, categories)
            numbers = range(self.generation.count)
            self._jobs = [(self.pairs.index(pair), number) for pair in chosen for number in numbers]
            groups = -(-len(self._jobs) // self.generation.batch)
            self.data.samples["predict"] = [self.data.samples["train"][0]] * groups
            self.data.serve_images = False

    @property
    def _root(self) -> Path:
        output = self.generation.output
        return Path(output).expanduser() if output else Path(self.trainer.default_root_dir) / FOLDER

    def on_predict_start(self) -> None:
        """Take the rules from the real masks."""
        positions = defect_positions(self)
        self._rules = rules_of(
            {
                pair: [(name, self.data.original("train", i)[1] > 0) for i, name in found]
                for pair, found in positions.items()
            }
        )
        settings = {key: getattr(self.generation, key) for key in ("sampler", "steps", "eta")}
        self._sampler = make_sampler(self.network, {**settings, "strength": 1.0})

    @torch.no_grad()
    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Make some groups of masks, those that are there stay; the groups' numbers."""
        size = self.generation.batch
        for group in batch["index"].tolist():
            self._make(self._jobs[group * size : (group + 1) * size])
        groups: Tensor = batch["index"]
        return groups

    def _make(self, jobs: list[tuple[int, int]]) -> None:
        assert self.pairs is not None
        open_jobs = {job for job in jobs if not self._path(job).is_file()}
        for attempt in range(self.generation.tries):
            if not open_jobs:
                return
            for job, mask in zip(jobs, self._sampled(jobs, attempt), strict=True):
                if job not in open_jobs:
                    continue
                fault = self._rules[self.pairs[job[0]]].fault(mask, np.ones_like(mask))
                if fault is None:
                    write_whole(self._path(job), png(mask))
                    open_jobs.remove(job)
                else:
                    self._rejected.setdefault(job, Counter())[fault] += 1

    def _path(self, job: tuple[int, int]) -> Path:
        assert self.pairs is not None
        return self._root.joinpath(*self.pairs[job[0]], f"{job[1]:05d}.png")

    def _sampled(self, jobs: list[tuple[int, int]], attempt: int) -> Any:
        """(J, H, W) bool."""
        base, options = self.network, self.generation
        height, width = self.data.image_size
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        streams = [generators(seed, [pair], number * options.tries + attempt)[0] for pair, number in jobs]
        pairs = torch.tensor([pair for pair, _ in jobs], device=self.device)

        def draw(*shape: int) -> Tensor:
            return torch.stack([torch.randn(*shape[1:], generator=stream) for stream in streams])

        told = self.states(pairs, torch.zeros(len(jobs), 1, height, width, device=self.device), draw)
        untold = self.unconditional(len(jobs))
        latents = sample(
            guided(
                lambda state, t: base.unet(state, t, told).sample,
                lambda state, t: base.unet(state, t, untold).sample,
                options.guidance,
            ),
            self._sampler,
            base.prediction,
            (base.channels, height // base.factor, width // base.factor),
            streams,
            told,
        )
        white = ((base.decode(latents) + 1) / 2).mean(dim=1)
        return (white > options.threshold).cpu().numpy()

    def on_predict_epoch_end(self) -> None:
        """Gather what was rejected."""
        told: list[Any] = [None] * self.trainer.world_size
        if self.trainer.world_size > 1:
            torch.distributed.all_gather_object(told, self._rejected)
        else:
            told = [self._rejected]
        self._rejected = {job: counts for part in told for job, counts in part.items()}

    def write_results(self, folder: Path, stage: str) -> None:
        """`masks.csv` with the counts of each pair, and a sheet of real and new masks; rank 0 only."""
        assert self.pairs is not None
        rows, cells = [], []
        for row in sorted({pair for pair, _ in self._jobs}):
            paths = [path for job in self._jobs if job[0] == row and (path := self._path(job)).is_file()]
            faults: Counter[str] = sum((c for job, c in self._rejected.items() if job[0] == row), Counter())
            told = "; ".join(f"{times} {fault}" for fault, times in faults.most_common())
            rows.append(("/".join(self.pairs[row]), self.generation.count, len(paths), told))
            cells += self._cells(row, paths)
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows([("pair", "asked", "made", "rejected"), *rows])
        write_whole(self._root / COUNTS, stream.getvalue().encode())
        figure = folder / "figures" / "masks.png"
        figure.parent.mkdir(parents=True, exist_ok=True)
        sheet(cells, title="Real and generated masks", columns=2, size=96).save(figure)
        lines = [
            f"{pair:30} {made} of {asked}" + (f"   rejected: {why}" if why else "") for pair, asked, made, why in rows
        ]
        print("\n" + "\n".join(lines) + f"\n\nmasks   {self._root}\nfigure  {figure}\n")

    def _cells(self, row: int, paths: list[Path]) -> list[Cell]:
        assert self.pairs is not None
        pair, samples = self.pairs[row], self.data.samples["train"]
        real = [i for i, s in enumerate(samples) if (s.category, s.defect_type, s.source) == (*pair, "real")][:8]
        size = self.data.image_size
        panels = [mask_of(self.data, "train", i, size).numpy() > 0 for i in real], [read_mask(p) for p in paths[:8]]
        return [
            Cell([np.repeat(255 * mask.astype(np.uint8)[..., None], 3, 2) for mask in masks] or ["none"],
                 [[Words(f"{what} {pair[1]}")]])
            for what, masks in zip(("real", "generated"), panels, strict=True)
        ]  # fmt: skip
