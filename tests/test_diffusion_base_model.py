"""Frozen bases: opened from every place and of every kind that is promised, the same as diffusers opens them, and refused with a reason otherwise."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_defect.diffusion.base_model import LatentBase, as_in_files
from lit_defect.diffusion.latent_sampling import guided, sample
from lit_defect.diffusion.pipeline_files import KEY
from lit_defect.diffusion.prompts import encode_prompt, text_states
from lit_defect.diffusion.samplers import Sampler
from lit_defect.errors import UserError
from lit_defect.nets import weights as weights_module
from tests.latent import WIDTH, sd_alpha_bar, tiny_pipeline, tiny_unet, tiny_vae
from tests.pipelines import tiny_unclip

INDEX = "model_index.json"
WEIGHTS = {
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
BERT_WIDTH = 24


@pytest.fixture
def folder(tmp_path):
    return tiny_pipeline(tmp_path / "base")


def refused(source) -> str:
    with pytest.raises(UserError) as caught:
        LatentBase.open(str(source))
    assert str(caught.value).startswith(f"{KEY}: ")
    return str(caught.value)


def edit(path: Path, **changes: object) -> None:
    """Changes entries of a JSON file; None takes one out."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def halve(folder: Path) -> Path:
    """Saves the pipeline in a folder anew, as `variant="fp16"` only; gives the folder."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder).to(dtype=torch.float16)
    shutil.rmtree(folder)
    pipeline.save_pretrained(folder, variant="fp16")
    assert all(path.name.endswith(".fp16.safetensors") for path in folder.rglob("*.safetensors"))
    return folder


def pickle_weights(source: Path, target: Path) -> None:
    """Writes the weights of one pipeline into the folder of another as older versions of the libraries did."""
    for name in WEIGHTS.values():
        path = target / name.replace("/model.safetensors", "/pytorch_model.bin").replace("safetensors", "bin")
        torch.save(load_file(source / name), path)


def pictures(count=2, size=(32, 48), seed=0):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# --- what is opened ---


@pytest.mark.parametrize(("factor", "levels", "channels"), [(4, 2, 4), (2, 3, 3), (8, 1, 4)])
def test_a_folder_says_what_fits_it(tmp_path, factor, levels, channels):
    folder = tiny_pipeline(tmp_path / "base", factor=factor, levels=levels, channels=channels)
    base = LatentBase.open(str(folder))
    assert (base.channels, base.factor, base.multiple) == (channels, factor, factor * 2 ** (levels - 1))
    assert (base.width, base.embeddings.shape[1]) == (WIDTH, WIDTH)
    assert len(base.embeddings) == len(base.tokenizer)
    assert (base.prediction, base.source) == ("epsilon", str(folder))
    np.testing.assert_allclose(base.process.alpha_bar.numpy(), sd_alpha_bar(), rtol=1e-4)
    images = pictures(size=(2 * base.multiple, 3 * base.multiple))
    assert base.encode(images).shape == (2, channels, images.shape[2] // factor, images.shape[3] // factor)
    assert base.decode(base.encode(images)).shape == images.shape


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_prediction_is_the_schedulers(tmp_path, prediction):
    base = LatentBase.open(str(tiny_pipeline(tmp_path / "base", prediction=prediction, train_steps=50)))
    assert (base.prediction, base.process.train_steps) == (prediction, 50)


def test_a_scheduler_that_names_no_prediction_means_the_noise(folder):
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type=None)
    assert LatentBase.open(str(folder)).prediction == "epsilon"


def test_a_run_folder_is_opened_by_its_pipeline(tmp_path, folder):
    run = tmp_path / "runs" / "base" / "one"
    shutil.copytree(folder, run / "pipeline")
    (run / "run.json").write_text("{}")
    base = LatentBase.open(str(run))
    assert base.fingerprint == LatentBase.open(str(folder)).fingerprint
    assert base.source == str(run)


def test_a_folder_may_be_relative_or_at_home(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in (f"{tmp_path.name}/base", f"./{tmp_path.name}/base", "~/base"):
        assert LatentBase.open(source).channels == 4


def test_nothing_trains(folder):
    base = LatentBase.open(str(folder)).train()
    assert not [name for name, parameter in base.named_parameters() if parameter.requires_grad]
    assert not [name for name, module in base.named_modules() if module.training]


def test_a_network_that_is_told_more_than_a_prompt(tmp_path):
    """It would be opened, and fail in the first step of a training."""
    with pytest.raises(UserError, match=r"base: the U-Net of .* is told more than a prompt, .* \(unCLIP\)"):
        LatentBase.open(str(tiny_unclip(tmp_path / "base")))


def test_the_text_encoder_has_the_names_of_published_ones(folder):
    """All programs but the newest transformers look for these, and make random numbers of what they do not find."""
    path = folder / "text_encoder" / "model.safetensors"
    names = load_file(path).keys()
    assert "text_model.embeddings.token_embedding.weight" in names
    assert all(name.startswith("text_model.") for name in names)
    assert as_in_files(load_file(path)).keys() == names
    torch.testing.assert_close(
        LatentBase.open(str(folder)).embeddings, load_file(path)["text_model.embeddings.token_embedding.weight"]
    )


def test_half_precision_files_are_opened_in_float32(folder):
    for name in WEIGHTS.values():
        save_file({key: value.half() for key, value in load_file(folder / name).items()}, folder / name)
    base = LatentBase.open(str(folder))
    assert {parameter.dtype for parameter in base.parameters()} == {torch.float32}


def test_weights_in_half_precision_alone_are_opened_in_float32(folder):
    full = LatentBase.open(str(folder))
    halve(folder)
    base = LatentBase.open(str(folder))
    for name, value in full.state_dict().items():
        assert torch.equal(base.state_dict()[name], value.half().float() if value.is_floating_point() else value), name


@pytest.mark.parametrize("part", WEIGHTS)
def test_full_precision_goes_first(tmp_path, folder, part):
    """Of each network on its own: a half one beside it is no reason to round the others."""
    other = halve(tiny_pipeline(tmp_path / "half", seed=7))
    for name, weights in WEIGHTS.items():
        half = weights.replace(".safetensors", ".fp16.safetensors")
        shutil.copy(other / half, folder / half)
        if name == part:
            (folder / weights).unlink()
    base, full, half = (LatentBase.open(str(path)) for path in (folder, tiny_pipeline(tmp_path / "full"), other))
    for name in WEIGHTS:
        expected = getattr(half if name == part else full, name).state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in getattr(base, name).state_dict().items()), name


# --- latents ---


@pytest.mark.parametrize("shift", [None, 0.3])
def test_latents_are_shifted_and_scaled_as_diffusers_defines(folder, shift):
    edit(folder / "vae" / "config.json", shift_factor=shift, scaling_factor=0.37)
    base, images, noise = LatentBase.open(str(folder)), pictures(), torch.randn(2, 4, 8, 12)
    with torch.no_grad():
        posterior = base.vae.encode(images).latent_dist
        moments = base.moments(images)
        torch.testing.assert_close(moments, torch.cat([posterior.mean, posterior.logvar], dim=1))
        mean, drawn = posterior.mean, posterior.mean + posterior.std * noise
        torch.testing.assert_close(base.encode(images), (mean - (shift or 0)) * 0.37)
        torch.testing.assert_close(base.latents(moments, noise), (drawn - (shift or 0)) * 0.37)
        torch.testing.assert_close(base.decode(base.encode(images)), base.vae.decode(mean).sample)


def test_pictures_go_through_the_autoencoder_one_at_a_time(folder):
    base, given = LatentBase.open(str(folder)), pictures(3)
    sizes: list[int] = []
    for half in (base.vae.encoder, base.vae.decoder):
        half.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0])))
    with torch.no_grad():
        latents, moments = base.encode(given), base.moments(given)
        decoded = base.decode(latents)
        assert sizes == [1] * 9
        for i in range(3):  # to the last bit, whoever shares their batch
            assert torch.equal(base.moments(given[i : i + 1])[0], moments[i])
            assert torch.equal(base.decode(latents[i : i + 1])[0], decoded[i])


def test_decoded_pictures_are_float32(folder):
    base = LatentBase.open(str(folder)).bfloat16()
    assert base.decode(torch.zeros(1, 4, 4, 4, dtype=torch.bfloat16)).dtype == torch.float32


def test_sizes_that_do_not_go_through_are_refused_with_one_that_does(folder):
    base = LatentBase.open(str(folder))  # multiples of 8
    for size in ((8, 8), (64, 96)):
        base.check_size(*size)
    for size, near in (((100, 64), "96x64"), ((3, 21), "8x24"), ((64, 1), "64x8")):
        with pytest.raises(UserError, match="multiples of 8") as caught:
            base.check_size(*size)
        assert str(caught.value).endswith(f"such as {near}")
        base.check_size(*map(int, near.split("x")))


# --- which weights ---


def test_the_fingerprint_outlives_saving(tmp_path, folder):
    base = LatentBase.open(str(folder))
    for part in ("vae", "unet", "text_encoder"):
        getattr(base, part).save_pretrained(folder / part)
    assert LatentBase.open(str(folder)).fingerprint == base.fingerprint
    assert LatentBase.open(str(tiny_pipeline(tmp_path / "other", seed=7))).fingerprint != base.fingerprint


@pytest.mark.parametrize("part", WEIGHTS)
def test_one_changed_weight_changes_the_fingerprint(folder, part):
    before = LatentBase.open(str(folder)).fingerprint
    state = load_file(folder / WEIGHTS[part])
    name = sorted(state)[0]
    state[name].view(-1)[-1] += 1e-3
    save_file(state, folder / WEIGHTS[part], metadata={"format": "pt"})
    assert LatentBase.open(str(folder)).fingerprint != before


# --- the older text2img LDM ---


@pytest.fixture
def ldm(tmp_path, folder):
    """Laid out as CompVis/ldm-text2im-large-256: `vqvae` and `bert`, no text_encoder."""
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
    from transformers import BertTokenizer

    root = tmp_path / "ldm"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "tile"]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=16)
    torch.manual_seed(5)
    config = LDMBertConfig(
        vocab_size=len(words), max_position_embeddings=16, encoder_layers=2, encoder_ffn_dim=32,
        encoder_attention_heads=2, head_dim=8, d_model=BERT_WIDTH,
    )  # fmt: skip
    parts = {
        "vqvae": tiny_vae(),
        "unet": tiny_unet(width=BERT_WIDTH),
        "bert": LDMBertModel(config).eval(),
        "tokenizer": tokenizer,
    }
    for name, part in parts.items():
        part.save_pretrained(root / name)
    shutil.copytree(folder / "scheduler", root / "scheduler")
    index = {
        "_class_name": "LDMTextToImagePipeline",
        "_diffusers_version": "0.0.4",
        "bert": ["latent_diffusion", "LDMBertModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "tokenizer": ["transformers", "BertTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vqvae": ["diffusers", "AutoencoderKL"],
    }
    (root / INDEX).write_text(json.dumps(index))
    return root, parts


def test_the_older_ldm_opens_with_its_own_names(ldm):
    root, parts = ldm
    base = LatentBase.open(str(root))
    assert base.width == BERT_WIDTH
    ids = encode_prompt(base.tokenizer, "a photo of a tile", 0).ids[None]
    assert ids[0, :7].tolist() == [2, 5, 6, 7, 5, 8, 3]
    with torch.no_grad():
        states = text_states(base.text_encoder, ids)
        torch.testing.assert_close(states, parts["bert"](ids)[0])
        latents = base.encode(pictures(1))
        output = base.unet(latents, torch.tensor([3]), states).sample
    assert output.shape == latents.shape
    assert torch.isfinite(output).all()


# --- what is refused ---


def test_an_inpainting_unet_is_refused(tmp_path):
    folder = tiny_pipeline(tmp_path / "inpainting", extra_channels=5)
    said = refused(folder)
    assert "takes 9 channels" in said
    assert "inpainting" in said
    assert str(folder) in said


def test_a_unet_that_takes_a_picture_is_refused(tmp_path):
    said = refused(tiny_pipeline(tmp_path / "edits", extra_channels=4))
    assert "8 channels" in said
    assert "inpainting" not in said


def test_another_autoencoders_channels_are_refused(folder):
    tiny_vae(channels=3).save_pretrained(folder / "vae")
    assert "takes 4 channels, its autoencoder gives 3" in refused(folder)


def test_another_text_encoders_width_is_refused(folder):
    tiny_unet(width=48).save_pretrained(folder / "unet")
    said = refused(folder)
    assert "48" in said
    assert str(WIDTH) in said


def test_stable_diffusion_xl_is_refused(folder):
    edit(folder / INDEX, text_encoder_2=["transformers", "CLIPTextModelWithProjection"])
    assert "two text encoders" in refused(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"unet": None}, "has no unet"),
        ({"unet": [None, None]}, "has no unet"),
        ({"unet": None, "transformer": ["diffusers", "DiTTransformer2DModel"]}, "has no unet.*transformer"),
        ({"vae": None}, "has no vae"),
        ({"text_encoder": [None, None]}, "has no text_encoder"),
        ({"tokenizer": None}, "has no tokenizer"),
        ({"vae": ["diffusers", "VQModel"]}, "is a VQModel, expected a AutoencoderKL"),
        ({"unet": ["diffusers", "UNet2DModel"]}, "is a UNet2DModel, expected a UNet2DConditionModel"),
        ({"text_encoder": ["mine", "MyTextEncoder"]}, "have no MyTextEncoder"),
        ({"text_encoder": ["transformers", "pipeline"]}, "cannot be opened"),
    ],
)
def test_pipelines_of_other_kinds_are_refused(folder, changes, said):
    edit(folder / INDEX, **{key: value for key, value in changes.items() if value is not None})
    content = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({k: v for k, v in content.items() if changes.get(k, "") is not None}))
    message = refused(folder)
    assert re.search(said, message)
    assert str(folder) in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"beta_schedule": "sigmoid"}, "sigmoid"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"trained_betas": [0.1] * 1000}, "trained_betas"),
        ({"prediction_type": "flow_prediction"}, "flow_prediction"),
    ],
)
def test_processes_that_have_no_name_here_are_refused(folder, changes, said):
    edit(folder / "scheduler" / "scheduler_config.json", **changes)
    assert said in refused(folder)


@pytest.mark.parametrize("name", [*WEIGHTS.values(), INDEX, "unet/config.json", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "noise"])
def test_damaged_files_are_named_by_their_folder(folder, name, damage):
    content = (folder / name).read_bytes()
    noise = bytes(np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8))
    (folder / name).write_bytes({"cut": content[: len(content) // 2], "empty": b"", "noise": noise}[damage])
    said = refused(folder)
    assert str(folder) in said
    assert "\n" not in said


MISSING = [*WEIGHTS.values(), "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"]


@pytest.mark.parametrize("name", [*MISSING, "unet", "tokenizer"])
def test_missing_files_are_named_by_their_folder(folder, name):
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert str(folder) in refused(folder)


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_missing_tensor_is_no_reason_to_go_on_with_random_ones(folder, part):
    state = load_file(folder / WEIGHTS[part])
    name = sorted(state)[len(state) // 2]
    del state[name]
    save_file(state, folder / WEIGHTS[part], metadata={"format": "pt"})
    said = refused(folder)
    assert name.split(".", 2)[-1] in said
    assert str(folder) in said


@pytest.mark.parametrize("part", WEIGHTS)
def test_tensors_of_another_shape_are_refused(folder, part):
    state = load_file(folder / WEIGHTS[part])
    name = max(state, key=lambda key: state[key].numel())
    state[name] = state[name][:-1].clone()
    save_file(state, folder / WEIGHTS[part], metadata={"format": "pt"})
    assert str(folder) in refused(folder)


class Trap:
    """Writes a file if it is ever unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("part", WEIGHTS)
def test_code_in_a_weight_file_does_not_run(folder, tmp_path, part):
    safe = folder / WEIGHTS[part]
    name = {"text_encoder": "pytorch_model.bin"}.get(part, "diffusion_pytorch_model.bin")
    safe.unlink()
    mark = tmp_path / "ran"
    torch.save({"weight": Trap(mark)}, safe.with_name(name), pickle_module=pickle)
    assert str(folder) in refused(folder)
    assert not mark.exists()


# --- names of folders and of the hub ---


def test_folders_without_a_pipeline_say_what_was_expected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "unfinished" / "checkpoints").mkdir(parents=True)
    for source in (tmp_path / "nothing", "./nothing", "~/nothing", "nothing", "a/b/c", "runs/unfinished"):
        said = refused(source)
        assert str(source) in said
        assert INDEX in said


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty cache and a hub that refuses connections."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "hub"


def cached(hub: Path, folder: Path) -> Path:
    """Puts a pipeline's files where the hub's client keeps those of maker/model."""
    repository = hub / "models--maker--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    return repository / "snapshots" / ("0" * 40)


def test_offline_the_hub_is_not_asked(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("lit_defect.diffusion.pipeline_files.knock_at_hub", lambda: pytest.fail("it was asked"))
    said = refused("maker/model")
    assert "HF_HUB_OFFLINE" in said
    assert "base_*.yaml" in said


def test_an_unreachable_hub_is_asked_once(hub, monkeypatch):
    asked = []
    knock = weights_module.knock_at_hub
    monkeypatch.setattr("lit_defect.diffusion.pipeline_files.knock_at_hub", lambda: [asked.append(1), knock()])
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("it went on"))
    said = refused("maker/model")
    assert "could not fetch maker/model" in said
    assert "\n" not in said
    assert asked == [1]


def test_a_silent_hub_is_given_up(hub, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes the call and never answers
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(weights_module, "HUB_TIMEOUT", 0.3)
        assert "timed out" in refused("maker/model")


def test_a_name_that_the_hub_cannot_have_is_refused(hub):
    assert "could not fetch a b/--c" in refused("a b/--c")


@pytest.mark.parametrize("offline", [True, False])
def test_a_cached_model_needs_no_hub(hub, folder, monkeypatch, offline):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    cached(hub, folder)
    base = LatentBase.open("maker/model")
    assert base.source == "maker/model"
    assert base.fingerprint == LatentBase.open(str(folder)).fingerprint


class FakeDownload:
    """Stands for `snapshot_download`: completes the cache by those files of a pipeline that match."""

    def __init__(self, folder: Path, target: Path) -> None:
        self.folder, self.target = folder, target
        self.fetched: list[str] = []

    def __call__(self, source, *, allow_patterns, ignore_patterns, **_):
        from huggingface_hub.utils import filter_repo_objects

        assert source == "maker/model"
        names = [str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (self.target / name).parent.mkdir(parents=True, exist_ok=True)
            if not (self.target / name).exists():
                shutil.copy(self.folder / name, self.target / name)
                self.fetched.append(name)
        return str(self.target)


@pytest.mark.parametrize("missing", ["unet/diffusion_pytorch_model.safetensors", "tokenizer", "scheduler"])
def test_a_half_cached_model_is_fetched_whole(hub, folder, tmp_path, monkeypatch, missing):
    target = cached(hub, folder)
    path = target / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    download = FakeDownload(folder, target)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("lit_defect.diffusion.pipeline_files.knock_at_hub", lambda: None)
    assert LatentBase.open("maker/model").channels == 4
    assert download.fetched
    assert all(name.startswith(missing) for name in download.fetched)


def test_only_what_is_opened_is_fetched(hub, folder, tmp_path, monkeypatch):
    """The repository of Stable Diffusion holds each network in four files, and others beside."""
    wanted = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    for name in (
        "v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.non_ema.safetensors", "safety_checker/model.safetensors", "README.md",
        "text_encoder/pytorch_model.bin",
    ):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"much")
    download = FakeDownload(folder, tmp_path / "fetched")
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("lit_defect.diffusion.pipeline_files.knock_at_hub", lambda: None)
    assert LatentBase.open("maker/model").channels == 4
    assert set(download.fetched) == wanted


def test_a_model_of_two_text_encoders_is_refused_before_it_is_fetched(hub, folder, tmp_path, monkeypatch):
    """Stable Diffusion XL has seven gigabytes, and it is not the hub's fault."""
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder_2": ["transformers", "CLIPTextModel"]}))
    download = FakeDownload(folder, tmp_path / "fetched")
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("lit_defect.diffusion.pipeline_files.knock_at_hub", lambda: None)
    with pytest.raises(UserError, match="base: maker/model has two text encoders"):
        LatentBase.open("maker/model")
    assert download.fetched == ["model_index.json"]


def test_pickled_weights_are_fetched_where_there_are_no_others(hub, folder, tmp_path, monkeypatch):
    pickle_weights(folder, folder)
    for name in WEIGHTS.values():
        (folder / name).unlink()
    download = FakeDownload(folder, tmp_path / "fetched")
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("lit_defect.diffusion.pipeline_files.knock_at_hub", lambda: None)
    assert LatentBase.open("maker/model").fingerprint == LatentBase.open(str(folder)).fingerprint


@pytest.fixture
def reached(monkeypatch):
    """A hub that answers."""
    monkeypatch.setattr("lit_defect.diffusion.pipeline_files.knock_at_hub", lambda: None)


def test_half_precision_is_fetched_where_there_is_no_other(hub, folder, tmp_path, monkeypatch, reached):
    full = tiny_pipeline(tmp_path / "full")
    halve(folder)
    monkeypatch.setattr("huggingface_hub.snapshot_download", FakeDownload(folder, tmp_path / "fetched"))
    assert LatentBase.open("maker/model").fingerprint == LatentBase.open(str(folder)).fingerprint
    # With another file in full precision for each network, that one is taken, pickled or not.
    pickle_weights(full, folder)
    download = FakeDownload(folder, tmp_path / "whole")
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert LatentBase.open("maker/model").fingerprint == LatentBase.open(str(full)).fingerprint
    assert not [name for name in download.fetched if "fp16" in name]


def test_cached_half_precision_is_for_when_the_hub_has_no_better(hub, folder, tmp_path, monkeypatch, reached):
    target = cached(hub, halve(folder))
    full = tiny_pipeline(tmp_path / "full")
    pickle_weights(full, full)
    for name in WEIGHTS.values():
        (full / name).unlink()
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert LatentBase.open("maker/model").fingerprint == LatentBase.open(str(folder)).fingerprint
    monkeypatch.setattr("huggingface_hub.snapshot_download", FakeDownload(full, target))
    assert LatentBase.open("maker/model").fingerprint == LatentBase.open(str(full)).fingerprint


# --- diffusers reads it, too ---


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_diffusers_own_pipeline_makes_the_same_latents(tmp_path, prediction, scale):
    from diffusers import StableDiffusionPipeline

    folder = tiny_pipeline(tmp_path / "base", prediction=prediction)
    text = "a photo of a dark tile with a small bright spot at the top left"
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        text, height=32, width=32, num_inference_steps=5, guidance_scale=scale, latents=noise.clone(), output_type="latent"
    ).images  # fmt: skip
    picture = pipeline(
        text, num_inference_steps=5, guidance_scale=scale, latents=noise.clone(), output_type="pt"
    ).images

    base = LatentBase.open(str(folder))
    ids = torch.stack([encode_prompt(base.tokenizer, prompt, 0).ids for prompt in (text, "")])
    with torch.no_grad():
        told, untold = text_states(base.text_encoder, ids).split(1)
        ours = sample(
            guided(base.unet, told, untold, scale),
            Sampler("ddim", base.process, steps=5, strength=1.0),
            base.prediction,
            (4, 8, 8),
            [torch.Generator().manual_seed(1)],
            noise,
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close((base.decode(ours) / 2 + 0.5).clamp(0, 1), picture, rtol=1e-3, atol=1e-4)
