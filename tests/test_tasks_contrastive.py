"""SimCLR on pseudo-anomalies: losses, scores in the checkpoint, bad input."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor, nn

from lit_defect.anomalies import (
    CutPaste,
    CutPaste3Way,
    LocalPseudoAnomaly,
    PerlinAnomaly,
)
from lit_defect.data import ELPV, CustomCrops
from lit_defect.data.loading import DefectDataset
from lit_defect.errors import UserError
from lit_defect.metrics.anomaly import threshold_for_overkill
from lit_defect.scoring.detector import SCORES
from lit_defect.tasks import SimCLR
from tests.contrastive import (
    fit,
    make_data,
    make_task,
    make_tile,
    make_trainer,
    scores_of,
)
from tests.fakes import make_crops_folder, make_elpv, make_mvtec, save


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_tile(tmp_path / "data")


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


def test_scores_do_not_outlive_their_weights(root, tmp_path):
    path, task = tmp_path / "later.ckpt", make_task()
    fit(task, make_data(root)).save_checkpoint(tmp_path / "first.ckpt")
    make_trainer(epochs=2, callbacks=[Save(path, steps=4)]).fit(
        task, datamodule=make_data(root), ckpt_path=tmp_path / "first.ckpt"
    )
    state = torch.load(path, weights_only=True)["state_dict"]
    assert not state["detector.gaussian.centre"].numel(), "fitted to the weights of the first epoch"
    assert state["thresholds"].isnan().all()
    assert task.detector.fitted
    assert task.thresholds.isfinite().all()


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


# --- what can be missing ---


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


def test_a_picture_alone_has_nothing_to_be_told_from(root):
    refused(make_task(loss="ntxent"), make_data(root, batch_size=1), r"data\.batch_size = 1: the loss ntxent")


def test_a_stride_that_the_network_lacks_is_named(root):
    refused(make_task(map_strides=[8, 64]), make_data(root), r"\[8, 64\].*test_resnet.*\[2, 4, 8, 16, 32\]")


@pytest.mark.parametrize(
    "setting",
    [
        {"allowed_overkill": 1.0},
        {"smoothing": -0.1},
        {"smoothing": float("nan")},
        {"neighbours": 0},
        {"map_dimensions": 0},
        {"image_size": 0},
        {"temperature": 0.0},
        {"beta": float("nan")},
        {"projection": (0, 8)},
    ],
)
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
