"""A small text-conditioned latent diffusion model, trained from scratch on one's own normal pictures.

For factories without network or without the right to use Stable Diffusion: the result is an ordinary pipeline of
diffusers (the run's folder `pipeline`), which `AnomalyDiffusion` and any tool that reads Stable Diffusion open as their
base. After Rombach et al. (CVPR 2022); what is particular are the captions (`diffusion/captions.py`), measured in the
pictures and in arbitrary edits of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from lit_defect.anomalies import PseudoAnomaly
from lit_defect.diffusion.base_model import save_pipeline
from lit_defect.diffusion.captions import longest_caption, make_tokenizer, vocabulary
from lit_defect.diffusion.labels import generators
from lit_defect.diffusion.process import ForwardProcess
from lit_defect.diffusion.prompts import LONGEST, encode_prompt, text_states
from lit_defect.errors import UserError
from lit_defect.generation.store import write_trained_on
from lit_defect.losses.diffusion import masked_mse, min_snr_weights, offset_noise
from lit_defect.nets.averaging import running_mean
from lit_defect.nets.fitting import fingerprint
from lit_defect.tasks.base import Batch, DefectTask
from lit_defect.tasks.image_autoencoder import check_normal, open_autoencoder
from lit_defect.tasks.latent_bank import LatentBank, fill_bank
from lit_defect.tasks.picture_sheets import picture_sheet
from lit_defect.tasks.pixels import Listed
from lit_defect.tasks.prompt_samples import sample_prompts
from lit_defect.tasks.variations import Variations, spoken
from lit_defect.tasks.views import unit_range
from lit_defect.transfer import sent

FOLDER = "pipeline"
_SHOWN = 12  # samples drawn at the end


class LatentDiffusion(DefectTask):
    """U-Net, text encoder and tokenizer on the latents of an autoencoder.

    Args:
        autoencoder: run of an `ImageAutoencoder`, or a folder with an AutoencoderKL of diffusers.
        channels: of the U-Net's levels.
        layers: residual blocks of a level.
        heads: of each attention.
        text_width: of a token.
        text_layers: of the text encoder.
        prompt_length: tokens of a prompt, start and end among them; 12 of them are AnomalyDiffusion's.
        words: what each category is called in a prompt; null for its name.
        anomaly: makes the edits; null for spots, scars and clouds of any tone.
        edited: share of the pictures with an edit, less those that the gate of `anomaly` rejects.
        masks: share of the pictures that are the mask of an edit instead.
        variants: of each training picture, encoded once; null draws and encodes anew in each step.
        augment: views that they are drawn from.
        light: share by which their brightness and contrast change, at most.
        drop_caption: share of the steps with an empty prompt, for classifier-free guidance.
        prediction: what the U-Net answers: `epsilon`, `v_prediction` or `sample`.
        train_steps: T of the diffusion; its schedule is Stable Diffusion's.
        min_snr_gamma: of min-SNR weighting; null weighs all steps alike.
        offset_noise: strength of noise that is constant over a picture.
        ema_decay: of the running mean of the weights, which is saved.
        kwargs: see `DefectTask`.

    Raises:
        UserError: an option out of range, or an autoencoder that is not there.
    """

    verbs = ("fit",)
    judged_by = "what is built upon it"
    exports = FOLDER

    def __init__(
        self,
        autoencoder: str,
        channels: tuple[int, ...] = (128, 256, 384),
        layers: int = 1,
        heads: int = 4,
        text_width: int = 128,
        text_layers: int = 2,
        prompt_length: int = 32,
        words: dict[str, str] | None = None,
        anomaly: PseudoAnomaly | None = None,
        edited: float = 0.5,
        masks: float = 0.1,
        variants: int | None = 8,
        augment: Listed = "flips",
        light: float = 0.2,
        drop_caption: float = 0.1,
        prediction: Literal["epsilon", "v_prediction", "sample"] = "epsilon",
        train_steps: int = 1000,
        min_snr_gamma: float | None = 5.0,
        offset_noise: float = 0.0,
        ema_decay: float = 0.999,
        monitor: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(monitor=monitor, **kwargs)
        self.save_hyperparameters(ignore=["anomaly"], logger=False)
        counts = {"layers": layers, "heads": heads, "text_width": text_width, "text_layers": text_layers}
        for key, number in (counts if variants is None else {**counts, "variants": variants}).items():
            if number < 1:
                raise UserError(f"model.init_args.{key} = {number}: expected at least 1")
        if not 16 <= prompt_length <= LONGEST:
            raise UserError(f"model.init_args.prompt_length = {prompt_length}: expected 16 to {LONGEST}")
        if any(c % 16 or c % heads for c in channels) or not channels or text_width % heads:
            raise UserError(
                f"model.init_args: channels = {list(channels)} must be multiples of 16, they and text_width = "
                f"{text_width} of heads = {heads}"
            )
        if not 0 <= drop_caption < 1:
            raise UserError(f"model.init_args.drop_caption = {drop_caption}: expected a share, 0 <= s < 1")
        if min_snr_gamma is not None and not min_snr_gamma > 0:
            raise UserError(f"model.init_args.min_snr_gamma = {min_snr_gamma}: expected more than 0, or null")
        if not 0 <= offset_noise < math.inf:
            raise UserError(f"model.init_args.offset_noise = {offset_noise}: expected a number >= 0")
        self.variations = Variations(anomaly, edited=edited, masks=masks, augment=augment, light=light)
        self.process = ForwardProcess(train_steps, "scaled_linear", (0.00085, 0.012))
        self.autoencoder = autoencoder
        self.words = words or {}
        self.variants = variants
        self.prompt_length = prompt_length
        self.drop_caption = drop_caption
        self.prediction: Literal["epsilon", "v_prediction", "sample"] = prediction
        self.min_snr_gamma = min_snr_gamma
        self.offset = offset_noise
        self.ema_decay = ema_decay
        self.sizes: dict[str, Any] = {"channels": tuple(channels), "layers": layers, "heads": heads}
        self.text_sizes: dict[str, Any] = {"width": text_width, "layers": text_layers, "heads": heads}
        self.networks: Any = None
        self.trained_on: set[tuple[str, str]] = set()  # name and group of the autoencoder's pictures
        self._banks: dict[str, LatentBank] = {}

    # --- construction ---

    @property
    def title(self) -> str:
        """What the start-up screen calls it."""
        return f"LatentDiffusion on the latents of {self.autoencoder}"

    def setup(self, stage: str) -> None:
        """Open the autoencoder, and learn what the categories are called.

        Raises:
            UserError: defective training pictures, sizes that do not go through the networks, another stage than fit.
        """
        super().setup(stage)
        check_normal(self, stage)
        samples = [*self.data.samples["train"], *self.data.samples.get("val", [])]
        self.names = {s.category: self.words.get(s.category, spoken(s.category)) for s in samples}
        if unknown := sorted(set(self.words) - set(self.names)):
            raise UserError(f"model.init_args.words names {unknown}; the data has {sorted(self.names)}")
        kinds = {spoken(s.defect_type) for split in self.data.samples.values() for s in split if s.defect_type}
        self.tokenizer = make_tokenizer(
            [*vocabulary(self.names.values()), "anomaly defect damage", *sorted(kinds)], self.prompt_length
        )
        for name in self.names.values():
            if cut := encode_prompt(self.tokenizer, longest_caption(name), 0).cut:
                raise UserError(
                    f"model.init_args.prompt_length = {self.prompt_length}: the captions of a {name} do not fit "
                    f'("{cut}" is cut off); name a larger number'
                )

    def configure_model(self) -> None:
        """Build the networks."""
        if self.networks is not None:
            return
        with self.opening("autoencoder"):
            self.vae, self.trained_on = open_autoencoder(self.autoencoder)
        self.vae.requires_grad_(False)
        self.scale = float(self.vae.config.scaling_factor)
        self.shift = float(getattr(self.vae.config, "shift_factor", None) or 0.0)
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        multiple = factor * 2 ** (len(self.sizes["channels"]) - 1)
        if any(side % multiple for side in self.data.image_size):
            raise UserError(f"data.init_args.image_size = {self.data.image_size}: expected multiples of {multiple}")
        unet = make_unet(
            self.vae.config.latent_channels, max(self.data.image_size) // factor, self.text_sizes["width"], **self.sizes
        )
        encoder = make_text_encoder(self.tokenizer, **self.text_sizes)
        self.networks = nn.ModuleDict({"unet": unet, "text": encoder})
        self.ema = running_mean(self.networks, self.ema_decay)

    def train(self, mode: bool = True) -> LatentDiffusion:
        """Only U-Net and text encoder train."""
        super().train(mode)
        for part in ("vae", "ema"):
            if getattr(self, part, None) is not None:
                getattr(self, part).eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the autoencoder out; note which one it was, and which number means which word."""
        state = checkpoint["state_dict"]
        checkpoint["autoencoder"] = fingerprint(self.vae.state_dict())
        checkpoint["vocabulary"] = self.tokenizer.get_vocab()
        for key in [key for key in state if key.startswith("vae.")]:
            del state[key]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the autoencoder back in.

        Raises:
            UserError: another autoencoder than the one that was trained upon, or other words.
        """
        if checkpoint.get("autoencoder") != fingerprint(self.vae.state_dict()):
            raise UserError(
                f"model.init_args.autoencoder: {self.autoencoder} is not the one this checkpoint was trained upon"
            )
        if checkpoint.get("vocabulary") != self.tokenizer.get_vocab():
            raise UserError(
                "the tokens of this checkpoint mean other words: it was trained on other categories or defect types, "
                "or with other model.init_args.words; start a new run"
            )
        checkpoint["state_dict"].update({f"vae.{key}": value for key, value in self.vae.state_dict().items()})

    # --- training ---

    def on_fit_start(self) -> None:
        """Encode the pictures once."""
        for split, variants in (("train", self.variants), ("val", 2)):
            if variants and self.data.samples.get(split) and split not in self._banks:
                self._banks[split] = self._bank(split, variants)
        if self.variants:
            self.data.serve_images = False

    def _bank(self, split: str, variants: int) -> LatentBank:
        return fill_bank(self, split, self.names, self.variations, variants, self.vae, self.tokenizer)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then move the running mean."""
        super().optimizer_step(*args, **kwargs)
        self.ema.update_parameters(self.networks)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss at a random step of the process of each picture."""
        rows = batch["index"].cpu()
        if self.variants:
            drawn = torch.randint(self.variants, (len(rows),))
            moments, ids = self._banks["train"].draw(rows, drawn, self.device)
        else:
            moments, ids = self._encoded(batch)
        empty = torch.rand(len(ids)) < self.drop_caption
        blank = sent(encode_prompt(self.tokenizer, "", 0).ids, ids.device)
        ids = torch.where(sent(empty, ids.device)[:, None], blank, ids)
        loss = self._loss(self.networks, moments, ids)
        self.log("train/loss", loss, batch_size=len(rows), prog_bar=True)
        return loss

    @torch.no_grad()
    def _encoded(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images = unit_range(batch["image"])
        pictures, captions = self.variations.captioned(images, [self.names[category] for category in batch["category"]])
        posterior = self.vae.encode(2 * pictures - 1).latent_dist
        ids = torch.stack([encode_prompt(self.tokenizer, caption, 0).ids for caption in captions])
        return torch.cat([posterior.mean, posterior.logvar], dim=1), sent(ids, self.device)

    def _loss(self, networks: Any, moments: Tensor, ids: Tensor, streams: Sequence[Generator] | None = None) -> Tensor:
        """Each picture draws from its own stream, all from torch's global one where none are given."""
        mean, logvar = moments.chunk(2, dim=1)
        each: Sequence[Generator | None] = [None] if streams is None else streams
        draws = [self._draw(like, stream) for like, stream in zip(mean.chunk(len(each)), each, strict=True)]
        spread, t, noise = (torch.cat(parts) for parts in zip(*draws, strict=True))
        latents = (mean + (0.5 * logvar).exp() * spread - self.shift) * self.scale
        state = self.process.add_noise(latents, noise, t)
        states = text_states(networks["text"], ids, None, ())
        output = networks["unet"](state, t, states).sample
        weights = None
        if self.min_snr_gamma is not None:
            weights = min_snr_weights(sent(self.process.alpha_bar, t.device)[t], self.min_snr_gamma, self.prediction)
        target = self.process.target(state, latents, t, self.prediction)
        return masked_mse(output.float(), target, None, normalised=True, weights=weights)

    def _draw(self, like: Tensor, stream: Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        """Noise of the latents (B, C, h, w), steps (B,) and noise of the process (B, C, h, w)."""
        device = like.device if stream is None else stream.device
        spread, t, noise = (
            torch.randn(like.shape, generator=stream, device=device),
            torch.randint(self.process.train_steps, (len(like),), generator=stream, device=device),
            torch.randn(like.shape, generator=stream, device=device),
        )
        return spread.to(like), t.to(like.device), offset_noise(noise.to(like), self.offset, stream)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The loss by the running mean of the weights, on pictures that do not train.

        Each has steps and noise of its own, the same after each epoch, in any batch and on any process.
        """
        rows = batch["index"].cpu()
        moments, ids = self._banks["val"].draw(rows, rows % 2, self.device)
        loss = self._loss(self.ema.module, moments, ids, generators(0, rows.tolist()))
        self.log("val/loss", loss, batch_size=len(rows), sync_dist=True, prog_bar=True)

    # --- the result ---

    def export(self, path: Path) -> None:
        """Write the folder `pipeline` with the list of what it was trained on."""
        own = {(sample.name, sample.group) for sample in self.data.samples["train"]}
        write_trained_on(path, self.trained_on | own)
        mean: Any = self.ema.module
        save_pipeline(
            path,
            vae=self.vae,
            unet=mean["unet"],
            text_encoder=mean["text"],
            tokenizer=self.tokenizer,
            process=self.process,
            prediction=self.prediction,
        )

    @torch.no_grad()
    def draw_export(self, folder: Path) -> None:
        """`samples.png`, pictures of prompts that the training has seen, beside what they were said of."""
        bank = self._banks.get("val") or self._banks.get("train")
        if bank is None:
            return
        said = sorted({caption for captions in bank.captions for caption in captions}, key=lambda c: (" with " in c, c))
        prompts = [said[round(i * (len(said) - 1) / (_SHOWN - 1))] for i in range(_SHOWN)]
        networks: Any = self.ema.module
        ids = torch.stack([encode_prompt(self.tokenizer, prompt, 0).ids for prompt in (*prompts, "")]).to(self.device)
        states = text_states(networks["text"], ids, None, ())
        shape = (bank.moments.shape[2] // 2, *bank.moments.shape[3:])
        latents = sample_prompts(networks["unet"], states[:-1], states[-1:], self.process, self.prediction, shape)
        self.vae.enable_slicing()  # one at a time: of large pictures, twelve at once are more than a training step
        pictures = (self.vae.decode(latents / self.scale + self.shift).sample.float() + 1) / 2
        self.vae.disable_slicing()
        picture_sheet(
            folder / "samples.png", [pictures.clamp(0, 1)], prompts, "What the base makes of these prompts", columns=4
        )


def make_unet(
    latent_channels: int, side: int, text_width: int, channels: tuple[int, ...], layers: int, heads: int
) -> Any:
    """A UNet2DConditionModel that attends to the text at each level."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=side,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=layers,
        cross_attention_dim=text_width,
        attention_head_dim=heads,  # diffusers' name for the number of heads
        norm_num_groups=16,
    )


def make_text_encoder(tokenizer: Any, width: int, layers: int, heads: int) -> Any:
    """A CLIPTextModel for a tokenizer of one's own."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
