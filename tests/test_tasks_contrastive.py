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
from lit_defect.data import ELPV, CustomCrops, MVTecAD
from lit_defect.errors import UserError
from lit_defect.metrics.anomaly import threshold_for_overkill
from lit_defect.reporting.maps import read_map
from lit_defect.scoring.detector import SCORES
from lit_defect.tasks import SimCLR, contrastive, views
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
    path, whole = tmp_path / "early.ckpt", make_task(pose=pose)
    fit(whole, make_data(root), epochs=2, callbacks=[Save(path, steps=1)])
    receivers = [make_task(pose=pose), whole]  # a new one, and one that holds the scores of other weights
    for task in receivers:
        with pytest.warns(UserWarning, match="before the training ended"):
            make_trainer().test(task, datamodule=make_data(root), ckpt_path=path, verbose=False)
        assert task.thresholds.isfinite().all()
    for name, values in scores_of(whole).items():
        np.testing.assert_array_equal(values, scores_of(receivers[0])[name])


def test_new_pictures_cannot_be_scored_by_an_unfinished_checkpoint(root, tmp_path):
    fit(make_task(), make_data(root), callbacks=[Save(tmp_path / "early.ckpt", steps=1)])
    data = make_data(root, predict_root=str(root / "tile" / "test"))
    with pytest.raises(UserError, match="no fitted scores"):
        make_trainer().predict(make_task(), datamodule=data, ckpt_path=tmp_path / "early.ckpt")


class Save(Callback):
    """Saves the state after some steps."""

    def __init__(self, path: Path, steps: int) -> None:
        self.path = path
        self.steps = steps

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(self.path)


# --- views ---


def test_views_keep_nine_tenths_of_the_picture_in_sight(monkeypatch):
    grids: list[Tensor] = []
    original = views.F.grid_sample

    def noting(images: Tensor, grid: Tensor, **settings: Any) -> Tensor:
        grids.append(grid)
        return original(images, grid, **settings)

    monkeypatch.setattr(views.F, "grid_sample", noting)
    torch.manual_seed(0)
    contrastive_views(torch.rand(4000, 3, 4, 6), "fixed")
    share, moved = torch.ones(4000), []
    for axis, count in ((0, 6), (1, 4)):
        along = grids[0][:, 0, :, 0] if axis == 0 else grids[0][:, :, 0, 1]  # centres of the pixels, -1 to 1
        middle, half = along.mean(1), (along[:, -1] - along[:, 0]) / 2 * count / (count - 1)
        share *= ((middle + half).clamp(max=1) - (middle - half).clamp(min=-1)) / 2
        moved.append(middle / 2)
    assert 0.9 - 1e-5 <= share.min() < 0.905
    assert share.max() > 0.99
    assert 0.035 < torch.stack(moved).abs().max() <= 0.04 + 1e-6


@pytest.mark.parametrize("pose", ["fixed", "flips", "free"])
def test_views_are_drawn_from_the_seed_and_stay_in_range(pose):
    images = torch.rand(64, 3, 24, 24)
    torch.manual_seed(3)
    first, second = (contrastive_views(images, pose) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(contrastive_views(images, pose), first)
    assert first.shape == images.shape
    assert first.min() >= 0
    assert first.max() <= 1
    black = contrastive_views(torch.zeros(2, 3, 24, 24), pose)
    assert black.abs().max() == 0
    white = contrastive_views(torch.ones(64, 3, 24, 24), pose)  # of the light a tenth
    assert 0.9 - 1e-5 <= white.min() < 0.92


@pytest.mark.parametrize(("size", "free"), [((24, 24), 8), ((24, 36), 4)])
def test_only_a_free_pose_is_flipped_and_turned(size, free):
    corner = torch.zeros(200, 3, *size)
    corner[:, :, 3:8, 3 : size[1] // 2] = 1  # a bar: no flip or turn of it looks the same
    for pose, expected in (("fixed", 1), ("flips", 4), ("free", free)):
        torch.manual_seed(0)
        seen = contrastive_views(corner, pose)[:, 0]
        down = (seen > 0.3).float().sum(2).argmax(1) < size[0] / 2
        wide, high = ((seen > 0.3).any(axis).sum(1) for axis in (1, 2))
        right = seen[:, :, : size[1] // 2].sum((1, 2)) > seen[:, :, size[1] // 2 :].sum((1, 2))
        below = seen[:, : size[0] // 2].sum((1, 2)) > seen[:, size[0] // 2 :].sum((1, 2))
        kinds = {(bool(r), bool(b), bool(t)) for r, b, t in zip(right, below, high > wide, strict=True)}
        assert len(kinds) == expected, pose
        assert pose != "fixed" or kinds == {(True, True, False)}
        del down


# --- the command line ---


@pytest.fixture
def config(tmp_path: Path, root: Path) -> Callable[..., Path]:
    """Writes a configuration; keyword arguments go to the model, `data` and `trainer` to these."""

    def write(*, data: dict[str, Any] | None = None, trainer: dict[str, Any] | None = None, **model: Any) -> Path:
        tiny = {"backbone": "test_resnet", "neighbours": 3, "map_dimensions": 8, "projection": [16, 8], "lr": 0.01}
        source = {"root": str(root), "image_size": 32, "batch_size": 4, "leakage": "off", "with_masks": True}
        content = {
            "experiment": "tiny",
            "wandb": "off",
            "trainer": {"max_epochs": 1, "accelerator": "cpu", "num_sanity_val_steps": 0, **(trainer or {})},
            "model": {"class_path": "SimCLR", "init_args": {**tiny, **model}},
            "data": {"class_path": "MVTecAD", "init_args": {**source, **(data or {})}},
        }
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "tiny" / "one"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_what_a_run_leaves(lit_defect, config, folder, capsys):
    path = config(
        loss="classifier", anomaly={"class_path": "CutPaste3Way", "init_args": {"ssim_scope": "patch"}}, pose="fixed"
    )
    words = ("--config", path, "--run_id", "one")
    lit_defect("fit", *words, "--test_after_fit", "true", "--trainer.max_epochs", "2")
    record = json.loads((folder / "test_metrics.json").read_text())
    assert "warning" not in capsys.readouterr().err  # what is tested has its scores with it

    assert record["n"] == 13
    assert record["score"] == "gaussian"
    assert set(record["image"]) == set(SCORES)
    assert set(record["pixel"]) == PIXEL
    assert all(0 <= value <= 1 for value in record["pixel"].values())
    named = {key: record[key] for key in ("loss", "anomaly", "weights", "backbone", "category", "training_seed")}
    assert named == {
        "loss": "classifier", "anomaly": "CutPaste3Way", "weights": None, "backbone": "test_resnet",
        "category": "tile", "training_seed": 0,
    }  # fmt: skip
    assert 0 < record["training_minutes"] + 0.01 < 1
    assert 0 < record["latency_ms"]["median"] <= record["latency_ms"]["p95"]
    for entry in record["image"].values():
        assert entry["counts"] == {"good": 5, "defective": 8}
        assert set(entry["auroc_by_type"]) == {"crack", "hole"}
        assert entry["threshold"] is not None

    lines = rows(folder / "test_predictions.csv")
    assert len(lines) == 13
    limit = record["image"]["gaussian"]["threshold"]
    for line in lines:
        assert line["score"] == line["gaussian"]
        assert line["prediction"] == ("defective" if float(line["score"]) >= limit else "good")
        assert line["label"] == ("good" if "/good/" in line["name"] else "defective")
        assert line["type"] == line["name"].split("/")[-2]
        assert line["split"] == "test"
    missed = sum(line["label"] == "defective" and line["prediction"] == "good" for line in lines)
    assert missed == record["image"]["gaussian"]["escape_rate"]["k"]
    figures = {file.name for file in (folder / "figures").iterdir()}
    drawn = {"pseudo_anomalies", "discarded_by_area", "training"}
    drawn |= {f"test_{name}" for name in ("scores", "roc", "precision_recall", "auroc_by_type", "found", "grad_cam")}
    assert {f"{name}.png" for name in drawn} <= figures

    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"]["detector.gaussian.centre"].numel() == 96
    assert checkpoint["state_dict"]["thresholds"].isfinite().all()
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["epoch"] == checkpoint["epoch"] == 1

    lit_defect("test", *words, "--ckpt_path", "last")
    again = json.loads((folder / "test_metrics.json").read_text())
    assert (folder / "test_metrics.1.json").is_file()
    assert {**again, "latency_ms": 0} == {**record, "latency_ms": 0}
    assert rows(folder / "test_predictions.csv") == lines

    lit_defect("validate", *words, "--ckpt_path", "last")
    validated = json.loads((folder / "val_metrics.json").read_text())
    assert validated["n"] == 3
    assert validated["image"]["gaussian"]["auroc"]["value"] is None
    assert validated["pixel"] == dict.fromkeys(PIXEL)
    assert validated["image"]["gaussian"]["threshold"] == limit
    assert {line["split"] for line in rows(folder / "val_predictions.csv")} == {"val"}


class PulledPlug(Callback):
    """Ends a run at a step, as a power cut does: nothing is written any more."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("the plug was pulled")


@pytest.mark.parametrize("loss", ["ntxent_hard", "classifier"])
def test_a_stopped_run_ends_like_an_undisturbed_one(lit_defect, config, folder, monkeypatch, loss):
    saving = {"class_path": "lit_defect.callbacks.run.LastCheckpoint", "init_args": {"every_n_steps": 2}}
    path = config(loss=loss, trainer={"max_epochs": 2, "callbacks": [saving]})  # 3 steps an epoch
    lit_defect("fit", "--config", path, "--run_id", "whole")
    original = SimCLR.training_step

    def pulled(self: SimCLR, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == 5:
            raise RuntimeError("the plug was pulled")
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(SimCLR, "training_step", pulled)
        with pytest.raises(RuntimeError, match="plug"):
            lit_defect("fit", "--config", path, "--run_id", "one")
    stopped = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert stopped["global_step"] == 4, "within the second epoch"
    assert not stopped["state_dict"]["detector.gaussian.centre"].numel()
    lit_defect("fit", "--config", path, "--run_id", "one", "--resume")
    whole, resumed = (
        torch.load(folder.parent / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "one")
    )
    assert whole.keys() == resumed.keys()
    assert [key for key in whole if key != "minutes" and not torch.equal(whole[key], resumed[key])] == []
    assert whole["thresholds"].isfinite().all()
    assert 0 < float(resumed["minutes"]) < 1


@pytest.mark.parametrize("maps", ["npy", "tiff", "off"])
def test_new_pictures(lit_defect, config, folder, tmp_path, maps):
    path = config(maps=maps)  # of tile, whose pose is free: new pictures have no category to tell that
    words = ("--config", path, "--run_id", "one", "--ckpt_path", "last")
    lit_defect("fit", *words[:4])
    sizes = {"a.png": (32, 40), "b.png": (70, 50), "inner/deep/c.bmp": (33, 33), "inner/a.png": (48, 20)}
    rng = np.random.default_rng(5)
    for name, size in sizes.items():
        save(surface(rng, size), tmp_path / "new" / name)
    new = ("--data.predict_root", tmp_path / "new")
    lit_defect("predict", *words, *new)
    lines = rows(folder / "predict_predictions.csv")
    assert [line["name"] for line in lines] == sorted(sizes)
    assert {line["label"] for line in lines} == {""}
    assert {line["prediction"] for line in lines} <= {"good", "defective"}
    place = folder / "predict_maps"
    if maps == "off":
        assert not place.exists()
        return
    files = {file.relative_to(place).as_posix() for file in place.rglob("*") if file.is_file()}
    assert files == {f"{name}.{end}" for name in sizes for end in (maps, "overlay.png")}
    task = SimCLR.load_from_checkpoint(folder / "checkpoints" / "last.ckpt").eval()
    white = 16 * float(task.thresholds[SCORES.index("map_max")])
    for name, size in sizes.items():
        found = read_map(place / f"{name}.{maps}")
        assert found.shape == size
        with Image.open(place / f"{name}.overlay.png") as drawn:
            assert drawn.size == size[::-1]
            assert drawn.mode == "RGB"
        expected = map_of(task, tmp_path / "new" / name)
        if maps == "npy":
            np.testing.assert_allclose(found, expected, rtol=1e-4)
        else:
            assert expected.max() < white
            np.testing.assert_allclose(found, expected, atol=1.01 * white / 65535 / 2 + 1e-4 * expected.max())
    lit_defect("predict", *words, *new)
    assert (folder / "predict_maps.1").is_dir()
    assert (folder / "predict_maps").is_dir()
    assert rows(folder / "predict_predictions.1.csv") == rows(folder / "predict_predictions.csv")


def map_of(task: SimCLR, path: Path) -> np.ndarray:
    """The map of a picture at its own size, worked out from the parts."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
        small = np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR))
    with torch.no_grad():
        _, grid = task(torch.from_numpy(small.copy()).permute(2, 0, 1)[None])
        return task.detector.enlarge(grid, pixels.shape[:2])[0].numpy()
