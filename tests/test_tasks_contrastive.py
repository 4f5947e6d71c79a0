"""SimCLR on pseudo-anomalies: losses, scores in the checkpoint, results, new pictures, two processes, bad input."""

from __future__ import annotations

import copy
import csv
import json
import os
import socket
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from PIL import Image
from torch import Tensor, nn

from lit_defect.anomalies import CutPaste, CutPaste3Way, LocalPseudoAnomaly, PseudoAnomalies, PseudoAnomaly
from lit_defect.anomalies.perlin import PerlinAnomaly
from lit_defect.callbacks.run import LastCheckpoint
from lit_defect.data import ELPV, CustomCrops, MVTecAD
from lit_defect.errors import UserError
from lit_defect.metrics.anomaly import threshold_for_overkill
from lit_defect.reporting.maps import read_map
from lit_defect.scoring.detector import SCORES
from lit_defect.tasks import SimCLR, contrastive
from lit_defect.tasks.views import contrastive_views
from tests.fakes import make_crops_folder, make_elpv, make_mvtec, save, surface

PIXEL = {"aupro", "pixel_auroc", "pixel_average_precision", "pixel_f1_max"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_mvtec(tmp_path / "data", train_good=15, test_good=5, defects={"crack": 4, "hole": 4})


def make_data(root: Path, **settings: Any) -> MVTecAD:
    tiny = {"image_size": 32, "batch_size": 4, "leakage": "off", "with_masks": True}
    return MVTecAD(str(root), **{**tiny, **settings})


def make_task(kind: type[SimCLR] = SimCLR, **settings: Any) -> SimCLR:
    tiny = {"backbone": "test_resnet", "neighbours": 3, "map_dimensions": 8, "projection": (16, 8), "lr": 0.01}
    return kind(**{**tiny, **settings})


def make_trainer(epochs: int = 1, **settings: Any) -> Trainer:
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler"),
        False,
    )
    return Trainer(accelerator="cpu", max_epochs=epochs, num_sanity_val_steps=0, **quiet, **settings)


def fit(task: SimCLR, data: LightningDataModule, **settings: Any) -> Trainer:
    seed_everything(0, verbose=False)
    trainer = make_trainer(**settings)
    trainer.fit(task, datamodule=data)
    return trainer


def scores_of(task: SimCLR) -> dict[str, np.ndarray]:
    return task._evaluation.scores


# --- losses ---

SYSTEMS = [
    ("ntxent", None),
    ("ntxent_hard", None),
    ("ntxent_hard", PerlinAnomaly),
    ("one_class", None),
    ("classifier", CutPaste),
    ("classifier", CutPaste3Way),
    ("none", None),
]


@pytest.mark.parametrize(("loss", "anomaly"), SYSTEMS, ids=lambda value: getattr(value, "__name__", value))
def test_every_loss_trains_and_is_tested(root, loss, anomaly):
    task, data = make_task(loss=loss, anomaly=anomaly() if anomaly else None), make_data(root)
    before = []

    class Start(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: SimCLR) -> None:
            before.append(copy.deepcopy(pl_module.network.state_dict()))

    trainer = fit(task, data, callbacks=[Start()])
    assert task.detector.fitted
    assert task.thresholds.isfinite().all()
    assert task.training is False or task.network.training  # fitting puts the mode back
    same = {key: torch.equal(value, before[0][key]) for key, value in task.network.state_dict().items()}
    assert all(same.values()) == (loss == "none")
    classes = {"CutPaste": 2, "CutPaste3Way": 3}.get(type(task.anomaly).__name__)
    assert task.projection[3].out_features == (classes if loss == "classifier" else 8)
    assert ("train/rejected" in trainer.callback_metrics) == (loss not in ("none", "ntxent"))
    if loss != "none":
        assert np.isfinite(float(trainer.callback_metrics["train/loss"]))
        assert np.isfinite(float(trainer.callback_metrics["val/loss"]))
    assert 0 < float(task.minutes) < 1
    (logged,) = trainer.test(task, datamodule=data, verbose=False)
    assert {"test/auroc", "test/aupro", "test/escape_rate", "test/overkill_rate"} <= logged.keys()
    assert all(len(values) == 13 and np.isfinite(values).all() for values in scores_of(task).values())
    assert logged["test/auroc"] > 0.8  # bright and dark patches: no network misses them


def test_the_threshold_lets_the_allowed_share_pass(root):
    task, data = make_task(allowed_overkill=0.4), make_data(root, val_fraction=0.35)
    fit(task, data).validate(task, datamodule=data, verbose=False)
    for name, limit in task._evaluation.thresholds.items():
        values = scores_of(task)[name]
        assert len(values) == 5
        assert limit == threshold_for_overkill(values, 0.4)
        assert (values >= limit).sum() == 2


def test_the_scores_are_fitted_to_plain_training_pictures(root):
    task, data = make_task(), make_data(root)
    fit(task, data)
    task.eval()
    batch = data.loader("train").batch(range(12))
    with torch.no_grad():
        features, _ = task.embed(task.pixels(batch["image"]))
    torch.testing.assert_close(task.detector.kde.bank, nn.functional.normalize(features, dim=1), rtol=1e-4, atol=1e-6)


def test_frozen_parts_stay(root):
    task = make_task(frozen_stages=2, norms="frozen")
    kept: dict[str, Tensor] = {}

    class Start(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: SimCLR) -> None:
            kept.update(copy.deepcopy(pl_module.network.model.state_dict()))

    fit(task, make_data(root), callbacks=[Start()])
    same = {key for key, value in task.network.model.state_dict().items() if torch.equal(value, kept[key])}
    assert {key for key in kept if key.startswith(("conv1", "bn1", "layer1")) or "running" in key} <= same
    assert "layer2.0.conv1.weight" not in same


def test_half_precision_trains_and_scores(root):
    task, data = make_task(), make_data(root)
    fit(task, data, precision="bf16-mixed").test(task, datamodule=data, verbose=False)
    assert all(np.isfinite(values).all() for values in scores_of(task).values())


# --- checkpoints ---


@pytest.mark.parametrize("pose", ["auto", "free"])
def test_a_checkpoint_serves_without_trainer_and_data(root, tmp_path, pose):
    task, data = make_task(loss="classifier", anomaly=CutPaste(), pose=pose, image_size=32), make_data(root)
    fit(task, data).save_checkpoint(tmp_path / "made.ckpt")
    torch.load(tmp_path / "made.ckpt", weights_only=True)  # plain types only
    loaded = SimCLR.load_from_checkpoint(tmp_path / "made.ckpt").eval()
    assert loaded.detector.local.positions == "shared"  # tile lies in any direction
    pixels = torch.randint(256, (2, 3, 40, 44), dtype=torch.uint8)
    with torch.no_grad():
        found, grid = loaded(pixels)
        expected, expected_grid = task.eval()(pixels)
    assert found.keys() == set(SCORES)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(grid, expected_grid)
    assert torch.equal(loaded.thresholds, task.thresholds)


@pytest.mark.parametrize("pose", ["auto", "fixed"])
def test_an_unfinished_checkpoint_is_fitted_at_the_test(root, tmp_path, pose):
    data, whole = make_data(root), make_task(pose=pose)
    early = LastCheckpoint(tmp_path / "early.ckpt")
    trainer = fit(whole, data, epochs=2, callbacks=[early])
    task = make_task(pose=pose)
    first = fit(task, make_data(root), epochs=3, limit_train_batches=1, callbacks=[Stop(1, tmp_path / "early.ckpt")])
    assert first.interrupted or first.global_step == 3
    # Into a new task, and into one that holds the scores of other weights.
    for receiver in (make_task(pose=pose), whole):
        with pytest.warns(UserWarning, match="before the training ended"):
            trainer = make_trainer()
            trainer.test(receiver, datamodule=make_data(root), ckpt_path=tmp_path / "early.ckpt", verbose=False)
        assert receiver.detector.fitted
        assert receiver.thresholds.isfinite().all()
    for name, values in scores_of(whole).items():
        np.testing.assert_array_equal(values, scores_of(receiver)[name])


class Stop(Callback):
    """Saves the state after some steps."""

    def __init__(self, steps: int, path: Path) -> None:
        self.steps = steps
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(self.path)


# --- views ---


def gradient_picture(height: int = 40, width: int = 60) -> Tensor:
    """A picture whose first two channels say where they come from: row and column, 0 to 1."""
    down, right = torch.linspace(0, 1, height), torch.linspace(0, 1, width)
    rows, columns = torch.meshgrid(down, right, indexing="ij")
    return torch.stack([rows, columns, torch.full_like(rows, 0.5)])


def undone(views: Tensor) -> Tensor:
    """Places (B, 2, H, W) shown by views of `gradient_picture`, with the change of light taken back.

    The third channel is a constant 0.5, so it tells the offset; the range of the other two gives the gain.
    """
    return views[:, :2] - views[:, 2:]


def test_views_keep_nine_tenths_of_the_picture(monkeypatch):
    places = gradient_picture().expand(2000, -1, -1, -1)
    monkeypatch.setattr(torch.nn.functional, "grid_sample", lambda images, grid, **_: grid.permute(0, 3, 1, 2)[:, [0, 1, 1]])
    shown: list[Tensor] = []
    monkeypatch.setattr(Tensor, "clamp", clamp_noting(shown, Tensor.clamp))
    torch.manual_seed(0)
    contrastive_views(places, "fixed")
    monkeypatch.undo()
    del shown


def clamp_noting(shown: list[Tensor], original: Callable) -> Callable:
    def noting(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shown.append(self)
        return original(self, *args, **kwargs)

    return noting
