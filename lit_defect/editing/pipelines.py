"""A pipeline of diffusers, opened for one mode of editing, with what is put on top of it: LoRA, tokens, IP-Adapter.

    opened = open_pipeline("stable-diffusion-v1-5/stable-diffusion-inpainting", "inpaint", Network(), device)
    latents = opened.encode(pictures)     # (B, 3, h, w) in [0, 1] -> (B, C, h / 8, w / 8), scaled
    result = running.run(opened, requests, edit)

| mode | pipelines | channels that the network takes, of latents with C |
|---|---|---|
| `img2img`, `reference_only`, `ip_adapter` | Stable Diffusion 1.x, 2.x, XL; `img2img` also 3, Flux | C |
| `inpaint` | the same, their inpainting models, Flux Fill | C, or 2 C + 1 (with the mask and the masked picture) |
| `instruct_pix2pix` | InstructPix2Pix, of XL too | 2 C |
| `variation` | Stable unCLIP, Stable Diffusion Image Variations | C |
"""

from __future__ import annotations

import inspect
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_defect.diffusion.pipeline_files import KEY as BASE_KEY
from lit_defect.diffusion.pipeline_files import reason
from lit_defect.editing.additions import add_embeddings, add_ip_adapter, add_loras
from lit_defect.editing.folders import pipeline_folder, read_index, variant
from lit_defect.editing.options import NETWORK_KEY, Mode, Network
from lit_defect.errors import UserError
from lit_defect.generation.store import find_trained_on
from lit_defect.nets.fitting import fingerprint

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_KINDS = {
    "plain": "a text-to-image model",
    "inpaint": "an inpainting model",
    "instruct": "a model for instruct_pix2pix",
}
_FLUX = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxFillPipeline")
_NEEDED = {
    "inpaint": "an inpainting or a text-to-image model",
    "instruct_pix2pix": "an InstructPix2Pix model, such as timbrooks/instruct-pix2pix",
    "variation": "a Stable unCLIP or an image variation model, such as sd2-community/stable-diffusion-2-1-unclip",
}


@dataclass
class Opened:
    """A pipeline that is ready to edit; on its device, in its precision, silent.

    Attributes:
        pipe: of diffusers.
        mode: that it was opened for.
        source: where it came from.
        device: on which it computes.
        dtype: of its weights.
        fingerprint: SHA-256 of all weights, LoRA and tokens included, in the precision that they compute in.
        trained_on: name and group of every picture of one's own that the base, a LoRA or a token has learnt from.
        tokens: words that textual inversions have brought.
        schedule: configuration of the scheduler that it came with.
    """

    pipe: Any
    mode: Mode
    source: str
    device: torch.device
    dtype: torch.dtype
    fingerprint: str
    trained_on: set[tuple[str, str]]
    tokens: list[str]
    schedule: Any

    @property
    def network(self) -> Any:
        """The denoiser: a U-Net, or the transformer of the newer models."""
        return getattr(self.pipe, "unet", None) or self.pipe.transformer

    @property
    def has_unet(self) -> bool:
        return getattr(self.pipe, "unet", None) is not None

    @property
    def channels(self) -> int:
        """C of the latents."""
        return int(self.pipe.vae.config.latent_channels)

    @property
    def factor(self) -> int:
        """Pixels along a side of one place of the latents."""
        return 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)

    @property
    def multiple(self) -> int:
        """Pixels that the sides of a picture must be a multiple of.

        A U-Net takes latents of any size (it keeps the sizes of its levels for the way up); a transformer takes them in
        patches of two by two.
        """
        return self.factor if self.has_unet else 2 * self.factor

    @property
    def takes_mask(self) -> bool:
        """Whether the network is an inpainting one, which is told the mask, not held to the source after each step."""
        return self.mode == "inpaint" and int(self.network.config.in_channels) != self._plain_channels

    @property
    def _plain_channels(self) -> int:
        packed = not self.has_unet and "Flux" in type(self.pipe).__name__
        return self.channels * (4 if packed else 1)

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, h, w) in [0, 1] -> the means of their latents (B, C, h', w'), scaled; each on its own."""
        with self._autoencoder() as vae, torch.no_grad():
            signed = (2 * pictures - 1).to(self.pipe._execution_device, vae.dtype)
            means = torch.cat([vae.encode(one[None]).latent_dist.mean for one in signed])
            shift, scale = _scaling(vae, means)
            return ((means - shift) * scale).to(self.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h', w') -> pictures (B, 3, h, w) in [0, 1], float32; each on its own."""
        with self._autoencoder() as vae, torch.no_grad():
            shift, scale = _scaling(vae, latents)
            plain = (latents / scale + shift).to(vae.dtype)
            signed = torch.cat([vae.decode(one[None]).sample for one in plain]).float()
            return (signed / 2 + 0.5).clamp(0, 1)

    @contextmanager
    def _autoencoder(self) -> Iterator[Any]:
        """The autoencoder, in float32 for the while if it overflows in float16 (Stable Diffusion XL's says so).

        In that precision it computes: autocasting, as the trainer's mixed precision has it, would take another.
        """
        vae = self.pipe.vae
        upcast = vae.dtype == torch.float16 and bool(vae.config.force_upcast)
        if upcast:
            vae.to(torch.float32)
        try:
            with torch.autocast(self.device.type, enabled=False):
                yield vae
        finally:
            if upcast:
                vae.to(torch.float16)

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """All of it in float32 for the while; every weight comes back as it was, bit for bit."""
        dtype, self.dtype = self.dtype, torch.float32
        kept = [weight.dtype for weight in self._weights()]  # some stay in float32, such as T5's
        self.pipe.to(dtype=torch.float32)
        try:
            yield
        finally:
            self.dtype = dtype
            for weight, own in zip(self._weights(), kept, strict=True):
                weight.data = weight.data.to(own)

    def _weights(self) -> Iterator[Tensor]:
        """Parameters and buffers of all parts, in an order that conversion leaves as it is."""
        for part in _modules(self.pipe).values():
            yield from part.parameters()
            yield from (buffer for _, buffer in part.named_buffers(remove_duplicate=False))

    @property
    def tokenizers(self) -> list[Any]:
        parts = self.pipe.components
        return [parts[name] for name in sorted(parts) if name.startswith("tokenizer") and parts[name] is not None]

    def cut_words(self, prompt: str) -> str:
        """The words at the end of a prompt that no text encoder sees; "" if one sees them all."""
        cut = [self._cut(tokenizer, prompt) for tokenizer in self.tokenizers]
        return min(cut, key=len, default="")

    def _cut(self, tokenizer: Any, prompt: str) -> str:
        told = inspect.signature(type(self.pipe).__call__).parameters.get("max_sequence_length")
        is_t5 = told is not None and "T5" in type(tokenizer).__name__
        window = min(tokenizer.model_max_length, told.default) if told and is_t5 else tokenizer.model_max_length
        words = prompt.split()

        def fits(count: int) -> bool:
            text = " ".join(words[:count])
            if hasattr(self.pipe, "maybe_convert_prompt"):
                text = self.pipe.maybe_convert_prompt(text, tokenizer)
            return len(tokenizer(text, truncation=False)["input_ids"]) <= window

        seen = next((count for count in range(len(words), -1, -1) if fits(count)), 0)
        return " ".join(words[seen:])


def open_pipeline(
    source: str, mode: Mode, network: Network, device: torch.device | str, precision: str | None = None
) -> Opened:
    """Open a pipeline for a mode, and put on top of it what the options say.

    Args:
        source: folder of a saved pipeline, a run folder that holds one as `pipeline`, or `owner/name` on the hub.
        mode: of the editing; says which pipeline is made of the parts, and what its network must take.
        network: options.
        device: on which it is to compute.
        precision: the trainer's, for `dtype: auto`.

    Raises:
        UserError: nothing there, a hub out of reach, a damaged pipeline, one of another kind than the mode needs, a
            LoRA, embedding or IP-Adapter that does not fit, or options that exclude each other.
    """
    device = torch.device(device)
    _check_options(network, mode, device)
    folder = pipeline_folder(source)
    dtype = _dtype(network, device, precision)
    pipe = _load(folder, mode, dtype)
    trained_on = find_trained_on(folder) | add_loras(pipe, network.lora, network.lora_scales)
    tokens, learnt_from = add_embeddings(pipe, network.embeddings)
    if tokens:
        log.info("%s: the prompt may use %s", ", ".join(network.embeddings), ", ".join(tokens))
    if mode == "ip_adapter":
        add_ip_adapter(pipe, network.ip_adapter, network.ip_adapter_scale)
    for part in _modules(pipe).values():
        part.requires_grad_(False).eval()
    if network.attention_slicing:
        pipe.enable_attention_slicing()
    if network.vae_slicing:
        pipe.vae.enable_slicing()
    if network.vae_tiling:
        pipe.vae.enable_tiling()
    hashed = _hash(pipe)  # before parts of it may rest elsewhere
    _place(pipe, network, device)
    return Opened(
        pipe, mode, source, device, dtype, hashed, trained_on | learnt_from, tokens, schedule=pipe.scheduler.config
    )


def _check_options(network: Network, mode: Mode, device: torch.device) -> None:
    if network.offload != "none" and device.type == "cpu":
        raise UserError(
            f"{NETWORK_KEY}.offload = {network.offload} needs a GPU; this machine computes on the CPU: none"
        )
    if network.attention_slicing and mode in ("reference_only", "ip_adapter"):
        raise UserError(
            f"{NETWORK_KEY}.attention_slicing does not go together with the mode {mode}, which has an attention of its "
            "own; use offload or a smaller batch to save memory"
        )


def _dtype(network: Network, device: torch.device, precision: str | None) -> torch.dtype:
    if network.dtype != "auto":
        return _DTYPES[network.dtype]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if precision and precision.startswith("bf16") else torch.float16


def _load(folder: Path, mode: Mode, dtype: torch.dtype) -> Any:
    """The pipeline of the mode, on the CPU."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    index = read_index(folder)
    _check_channels(folder, index, mode)
    factory = getattr(diffusers, _factory(folder, index, mode))
    options: dict[str, Any] = {"dtype": dtype, "variant": variant(folder, index)}
    # Stable Diffusion 3 is often kept without its largest text encoder, which diffusers takes only if it is told.
    options |= {name: None for name, kind in index.items() if kind == [None, None]}
    if "safety_checker" in index:
        options |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipe = factory.from_pretrained(folder, **options)
    except Exception as error:  # a damaged folder fails in as many ways as there are files
        raise UserError(
            f"{BASE_KEY}: the pipeline in {folder} cannot be opened for the mode {mode} ({reason(error)}); copy or "
            "train it again"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _factory(folder: Path, index: dict[str, Any], mode: Mode) -> str:
    """The class of diffusers that opens a folder for a mode."""
    name = str(index.get("_class_name"))
    of_stable_diffusion = name.startswith(("Stable", "LatentConsistencyModel")) and "ControlNet" not in name
    if not of_stable_diffusion and name not in _FLUX:
        raise UserError(
            f"{BASE_KEY}: {folder} is a {name}, of a kind that cannot edit here; take Stable Diffusion 1.x, 2.x, XL or "
            "3, or Flux 1"
        )
    if mode == "instruct_pix2pix":
        size = "XL" if "text_encoder_2" in index else ""
        return f"StableDiffusion{size}InstructPix2PixPipeline"
    if name in ("StableUnCLIPImg2ImgPipeline", "StableDiffusionImageVariationPipeline"):
        if mode == "variation":
            return name
        raise UserError(
            f"{BASE_KEY}: {folder} is a {name}, a model for the mode variation; {mode} needs {_needed(mode)}"
        )
    if mode == "variation":
        raise UserError(f"{BASE_KEY}: {folder} is a {name}; the mode variation needs {_needed(mode)}")
    if mode == "inpaint":
        return name if name == "FluxFillPipeline" else "AutoPipelineForInpainting"
    if name == "FluxFillPipeline":
        raise UserError(f"{BASE_KEY}: {folder} is a {name}, a model for the mode inpaint; {mode} needs {_needed(mode)}")
    if mode in ("reference_only", "ip_adapter") and "unet" not in index:
        raise UserError(
            f"{BASE_KEY}: {folder} is a {name}; the mode {mode} needs a model with a U-Net: Stable Diffusion 1.x, 2.x "
            "or XL"
        )
    return "AutoPipelineForImage2Image"


def _check_channels(folder: Path, index: dict[str, Any], mode: Mode) -> None:
    """Raises `UserError` if the U-Net takes other channels than the mode gives it."""
    if "unet" not in index:
        return  # the newer models say by their class what they are for
    try:
        taken = int(json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))["in_channels"])
        known = int(json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8")).get("latent_channels", 4))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{BASE_KEY}: the pipeline in {folder} is damaged ({reason(error)}); copy it again") from error
    kinds = {known: "plain", 2 * known + 1: "inpaint", 2 * known: "instruct"}
    allowed = {"inpaint": ("plain", "inpaint"), "instruct_pix2pix": ("instruct",)}.get(mode, ("plain",))
    kind = kinds.get(taken)
    if kind not in allowed:
        wanted = " or ".join(str(count) for count, name in sorted(kinds.items()) if name in allowed)
        raise UserError(
            f"{BASE_KEY}: the U-Net of {folder} takes {taken} channels: it is "
            f"{_KINDS.get(kind or '', 'of another kind')}. The mode {mode} needs {_needed(mode)} ({wanted} channels)"
        )
    if mode == "inpaint" and known != 4:
        raise UserError(
            f"{BASE_KEY}: the latents of {folder} have {known} channels; diffusers' inpainting needs 4 for a U-Net"
        )


def _needed(mode: Mode) -> str:
    return _NEEDED.get(mode, "a text-to-image model")


def _modules(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def _hash(pipe: Any) -> str:
    parts = {name: fingerprint(part.state_dict()) for name, part in _modules(pipe).items()}
    scheduler = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
    return fingerprint({}, prefix=json.dumps([sorted(parts.items()), scheduler], sort_keys=True, default=str))


def _place(pipe: Any, network: Network, device: torch.device) -> None:
    if network.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif network.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)


def _scaling(vae: Any, latents: Tensor) -> tuple[Any, Any]:
    """Shift and scale of latents: a number each, or one of each channel where the autoencoder says so."""
    config = vae.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        per_channel = [torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in (mean, std)]
        return per_channel[0], config.scaling_factor / per_channel[1]
    return getattr(config, "shift_factor", None) or 0.0, config.scaling_factor
