"""Pipelines for editing: opened from every place, refused with what is needed where they do not fit, with what goes on top."""

from __future__ import annotations

import json
import logging
import re
import shutil
import socket
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_defect.editing.options import Edit, Network
from lit_defect.editing.pipelines import open_pipeline
from lit_defect.editing.running import Request, run
from lit_defect.errors import UserError
from lit_defect.generation.store import write_trained_on
from tests.latent import WIDTH, tiny_unet
from tests.pipelines import (
    tiny_embedding,
    tiny_flux,
    tiny_ip_adapter,
    tiny_lora,
    tiny_sd,
    tiny_sd3,
    tiny_unclip,
    tiny_variation,
    tiny_xl,
)

BASE = "model.init_args.base"
NETWORK = "model.init_args.network"


@pytest.fixture
def folder(tmp_path):
    return tiny_sd(tmp_path / "base")


def opened(source, mode="img2img", precision=None, **network):
    return open_pipeline(str(source), mode, Network(**network), "cpu", precision)


def refused(source, mode="img2img", **network) -> str:
    with pytest.raises(UserError) as caught:
        opened(source, mode, **network)
    return str(caught.value)


def pictures(count=2, size=(40, 56), seed=0):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


# --- where from ---


def test_a_folder_and_a_run_that_holds_one(tmp_path, folder):
    first = opened(folder)
    assert (first.mode, first.source, first.device.type) == ("img2img", str(folder), "cpu")
    assert (first.channels, first.factor, first.multiple) == (4, 8, 8)
    run_folder = tmp_path / "runs" / "base" / "one"
    shutil.copytree(folder, run_folder / "pipeline")
    write_trained_on(run_folder / "pipeline", [("good/1.png", "a")])
    second = opened(run_folder)
    assert second.fingerprint == first.fingerprint
    assert (first.trained_on, second.trained_on) == (set(), {("good/1.png", "a")})


def test_nothing_is_shown_and_nothing_trains(folder, capfd):
    pipeline = opened(folder)
    run(pipeline, [Request(pictures(1)[0], prompt="hole " * 50)], Edit(steps=2))
    assert capfd.readouterr() == ("", "")
    assert not any(parameter.requires_grad for parameter in pipeline.pipe.unet.parameters())
    assert not pipeline.pipe.unet.training


def test_no_safety_checker_is_opened(folder):
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]  # of which there are no files
    (folder / "model_index.json").write_text(json.dumps(index | {"requires_safety_checker": True}))
    assert opened(folder).pipe.safety_checker is None


def test_weights_in_half_precision_alone_are_taken(tmp_path, folder):
    from diffusers import StableDiffusionPipeline

    StableDiffusionPipeline.from_pretrained(folder).to(dtype=torch.float16).save_pretrained(
        tmp_path / "half", variant="fp16"
    )
    weights = opened(tmp_path / "half").pipe.unet.state_dict()
    for name, value in opened(folder).pipe.unet.state_dict().items():
        assert weights[name].dtype == torch.float32
        assert torch.equal(weights[name], value.half().float()), name


def test_a_repository_in_the_cache(tmp_path, folder, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    home = tmp_path / "hub" / "models--someone--tiny"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    shutil.copytree(folder, home / "snapshots" / "abc")
    assert opened("someone/tiny").fingerprint == opened(folder).fingerprint
    shutil.rmtree(home / "snapshots" / "abc" / "unet")
    assert "could not fetch someone/tiny from the hub" in refused("someone/tiny")


def test_a_hub_out_of_reach_is_told_at_once(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: (_ for _ in ()).throw(OSError("no route")))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    text = refused("someone/else")
    assert text.startswith(f"{BASE}: could not fetch someone/else from the hub (")
    assert "Copy the pipeline's folder here" in text


def test_what_is_no_pipeline(tmp_path, folder):
    assert "is no folder of a diffusers pipeline" in refused(tmp_path)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    text = refused(folder)
    assert text.startswith(f"{BASE}: the pipeline in {folder} cannot be opened for the mode img2img (")
    (folder / "unet" / "config.json").write_text("{")
    assert "is damaged" in refused(folder)
    (folder / "model_index.json").write_text("{")
    assert "model_index.json is damaged" in refused(folder)


# --- of which kind ---


@pytest.mark.parametrize(
    ("extra", "mode", "told"),
    [
        (5, "img2img", "takes 9 channels: it is an inpainting model. The mode img2img needs a text-to-image model (4 channels)"),
        (5, "reference_only", "an inpainting model. The mode reference_only needs a text-to-image model (4"),
        (4, "inpaint", "takes 8 channels: it is a model for instruct_pix2pix. The mode inpaint needs an inpainting or a text-to-image model (4 or 9 channels)"),
        (0, "instruct_pix2pix", "takes 4 channels: it is a text-to-image model. The mode instruct_pix2pix needs an InstructPix2Pix model, such as timbrooks/instruct-pix2pix (8 channels)"),
        (3, "inpaint", "takes 7 channels: it is of another kind. The mode inpaint needs"),
    ],
)  # fmt: skip
def test_channels_that_do_not_fit_the_mode(tmp_path, extra, mode, told):
    text = refused(tiny_sd(tmp_path / "base", extra_channels=extra), mode)
    assert text.startswith(f"{BASE}: the U-Net of {tmp_path / 'base'} ")
    assert told in text


def test_kinds_that_do_not_fit_the_mode(tmp_path, folder):
    assert "the mode variation needs a Stable unCLIP or an image variation model" in refused(folder, "variation")
    unclip = tiny_unclip(tmp_path / "unclip")
    assert "is a StableUnCLIPImg2ImgPipeline, a model for the mode variation" in refused(unclip, "img2img")
    assert "model for the mode variation" in refused(tiny_variation(tmp_path / "variation"), "inpaint")
    assert "the mode reference_only needs a model with a U-Net" in refused(
        tiny_flux(tmp_path / "flux"), "reference_only"
    )


@pytest.mark.parametrize("name", ["FluxKontextPipeline", "Flux2Pipeline", "QwenImagePipeline", "StableDiffusionControlNetPipeline"])  # fmt: skip
def test_kinds_that_work_otherwise_are_refused_before_they_are_opened(tmp_path, name, monkeypatch):
    """They would change the size, take no strength, or say that the folder is damaged."""
    import diffusers

    monkeypatch.setattr(diffusers.AutoPipelineForImage2Image, "from_pretrained", lambda *_, **__: pytest.fail("opened"))
    path = tiny_flux(tmp_path / "base")
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps(index | {"_class_name": name}))
    assert refused(path) == (
        f"{BASE}: {path} is a {name}, of a kind that cannot edit here; take Stable Diffusion 1.x, 2.x, XL or 3, or "
        "Flux 1"
    )


def test_flux_fill_inpaints_only(tmp_path):
    path = tiny_flux(tmp_path / "base", fill=True)
    assert refused(path).startswith(
        f"{BASE}: {path} is a FluxFillPipeline, a model for the mode inpaint; img2img needs"
    )


@pytest.mark.parametrize("mode", ["img2img", "inpaint"])
def test_nothing_is_used_that_diffusers_will_drop(folder, mode, monkeypatch):
    monkeypatch.setattr(warnings, "simplefilter", lambda *_, **__: None)  # which hides it from users
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=FutureWarning)
        pipeline = opened(folder, mode, dtype="bfloat16")
        mask = torch.ones(1, 40, 56)
        run(pipeline, [Request(pictures(1)[0], mask=mask, prompt="hole")], Edit(steps=2))
    assert pipeline.pipe.unet.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("make", "mode", "name", "takes_mask", "multiple"),
    [
        (lambda path: tiny_sd(path), "img2img", "StableDiffusionImg2ImgPipeline", False, 8),
        (lambda path: tiny_sd(path), "inpaint", "StableDiffusionInpaintPipeline", False, 8),
        (lambda path: tiny_sd(path, extra_channels=5), "inpaint", "StableDiffusionInpaintPipeline", True, 8),
        (tiny_xl, "ip_adapter", "StableDiffusionXLImg2ImgPipeline", False, 8),
        (lambda path: tiny_xl(path, extra_channels=5), "inpaint", "StableDiffusionXLInpaintPipeline", True, 8),
        (lambda path: tiny_xl(path, extra_channels=4), "instruct_pix2pix", "StableDiffusionXLInstructPix2PixPipeline", False, 8),
        (tiny_sd3, "img2img", "StableDiffusion3Img2ImgPipeline", False, 16),
        (tiny_sd3, "inpaint", "StableDiffusion3InpaintPipeline", False, 16),
        (tiny_flux, "inpaint", "FluxInpaintPipeline", False, 16),
        (lambda path: tiny_flux(path, fill=True), "inpaint", "FluxFillPipeline", True, 16),
    ],
)  # fmt: skip
def test_the_class_of_diffusers(tmp_path, make, mode, name, takes_mask, multiple):
    path = make(tmp_path / "base")
    network = {}
    if mode == "ip_adapter":
        from diffusers import UNet2DConditionModel

        network["ip_adapter"] = tiny_ip_adapter(tmp_path / "ip", UNet2DConditionModel.from_pretrained(path / "unet"))
    pipeline = opened(path, mode, **network)
    assert type(pipeline.pipe).__name__ == name
    assert (pipeline.takes_mask, pipeline.multiple) == (takes_mask, multiple)


# --- precision and memory ---


def test_the_precision(folder):
    from lit_defect.editing.pipelines import _dtype

    for dtype in ("float32", "bfloat16", "float16"):
        pipeline = opened(folder, dtype=dtype)
        assert pipeline.dtype == pipeline.pipe.unet.dtype == pipeline.pipe.vae.dtype == getattr(torch, dtype)
    assert opened(folder, precision="16-mixed").dtype == torch.float32  # on the CPU
    gpu = torch.device("cuda")
    assert _dtype(Network(), gpu, "bf16-mixed") == torch.bfloat16
    assert _dtype(Network(), gpu, None) == _dtype(Network(), gpu, "16-mixed") == torch.float16


def test_slices_and_tiles(folder):
    pipeline = opened(folder, attention_slicing=True, vae_tiling=True)
    assert pipeline.pipe.vae.use_slicing
    assert pipeline.pipe.vae.use_tiling
    assert "Sliced" in type(next(iter(pipeline.pipe.unet.attn_processors.values()))).__name__
    assert not opened(folder, vae_slicing=False).pipe.vae.use_slicing
    assert refused(folder, offload="model").startswith(f"{NETWORK}.offload = model needs a GPU")
    assert refused(folder, "reference_only", attention_slicing=True).startswith(f"{NETWORK}.attention_slicing does not")


@pytest.mark.parametrize("make", [tiny_sd, tiny_sd3, tiny_flux])
def test_latents_are_means_and_come_back(tmp_path, make):
    pipeline = opened(make(tmp_path / "base"))
    vae, shown = pipeline.pipe.vae, pictures(size=(48, 64))
    latents = pipeline.encode(shown)
    expected = (vae.encode(2 * shown - 1).latent_dist.mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)
    back = (vae.decode(vae.encode(2 * shown - 1).latent_dist.mean).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(pipeline.decode(latents), back, atol=1e-5, rtol=1e-5)


def test_an_autoencoder_that_overflows_in_half_precision_computes_in_float32(folder):
    pipeline = opened(folder, dtype="float16")
    pipeline.pipe.vae.register_to_config(force_upcast=True)
    seen = []
    pipeline.pipe.vae.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    assert pipeline.encode(pictures()).dtype == torch.float16
    assert set(seen) == {torch.float32}
    assert pipeline.pipe.vae.dtype == torch.float16


# --- prompts ---


def test_words_that_no_encoder_sees(tmp_path, folder):
    pipeline = opened(folder)
    assert pipeline.cut_words("a hole in a nut") == ""
    assert pipeline.cut_words("hole " * 30 + "crack damage") == "crack damage"  # 32 tokens, two of them the ends
    assert pipeline.cut_words("") == ""
    assert opened(tiny_variation(tmp_path / "variation"), "variation").cut_words("hole " * 99) == ""


def test_the_longest_window_counts(tmp_path):
    pipeline = opened(tiny_xl(tmp_path / "xl"))
    assert pipeline.cut_words("hole " * 31) == "hole"
    pipeline.pipe.tokenizer_2.model_max_length = 40
    assert pipeline.cut_words("hole " * 31) == ""


# --- what goes on top ---


def weights_of(layer):
    return {name: value for name, value in layer.state_dict().items() if "lora" not in name}


def test_loras_change_the_weights_as_they_say(tmp_path, folder):
    plain = opened(folder)
    first, second = (
        tiny_lora(tmp_path / "lora", plain.pipe.unet),
        tiny_lora(tmp_path / "run" / "lora", plain.pipe.unet, seed=1),
    )
    write_trained_on(first, [("hole/1.png", "")])
    write_trained_on(second, [("hole/2.png", "")])
    both = opened(folder, lora=[str(first), str(tmp_path / "run")], lora_scale=0.5)
    assert both.trained_on == {("hole/1.png", ""), ("hole/2.png", "")}
    assert len({both.fingerprint, plain.fingerprint, opened(folder, lora=[str(first)]).fingerprint}) == 3
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
    states = torch.randn(1, 5, plain.pipe.unet.get_submodule(name).in_features)
    expected = plain.pipe.unet.get_submodule(name)(states)
    for path in (first, second):
        told = load_file(path / "pytorch_lora_weights.safetensors")
        down, up = (told[f"unet.{name}.lora_{side}.weight"] for side in "AB")
        expected = expected + 0.5 * states @ down.T @ up.T  # alpha is the rank
    torch.testing.assert_close(both.pipe.unet.get_submodule(name)(states), expected, atol=1e-4, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in both.pipe.unet.parameters())
    assert opened(folder, lora=[f"{first}/pytorch_lora_weights.safetensors"]).trained_on == {("hole/1.png", "")}


def test_loras_of_different_strengths(tmp_path, folder):
    plain = opened(folder)
    paths = [tiny_lora(tmp_path / f"lora{seed}", plain.pipe.unet, seed=seed) for seed in (0, 1)]
    both = opened(folder, lora=list(map(str, paths)), lora_scale=[0.8, 0.25])
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
    states = torch.randn(1, 5, plain.pipe.unet.get_submodule(name).in_features)
    expected = plain.pipe.unet.get_submodule(name)(states)
    for path, scale in zip(paths, (0.8, 0.25), strict=True):
        told = load_file(path / "pytorch_lora_weights.safetensors")
        down, up = (told[f"unet.{name}.lora_{side}.weight"] for side in "AB")
        expected = expected + scale * states @ down.T @ up.T
    torch.testing.assert_close(both.pipe.unet.get_submodule(name)(states), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match=rf"{NETWORK}.lora_scale = \[0.8\]: expected one number, or .* of the 2 in"):
        Network(lora=["a", "b"], lora_scale=[0.8])
    with pytest.raises(UserError, match=rf"{NETWORK}.lora_scale = \[0.8, -1\]: expected 0 or more"):
        Network(lora=["a", "b"], lora_scale=[0.8, -1])


def test_a_lora_for_another_model(tmp_path, folder):
    wide = tiny_lora(tmp_path / "wide", tiny_unet(width=2 * WIDTH, levels=3))
    assert refused(folder, lora=[str(wide)]).startswith(f"{NETWORK}.lora: {wide} cannot be put on this model (")
    other = tmp_path / "other"
    other.mkdir()
    save_file(
        {"nothing.lora_A.weight": torch.ones(2, 2), "nothing.lora_B.weight": torch.ones(2, 2)},
        other / "pytorch_lora_weights.safetensors",
    )
    assert refused(folder, lora=[str(other)]).startswith(f"{NETWORK}.lora: {other} cannot be put on this model (")
    assert refused(folder, lora=["nowhere/at/all"]).startswith(f"{NETWORK}.lora: there is no nowhere/at/all")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text("{}")
    assert f"the run {tmp_path / 'run'} has no folder 'lora', which is written at its end" in refused(
        folder, lora=[str(tmp_path / "run")]
    )
    assert refused(folder, lora=["some/one"]).startswith(f"{NETWORK}.lora: some/one cannot be put on this model (")


def test_words_of_textual_inversion(tmp_path, folder, caplog):
    path = tiny_embedding(tmp_path / "words" / "scratch.safetensors")
    write_trained_on(path.parent, [("scratch/1.png", "")])
    with caplog.at_level(logging.INFO, logger="lit_defect"):
        pipeline = opened(folder, embeddings=[str(path)])
    assert pipeline.tokens == ["<scratch>"]
    assert "<scratch>" in caplog.text
    assert pipeline.trained_on == {("scratch/1.png", "")}
    assert pipeline.fingerprint != opened(folder).fingerprint
    number = pipeline.pipe.tokenizer.convert_tokens_to_ids("<scratch>")
    embedded = pipeline.pipe.text_encoder.get_input_embeddings().weight[number : number + 2]
    torch.testing.assert_close(embedded, load_file(path)["<scratch>"])
    assert pipeline.cut_words("hole " * 28 + "<scratch>") == ""  # of two vectors
    assert pipeline.cut_words("hole " * 29 + "<scratch>") == "<scratch>"


def test_files_of_the_web_interface_that_hold_no_word(tmp_path, folder):
    paths = [tiny_embedding(tmp_path / f"{word}.safetensors", "emb_params") for word in ("rust", "scratch")]
    pipeline = opened(folder, embeddings=list(map(str, paths)))
    assert pipeline.tokens == ["<rust>", "<scratch>"]
    number = pipeline.pipe.tokenizer.convert_tokens_to_ids("<scratch>")
    embedded = pipeline.pipe.text_encoder.get_input_embeddings().weight[number : number + 2]
    torch.testing.assert_close(embedded, load_file(paths[1])["emb_params"])


def test_words_for_both_encoders(tmp_path):
    path = tmp_path / "rust.safetensors"
    save_file({"clip_l": torch.ones(1, WIDTH), "clip_g": torch.full((1, WIDTH), 2.0)}, path)
    xl = tiny_xl(tmp_path / "xl")
    pipeline = opened(xl, embeddings=[str(path)])
    assert pipeline.tokens == ["<rust>"]
    for suffix, value in (("", 1.0), ("_2", 2.0)):
        number = getattr(pipeline.pipe, f"tokenizer{suffix}").convert_tokens_to_ids("<rust>")
        assert (getattr(pipeline.pipe, f"text_encoder{suffix}").get_input_embeddings().weight[number] == value).all()
    assert "expected clip_l and clip_g" in refused(xl, embeddings=[str(tiny_embedding(tmp_path / "one.safetensors"))])


def test_words_that_do_not_fit(tmp_path, folder):
    wide = tiny_embedding(tmp_path / "wide.safetensors", width=2 * WIDTH)
    assert refused(folder, embeddings=[str(wide)]).startswith(f"{NETWORK}.embeddings: {wide} cannot be put on")
    known = tiny_embedding(tmp_path / "known.safetensors", "hole</w>")
    assert refused(folder, embeddings=[str(known)]).startswith(f"{NETWORK}.embeddings: {known} cannot be put on")
    variation = tiny_variation(tmp_path / "variation")
    assert "takes none" in refused(variation, "variation", embeddings=[str(known)])


def test_an_ip_adapter(tmp_path, folder):
    told = tiny_ip_adapter(tmp_path / "ip", tiny_unet())
    pipeline = opened(folder, "ip_adapter", ip_adapter=told, ip_adapter_scale=0.3)
    scales = {scale for one in pipeline.pipe.unet.attn_processors.values() for scale in getattr(one, "scale", [])}
    assert scales == {0.3}
    assert pipeline.fingerprint != opened(folder).fingerprint
    assert opened(folder, "img2img", ip_adapter=told).pipe.image_encoder is None  # of no effect elsewhere
    assert refused(folder, "ip_adapter").startswith(f"{NETWORK}.ip_adapter is not set")
    assert "name its file behind a colon" in refused(folder, "ip_adapter", ip_adapter=str(tmp_path / "ip"))
    assert re.match(rf"{NETWORK}.ip_adapter: .*nothing.safetensors cannot", refused(folder, "ip_adapter", ip_adapter=f"{tmp_path}/ip:models/nothing.safetensors"))  # fmt: skip
