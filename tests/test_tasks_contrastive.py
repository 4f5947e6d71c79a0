"""SimCLR on pseudo-anomalies: losses, scores in the checkpoint, results, new pictures, two processes, bad input."""

from __future__ import annotations

import copy
import csv
import json
import os
import socket
import sys
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
from lit_defect.data.loading import DefectDataset
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


def test_a_classifier_of_other_anomalies_is_refused(root, tmp_path):
    task = make_task(loss="classifier", anomaly=CutPaste3Way())
    fit(task, make_data(root)).save_checkpoint(tmp_path / "three.ckpt")
    with pytest.raises(UserError, match=r"tells 3 classes.*LocalPseudoAnomaly there are 2"):
        SimCLR.load_from_checkpoint(tmp_path / "three.ckpt")
    loaded = SimCLR.load_from_checkpoint(tmp_path / "three.ckpt", anomaly=CutPaste3Way())
    assert loaded.detector.fitted


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
        wide, high = ((seen > 0.3).any(axis).sum(1) for axis in (1, 2))
        right = seen[:, :, : size[1] // 2].sum((1, 2)) > seen[:, :, size[1] // 2 :].sum((1, 2))
        below = seen[:, : size[0] // 2].sum((1, 2)) > seen[:, size[0] // 2 :].sum((1, 2))
        kinds = {(bool(r), bool(b), bool(t)) for r, b, t in zip(right, below, high > wide, strict=True)}
        assert len(kinds) == expected, pose
        assert pose != "fixed" or kinds == {(True, True, False)}


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


# --- what can be missing ---


def test_without_validation_nothing_is_decided(lit_defect, config, folder, capsys):
    words = ("--config", config(data={"val_fraction": 0.0}), "--run_id", "one")
    lit_defect("fit", *words, "--test_after_fit", "true")
    assert "no threshold, as there are no validation pictures: set data.val_fraction" in capsys.readouterr().out
    assert {line["prediction"] for line in rows(folder / "test_predictions.csv")} == {""}
    record = json.loads((folder / "test_metrics.json").read_text())
    assert record["image"]["gaussian"]["threshold"] is None
    assert record["image"]["gaussian"]["escape_rate"]["value"] is None
    assert record["image"]["gaussian"]["auroc"]["value"] > 0.8
    assert (folder / "figures" / "test_found.png").is_file()
    with pytest.raises(SystemExit):
        lit_defect("validate", *words, "--ckpt_path", "last")
    assert "val_fraction" in capsys.readouterr().err


def test_without_masks_there_are_no_pixel_figures(tmp_path, monkeypatch):
    make_elpv(tmp_path / "site", cells=48)
    monkeypatch.syspath_prepend(tmp_path / "site")
    data = ELPV(setting="one_class", image_size=32, batch_size=4, leakage="off")
    task = make_task()
    trainer = fit(task, data)
    (logged,) = trainer.test(task, datamodule=data, verbose=False)
    assert task._evaluation.pixel == {}
    assert "test/aupro" not in logged
    assert "test/auroc" in logged
    assert task._evaluation.is_defect.any()
    assert task.detector.local.positions == "aligned"  # no category that lies in any direction
    (tmp_path / "out").mkdir()
    task.eval().write_results(tmp_path / "out", "test")
    record = json.loads((tmp_path / "out" / "test_metrics.json").read_text())
    assert record["pixel"] == {}
    assert record["category"] == "mono, poly"
    assert set(record["image"]["gaussian"]["auroc_by_type"]) <= {"defective 1/3", "defective 2/3", "defective"}


def test_a_test_of_good_pictures_alone(lit_defect, config, folder, tmp_path):
    make_mvtec(tmp_path / "fine", train_good=15, test_good=5, defects={})
    (tmp_path / "fine" / "tile" / "ground_truth").mkdir()
    words = ("--config", config(data={"root": str(tmp_path / "fine")}), "--run_id", "one")
    lit_defect("fit", *words)
    (folder / "figures" / "test_roc.png").touch()  # of an earlier test
    lit_defect("test", *words, "--ckpt_path", "last")
    record = json.loads((folder / "test_metrics.json").read_text())
    assert record["image"]["gaussian"]["auroc"]["value"] is None
    assert record["image"]["gaussian"]["overkill_rate"]["n"] == 5
    assert record["pixel"] == dict.fromkeys(PIXEL)
    assert not (folder / "figures" / "test_roc.png").exists()


def test_parts_are_counted_and_near_duplicates_told_apart(tmp_path):
    root = make_mvtec(tmp_path / "data", train_good=16, test_good=6, defects={"crack": 6}, shots_per_part=2)
    shown = root / "tile" / "train" / "good" / "000.png"
    (root / "tile" / "test" / "good" / "004.png").write_bytes(shown.read_bytes())
    data, task = make_data(root, leakage="warn"), make_task(pixel_metrics="binned")
    with pytest.warns(UserWarning, match="near-duplicate"):
        fit(task, data).test(task, datamodule=data, verbose=False)
    (tmp_path / "out").mkdir()
    task.eval().write_results(tmp_path / "out", "test")
    record = json.loads((tmp_path / "out" / "test_metrics.json").read_text())
    assert (record["n"], record["image"]["knn"]["n_groups"]) == (12, 6)
    left_out = {leak.name_b for leak in data.leaks if leak.split_b == "test"}
    assert "tile/test/good/004.png" in left_out
    assert record["without_near_duplicates"]["n"] == 12 - len(left_out)
    assert set(record["without_near_duplicates"]["image"]) == set(SCORES)
    assert 0 < record["pixel"]["aupro"] <= 1


# --- bad input ---


def refused(task: SimCLR, data: LightningDataModule, match: str) -> None:
    with pytest.raises(UserError, match=match):
        fit(task, data)


def test_defective_training_pictures_are_refused(root):
    refused(make_task(), make_data(root, setting="supervised"), r"tile/test/(crack|hole)/\d+.png.*one_class")


def test_data_without_a_good_class_are_refused(tmp_path):
    root = make_crops_folder(tmp_path / "crops", classes={"scratch": 9, "dent": 9})
    refused(make_task(), CustomCrops(str(root), leakage="off", batch_size=4), "no good class")


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_training_pictures_are_refused(tmp_path, count):
    root = make_mvtec(tmp_path / "few", train_good=count)
    refused(make_task(), make_data(root, val_fraction=0.0), rf"^{count} normal training pictures? .* too few")


def test_more_neighbours_than_pictures_are_refused(root):
    refused(make_task(neighbours=13), make_data(root), r"12 normal training pictures.*neighbours = 13")


def make_flat(root: Path, grey: int) -> Path:
    for path in (root / "tile" / "train").rglob("*.png"):
        save(np.full((32, 40), grey, np.uint8), path)
    return root


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({}, r"ssim_threshold.*discards every pseudo-anomaly"),
        ({"loss": "classifier", "anomaly": CutPaste()}, "change no pixel.*blank"),
        ({"loss": "ntxent", "map_positions": "shared"}, "(blank|alike)"),
        ({"loss": "none", "map_positions": "aligned"}, "(blank|alike)"),
    ],
)
def test_blank_pictures_are_refused(root, settings, match):
    refused(make_task(**settings), make_data(make_flat(root, grey=0)), match)


def test_a_threshold_that_nothing_passes_names_what_was_measured(root):
    task = make_task(anomaly=LocalPseudoAnomaly(ssim_threshold=1e-6))
    refused(task, make_data(root), r"anomaly\.init_args\.ssim_threshold = 1e-06.*between -?0\.\d+ and 0\.\d+")


def test_a_picture_that_is_no_number_is_named(root, monkeypatch):
    original = DefectDataset.__getitems__

    def broken(self: DefectDataset, positions: Any) -> dict[str, Any]:
        batch = original(self, positions)
        batch["image"] = batch["image"].float() / 255
        for row, name in enumerate(batch["name"]):
            if name.endswith("train/good/004.png"):
                batch["image"][row, 0, 3, 5] = torch.nan
        return batch

    monkeypatch.setattr(DefectDataset, "__getitems__", broken)
    for loss in ("ntxent", "ntxent_hard"):
        refused(make_task(loss=loss), make_data(root, val_fraction=0.0), "tile/train/good/004.png.*not numbers")


def test_a_stride_that_the_network_lacks_is_named(root):
    refused(make_task(map_strides=[8, 64]), make_data(root), r"\[8, 64\].*test_resnet.*\[2, 4, 8, 16, 32\]")


@pytest.mark.parametrize("setting", [{"allowed_overkill": 1.0}, {"smoothing": -0.1}, {"smoothing": float("nan")}])
def test_numbers_out_of_range_are_refused_by_name(setting):
    (key,) = setting
    with pytest.raises(UserError, match=rf"model\.init_args\.{key}"):
        make_task(**setting)


def test_weights_of_half_precision_are_refused(root):
    with pytest.raises(UserError, match=r"trainer.precision = bf16-true.*bf16-mixed"):
        fit(make_task(), make_data(root), precision="bf16-true")


def test_training_without_a_data_module_is_refused(root):
    data = make_data(root)
    data.prepare_data()
    data.setup("fit")
    with pytest.raises(UserError, match="data module"):
        make_trainer().fit(make_task(), train_dataloaders=data.train_dataloader())


# --- two processes ---

WORLD = 2
LOSSES = ["ntxent", "ntxent_hard", "one_class", "classifier"]


class Stripes(PseudoAnomaly):
    """Dark stripes, drawn without chance; every third picture of the data set is rejected."""

    uniforms_of_picture = 1

    def generate(self, images: Tensor, uniforms: Tensor) -> PseudoAnomalies:
        made = images.clone()
        made[..., ::3] *= 0.2
        count = len(images)
        level = (images.mean((1, 2, 3)) * 1e5).long()  # the same picture is judged the same on any process
        one = torch.ones(count)
        masks = made.ne(images).any(1, keepdim=True)
        return PseudoAnomalies(made, masks, one, level % 3 > 0, one, one.long(), one[:, None], one[:, None])


class WithoutNorm(SimCLR):
    """No layer of it mixes the pictures of a batch."""

    def configure_model(self) -> None:
        torch.manual_seed(1)
        super().configure_model()
        self.projection[1] = nn.Identity()


def one_step(root: Path, loss: str, batch_size: int, trainer: Trainer) -> dict[str, Tensor]:
    """How one step of gradient descent moves the weights; every random view is replaced by a known one."""
    task = make_task(
        WithoutNorm, loss=loss, anomaly=Stripes(), norms="frozen", lr=1.0, optimizer="sgd", schedule="constant",
        warmup=0.0, weight_decay=0.0, pose="fixed",
    )  # fmt: skip
    turns = cycle([lambda images, pose: images, lambda images, pose: images.flip(-1)])
    plain, contrastive.contrastive_views = contrastive.contrastive_views, lambda *given: next(turns)(*given)
    before: dict[str, Tensor] = {}

    class Start(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: SimCLR) -> None:
            before.update(copy.deepcopy(dict(pl_module.named_parameters())))

    trainer.callbacks.append(Start())
    try:
        trainer.fit(task, datamodule=make_data(root, val_fraction=0.0, batch_size=batch_size))
    finally:
        contrastive.contrastive_views = plain
    return {name: (value - before[name]).detach() for name, value in task.named_parameters()}


def evaluated(task: SimCLR) -> dict[str, Any]:
    kept = task._evaluation
    return {"names": [s.name for s in kept.samples], **{k: v.tolist() for k, v in kept.scores.items()}, **kept.pixel}


def on_one_rank(rank: int, root: str, folder: str, port: int) -> None:
    """Everything that needs two processes, in one launch."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0")
    os.environ["LIT_DEFECT_CACHE"] = f"{folder}/cache{rank}"
    two = {"devices": WORLD, "strategy": "ddp"}
    found: dict[str, Any] = {}
    for loss in LOSSES:
        seed_everything(0, verbose=False)
        trainer = make_trainer(limit_train_batches=1, **two)
        found[loss] = one_step(Path(root), loss, 7, trainer)
    task = make_task()
    trainer = fit(task, make_data(Path(root)), epochs=2, limit_val_batches=0, **two)  # DDP joins the norms to validate
    trainer.save_checkpoint(f"{folder}/two.ckpt")
    found["state"] = copy.deepcopy(task.state_dict())
    trainer.test(task, datamodule=make_data(Path(root)), verbose=False)
    found["test"] = evaluated(task)
    plain = make_task(loss="none")
    fit(plain, make_data(Path(root)), epochs=2, **two)
    found["none"] = plain.detector.fitted
    torch.save(found, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def on_two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[dict[str, Any]]]:
    """Root of the data, folder of the checkpoint, and what each process found."""
    folder = tmp_path_factory.mktemp("processes")
    root = make_mvtec(folder / "data", train_good=15, test_good=5, defects={"crack": 4, "hole": 4})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A fork has all modules already, but no process may fork once its autograd has threads for a GPU.
    way = "fork" if sys.platform == "linux" and not torch.cuda.is_available() else "spawn"
    torch.multiprocessing.start_processes(on_one_rank, (str(root), str(folder), port), WORLD, start_method=way)
    return root, folder, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("loss", LOSSES)
def test_two_processes_step_like_one(on_two_processes, loss):
    root, _, found = on_two_processes
    seed_everything(0, verbose=False)
    expected = one_step(root, loss, 14, make_trainer(limit_train_batches=1))
    largest = max(float(step.abs().max()) for step in expected.values())
    assert largest > 1e-4
    for steps in found:
        for name, step in steps[loss].items():
            torch.testing.assert_close(step, expected[name], rtol=1e-3, atol=1e-4 * largest, msg=name)


def test_two_processes_hold_one_detector(on_two_processes):
    root, folder, found = on_two_processes
    first, second = (each["state"] for each in found)
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    # It is that of one process with the same weights.
    task, data = make_task(), make_data(root)
    trainer = make_trainer()
    trainer.test(task, datamodule=data, ckpt_path=folder / "two.ckpt", verbose=False)
    fitted = copy.deepcopy(task.state_dict())
    task._fit_detector()
    for key, value in task.state_dict().items():
        torch.testing.assert_close(fitted[key], value, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


def test_two_processes_test_like_one(on_two_processes):
    root, folder, found = on_two_processes
    task = make_task()
    make_trainer().test(task, datamodule=make_data(root), ckpt_path=folder / "two.ckpt", verbose=False)
    alone = evaluated(task)
    assert len(alone["names"]) == 13, "an odd number, so that one process has a picture more"
    for together in (each["test"] for each in found):
        assert together["names"] == alone["names"]
        for name in SCORES:
            np.testing.assert_allclose(together[name], alone[name], rtol=1e-4)
        for name in PIXEL:
            assert together[name] == pytest.approx(alone[name], abs=1e-6)


def test_two_processes_need_nothing_to_train(on_two_processes):
    assert all(each["none"] for each in on_two_processes[2])


def test_a_network_that_is_not_trained_needs_one_epoch(lit_defect, config, folder):
    words = ("--config", config(loss="none", trainer={"max_epochs": 50}), "--run_id", "one")
    lit_defect("fit", *words, "--test_after_fit", "true")
    record = json.loads((folder / "test_metrics.json").read_text())
    assert record["anomaly"] is None
    assert record["image"]["gaussian"]["threshold"] is not None
    assert json.loads((folder / "run.json").read_text())["epochs"] == 1
    assert not (folder / "figures" / "pseudo_anomalies.png").exists()
