"""A tiny AnomalyDiffusion on a base with random weights, its data and its runs, as the tests of the task use them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from lit_defect.data import MVTecAD
from lit_defect.generation.options import Generation
from lit_defect.tasks import AnomalyDiffusion
from tests.contrastive import make_trainer
from tests.fakes import make_mvtec
from tests.latent import tiny_pipeline

SIZE = 32  # that the pictures are served at; their own sides are odd numbers
NATIVE = (37, 45)
PAIRS = [("tile", "crack"), ("tile", "hole")]
TINY = {"anomaly_tokens": 2, "spatial_tokens": 2, "lr": 0.01}
SERVED = {"image_size": SIZE, "batch_size": 4, "leakage": "off", "with_masks": True, "setting": "few_shot",
          "val_fraction": 0.0}  # fmt: skip
# A random base makes noise of a picture: quick, and all accepted while the whole mask is the label.
QUICK = {"count": 2, "sampler": "ddim", "steps": 4, "strength": 1.0, "guidance": 1.0, "reweight": "off",
         "grow": 0.0,
         "candidates": 1, "foreground": "all", "restore": False, "repair": False, "least_contrast": 0.0, "most_contrast": 0.0,
         "batch": 3}  # fmt: skip


def make_parts(root: Path, **settings: Any) -> Path:
    """6 good pictures to train on, of 9 cracks the first 3, of 6 holes the first 2; sides that nothing divides."""
    given = {"size": NATIVE, "train_good": 6, "test_good": 2, "defects": {"crack": 9, "hole": 6}, **settings}
    return make_mvtec(root, **given)


def make_base(folder: Path, **settings: Any) -> Path:
    """Latents of an eighth of 32 pixels: 8 x 8 places."""
    return tiny_pipeline(folder, factor=4, **settings)


def parts(root: Path, **settings: Any) -> MVTecAD:
    return MVTecAD(str(root), **{**SERVED, **settings})


def task_of(base: Path, generation: dict[str, Any] | None = None, **settings: Any) -> AnomalyDiffusion:
    options = Generation(**{**QUICK, **(generation or {})})
    return AnomalyDiffusion(**{"base": str(base), **TINY, **settings}, generation=options)


def write_config(
    path: Path, root: Path, base: Path, *, data: Any = None, trainer: Any = None, generation: Any = None, **model: Any
) -> Path:
    """A configuration of the same things for the command line; gives its path."""
    content = {
        "experiment": "tiny",
        "wandb": "off",
        "trainer": {"max_epochs": 1, "accelerator": "cpu", **(trainer or {})},
        "model": {
            "class_path": "AnomalyDiffusion",
            "init_args": {"base": str(base), **TINY, "generation": {**QUICK, **(generation or {})}, **model},
        },
        "data": {"class_path": "MVTecAD", "init_args": {"root": str(root), **SERVED, **(data or {})}},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def generate(checkpoint: Path, task: Any, data: Any, root: Path, seed: int = 0, **trainer: Any) -> list[dict[str, str]]:
    """Predict from Python into `root`; gives the lines of the manifest."""
    from lightning.pytorch import seed_everything

    seed_everything(seed, verbose=False)
    task.generation = Generation(**{**vars(task.generation), "output": str(root)})
    make_trainer(default_root_dir=root.parent, **trainer).predict(
        task, datamodule=data, ckpt_path=checkpoint, return_predictions=False, weights_only=True
    )
    return lines(root / "manifest.csv")


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def pixels(path: Path) -> np.ndarray:
    """(H, W, 3) of a picture, grey or not; (H, W) of nothing else."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def marked(path: Path) -> np.ndarray:
    """(H, W) bool of a mask."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("L")) > 0


def contents(root: Path) -> dict[str, bytes]:
    """Every file of a generated data set by its name."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
