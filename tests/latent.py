"""Latent diffusion models that fit into a second: a pipeline folder like Stable Diffusion's, and a network that knows the truth."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_defect.diffusion.base_model import save_pipeline
from lit_defect.diffusion.captions import make_tokenizer, vocabulary
from lit_defect.diffusion.process import ForwardProcess
from tests.diffusion import answer_for

TOLD = ("tile", "anomaly defect damage crack hole", "metal nut wood")  # words that the tokenizer has whole
BETAS = (0.00085, 0.012)  # Stable Diffusion's
WIDTH, LENGTH = 32, 32  # of a token, tokens of a prompt


def tiny_pipeline(
    folder: Path,
    *,
    channels: int = 4,
    seed: int = 0,
    factor: int = 4,
    levels: int = 2,
    prediction: str = "epsilon",
    train_steps: int = 1000,
    names: Sequence[str] = TOLD,
    extra_channels: int = 0,
) -> Path:
    """Save a StableDiffusionPipeline with random weights to `folder`, which is made; gives `folder`.

    The first one of its kind takes a second, the others of a session are copied from memory.

    Args:
        channels: of the latents.
        seed: of all weights.
        factor: pixels along a side of one place of the latents, 1, 2, 4 or 8.
        levels: of the U-Net; the sides of pictures must be multiples of factor * 2^(levels - 1).
        prediction: `epsilon`, `v_prediction` or `sample`.
        train_steps: T.
        names: words of the tokenizer, beside those of the captions.
        extra_channels: that the U-Net takes beside the latents; 5 for an inpainting model.
    """
    made = _files(channels, seed, factor, levels, prediction, train_steps, tuple(names), extra_channels, folder)
    for name, content in made.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def tiny_vae(*, channels: int = 4, seed: int = 0, factor: int = 4) -> Any:
    """An AutoencoderKL with random weights."""
    from diffusers import AutoencoderKL

    levels = factor.bit_length()
    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * (levels - 1) + (16,),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        scaling_factor=0.7,
        sample_size=32,
        mid_block_add_attention=False,
    )


def tiny_unet(*, channels: int = 4, seed: int = 0, levels: int = 2, extra_channels: int = 0, width: int = WIDTH) -> Any:
    """A UNet2DConditionModel with random weights; each level attends to the text."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=channels + extra_channels,
        out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        block_out_channels=(8,) * (levels - 1) + (16,),
        layers_per_block=1,
        cross_attention_dim=width,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def tiny_text_encoder(tokenizer: Any, *, seed: int = 0, width: int = WIDTH) -> Any:
    """A CLIPTextModel with random weights for a tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval()


@functools.cache
def tiny_tokenizer(names: tuple[str, ...] = TOLD, length: int = LENGTH) -> Any:
    """Knows the words of all captions of `names`."""
    return make_tokenizer(vocabulary(names), length)


class OracleDenoiser:
    """Answers what a network that knows x_0 would, and keeps what it was asked.

    Args:
        x0: (B, C, h, w), the truth.
        prediction: `epsilon`, `v_prediction` or `sample`.
        train_steps: T of a process with Stable Diffusion's schedule.

    Attributes:
        states: that it was given, in turn.
        steps: of each call.
    """

    def __init__(self, x0: torch.Tensor, prediction: str = "epsilon", train_steps: int = 1000) -> None:
        self.x0 = x0.double().numpy()
        self.prediction = prediction
        self.product = sd_alpha_bar(train_steps)
        self.states: list[torch.Tensor] = []
        self.steps: list[int] = []

    def __call__(self, state: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert t.dtype == torch.int64
        assert t.shape == (len(state),)
        (step,) = set(t.tolist())
        self.states.append(state.clone())
        self.steps.append(step)
        answer = answer_for(self.x0, state.double().numpy(), self.product[step], self.prediction)
        return torch.from_numpy(answer).to(state.dtype)


def sd_alpha_bar(train_steps: int = 1000) -> np.ndarray:
    """(T,) products of 1 - beta, with betas that are linear in their roots (Rombach et al.), float64."""
    return np.cumprod(1 - np.linspace(BETAS[0] ** 0.5, BETAS[1] ** 0.5, train_steps) ** 2)


def sd_process(train_steps: int = 1000) -> ForwardProcess:
    """Stable Diffusion's."""
    return ForwardProcess(train_steps, "scaled_linear", BETAS)


_MADE: dict[tuple[Any, ...], dict[str, bytes]] = {}


def _files(
    channels: int,
    seed: int,
    factor: int,
    levels: int,
    prediction: str,
    train_steps: int,
    names: tuple[str, ...],
    extra_channels: int,
    folder: Path,
) -> dict[str, bytes]:
    """The pipeline's files by their names; built in `folder` the first time."""
    key = (channels, seed, factor, levels, prediction, train_steps, names, extra_channels)
    if key not in _MADE:
        tokenizer = tiny_tokenizer(names)
        with torch.random.fork_rng(devices=[]):
            save_pipeline(
                folder,
                vae=tiny_vae(channels=channels, seed=seed, factor=factor),
                unet=tiny_unet(channels=channels, seed=seed + 1, levels=levels, extra_channels=extra_channels),
                text_encoder=tiny_text_encoder(tokenizer, seed=seed + 2),
                tokenizer=tokenizer,
                process=sd_process(train_steps),
                prediction=prediction,
            )
        _MADE[key] = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return _MADE[key]
