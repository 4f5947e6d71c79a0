"""A tiny ImageAutoencoder and a tiny LatentDiffusion upon it, their data and their runs, as the tests of both use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from lit_defect.data import MVTecAD
from lit_defect.tasks import ImageAutoencoder, LatentDiffusion
from tests.contrastive import make_trainer
from tests.fakes import make_mvtec
from tests.segmentation import command

SERVED = {
    "setting": "one_class", "with_masks": True, "image_size": 32, "batch_size": 4, "eval_batch_size": 4,
    "val_fraction": 0.25, "leakage": "off",
}  # fmt: skip
AUTOENCODER = {"channels": [8, 16], "latent_channels": 2, "lr": 5e-3}
BASE = {
    "channels": [16, 32], "heads": 2, "text_width": 16, "text_layers": 1, "variants": 2, "lr": 2e-3, "ema_decay": 0.9,
}  # fmt: skip
KINDS = {"ImageAutoencoder": AUTOENCODER, "LatentDiffusion": BASE}
EPOCHS = {"ImageAutoencoder": 4, "LatentDiffusion": 2}
SAVING = {"class_path": "lit_defect.callbacks.run.LastCheckpoint", "init_args": {"every_n_steps": 2}}


class Runs(NamedTuple):
    root: Path  # of the data: 9 pictures train, 3 validate, 4 good and 6 defective ones test
    folder: Path  # where `runs` is
    autoencoder: Path
    base: Path


def write(path: Path, model: str, root: Path, *, trainer: Any = None, data: Any = None, **options: Any) -> Path:
    """A configuration of one of the two tasks."""
    content = {
        "experiment": model,
        "wandb": "off",
        "trainer": {"max_epochs": EPOCHS[model], "accelerator": "cpu", "num_sanity_val_steps": 0, **(trainer or {})},
        "model": {"class_path": model, "init_args": {**KINDS[model], **options}},
        "data": {"class_path": "MVTecAD", "init_args": {"root": str(root), **SERVED, **(data or {})}},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def few_samples(patch: pytest.MonkeyPatch) -> None:
    """A LatentDiffusion draws 2 pictures in 4 steps at the end."""
    patch.setattr("lit_defect.tasks.latent_diffusion._SHOWN", 2)
    patch.setattr("lit_defect.tasks.prompt_samples._STEPS", 4)


def make_runs(folder: Path) -> Runs:
    """Train both by the command line."""
    root = make_mvtec(folder / "data", size=(32, 32), train_good=12, test_good=4, defects={"crack": 3, "hole": 3})
    config = write(folder / "autoencoder.yaml", "ImageAutoencoder", root)
    command(folder, "fit", "--config", config, "--run_id", "one", "--test_after_fit", "true")
    autoencoder = folder / "runs" / "ImageAutoencoder" / "one"
    config = write(folder / "base.yaml", "LatentDiffusion", root, autoencoder=str(autoencoder))
    with pytest.MonkeyPatch.context() as patch:
        few_samples(patch)
        command(folder, "fit", "--config", config, "--run_id", "one")
    return Runs(root, folder, autoencoder, folder / "runs" / "LatentDiffusion" / "one")


def tiles(root: Path, **settings: Any) -> MVTecAD:
    return MVTecAD(str(root), **{**SERVED, **settings})


def ready(task: Any, data: MVTecAD) -> Any:
    """A task with its networks and data, without training."""
    trainer = make_trainer()
    trainer.datamodule = data
    task._trainer = trainer
    data.setup("fit")
    task.setup("fit")
    task.configure_model()
    return task


def autoencoder(**options: Any) -> ImageAutoencoder:
    return ImageAutoencoder(**{**AUTOENCODER, **options})


def base(autoencoder: Path, **options: Any) -> LatentDiffusion:
    return LatentDiffusion(**{"autoencoder": str(autoencoder), **BASE, **options})
