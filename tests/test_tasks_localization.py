"""AnomalyLocalizer: what it learns from, what chooses its state, its figures, its runs, and two processes."""

from __future__ import annotations

import csv
import json
import os
import socket
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from lit_defect.anomalies import CutPaste, LocalPseudoAnomaly
from lit_defect.data import ELPV, MVTecAD
from lit_defect.errors import UserError
from lit_defect.reporting.maps import read_map
from lit_defect.tasks import AnomalyLocalizer
from lit_defect.tasks.localization import image_scores
from tests.anomalies import Stripes
from tests.contrastive import PIXEL, fit, make_trainer
from tests.fakes import make_elpv, make_mvtec, save, surface
from tests.test_data_synthetic import generate

TINY = {"encoder": "tu-test_convnext", "options": {"encoder_depth": 2, "decoder_channels": [16, 8]}, "lr": 0.01}
SERVED = {
    "setting": "few_shot", "val_fraction": 0.0, "leakage": "off", "with_masks": True, "batch_size": 4, "image_size": 32,
}  # fmt: skip
SELECTED = "synthetic/pixel_average_precision"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 good pictures and 3 of 9 of each kind of defect train; 5 good and 12 defective ones of 24 x 40 test."""
    folder = tmp_path_factory.mktemp("tiles")
    return make_mvtec(folder, size=(24, 40), train_good=12, test_good=5, defects={"crack": 9, "hole": 9})


@pytest.fixture(scope="module")
def generated(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A defect of each kind on each normal training picture."""
    folder = tmp_path_factory.mktemp("generated") / "set"
    return generate(folder, [sample for sample in ready(root).samples["train"] if sample.label == 0])


def ready(root: Path, stage: str = "fit", **settings: Any) -> MVTecAD:
    data = MVTecAD(str(root), **{**SERVED, **settings})
    data.prepare_data()
    data.setup(stage)
    return data


def make_task(**settings: Any) -> AnomalyLocalizer:
    return AnomalyLocalizer(**{**TINY, **settings})


def keep_best(folder: Path, task: AnomalyLocalizer) -> ModelCheckpoint:
    """What the command line adds to keep the best state."""
    assert task.monitor is not None
    return ModelCheckpoint(folder, "best", monitor=task.monitor[0], mode=task.monitor[1])


def fit_keeping(task: AnomalyLocalizer, data: MVTecAD, epochs: int, keeper: ModelCheckpoint) -> Trainer:
    seed_everything(0, verbose=False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_epochs=epochs, callbacks=[keeper], use_distributed_sampler=False, **quiet)
    trainer.fit(task, datamodule=data)
    return trainer


# --- scores and figures ---


@pytest.mark.parametrize(("size", "side"), [((256, 256), 21), ((128, 128), 11), ((512, 320), 41), ((16, 16), 1)])
def test_the_image_score_is_the_highest_mean_of_a_window_of_21_at_256(size, side):
    maps = np.random.default_rng(0).random((2, *size), np.float32) ** 8
    expected = [ndimage.uniform_filter(part.astype(float), side, mode="constant").max() for part in maps]
    found = image_scores(torch.from_numpy(maps))
    np.testing.assert_allclose(found["pooled_max"], expected, rtol=1e-4)
    np.testing.assert_array_equal(found["map_max"], maps.max((1, 2)))


class Known(AnomalyLocalizer):
    """Its map is the picture's brightness, so that every figure can be worked out from the files."""

    def logits(self, images: Tensor) -> Tensor:
        grey = images.mean(1).clamp(1e-4, 1 - 1e-4)
        return torch.stack([torch.zeros_like(grey), grey.logit()], 1)


@pytest.mark.parametrize("size", ["batch", "own"])
def test_figures_are_those_of_all_pixels_of_the_split(root, size):
    """Against scikit-learn, at either size; by kind of defect, against the good pictures."""
    task = Known(**TINY, pixels_at=size)
    trainer = make_trainer()
    trainer.test(task, datamodule=ready(root, "test"), verbose=False)
    found = task._evaluation
    maps, masks, kinds = [], [], []
    for sample in found.samples:
        with Image.open(sample.path) as picture:
            small = picture.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
        scores = torch.from_numpy(np.asarray(small) / 255).mean(2).clamp(1e-4, 1 - 1e-4)
        mask = np.zeros((24, 40), np.uint8)
        if sample.mask:
            with Image.open(sample.mask) as marked:
                mask = np.asarray(marked)
        if size == "batch":
            mask = np.asarray(Image.fromarray(mask).resize((32, 32), Image.Resampling.NEAREST))
        else:
            scores = torch.nn.functional.interpolate(scores[None, None], (24, 40), mode="bilinear")[0, 0]
        maps.append(scores.numpy())
        masks.append(mask > 0)
        kinds.append(sample.defect_type)
    assert sorted(set(kinds)) == ["crack", "good", "hole"]
    truth, score = np.stack(masks), np.stack(maps)
    assert found.pixel["pixel_auroc"] == pytest.approx(roc_auc_score(truth.ravel(), score.ravel()), abs=1e-5)
    for kind in ("crack", "hole"):
        rows = [row for row, other in enumerate(kinds) if other in ("good", kind)]
        for name, figure in (("pixel_average_precision", average_precision_score), ("pixel_auroc", roc_auc_score)):
            expected = figure(truth[rows].ravel(), score[rows].ravel())
            assert found.pixel_by_type[kind][name] == pytest.approx(expected, rel=0.02), "rounding moves grey levels"
    assert found.pixel_by_type["crack"]["pixel_auroc"] > 0.99, "cracks are bright"
    assert found.pixel_by_type["hole"]["pixel_auroc"] < 0.01, "holes are dark"
    for row, part in enumerate(maps if size == "batch" else []):
        expected = ndimage.uniform_filter(part, 3, mode="constant").max()
        assert found.scores["pooled_max"][row] == pytest.approx(expected, abs=1e-5)


# --- what is learned ---


def test_a_share_of_the_normal_pictures_is_changed_and_their_masks_say_where(root):
    task = make_task(anomaly=Stripes(), pseudo=0.5)
    make_trainer().test(task, datamodule=ready(root, "test"), verbose=False)  # attaches the data
    task.log = lambda *_, **__: None  # type: ignore[method-assign]
    images = torch.full((400, 3, 16, 16), 0.5)
    images[300:] = 0.95  # too bright: no stripes are accepted
    masks = torch.zeros(400, 16, 16, dtype=torch.int64)
    masks[:100, 2] = 1
    labels = torch.zeros(400, dtype=torch.int64)
    labels[:100] = 1
    before = images.clone(), masks.clone()
    torch.manual_seed(0)
    seen, truth = task._with_pseudo_anomalies(images, masks, labels)
    torch.testing.assert_close((images, masks), before, rtol=0, atol=0)  # a batch stays as it is
    for part in (slice(0, 100), slice(300, 400)):  # defective, and rejected
        torch.testing.assert_close((seen[part], truth[part]), (images[part], masks[part]), rtol=0, atol=0)
    changed = truth[100:300].flatten(1).any(1)
    assert 70 < int(changed.sum()) < 130
    stripes = torch.zeros(16, 16, dtype=torch.int64)
    stripes[::4] = 1
    assert torch.equal(truth[100:300][changed], stripes.expand(int(changed.sum()), 16, 16))
    rows = seen[100:300][changed][:, 0, 0, 0]
    assert set(rows.tolist()) == {0.0, 1.0}, "both kinds are drawn"
    assert torch.equal(seen[100:300][~changed], images[100:300][~changed])
    assert (seen[100:300][:, :, 1] == 0.5).all()


def test_it_finds_what_it_was_shown(root, generated):
    task, data = make_task(anomaly=LocalPseudoAnomaly()), ready(root, synthetic=str(generated))
    trainer = fit(task, data, epochs=8)
    assert float(trainer.callback_metrics["train/loss"]) < 0.1
    assert "train/rejected" in trainer.callback_metrics
    (logged,) = trainer.test(task, datamodule=data, verbose=False)
    assert logged["test/pixel_average_precision"] > 0.7
    assert logged["test/auroc"] > 0.9
    pictures = task.about()["training_pictures"]
    assert pictures == {"good": 12, "defective": 6, "AnomalyDiffusion": 24}
    assert task.about()["select"] == "last"


def test_the_loss_is_the_focal_loss(root):
    task, data = make_task(augment="none"), ready(root)
    fit(task, data)
    batch = data.loader("train").batch([0, 12])
    task.log = lambda *_, **__: None  # type: ignore[method-assign]
    task.eval()
    loss = task.training_step(batch, 0).item()
    with torch.no_grad():
        p = task.logits(batch["image"].float() / 255).softmax(1).double().numpy()
    of_truth = np.where(batch["mask"][:, 0].numpy() > 0, p[:, 1], p[:, 0])
    assert loss == pytest.approx(float(-((1 - of_truth) ** 2 * np.log(of_truth)).mean()), rel=1e-4)


# --- what chooses the state ---


def test_fewer_held_out_pictures_than_processes_are_refused_at_the_start(root, generated, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "world_size", 50)
    with pytest.raises(UserError, match=r"holds out \d+ pictures for 50 processes: raise it, or set select: last"):
        make_trainer(1).fit(make_task(), datamodule=ready(root, synthetic={"path": str(generated), "holdout": 0.3}))


def test_held_out_generated_pictures_choose_the_state(root, generated, tmp_path):
    data = ready(root, synthetic={"path": str(generated), "holdout": 0.3})
    task = make_task()
    seen: list[float] = []

    class Watch(ModelCheckpoint):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(float(trainer.callback_metrics[SELECTED]))
            super().on_train_epoch_end(trainer, pl_module)

    watch = Watch(tmp_path, "best", monitor=SELECTED, mode="max")
    fit_keeping(task, data, 4, watch)
    assert len(seen) == 4
    assert float(watch.best_model_score) == max(seen)
    best = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert best["epoch"] == seen.index(max(seen))
    # The figure is that of the pictures that were held out, and of no others.
    task.load_state_dict(best["state_dict"])
    task.eval()
    maps, masks = [], []
    assert {sample.source for sample in data.samples["synthetic_val"]} == {"AnomalyDiffusion"}
    for batch in data.loader("synthetic_val"):
        with torch.no_grad():
            maps.append(task(batch["image"])[1].flatten())
        masks.append(batch["mask"].flatten())
    expected = average_precision_score(torch.cat(masks).numpy(), torch.cat(maps).numpy())
    assert max(seen) == pytest.approx(expected, abs=1e-4)
    assert task.about()["select"] == "synthetic"


def test_measuring_on_generated_pictures_changes_nothing_of_the_training(root, generated):
    states = []
    for select in ("synthetic", "last"):
        data = ready(root, synthetic={"path": str(generated), "holdout": 0.3})
        task = make_task(select=select, anomaly=CutPaste())
        fit(task, data, epochs=2)
        assert task.training
        states.append(task.network.state_dict())
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_without_held_out_pictures_the_latest_state_is_kept(root, generated, tmp_path):
    data, task = ready(root, synthetic=str(generated)), make_task()
    keeper = keep_best(tmp_path, task)
    assert keeper.monitor == SELECTED
    fit_keeping(task, data, 2, keeper)
    assert task.monitor is None
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["epoch"] == 1
    assert make_task(select="last").monitor is None


def test_validation_pictures_choose_where_asked_to_and_set_thresholds(root, tmp_path):
    data = ready(root, setting="supervised", val_fraction=0.4, test_fraction=0.2)
    task = make_task(select="val", allowed_overkill=0.2, pixel_metrics="off")
    keeper = keep_best(tmp_path, task)
    trainer = fit_keeping(task, data, 2, keeper)
    assert {"val/loss", "val/auroc", "val/pixel_average_precision"} <= trainer.callback_metrics.keys()
    assert float(keeper.best_model_score) >= float(trainer.callback_metrics["val/pixel_average_precision"])
    trainer.validate(task, datamodule=data, verbose=False)
    found = task._evaluation
    assert found.pixel == {}
    for name, scores in found.scores.items():
        good = scores[~found.is_defect]
        assert (good >= found.thresholds[name]).sum() == len(good) // 5


# --- bad input ---


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"pseudo": 0.0}, "pseudo = 0.0"),
        ({"pseudo": 1.5}, "pseudo = 1.5"),
        ({"light": 1.0}, "light = 1.0"),
        ({"crop": 0}, "crop = 0"),
        ({"allowed_overkill": 1.0}, "allowed_overkill = 1.0"),
    ],
)
def test_options_out_of_range_are_named(settings, key):
    with pytest.raises(UserError, match=rf"model\.init_args\.{key}: expected"):
        make_task(**settings)


@pytest.mark.parametrize(
    ("task", "data", "message"),
    [
        ({}, {"setting": "one_class"}, r"none of the 12 training pictures has a defect.*model\.anomaly"),
        ({}, {"with_masks": False}, r"set data\.with_masks to true"),
        ({"select": "synthetic"}, {}, r"select = synthetic: no generated pictures are held out.*select: last"),
        ({"select": "val"}, {}, r"select = val: none of the 0 validation pictures has a defect"),
        ({"crop": 64}, {}, r"crop = 64 is larger than the pictures, 32x32"),
        ({"augment": "dihedral"}, {"image_size": (24, 40)}, "must be square"),
    ],
)
def test_data_that_cannot_be_learned_from_are_refused(root, task, data, message):
    with pytest.raises(UserError, match=message):
        fit(make_task(**task), ready(root, **data))


def test_data_without_good_pictures_or_masks_are_refused(root, tmp_path, monkeypatch):
    make_elpv(tmp_path / "elpv", cells=24, size=(32, 32))
    monkeypatch.syspath_prepend(tmp_path / "elpv")
    with pytest.raises(UserError, match="masks"):
        fit(make_task(), ELPV(image_size=32, batch_size=4, leakage="off"))
    data = ready(root)
    data.samples["train"] = [replace(sample, mask=None) for sample in data.samples["train"]]
    with pytest.raises(UserError, match=r"6 defective training pictures have no mask, such as tile/test/crack/000"):
        fit(make_task(), data)
    data = ready(root)
    data.samples["train"] = [sample for sample in data.samples["train"] if sample.label]
    with pytest.raises(UserError, match="no good one trains"):
        fit(make_task(anomaly=CutPaste()), data)


def test_a_gate_that_rejects_everything_is_told_before_the_training(root):
    with pytest.raises(UserError, match=r"ssim_threshold = 1e-06 discards every pseudo-anomaly"):
        fit(make_task(anomaly=CutPaste(ssim_scope="patch", ssim_threshold=1e-6)), ready(root))


# --- runs ---


@pytest.fixture
def config(tmp_path: Path, root: Path) -> Callable[..., Path]:
    def write(data: dict[str, Any] | None = None, trainer: dict[str, Any] | None = None, **model: Any) -> Path:
        content = {
            "experiment": "tiny",
            "wandb": "off",
            "trainer": {"max_epochs": 2, "accelerator": "cpu", **(trainer or {})},
            "model": {"class_path": "AnomalyLocalizer", "init_args": {**TINY, **model}},
            "data": {"class_path": "MVTecAD", "init_args": {"root": str(root), **SERVED, **(data or {})}},
        }
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_what_a_run_leaves_and_a_prediction(lit_defect, config, generated, tmp_path):
    synthetic = {"path": str(generated), "holdout": 0.3}
    words = ("--config", config(data={"synthetic": synthetic, "val_fraction": 0.3}, anomaly="CutPaste3Way"))
    words = (*words, "--run_id", "one")
    lit_defect("fit", *words, "--test_after_fit", "true")
    folder = tmp_path / "runs" / "tiny" / "one"
    record = json.loads((folder / "test_metrics.json").read_text())
    assert (record["score"], record["task"], record["select"]) == ("pooled_max", "AnomalyLocalizer", "synthetic")
    assert set(record["image"]) == {"pooled_max", "map_max"}
    assert set(record["pixel"]) == PIXEL
    assert set(record["pixel_by_type"]) == {"crack", "hole"}
    entry = record["image"]["pooled_max"]
    assert entry["counts"] == {"good": 5, "defective": 12}
    assert entry["auroc"]["low"] is not None
    assert entry["average_precision"].keys() >= {"value", "low", "high"}
    assert 0 < entry["f1_max"]["value"] <= 1
    assert entry["threshold"] is not None
    logged = [float(row[SELECTED]) for row in read_rows(folder / "metrics.csv") if row.get(SELECTED)]
    assert len(logged) == 2
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["epoch"] == logged.index(max(logged))
    drawn = {f"test_{name}.png" for name in ("scores", "roc", "precision_recall", "auroc_by_type")}
    assert drawn | {"pseudo_anomalies.png", "training.png"} <= {file.name for file in (folder / "figures").iterdir()}
    assert len(read_rows(folder / "test_predictions.csv")) == 17

    rng = np.random.default_rng(5)
    sizes = {"a.png": (32, 40), "inner/b.png": (70, 50)}
    for name, size in sizes.items():
        save(surface(rng, size), tmp_path / "new" / name)
    new = ("--data.predict_root", tmp_path / "new", "--model.maps", "tiff", "--ckpt_path", "best")
    lit_defect("predict", *words, *new)
    task = AnomalyLocalizer.load_from_checkpoint(folder / "checkpoints" / "best.ckpt").eval()
    for name, size in sizes.items():
        found = read_map(folder / "predict_maps" / f"{name}.tiff")
        with Image.open(tmp_path / "new" / name) as image:
            small = np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR))
        with torch.no_grad():
            _, grid = task(torch.from_numpy(small.copy()).permute(2, 0, 1)[None])
            expected = torch.nn.functional.interpolate(grid[None], size, mode="bilinear")[0, 0].numpy()
        np.testing.assert_allclose(found, expected, atol=1 / 65535, err_msg="white is the probability 1")
        assert (folder / "predict_maps" / f"{name}.overlay.png").is_file()
    assert [row["name"] for row in read_rows(folder / "predict_predictions.csv")] == list(sizes)


def test_a_stopped_run_ends_like_an_undisturbed_one(lit_defect, config, tmp_path, monkeypatch, generated):
    saving = {"class_path": "lit_defect.callbacks.run.LastCheckpoint", "init_args": {"every_n_steps": 2}}
    data = {"synthetic": {"path": str(generated), "holdout": 0.3}, "batches_per_epoch": 3}
    path = config(data=data, trainer={"callbacks": [saving]}, anomaly="CutPaste", light=0.1, crop=16)
    lit_defect("fit", "--config", path, "--run_id", "whole")
    original = AnomalyLocalizer.training_step

    def pulled(self: AnomalyLocalizer, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == 5:
            raise RuntimeError("the plug was pulled")
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(AnomalyLocalizer, "training_step", pulled)
        with pytest.raises(RuntimeError, match="plug"):
            lit_defect("fit", "--config", path, "--run_id", "one")
    lit_defect("fit", "--config", path, "--run_id", "one", "--resume")
    for name in ("last", "best"):
        whole, resumed = (
            torch.load(tmp_path / "runs" / "tiny" / run / "checkpoints" / f"{name}.ckpt", weights_only=True)
            for run in ("whole", "one")
        )
        assert whole["epoch"] == resumed["epoch"]
        states = whole["state_dict"], resumed["state_dict"]
        assert [key for key in states[0] if key != "minutes" and not torch.equal(states[0][key], states[1][key])] == [
            key for key in states[0] if key == "thresholds"  # nan without validation pictures
        ]  # fmt: skip


# --- several processes ---


def on_one_rank(rank: int, root: str, folder: str, port: int) -> None:
    """One launch: two epochs with selection and validation, then a test."""
    torch.set_num_threads(1)
    warnings.filterwarnings("error", "torch.distributed", FutureWarning)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0")
    os.environ["LIT_DEFECT_CACHE"] = f"{folder}/cache{rank}"
    data = ready(Path(root), **HELD_OUT, synthetic={"path": f"{folder}/set", "holdout": 0.4})
    task = make_task(select="synthetic")
    trainer = fit(task, data, epochs=2, devices=2, strategy="ddp")
    trainer.save_checkpoint(f"{folder}/two.ckpt")
    found = {"selected": float(trainer.callback_metrics[SELECTED]), "limits": task.thresholds.clone()}
    trainer.test(task, datamodule=data, verbose=False)
    torch.save(found | {"test": evaluated(task)}, Path(folder) / f"{rank}.pt")


def evaluated(task: AnomalyLocalizer) -> dict[str, Any]:
    kept = task._evaluation
    scores = {name: values.tolist() for name, values in kept.scores.items()}
    return {"names": [sample.name for sample in kept.samples], **scores, "pixel": kept.pixel, **kept.pixel_by_type}


HELD_OUT = {"val_fraction": 0.3}


def test_two_processes_select_and_test_like_one(root, tmp_path):
    good = [sample for sample in ready(root, **HELD_OUT).samples["train"] if sample.label == 0]
    generate(tmp_path / "set", good)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    way = "fork" if sys.platform == "linux" and not torch.cuda.is_available() else "spawn"
    torch.multiprocessing.start_processes(on_one_rank, (str(root), str(tmp_path), port), 2, start_method=way)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]

    data = ready(root, **HELD_OUT, synthetic={"path": str(tmp_path / "set"), "holdout": 0.4})
    task, trainer = make_task(), make_trainer()
    trainer.test(task, datamodule=data, ckpt_path=tmp_path / "two.ckpt", verbose=False)
    task.eval()
    alone, selected = evaluated(task), float(task._precision_on_synthetic())
    good_scores = [
        task(data.loader("val").batch([place])["image"])[0]["pooled_max"].item()
        for place, sample in enumerate(data.samples["val"]) if sample.label == 0
    ]  # fmt: skip
    assert len(alone["names"]) == 17, "an odd number, so that one process has a picture more"
    for found in ranks:
        assert found["selected"] == pytest.approx(selected, abs=1e-5)
        torch.testing.assert_close(found["limits"], task.thresholds, rtol=0, atol=0)
        assert float(found["limits"][0]) == pytest.approx(max(good_scores), abs=1e-5)
        assert found["test"]["names"] == alone["names"]
        np.testing.assert_allclose(found["test"]["pooled_max"], alone["pooled_max"], rtol=1e-4)
        for key in ("pixel", "crack", "hole"):
            assert found["test"][key] == pytest.approx(alone[key], abs=1e-6)
