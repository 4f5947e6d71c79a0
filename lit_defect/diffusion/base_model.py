"""A pretrained latent diffusion model of diffusers, opened as the frozen base that others build upon.

    base = LatentBase.open("stable-diffusion-v1-5/stable-diffusion-v1-5")    # or a folder that a pipeline was saved to
    latents = base.encode(pictures)                                          # (B, 3, H, W) in [-1, 1]
    noise = base.unet(base.process.add_noise(latents, e, t), t, states).sample

Any pipeline folder with an AutoencoderKL, a UNet2DConditionModel, a tokenizer and one text encoder will do: Stable
Diffusion 1.x and 2.x, the older text2img LDM (whose folders are called `vqvae` and `bert`), or a `LatentDiffusion`
of one's own.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_defect.diffusion.pipeline_files import KEY, pipeline_folder, read_index, reason, variant, variants
from lit_defect.diffusion.process import ForwardProcess, Prediction
from lit_defect.errors import UserError
from lit_defect.files import whole_file
from lit_defect.generation.store import find_trained_on
from lit_defect.nets.fitting import fingerprint

_PARTS = {"vae": ("vae", "vqvae"), "unet": ("unet",), "text_encoder": ("text_encoder", "bert")}
_IN_FILES = "text_model."
_FOLDERS = (*itertools.chain(*_PARTS.values()), "tokenizer", "scheduler")


class LatentBase(nn.Module):
    """Autoencoder, text-conditioned U-Net, text encoder and tokenizer, frozen.

    Pictures go through the autoencoder one at a time: its memory, at 512 px the most of all, does not grow with their
    number, and what it makes of a picture does not depend on the others of its batch.

    Args:
        vae: diffusers' AutoencoderKL.
        unet: diffusers' UNet2DConditionModel.
        text_encoder: token ids (B, L) -> states (B, L, D).
        tokenizer: of transformers.
        scheduler: configuration of the scheduler it was trained with.
        source: where it came from.

    Attributes:
        process: its forward process.
        prediction: what the U-Net answers: `epsilon`, `v_prediction` or `sample`.
        channels: of the latents.
        factor: pixels along a side of one place of the latents.
        multiple: pixels that the sides of a picture must be a multiple of.
        width: of a token's embedding.
        fingerprint: SHA-256 of all its weights.
        trained_on: name and group of every picture of one's own that it was trained on; empty for other people's.
    """

    def __init__(self, vae: Any, unet: Any, text_encoder: Any, tokenizer: Any, scheduler: Any, source: str) -> None:
        super().__init__()
        self.vae: Any = vae
        self.vae.enable_slicing()
        self.unet: Any = unet
        self.text_encoder: Any = text_encoder
        self.tokenizer = tokenizer
        self.source = source
        self.trained_on: set[tuple[str, str]] = set()
        self.process = ForwardProcess.of_scheduler(scheduler)
        self.prediction: Prediction = scheduler.get("prediction_type", "epsilon")
        self.channels = int(self.vae.config.latent_channels)
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.scale = float(self.vae.config.scaling_factor)
        self.shift = float(getattr(self.vae.config, "shift_factor", None) or 0.0)
        self.multiple = self.factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        self.width = int(self.text_encoder.get_input_embeddings().weight.shape[1])
        _check_agreement(self)
        self.fingerprint = fingerprint(self.state_dict())
        self.requires_grad_(False).eval()

    @classmethod
    def open(cls, source: str) -> LatentBase:
        """Load a base from a folder, the run of a `LatentDiffusion`, or the hub.

        Weights become float32; those of a variant `fp16` are taken where there are no others.

        Args:
            source: folder of a saved pipeline, a run folder that holds one as `pipeline`, or the name of a repository.

        Raises:
            UserError: nothing there, a hub out of reach, a pipeline of another kind, or one that is damaged.
        """
        folder = pipeline_folder(source, lambda index: _needed(source, index), _is_whole)
        try:
            index = read_index(folder)
            _needed(source, index)
            parts = {name: _load(folder, index, name) for name in _PARTS}
            tokenizer = _load_tokenizer(folder, index)
            scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
            trained_on = find_trained_on(folder)
        except UserError:
            raise
        except Exception as error:  # a damaged folder fails in as many ways as there are files
            raise UserError(
                f"{KEY}: the pipeline in {folder} cannot be opened ({reason(error)}); copy or train it again"
            ) from error
        base = cls(**parts, tokenizer=tokenizer, scheduler=scheduler, source=source)
        base.trained_on = trained_on
        return base

    @property
    def embeddings(self) -> Tensor:
        """(vocabulary, D) of the tokens."""
        weight: Tensor = self.text_encoder.get_input_embeddings().weight
        return weight

    def train(self, mode: bool = True) -> LatentBase:
        """A base is never trained: dropout stays off."""
        return super().train(False)

    def moments(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> mean and log variance of their latents, (B, 2 C, h, w), not scaled."""
        posterior = self.vae.encode(images).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents (B, C, h, w) of `moments`: the mean, or a draw by standard normal `noise` (B, C, h, w)."""
        mean, logvar = moments.chunk(2, dim=1)
        drawn = mean if noise is None else mean + (0.5 * logvar).exp() * noise
        return (drawn - self.shift) * self.scale

    def encode(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> the means of their latents (B, C, h, w), scaled."""
        return self.latents(self.moments(images))

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> pictures (B, 3, H, W), about [-1, 1], float32."""
        decoded: Tensor = self.vae.decode(latents / self.scale + self.shift).sample
        return decoded.float()

    def check_size(self, height: int, width: int) -> None:
        """Raises `UserError` if pictures of this size do not go through the autoencoder and the U-Net."""
        if height % self.multiple or width % self.multiple:
            near = [max(self.multiple, round(side / self.multiple) * self.multiple) for side in (height, width)]
            raise UserError(
                f"data.init_args.image_size = {height}x{width}: the sides must be multiples of {self.multiple} for the "
                f"base {self.source}, such as {near[0]}x{near[1]}"
            )


def save_pipeline(
    folder: Path, *, vae: Any, unet: Any, text_encoder: Any, tokenizer: Any, process: ForwardProcess, prediction: str
) -> None:
    """Write an ordinary StableDiffusionPipeline of these parts, which diffusers and `LatentBase.open` load."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from safetensors.torch import load_file, save
    from transformers.utils import logging

    logging.disable_progress_bar()
    scheduler: Any = DDIMScheduler(
        **process.settings,
        steps_offset=1,  # without effect under trailing steps; diffusers warns without it
        prediction_type=prediction,
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )
    pipeline: Any = StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    weights = folder / "text_encoder" / "model.safetensors"
    whole = as_in_files(load_file(weights))
    with whole_file(weights) as file:  # not into the file itself, of which the tensors may be a view
        file.write(save(whole, {"format": "pt"}))


def as_in_files(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a CLIPTextModel by the names that files have, which begin with `text_model.`.

    Since transformers 5.6 its modules do not, and what is saved of a new one lacks it, too: older versions would fill
    such a text encoder with random numbers, and other tools find nothing in it.
    """
    return {name if name.startswith(_IN_FILES) else _IN_FILES + name: value for name, value in state.items()}


def _is_whole(folder: Path, halves: bool) -> bool:
    """Whether a cached pipeline, of which a client may have fetched some files only, has all that is opened.

    Args:
        folder: of the pipeline.
        halves: whether weights in float16 will do.
    """
    allowed = (None, "fp16") if halves else (None,)
    weights = {part for part in itertools.chain(*_PARTS.values()) if variants(folder / part).intersection(allowed)}
    others = all((folder / part).is_dir() for part in ("tokenizer", "scheduler"))
    return others and all(weights.intersection(names) for names in _PARTS.values())


def _needed(source: str, index: Mapping[str, Any]) -> tuple[str, ...]:
    """Which folders of a pipeline are opened, half of which it has."""
    if index.get("text_encoder_2", [None, None])[1]:
        raise UserError(
            f"{KEY}: {source} has two text encoders, as Stable Diffusion XL, 3 and Flux; take a model with one"
        )
    return _FOLDERS


def _load(folder: Path, index: dict[str, Any], part: str) -> nn.Module:
    """One of the networks, in float32."""
    import diffusers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    name, kind = _entry(folder, index, _PARTS[part])
    expected = {"vae": "AutoencoderKL", "unet": "UNet2DConditionModel"}.get(part, kind)
    if kind != expected:
        raise UserError(f"{KEY}: the {name} in {folder} is a {kind}, expected a {expected}")
    factory: Any = getattr(diffusers, kind, None) or getattr(transformers, kind, None)
    if kind == "LDMBertModel":
        from diffusers.pipelines.latent_diffusion import pipeline_latent_diffusion

        factory = pipeline_latent_diffusion.LDMBertModel
    if factory is None:
        raise UserError(f"{KEY}: diffusers and transformers have no {kind}, the {name} in {folder}")
    options: dict[str, Any] = {"variant": variant(folder / name), "output_loading_info": True}
    if part == "text_encoder":
        options["dtype"] = torch.float32  # else transformers rounds to what config.json names
    loaded, report = factory.from_pretrained(folder / name, **options)
    if report["missing_keys"]:  # both libraries fill them with random numbers
        raise UserError(
            f"{KEY}: the weights of the {name} in {folder} lack {', '.join(sorted(report['missing_keys']))}"
        )
    network: nn.Module = loaded.float()
    return network


def _load_tokenizer(folder: Path, index: dict[str, Any]) -> Any:
    import transformers

    _, kind = _entry(folder, index, ("tokenizer",))
    factory: Any = getattr(transformers, kind, transformers.AutoTokenizer)
    return factory.from_pretrained(folder / "tokenizer")


def _entry(folder: Path, index: dict[str, Any], names: Sequence[str]) -> tuple[str, str]:
    """What a part is called in the index, of the names it may have, and its class."""
    for name in names:
        if index.get(name, [None, None])[1]:
            return name, str(index[name][1])
    raise UserError(f"{KEY}: the pipeline in {folder} has no {names[0]}: {', '.join(sorted(index))}")


def _check_agreement(base: LatentBase) -> None:
    """Raises `UserError` if the parts are not made for one another, or answer what has no name here."""
    wanted, known = int(base.unet.config.in_channels), base.channels
    if wanted != known:
        kind = "an inpainting model" if wanted == 2 * known + 1 else "a model that takes a picture beside the noise"
        raise UserError(
            f"{KEY}: the U-Net of {base.source} takes {wanted} channels, its autoencoder gives {known}: it is {kind}; "
            "take its text-to-image relative"
        )
    config = base.unet.config
    if config.class_embed_type or config.num_class_embeds or config.addition_embed_type:
        raise UserError(
            f"{KEY}: the U-Net of {base.source} is told more than a prompt, such as a picture (unCLIP) or a "
            "class; take a text-to-image model"
        )
    taken, given = config.cross_attention_dim, base.text_encoder.config.hidden_size
    if isinstance(taken, int) and taken != given:  # a list has one for each level
        raise UserError(
            f"{KEY}: the U-Net of {base.source} attends to states of width {taken}, its text encoder gives {given}: "
            "they belong to different models"
        )
    if base.prediction not in ("epsilon", "v_prediction", "sample"):
        raise UserError(
            f"{KEY}: the scheduler of {base.source} has prediction_type {base.prediction}; known are epsilon, "
            "v_prediction and sample"
        )
