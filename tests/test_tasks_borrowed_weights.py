"""Runs whose pretrained weights have gone: what a checkpoint holds is not asked for again, what it leaves out is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

from lit_defect.export import main as export
from lit_defect.tasks import MaskAutoencoder
from tests.anomaly_diffusion import QUICK, TINY
from tests.contrastive import SMALL_TASK
from tests.fakes import make_mvtec
from tests.latent import tiny_pipeline, tiny_vae
from tests.latent_tasks import BASE, few_samples
from tests.segmentation import QUICK as CHAIN
from tests.segmentation import TINY_REFINER, TINY_SEGMENTER, refused, segmenter, tiles
from tests.segmentation import fit as train

SERVED = {"setting": "supervised", "image_size": 32, "batch_size": 8, "leakage": "off", "with_masks": True,
          "val_fraction": 0.3}  # fmt: skip


def weights_of(backbone: str) -> Callable[[Path, Path], None]:
    """What saves random weights of timm's network to a file."""

    def save(path: Path, _: Path) -> None:
        torch.manual_seed(3)
        torch.save(timm.create_model(backbone, num_classes=3).state_dict(), path)

    return save


def save_segmenter(path: Path, root: Path) -> None:
    train(segmenter(), tiles(root, val_fraction=0.3)).save_checkpoint(path, weights_only=False)


def save_label_autoencoder(path: Path, root: Path, lr: float = 1e-3) -> None:
    task = MaskAutoencoder(channels=(8, 16), latent_channels=3, lr=lr)
    train(task, tiles(root, val_fraction=0.3), default_root_dir=path.parent / "labels")
    shutil.copytree(path.parent / "labels" / "autoencoder", path)


@dataclass(frozen=True)
class Case:
    """A task that builds on something.

    Attributes:
        model: class and options.
        option: that names what it builds on.
        made_by: (path, folder of the data) -> None, makes that.
        data: options of the data module.
        verbs: beside `fit`, of those that are to be refused.
    """

    model: dict[str, Any]
    option: str
    made_by: Callable[[Path, Path], Any]
    data: dict[str, Any] = field(default_factory=dict)
    verbs: tuple[str, ...] = ()


CLASSIFIER = {"class_path": "DefectClassifier", "backbone": "test_resnet"}
NORMAL, FEW = {"setting": "one_class"}, {"setting": "few_shot", "val_fraction": 0.0}
RESNET, CONVNEXT = weights_of("test_resnet"), weights_of("test_convnext")
# Whose checkpoints hold all weights.
WHOLE = {
    "classifier": Case({**CLASSIFIER, "transfer": "all"}, "weights", RESNET),
    "classifier of a block": Case({**CLASSIFIER, "transfer": "last_block"}, "weights", RESNET),
    "SimCLR": Case({"class_path": "SimCLR", **SMALL_TASK, "frozen_stages": 1}, "weights", RESNET, NORMAL),
    "segmenter": Case({"class_path": "Segmenter", **TINY_SEGMENTER, "encoder_lr": 0.0}, "weights", CONVNEXT),
    "localizer": Case({"class_path": "AnomalyLocalizer", **TINY_SEGMENTER, "select": "last"}, "weights", CONVNEXT),
}
# Whose checkpoints leave out what is frozen.
REFINER = {"class_path": "DDPMRefiner", **TINY_REFINER, **CHAIN}
LEFT_OUT = {
    "head": Case({**CLASSIFIER, "transfer": "head"}, "weights", RESNET, {}, ("validate", "test", "predict")),
    "refiner": Case(REFINER, "stage1", save_segmenter, {}, ("validate", "test", "predict")),
    "latent refiner": Case(
        {**REFINER, "prediction": "epsilon", "start": "noised", "strength": 1.0, "train_on": "ground_truth"},
        "latent", save_label_autoencoder, {}, ("test",)),
    "base": Case({"class_path": "LatentDiffusion", **BASE}, "autoencoder",
                 lambda path, _: tiny_vae(channels=2).save_pretrained(path), NORMAL),
    "AnomalyDiffusion": Case({"class_path": "AnomalyDiffusion", **TINY, "generation": QUICK}, "base",
                             lambda path, _: tiny_pipeline(path), FEW, ("predict",)),
    "MaskDiffusion": Case({"class_path": "MaskDiffusion", "anomaly_tokens": 2}, "base",
                          lambda path, _: tiny_pipeline(path), FEW, ("predict",)),
    "LoRA": Case({"class_path": "StableDiffusionLoRA", "rank": 2}, "base", lambda path, _: tiny_pipeline(path), FEW),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch):
    few_samples(monkeypatch)


def begun(case: Case, folder: Path, lit_defect: Callable) -> tuple[Path, Path]:
    """Train an epoch; the configuration, and what the task has built on."""
    root = make_mvtec(folder / "data", size=(32, 32), train_good=12, test_good=4, defects={"crack": 9, "hole": 9})
    given = folder / ("given" + {"weights": ".pth", "stage1": ".ckpt"}.get(case.option, ""))
    case.made_by(given, root)
    options = {**case.model, case.option: str(given)}
    content = {
        "experiment": "tiny",
        "wandb": "off",
        "trainer": {"accelerator": "cpu", "num_sanity_val_steps": 0},
        "model": {"class_path": options.pop("class_path"), "init_args": options},
        "data": {"class_path": "MVTecAD", "init_args": {"root": str(root), **SERVED, **case.data}},
    }
    config = folder / "c.yaml"
    config.write_text(yaml.safe_dump(content))
    lit_defect("fit", "--config", config, "--run_id", "one", "--trainer.max_epochs", "1")
    return config, given


def asked(verb: str, config: Path, *more: object) -> tuple[object, ...]:
    """The command line of a verb on the run."""
    how = ("--ckpt_path", "last")
    if verb in ("fit", "check"):
        how = ("--trainer.max_epochs", "2", "--resume")
    return verb, "--config", config, "--run_id", "one", *how, *more


@pytest.mark.parametrize("case", WHOLE.values(), ids=WHOLE)
def test_weights_that_a_checkpoint_holds_are_not_asked_for_again(case, tmp_path, lit_defect):
    config, given = begun(case, tmp_path, lit_defect)
    given.unlink()
    for verb in ("check", "fit", "validate", "test", "predict"):
        lit_defect(*asked(verb, config))
    run = tmp_path / "runs" / "tiny" / "one"
    assert json.loads((run / "run.json").read_text())["epochs"] == 2
    assert export([str(run), "--ckpt", "last"]) == 0


@pytest.mark.parametrize("case", LEFT_OUT.values(), ids=LEFT_OUT)
def test_weights_that_a_checkpoint_leaves_out_are_named(case, tmp_path, lit_defect, capsys):
    config, given = begun(case, tmp_path, lit_defect)
    moved = given.with_stem("moved")
    given.rename(moved)
    verbs = ("fit", *case.verbs)
    for verb in verbs:
        said = refused(capsys, lit_defect, *asked(verb, config))
        assert str(given) in said
        assert f"put it back, or give its new place by --model.{case.option}" in said
    for verb in verbs:
        lit_defect(*asked(verb, config, f"--model.{case.option}", moved))


def test_a_head_is_not_exported_without_what_it_stands_on(tmp_path, lit_defect, capsys):
    _, given = begun(LEFT_OUT["head"], tmp_path, lit_defect)
    given.unlink()
    capsys.readouterr()
    assert export([str(tmp_path / "runs" / "tiny" / "one")]) == 2
    said = capsys.readouterr().err
    assert str(given) in said
    assert said.strip().endswith("does not hold it: put it back")


def test_weights_that_are_missing_from_the_start_wait_for_no_checkpoint(tmp_path, lit_defect, capsys):
    config, given = begun(LEFT_OUT["head"], tmp_path, lit_defect)
    given.unlink()
    said = refused(capsys, lit_defect, "fit", "--config", config, "--run_id", "new")
    assert str(given) in said
    assert "put it back" not in said


def test_latents_of_another_autoencoder_are_refused(tmp_path, lit_defect, capsys):
    config, given = begun(LEFT_OUT["latent refiner"], tmp_path, lit_defect)
    shutil.rmtree(given)
    save_label_autoencoder(given, tmp_path / "data", lr=0.1)
    said = refused(capsys, lit_defect, *asked("test", config))
    assert f"model.init_args.latent = {given}, and {given} is not the same" in said
