"""Trains the autoencoder of a latent diffusion model on one's own normal pictures: the first step of an own base.

After Rombach et al. (CVPR 2022, section 3.1): reconstruction plus a small KL divergence. Their perceptual and
adversarial terms need a network trained on other people's pictures; L1 and SSIM, which need none, stand in. The
pictures are varied by the same arbitrary edits that `LatentDiffusion` learns to describe, so that the latents can hold
a defect although none was seen.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_defect.anomalies import PseudoAnomaly
from lit_defect.diffusion.pipeline_files import variant
from lit_defect.errors import UserError
from lit_defect.generation.store import find_trained_on, write_trained_on
from lit_defect.runs import keep_previous, write_json
from lit_defect.tasks.base import Batch, DefectTask
from lit_defect.tasks.picture_sheets import picture_sheet
from lit_defect.tasks.pixels import Listed
from lit_defect.tasks.variations import Variations
from lit_defect.tasks.views import unit_range

FOLDER = "autoencoder"
_SCALED_BY = 256  # training pictures that the scale of the latents comes from


class ImageAutoencoder(DefectTask):
    """An AutoencoderKL of diffusers, trained from scratch; the run's folder `autoencoder` holds the result.

    Args:
        channels: of each level, from the finest; each level after the first halves the sides.
        layers: residual blocks of a level.
        latent_channels: of the latents.
        kl: weight of the KL divergence per latent value.
        ssim: weight of 1 - SSIM beside L1.
        anomaly: makes the edits; null for spots, scars and clouds of any tone.
        edited: share of the pictures with an edit, less those that the gate of `anomaly` rejects.
        masks: share of the pictures that are the mask of an edit instead, for `MaskDiffusion`.
        augment: views that training draws from: `none`, `flip`, `flips`, `dihedral`.
        light: share by which brightness and contrast change, at most.
        kwargs: see `DefectTask`.

    Raises:
        UserError: an option out of range.
    """

    exports = FOLDER

    def __init__(
        self,
        channels: tuple[int, ...] = (64, 128, 128),
        layers: int = 1,
        latent_channels: int = 4,
        kl: float = 1e-6,
        ssim: float = 0.5,
        anomaly: PseudoAnomaly | None = None,
        edited: float = 0.4,
        masks: float = 0.1,
        augment: Listed = "flips",
        light: float = 0.2,
        monitor: str | None = "val/loss",
        **kwargs: Any,
    ) -> None:
        super().__init__(monitor=monitor, **kwargs)
        self.save_hyperparameters(ignore=["anomaly"], logger=False)
        if not channels or any(c < 8 or c % 8 for c in channels):
            raise UserError(f"model.init_args.channels = {list(channels)}: expected multiples of 8")
        for key, count in (("layers", layers), ("latent_channels", latent_channels)):
            if count < 1:
                raise UserError(f"model.init_args.{key} = {count}: expected at least 1")
        for key, number in (("kl", kl), ("ssim", ssim)):
            if not 0 <= number < math.inf:
                raise UserError(f"model.init_args.{key} = {number}: expected a number >= 0")
        self.variations = Variations(anomaly, edited=edited, masks=masks, augment=augment, light=light)
        self.channels = tuple(channels)
        self.layers = layers
        self.latent_channels = latent_channels
        self.kl = kl
        self.ssim = ssim
        self.vae: Any = None

    @property
    def title(self) -> str:
        """What the start-up screen calls it."""
        return f"ImageAutoencoder: latents of {self.latent_channels} channels at 1/{2 ** (len(self.channels) - 1)}"

    def setup(self, stage: str) -> None:
        """Check the pictures' size.

        Raises:
            UserError: pictures of no common size, or sides that cannot be halved so often.
        """
        super().setup(stage)
        check_normal(self, stage)
        factor = 2 ** (len(self.channels) - 1)
        if any(side % factor for side in self.data.image_size):
            raise UserError(f"data.init_args.image_size = {self.data.image_size}: expected multiples of {factor}")

    def configure_model(self) -> None:
        """Build the autoencoder."""
        if self.vae is not None:
            return
        from diffusers import AutoencoderKL

        levels = len(self.channels)
        self.vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=self.channels,
            layers_per_block=self.layers,
            latent_channels=self.latent_channels,
            norm_num_groups=8,
            sample_size=max(self.data.image_size),
            mid_block_add_attention=False,  # a level of it costs more than it gives on small pictures
        )
        self.vae.to(memory_format=torch.channels_last)

    def reconstruct(self, images: Tensor, *, drawn: bool) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, H, W) in [0, 1] -> what comes back, and the KL divergence per latent value ()."""
        posterior = self.vae.encode((2 * images - 1).contiguous(memory_format=torch.channels_last)).latent_dist
        latents = posterior.sample() if drawn else posterior.mode()
        return (self.vae.decode(latents).sample.float() + 1) / 2, posterior.kl().float().mean() / latents[0].numel()

    def loss(self, found: Tensor, images: Tensor, divergence: Tensor) -> Tensor:
        """L1 + ssim (1 - SSIM) + kl KL."""
        from kornia.metrics import ssim

        similarity = ssim(found, images, window_size=7).mean()
        return (found - images).abs().mean() + self.ssim * (1 - similarity) + self.kl * divergence

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch of varied pictures."""
        images = self.variations(unit_range(batch["image"]))
        found, divergence = self.reconstruct(images, drawn=True)
        loss = self.loss(found, images, divergence)
        self.log("train/loss", loss, batch_size=len(images), prog_bar=True)
        self.log("train/kl", divergence, batch_size=len(images))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and peak signal-to-noise ratio (dB) of plain pictures."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """The same of the test pictures, defective ones beside good ones."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Batch, stage: str) -> None:
        images = unit_range(batch["image"])
        found, divergence = self.reconstruct(images, drawn=False)
        self.log(
            f"{self.results_name(stage)}/loss",
            self.loss(found, images, divergence),
            batch_size=len(images),
            sync_dist=True,
        )
        self.collect(index=batch["index"], error=(found.clamp(0, 1) - images).square().mean((1, 2, 3)))

    def on_validation_epoch_end(self) -> None:
        """Log the mean PSNR."""
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        """Keep the PSNR of good and of defective pictures."""
        self._finish("test")

    def _finish(self, stage: str) -> None:
        kept = self.gathered()
        ratio = -10 * kept["error"].double().clamp(min=1e-10).log10()
        self.log(f"{self.results_name(stage)}/psnr", float(ratio.mean()), sync_dist=True)
        samples = self.data.samples[stage]
        good = torch.tensor([samples[i].label == self.data.normal_class for i in kept["index"].tolist()])
        self._figures = {
            f"psnr_{name}": float(ratio[chosen].mean())
            for name, chosen in (("good", good), ("defective", ~good))
            if chosen.any()
        }

    def write_results(self, folder: Path, stage: str) -> None:
        """The figures as JSON, and pictures beside their reconstructions; rank 0 only."""
        name = self.results_name(stage)
        path = folder / f"{name}_metrics.json"
        keep_previous(path)
        write_json(path, {"task": type(self).__name__, "stage": name, "figures": self._figures})
        samples = self.data.samples[stage]
        positions = sorted({round(i * (len(samples) - 1) / 11) for i in range(12)})
        batch = self.data.transfer_batch_to_device(self.data.loader(stage).batch(positions), self.device, 0)
        images = unit_range(batch["image"])
        with torch.no_grad():
            found, _ = self.reconstruct(images, drawn=False)
        path = folder / "figures" / f"{name}_reconstructions.png"
        picture_sheet(path, [images, found.clamp(0, 1)], batch["defect_type"], "Pictures and what the latents keep")
        print(f"\n{'  '.join(f'{name} {value:.1f} dB' for name, value in self._figures.items())}\nfigure  {path}\n")

    def export(self, path: Path) -> None:
        """Scale the latents to unit variance and write the folder `autoencoder`.

        With it goes the list of the pictures that it was trained on.

        Raises:
            UserError: the training has failed.
        """
        samples = self.data.samples["train"]
        positions = sorted({round(i * (len(samples) - 1) / (_SCALED_BY - 1)) for i in range(_SCALED_BY)})
        loader, latents = self.data.loader("train"), []
        with torch.no_grad():
            for start in range(0, len(positions), self.data.eval_batch_size):
                batch = loader.batch(positions[start : start + self.data.eval_batch_size])
                images = 2 * unit_range(batch["image"].to(self.device)) - 1
                latents.append(self.vae.encode(images).latent_dist.mode().float().flatten())
        spread = float(torch.cat(latents).std())
        if not 0 < spread < math.inf:
            raise UserError(
                f"the latents of the training pictures have a standard deviation of {spread}, and nothing can be built "
                "upon them; train again with a smaller model.init_args.lr"
            )
        self.vae.register_to_config(scaling_factor=round(1 / spread, 5))
        write_trained_on(path, ((sample.name, sample.group) for sample in samples))
        self.vae.save_pretrained(path)


def check_normal(task: DefectTask, stage: str) -> None:
    """Raises `UserError` if a base cannot be trained on what the data module gives."""
    name, data = type(task).__name__, task.data
    if data is None or data.normal_class is None:
        raise UserError(f"{name} learns from normal pictures: it needs a data module that has a good class")
    if data.image_size is None:
        raise UserError(f"{name} needs pictures of one size: set data.init_args.image_size")
    defects = sum(sample.label != data.normal_class for sample in data.samples["train"])
    if stage == "fit" and defects:
        raise UserError(
            f"{defects} of the training pictures have a defect, and {name} learns from normal ones only: set "
            "data.init_args.setting to one_class"
        )


def open_autoencoder(source: str) -> tuple[Any, set[tuple[str, str]]]:
    """An AutoencoderKL from a run folder, a folder of its own or a pipeline's, and what it was trained on.

    Raises:
        UserError: nothing there, or damaged.
    """
    from diffusers import AutoencoderKL

    path = Path(source).expanduser()
    folder = next((f for f in (path, path / FOLDER, path / "vae") if (f / "config.json").is_file()), None)
    if folder is None:
        raise UserError(
            f"model.init_args.autoencoder: {path} is no run of an ImageAutoencoder that has ended, and no folder of an "
            "AutoencoderKL; train one by experiments/anomaly_diffusion/autoencoder_*.yaml"
        )
    trained_on = find_trained_on(folder.parent if folder.name == "vae" else folder)  # a pipeline has one for all parts
    try:
        vae, report = AutoencoderKL.from_pretrained(folder, variant=variant(folder), output_loading_info=True)
        if report["missing_keys"]:  # diffusers goes on with random numbers
            raise ValueError(f"its weights lack {', '.join(sorted(report['missing_keys'])[:3])}")
        return vae.float(), trained_on
    except Exception as error:  # a damaged folder fails in as many ways as there are bytes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model.init_args.autoencoder: {folder} cannot be opened ({reason})") from error
