"""The text-conditioned base of one's own: its latents and captions, its loss, the pipeline it leaves, and what it refuses."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch

from lit_defect.data import MVTecAD
from lit_defect.diffusion.base_model import LatentBase
from lit_defect.diffusion.captions import light_of
from lit_defect.errors import UserError
from lit_defect.tasks.image_autoencoder import open_autoencoder
from lit_defect.tasks.views import unit_range
from tests.diffusion import answer_for
from tests.fakes import make_mvtec
from tests.latent import sd_alpha_bar
from tests.latent_tasks import Runs, base, few_samples, make_runs, ready, tiles, write
from tests.segmentation import fit, refused, weights


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return make_runs(tmp_path_factory.mktemp("own"))


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch):
    few_samples(monkeypatch)


def images_of(data: MVTecAD, split: str) -> torch.Tensor:
    return torch.cat([unit_range(batch["image"]) for batch in data.loader(split)])


# --- the base ---


def test_the_run_holds_a_pipeline_of_the_running_mean(runs):
    opened = LatentBase.open(str(runs.base))
    state = weights(runs.base)
    for part, name in (("unet", "unet"), ("text_encoder", "text")):
        for key, value in getattr(opened, part).state_dict().items():
            assert torch.equal(value, state[f"ema.module.{name}.{key}"]), key
    assert any(not torch.equal(v, state[f"ema.module.{k[9:]}"]) for k, v in state.items() if k.startswith("networks."))
    from diffusers import AutoencoderKL

    own = AutoencoderKL.from_pretrained(runs.autoencoder / "autoencoder")
    assert all(torch.equal(value, opened.vae.state_dict()[key]) for key, value in own.state_dict().items())
    assert opened.scale == own.config.scaling_factor
    assert (opened.factor, opened.multiple, opened.channels, opened.width) == (2, 4, 2, 16)
    assert opened.prediction == "epsilon"
    np.testing.assert_allclose(opened.process.alpha_bar.numpy(), sd_alpha_bar(), rtol=1e-4)
    assert (runs.base / "figures" / "samples.png").is_file()


def test_diffusers_draws_pictures_with_the_pipeline(runs):
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(runs.base / "pipeline")
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline("a photo of a plain tile", num_inference_steps=2, output_type="np").images
    assert made.shape == (1, 32, 32, 3)
    assert np.isfinite(made).all()


def test_defects_names_are_words_of_the_tokenizer(runs):
    tokenizer = LatentBase.open(str(runs.base)).tokenizer
    for word in ("crack", "hole", "anomaly", "tile", "streak"):
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1


def test_a_checkpoint_leaves_the_autoencoder_out(runs):
    checkpoint = torch.load(runs.base / "checkpoints" / "last.ckpt", weights_only=True)
    assert not [key for key in checkpoint["state_dict"] if key.startswith("vae.")]
    assert len(checkpoint["autoencoder"]) == 64


def test_the_bank_holds_each_picture_plain_and_varied(runs):
    task = ready(base(runs.autoencoder, variants=3), tiles(runs.root))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    bank = task._bank("train", 3)
    assert torch.equal(torch.get_rng_state(), before)
    images = images_of(task.data, "train")
    with torch.no_grad():
        posterior = task.vae.encode(2 * images - 1).latent_dist
    plain = torch.cat([posterior.mean, posterior.logvar], dim=1)
    assert bank.moments.shape == (9, 3, 4, 16, 16)
    torch.testing.assert_close(bank.moments[:, 0].float(), plain, rtol=2e-3, atol=2e-3)
    assert [said[0] for said in bank.captions] == [f"a photo of a {light_of(image.numpy())} tile" for image in images]
    assert any(" with a " in sentence for said in bank.captions for sentence in said[1:])
    assert bank.ids.shape == (9, 3, 32)
    decoded = [task.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in bank.ids.flatten(0, 1)]
    assert decoded == [sentence for said in bank.captions for sentence in said]
    torch.manual_seed(99)
    again = task._bank("train", 3)
    assert torch.equal(again.moments, bank.moments)
    assert again.captions == bank.captions
    moments, ids = bank.draw(torch.tensor([4, 0]), torch.tensor([2, 1]), torch.device("cpu"))
    assert torch.equal(moments, bank.moments[[4, 0], [2, 1]].float())
    assert torch.equal(ids, bank.ids[[4, 0], [2, 1]])


def test_an_empty_prompt_does_not_spoil_the_bank(runs):
    task = ready(base(runs.autoencoder, drop_caption=0.9), tiles(runs.root))
    task.on_fit_start()
    before = task._banks["train"].ids.clone()
    task.log = lambda *_, **__: None
    for _ in range(3):
        task.training_step({"index": torch.arange(9)}, 0)
    assert torch.equal(task._banks["train"].ids, before)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_some_prompts_are_left_empty(runs, share):
    task = ready(base(runs.autoencoder, drop_caption=share), tiles(runs.root))
    task.on_fit_start()
    task.log = lambda *_, **__: None
    told: list[torch.Tensor] = []
    task._loss = lambda networks, moments, ids: told.append(ids) or torch.tensor(0.0)
    torch.manual_seed(0)
    for _ in range(60):
        task.training_step({"index": torch.arange(9)}, 0)
    ids = torch.cat(told)
    empty = torch.tensor(task.tokenizer("", padding="max_length")["input_ids"])
    assert float((ids == empty).all(dim=1).float().mean()) == pytest.approx(share, abs=0.06)


class Knowing(torch.nn.Module):
    """Answers what a network that knows the latents would, plus `error`."""

    def __init__(self, x0: torch.Tensor, prediction: str, error: float = 0.0) -> None:
        super().__init__()
        self.x0, self.prediction, self.error = x0.double().numpy(), prediction, error
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, state, t, states):
        self.seen.append((state, t))
        product, rows = sd_alpha_bar(), []
        for x, x0, step in zip(state.double().numpy(), self.x0, t.tolist(), strict=True):
            rows.append(answer_for(x0, x, product[step], self.prediction))
        return type("Output", (), {"sample": torch.from_numpy(np.stack(rows)).float() + self.error})


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("shift", [None, 0.4])
def test_a_perfect_network_has_no_loss_and_errors_are_weighed(runs, prediction, gamma, shift):
    task = ready(base(runs.autoencoder, prediction=prediction, min_snr_gamma=gamma, offset_noise=0.1), tiles(runs.root))
    task.vae.register_to_config(shift_factor=shift, scaling_factor=0.8)
    task.networks = None
    task._own_vae = task.vae
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lit_defect.tasks.latent_diffusion.open_autoencoder", lambda source: (task._own_vae, set()))
        task.configure_model()
    mean = torch.randn(6, 2, 16, 16)
    moments = torch.cat([mean, torch.full_like(mean, -60.0)], dim=1)
    ids = torch.stack([torch.tensor(task.tokenizer("a tile", padding="max_length")["input_ids"])] * 6)
    truth = (mean - (shift or 0.0)) * 0.8

    def loss_of(error: float) -> tuple[float, torch.Tensor]:
        network = Knowing(truth, prediction, error)
        torch.manual_seed(2)
        loss = task._loss({"unet": network, "text": task.networks["text"]}, moments, ids)
        return float(loss), network.seen[0][1]

    assert loss_of(0.0)[0] == pytest.approx(0, abs=1e-3)
    loss, steps = loss_of(0.5)
    snr = sd_alpha_bar()[steps.numpy()] / (1 - sd_alpha_bar()[steps.numpy()])
    weight = {
        None: np.ones(6),
        5.0: np.minimum(snr, 5) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1.0}[prediction],
    }[gamma]
    assert loss == pytest.approx(0.25 * weight.mean(), rel=2e-2)


def test_drawn_anew_in_each_step_it_trains_too(runs, tmp_path):
    task = base(runs.autoencoder, variants=None)
    trainer = fit(task, tiles(runs.root), epochs=1, default_root_dir=str(tmp_path / "run"))
    assert math.isfinite(float(trainer.callback_metrics["train/loss"]))
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()
    images = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    for batch in (images, images.float() / 255):
        task.variations.edited = task.variations.masks = task.variations.light = 0.0
        moments, _ = task._encoded({"image": batch, "category": ["tile"]})
        with torch.no_grad():
            expected = task.vae.encode(2 * images.float() / 255 - 1).latent_dist.mean
        torch.testing.assert_close(moments.chunk(2, dim=1)[0], expected)


@pytest.mark.parametrize("steps", [10, 7])
def test_any_number_of_steps_ends_with_samples(runs, tmp_path, steps):
    fit(
        base(runs.autoencoder, train_steps=steps),
        tiles(runs.root, val_fraction=0.0),
        epochs=1,
        default_root_dir=str(tmp_path),
    )
    assert (tmp_path / "figures" / "samples.png").is_file()
    assert LatentBase.open(str(tmp_path)).process.train_steps == steps


def test_samples_are_decoded_one_at_a_time(runs, tmp_path):
    task = ready(base(runs.autoencoder, train_steps=10), tiles(runs.root))
    task._banks["val"] = task._bank("val", 1)
    sizes: list[int] = []
    task.vae.decoder.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    task.draw_export(tmp_path)
    assert sizes == [1, 1], "of the two that these tests draw"
    assert (tmp_path / "samples.png").is_file()
    assert not task.vae.use_slicing, "the training encodes batches"


def test_categories_are_called_by_the_words_given(runs, tmp_path):
    root = make_mvtec(tmp_path / "two", categories=("tile", "metal_nut"), size=(32, 32), train_good=4, test_good=2)
    task = ready(base(runs.autoencoder, words={"tile": "floor tile"}), tiles(root, val_fraction=0.0))
    assert task.names == {"tile": "floor tile", "metal_nut": "metal nut"}
    said = {sentence.split(" ", 5)[-1] for captions in task._bank("train", 1).captions for sentence in captions}
    assert said == {"floor tile", "metal nut"}
    with pytest.raises(UserError, match=r"model\.init_args\.words names \['tiel'\].*metal_nut"):
        ready(base(runs.autoencoder, words={"tiel": "x"}), tiles(root))


def test_two_fits_with_one_data_module_both_see_pictures(runs, tmp_path):
    data = tiles(runs.root)
    for number in range(2):
        fit(base(runs.autoencoder), data, epochs=1, default_root_dir=str(tmp_path / str(number)))
    one, two = (LatentBase.open(str(tmp_path / str(number))).fingerprint for number in range(2))
    assert one == two


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"channels": [24]}, "channels"),
        ({"channels": []}, "channels"),
        ({"heads": 3}, "heads = 3"),
        ({"heads": 0}, "heads = 0"),
        ({"layers": 0}, "layers = 0"),
        ({"text_width": 15}, "text_width = 15"),
        ({"text_layers": 0}, "text_layers = 0"),
        ({"variants": 0}, "variants = 0"),
        ({"prompt_length": 15}, "prompt_length = 15"),
        ({"prompt_length": 78}, "prompt_length = 78"),
        ({"drop_caption": 1.0}, "drop_caption = 1"),
        ({"train_steps": 1}, "train_steps = 1"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma = 0"),
        ({"offset_noise": -0.1}, "offset_noise = -0.1"),
        ({"edited": 0.6, "masks": 0.6}, "more than all"),
    ],
)
def test_wrong_options_of_the_base_are_named(runs, options, said):
    with pytest.raises(UserError, match=f"model.init_args.*{said}"):
        base(runs.autoencoder, **options)


def test_a_decay_out_of_range_is_named(runs):
    with pytest.raises(UserError, match="ema_decay = 1"):
        ready(base(runs.autoencoder, ema_decay=1.0), tiles(runs.root))


def test_prompts_too_short_for_the_captions_are_refused(runs):
    with pytest.raises(UserError, match=r"prompt_length = 16.*captions of a tile"):
        ready(base(runs.autoencoder, prompt_length=16), tiles(runs.root))
    ready(base(runs.autoencoder, prompt_length=17), tiles(runs.root))


# --- autoencoders that are not there, or others ---


def test_an_autoencoder_may_be_a_run_a_folder_or_a_pipelines(runs):
    for source in (runs.autoencoder, runs.autoencoder / "autoencoder", runs.base / "pipeline"):
        assert ready(base(source), tiles(runs.root)).vae.config.latent_channels == 2


@pytest.mark.parametrize("place", ["run", "folder", "pipeline", "part of a pipeline"])
def test_what_autoencoder_and_base_were_trained_on_is_listed(runs, tmp_path, place):
    root = tmp_path / "other"
    source = {"run": root, "folder": root, "pipeline": root, "part of a pipeline": root / "vae"}[place]
    where = {"run": root / "autoencoder", "folder": root}.get(place, root / "vae")
    shutil.copytree(runs.autoencoder / "autoencoder", where)
    (where / "trained_on.csv").unlink()
    listed = root if "pipeline" in place else where
    (listed / "trained_on.csv").write_text("name,group\nelsewhere.png,part 9\n")
    task, data = base(source), tiles(runs.root)
    ready(task, data).export(tmp_path / "run" / "pipeline")
    own = {(sample.name, sample.group) for sample in data.samples["train"]}
    assert len(own) == 9
    assert LatentBase.open(str(tmp_path / "run")).trained_on == own | {("elsewhere.png", "part 9")}


def test_the_run_of_both_lists_what_they_were_trained_on(runs):
    data = tiles(runs.root)
    data.setup("fit")
    assert LatentBase.open(str(runs.base)).trained_on == {(s.name, s.group) for s in data.samples["train"]}


def test_an_autoencoder_in_half_precision_alone_is_opened(runs, tmp_path):
    vae, _ = open_autoencoder(str(runs.autoencoder))
    vae.half().save_pretrained(tmp_path / "half", variant="fp16")
    opened, _ = open_autoencoder(str(tmp_path / "half"))
    assert {(value.dtype, key in vae.state_dict()) for key, value in opened.state_dict().items()} == {
        (torch.float32, True)
    }


def test_a_missing_autoencoder_is_refused(runs, tmp_path, capsys, lit_defect):
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    for source in (tmp_path / "nothing", tmp_path / "unfinished"):
        config = write(tmp_path / "c.yaml", "LatentDiffusion", runs.root, autoencoder=str(source))
        said = refused(capsys, lit_defect, "fit", "--config", config)
        assert "model.init_args.autoencoder" in said
        assert source.name in said
        assert "autoencoder_*.yaml" in said


@pytest.mark.parametrize("damage", ["cut", "lacking", "config"])
def test_a_damaged_autoencoder_is_refused(runs, tmp_path, damage):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(runs.autoencoder / "autoencoder", tmp_path / "autoencoder")
    (file,) = folder.glob("*.safetensors")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:5000])
    elif damage == "config":
        (folder / "config.json").write_text("{")
    else:
        state = load_file(file)
        del state[sorted(state)[3]]
        save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.init_args\.autoencoder") as caught:
        ready(base(folder), tiles(runs.root))
    assert str(folder) in str(caught.value)
