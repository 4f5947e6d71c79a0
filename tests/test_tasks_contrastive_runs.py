"""Anomaly detection from the command line: what runs leave, how they end, new pictures."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lit_defect.reporting.maps import read_map
from lit_defect.scoring.detector import SCORES
from lit_defect.tasks import SimCLR
from tests.contrastive import (
    PIXEL,
    SMALL_DATA,
    SMALL_TASK,
    make_tile,
)
from tests.fakes import make_mvtec, save, surface


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_tile(tmp_path / "data")


@pytest.fixture
def config(tmp_path: Path, root: Path) -> Callable[..., Path]:
    """Writes a configuration; keyword arguments go to the model, `data` and `trainer` to these."""

    def write(*, data: dict[str, Any] | None = None, trainer: dict[str, Any] | None = None, **model: Any) -> Path:
        tiny = {**SMALL_TASK, "projection": [16, 8]}
        source = {"root": str(root), **SMALL_DATA}
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
    assert checkpoint["epoch"] == 1
    assert not (folder / "checkpoints" / "best.ckpt").exists(), "the last state is the result"

    lit_defect("test", *words, "--ckpt_path", "best")
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


STOPS = [
    {"max_epochs": -1, "max_steps": 4},  # in the middle of an epoch
    {"max_epochs": 3, "check_val_every_n_epoch": 2},
    {"max_epochs": 9, "max_time": {"microseconds": 1}},
    {"max_epochs": 9, "callbacks": [{"class_path": "EarlyStopping", "init_args": {"monitor": "train/loss"}}]},
    {"max_epochs": 9, "callbacks": [{"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss"}}]},
    {
        "max_epochs": 9,
        "min_epochs": 3,
        "callbacks": [{"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss"}}],
    },
]


@pytest.mark.parametrize("trainer", STOPS, ids=["steps", "epochs", "time", "train", "val", "least"])
def test_whatever_ends_a_training_the_last_state_has_its_scores(lit_defect, config, folder, capsys, trainer):
    for callback in trainer.get("callbacks", ()):
        callback["init_args"] |= {"min_delta": 100.0, "patience": 1}  # nothing is ever better than the first
    words = ("--config", config(trainer=trainer, pixel_metrics="off"), "--run_id", "one")
    lit_defect("fit", *words, "--test_after_fit", "true")
    assert "warning" not in capsys.readouterr().err
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["state_dict"]["detector.gaussian.centre"].numel()
    assert state["state_dict"]["thresholds"].isfinite().all()
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished"
    assert trainer.get("min_epochs", 0) <= record["epochs"] <= 3
    assert (folder / "test_metrics.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.anomaly", "CutPast"], ["model.anomaly", "did you mean CutPaste?", "PoissonPatch"]),
        (["--model.anomaly", "CutPaste", "--model.anomaly.ssim_treshold", "1"], ["did you mean ssim_threshold?"]),
        (["--model.anomaly", "CutPaste", "--model.anomaly.candidates", "0"], ["anomaly.init_args.candidates = 0"]),
        (["--model.anomaly", "PerlinAnomaly", "--model.anomaly.textures", "none/"], ["textures = none/: no pictures"]),
        (["--model.temprature", "1"], ["--model.temprature", "did you mean temperature?"]),
        (["--model.temperature", "0"], ["model.init_args.temperature = 0.0"]),
        (["--model.monitor", "val/loss"], ["unknown key --model.monitor"]),
    ],
)
def test_mistakes_are_named_in_two_lines(lit_defect, config, capsys, arguments, expected):
    with pytest.raises(SystemExit) as ended:
        lit_defect("fit", "--config", config(), *arguments)
    message = capsys.readouterr().err
    assert ended.value.code == 2
    assert len(message.splitlines()) <= 2
    for part in expected:
        assert part in message


def test_a_mixture_with_photographs_for_texture(lit_defect, config, folder, tmp_path):
    for number in range(3):
        save(surface(np.random.default_rng(number), (20 + number, 40)), tmp_path / "dtd" / "woven" / f"{number}.jpg")
    perlin = {"class_path": "PerlinAnomaly", "init_args": {"textures": str(tmp_path / "dtd")}}
    mixed = {"class_path": "MixedAnomaly", "init_args": {"makers": [{"class_path": "CutPaste"}, perlin]}}
    lit_defect("fit", "--config", config(anomaly=mixed), "--run_id", "one")
    assert (folder / "figures" / "pseudo_anomalies.png").is_file()
    lit_defect("test", "--config", folder / "config.yaml", "--run_id", "one", "--ckpt_path", "last")
    assert json.loads((folder / "test_metrics.json").read_text())["anomaly"] == "MixedAnomaly"


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
def test_new_pictures(lit_defect, config, folder, tmp_path, maps, capsys):
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
    assert (f"maps and overlays: {place}" in capsys.readouterr().out) == (maps != "off")
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


def test_without_validation_nothing_is_decided(lit_defect, config, folder, capsys):
    words = ("--config", config(data={"val_fraction": 0.0}), "--run_id", "one")
    lit_defect("fit", *words, "--test_after_fit", "true")
    shown = " ".join(capsys.readouterr().out.split())
    assert "no threshold, as there are no validation pictures: set data.val_fraction" in shown
    assert {line["prediction"] for line in rows(folder / "test_predictions.csv")} == {""}
    record = json.loads((folder / "test_metrics.json").read_text())
    assert record["image"]["gaussian"]["threshold"] is None
    assert record["image"]["gaussian"]["escape_rate"]["value"] is None
    assert record["image"]["gaussian"]["auroc"]["value"] > 0.8
    assert (folder / "figures" / "test_found.png").is_file()
    with pytest.raises(SystemExit):
        lit_defect("validate", *words, "--ckpt_path", "last")
    assert "val_fraction" in capsys.readouterr().err


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


def test_a_network_that_is_not_trained_needs_one_epoch(lit_defect, config, folder):
    words = ("--config", config(loss="none", trainer={"max_epochs": 50}), "--run_id", "one")
    lit_defect("fit", *words, "--test_after_fit", "true")
    record = json.loads((folder / "test_metrics.json").read_text())
    assert record["anomaly"] is None
    assert record["image"]["gaussian"]["threshold"] is not None
    assert json.loads((folder / "run.json").read_text())["epochs"] == 1
    assert not (folder / "figures" / "pseudo_anomalies.png").exists()
