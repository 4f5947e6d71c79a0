"""AnomalyDiffusion (Hu et al., AAAI 2024): a few defects are learnt, and put onto normal pictures with their masks.

`fit` learns vectors for each (category, defect type), an encoder of masks, and optionally LoRA, on a frozen latent
diffusion model. `predict` generates a data set in MVTec AD's layout: masks, blended sampling, the best of several
candidates pasted back so that outside its mask a picture is the normal one to the last bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lit_defect.errors import UserError
from lit_defect.generation.options import KEY, Generation
from lit_defect.generation.store import count
from lit_defect.losses.diffusion import alignment_loss, latent_mask, masked_mse
from lit_defect.tasks.base import Batch
from lit_defect.tasks.defect_generation import DefectGeneration
from lit_defect.tasks.generation_plan import Job, choose_pairs, plan
from lit_defect.tasks.generation_report import write_generated
from lit_defect.tasks.set_maker import InversionMaker

SOURCES = "sources"  # split of the data module that holds the normal pictures


class AnomalyDiffusion(InversionMaker):
    """Anomaly embeddings, spatial encoder, masked loss and attention re-weighting on any latent diffusion model.

    Args:
        base: hub name, folder of a pipeline of diffusers, or run of a `LatentDiffusion`.
        anomaly_tokens: k vectors for each pair; 8 in the paper.
        spatial_tokens: n vectors made of the mask; 4 in the paper, 0 for no spatial encoder.
        mask: of the loss at the resolution of the latents: `max` (a cell counts if any of its pixels does), `bilinear`
            (the authors': a defect of less than half a cell is not seen), or `off`.
        normalised: whether each picture's loss is divided by its mask's area; the authors' is not.
        alignment: weight of the attention that falls outside the mask (see `losses/diffusion.py`); 0 for none.
        generation: what `predict` makes.
        kwargs: see `Inversion` and `DefectTask`.

    Raises:
        UserError: an option out of range.
    """

    folder = "generated"

    def __init__(
        self,
        base: str,
        anomaly_tokens: int = 8,
        spatial_tokens: int = 4,
        mask: Literal["max", "bilinear", "off"] = "max",
        normalised: bool = True,
        alignment: float = 0.0,
        generation: Generation | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(base, anomaly_tokens=anomaly_tokens, spatial_tokens=spatial_tokens, **kwargs)
        self.save_hyperparameters(ignore=["generation"], logger=False)
        if alignment < 0:
            raise UserError(f"model.init_args.alignment = {alignment}: expected a weight, 0 or more")
        self.mask: Literal["max", "bilinear", "off"] = mask
        self.normalised = normalised
        self.alignment = alignment
        self.generation = generation or Generation()
        self._groups: list[list[Job]] = []
        self._maker: DefectGeneration | None = None

    # --- training ---

    def shown(self, images: Tensor, masks: Tensor) -> Tensor:
        """The pictures themselves."""
        return images

    def loss(self, output: Tensor, target: Tensor, masks: Tensor, weights: Tensor | None) -> Tensor:
        """Squared error inside the mask (Hu et al., eq. 4)."""
        places = None if self.mask == "off" else latent_mask(masks, output.shape[2:], self.mask)
        return masked_mse(output, target, places, self.normalised, weights)

    def _loss(self, *args: Any) -> Tensor:
        """With the alignment of the attention, where it is asked for."""
        if not self.alignment:
            return super()._loss(*args)
        shots, rows, views = args
        with self.cross.recording(self.positions) as maps:
            loss = super()._loss(*args)
        masks = shots.masks[rows, views].to(self.device).float()
        return loss + self.alignment * alignment_loss(maps, masks)

    # --- generation ---

    def setup(self, stage: str) -> None:
        """For `predict`, serve the plan's groups in place of a split.

        Raises:
            UserError: as for every `Inversion`; no normal pictures, or a split that is not taken.
        """
        super().setup(stage)
        if stage == "predict":
            data = self.data
            if data.predict_root is None:
                if data.predict_split != "test":  # the default, which is for tasks that look at pictures
                    raise UserError(
                        f"data.predict_split = {data.predict_split}: AnomalyDiffusion puts defects onto the normal "
                        "training pictures; leave it out, or name other pictures by data.predict_root"
                    )
                normal = [s for s in data.samples["train"] if s.label == data.normal_class and s.source == "real"]
            else:
                normal = list(data.samples["predict"])
                data.setup("fit")  # the real defects, whose masks are varied
            if not normal:
                raise UserError("there are no normal pictures to put defects on")
            self.serve_groups(**{SOURCES: normal})

    def plan_groups(self) -> None:
        """The jobs in groups that go through the network together.

        Raises:
            UserError: a type that was not learnt, or it can't be told whose pictures those of one's own are.
        """
        normal, options = self.data.samples[SOURCES], self.generation
        categories = [sample.category for sample in normal]
        assert self.pairs is not None
        here = {sample.category for sample in self.data.samples["train"]}  # data.category may leave out some
        chosen = choose_pairs([pair for pair in self.pairs if pair[0] in here] or self.pairs, options.types, categories)
        if set(categories) == {""} and len(products := sorted({category for category, _ in chosen})) > 1:
            raise UserError(
                f"data.predict_root: are these pictures of {' or '.join(products)}? Set data.category to theirs, and "
                f"{KEY}.output to a folder of their own"
            )
        jobs = plan(self.pairs, chosen, categories, options.count, self.seed)
        self._groups = [jobs[i : i + options.batch] for i in range(0, len(jobs), options.batch)]
        self._groups += [[]] * (self.trainer.world_size - len(self._groups))  # no process may be without one
        # One sample stands for a group: the loader gives each process its share of them.
        self.data.samples["predict"] = [normal[group[0].source if group else 0] for group in self._groups]

    def on_predict_start(self) -> None:
        """Open the data set; what is there already is not made again."""
        rank, pairs = self.trainer.global_rank, {job.pair for group in self._groups for job in group}
        with self.beginning():
            self._maker = DefectGeneration(self, self.generation, self.seed, self.root, SOURCES, rank, pairs)
        self._store = self._maker.store

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Make some groups of pictures; their numbers."""
        assert self._maker is not None
        for group in batch["index"].tolist():
            self._maker.make(self._groups[group])
        groups: Tensor = batch["index"]
        return groups

    def write_results(self, folder: Path, stage: str) -> None:
        """Counts and a sheet of real and generated defects; rank 0 only."""
        rows = self._store.merge()
        write_generated(self, self.root, rows, count(rows), folder)
