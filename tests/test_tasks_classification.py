"""The classifier's training: cached features, checkpoints, losses, frozen layers, options of the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from PIL import Image

from lit_defect.anomalies import LocalPseudoAnomaly
from lit_defect.data import CustomCrops, MVTecAD
from lit_defect.data.splits import write_split
from lit_defect.errors import UserError
from lit_defect.metrics.classification import defect_score, threshold_for_recall
from lit_defect.nets.backbones import Backbone
from lit_defect.tasks import DefectClassifier
from lit_defect.tasks.pseudo import share_of
from tests.anomalies import Stripes
from tests.fakes import make_crops_folder, make_mvtec

BODY = "backbone.model."
HEAD = "backbone.model.fc."  # of test_resnet's classifier


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_mvtec(tmp_path / "data", train_good=14, test_good=10, defects={"crack": 10, "hole": 10}, size=(32, 32))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A weight file, as a user would bring one."""
    return save_weights(tmp_path / "resnet.pth", seed=1)


def save_weights(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), path)
    return path


def make_data(root: Path, **settings: Any) -> MVTecAD:
    settings = {"setting": "supervised", "batch_size": 8, "leakage": "off", **settings}
    return MVTecAD(str(root), **settings)


def make_model(weights: Path | None = None, **settings: Any) -> DefectClassifier:
    source = str(weights) if weights else None
    return DefectClassifier(**{"backbone": "test_resnet", "weights": source, "lr": 0.01, **settings})


def make_trainer(epochs: int = 2, **settings: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", max_epochs=epochs, **quiet, **settings)


def fit(model: DefectClassifier, data: LightningDataModule, **settings: Any) -> Trainer:
    seed_everything(0, verbose=False)
    trainer = make_trainer(**settings)
    trainer.fit(model, datamodule=data)
    return trainer


def states(model: DefectClassifier) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.network.state_dict().items()}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that pass through the body of any network."""
    sizes: list[int] = []
    original: Callable = Backbone.feature_map

    def counting(self: Backbone, images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return original(self, images)

    monkeypatch.setattr(Backbone, "feature_map", counting)
    return sizes


# --- cached features ---


@pytest.mark.parametrize("augment", ["none", "flips", "dihedral"])
def test_cached_features_train_the_same_head(root, weights, augment):
    heads = []
    for cached in (True, False):
        model = make_model(weights, augment=augment, cache_features=cached, average_views=True)
        trainer = fit(model, make_data(root), epochs=3)
        classifier = model.network.model.get_classifier()
        heads.append((classifier.weight.detach(), classifier.bias.detach(), trainer.callback_metrics))
    for cached_values, plain_values in zip(heads[0][:2], heads[1][:2], strict=True):
        torch.testing.assert_close(cached_values, plain_values, rtol=1e-4, atol=1e-6)
    assert heads[0][0].abs().sum() > 0
    for key in ("val/loss", "val/auroc"):
        assert float(heads[0][2][key]) == pytest.approx(float(heads[1][2][key]), abs=1e-5)


def test_dropout_acts_on_a_frozen_network_too(root, weights):
    heads = []
    for drop_rate, cached in ((0.5, True), (0.5, False), (0.0, True)):
        model = make_model(weights, drop_rate=drop_rate, cache_features=cached)
        fit(model, make_data(root))
        heads.append(model.network.model.get_classifier().weight.detach())
    torch.testing.assert_close(heads[0], heads[1], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(heads[0], heads[2], rtol=1e-2)


def test_features_are_computed_once_for_all_runs_and_seeds(root, weights, seen):
    data = make_data(root)
    model = make_model(weights, augment="flips")
    fit(model, data).test(model, datamodule=data, verbose=False)
    counts = {split: len(samples) for split, samples in data.samples.items()}
    assert sum(seen) == 4 * counts["train"] + counts["val"] + counts["test"]
    seen.clear()
    for seed in (0, 0, 1):
        data = make_data(root, seed=seed)  # seed 1 splits the same pictures otherwise
        model = make_model(weights, augment="none")
        fit(model, data).test(model, datamodule=data, verbose=False)
    assert seen == []


def test_a_changed_picture_alone_is_computed_again(root, weights, seen):
    fit(make_model(weights), make_data(root))
    seen.clear()
    changed = Path(make_and_setup(root).samples["train"][0].path)
    Image.fromarray(np.full((32, 32), 77, np.uint8)).save(changed)
    fit(make_model(weights), make_data(root))
    assert seen == [1]


def make_and_setup(root: Path, **settings: Any) -> MVTecAD:
    data = make_data(root, **settings)
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.mark.parametrize("change", ["model size", "data size", "weights", "normalisation", "precision"])
def test_other_pixels_or_weights_give_other_features(root, weights, seen, tmp_path, change, monkeypatch):
    fit(make_model(weights), make_data(root))
    first, model, data, settings = sum(seen), {}, {}, {}
    seen.clear()
    if change == "model size":
        model = {"image_size": 24}
    elif change == "data size":
        data = {"image_size": 24}
    elif change == "weights":
        weights = save_weights(tmp_path / "other.pth", seed=2)
    elif change == "normalisation":  # the same tensors, for pictures that are scaled otherwise
        original = Backbone.__init__

        def shifted(self, *args, **kwargs):
            original(self, *args, **kwargs)
            self.mean += 0.1

        monkeypatch.setattr(Backbone, "__init__", shifted)
    else:
        settings = {"precision": "bf16-mixed"}
    fit(make_model(weights, **model), make_data(root, **data), **settings)
    assert sum(seen) == first


def test_pictures_are_served_again_after_cached_training(root, weights):
    data = make_data(root)
    model = make_model(weights)
    trainer = fit(model, data)
    probabilities = torch.cat(trainer.predict(model, datamodule=data))
    assert probabilities.shape == (len(data.samples["test"]), 2)
    trainer.test(model, datamodule=data, verbose=False)
    np.testing.assert_allclose(model._evaluation.probabilities, probabilities, atol=1e-6)


def test_average_views_is_the_mean_over_the_views(root, weights):
    data = make_data(root)
    model = make_model(weights, augment="flips", average_views=True)
    trainer = fit(model, data)
    trainer.test(model, datamodule=data, verbose=False)
    images = torch.cat([batch["image"] for batch in make_and_setup(root).loader("test")])
    by_hand = []
    with torch.no_grad():
        for turned in (images, images.flip(-1), images.flip(-2), images.flip(-1, -2)):
            by_hand.append(model(turned).double().softmax(1))
    expected = torch.stack(by_hand).mean(0)
    np.testing.assert_allclose(model._evaluation.probabilities, expected, atol=1e-6)
    assert (expected - by_hand[0]).abs().max() > 1e-4  # the views do differ


# --- refusals ---


def test_strong_augmentation_cannot_be_cached():
    with pytest.raises(UserError, match=r"model.init_args.augment = strong.*cache_features"):
        make_model(augment="strong")


@pytest.mark.parametrize("cached", [True, False])
def test_quarter_turns_need_square_pictures(tmp_path, cached):
    root = make_mvtec(tmp_path, defects={"crack": 10}, size=(32, 40))
    with pytest.raises(UserError, match=r"augment = dihedral.*32x40"):
        fit(make_model(augment="dihedral", cache_features=cached), make_data(root))
    fit(make_model(augment="dihedral", cache_features=cached, image_size=32), make_data(root))


def test_averaging_over_quarter_turns_needs_square_pictures(root, tmp_path):
    model = make_model(augment="dihedral", average_views=True, cache_features=False)
    trainer = fit(model, make_data(root))
    wide = make_mvtec(tmp_path / "wide", defects={"crack": 10}, size=(32, 40))
    with pytest.raises(UserError, match="32x40"):
        trainer.test(model, datamodule=make_data(wide), verbose=False)


def test_classes_of_other_data_are_refused(root):
    model = make_model(class_names=["fine", "broken"])
    with pytest.raises(UserError, match=r"fine.*good"):
        fit(model, make_data(root))


def test_a_trainer_without_a_data_module_is_refused(root):
    with pytest.raises(UserError, match="data module"):
        make_trainer().fit(make_model(), train_dataloaders=make_and_setup(root).train_dataloader())


@pytest.mark.parametrize("setting", [{"required_recall": 0.0}, {"warmup": 1.0}, {"lr": 0.0}])
def test_numbers_out_of_range_are_refused_by_name(setting):
    (key,) = setting
    with pytest.raises(UserError, match=rf"model\.init_args\.{key}"):
        make_model(**setting)


def test_one_class_in_training_is_refused(root):
    with pytest.raises(UserError, match="only good"):
        fit(make_model(), make_data(root, setting="one_class"))


@pytest.mark.parametrize("monitor", ["val/auroc", "val/aurocc"])
def test_a_figure_that_validation_cannot_give_is_refused_before_training(root, monitor, tmp_path):
    data = make_data(root, split_file=str(one_class_validation(root, tmp_path)))
    with pytest.raises(UserError, match=rf"monitor = {monitor}.*good.*val/accuracy"):
        fit(make_model(monitor=monitor), data)
    fit(make_model(monitor="val/loss"), data)


def one_class_validation(root: Path, tmp_path: Path) -> Path:
    """A split whose validation part is all good."""
    data = make_and_setup(root)
    samples = [replace(s, split="train" if s.split == "val" and s.label else s.split) for s in data._divided]
    write_split(tmp_path / "splits.csv", samples)
    return tmp_path / "splits.csv"


def test_training_without_validation_works_and_validating_nothing_does_not(root):
    data = make_data(root, val_fraction=0.0)
    model = make_model()
    trainer = fit(model, data)
    trainer.test(model, datamodule=data, verbose=False)
    assert model._result["escape_rate"]["reason"] == "no threshold"
    with pytest.raises(UserError, match="val_fraction"):
        trainer.validate(model, datamodule=data, verbose=False)


# --- checkpoints ---


def test_a_frozen_checkpoint_holds_the_head_alone(root, weights, tmp_path):
    data = make_data(root)
    model = make_model(weights)
    trainer = fit(model, data)
    path = tmp_path / "head.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    kept = {key for key in saved["state_dict"] if key.startswith(BODY)}
    assert kept == {f"{HEAD}weight", f"{HEAD}bias"}
    assert path.stat().st_size < 0.3 * weights.stat().st_size
    again = DefectClassifier.load_from_checkpoint(path)
    images = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(again.eval()(images), model.eval()(images))

    other = save_weights(tmp_path / "other.pth", seed=2)
    with pytest.raises(UserError, match=rf"other weights.*{weights.name}.*{other.name}"):
        make_trainer().test(make_model(other), datamodule=data, ckpt_path=path)
    with pytest.raises(UserError, match="other weights"):
        DefectClassifier.load_from_checkpoint(path, weights=str(other))


def test_random_frozen_weights_stay_in_the_checkpoint(root, tmp_path):
    model = make_model()  # they could not be had again
    trainer = fit(model, make_data(root))
    trainer.save_checkpoint(tmp_path / "all.ckpt")
    torch.manual_seed(5)
    again = DefectClassifier.load_from_checkpoint(tmp_path / "all.ckpt")
    assert all(torch.equal(again.network.state_dict()[key], value) for key, value in states(model).items())


def test_features_follow_the_weights_that_a_checkpoint_brings(root, tmp_path):
    first, second = make_model(), make_model()
    data = make_data(root)
    fit(first, data).test(first, datamodule=data, verbose=False)
    torch.manual_seed(9)
    second.class_names = data.class_names
    second.configure_model()
    trainer = fit(second, data)
    trainer.save_checkpoint(tmp_path / "second.ckpt")
    trainer.test(second, datamodule=data, verbose=False)
    make_trainer().test(first, datamodule=data, ckpt_path=tmp_path / "second.ckpt", verbose=False)
    np.testing.assert_array_equal(first._evaluation.probabilities, second._evaluation.probabilities)


@pytest.mark.parametrize("transfer", ["head", "all"])
def test_a_checkpoint_serves_without_a_data_module(root, weights, tmp_path, transfer):
    model = make_model(weights, transfer=transfer, image_size=32)
    fit(model, make_data(root)).save_checkpoint(tmp_path / "model.ckpt")
    loaded = DefectClassifier.load_from_checkpoint(tmp_path / "model.ckpt").eval()
    assert loaded.class_names == ["good", "defective"]
    assert loaded.normal_class == 0
    assert torch.equal(loaded.threshold, model.threshold)
    for size in ((32, 32), (50, 41)):
        pixels = torch.randint(256, (2, 3, *size), dtype=torch.uint8)
        with torch.no_grad():
            logits = loaded(pixels)
            torch.testing.assert_close(loaded(pixels.float() / 255), logits)
            torch.testing.assert_close(logits, model.eval()(pixels))
        assert logits.shape == (2, 2)


def test_the_threshold_is_that_of_the_validation_split(root, weights, tmp_path):
    model = make_model(weights, required_recall=0.8)
    data = make_data(root, val_fraction=0.4)
    trainer = fit(model, data)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    trainer.validate(model, datamodule=data, verbose=False)
    kept = model._evaluation
    expected = threshold_for_recall(defect_score(kept.probabilities, 0), kept.labels == 1, 0.8)
    assert float(model.threshold) == expected
    assert float(torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"]["threshold"]) == expected
    trainer.test(model, datamodule=data, verbose=False)
    result = model._result
    assert result["threshold"] == expected
    rejected = defect_score(model._evaluation.probabilities, 0) >= expected
    defective = model._evaluation.labels == 1
    assert result["escape_rate"]["value"] == pytest.approx((~rejected & defective).sum() / defective.sum())
    assert result["overkill_rate"]["value"] == pytest.approx((rejected & ~defective).sum() / (~defective).sum())


# --- what is trained, and how ---


@pytest.mark.parametrize("loss", ["weighted", "focal", "logit_adjusted"])
@pytest.mark.parametrize("sampler", ["shuffle", "balanced"])
def test_losses_and_samplers_against_imbalance(tmp_path, loss, sampler):
    root = make_crops_folder(tmp_path / "crops", classes={"good": 30, "scratched": 8})
    data = CustomCrops(str(root), batch_size=8, leakage="off", sampler=sampler, val_fraction=0.4)
    model = make_model(transfer="all", loss=loss, label_smoothing=0.05)
    trainer = fit(model, data, epochs=8)
    assert float(trainer.callback_metrics["val/auroc"]) > 0.9
    assert type(model.loss).__name__.lower().startswith(loss.split("_")[0])


class Rates(Callback):
    """The learning rate of every parameter at the end of the warm-up."""

    def on_train_end(self, trainer: Trainer, pl_module: DefectClassifier) -> None:
        names = {id(parameter): name for name, parameter in pl_module.network.model.named_parameters()}
        (optimizer,) = trainer.optimizers
        self.rates = {names[id(p)]: group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}


def test_layer_decay_slows_the_layers_towards_the_stem(root, weights):
    rates = Rates()
    fit(make_model(weights, transfer="all", layer_decay=0.5, lr=0.01), make_data(root), callbacks=[rates])
    assert rates.rates["fc.weight"] == pytest.approx(0.01)
    path = ["fc.weight", "layer4.0.conv1.weight", "layer3.0.conv1.weight", "layer1.0.conv1.weight"]
    along = [rates.rates[name] for name in [*path, "conv1.0.weight"] if name in rates.rates]
    assert along == sorted(along, reverse=True)
    assert len(set(along)) >= 4
    ratios = {round(0.01 / rate, 6) for rate in rates.rates.values()}
    assert all(ratio == 2 ** round(np.log2(ratio)) for ratio in ratios)


def test_last_block_trains_the_last_block_and_nothing_else(root, weights):
    model = make_model(weights, transfer="last_block", lr=0.05, weight_decay=0.1)
    seed_everything(0, verbose=False)
    before = torch.load(weights, weights_only=True)
    fit(model, make_data(root))
    after = model.network.model.state_dict()
    trained = {name for name, p in model.network.model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"layer4", "fc"}
    for key, value in before.items():
        if key.startswith("fc."):
            continue
        same = torch.equal(after[key], value)
        assert same != key.startswith("layer4."), key  # BatchNorm's statistics too


@pytest.mark.parametrize(
    "settings",
    [{"channels_last": True}, {"channels_last": False}, {"channels_last": True, "transfer": "head"}],
)
def test_bfloat16_and_memory_formats_run(root, weights, settings):
    model = make_model(weights, **{"transfer": "all", "augment": "flips", **settings})
    trainer = fit(model, make_data(root), precision="bf16-mixed")
    trainer.test(model, datamodule=make_data(root), verbose=False)
    assert np.isfinite(model._evaluation.probabilities).all()
    kernel = model.network.model.layer4[0].conv1.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last) == settings["channels_last"]
    assert kernel.dtype == torch.float32


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_probabilities(root, weights):
    results = []
    for compiled in (True, False):
        model = make_model(weights, transfer="all", compile=compiled)
        data = make_data(root)
        fit(model, data, epochs=1).test(model, datamodule=data, verbose=False)
        results.append(model._evaluation.probabilities)
    np.testing.assert_allclose(results[0], results[1], atol=1e-3)


# --- pseudo-anomalies ---


def on_anomalies(**settings: Any) -> DefectClassifier:
    return make_model(**{"transfer": "all", "anomaly": Stripes(), "anomaly_share": 0.25, **settings})


def test_a_share_of_a_batch_becomes_defective_and_real_defects_stay(root):
    model = on_anomalies()
    fit(model, make_data(root), epochs=1)
    logged: dict[str, float] = {}
    model.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign]
    images = torch.full((400, 3, 16, 16), 128, dtype=torch.uint8)
    images[300:] = 255  # too bright: no stripes are accepted
    labels = torch.zeros(400, dtype=torch.int64)
    labels[:100] = 1
    batch = {"image": images, "label": labels, "index": torch.arange(400)}
    before = images.clone(), labels.clone()
    torch.manual_seed(0)
    seen = model._with_pseudo_anomalies(batch, model.anomaly)
    torch.testing.assert_close((images, labels), before, rtol=0, atol=0)  # a batch stays as it is
    plain = images / 255
    for part in (slice(0, 100), slice(300, 400)):  # defective, and rejected
        assert torch.equal(seen["image"][part], plain[part])
        assert torch.equal(seen["label"][part], labels[part])
    changed = seen["label"][100:300] == 1
    assert torch.equal(changed, (seen["image"][100:300] != plain[100:300]).flatten(1).any(1))
    assert set(seen["image"][100:300][changed][:, 0, 0, 0].tolist()) == {0.0, 1.0}, "both kinds are drawn"
    assert logged["train/pseudo_anomalies"] == int(changed.sum()) / 400
    assert logged["train/rejected"] == pytest.approx(1 - int(changed.sum()) / 100)  # a quarter of 400 were drawn
    torch.manual_seed(1)
    again = model._with_pseudo_anomalies(batch, model.anomaly)
    assert not torch.equal(again["label"], seen["label"]), "drawn anew"


@pytest.mark.parametrize(("good", "share", "expected"), [(40, 0.25, 10), (6, 0.25, 3), (0, 0.25, 0), (40, 0.26, 10.4)])
def test_the_share_is_met_on_average_and_leaves_half_of_the_good_ones(good, share, expected):
    labels = torch.tensor([0] * good + [1] * (40 - good))
    torch.manual_seed(0)
    rows = [share_of({"label": labels}, 0, share) for _ in range(500)]
    assert np.mean([len(part) for part in rows]) == pytest.approx(expected, abs=0.1)
    assert all(len(set(part.tolist())) == len(part) and (labels[part] == 0).all() for part in rows)


def test_a_class_that_pseudo_anomalies_alone_fill_can_be_learnt(root):
    """Good pictures alone train; real defects are found."""
    model, data = on_anomalies(anomaly=LocalPseudoAnomaly(), monitor=None), make_data(root, setting="one_class")
    trainer = fit(model, data, epochs=25)
    assert float(trainer.callback_metrics["train/pseudo_anomalies"]) > 0
    trainer.test(model, datamodule=data, verbose=False)
    assert model._result["auroc"]["value"] > 0.8


def test_losses_for_unequal_classes_count_the_pseudo_anomalies(root):
    model = on_anomalies(loss="logit_adjusted")
    assert model.class_names is None
    fit(model, data := make_data(root), epochs=1)
    counts = data.counts()["train"]
    changed = -(-sum(counts.values()) // 4)
    met = torch.tensor([counts["good"] - changed, counts["defective"] + changed])
    torch.testing.assert_close(model.loss.shift.flatten(), (met / met.sum()).log(), check_dtype=False)


def test_a_resumed_training_meets_the_same_pseudo_anomalies(root, tmp_path):
    def make() -> DefectClassifier:
        return on_anomalies(anomaly=LocalPseudoAnomaly(), augment="strong", schedule="constant")

    whole, half, rest = make(), make(), make()
    fit(whole, make_data(root), epochs=3)
    fit(half, make_data(root), epochs=2).save_checkpoint(tmp_path / "last.ckpt")
    torch.rand(5)  # another state of the generator than a fresh process has
    make_trainer(3).fit(rest, datamodule=make_data(root), ckpt_path=tmp_path / "last.ckpt")
    torch.testing.assert_close(states(rest), states(whole), rtol=0, atol=0)


def test_the_run_shows_its_pseudo_anomalies(root, tmp_path):
    model = on_anomalies(anomaly=LocalPseudoAnomaly())
    fit(model, make_data(root), epochs=1)
    model.write_preview(tmp_path)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "pseudo_anomalies.png", "discarded_by_area.png",
    }  # fmt: skip
    assert "LocalPseudoAnomaly" in model.title


def test_pseudo_anomalies_where_they_cannot_be_are_refused(root, tmp_path):
    with pytest.raises(UserError, match=r"model.init_args.anomaly .*cache_features.*transfer"):
        make_model(anomaly=Stripes())
    with pytest.raises(UserError, match=r"model.init_args.anomaly_share = 1"):
        on_anomalies(anomaly_share=1.0)
    three = make_crops_folder(tmp_path / "crops", classes={"bent": 8, "good": 8, "torn": 8})
    with pytest.raises(UserError, match=r"model.init_args.anomaly .*good, bent, torn"):
        fit(on_anomalies(), CustomCrops(str(three), batch_size=8, leakage="off"))
    with pytest.raises(UserError, match="discards every pseudo-anomaly"):
        fit(on_anomalies(anomaly=LocalPseudoAnomaly(ssim_threshold=1e-6)), make_data(root))


def test_the_defective_class_may_come_first(tmp_path):
    root = make_crops_folder(tmp_path / "crops", classes={"broken": 20, "good": 10})
    model = on_anomalies(loss="weighted", normal_class=1)
    fit(model, CustomCrops(str(root), batch_size=8, leakage="off"), epochs=1)
    model.log = lambda *_, **__: None  # type: ignore[method-assign]
    batch = {"image": torch.full((8, 3, 16, 16), 0.5), "label": torch.ones(8, dtype=torch.int64)}
    assert (model._with_pseudo_anomalies(batch, model.anomaly)["label"] == 0).sum() == 2
