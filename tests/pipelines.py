"""Pipelines of every kind that diffusers knows and the editor opens, tiny and with random weights, and what goes on top of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.latent import TOLD, WIDTH, sd_process, tiny_pipeline, tiny_text_encoder, tiny_tokenizer, tiny_unet, tiny_vae

FACTOR = 8  # pixels along a side of one place of the latents, as Stable Diffusion's
EYE = 24  # pixels along a side of what image encoders see


def tiny_sd(folder: Path, **options: Any) -> Path:
    """Stable Diffusion 1.x; with `extra_channels` 5 its inpainting model, with 4 InstructPix2Pix."""
    return tiny_pipeline(folder, factor=FACTOR, **options)


def tiny_scheduler() -> Any:
    """Stable Diffusion's."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(**sd_process().settings, steps_offset=1, clip_sample=False, set_alpha_to_one=False)


def kept(make: Callable[..., Path]) -> Callable[..., Path]:
    """A builder of a folder that copies what it has made before from memory."""
    made: dict[tuple[Any, ...], dict[str, bytes]] = {}

    @functools.wraps(make)
    def build(folder: Path, **options: Any) -> Path:
        key = tuple(sorted(options.items()))
        if key not in made:
            with torch.random.fork_rng(devices=[]):
                make(folder, **options)
            made[key] = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        for name, content in made[key].items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return folder

    return build


@kept
def tiny_xl(folder: Path, *, extra_channels: int = 0) -> Path:
    """Stable Diffusion XL; with `extra_channels` 5 its inpainting model, with 4 InstructPix2Pix."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModelWithProjection

    tokenizer = tiny_tokenizer(TOLD)
    second = CLIPTextModelWithProjection(_text_config(tokenizer)).eval()
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4 + extra_channels,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=2 * WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
    )
    StableDiffusionXLPipeline(
        vae=tiny_vae(factor=FACTOR),
        text_encoder=tiny_text_encoder(tokenizer),
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=tiny_scheduler(),
    ).save_pretrained(folder)
    return folder


@kept
def tiny_variation(folder: Path) -> Path:
    """Stable Diffusion Image Variations."""
    from diffusers import StableDiffusionImageVariationPipeline

    StableDiffusionImageVariationPipeline(
        vae=tiny_vae(factor=FACTOR),
        image_encoder=tiny_image_encoder(),
        unet=tiny_unet(seed=1),
        scheduler=tiny_scheduler(),
        safety_checker=None,
        feature_extractor=tiny_eye(),
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@kept
def tiny_unclip(folder: Path) -> Path:
    """Stable unCLIP."""
    from diffusers import DDPMScheduler, StableUnCLIPImg2ImgPipeline, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    tokenizer = tiny_tokenizer(TOLD)
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=2 * WIDTH,
    )
    StableUnCLIPImg2ImgPipeline(
        feature_extractor=tiny_eye(),
        image_encoder=tiny_image_encoder(),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=WIDTH),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=tokenizer,
        text_encoder=tiny_text_encoder(tokenizer),
        unet=unet,
        scheduler=tiny_scheduler(),
        vae=tiny_vae(factor=FACTOR),
    ).save_pretrained(folder)
    return folder


@kept
def tiny_sd3(folder: Path, *, channels: int = 16, t5: bool = True) -> Path:
    """Stable Diffusion 3; without its third text encoder, as most run it, or with fewer channels, if so asked."""
    import diffusers
    from transformers import CLIPTextModelWithProjection

    tokenizer = tiny_tokenizer(TOLD)
    first, second = (CLIPTextModelWithProjection(_text_config(tokenizer)).eval() for _ in range(2))
    third = _tiny_t5(tokenizer, 2 * WIDTH) if t5 else None
    torch.manual_seed(1)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=16,
    )
    vae = tiny_vae(channels=channels, factor=FACTOR)
    vae.register_to_config(shift_factor=0.1)
    diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        text_encoder_3=third,
        tokenizer_3=tokenizer if t5 else None,
    ).save_pretrained(folder)
    return folder


@kept
def tiny_flux(folder: Path, *, fill: bool = False) -> Path:
    """Flux, or Flux Fill; its second text encoder is a CLIP's tokenizer with T5's network."""
    import diffusers

    tokenizer = tiny_tokenizer(TOLD)
    second = _tiny_t5(tokenizer, WIDTH)
    torch.manual_seed(1)
    latents = 4 * 4  # four channels in patches of two by two
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=2 * latents + 4 * FACTOR**2 if fill else latents,
        out_channels=latents,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    vae = tiny_vae(factor=FACTOR)
    vae.register_to_config(shift_factor=0.1)
    factory = diffusers.FluxFillPipeline if fill else diffusers.FluxPipeline
    factory(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=tiny_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def tiny_image_encoder() -> Any:
    """A CLIPVisionModelWithProjection of the same width as the text."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(3)
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=WIDTH,
            projection_dim=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=EYE,
            patch_size=EYE // 2,
        )
    ).eval()


def tiny_eye() -> Any:
    """What pictures go through before a tiny image encoder."""
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": EYE}, crop_size={"height": EYE, "width": EYE})


def tiny_ip_adapter(folder: Path, unet: Any) -> str:
    """An IP-Adapter for a U-Net with its image encoder; gives what the option says."""
    home = folder / "models"
    tiny_image_encoder().save_pretrained(home / "image_encoder")
    generator = torch.Generator().manual_seed(4)
    words = 4  # that a picture is told by
    weights = {
        "image_proj.proj.weight": torch.randn(words * WIDTH, WIDTH, generator=generator),
        "image_proj.proj.bias": torch.zeros(words * WIDTH),
        "image_proj.norm.weight": torch.ones(WIDTH),
        "image_proj.norm.bias": torch.zeros(WIDTH),
    }
    layers = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    for number, layer in enumerate(layers):
        for side in "kv":
            shape = getattr(layer, f"to_{side}").weight.shape
            weights[f"ip_adapter.{2 * number + 1}.to_{side}_ip.weight"] = torch.randn(shape, generator=generator)
    save_file(weights, home / "tiny.safetensors")
    return f"{folder}:models/tiny.safetensors"


def tiny_lora(folder: Path, unet: Any, *, seed: int = 0) -> Path:
    """LoRA weights of rank 2 for the attentions of a U-Net, which is left as it was."""
    from diffusers import StableDiffusionPipeline

    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, module in unet.named_modules():
        if name.endswith("attn2.to_q"):
            layers[f"{name}.lora_A.weight"] = torch.randn(2, module.in_features, generator=generator)
            layers[f"{name}.lora_B.weight"] = torch.randn(module.out_features, 2, generator=generator)
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return folder


def tiny_embedding(path: Path, word: str = "<scratch>", *, width: int = WIDTH, vectors: int = 2) -> Path:
    """A file of textual inversion in diffusers' form."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({word: torch.randn(vectors, width, generator=torch.Generator().manual_seed(5))}, path)
    return path


def _text_config(tokenizer: Any) -> Any:
    torch.manual_seed(2)
    config = tiny_text_encoder(tokenizer, seed=2).config
    config.projection_dim = WIDTH
    return config


def _tiny_t5(tokenizer: Any, width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(1)
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()
