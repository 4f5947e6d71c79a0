"""A tiny Segmenter and a tiny DDPMRefiner, their data and their runs, as the tests of both tasks use them."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, seed_everything
from PIL import Image

from lit_defect.data import MVTecAD, PascalVOC
from lit_defect.reporting.probabilities import write_header, write_probabilities
from lit_defect.tasks import DDPMRefiner, Segmenter
from tests.contrastive import make_trainer
from tests.fakes import make_mvtec

SIZE = 32
TINY_SEGMENTER = {
    "encoder": "tu-test_convnext", "options": {"encoder_depth": 2, "decoder_channels": [16, 8]}, "lr": 0.01,
}  # fmt: skip
TINY_REFINER = {"channels": [8, 16], "layers": 1, "attention": False, "ema_decay": 0.9, "lr": 0.01}
# All that a preset decides, so that a test does not change with one.
QUICK = {
    "conditioning": "concat", "start": "clean", "train_on": "prediction", "label_input": "sample", "num_samples": 1,
    "scheduler": "ddim", "steps": 10, "strength": 0.5, "prediction": "logits", "beta_schedule": "cosine",
    "train_steps": 20,
}  # fmt: skip
# The paper's preset in so few steps that a test can wait for them.
SHORT_PAPER = {"preset": "paper", "train_steps": 20, "steps": 10}
SERVED = {"image_size": SIZE, "batch_size": 4, "leakage": "off"}
TILES = {**SERVED, "setting": "supervised", "with_masks": True}
DEFECTS = ["background", "defect"]


def make_tiles(root: Path, **settings: Any) -> Path:
    """12 good and 20 defective pictures of 32 x 32 pixels, 8 of which test."""
    return make_mvtec(
        root,
        **{"size": (SIZE, SIZE), "train_good": 8, "test_good": 4, "defects": {"crack": 10, "hole": 10}, **settings},
    )


def tiles(root: Path, **settings: Any) -> MVTecAD:
    return MVTecAD(str(root), **{**TILES, **settings})


def animals(root: Path, **settings: Any) -> PascalVOC:
    return PascalVOC(str(root), **{**SERVED, "classes": ["bird", "cat"], **settings})


def segmenter(**settings: Any) -> Segmenter:
    return Segmenter(**{**TINY_SEGMENTER, **settings})


def refiner(**settings: Any) -> DDPMRefiner:
    return DDPMRefiner(**{**TINY_REFINER, **settings})


def fit(task: Any, data: LightningDataModule, **settings: Any) -> Any:
    seed_everything(0, verbose=False)
    trainer = make_trainer(**settings)
    trainer.fit(task, datamodule=data)
    return trainer


def write_config(
    path: Path,
    model: str,
    root: Path,
    *,
    data: Mapping[str, Any] | None = None,
    trainer: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """A configuration of a tiny `model`, of MVTec's layout unless `data` names classes; gives the path."""
    tiny = TINY_SEGMENTER if model == "Segmenter" else TINY_REFINER
    chosen = dict(data or {})
    kind = chosen.pop("class_path", "MVTecAD")
    served = TILES if kind == "MVTecAD" else SERVED
    content = {
        "experiment": "tiny",
        "wandb": "off",
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "num_sanity_val_steps": 0, **(trainer or {})},
        "model": {"class_path": model, "init_args": {**tiny, **options}},
        "data": {"class_path": kind, "init_args": {"root": str(root), **served, **chosen}},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def command(folder: Path, *arguments: object) -> Any:
    """The command line in this process, for fixtures that outlive a test; runs go to `folder`."""
    from lit_defect.cli import main

    words = [str(argument) for argument in arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["lit_defect", *words])
        for name in ("LIT_DEFECT_RUN_ID", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        patch.setenv("LIT_DEFECT_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        return main()


def refused(capsys: pytest.CaptureFixture[str], run: Any, *arguments: object) -> str:
    """What the command line says when it refuses; a test fails if it does not."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def figures(folder: Path, stage: str = "test") -> dict[str, Any]:
    return json.loads((folder / f"{stage}_metrics.json").read_text())


def plain(result: Mapping[str, Any]) -> dict[str, Any]:
    """Figures without what differs from machine to machine."""
    return {key: value for key, value in result.items() if key != "ms_per_image"}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]


def truths(data: Any, split: str = "test") -> dict[str, np.ndarray]:
    """Mask (H, W) of each sample as a batch has it, by name; 255 is void."""
    data.setup("test")
    found = {}
    for batch in data.loader(split):
        masks = batch["mask"]
        masks = masks[:, 0] if masks.ndim == 4 else masks
        found.update(zip(batch["name"], masks.long().numpy(), strict=True))
    return found


def read_masks(folder: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """What `predict` has written, by name."""
    found = {}
    for name in names:
        with Image.open(folder / "predict_masks" / f"{name}.png") as image:
            assert image.mode == "P"
            found[name] = np.asarray(image).astype(np.int64)
    return found


def halved(mask: np.ndarray) -> np.ndarray:
    """The left half of what a mask marks, as a poor first stage might find it."""
    columns = np.flatnonzero(mask.any(0))
    half = mask.copy()
    half[:, columns[len(columns) // 2] if len(columns) else 0 :] = 0
    return half


def iou_by_hand(found: np.ndarray, truth: np.ndarray, number: int) -> float:
    """Of one class in one picture; nan where the truth lacks it."""
    valid = truth != 255
    hit, true = (found == number) & valid, (truth == number) & valid
    return float((hit & true).sum() / (hit | true).sum()) if true.any() else float("nan")


def pooled_by_hand(found: Sequence[np.ndarray], truth: Sequence[np.ndarray], classes: int) -> list[float]:
    """IoU of each class over the pixels of all pictures."""
    one, other = (np.concatenate([mask.ravel() for mask in masks]) for masks in (found, truth))
    one, other = one[other != 255], other[other != 255]
    return [float(((one == c) & (other == c)).sum() / ((one == c) | (other == c)).sum()) for c in range(classes)]


def write_maps(folder: Path, masks: Mapping[str, np.ndarray], class_names: Sequence[str], sure: float = 0.9) -> Path:
    """Probability maps that say each mask's class with probability `sure`; void reads as background."""
    write_header(folder, class_names)
    count = len(class_names)
    for name, mask in masks.items():
        hot = np.eye(count)[np.where(mask == 255, 0, mask)].transpose(2, 0, 1)  # (C, H, W)
        write_probabilities(folder, name, hot * sure + (1 - hot) * (1 - sure) / (count - 1))
    return folder
