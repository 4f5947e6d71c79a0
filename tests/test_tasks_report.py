"""What a classifier leaves in its run folder, and what becomes of splits that cannot be judged."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lit_defect.reporting.gallery import Tile
from lit_defect.tasks import classification_report
from tests.fakes import make_mvtec


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A network that has hardly learnt anything, so that there are mistakes to show."""
    root = make_mvtec(tmp_path / "data", train_good=16, test_good=8, defects={"crack": 14, "hole": 10}, size=(32, 32))
    options = {
        "experiment": "tiny", "run_id": "one", "trainer.max_epochs": 1, "trainer.accelerator": "cpu",
        "model": "DefectClassifier", "model.backbone": "test_resnet", "model.weights": "null", "model.lr": 1e-4,
        "data": "MVTecAD", "data.root": root, "data.setting": "supervised", "data.batch_size": 8,
        "data.leakage": "off",
    }  # fmt: skip
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "tiny" / "one"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Tile]:
    """The tiles of the gallery of mistakes."""
    tiles: list[Tile] = []
    original = classification_report.gallery

    def noting(given: list[Tile], **settings: Any) -> Image.Image:
        tiles.extend(given)
        return original(given, **settings)

    monkeypatch.setattr(classification_report, "gallery", noting)
    return tiles


@pytest.mark.parametrize("target", ["binary", "type"])
@pytest.mark.parametrize("transfer", ["head", "all"])
def test_predictions_and_metrics_agree(lit_defect, arguments, folder, shown, target, transfer):
    settings = ("--data.target", target, "--model.transfer", transfer, "--test_after_fit", "true")
    lit_defect("fit", *arguments, *settings)
    result = json.loads((folder / "test_metrics.json").read_text())
    predictions = rows(folder / "test_predictions.csv")
    names = ["good", "defective"] if target == "binary" else ["good", "crack", "hole"]
    assert result["class_names"] == names

    shares = np.array([[float(row[f"p({name})"]) for name in names] for row in predictions])
    truth = np.array([names.index(row["label"]) for row in predictions])
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-6)
    assert [names[i] for i in shares.argmax(1)] == [row["prediction"] for row in predictions]
    confusion = np.zeros((len(names), len(names)), int)
    np.add.at(confusion, (truth, shares.argmax(1)), 1)
    assert confusion.tolist() == result["confusion"]
    assert len(predictions) == result["n"] == 12
    scores = np.array([float(row["score"]) for row in predictions])
    np.testing.assert_allclose(scores, 1 - shares[:, 0], atol=1e-6)
    rejected = scores >= result["threshold"] - 1e-7
    assert (rejected & (truth == 0)).sum() == result["overkill_rate"]["k"]
    assert (~rejected & (truth > 0)).sum() == result["escape_rate"]["k"]
    for row in predictions:
        assert Path(row["path"]).is_file()
        assert row["path"].endswith(row["name"])
        assert row["split"] == "test"

    for name in ("test_confusion", "test_roc", "test_reliability", "test_mistakes", "training"):
        with Image.open(folder / "figures" / f"{name}.png") as picture:
            assert min(picture.size) > 100, name

    wrong = [row for row in predictions if row["label"] != row["prediction"]]
    assert len(shown) == min(12, len(wrong)) > 0
    by_name = {row["name"]: row for row in wrong}
    for tile in shown:
        row = by_name[tile.name]
        assert (tile.truth, tile.predicted) == (row["label"], row["prediction"])
        assert tile.probability == pytest.approx(float(row[f"p({tile.predicted})"]), abs=1e-6)
        with Image.open(row["path"]) as original:
            np.testing.assert_array_equal(tile.picture, np.asarray(original.convert("RGB")))
        assert tile.heat is not None
        assert tile.heat.shape == (32, 32)
        assert 0 <= tile.heat.min() <= tile.heat.max() <= 1


def test_figures_are_there_for_validate_and_predictions_for_predict(lit_defect, arguments, folder):
    lit_defect("fit", *arguments)
    best = ("--ckpt_path", "best")
    lit_defect("validate", *arguments, *best)
    lit_defect("predict", *arguments, *best)
    lit_defect("test", *arguments, *best)
    validated = json.loads((folder / "val_metrics.json").read_text())
    assert validated["n"] == len(rows(folder / "val_predictions.csv")) > 0
    assert (folder / "figures" / "val_mistakes.png").is_file()
    tested, predicted = rows(folder / "test_predictions.csv"), rows(folder / "predict_predictions.csv")
    assert [{**row, "split": ""} for row in tested] == [{**row, "split": ""} for row in predicted]
    assert (folder / "predict_metrics.json").is_file()  # the labels of the test split are known


def test_groups_widen_the_intervals(lit_defect, arguments, folder, tmp_path):
    root = tmp_path / "grouped"
    make_mvtec(root, train_good=40, test_good=8, defects={"crack": 40}, shots_per_part=4, size=(32, 32))
    lit_defect("fit", *arguments, "--data.root", root, "--test_after_fit", "true")
    result = json.loads((folder / "test_metrics.json").read_text())
    assert result["n_groups"] == result["n"] / 4


def test_pictures_with_a_near_duplicate_in_training_are_set_apart(lit_defect, arguments, folder, tmp_path):
    root = make_mvtec(tmp_path / "twins", train_good=40, test_good=8, defects={"crack": 40}, size=(96, 96))
    for path in sorted((root / "tile").rglob("*.png"))[::2]:
        if "ground_truth" not in path.parts:
            darker = (np.asarray(Image.open(path)) * 0.8).astype(np.uint8)
            Image.fromarray(darker).save(path.with_name(f"twin_{path.name}"))
    lit_defect("fit", *arguments, "--data.root", root, "--data.leakage", "warn", "--test_after_fit", "true")
    result = json.loads((folder / "test_metrics.json").read_text())
    leaked = {row["name_b"] for row in rows(folder / "leakage.csv") if row["split_b"] == "test"}
    fresh = [row for row in rows(folder / "test_predictions.csv") if row["name"] not in leaked]
    assert 0 < len(fresh) < result["n"]
    apart = result["without_near_duplicates"]
    assert apart["n"] == len(fresh)
    right = sum(row["label"] == row["prediction"] for row in fresh)
    assert apart["accuracy"]["value"] == pytest.approx(right / len(fresh))


# --- splits that cannot be judged ---


def test_without_validation_the_best_state_is_the_last(lit_defect, arguments, folder):
    settings = ("--data.val_fraction", "0", "--trainer.max_epochs", "3", "--test_after_fit", "true")
    lit_defect("fit", *arguments, *settings)
    best, last = (torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True) for name in ("best", "last"))
    assert best["global_step"] == last["global_step"] > 0
    assert all(
        torch.equal(best["state_dict"][key], last["state_dict"][key])
        for key in last["state_dict"]
        if key != "threshold"
    )
    result = json.loads((folder / "test_metrics.json").read_text())
    assert result["escape_rate"]["value"] is None
    assert result["accuracy"]["value"] is not None
    more = ("--data.val_fraction", "0", "--trainer.max_epochs", "5", "--resume")
    lit_defect("fit", *arguments, *more)  # and such a run goes on
    assert json.loads((folder / "run.json").read_text())["epochs"] == 5


def test_a_training_without_defects_is_refused_in_words(lit_defect, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        lit_defect("fit", *arguments, "--data.setting", "one_class")
    assert stop.value.code == 2
    assert "only good" in capsys.readouterr().err


def test_validate_without_a_validation_split_is_refused(lit_defect, arguments, capsys):
    lit_defect("fit", *arguments)
    with pytest.raises(SystemExit) as stop:
        lit_defect("validate", *arguments, "--ckpt_path", "last", "--data.val_fraction", "0")
    assert stop.value.code == 2
    assert "data.val_fraction" in capsys.readouterr().err
