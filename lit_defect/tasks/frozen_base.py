"""What the tasks share that learn from a few pictures on a frozen latent diffusion model."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lit_defect.diffusion.base_model import LatentBase
from lit_defect.errors import UserError
from lit_defect.tasks.base import Batch, DefectTask
from lit_defect.tasks.few_shots import FewShots
from lit_defect.tasks.learnt_files import keep_learnt


class OnFrozenBase(DefectTask):
    """The base, which stays as it is; checkpoints without it; validation on pictures that do not train.

    Args:
        base: hub name, folder of a pipeline of diffusers, or run of a `LatentDiffusion`.
        kwargs: see `DefectTask`.
    """

    def __init__(self, base: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.base_source = base
        self.base: LatentBase | None = None
        self.learnt_from: set[tuple[str, str]] = set()  # name and group of each picture
        self._shots: dict[str, FewShots] = {}  # by split
        self._judged: Tensor

    @abstractmethod
    def _loss(self, shots: FewShots, rows: Tensor, views: Tensor) -> Tensor:
        """Of pictures in these rows and views, both (B,)."""

    @abstractmethod
    def learnt_with(self) -> dict[str, Any]:
        """The options that what is learnt depends on."""

    @property
    def network(self) -> LatentBase:
        """The base, after `configure_model`."""
        if self.base is None:
            raise UserError("the base is not open yet: call configure_model, or load a checkpoint")
        return self.base

    def open_base(self) -> LatentBase:
        """Raises `UserError` if it is not there, or cannot be opened."""
        with self.opening("base"):
            return LatentBase.open(self.base_source)

    def check_serving(self) -> None:
        """Raises `UserError` if pictures have no common size, or the precision is no mixed one."""
        if self.data.image_size is None:
            raise UserError(f"{type(self).__name__} needs pictures of one size: set data.init_args.image_size")
        if self.trainer.precision in ("16-true", "bf16-true", "64-true"):
            raise UserError(f"trainer.precision = {self.trainer.precision}: take 32-true, bf16-mixed or 16-mixed")

    def train(self, mode: bool = True) -> OnFrozenBase:
        """The base stays as it is."""
        super().train(mode)
        if self.base is not None:
            self.base.eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was learnt, with what options, and the hash of the base."""
        keep_learnt(self, checkpoint)

    def on_validation_epoch_start(self) -> None:
        """Sum of the losses, and number of pictures."""
        self._judged = torch.zeros(2, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The loss of pictures of what is learnt that do not train, where there are any.

        Each has steps and noise of its own, the same after each epoch, in any batch and on any process.
        """
        shots = self._shots.get("val")
        for index in batch["index"].tolist():
            if shots is not None and index in shots.row_of:
                torch.manual_seed(index)
                row = torch.tensor([shots.row_of[index]])
                loss = self._loss(shots, row, torch.zeros_like(row)).double()
                self._judged += torch.stack([loss, torch.ones_like(loss)])

    def on_validation_epoch_end(self) -> None:
        """The mean over the pictures of all processes; one of these may have had none."""
        total, count = self.trainer.strategy.reduce(self._judged, reduce_op="sum").tolist()  # type: ignore[union-attr, arg-type]
        if count:
            self.log("val/loss", total / count, prog_bar=True, sync_dist=True)
