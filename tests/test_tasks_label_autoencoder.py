"""The task that trains the autoencoder of label maps: what it learns, what its run leaves, what it refuses."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer, seed_everything
from torch.nn import functional as F

from lit_defect.callbacks.run import BestCheckpoint
from lit_defect.data import MVTecAD, PascalVOC
from lit_defect.diffusion.labels import one_hot
from lit_defect.errors import UserError
from lit_defect.nets.label_autoencoder import LabelAutoencoder
from lit_defect.tasks import MaskAutoencoder
from tests.contrastive import make_trainer
from tests.fakes import make_mvtec, make_voc

SMALL = {"channels": (8, 16), "latent_channels": 3, "lr": 4e-3}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    """A run without a folder writes its autoencoder where it was started."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def root(tmp_path):
    return make_voc(tmp_path / "data", images={"train": 20, "val": 5})


@pytest.fixture
def data(root):
    return make(root)


def make(root, **settings):
    return PascalVOC(str(root), **{"classes": ["bird", "cat"], "leakage": "off", "batch_size": 8} | settings)


def fit(task, data, **settings):
    seed_everything(0, verbose=False)
    trainer = make_trainer(**settings)
    trainer.fit(task, datamodule=data)
    return trainer


def test_it_learns_to_give_masks_back_that_it_has_not_seen(root, tmp_path):
    task, data = MaskAutoencoder(**SMALL), make(root, val_fraction=0.0, merge=True)
    trainer = fit(task, data, epochs=50, default_root_dir=str(tmp_path / "run"))
    (figures,) = trainer.test(task, datamodule=data, verbose=False)
    assert figures["test/iou"] > 0.85
    assert task.class_names == ["background", "bird+cat"]
    loaded = LabelAutoencoder.load(tmp_path / "run" / "autoencoder")
    assert loaded.class_names == task.class_names
    labels = one_hot(torch.stack([torch.zeros(32, 32), torch.ones(32, 32)]).long(), 2)
    torch.testing.assert_close(loaded.encode(labels), task.network.eval().encode(labels), atol=1e-3, rtol=1e-3)


def test_the_loss_is_cross_entropy_and_the_weighted_divergence_and_void_does_not_count(data, monkeypatch):
    task = MaskAutoencoder(**SMALL, kl=0.5, augment="none")
    fit(task, data)
    monkeypatch.setattr(task, "log", lambda *_, **__: None)
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)  # the latents drawn are their means
    batch = next(iter(data.train_dataloader()))
    ids = batch["mask"]
    assert (ids == 255).any()
    with torch.no_grad():
        logits, divergence = task.network(one_hot(ids, 3))
    expected = F.cross_entropy(logits, ids, ignore_index=255) + 0.5 * divergence.mean() / (32 * 32)
    assert float(task.training_step(batch, 0).detach()) == pytest.approx(float(expected), rel=1e-5)
    void = task.training_step({"mask": torch.full((2, 32, 32), 255)}, 0)
    assert void.isfinite()


def test_the_latents_of_the_training_masks_are_scaled_before_a_checkpoint_is_written(data, tmp_path):
    task = MaskAutoencoder(**SMALL)
    trainer = fit(task, data)
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    network = LabelAutoencoder.load(tmp_path / "last.ckpt")
    ids = torch.cat([batch["mask"] for batch in data.loader("train")])
    again = LabelAutoencoder(3, SMALL["channels"], SMALL["latent_channels"]).eval()
    again.load_state_dict(network.state_dict())
    again.fit_scale(lambda: [(one_hot(ids, 3), ids)])
    torch.testing.assert_close(network.scale, again.scale)
    torch.testing.assert_close(network.shift, again.shift)


def test_a_checkpoint_opens_without_data(data, tmp_path):
    task = MaskAutoencoder(**SMALL)
    trainer = fit(task, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    loaded = MaskAutoencoder.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert loaded.class_names == ["background", "bird", "cat"]
    for key, value in task.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value)


def test_what_a_run_leaves(lit_defect, root, tmp_path):
    content = {
        "experiment": "latent",
        "wandb": "off",
        "trainer": {"max_epochs": 3, "accelerator": "cpu"},
        "model": {"class_path": "MaskAutoencoder", "init_args": {**SMALL, "channels": [8, 16]}},
        "data": {
            "class_path": "PascalVOC",
            "init_args": {"root": str(root), "classes": ["bird", "cat"], "leakage": "off", "batch_size": 8},
        },
    }
    (tmp_path / "latent.yaml").write_text(yaml.safe_dump(content))
    words = ("--config", tmp_path / "latent.yaml", "--run_id", "one")
    lit_defect("fit", *words, "--test_after_fit", "true")
    folder = tmp_path / "runs" / "latent" / "one"
    record = json.loads((folder / "test_metrics.json").read_text())
    assert record["task"] == "MaskAutoencoder"
    assert record["class_names"] == ["background", "bird", "cat"]
    assert list(record["methods"]) == ["autoencoder"]
    assert record["settings"] == {"channels": [8, 16], "latent_channels": 3, "kl": 1e-3}
    # The folder is the best state, as the test is, with the scale that belongs to it.
    labels = one_hot(torch.from_numpy(np.eye(32, dtype=np.int64))[None], 3)
    best = LabelAutoencoder.load(folder / "checkpoints" / "best.ckpt")
    torch.testing.assert_close(LabelAutoencoder.load(folder / "autoencoder").encode(labels), best.encode(labels))

    lit_defect("fit", *words, "--resume", "--trainer.max_epochs", "4")
    assert (folder / "autoencoder.1").is_dir()  # results are never lost
    with pytest.raises(SystemExit):
        lit_defect("predict", "--config", tmp_path / "latent.yaml", "--ckpt_path", "best")


def test_the_best_state_is_kept_and_not_the_last(data, tmp_path):
    best = BestCheckpoint(tmp_path / "run" / "checkpoints", "val/loss", "max")  # the largest loss: the first epoch's
    task = MaskAutoencoder(**SMALL)
    seed_everything(0, verbose=False)
    trainer = Trainer(
        accelerator="cpu", max_epochs=4, logger=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, default_root_dir=str(tmp_path / "run"), callbacks=[best],
    )  # fmt: skip
    trainer.fit(task, datamodule=data)
    labels = one_hot(torch.from_numpy(np.eye(32, dtype=np.int64))[None], 3)
    kept = LabelAutoencoder.load(tmp_path / "run" / "autoencoder").encode(labels)
    torch.testing.assert_close(kept, LabelAutoencoder.load(best.best_model_path).encode(labels))
    assert not torch.allclose(kept, task.network.eval().encode(labels))


@pytest.mark.filterwarnings("ignore")
def test_two_processes_scale_the_latents_as_one_does(root, tmp_path):
    scales = []
    for name, devices in (("alone", {"devices": 1}), ("pair", {"devices": 2, "strategy": "ddp_fork"})):
        task = MaskAutoencoder(**{**SMALL, "lr": 1e-9})  # what is drawn of the latents differs and must not show
        fit(task, make(root, batch_size=4), default_root_dir=str(tmp_path / name), **devices)
        scales.append(LabelAutoencoder.load(tmp_path / name / "autoencoder").scale)
    torch.testing.assert_close(*scales, rtol=1e-4, atol=0)


# ---- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl": -1.0}, r"model\.init_args\.kl = -1\.0"),
        ({"kl": math.nan}, r"model\.init_args\.kl = nan"),
        ({"channels": (8,)}, r"model\.init_args\.channels = \[8\]"),
        ({"class_names": ["background", "dog", "cat"]}, "the model's classes are .*dog"),
    ],
)
def test_options_that_make_no_autoencoder_are_named(data, options, message):
    with pytest.raises(UserError, match=message):
        fit(MaskAutoencoder(**{**SMALL, **options}), data)


def test_sides_that_no_latent_covers_are_told_before_training(root):
    with pytest.raises(UserError, match=r"data\.image_size: .*30 x 30 pixels.*multiples of 4"):
        fit(MaskAutoencoder(channels=(8, 8, 8)), make(root, image_size=30))


def test_masks_are_needed(tmp_path):
    root = make_mvtec(tmp_path / "tiles")
    data = MVTecAD(str(root), setting="supervised", leakage="off", batch_size=4)
    with pytest.raises(UserError, match=r"data\.with_masks"):
        fit(MaskAutoencoder(**SMALL), data)


def test_a_checkpoint_of_other_classes_is_refused(data, root, tmp_path):
    task = MaskAutoencoder(**SMALL)
    trainer = fit(task, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    other = MaskAutoencoder(**SMALL)
    with pytest.raises(UserError, match="classes"):
        make_trainer().test(other, datamodule=make(root, classes=["cat", "bird"]), ckpt_path=str(tmp_path / "a.ckpt"))
