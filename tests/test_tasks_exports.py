"""What other runs build upon: written whole, of the best state, and also when the run was stopped before it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from safetensors.torch import load_file

from lit_defect.callbacks.run import BestCheckpoint
from lit_defect.tasks import AnomalyDiffusion, ImageAutoencoder, LatentDiffusion, MaskAutoencoder
from tests.anomaly_diffusion import make_base, make_parts, parts, task_of, write_config
from tests.contrastive import make_trainer
from tests.fakes import make_mvtec, make_voc
from tests.latent import tiny_vae
from tests.latent_tasks import few_samples, write
from tests.segmentation import weights

KINDS = {
    AnomalyDiffusion: "learnt.safetensors",
    ImageAutoencoder: "autoencoder",
    LatentDiffusion: "pipeline",
    MaskAutoencoder: "autoencoder",
}
ONE_EPOCH = {"max_epochs": 1, "accelerator": "cpu", "num_sanity_val_steps": 0}


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch):
    few_samples(monkeypatch)


def write_for(kind: Any, folder: Path) -> Path:
    """A configuration of one epoch with its data; gives its path."""
    path = folder / "c.yaml"
    if kind is AnomalyDiffusion:
        return write_config(path, make_parts(folder / "data"), make_base(folder / "base"), trainer=ONE_EPOCH)
    if kind is MaskAutoencoder:
        options = {"root": str(make_voc(folder / "voc")), "classes": ["bird", "cat"], "leakage": "off",
                   "image_size": 32, "batch_size": 8}  # fmt: skip
        model = {"class_path": "MaskAutoencoder", "init_args": {"channels": [8, 16], "latent_channels": 3}}
        data = {"class_path": "PascalVOC", "init_args": options}
        path.write_text(yaml.safe_dump({"wandb": "off", "trainer": ONE_EPOCH, "model": model, "data": data}))
        return path
    root = make_mvtec(folder / "data", size=(32, 32), train_good=12, test_good=4, defects={"crack": 3})
    tiny_vae(channels=2, factor=2).save_pretrained(folder / "vae")
    own = {"autoencoder": str(folder / "vae")} if kind is LatentDiffusion else {}
    return write(path, kind.__name__, root, trainer=ONE_EPOCH, **own)


def status(run: Path) -> str:
    return json.loads((run / "run.json").read_text())["status"]


def stopped_in_the_last_epoch(kind: Any, lit_defect: Any, *words: object) -> None:
    train = kind.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return train(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "training_step", training_step)
        patch.setattr("lit_defect.callbacks.run.LastCheckpoint.on_train_batch_end", lambda *_: None)
        with pytest.raises(SystemExit) as stop:
            lit_defect(*words)
    assert stop.value.code == 143


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_after_its_last_epoch_exports_when_it_is_resumed(lit_defect, tmp_path, kind):
    words = ("fit", "--config", write_for(kind, tmp_path), "--experiment", "tiny", "--run_id", "one")
    run = tmp_path / "runs" / "tiny" / "one"
    stopped_in_the_last_epoch(kind, lit_defect, *words)
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert status(run) == "interrupted"
    assert not (run / KINDS[kind]).exists()
    lit_defect(*words, "--resume")
    assert (run / KINDS[kind]).exists()
    assert status(run) == "finished"
    assert (run / "figures" / "samples.png").is_file() == (kind is LatentDiffusion)


def test_an_export_that_broke_off_is_made_again_and_never_seen(lit_defect, tmp_path, monkeypatch):
    words = ("fit", "--config", write_for(ImageAutoencoder, tmp_path), "--experiment", "tiny", "--run_id", "one")
    run, told = tmp_path / "runs" / "tiny" / "one", []
    whole = ImageAutoencoder.export

    def export(self: Any, path: Path) -> None:
        whole(self, path)
        told.append(status(run))
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(ImageAutoencoder, "export", export)
        with pytest.raises(OSError, match="no space left"):
            lit_defect(*words)
    assert told == ["running"], "a process that is killed here has not finished"
    assert status(run) == "failed"
    assert not (run / "autoencoder").exists()
    lit_defect(*words, "--resume")
    assert status(run) == "finished"
    assert (run / "autoencoder" / "config.json").is_file()
    assert not list(run.glob(".autoencoder*"))


def test_a_run_that_went_on_exports_anew_and_keeps_the_former(lit_defect, tmp_path):
    words = ("fit", "--config", write_for(AnomalyDiffusion, tmp_path), "--run_id", "one")
    run = tmp_path / "runs" / "tiny" / "one"
    lit_defect(*words)
    former = (run / "learnt.safetensors").read_bytes()
    more = (*words, "--resume", "--trainer.max_epochs", "2")
    stopped_in_the_last_epoch(AnomalyDiffusion, lit_defect, *more)
    lit_defect(*more)
    assert (run / "learnt.1.safetensors").read_bytes() == former
    last = weights(run)
    assert all(torch.equal(value, last[key]) for key, value in load_file(run / "learnt.safetensors").items())


def test_a_training_without_a_step_exports_nothing(tmp_path):
    root, base = make_parts(tmp_path / "data"), make_base(tmp_path / "base")
    trainer = make_trainer(default_root_dir=tmp_path / "run", limit_train_batches=0)
    trainer.fit(task_of(base, schedule="constant"), datamodule=parts(root))
    assert not (tmp_path / "run" / "learnt.safetensors").exists()


def test_what_an_inversion_exports_is_its_best_state(tmp_path):
    """The first epoch's here; the task itself goes on with the last, as it does on the ranks that write nothing."""
    root, base = make_parts(tmp_path / "data"), make_base(tmp_path / "base")
    best, task = BestCheckpoint(tmp_path / "checkpoints", "epoch", "min"), task_of(base, lora=2)
    seen: list[dict[str, torch.Tensor]] = []

    class Watch(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append({key: value.clone() for key, value in pl_module.learnt_state().items()})

    trainer = make_trainer(2, default_root_dir=tmp_path / "run", callbacks=[Watch()])
    trainer.callbacks.append(best)
    trainer.fit(task, datamodule=parts(root))
    first, last = seen
    assert any(not torch.equal(first[key], last[key]) for key in first)
    exported = load_file(tmp_path / "run" / "learnt.safetensors")
    assert [key for key in first if not torch.equal(first[key], exported[key])] == []
    assert [key for key in last if not torch.equal(last[key], task.learnt_state()[key])] == []
