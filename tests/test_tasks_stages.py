"""First stages of a refiner: a run, a checkpoint, maps of any program; what is refused before the first step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from lit_defect.errors import UserError
from lit_defect.reporting.probabilities import write_header
from lit_defect.tasks.stages import SegmenterStage, StoredStage, first_stage
from tests.contrastive import make_trainer
from tests.fakes import make_voc
from tests.segmentation import (
    DEFECTS,
    QUICK,
    SIZE,
    animals,
    command,
    figures,
    fit,
    halved,
    make_tiles,
    read_masks,
    refiner,
    refused,
    rows,
    segmenter,
    tiles,
    truths,
    write_config,
    write_maps,
)

FROM_MASKS = QUICK | {"train_on": "ground_truth"}


class First(NamedTuple):
    root: Path  # of the data
    config: Path
    folder: Path  # of the run


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> First:
    """A Segmenter's run, with the maps of all pictures."""
    home = tmp_path_factory.mktemp("first")
    root = make_tiles(home / "data")
    config = write_config(home / "first.yaml", "Segmenter", root, trainer={"max_epochs": 6})
    command(home, "fit", "--config", config, "--run_id", "one", "--test_after_fit", "true")
    words = ("--config", config, "--run_id", "one", "--ckpt_path", "best")
    command(home, "predict", *words, "--data.predict_split", "all")
    return First(root, config, home / "runs" / "tiny" / "one")


@pytest.fixture(scope="module")
def masks(first: First) -> dict[str, np.ndarray]:
    """True masks of all pictures, by name."""
    data = tiles(first.root, cache_dir=str(first.root.parent / "cache"))
    return {name: mask for split in ("train", "val", "test") for name, mask in truths(data, split).items()}


@pytest.fixture
def maps(masks: dict[str, np.ndarray], tmp_path: Path) -> Path:
    """What some other program says of each picture."""
    return write_maps(tmp_path / "maps", {name: halved(mask) for name, mask in masks.items()}, DEFECTS)


# ---- kinds of first stages -------------------------------------------------------------------------------------


def test_a_run_its_checkpoint_and_its_maps_say_the_same(first):
    checkpoint = first.folder / "checkpoints" / "best.ckpt"
    expected, found = figures(first.folder)["methods"]["segmenter"], {}
    for source in (first.folder, checkpoint, first.folder / "probabilities"):
        task, data = refiner(**QUICK, stage1=str(source)), tiles(first.root)
        trainer = fit(task, data, limit_train_batches=1, limit_val_batches=1)
        trainer.test(task, datamodule=data, verbose=False)
        found[source] = task._evaluation.figures()["methods"]["stage1"]
        network = source != first.folder / "probabilities"
        assert isinstance(task.stage1, SegmenterStage if network else StoredStage)
        assert ("stage1" in task.about()["parameters"]) == network, "who knows what wrote the maps"
    assert found[first.folder] == found[checkpoint] == expected
    maps = found[first.folder / "probabilities"]
    assert maps["iou"]["value"] == pytest.approx(expected["iou"]["value"], abs=0.01), "float16 may make a draw"


def test_the_last_state_where_there_is_no_best_one(first, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "last.ckpt").write_bytes((first.folder / "checkpoints" / "last.ckpt").read_bytes())
    stage = first_stage(str(tmp_path / "run"), DEFECTS)
    assert isinstance(stage, SegmenterStage)
    assert stage.path == folder / "last.ckpt"


def test_a_network_never_trains(first):
    task, data = refiner(**QUICK, stage1=str(first.folder)), tiles(first.root)
    before: dict[str, torch.Tensor] = {}

    def remember() -> None:
        assert not task.stage1.segmenter.training
        before.update({key: value.clone() for key, value in task.stage1.state_dict().items()})

    task.on_train_start = remember
    fit(task, data)
    assert before
    assert not any(parameter.requires_grad for parameter in task.stage1.parameters())
    assert [key for key, value in task.stage1.state_dict().items() if not torch.equal(value, before[key])] == []


def test_maps_as_other_programs_write_them(first, masks, maps):
    """Scaled integers, (H, W) of the second class, archives: the same figures."""

    def found(folder: Path) -> dict[str, Any]:
        task, data = refiner(**FROM_MASKS, stage1=str(folder), class_names=DEFECTS), tiles(first.root)
        trainer = make_trainer()
        trainer.test(task, datamodule=data, verbose=False)
        return task._evaluation.figures()["methods"]["stage1"]

    expected = found(maps)
    assert 0.3 < expected["iou"]["value"] < 0.6
    for number, path in enumerate(sorted(maps.rglob("*.npy"))):
        values = np.load(path).astype(np.float64)
        if number % 3 == 0:
            np.save(path, np.rint(255 * values).astype(np.uint8))
        elif number % 3 == 1:
            np.save(path, np.rint(65535 * values[1]).astype(np.uint16))
        else:
            np.savez(path.with_suffix(".npz"), values)
            path.unlink()
    assert found(maps) == expected


def test_maps_go_through_the_same_view_as_their_picture(first, masks, tmp_path):
    """A chain that is trained on maps equal to the truth must see them equal in every view and window."""
    sure = write_maps(tmp_path / "maps", masks, DEFECTS, sure=1.0)
    task = refiner(**QUICK | {"label_input": "argmax"}, stage1=str(sure), augment="dihedral", crop=20)
    compared = 0

    fit(task, tiles(first.root), limit_train_batches=1, limit_val_batches=0)
    plain = task.refinement.example

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(refinement, name)

        def example(self, labels: torch.Tensor, images: torch.Tensor, probabilities: torch.Tensor, network: Any) -> Any:
            nonlocal compared
            assert labels.shape[-2:] == images.shape[-2:] == (20, 20)
            assert torch.equal(probabilities.argmax(1), labels)
            compared += int(labels.sum() > 0)
            return plain(labels, images, probabilities, network)

    refinement, task.refinement = task.refinement, Watched()
    for batch in task.data.loader("train"):
        task._loss(task.denoiser, batch, augment=True)
    assert compared > 0


# ---- what is refused -----------------------------------------------------------------------------------------


def refusal(stage1: object, data: Any, **options: Any) -> str:
    """What a training says before its first step."""
    task = refiner(**QUICK | options, stage1=str(stage1))
    with pytest.raises(UserError) as refused:
        fit(task, data)
    assert task.trainer.global_step == 0
    assert task.denoiser is None, "before anything is built"
    return str(refused.value)


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    np.save(path, change(np.load(path)))


SPOILT = {
    "another size": (lambda path: rewrite(path, lambda values: values[:, :-1]), f"{SIZE - 1}x{SIZE}"),
    "classes": (lambda path: rewrite(path, lambda values: np.stack([*values, values[0]]) / 2), "3 x 32 x 32"),
    "sums": (lambda path: rewrite(path, lambda values: values * 0.9), "add up to 1"),
    "nan": (lambda path: rewrite(path, lambda values: values * np.nan), "nan"),
    "corrupt": (lambda path: path.write_bytes(path.read_bytes()[:100]), "unreadable"),
    "missing": (lambda path: path.unlink(), "no file"),
}


@pytest.mark.parametrize("problem", SPOILT)
@pytest.mark.parametrize("split", ["train", "val"])
def test_maps_that_are_none(first, maps, problem, split):
    data = tiles(first.root)
    data.setup("fit")
    name = data.samples[split][-1].name
    spoil, expected = SPOILT[problem]
    spoil(maps / f"{name}.npy")
    message = refusal(maps, data)
    assert expected in message
    assert name in message
    assert "1 of 24" in message


def test_maps_are_needed_only_where_they_are_used(first, maps):
    data = tiles(first.root)
    data.setup("fit")
    for sample in data.samples["train"] + data.samples["test"]:
        (maps / f"{sample.name}.npy").unlink()
    task = refiner(**FROM_MASKS, stage1=str(maps))
    trainer = fit(task, data, limit_train_batches=1)
    assert trainer.global_step == 1
    with pytest.raises(UserError, match="8 of 8"):
        trainer.test(task, datamodule=data, verbose=False)


def test_maps_of_other_classes(first, maps):
    write_header(maps, ["background", "dent"])
    message = refusal(maps, tiles(first.root))
    assert "background, dent" in message
    assert "background, defect" in message


def test_maps_without_a_header(first, maps):
    (maps / "probabilities.json").unlink()
    message = refusal(maps, tiles(first.root))
    assert "no probabilities.json" in message
    assert "class_names" in message, "it says what belongs into it"


def test_a_checkpoint_of_other_classes(first, tmp_path):
    voc = make_voc(tmp_path / "voc")
    message = refusal(first.folder, animals(voc))
    assert "model.init_args.stage1" in message
    assert "background, defect" in message
    assert "background, bird, cat" in message


def test_no_checkpoint_of_a_segmenter(first, tmp_path):
    data = tiles(first.root)
    (tmp_path / "random.ckpt").write_bytes(np.random.default_rng(0).bytes(500))
    whole = (first.folder / "checkpoints" / "best.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "figures.ckpt").write_text(json.dumps({"iou": 1}))
    other = refiner(**FROM_MASKS)
    fit(other, data, limit_train_batches=1).save_checkpoint(tmp_path / "refiner.ckpt")
    for name in ("random", "cut", "figures", "refiner"):
        message = refusal(tmp_path / f"{name}.ckpt", data)
        assert f"{name}.ckpt is no checkpoint of a Segmenter" in message


@pytest.mark.parametrize("place", ["nothing", "empty"])
def test_nothing_there(first, tmp_path, place):
    (tmp_path / "empty").mkdir()
    message = refusal(tmp_path / place, tiles(first.root))
    assert str(tmp_path / place) in message
    assert "class_names" in message if place == "empty" else "predict of a Segmenter writes one" in message


def test_stored_maps_know_nothing_of_new_pictures(first, maps, lit_defect, capsys, tmp_path):
    config = write_config(tmp_path / "tiny.yaml", "DDPMRefiner", first.root, **FROM_MASKS, stage1=str(maps))
    lit_defect("fit", "--config", config, "--run_id", "one")
    new = first.root / "tile" / "test" / "crack"
    words = ("predict", "--config", config, "--run_id", "one", "--ckpt_path", "best", "--data.predict_root", new)
    assert "no file" in refused(capsys, lit_defect, *words)
    lit_defect(*words, "--model.stage1", first.folder)  # a network does
    assert read_masks(tmp_path / "runs" / "tiny" / "one", [path.name for path in new.iterdir()])


# ---- pictures that the first stage has seen --------------------------------------------------------------------


@pytest.mark.parametrize("source", ["", "probabilities"])
def test_pictures_that_trained_the_first_stage_are_refused(first, source):
    message = refusal(first.folder / source, tiles(first.root, seed=1))
    assert "used to train the first stage" in message
    assert f"--data.split_file {first.folder / 'splits.csv'}" in message


def test_the_split_of_the_first_stage_is_taken_over(first, lit_defect, capsys, tmp_path):
    config = write_config(
        tmp_path / "tiny.yaml", "DDPMRefiner", first.root, data={"seed": 1}, **QUICK, stage1=str(first.folder)
    )
    words = ("fit", "--config", config, "--test_after_fit", "true", "--run_id")
    message = refused(capsys, lit_defect, *words, "other")
    assert "used to train the first stage" in message
    split = first.folder / "splits.csv"
    assert f"--data.split_file {split}" in message
    assert not (tmp_path / "runs" / "tiny" / "other" / "checkpoints").exists()
    lit_defect(*words, "same", "--data.split_file", split)
    folder = tmp_path / "runs" / "tiny" / "same"
    divided = [{line["name"]: line["split"] for line in rows(run / "splits.csv")} for run in (folder, first.folder)]
    assert divided[0] == divided[1]
    assert figures(folder)["methods"]["stage1"] == figures(first.folder)["methods"]["segmenter"]


def test_pictures_of_another_place_may_have_the_same_names(first, tmp_path):
    other = make_tiles(tmp_path / "other", seed=5)
    task, data = refiner(**QUICK, stage1=str(first.folder)), tiles(other, seed=1)
    trainer = fit(task, data, limit_train_batches=1)
    assert trainer.global_step == 1


def test_a_first_stage_of_another_architecture_says_nothing_of_the_refiner(first, tmp_path):
    data = tiles(first.root)
    small = segmenter(encoder="tu-test_resnet")
    fit(small, data, limit_train_batches=1, limit_val_batches=0).save_checkpoint(tmp_path / "other.ckpt")
    task = refiner(**FROM_MASKS, stage1=str(tmp_path / "other.ckpt"))
    trainer = fit(task, data, limit_train_batches=1, limit_val_batches=0)
    trainer.save_checkpoint(tmp_path / "refiner.ckpt")
    another = refiner(**FROM_MASKS, stage1=str(first.folder))
    make_trainer().test(another, datamodule=data, ckpt_path=tmp_path / "refiner.ckpt", verbose=False)
    found = another._evaluation.figures()["methods"]["stage1"]
    assert found == figures(first.folder)["methods"]["segmenter"]
