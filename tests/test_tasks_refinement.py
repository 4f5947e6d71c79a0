"""A DDPMRefiner: what it improves, writes, averages, resumes and refuses, behind a first stage and without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from lit_defect.diffusion.labels import generators
from lit_defect.diffusion.presets import PRESETS
from lit_defect.errors import UserError
from lit_defect.reporting.probabilities import ProbabilityMaps
from lit_defect.tasks import DDPMRefiner
from lit_defect.tasks.pixels import targets
from tests.contrastive import make_trainer
from tests.fakes import make_voc, without_times
from tests.segmentation import (
    DEFECTS,
    QUICK,
    SHORT_PAPER,
    TINY_REFINER,
    animals,
    command,
    figures,
    fit,
    halved,
    iou_by_hand,
    make_tiles,
    plain,
    read_masks,
    refiner,
    refused,
    rows,
    segmenter,
    tiles,
    truths,
    weights,
    write_config,
    write_maps,
)

METHODS = ["stage1", "sampled", "one_step", "refined"]


class Run(NamedTuple):
    root: Path  # of the data
    stage1: Path  # a Segmenter's run
    config: Path
    folder: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A refiner, trained and tested behind the run of a Segmenter."""
    home = tmp_path_factory.mktemp("refined")
    root = make_tiles(home / "data")
    first = write_config(home / "first.yaml", "Segmenter", root, trainer={"max_epochs": 6})
    command(home, "fit", "--config", first, "--run_id", "first", "--test_after_fit", "true")
    stage1 = home / "runs" / "tiny" / "first"
    config = write_config(home / "tiny.yaml", "DDPMRefiner", root, **QUICK, stage1=str(stage1))
    command(home, "fit", "--config", config, "--run_id", "one", "--test_after_fit", "true")
    return Run(root, stage1, config, home / "runs" / "tiny" / "one")


@pytest.fixture
def copy(run: Run, tmp_path: Path) -> tuple[object, ...]:
    """Words that test the run's checkpoint, from a file without a run around it: results go to a run called copy."""
    checkpoint = tmp_path / "copy.ckpt"
    checkpoint.write_bytes((run.folder / "checkpoints" / "best.ckpt").read_bytes())
    return ("--config", run.config, "--run_id", "copy", "--ckpt_path", checkpoint)


@pytest.fixture(scope="module")
def poor(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Root of a data set, and maps of a first stage that finds the left half of each defect."""
    home = tmp_path_factory.mktemp("poor")
    root = make_tiles(home / "data", train_good=2, test_good=2, defects={"crack": 30, "hole": 30})
    masks: dict[str, np.ndarray] = {}
    for split in ("train", "val", "test"):
        masks |= truths(tiles(root, cache_dir=str(home / "cache")), split)
    return root, write_maps(home / "maps", {name: halved(mask) for name, mask in masks.items()}, DEFECTS)


# ---- what it learns and leaves --------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["logits", "sample", "v_prediction"])
def test_it_repairs_a_poor_first_stage(poor, prediction):
    root, maps = poor
    data = tiles(root, batch_size=8)
    task = refiner(**QUICK | {"prediction": prediction}, stage1=str(maps))
    trainer = fit(task, data, epochs=6)
    trainer.test(task, datamodule=data, verbose=False)
    result = task._evaluation.figures()
    before, after = (result["methods"][method]["iou"]["value"] for method in ("stage1", "refined"))
    assert 0.4 < before < 0.55
    assert after > 0.65
    gain = result["gain"]["refined"]
    assert gain["iou"]["low"] > 0
    assert gain["wilcoxon_p"] < 0.01
    assert gain["better"] > 10 * gain["worse"]
    assert result["methods"]["sampled"]["iou"]["value"] < before, "a sampled map alone is worse"
    assert task._evaluation.doubt.figures()["auroc"] > 0.5


def test_what_a_run_leaves(run):
    result, first = figures(run.folder), figures(run.stage1)
    assert result["task"] == "DDPMRefiner"
    assert list(result["methods"]) == METHODS
    assert list(result["gain"]) == ["sampled", "one_step", "refined"]
    assert result["methods"]["stage1"] == first["methods"]["segmenter"]
    assert result["parameters"]["stage1"] == first["parameters"]["segmenter"]
    assert result["parameters"]["refiner"] == sum(
        value.numel() for key, value in weights(run.folder).items() if key.startswith("denoiser.")
    )
    assert result["network_calls"] == 5
    assert result["stage1"] == str(run.stage1 / "checkpoints" / "best.ckpt")
    assert result["settings"] == {**QUICK, "loss": "ce", "latent": None}
    assert set(result["ms_per_image"]) == {"stage1", "refined"}
    for method in result["gain"]:
        expected = [result["methods"][name]["iou"]["value"] for name in (method, "stage1")]
        assert result["gain"][method]["iou"]["value"] == pytest.approx(expected[0] - expected[1])
    doubt = result["uncertainty"]
    assert doubt["of"] == "1 - highest probability"
    assert 0 <= doubt["auroc"] <= 1
    found = {path.name for path in (run.folder / "figures").iterdir()}
    assert {"training.png", "test_iou.png", "test_gain.png", "test_uncertainty.png"} <= found
    assert {"test_best.png", "test_worst.png"} & found
    lines = rows(run.folder / "test_predictions.csv")
    assert len(lines) == result["n"]
    for method in METHODS:
        values = [float(line[f"iou({method})"]) for line in lines if line[f"iou({method})"]]
        assert len(values) == result["methods"][method]["n_defined"]
        assert np.mean(values) == pytest.approx(result["methods"][method]["iou"]["value"], rel=1e-5)
        assert f"hd95({method}, defect)" in lines[0]
    known = [float(line["auroc(uncertainty)"]) for line in lines if line["auroc(uncertainty)"]]
    assert np.mean(known) == pytest.approx(doubt["auroc"], rel=1e-5)
    assert not [key for key in weights(run.folder) if key.startswith("stage1.")], "it is opened by its path"


def test_the_masks_that_predict_writes_are_those_of_the_test(run, copy, lit_defect, tmp_path):
    lit_defect("predict", *copy)
    folder = tmp_path / "runs" / "tiny" / "copy"
    truth = truths(tiles(run.root))
    masks = read_masks(folder, list(truth))
    values = [iou_by_hand(masks[name], truth[name], 1) for name in truth]
    assert np.nanmean(values) == pytest.approx(figures(run.folder)["methods"]["refined"]["iou"]["value"])
    maps = ProbabilityMaps(folder / "probabilities", DEFECTS)  # of which another refiner may go on
    maps.check(list(truth), [mask.shape for mask in truth.values()])
    for name in truth:
        doubt = np.load(folder / "predict_uncertainty" / f"{name}.npy")
        np.testing.assert_allclose(doubt, 1 - maps.read(name).max(0), atol=2e-3)


# ---- other options for the same checkpoint ---------------------------------------------------------------------


def test_strength_0_gives_the_figures_of_the_first_stage(run, copy, lit_defect, tmp_path):
    lit_defect("test", *copy, "--model.strength", "0")
    result = figures(tmp_path / "runs" / "tiny" / "copy")
    methods = result["methods"]
    assert methods["refined"] == methods["one_step"] == methods["stage1"]
    assert methods["stage1"] == figures(run.stage1)["methods"]["segmenter"]
    assert result["network_calls"] == 0
    gain = result["gain"]["refined"]
    assert gain["iou"]["value"] == 0
    assert (gain["better"], gain["worse"], gain["equal"]) == (0, 0, methods["stage1"]["n_defined"])
    assert gain["wilcoxon_p"] is None


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({"scheduler": "ddpm"}, 5),
        ({"scheduler": "dpmsolver", "steps": 4}, 2),
        ({"scheduler": "unipc", "strength": 1.0}, 10),
        ({"steps": 20, "strength": 0.1, "num_samples": 3}, 6),
        ({"start": "noised", "label_input": "argmax"}, 5),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_checkpoint_is_tested_with_other_options(run, copy, options, calls):
    checkpoint = copy[-1]
    data = tiles(run.root)
    task = refiner(**QUICK | options, stage1=str(run.stage1))
    trainer = make_trainer()
    trainer.test(task, datamodule=data, ckpt_path=checkpoint, weights_only=True, verbose=False)
    found, trained = task._evaluation.figures()["methods"], figures(run.folder)["methods"]
    assert task.about()["network_calls"] == calls
    assert found["stage1"] == trained["stage1"]
    assert found["refined"] != trained["refined"]


def test_other_batches_give_the_same_figures(run, copy, lit_defect, tmp_path):
    lit_defect("test", *copy, "--data.eval_batch_size", "1")
    found, expected = figures(tmp_path / "runs" / "tiny" / "copy"), figures(run.folder)
    assert found["methods"] == expected["methods"], "what is drawn for a picture does not depend on its batch"
    assert found["gain"] == expected["gain"]


def test_samples_are_averaged_and_their_variance_is_the_uncertainty(run):
    task = loaded(run, num_samples=3)
    images, first = torch.rand(2, 3, 32, 32), torch.rand(2, 2, 32, 32).softmax(1)
    found = task.refine(images, first, [4, 7])
    chains = [
        task.refinement.refine(task._denoise, first, 2 * images - 1, generators(0, [4, 7], number))
        for number in range(3)
    ]
    finals = torch.stack([task.refinement.space.decode(chain.final) for chain in chains])
    assert not torch.allclose(finals[0], finals[1]), "each chain draws its own map"
    torch.testing.assert_close(found.refined, finals.mean(0))
    variance = ((finals - finals.mean(0)) ** 2).mean(0).sum(1)
    torch.testing.assert_close(found.uncertainty, variance)
    torch.testing.assert_close(found.refined.sum(1), torch.ones(2, 32, 32))
    single = loaded(run).refine(images, first, [4, 7])
    torch.testing.assert_close(single.refined, finals[0])
    torch.testing.assert_close(single.uncertainty, 1 - finals[0].amax(1))
    assert task.about()["uncertainty_of"] == "variance of 3 samples"


def loaded(run: Run, **options: Any) -> DDPMRefiner:
    """The run's refiner, ready to refine, without its first stage."""
    task = refiner(**QUICK | options, stage1=str(run.stage1), class_names=DEFECTS)
    task.configure_model()
    task.load_state_dict(weights(run.folder, "best"))
    data = tiles(run.root)
    task._trainer = make_trainer()
    task.trainer.datamodule = data
    return task.eval()


@pytest.mark.parametrize("preset", ["paper", "fast"])
def test_presets(run, preset):
    short = {"preset": "paper", **SHORT_PAPER} if preset == "paper" else {"preset": "fast"}
    task, data = refiner(**short, stage1=str(run.stage1)), tiles(run.root)
    assert task.preset == ("" if preset == "paper" else "fast"), "other steps are settings of one's own"
    trainer = fit(task, data, limit_train_batches=2, limit_val_batches=1)
    trainer.test(task, datamodule=data, verbose=False)
    assert list(task._evaluation.counts) == METHODS
    expected = {**PRESETS[preset], "loss": "ce", "train_steps": 1000, "latent": None}
    assert task.about()["settings"] == {**expected, **{key: value for key, value in short.items() if key != "preset"}}
    assert refiner(preset=preset, stage1=str(run.stage1)).preset == preset


@pytest.mark.parametrize("conditioning", ["joint", "replace", "concat"])
@pytest.mark.parametrize(
    "options",
    [
        {"start": "clean", "train_on": "ground_truth", "prediction": "epsilon", "label_input": "sample"},
        {"start": "noised", "train_on": "prediction", "prediction": "sample", "label_input": "soft"},
        {"start": "clean", "train_on": "prediction", "prediction": "logits", "scheduler": "ddpm"},
        {"start": "noised", "train_on": "ground_truth", "prediction": "v_prediction", "scheduler": "unipc"},
    ],
    ids=lambda options: options["prediction"],
)
def test_every_form_trains_and_refines(poor, conditioning, options):
    root, maps = poor
    task, data = refiner(**QUICK | options | {"conditioning": conditioning}, stage1=str(maps)), tiles(root)
    trainer = fit(task, data, limit_train_batches=2, limit_val_batches=1)
    assert np.isfinite(float(trainer.callback_metrics["train/loss"]))
    assert np.isfinite(float(trainer.callback_metrics["val/loss"]))
    batch = next(iter(data.loader("test")))
    answer = task.eval().answer(batch, "test")
    assert answer.probabilities.shape == (4, 2, 32, 32)
    torch.testing.assert_close(answer.probabilities.sum(1), torch.ones(4, 32, 32))
    assert answer.uncertainty.isfinite().all()


def test_many_classes_with_void_that_never_counts(tmp_path):
    root = make_voc(tmp_path / "voc", images={"train": 12, "val": 5})
    data = animals(root)
    masks = truths(data) | truths(data, "train") | truths(data, "val")
    names = ["background", "bird", "cat"]
    maps = write_maps(tmp_path / "maps", {name: halved(mask % 255) for name, mask in masks.items()}, names)

    class Meddling(DDPMRefiner):
        def answer(self, batch: dict[str, Any], stage: str) -> Any:
            answer, void = super().answer(batch, stage), targets(batch, 3) == 255
            assert void.any()
            masks = {method: torch.where(void, (mask + 1) % 3, mask) for method, mask in answer.masks.items()}
            assert answer.uncertainty is not None
            return answer._replace(masks=masks, uncertainty=torch.where(void, 9.0, answer.uncertainty))

    honest = refiner(**QUICK, stage1=str(maps))
    trainer = fit(honest, data, epochs=2)
    trainer.test(honest, datamodule=data, verbose=False)
    other = Meddling(**TINY_REFINER, **QUICK, stage1=str(maps), class_names=names)
    other.configure_model()
    other.load_state_dict(honest.state_dict(), strict=False)
    trainer.test(other, datamodule=data, verbose=False)
    result = honest._evaluation.figures()
    assert other._evaluation.figures() == result
    assert other._evaluation.doubt.figures() == honest._evaluation.doubt.figures()
    assert set(result["methods"]["refined"]["iou_by_class"]) == set(names)
    assert result["methods"]["refined"]["n"] == 5


# ---- training ------------------------------------------------------------------------------------------------


def test_the_running_mean_by_hand(poor):
    root, maps = poor
    kept: list[dict[str, torch.Tensor]] = []

    class Watched(DDPMRefiner):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            kept.append({name: value.detach().clone() for name, value in self.denoiser.named_parameters()})

    task = Watched(**{**TINY_REFINER, "ema_decay": 0.3}, **QUICK, stage1=str(maps))
    fit(task, tiles(root), limit_train_batches=6, limit_val_batches=0)
    assert len(kept) == 6
    for name, found in task.ema.module.named_parameters():
        mean = kept[0][name].double()
        for step, state in enumerate(kept[1:], start=1):
            decay = min(0.3, (1 + step) / (10 + step))
            mean = decay * mean + (1 - decay) * state[name].double()
        torch.testing.assert_close(found.double(), mean, rtol=1e-5, atol=1e-6)
    assert (1 + 1) / (10 + 1) < 0.3 < (1 + 5) / (10 + 5), "both ends of the rule are met"


def test_the_running_mean_evaluates(run):
    task = loaded(run)
    data = task.data
    data.setup("test")
    batch = next(iter(data.loader("test")))
    first = torch.rand(4, 2, 32, 32).softmax(1)
    images = task.pixels(batch)
    before = task.refine(images, first, [0, 1, 2, 3]).refined
    nn.init.ones_(task.denoiser.unet.conv_out.weight)
    torch.testing.assert_close(task.refine(images, first, [0, 1, 2, 3]).refined, before, rtol=0, atol=0)
    nn.init.ones_(task.ema.module.unet.conv_out.weight)
    assert not torch.allclose(task.refine(images, first, [0, 1, 2, 3]).refined, before)


@pytest.mark.parametrize("source", ["network", "maps"])
def test_a_stopped_run_ends_like_an_undisturbed_one(lit_defect, run, tmp_path, monkeypatch, source):
    """Bit for bit, the running mean too."""
    stage1 = run.stage1
    if source == "maps":
        masks = truths(tiles(run.root)) | truths(tiles(run.root), "train") | truths(tiles(run.root), "val")
        stage1 = write_maps(tmp_path / "maps", {name: halved(mask) for name, mask in masks.items()}, DEFECTS)
    saving = {"class_path": "lit_defect.callbacks.run.LastCheckpoint", "init_args": {"every_n_steps": 3}}
    config = write_config(
        tmp_path / "tiny.yaml", "DDPMRefiner", run.root, trainer={"max_epochs": 2, "callbacks": [saving]},
        **QUICK, stage1=str(stage1), crop=24, augment="dihedral",
    )  # fmt: skip
    lit_defect("fit", "--config", config, "--run_id", "whole")
    folder, original = tmp_path / "runs" / "tiny", DDPMRefiner.training_step
    total = torch.load(folder / "whole" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]

    def pulled(self: DDPMRefiner, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == total - 1:
            raise RuntimeError("the plug was pulled")
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(DDPMRefiner, "training_step", pulled)
        with pytest.raises(RuntimeError, match="plug"):
            lit_defect("fit", "--config", config, "--run_id", "one")
    stopped = weights(folder / "one")
    lit_defect("fit", "--config", config, "--run_id", "one", "--resume")
    whole, resumed = weights(folder / "whole"), weights(folder / "one")
    assert whole.keys() == resumed.keys()
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []
    assert int(whole["ema.n_averaged"]) == total > int(stopped["ema.n_averaged"]) > 0
    assert [key for key in whole if key.startswith("ema.module.")]
    first, second = (without_times(rows(folder / name / "metrics.csv")) for name in ("whole", "one"))
    assert first == second, "the validation, too"


def test_half_precision(poor):
    root, maps = poor
    task, data = refiner(**QUICK, stage1=str(maps)), tiles(root, batch_size=8)
    trainer = fit(task, data, precision="bf16-mixed", epochs=6)
    (logged,) = trainer.test(task, datamodule=data, verbose=False)
    assert logged["test/iou"] > logged["test/stage1_iou"] + 0.1
    assert {value.dtype for value in task.parameters()} == {torch.float32}


# ---- without a first stage -------------------------------------------------------------------------------------


def test_from_noise_without_a_first_stage(lit_defect, run, tmp_path):
    options = QUICK | {"train_on": "ground_truth", "strength": 1.0, "steps": 5}
    config = write_config(tmp_path / "tiny.yaml", "DDPMRefiner", run.root, **options)
    lit_defect("fit", "--config", config, "--run_id", "one", "--test_after_fit", "true")
    result = figures(tmp_path / "runs" / "tiny" / "one")
    assert list(result["methods"]) == ["one_step", "refined"]
    assert "gain" not in result
    assert result["network_calls"] == 5
    assert result["stage1"] is None


def test_trained_on_masks_alone_it_refines_any_first_stage(lit_defect, run, capsys, tmp_path):
    config = write_config(tmp_path / "tiny.yaml", "DDPMRefiner", run.root, **QUICK | {"train_on": "ground_truth"})
    lit_defect("fit", "--config", config, "--run_id", "one")
    folder = tmp_path / "runs" / "tiny" / "one"
    assert (folder / "checkpoints" / "best.ckpt").is_file(), "the best by its loss: there is nothing to refine yet"
    words = ("test", "--config", config, "--run_id", "one", "--ckpt_path", "best")
    message = refused(capsys, lit_defect, *words)
    assert "model.init_args.stage1" in message
    assert "model.init_args.strength" in message
    lit_defect(*words, "--model.stage1", run.stage1)
    assert figures(folder)["methods"]["stage1"] == figures(run.stage1)["methods"]["segmenter"]


# ---- any size ------------------------------------------------------------------------------------------------


class Pointwise(nn.Module):
    """A denoiser that sees nothing but each pixel."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(channels, out, 1)

    def forward(self, inputs: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs)


@pytest.mark.parametrize("conditioning", ["joint", "concat"])
def test_tiles_of_a_pointwise_network_make_the_whole(conditioning):
    images, first = torch.rand(2, 3, 45, 61), torch.rand(2, 2, 45, 61).softmax(1)
    network, found = None, []
    for tile in (None, 16):
        options = QUICK | {"conditioning": conditioning, "prediction": "sample", "train_on": "ground_truth"}
        task = refiner(**options, tile=tile, class_names=DEFECTS)
        task.configure_model()
        network = network or Pointwise(task.refinement.in_channels, task.refinement.out_channels)
        task.ema.module = network
        task._trainer = make_trainer()
        task.trainer.datamodule = None
        found.append(task.refine(images, first, [0, 1]))
    assert found[0].refined.shape == (2, 2, 45, 61)
    for whole, tiled in zip(*found, strict=True):
        torch.testing.assert_close(tiled, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tile", [None, 24])
def test_pictures_of_odd_sizes_keep_their_size(lit_defect, tmp_path, tile):
    root = make_tiles(tmp_path / "data", size=(33, 41), train_good=4, test_good=2, defects={"crack": 8})
    data = {"image_size": None, "cache_dir": str(tmp_path / "cache")}
    masks = truths(tiles(root, **data)) | truths(tiles(root, **data), "train") | truths(tiles(root, **data), "val")
    maps = write_maps(tmp_path / "maps", masks, DEFECTS)
    config = write_config(
        tmp_path / "tiny.yaml", "DDPMRefiner", root, data=data, **QUICK, stage1=str(maps), patch=2, tile=tile
    )
    lit_defect("fit", "--config", config, "--run_id", "one", "--test_after_fit", "true")
    lit_defect("predict", "--config", config, "--run_id", "one", "--ckpt_path", "best")
    folder = tmp_path / "runs" / "tiny" / "one"
    names = [line["name"] for line in rows(folder / "test_predictions.csv")]
    assert {mask.shape for mask in read_masks(folder, names).values()} == {(33, 41)}
    ProbabilityMaps(folder / "probabilities", DEFECTS).check(names, [(33, 41)] * len(names))


# ---- latents -------------------------------------------------------------------------------------------------


def test_latents_of_a_label_autoencoder(lit_defect, capsys, run, tmp_path):
    content = {
        "experiment": "tiny", "wandb": "off", "trainer": {"max_epochs": 2, "accelerator": "cpu"},
        "model": {"class_path": "MaskAutoencoder", "init_args": {"channels": [8, 16], "latent_channels": 3, "lr": 0.01}},
    }  # fmt: skip
    config = write_config(
        tmp_path / "tiny.yaml", "DDPMRefiner", run.root,
        **QUICK | {"prediction": "sample"}, stage1=str(run.stage1), latent=str(tmp_path / "runs/tiny/latent/autoencoder"),
    )  # fmt: skip
    described = yaml.safe_load(config.read_text())
    (tmp_path / "latent.yaml").write_text(yaml.safe_dump({**described, **content}))
    lit_defect("fit", "--config", tmp_path / "latent.yaml", "--run_id", "latent")
    lit_defect("fit", "--config", config, "--run_id", "one", "--test_after_fit", "true")
    folder = tmp_path / "runs" / "tiny" / "one"
    result = figures(folder)
    assert result["settings"]["latent"].endswith("latent/autoencoder")
    assert list(result["methods"]) == METHODS
    assert result["methods"]["stage1"] == figures(run.stage1)["methods"]["segmenter"]
    assert not [key for key in weights(folder) if key.startswith("autoencoder.")], "it is opened by its path"
    lit_defect("test", "--config", config, "--run_id", "one", "--ckpt_path", "best")
    assert plain(figures(folder)) == plain(result)
    assert "model.init_args.prediction" in refused(
        capsys, lit_defect, "fit", "--config", config, "--model.prediction", "logits"
    )
    assert "latent" in refused(capsys, lit_defect, "fit", "--config", config, "--model.latent", tmp_path / "nothing")


# ---- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.steps", "7"], ["model.init_args.steps = 7", "the 20 steps of the diffusion (train_steps)"]),
        (["--model.strength", "0.05"], ["steps = 10", "strength = 0.05"]),
        (["--model.strength", "1.5"], ["model.init_args.strength = 1.5"]),
        (["--model.strength", "0"], ["model.init_args.strength", "train"]),
        (["--model.num_samples", "0"], ["model.init_args.num_samples = 0"]),
        (["--model.num_samples", "2", "--model.label_input", "soft"], ["num_samples = 2", "the same", "label_input"]),
        (["--model.crop", "999"], ["model.init_args.crop = 999", "larger than the pictures"]),
        (["--model.ema_decay", "1"], ["model.init_args.ema_decay = 1"]),
        (["--model.channels", "[]"], ["model.init_args.channels"]),
        (["--model.layers", "0"], ["model.init_args.layers = 0"]),
        (["--model.tile", "0"], ["model.init_args.tile = 0"]),
        (["--model.scheduler", "dpm"], ["model.scheduler", "dpmsolver"]),
        (["--model.stage1", "null"], ["model.init_args.stage1", "train_on"]),
        (["--data.with_masks", "false"], ["data.with_masks", "true"]),
        (["--data.setting", "one_class"], ["data.setting", "supervised"]),
    ],
    ids=lambda value: "=".join(value) if value[0].startswith("--") else "",
)
def test_mistakes_are_named_before_the_first_step(run, lit_defect, capsys, tmp_path, arguments, expected):
    message = refused(capsys, lit_defect, "fit", "--config", run.config, "--run_id", "bad", *arguments)
    for part in expected:
        assert part in message
    assert len(message.splitlines()) <= 3
    assert not (tmp_path / "runs" / "tiny" / "bad" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.conditioning", "joint"], "model.init_args.conditioning = concat, not joint"),
        (["--model.channels", "[8,8]"], "model.init_args.channels = [8, 16], not [8, 8]"),
        (["--model.prediction", "sample"], "model.init_args.prediction = logits, not sample"),
        (["--model.train_steps", "40"], "model.init_args.train_steps = 20, not 40"),
        (["--model.patch", "2"], "model.init_args.patch = 1, not 2"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_checkpoint_of_another_network(run, copy, lit_defect, capsys, arguments, expected):
    assert expected in refused(capsys, lit_defect, "test", *copy, *arguments)


def test_the_checkpoint_of_a_segmenter_is_none_of_a_refiner(run, lit_defect, capsys):
    checkpoint = run.stage1 / "checkpoints" / "best.ckpt"
    message = refused(capsys, lit_defect, "test", "--config", run.config, "--ckpt_path", checkpoint)
    assert "does not fit this DDPMRefiner" in message


def test_options_from_python():
    with pytest.raises(UserError, match=r"train_on = prediction.*stage1"):
        refiner(**QUICK)
    with pytest.raises(UserError, match="latent"):
        refiner(**QUICK | {"train_on": "ground_truth"}, latent="somewhere")
    assert json.dumps(dict(refiner(**QUICK | {"train_on": "ground_truth"}).hparams))
    assert segmenter().hparams["architecture"] == "unet"
