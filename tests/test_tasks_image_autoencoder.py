"""The autoencoder of one's own base: what it computes, which state of it is kept, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import yaml
from scipy.ndimage import correlate1d

from lit_defect.data import MVTecAD
from lit_defect.errors import UserError
from lit_defect.generation.store import read_trained_on
from lit_defect.tasks import ImageAutoencoder
from lit_defect.tasks.views import unit_range
from tests.contrastive import make_trainer
from tests.fakes import make_voc
from tests.latent_tasks import Runs, autoencoder, make_runs, ready, tiles, write
from tests.segmentation import command, figures, fit, refused, weights


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return make_runs(tmp_path_factory.mktemp("own"))


def images_of(data: MVTecAD, split: str) -> torch.Tensor:
    return torch.cat([unit_range(batch["image"]) for batch in data.loader(split)])


# --- the autoencoder ---


def test_the_autoencoder_learns(runs):
    task = ready(autoencoder(), tiles(runs.root))
    make_trainer().test(task, datamodule=task.data, verbose=False)
    found = figures(runs.autoencoder)["figures"]
    assert found["psnr_good"] > task._figures["psnr_good"] + 3
    assert figures(runs.autoencoder)["task"] == "ImageAutoencoder"
    assert (runs.autoencoder / "figures" / "test_reconstructions.png").is_file()


def test_the_autoencoder_of_the_best_epoch_is_saved_with_the_scale_of_its_latents(runs):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(runs.autoencoder / "autoencoder")
    best = weights(runs.autoencoder, "best")
    for name, value in vae.state_dict().items():
        assert torch.equal(value, best[f"vae.{name}"])
    data = tiles(runs.root)
    data.setup("fit")
    with torch.no_grad():
        latents = torch.cat([vae.encode(2 * images_of(data, "train") - 1).latent_dist.mean])
    # 9 pictures on a ladder of 256: each counts as often as its neighbours, within one.
    assert vae.config.scaling_factor == pytest.approx(1 / float(latents.std()), rel=1e-3)


def test_not_the_last_epoch_is_saved_but_the_best(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(
        ImageAutoencoder, "loss", lambda self, found, images, divergence: found.mean() + self.current_epoch * 10
    )
    config = write(tmp_path / "c.yaml", "ImageAutoencoder", runs.root, lr=0.05, trainer={"max_epochs": 3})
    command(tmp_path, "fit", "--config", config, "--run_id", "one")
    folder = tmp_path / "runs" / "ImageAutoencoder" / "one"
    from safetensors.torch import load_file

    (saved,) = (folder / "autoencoder").glob("*.safetensors")
    name, value = next(iter(load_file(saved).items()))
    assert torch.equal(value, weights(folder, "best")[f"vae.{name}"])
    assert not torch.equal(value, weights(folder, "last")[f"vae.{name}"])


def test_without_validation_the_latest_state_is_saved(runs, tmp_path):
    config = write(tmp_path / "c.yaml", "ImageAutoencoder", runs.root, data={"val_fraction": 0.0}, trainer={"max_epochs": 1})  # fmt: skip
    command(tmp_path, "fit", "--config", config, "--run_id", "one")
    assert (tmp_path / "runs" / "ImageAutoencoder" / "one" / "autoencoder" / "config.json").is_file()


def test_the_pictures_that_it_was_trained_on_are_listed(runs):
    data = tiles(runs.root)
    data.setup("fit")
    assert len(data.samples["train"]) == 9
    known = read_trained_on(runs.autoencoder / "autoencoder")
    assert known == sorted((sample.name, sample.group) for sample in data.samples["train"])


def test_the_ratio_is_that_of_each_pictures_error(runs):
    task, data = autoencoder(), tiles(runs.root)
    trainer = make_trainer()
    state = weights(runs.autoencoder, "best")
    ready(task, tiles(runs.root)).load_state_dict(state)
    found = trainer.test(task, datamodule=data, verbose=False)[0]
    expected = []
    for batch in data.loader("test"):
        images = unit_range(batch["image"])
        with torch.no_grad():
            back = (task.vae.decode(task.vae.encode(2 * images - 1).latent_dist.mean).sample + 1) / 2
        errors = (back.clamp(0, 1) - images).double().numpy() ** 2
        expected += [(-10 * math.log10(e.mean()), name) for e, name in zip(errors, batch["defect_type"], strict=True)]
    assert found["test/psnr"] == pytest.approx(np.mean([ratio for ratio, _ in expected]), abs=1e-3)
    good = [ratio for ratio, kind in expected if kind == "good"]
    assert task._figures["psnr_good"] == pytest.approx(np.mean(good), abs=1e-3)
    bad = [ratio for ratio, kind in expected if kind != "good"]
    assert task._figures["psnr_defective"] == pytest.approx(np.mean(bad), abs=1e-3)
    assert (len(good), len(bad)) == (4, 6)
    # The same figures as the run wrote.
    assert figures(runs.autoencoder)["figures"] == pytest.approx(task._figures, abs=1e-3)


def ssim_by_hand(one: np.ndarray, other: np.ndarray) -> float:
    """Wang et al. (2004) of values in [0, 1] with a window of 7 x 7 and standard deviation 1.5, mean over all."""
    window = np.exp(-(np.arange(-3, 4) ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def blur(picture):
        return correlate1d(correlate1d(picture, window, axis=-1, mode="mirror"), window, axis=-2, mode="mirror")

    mean_one, mean_other = blur(one), blur(other)
    var_one, var_other = blur(one**2) - mean_one**2, blur(other**2) - mean_other**2
    both = blur(one * other) - mean_one * mean_other
    c1, c2 = 0.01**2, 0.03**2
    return float(
        ((2 * mean_one * mean_other + c1) * (2 * both + c2)
        / ((mean_one**2 + mean_other**2 + c1) * (var_one + var_other + c2))).mean()
    )  # fmt: skip


def smooth_pictures() -> tuple[torch.Tensor, torch.Tensor]:
    """Two batches that differ little, as pictures and their reconstructions do."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0.3, 0.7, 24)[:, None] * np.ones(24)
    images = np.stack([np.stack([ramp, ramp.T, ramp[::-1]])] * 2) + rng.normal(0, 0.02, (2, 3, 24, 24))
    return torch.from_numpy(images).float(), torch.from_numpy(images + rng.normal(0, 0.02, images.shape)).float()


def test_the_loss_is_its_formula():
    images, found = smooth_pictures()
    one, other = found.double().numpy(), images.double().numpy()
    expected = np.abs(one - other).mean() + 0.7 * (1 - ssim_by_hand(one, other)) + 0.01 * 3.0
    loss = autoencoder(ssim=0.7, kl=0.01).loss(found, images, torch.tensor(3.0))
    assert float(loss) == pytest.approx(expected, abs=1e-4)


def test_the_loss_is_as_exact_in_half_precision():
    images, found = smooth_pictures()
    task = autoencoder(ssim=1.0)
    exact = float(task.loss(found, images, torch.tensor(0.0)))
    with torch.autocast("cpu", torch.bfloat16):
        assert float(task.loss(found, images, torch.tensor(0.0))) == pytest.approx(exact, rel=1e-3)


def test_the_divergence_is_kingma_and_wellings(runs):
    task = ready(autoencoder(), tiles(runs.root))
    images = images_of(task.data, "train")
    with torch.no_grad():
        found, divergence = task.reconstruct(images, drawn=False)
        posterior = task.vae.encode(2 * images - 1).latent_dist
    mean, var = posterior.mean.double().numpy(), posterior.var.double().numpy()
    assert float(divergence) == pytest.approx((0.5 * (mean**2 + var - 1 - np.log(var))).mean(), rel=1e-4)
    assert found.shape == images.shape
    with torch.no_grad():
        assert not torch.equal(task.reconstruct(images, drawn=True)[0], found)


@pytest.mark.parametrize("value", [math.nan, 0.0])
def test_a_training_that_failed_leaves_no_autoencoder(runs, tmp_path, value):
    task = autoencoder()
    task.on_train_start = lambda: [parameter.data.fill_(value) for parameter in task.vae.parameters()]
    with pytest.raises(UserError, match=r"model\.init_args\.lr"):
        fit(task, tiles(runs.root), default_root_dir=str(tmp_path), limit_train_batches=1, limit_val_batches=0)
    assert not (tmp_path / "autoencoder").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"channels": []}, "channels"),
        ({"channels": [12]}, "multiples of 8"),
        ({"channels": [0, 8]}, "multiples of 8"),
        ({"kl": -1.0}, "kl = -1"),
        ({"kl": math.nan}, "kl = nan"),
        ({"ssim": math.inf}, "ssim = inf"),
        ({"latent_channels": 0}, "latent_channels = 0"),
        ({"layers": 0}, "layers = 0"),
        ({"edited": 1.0}, "edited = 1"),
        ({"masks": -0.1}, "masks = -0.1"),
        ({"edited": 0.7, "masks": 0.7}, "more than all"),
        ({"light": 1.5}, "light = 1.5"),
        ({"lr": 0.0}, "lr = 0"),
    ],
)
def test_wrong_options_of_the_autoencoder_are_named(options, said):
    with pytest.raises(UserError, match="model.init_args.*" + said.replace("(", r"\(")):
        autoencoder(**options)


def test_data_without_a_good_class_is_refused(runs, tmp_path, capsys, lit_defect):
    root = make_voc(tmp_path / "voc")
    config = write(tmp_path / "c.yaml", "ImageAutoencoder", root)
    content = yaml.safe_load(config.read_text())
    content["data"] = {
        "class_path": "PascalVOC",
        "init_args": {"root": str(root), "classes": ["bird"], "leakage": "off"},
    }
    config.write_text(yaml.safe_dump(content))
    assert "needs a data module that has a good class" in refused(capsys, lit_defect, "fit", "--config", config)
