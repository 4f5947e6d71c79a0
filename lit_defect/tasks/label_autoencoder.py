"""Trains the autoencoder of label maps that a latent refiner works on; it learns from the masks alone.

After Rombach et al. (CVPR 2022), on masks instead of pictures: cross-entropy of the reconstruction and a small KL
divergence. `DDPMRefiner` takes the run's folder `autoencoder`, or a checkpoint, as its option `latent`. The figures are
those of the reconstruction: the upper bound of what can come out of such latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import nll_loss

from lit_defect.diffusion.labels import VOID, one_hot
from lit_defect.errors import UserError
from lit_defect.nets.label_autoencoder import LabelAutoencoder
from lit_defect.tasks.base import Batch
from lit_defect.tasks.pixels import Answer, PixelTask, augmented, targets

FOLDER = "autoencoder"
_SCALED_BY = 512  # training masks, evenly spaced, that shift and scale of the latents come from


class MaskAutoencoder(PixelTask):
    """Autoencoder of the data module's masks, for a refiner that works on latents.

    Args:
        channels: of each level, from the finest; each level after the first halves the sides.
        latent_channels: of the latents.
        kl: weight of the KL divergence, where 1 is the variational bound of Kingma & Welling (ICLR 2014).
        kwargs: views, windows and classes as for `PixelTask`, the schedule as for `DefectTask`.

    Raises:
        UserError: an option out of range.
    """

    main = "autoencoder"
    exports = FOLDER

    def __init__(
        self,
        channels: tuple[int, ...] = (16, 32, 64),
        latent_channels: int = 4,
        kl: float = 1e-3,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 <= kl < math.inf:
            raise UserError(f"model.init_args.kl = {kl}: expected a number >= 0")
        self.save_hyperparameters(logger=False)
        self.channels = tuple(channels)
        self.latent_channels = latent_channels
        self.kl = kl
        self.autoencoder: LabelAutoencoder | None = None

    # --- construction ---

    @property
    def title(self) -> str:
        """What the start-up screen calls it."""
        return f"MaskAutoencoder of {self.classes} classes, {self.latent_channels} latent channels"

    @property
    def network(self) -> LabelAutoencoder:
        """The autoencoder, after `configure_model`."""
        if self.autoencoder is None:
            raise UserError("the network is not built yet: call configure_model, or load a checkpoint")
        return self.autoencoder

    def setup(self, stage: str) -> None:
        """Check that there are masks to learn from.

        Raises:
            UserError: as of `PixelTask`; or new pictures, which have none.
        """
        super().setup(stage)
        if stage == "predict":
            raise UserError(
                "MaskAutoencoder says nothing of new pictures: use the verb test, or a refiner on top of it"
            )

    def configure_model(self) -> None:
        """Build the network."""
        if self.autoencoder is not None:
            return
        self.autoencoder = LabelAutoencoder(self.classes, self.channels, self.latent_channels)
        self.autoencoder.class_names = list(self.names)
        self.autoencoder.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        if self.compile_network:
            self.autoencoder.compile()

    def about(self) -> dict[str, Any]:
        """Size and settings."""
        return {
            "network_calls": 1,
            "parameters": {self.main: sum(parameter.numel() for parameter in self.network.parameters())},
            "settings": {"channels": list(self.channels), "latent_channels": self.latent_channels, "kl": self.kl},
        }

    # --- training ---

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of a batch of masks, per pixel, and the weighted KL divergence, per pixel too."""
        (labels,) = augmented([targets(batch, self.classes)], self.augment, self.crop)
        logits, divergence = self.network(one_hot(labels, self.classes))
        divergence = divergence.float().mean() / labels[0].numel()
        loss = _cross_entropy(logits.float().log_softmax(1), labels) + self.kl * divergence
        self.log("train/loss", loss, batch_size=len(labels), prog_bar=True)
        self.log("train/kl", divergence, batch_size=len(labels))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Within a fit, scale the latents, so that the checkpoint of this validation has it."""
        super().on_validation_epoch_start()
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._fit_scale()

    def on_train_epoch_end(self) -> None:
        """Scale the latents if the training ends here, before a checkpoint is written."""
        self.complete()

    def complete(self) -> None:
        """Scale the latents if the training is over; `LastCheckpoint` asks again when EarlyStopping has judged."""
        trainer = self.trainer
        ended = trainer.current_epoch + 1 == trainer.max_epochs or trainer.global_step == trainer.max_steps
        if ended or trainer.should_stop or not self.network.fitted:
            self._fit_scale()

    def export(self, path: Path) -> None:
        """Write the folder `autoencoder`."""
        self.network.save(path)

    def _fit_scale(self) -> None:
        """By training masks as they are, the same ones on all processes."""
        training, data = self.training, self.data
        loader, count = data.loader("train"), len(data.samples["train"])
        positions = np.unique(np.linspace(0, count - 1, min(count, _SCALED_BY)).round().astype(int)).tolist()

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for start in range(0, len(positions), data.eval_batch_size):
                batch = loader.batch(positions[start : start + data.eval_batch_size])
                labels = targets(batch, self.classes).to(self.device)
                yield one_hot(labels, self.classes), labels

        self.eval()
        with self.trainer.precision_plugin.forward_context():
            self.network.fit_scale(batches)
        self.train(training)

    # --- evaluation ---

    def answer(self, batch: Batch, stage: str) -> Answer:
        """The masks of a batch through the latents and back."""
        labels = one_hot(targets(batch, self.classes), self.classes)
        since = self.clock()
        probabilities = self.network.decode(self.network.encode(labels)).float().softmax(1)
        self.timed(self.main, since)
        return Answer({self.main: probabilities.argmax(1)}, probabilities)

    def validation_loss(self, batch: Batch, labels: Tensor, answer: Answer) -> Tensor:
        """Cross-entropy of the reconstruction."""
        return _cross_entropy(answer.probabilities.clamp(min=1e-12).log(), labels)


def _cross_entropy(logarithms: Tensor, labels: Tensor) -> Tensor:
    """Of log-probabilities (B, n, H, W), averaged over the pixels that are not void; 0 where all are."""
    total = nll_loss(logarithms, labels, ignore_index=VOID, reduction="sum")
    return total / (labels != VOID).sum().clamp(min=1)
