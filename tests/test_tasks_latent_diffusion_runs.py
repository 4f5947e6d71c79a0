"""Runs of the two steps to a base of one's own: broken off and gone on with, in half precision, and by verbs that they have not."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from lit_defect.tasks import ImageAutoencoder, LatentDiffusion
from tests.latent import tiny_vae
from tests.latent_tasks import EPOCHS, KINDS, SAVING, Runs, autoencoder, base, few_samples, make_runs, tiles, write
from tests.segmentation import command, fit, refused, weights


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return make_runs(tmp_path_factory.mktemp("own"))


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch):
    few_samples(monkeypatch)


@pytest.mark.parametrize(
    ("model", "data", "said"),
    [
        ("ImageAutoencoder", {"setting": "supervised"}, "learns from normal ones only"),
        ("ImageAutoencoder", {"image_size": None}, "data.init_args.image_size"),
        ("ImageAutoencoder", {"image_size": [32, 33]}, "multiples of 2"),
        ("LatentDiffusion", {"setting": "supervised"}, "learns from normal ones only"),
        ("LatentDiffusion", {"image_size": None}, "data.init_args.image_size"),
        ("LatentDiffusion", {"image_size": [32, 34]}, "multiples of 4"),
    ],
)
def test_data_that_a_base_cannot_be_trained_on_is_refused(runs, tmp_path, capsys, lit_defect, model, data, said):
    own = {"autoencoder": str(runs.autoencoder)} if model == "LatentDiffusion" else {}
    config = write(tmp_path / "c.yaml", model, runs.root, data=data, **own)
    assert said in refused(capsys, lit_defect, "fit", "--config", config)


@pytest.mark.parametrize("verb", ["test", "validate"])
def test_it_has_no_verb_but_fit(runs, capsys, verb):
    folder, config = runs.folder, runs.folder / "base.yaml"
    words = (verb, "--config", config, "--run_id", "one", "--ckpt_path", "last")
    said = refused(capsys, lambda *arguments: command(folder, *arguments), *words)
    assert f"LatentDiffusion is judged by what is built upon it: it has no verb {verb}" in said


def test_a_test_that_it_has_not_is_refused_before_the_training(runs, tmp_path, capsys):
    config = write(tmp_path / "c.yaml", "LatentDiffusion", runs.root, autoencoder=str(runs.autoencoder))
    words = ("fit", "--config", config, "--run_id", "one", "--test_after_fit", "true")
    said = refused(capsys, lambda *arguments: command(tmp_path, *arguments), *words)
    assert "--test_after_fit true: LatentDiffusion is judged by what is built upon it" in said
    assert said.strip().endswith("set it to false")
    assert not (tmp_path / "runs" / "LatentDiffusion" / "one").exists()


def test_a_quick_development_run_leaves_nothing(runs, tmp_path, lit_defect):
    for model in KINDS:
        own = {"autoencoder": str(runs.autoencoder)} if model == "LatentDiffusion" else {}
        config = write(tmp_path / f"{model}.yaml", model, runs.root, **own)
        lit_defect("fit", "--config", config, "--trainer.fast_dev_run", "2")
    assert not list(tmp_path.rglob("model_index.json"))
    assert not list(tmp_path.rglob("diffusion_pytorch_model*"))


# --- runs that stop ---


def stopping(patch: pytest.MonkeyPatch, kind: Any, step: int) -> None:
    """The process dies, as far as the run can tell, before optimizer step `step`."""
    train = kind.training_step

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == step:
            raise RuntimeError("the power failed")
        return train(self, batch, batch_idx)

    patch.setattr(kind, "training_step", training_step)


@pytest.mark.parametrize("kind", [ImageAutoencoder, LatentDiffusion])
def test_a_run_that_broke_off_ends_with_the_weights_of_an_undisturbed_one(runs, tmp_path, kind):
    model = kind.__name__
    own = {"autoencoder": str(runs.autoencoder)} if kind is LatentDiffusion else {}
    trainer = {"max_epochs": EPOCHS[model], "callbacks": [SAVING]}
    config = write(tmp_path / "c.yaml", model, runs.root, trainer=trainer, **own)
    words = ("fit", "--config", config, "--run_id", "one", "--resume")
    for step in (1, 3, 5):  # before the first save, within the first and the second epoch; an epoch has 2 batches
        with pytest.MonkeyPatch.context() as patch:
            stopping(patch, kind, step)
            if step < 2 * EPOCHS[model]:
                with pytest.raises(RuntimeError, match="the power failed"):
                    command(tmp_path, *words)
    torch.manual_seed(1234)
    command(tmp_path, *words)
    again, whole = tmp_path / "runs" / model / "one", runs.autoencoder if kind is ImageAutoencoder else runs.base
    expected, found = weights(whole), weights(again)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert len(json.loads((again / "run.json").read_text())["resumed"]) >= 2
    name = "autoencoder" if kind is ImageAutoencoder else "pipeline/unet"
    (one,), (other,) = (list((folder / name).glob("*.safetensors")) for folder in (whole, again))
    assert one.read_bytes() == other.read_bytes()


def test_a_resumed_run_with_another_autoencoder_is_refused(runs, tmp_path, capsys):
    other = tmp_path / "other"
    tiny_vae(channels=2, factor=2).save_pretrained(other / "autoencoder")
    config = write(tmp_path / "c.yaml", "LatentDiffusion", runs.root, autoencoder=str(tmp_path / "linked"))
    (tmp_path / "linked").symlink_to(runs.autoencoder)
    words = ("fit", "--config", config, "--run_id", "one")
    with pytest.MonkeyPatch.context() as patch:
        stopping(patch, LatentDiffusion, 3)
        with pytest.raises(RuntimeError):
            command(tmp_path, *words)
    (tmp_path / "linked").unlink()
    (tmp_path / "linked").symlink_to(other)
    said = refused(capsys, lambda *arguments: command(tmp_path, *arguments), *words, "--resume")
    assert "model.init_args.autoencoder" in said
    assert "is not the one this checkpoint was trained upon" in said


def test_a_resumed_run_with_other_words_is_refused(runs, tmp_path, capsys):
    """Other names move the numbers of all words; as many of them would load without a sound."""
    config = tmp_path / "c.yaml"
    own = {"autoencoder": str(runs.autoencoder)}
    words = ("fit", "--config", write(config, "LatentDiffusion", runs.root, **own), "--run_id", "one")
    with pytest.MonkeyPatch.context() as patch:
        stopping(patch, LatentDiffusion, 3)
        with pytest.raises(RuntimeError):
            command(tmp_path, *words)
    write(config, "LatentDiffusion", runs.root, words={"tile": "slab"}, **own)
    said = refused(capsys, lambda *arguments: command(tmp_path, *arguments), *words, "--resume")
    assert "mean other words" in said


# --- half precision ---


@pytest.mark.parametrize("kind", [ImageAutoencoder, LatentDiffusion])
def test_mixed_precision_trains_and_saves_whole_numbers(runs, tmp_path, kind):
    from safetensors.torch import load_file

    task = autoencoder() if kind is ImageAutoencoder else base(runs.autoencoder)
    trainer = fit(task, tiles(runs.root), epochs=1, precision="bf16-mixed", default_root_dir=str(tmp_path))
    for key in ("train/loss", "val/loss"):
        assert math.isfinite(float(trainer.callback_metrics[key]))
    saved = [value for file in tmp_path.rglob("*.safetensors") for value in load_file(file).values()]
    assert saved
    assert {value.dtype for value in saved} == {torch.float32}
    assert all(bool(value.isfinite().all()) for value in saved)
