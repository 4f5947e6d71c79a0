"""A Segmenter through the command line: what it learns, writes and refuses; figures against counts by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lit_defect.errors import UserError
from lit_defect.reporting.probabilities import ProbabilityMaps
from lit_defect.tasks import Segmenter
from lit_defect.tasks.pixels import augmented, targets
from lit_defect.tasks.segmentation import load_segmenter
from tests.fakes import damage, make_voc, save, surface
from tests.segmentation import (
    DEFECTS,
    SIZE,
    TINY_SEGMENTER,
    animals,
    command,
    figures,
    fit,
    iou_by_hand,
    make_tiles,
    plain,
    pooled_by_hand,
    read_masks,
    refused,
    rows,
    segmenter,
    tiles,
    truths,
    weights,
    write_config,
)


class Run(NamedTuple):
    root: Path  # of the data
    config: Path
    folder: Path


@pytest.fixture(scope="module")
def defects(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trained, tested, and used on all pictures."""
    home = tmp_path_factory.mktemp("defects")
    root = make_tiles(home / "data")
    config = write_config(home / "tiny.yaml", "Segmenter", root, loss="ce_dice", trainer={"max_epochs": 12})
    command(home, "fit", "--config", config, "--run_id", "one", "--test_after_fit", "true")
    words = ("--config", config, "--run_id", "one", "--ckpt_path", "best")
    command(home, "predict", *words, "--data.predict_split", "all")
    return Run(root, config, home / "runs" / "tiny" / "one")


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    return make_voc(tmp_path / "voc", images={"train": 12, "val": 5})


# ---- what it learns and leaves --------------------------------------------------------------------------------


def test_it_learns_to_find_defects(defects):
    methods = figures(defects.folder)["methods"]
    assert list(methods) == ["segmenter"]
    assert methods["segmenter"]["iou"]["value"] > 0.6
    assert methods["segmenter"]["pooled_iou"]["value"] > 0.6


def test_what_a_run_leaves(defects):
    result, folder = figures(defects.folder), defects.folder
    lines = rows(folder / "splits.csv")
    tested = [line["name"] for line in lines if line["split"] == "test"]
    assert result["task"] == "Segmenter"
    assert result["n"] == len(tested)
    assert result["class_names"] == DEFECTS
    assert result["foreground"] == ["defect"]
    assert result["network_calls"] == 1
    assert result["parameters"] == {"segmenter": sum(p.numel() for p in load(folder).parameters())}
    assert result["ms_per_image"]["segmenter"] > 0
    named = {key: result[key] for key in ("architecture", "encoder", "weights", "loss", "training_seed", "split_seed")}
    assert named == {
        "architecture": "unet", "encoder": TINY_SEGMENTER["encoder"], "weights": None, "loss": "ce_dice",
        "training_seed": 0, "split_seed": 0,
    }  # fmt: skip
    assert not {"gain", "uncertainty"} & set(result), "there is nothing to compare with"
    found = {path.name for path in (folder / "figures").iterdir()}
    assert {"training.png", "test_iou.png", "test_best.png", "test_worst.png"} == found
    logged = {key for line in rows(folder / "metrics.csv") for key, value in line.items() if value}
    assert {"train/loss", "val/loss", "val/iou", "val/pooled_iou", "val/boundary_iou"} <= logged


def load(folder: Path) -> Segmenter:
    return load_segmenter(str(folder / "checkpoints" / "best.ckpt"))


def test_the_figures_are_those_of_the_masks_that_predict_writes(defects):
    truth = truths(tiles(defects.root))
    masks = read_masks(defects.folder, list(truth))
    result = figures(defects.folder)["methods"]["segmenter"]
    by_hand = {name: iou_by_hand(masks[name], truth[name], 1) for name in truth}
    lines = rows(defects.folder / "test_predictions.csv")
    assert [line["name"] for line in lines] == list(truth)
    for line in lines:
        expected = by_hand[line["name"]]
        assert line["type"] == line["name"].split("/")[-2]
        assert line["split"] == "test"
        if np.isnan(expected):
            assert line["iou(segmenter)"] == line["hd95(segmenter, defect)"] == ""
        else:
            assert float(line["iou(segmenter)"]) == pytest.approx(expected, rel=1e-5)
    known = [value for value in by_hand.values() if not np.isnan(value)]
    assert result["iou"]["value"] == pytest.approx(np.mean(known))
    assert result["n_defined"] == len(known) < len(truth)
    pooled = pooled_by_hand([masks[name] for name in truth], list(truth.values()), 2)
    assert list(result["pooled_iou_by_class"].values()) == pytest.approx(pooled)
    fine = [name for name in truth if "/good/" in name]
    assert result["false_alarms"]["n"] == len(fine)
    assert result["false_alarms"]["k"] == sum(masks[name].any() for name in fine)
    for kind in ("crack", "hole"):
        of_kind = [by_hand[name] for name in truth if f"/{kind}/" in name]
        assert result["iou_by_type"][kind]["value"] == pytest.approx(np.mean(of_kind))


def test_maps_of_all_splits_are_probabilities_whose_argmax_is_the_mask(defects):
    names = [line["name"] for line in rows(defects.folder / "splits.csv")]
    maps = ProbabilityMaps(defects.folder / "probabilities", DEFECTS)
    maps.check(names, [(SIZE, SIZE)] * len(names))
    masks = read_masks(defects.folder, names)
    for name in names:
        values = maps.read(name)
        np.testing.assert_allclose(values.sum(0), 1, atol=1e-3)
        unsure = np.abs(values[1] - 0.5) < 1e-3  # float16 may make a draw of it
        assert ((values.argmax(0) == masks[name]) | unsure).all()


def test_a_test_may_be_repeated_and_an_earlier_one_is_kept(defects, lit_defect):
    before = figures(defects.folder)
    words = ("--config", defects.config, "--run_id", "one", "--ckpt_path", defects.folder / "checkpoints" / "best.ckpt")
    lit_defect("test", *words)
    assert plain(figures(defects.folder)) == plain(before)
    assert (defects.folder / "test_metrics.1.json").is_file()
    assert (defects.folder / "test_predictions.1.csv").is_file()
    lit_defect("validate", *words)
    validated = figures(defects.folder, "val")
    assert validated["n"] == sum(line["split"] == "val" for line in rows(defects.folder / "splits.csv"))
    assert {line["split"] for line in rows(defects.folder / "val_predictions.csv")} == {"val"}


@pytest.mark.parametrize("image_size", [None, SIZE])
def test_new_pictures_each_at_its_own_size(defects, lit_defect, tmp_path, image_size):
    sizes = {"a.png": (32, 40), "deep/b.png": (33, 47), "deep/c.bmp": (51, 33)}
    rng = np.random.default_rng(3)
    for name, size in sizes.items():
        save(damage(rng, surface(rng, size), 0)[0], tmp_path / "new" / name)
    data = {"image_size": image_size, "batch_size": 1, "predict_root": str(tmp_path / "new")}
    config = write_config(tmp_path / "new.yaml", "Segmenter", defects.root, data=data)
    words = ("predict", "--config", config, "--run_id", "new", "--ckpt_path", copied(defects, tmp_path))
    lit_defect(*words)
    folder = tmp_path / "runs" / "tiny" / "new"
    masks = read_masks(folder, list(sizes))
    assert {name: mask.shape for name, mask in masks.items()} == sizes
    maps = ProbabilityMaps(folder / "probabilities", DEFECTS)
    maps.check(list(sizes), [(image_size or height, image_size or width) for height, width in sizes.values()])
    for name, (height, width) in sizes.items():
        values = np.asarray(Image.fromarray(maps.read(name)[1]).resize((width, height), Image.Resampling.BILINEAR))
        assert ((values > 0.5) == masks[name])[np.abs(values - 0.5) > 1e-3].all()
        with Image.open(folder / "predict_masks" / f"{name}.overlay.png") as drawn:
            assert drawn.size == (width, height)
    assert sum(mask.sum() for mask in masks.values()) > 100, "it finds what it has learned to find"
    lit_defect(*words, "--model.overlays", "false", "--model.maps", "false")
    assert (folder / "predict_masks.1").is_dir(), "an earlier prediction is kept"
    assert (folder / "probabilities.1").is_dir()
    assert not (folder / "probabilities").exists()
    written = {path.relative_to(folder / "predict_masks").as_posix() for path in folder.glob("predict_masks/**/*.png")}
    assert written == {f"{name}.png" for name in sizes}


def copied(defects: Run, folder: Path) -> Path:
    """The best checkpoint, outside of its run."""
    path = folder / "copy.ckpt"
    path.write_bytes((defects.folder / "checkpoints" / "best.ckpt").read_bytes())
    return path


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ({"classes": ["bird", "cat"]}, ["background", "bird", "cat"]),
        ({"classes": ["bird"]}, ["background", "bird"]),
        ({"classes": ["bird", "cat"], "merge": True}, ["background", "bird+cat"]),
    ],
    ids=["multi-class", "one class", "merged"],
)
def test_classes_with_void(lit_defect, voc, tmp_path, choice, names):
    data = {"class_path": "PascalVOC", **choice}
    config = write_config(tmp_path / "voc.yaml", "Segmenter", voc, data=data, trainer={"max_epochs": 3})
    lit_defect("fit", "--config", config, "--run_id", "one", "--test_after_fit", "true")
    lit_defect("predict", "--config", config, "--run_id", "one", "--ckpt_path", "best")
    folder = tmp_path / "runs" / "tiny" / "one"
    result = figures(folder)
    foreground = names if len(names) > 2 else names[1:]
    assert result["class_names"] == names
    assert result["foreground"] == foreground
    truth = truths(animals(voc, **choice))
    assert all((mask == 255).any() for mask in truth.values())
    masks = read_masks(folder, list(truth))
    numbers = [names.index(name) for name in foreground]
    every = {name: [iou_by_hand(masks[name], truth[name], c) for c in numbers] for name in truth}
    figure = result["methods"]["segmenter"]
    assert figure["iou"]["value"] == pytest.approx(np.mean([np.nanmean(values) for values in every.values()]))
    for place, name in enumerate(foreground):
        expected = np.nanmean([values[place] for values in every.values()])
        assert figure["iou_by_class"][name]["value"] == pytest.approx(expected)
    pooled = pooled_by_hand([masks[name] for name in truth], list(truth.values()), len(names))
    assert [figure["pooled_iou_by_class"][name] for name in names] == pytest.approx(pooled)
    assert result["n"] == len(truth) == (3 if choice["classes"] == ["bird"] else 5)


# ---- training ------------------------------------------------------------------------------------------------


def test_what_is_said_at_void_pixels_never_counts(voc):
    class Meddling(Segmenter):
        def answer(self, batch: dict[str, Any], stage: str) -> Any:
            answer, void = super().answer(batch, stage), targets(batch, 3) == 255
            assert void.any()
            mask = answer.masks["segmenter"]
            return answer._replace(masks={"segmenter": torch.where(void, (mask + 1) % 3, mask)})

    data = animals(voc)
    honest = segmenter()
    trainer = fit(honest, data)
    trainer.test(honest, datamodule=data, verbose=False)
    other = Meddling(**TINY_SEGMENTER, class_names=["background", "bird", "cat"])
    other.configure_model()
    other.load_state_dict(honest.state_dict())
    trainer.test(other, datamodule=data, verbose=False)
    assert other._evaluation.figures() == honest._evaluation.figures()

    batch = next(iter(data.loader("train")))
    labels = targets(batch, 3)
    answer = honest.answer(batch, "fit")
    noise = torch.rand_like(answer.probabilities).softmax(1)
    changed = torch.where((labels == 255)[:, None], noise, answer.probabilities)
    assert not torch.equal(changed, answer.probabilities)
    losses = [honest.validation_loss(batch, labels, answer._replace(probabilities=p)) for p in (changed, noise)]
    assert losses[0] == honest.validation_loss(batch, labels, answer) != losses[1]


def test_picture_mask_and_map_get_one_view_and_one_window():
    torch.manual_seed(0)
    pictures = torch.rand(16, 3, 24, 24)
    seen = set()
    for _ in range(8):
        changed, labels, maps = augmented([pictures, (pictures[:, 0] > 0.5).long(), pictures[:, :2]], "dihedral", 10)
        assert changed.shape == (16, 3, 10, 10)
        assert torch.equal(labels, (changed[:, 0] > 0.5).long())
        assert torch.equal(maps, changed[:, :2])
        seen |= {float(one[0, 0, 0]) for one in changed}
    assert len(seen) > 100, "windows and views are drawn anew for each picture"
    whole, nothing = augmented([pictures, None], "none", None)
    assert torch.equal(whole, pictures)
    assert nothing is None


def test_training_takes_windows(tmp_path):
    sizes = []

    class Watched(Segmenter):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if self.training:
                sizes.append(tuple(images.shape[-2:]))
            return super().forward(images)

    fit(Watched(**TINY_SEGMENTER, crop=20, augment="dihedral"), tiles(make_tiles(tmp_path / "data")))
    assert sizes
    assert set(sizes) == {(20, 20)}


def test_a_stopped_run_ends_like_an_undisturbed_one(lit_defect, tmp_path, monkeypatch):
    root = make_tiles(tmp_path / "data")
    saving = {"class_path": "lit_defect.callbacks.run.LastCheckpoint", "init_args": {"every_n_steps": 3}}
    config = write_config(
        tmp_path / "tiny.yaml", "Segmenter", root, trainer={"max_epochs": 2, "callbacks": [saving]}, crop=24,
        augment="dihedral",
    )  # fmt: skip
    lit_defect("fit", "--config", config, "--run_id", "whole")
    folder, original = tmp_path / "runs" / "tiny", Segmenter.training_step
    total = torch.load(folder / "whole" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]

    def pulled(self: Segmenter, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == total - 1:
            raise RuntimeError("the plug was pulled")
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Segmenter, "training_step", pulled)
        with pytest.raises(RuntimeError, match="plug"):
            lit_defect("fit", "--config", config, "--run_id", "one")
    lit_defect("fit", "--config", config, "--run_id", "one", "--resume")
    whole, resumed = weights(folder / "whole"), weights(folder / "one")
    assert whole.keys() == resumed.keys()
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []


def test_half_precision(tmp_path):
    task, data = segmenter(loss="ce_dice"), tiles(make_tiles(tmp_path / "data"))
    trainer = fit(task, data, precision="bf16-mixed", epochs=12)
    (logged,) = trainer.test(task, datamodule=data, verbose=False)
    assert logged["test/iou"] > 0.5
    assert {p.dtype for p in task.parameters()} == {torch.float32}


# ---- any size ------------------------------------------------------------------------------------------------


class Pointwise(nn.Module):
    """A network that sees nothing but each pixel."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(channels, out, 1)

    def forward(self, inputs: torch.Tensor, *_: Any) -> torch.Tensor:
        return self.layer(inputs)


def test_tiles_of_a_pointwise_network_make_the_whole():
    images = torch.rand(2, 3, 45, 61)
    network = Pointwise(3, 2)
    answers = []
    for tile in (None, 16):
        task = segmenter(tile=tile, class_names=DEFECTS)
        task.network = network
        answers.append(task.probabilities(images))
    assert answers[0].shape == (2, 2, 45, 61)
    torch.testing.assert_close(*answers)


def test_a_segmenter_that_tests_in_tiles_is_a_first_stage_in_tiles(tmp_path):
    data = tiles(make_tiles(tmp_path / "data", size=(33, 57)), image_size=None)
    task = segmenter(tile=16, overlap=0.5)
    trainer = fit(task, data)
    trainer.save_checkpoint(tmp_path / "tiled.ckpt")
    images = torch.rand(1, 3, 33, 57)
    found = load_segmenter(str(tmp_path / "tiled.ckpt")).probabilities(images)
    task.eval()
    torch.testing.assert_close(found, task.probabilities(images))
    task.canvas.tile = None
    assert not torch.allclose(found, task.probabilities(images))


# ---- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data.with_masks", "false"], ["data.with_masks", "true"]),
        (["--data.setting", "one_class"], ["data.setting", "supervised"]),
        (["--model.loss", "cross"], ["model.loss", "ce_dice"]),
        (["--model.class_weights", "[1.0]"], ["model.init_args.class_weights has 1", "2 classes"]),
        (["--model.crop", "0"], ["model.init_args.crop = 0"]),
        (["--model.tile", "0"], ["model.init_args.tile = 0"]),
        (["--model.overlap", "1"], ["model.init_args.overlap = 1"]),
        (["--model.architecture", "unett"], ["architecture", "unet"]),
        (["--model.encoder", "tu-test_convnet"], ["encoder", "tu-test_convnext"]),
        (["--model.class_names", "[background, dent]"], ["dent", "defect"]),
        (["--trainer.precision", "bf16-true"], ["bf16-mixed"]),
    ],
    ids=lambda value: value[0].rpartition(".")[2] if value[0].startswith("--") else "",
)
def test_mistakes_are_named_before_the_first_step(defects, lit_defect, capsys, tmp_path, arguments, expected):
    message = refused(capsys, lit_defect, "fit", "--config", defects.config, "--run_id", "bad", *arguments)
    for part in expected:
        assert part in message
    assert len(message.splitlines()) <= 3
    assert not (tmp_path / "runs" / "tiny" / "bad" / "checkpoints").exists()


def test_a_checkpoint_of_other_classes(defects, lit_defect, capsys, voc, tmp_path):
    config = write_config(tmp_path / "voc.yaml", "Segmenter", voc, data={"class_path": "PascalVOC"})
    checkpoint = defects.folder / "checkpoints" / "best.ckpt"
    message = refused(capsys, lit_defect, "test", "--config", config, "--ckpt_path", checkpoint)
    assert "defect" in message
    assert "aeroplane" in message


def test_a_checkpoint_of_another_network(defects, lit_defect, capsys):
    words = ("--config", defects.config, "--ckpt_path", defects.folder / "checkpoints" / "best.ckpt")
    message = refused(capsys, lit_defect, "test", *words, "--model.options.decoder_channels", "[8, 8]")
    assert "does not fit this Segmenter" in message
    assert "network.model.decoder" in message
    assert "config.yaml" in message


def test_masks_of_classes_without_a_name(voc):
    batch = {"mask": torch.tensor([[[0, 7, 255]]])}
    with pytest.raises(UserError, match=r"\[0, 7\].*3"):
        targets(batch, 3)
    assert targets({"mask": torch.tensor([[[[0, 1]]]], dtype=torch.uint8)}, 2).tolist() == [[[0, 1]]]
    with pytest.raises(UserError, match=r"data\.with_masks"):
        targets({}, 2)


@pytest.mark.parametrize("written", [b"no checkpoint", None], ids=["text", "another task"])
def test_a_file_that_is_no_segmenter(tmp_path, written):
    path = tmp_path / "file.ckpt"
    if written is None:
        torch.save({"state_dict": {}, "hyper_parameters": {"backbone": "resnet18"}}, path)
    else:
        path.write_bytes(written)
    with pytest.raises(UserError, match="no checkpoint of a Segmenter"):
        load_segmenter(str(path))
