"""An autoencoder of label maps, so that a refiner may work on latents (after Rombach et al., CVPR 2022).

Label maps (B, n, H, W) hold +1 for the class of a pixel, -1 for the others and 0 for void (`diffusion.labels.one_hot`).
The network is diffusers' AutoencoderKL, small, without attention: label maps are local, and a picture of any size fits.

On disk it is a folder that diffusers opens as well:

    config.json, diffusion_pytorch_model.safetensors    AutoencoderKL.from_pretrained(folder)
    label_autoencoder.json                              class names and the largest latent
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_defect.errors import UserError

ABOUT = "label_autoencoder.json"
FORMAT = "lit_defect label autoencoder"
VERSION = 1
_LEAST_GROUP = 4  # channels that one GroupNorm group has at least: fewer would forget of which class a region is
_MARGIN = 1.1  # between the largest latent of the training set and the limit


class LabelAutoencoder(nn.Module):
    """Label maps to latents and back.

    The latents are shifted and scaled as diffusion wants them: mean 0 in each channel and variance 1 over all, by
    statistics in which every class weighs the same. A defect that covers 1 % of the pixels would else lie ten standard
    deviations from the background, and the background at no distance from 0; so both lie near 1, as +1 and -1 do in a
    label map.

    Args:
        classes: n.
        channels: of each level, from the finest; each level after the first halves the sides.
        latent_channels: c.

    Attributes:
        factor: pixels along a side of one place of a latent.
        class_names: of the n classes; None where they are not known.
        shift: (c,) mean of the latents before scaling.
        scale: () factor to variance 1.
        largest: () absolute value that a scaled latent of the training set reaches; nan before `fit_scale`.

    Raises:
        UserError: an option out of range.
    """

    shift: Tensor
    scale: Tensor
    largest: Tensor

    def __init__(self, classes: int, channels: Sequence[int] = (16, 32, 64), latent_channels: int = 4) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"a label map has two classes at least, not {classes}")
        if len(channels) < 2 or min(channels) < 1:
            raise UserError(
                f"model.init_args.channels = {list(channels)}: expected at least two levels, of at least 1 channel"
            )
        if latent_channels < 1:
            raise UserError(f"model.init_args.latent_channels = {latent_channels}: expected at least 1")
        import diffusers

        levels = len(channels)
        model: Any = diffusers.AutoencoderKL
        self.vae = model(
            in_channels=classes,
            out_channels=classes,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(channels),
            layers_per_block=1,
            latent_channels=latent_channels,
            norm_num_groups=_groups(channels),
            mid_block_add_attention=False,
        )
        self.classes = classes
        self.channels = tuple(channels)
        self.latent_channels = latent_channels
        self.factor = 2 ** (levels - 1)
        self.class_names: list[str] | None = None
        self.register_buffer("shift", torch.zeros(latent_channels))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("largest", torch.tensor(math.nan))

    @property
    def fitted(self) -> bool:
        """Whether `fit_scale` has seen the training set."""
        return bool(self.largest.isfinite())

    @property
    def limit(self) -> float:
        """A scaled latent further out is none of a label map; infinite before `fit_scale`."""
        return _MARGIN * float(self.largest) if self.fitted else math.inf

    def encode(self, labels: Tensor) -> Tensor:
        """Label maps (B, n, H, W) -> scaled latents (B, c, H / factor, W / factor), the means of their distributions.

        Raises:
            UserError: a side that is no multiple of `factor`.
        """
        return (self._posterior(labels).mean - self.shift[:, None, None]) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, c, h, w) -> logits (B, n, h * factor, w * factor)."""
        logits: Tensor = self.vae.decode(latents / self.scale + self.shift[:, None, None]).sample
        return logits

    def forward(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Label maps (B, n, H, W) -> logits (B, n, H, W) from latents drawn at random, and KL divergence (B,) in nats.

        Kingma & Welling, ICLR 2014, equation 7; the divergence is that from a standard normal distribution.
        """
        posterior = self._posterior(labels)
        drawn = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
        return self.vae.decode(drawn).sample, posterior.kl()

    @torch.no_grad()
    def fit_scale(self, batches: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> None:
        """Set shift and scale by the latents of the training set.

        The class of a latent is that of the pixel in the middle of its block; void ones do not count. Mean and variance
        are those of each class, averaged over the classes that occur.

        Args:
            batches: () -> label maps (B, n, H, W) with their class ids (B, H, W), 255 void, batch by batch.

        Raises:
            UserError: no pixel has a class.
        """
        count = torch.zeros(self.classes, dtype=torch.float64)
        first = torch.zeros(self.classes, self.latent_channels, dtype=torch.float64)
        second = torch.zeros(self.classes, dtype=torch.float64)
        low = torch.full((self.latent_channels,), math.inf, dtype=torch.float64)
        high = -low
        for labels, ids in batches():
            latents = self._posterior(labels).mean.double().cpu().movedim(1, -1).flatten(0, 2)  # (places, c)
            middle = self.factor // 2
            kind = ids[:, middle :: self.factor, middle :: self.factor].cpu().flatten()
            known = kind < self.classes
            member = F.one_hot(kind[known], self.classes).double()  # (known places, n)
            count += member.sum(0)
            first += member.T @ latents[known]
            second += member.T @ latents[known].square().sum(1)
            low, high = torch.minimum(low, latents.amin(0)), torch.maximum(high, latents.amax(0))
        present = count > 0
        if not present.any():
            raise UserError("the training masks are void everywhere: check data.void and the masks' values")
        shift = (first[present] / count[present, None]).mean(0)
        square = (second[present] / count[present]).mean() / self.latent_channels
        variance = float(square - shift.square().mean())
        scale = 1 / math.sqrt(max(variance, 1e-12))
        self.shift.copy_(shift)
        self.scale.fill_(scale)
        self.largest.fill_(float(torch.maximum(high - shift, shift - low).max()) * scale)

    def save(self, folder: Path | str) -> None:
        """Write the folder, so that a reader sees all of it or nothing.

        Raises:
            UserError: the folder exists, or the latents have no scale yet.
        """
        folder = Path(folder)
        if folder.exists():
            raise UserError(f"{folder} exists and is not overwritten; choose another folder")
        if not self.fitted:
            raise UserError("the label autoencoder has no scale of its latents yet: train it, or call fit_scale")
        self.vae.register_to_config(
            scaling_factor=float(self.scale), latents_mean=self.shift.tolist(), latents_std=[1.0] * self.latent_channels
        )
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.with_name(f".{os.getpid()}.{folder.name}")
        try:
            self.vae.save_pretrained(temporary)
            about = {
                "format": FORMAT,
                "version": VERSION,
                "class_names": self.class_names,
                "largest": float(self.largest),
            }
            (temporary / ABOUT).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    @classmethod
    def load(cls, path: Path | str) -> LabelAutoencoder:
        """The autoencoder of a folder that `save` wrote, or of a checkpoint of the task `MaskAutoencoder`.

        Raises:
            UserError: no such path, or something else in it.
        """
        path = Path(path).expanduser()
        if not path.exists():
            raise UserError(
                f"label autoencoder: there is no {path}; give the folder `autoencoder` of a run of MaskAutoencoder, "
                "or one of its checkpoints"
            )
        loaded = cls._from_folder(path) if path.is_dir() else cls._from_checkpoint(path)
        if not loaded.fitted:
            raise UserError(f"label autoencoder: {path} was written before the first epoch ended, without a scale")
        return loaded.eval()

    @classmethod
    def _from_folder(cls, folder: Path) -> LabelAutoencoder:
        import diffusers

        model: Any = diffusers.AutoencoderKL
        try:
            about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            if about.get("format") != FORMAT or about.get("version") != VERSION:
                raise ValueError(f"{ABOUT} is of another format or version")
            vae = model.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
            config = vae.config
            loaded = cls(config.in_channels, config.block_out_channels, config.latent_channels)
            loaded.vae = vae
            loaded.shift.copy_(torch.tensor(config.latents_mean))
            loaded.scale.fill_(config.scaling_factor)
            loaded.largest.fill_(about["largest"])
            loaded.class_names = about["class_names"]
        except Exception as error:  # diffusers' own errors share no base class
            raise UserError(f"label autoencoder: {folder} holds none ({type(error).__name__}: {error})") from None
        return loaded

    @classmethod
    def _from_checkpoint(cls, file: Path) -> LabelAutoencoder:
        try:
            stored: Any = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file fails in as many ways as there are bytes
            raise UserError(f"label autoencoder: {file} cannot be read ({type(error).__name__})") from None
        options = stored.get("hyper_parameters", {}) if isinstance(stored, Mapping) else {}
        weights = stored.get("state_dict", {}) if isinstance(stored, Mapping) else {}
        own = {k.removeprefix("autoencoder."): v for k, v in weights.items() if k.startswith("autoencoder.")}
        if not own or not {"class_names", "channels", "latent_channels"} <= set(options):
            raise UserError(f"label autoencoder: {file} is no checkpoint of the task MaskAutoencoder")
        loaded = cls(len(options["class_names"]), options["channels"], options["latent_channels"])
        loaded.load_state_dict(own)
        loaded.class_names = list(options["class_names"])
        return loaded

    def _posterior(self, labels: Tensor) -> Any:
        height, width = labels.shape[-2:]
        if height % self.factor or width % self.factor:
            raise UserError(
                f"data.image_size: label maps of {height} x {width} pixels; one latent stands for {self.factor} x "
                f"{self.factor}, so the sides (and model.init_args.crop) must be multiples of {self.factor}"
            )
        return self.vae.encode(labels).latent_dist


def _groups(channels: Sequence[int]) -> int:
    """Of GroupNorm: as many as leave each group `_LEAST_GROUP` channels at every level."""
    common = math.gcd(*channels)
    return next((g for g in range(common // _LEAST_GROUP, 0, -1) if common % g == 0), 1)
