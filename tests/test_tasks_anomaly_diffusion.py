"""AnomalyDiffusion learns: what gets a gradient, what is cached, what a checkpoint holds, and what is refused."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback
from safetensors import safe_open

from lit_defect.diffusion.attention import CrossAttention
from lit_defect.diffusion.base_model import LatentBase
from lit_defect.errors import DataError, UserError
from lit_defect.tasks import AnomalyDiffusion, MaskDiffusion
from lit_defect.tasks.few_shots import FewShots
from lit_defect.tasks.learnt_files import EXPORT
from lit_defect.tasks.views import view
from tests.anomaly_diffusion import NATIVE, PAIRS, SERVED, SIZE, make_base, make_parts, parts, task_of, write_config
from tests.contrastive import make_trainer
from tests.fakes import make_mvtec, save
from tests.segmentation import command, fit, refused

GRID = (SIZE // 4, SIZE // 4)  # of the latents


class Made(NamedTuple):
    root: Path
    base: Path
    folder: Path  # of the run
    others: Path  # where the runs of single tests leave their exports
    checkpoint: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Trained for a step, with LoRA, so that there is everything in it that can be."""
    folder = tmp_path_factory.mktemp("made")
    root, base = make_parts(folder / "data"), make_base(folder / "base")
    task = task_of(base, lora=2, monitor=None)
    data = parts(root, batches_per_epoch=1, cache_dir=str(folder / "cache"))
    trainer = fit(task, data, default_root_dir=folder / "run")
    trainer.save_checkpoint(folder / "made.ckpt", weights_only=False)
    return Made(root, base, folder / "run", folder / "others", folder / "made.ckpt")


@pytest.fixture
def opened(made: Made) -> AnomalyDiffusion:
    return AnomalyDiffusion.load_from_checkpoint(made.checkpoint, weights_only=True)


def snapshot(task: Any) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in task.state_dict().items()}


class Watch(Callback):
    """What a training does to the parameters."""

    def __init__(self) -> None:
        self.before: dict[str, torch.Tensor] = {}
        self.graded: set[str] = set()
        self.losses: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.before = snapshot(pl_module)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.graded |= {name for name, p in pl_module.named_parameters() if p.grad is not None and p.grad.any()}
        untouched = [p for name, p in pl_module.named_parameters() if "learnt." not in name and ".lora_" not in name]
        assert all(p.grad is None and not p.requires_grad for p in untouched)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))


# ---- what learns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spatial", [0, 2])
@pytest.mark.parametrize("lora", [0, 2])
def test_only_what_is_learnt_changes(made, lora, spatial):
    watch, task = Watch(), task_of(made.base, lora=lora, spatial_tokens=spatial, warmup=0.0, schedule="constant")
    fit(task, parts(made.root, batches_per_epoch=3), callbacks=[watch], default_root_dir=made.others)
    after = snapshot(task)
    changed = {key for key in after if not torch.equal(after[key], watch.before[key])}
    trained = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    assert watch.graded == trained
    assert changed == trained
    kinds = {name.split(".")[1] if name.startswith("learnt.") else "lora" for name in trained}
    assert kinds == {"tokens"} | ({"spatial"} if spatial else set()) | ({"lora"} if lora else set())
    assert not task.base.training, "dropout stays off"
    assert np.isfinite(watch.losses).all()
    if not lora:
        assert LatentBase.open(str(made.base)).fingerprint == task.base.fingerprint
        untouched = LatentBase.open(str(made.base)).state_dict()
        assert all(torch.equal(value, after[f"base.{key}"]) for key, value in untouched.items())


def test_each_part_has_its_own_learning_rate(made):
    task = task_of(made.base, lora=2, lr=0.02, spatial_lr=0.1, lora_lr=0.2, weight_decay=0.3, schedule="constant",
                   warmup=0.0)  # fmt: skip
    trainer = fit(task, parts(made.root, batches_per_epoch=1), default_root_dir=made.others)
    rates = {}
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    for group in trainer.optimizers[0].param_groups:
        for parameter in group["params"]:
            rates[names[id(parameter)]] = (group["lr"], group["weight_decay"])
    assert set(rates) == {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    for name, (rate, decay) in rates.items():
        share = 1 if "tokens" in name else 0.1 if "spatial" in name else 0.2
        assert rate == pytest.approx(0.02 * share), name
        assert decay == (0.3 if "lora" in name else 0), name


@pytest.mark.parametrize(
    "options",
    [
        {"alignment": 0.5},
        {"prompt_noise": 0.5},
        {"min_snr_gamma": 5.0},
        {"offset_noise": 0.5},
        {"mask": "off"},
        {"mask": "bilinear", "normalised": False},
        {"start_word": "crack hole"},
        {"template": "a photo of a {category} with * on it"},
        {"augment": "dihedral"},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_option_makes_a_difference(made, options):
    def train(**settings: Any) -> list[float]:
        watch = Watch()
        task = task_of(made.base, **settings)
        fit(task, parts(made.root, batches_per_epoch=2), callbacks=[watch], default_root_dir=made.others)
        assert task.cross.idle
        return watch.losses

    found = train(**options)
    assert np.isfinite(found).all()
    assert found != train()


def test_mixed_precision_and_accumulated_gradients(made):
    watch, task = Watch(), task_of(made.base, lora=2, alignment=0.1)
    data = parts(made.root, batches_per_epoch=4)
    settings = {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "default_root_dir": made.others}
    trainer = fit(task, data, callbacks=[watch], **settings)
    assert trainer.global_step == 2
    assert np.isfinite(watch.losses).all()
    assert all(p.dtype == torch.float32 for p in task.parameters())


def test_validation_is_the_same_for_the_same_weights(made, tmp_path):
    root = make_parts(tmp_path / "data", defects={"crack": 18, "hole": 18})
    task, data = task_of(made.base, lr=1e-12), parts(root, val_fraction=0.4, batches_per_epoch=1)
    seen = []

    class Losses(Callback):
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if "val/loss" in trainer.callback_metrics:
                seen.append(float(trainer.callback_metrics["val/loss"]))

    fit(task, data, epochs=3, callbacks=[Losses()], default_root_dir=tmp_path)
    assert any(s.label for s in data.samples["val"])
    assert len(seen) >= 2
    assert seen == pytest.approx([seen[0]] * len(seen), rel=1e-5)


def test_validation_does_not_depend_on_how_the_pictures_are_shared(made, tmp_path):
    """Neither among batches nor among processes, of which one may have no defect; it is the mean over all pictures."""
    root = make_parts(tmp_path / "data", defects={"crack": 18, "hole": 18})
    task, data = task_of(made.base, alignment=0.1), parts(root, val_fraction=0.4, batches_per_epoch=1)
    trainer = fit(task, data, default_root_dir=tmp_path)
    logged = float(trainer.callback_metrics["val/loss"])
    defects = sorted(task._shots["val"].row_of)
    good = [i for i in range(len(data.samples["val"])) if i not in defects]
    assert len(defects) > 2

    def judged(*batches: list[int]) -> list[float]:
        task.on_validation_epoch_start()
        with torch.no_grad():
            for number, batch in enumerate(batches):
                task.validation_step({"index": torch.tensor(batch)}, number)
        return task._judged.tolist()

    whole = judged(defects + good)
    assert whole[0] / whole[1] == pytest.approx(logged, rel=1e-4), "after the only step"
    parts_of = judged(defects[:1]), judged(good), judged(defects[2:], defects[1:2])
    assert parts_of[1] == [0, 0]
    assert [sum(part) for part in zip(*parts_of, strict=True)] == pytest.approx(whole, rel=1e-6)


# ---- the loss --------------------------------------------------------------------------------------------------


def blob() -> torch.Tensor:
    """(2, 1, 32, 32): a pixel in the middle of a cell, and a square of 2 x 3 cells."""
    masks = torch.zeros(2, 1, SIZE, SIZE)
    masks[0, 0, 17, 22] = 1
    masks[1, 0, 8:16, 4:16] = 1
    return masks


def cells() -> torch.Tensor:
    places = torch.zeros(2, 1, *GRID)
    places[0, 0, 4, 5] = 1
    places[1, 0, 2:4, 1:4] = 1
    return places


def test_the_loss_has_no_gradient_outside_the_mask(made):
    torch.manual_seed(0)
    output, target = torch.randn(2, 4, *GRID, requires_grad=True), torch.randn(2, 4, *GRID)
    loss = task_of(made.base).loss(output, target, blob(), None)
    loss.backward()
    assert torch.equal((output.grad != 0).float(), cells().expand_as(output)), "there and only there"
    error, places = (output.detach() - target).numpy().astype(np.float64) ** 2, cells().numpy()
    by_hand = [(error[i] * places[i]).sum() / (4 * places[i].sum()) for i in range(2)]
    assert float(loss.detach()) == pytest.approx(np.mean(by_hand), rel=1e-6)


def test_the_authors_loss_and_none(made):
    torch.manual_seed(0)
    output, target = torch.randn(2, 4, *GRID, requires_grad=True), torch.randn(2, 4, *GRID)
    loss = task_of(made.base, mask="bilinear", normalised=False).loss(output, target, blob(), None)
    error, places = (output.detach() - target).numpy().astype(np.float64) ** 2, cells().numpy()
    places[0] = 0  # a pixel of a cell is nowhere for them
    assert float(loss.detach()) == pytest.approx((error * places).mean(), rel=1e-6)
    plain = task_of(made.base, mask="off").loss(output, target, blob(), None)
    assert float(plain.detach()) == pytest.approx(error.mean(), rel=1e-6)


def test_alignment_adds_what_is_attended_outside(opened):
    """The task's own loss against the attention of the same call, looked at from outside."""
    task = opened
    shots = random_shots(pictures=2)
    rows, views = torch.tensor([0, 1]), torch.zeros(2, dtype=torch.int64)
    torch.manual_seed(3)
    task.alignment = 0.7
    with_it = task._loss(shots, rows, views)
    torch.manual_seed(3)
    task.alignment = 0.0
    with task.cross.recording(task.positions) as maps:
        without = task._loss(shots, rows, views)
    outside = []
    for attention in maps:
        places = torch.nn.functional.adaptive_max_pool2d(shots.masks[:, 0].float(), attention.shape[1:])[:, 0]
        outside.append(1 - (attention * places).sum((1, 2)) / attention.sum((1, 2)))
    expected = without + 0.7 * torch.stack(outside).mean()
    assert float(with_it.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert len(maps) == len([m for m in task.base.unet.modules() if type(m).__name__ == "BasicTransformerBlock"])


def random_shots(pictures: int, views: int = 1) -> FewShots:
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(pictures, views, 1, SIZE, SIZE, dtype=torch.uint8)
    masks[..., 8:20, 8:20] = 1
    moments = torch.randn(pictures, views, 8, *GRID, generator=generator)
    return FewShots(moments, masks, torch.arange(pictures) % 2, {i: i for i in range(pictures)})


# ---- what is drawn, and what is cached -------------------------------------------------------------------------


def test_pairs_are_drawn_equally_often(made, monkeypatch):
    """Of a type of 2 pictures as many as of one of 30, and within a type all pictures and views alike."""
    task = task_of(made.base)
    task.pairs = list(PAIRS)
    pairs = torch.tensor([0] * 30 + [1] * 2)
    task._shots["train"] = FewShots(torch.zeros(32, 4, 1, 1, 1), torch.zeros(32, 4, 1, 1, 1), pairs, {})
    drawn: list[tuple[int, int]] = []
    monkeypatch.setattr(task, "_loss", lambda shots, rows, views: drawn.extend(
        zip(rows.tolist(), views.tolist(), strict=True)) or torch.zeros(()))  # fmt: skip
    monkeypatch.setattr(task, "log", lambda *_, **__: None)
    torch.manual_seed(0)
    for step in range(100):
        task.training_step({"index": torch.zeros(32, dtype=torch.int64)}, step)
    kinds = Counter(int(pairs[row]) for row, _ in drawn)
    assert kinds.total() == 3200
    assert abs(kinds[0] - 1600) < 5 * 28  # five standard deviations
    rows = Counter(row for row, _ in drawn)
    assert abs(rows[30] - rows[31]) < 5 * 40
    assert all(abs(rows[row] - 1600 / 30) < 5 * 7.5 for row in range(30))
    views = Counter(number for _, number in drawn)
    assert set(views) == {0, 1, 2, 3}
    assert all(abs(count - 800) < 5 * 25 for count in views.values())


def test_pictures_are_encoded_once_and_as_if_anew(made, monkeypatch):
    calls = []
    encode = LatentBase.moments
    monkeypatch.setattr(LatentBase, "moments", lambda self, images: calls.append(len(images)) or encode(self, images))
    task, data = task_of(made.base, augment="flips"), parts(made.root, batches_per_epoch=2)
    fit(task, data, epochs=3, default_root_dir=made.others)
    assert calls == [4] * 5, "3 cracks and 2 holes in 4 views, whatever the number of epochs"

    shots, fresh = task._shots["train"], parts(made.root)
    fresh.setup("fit")
    defects = [i for i, s in enumerate(fresh.samples["train"]) if s.defect_type != "good"]
    assert sorted(shots.row_of) == defects
    for index, row in shots.row_of.items():
        sample = fresh.samples["train"][index]
        assert PAIRS[int(shots.pairs[row])] == (sample.category, sample.defect_type)
        batch = fresh.loader("train").batch([index])
        for number in range(4):
            with torch.no_grad():
                again = encode(task.base, 2 * view(batch["image"].float() / 255, number) - 1)[0]
            assert torch.allclose(shots.moments[row, number], again, atol=1e-5)
            found, served = shots.masks[row, number, 0].bool(), view(batch["mask"], number)[0, 0].bool()
            assert (found & served).sum() / (found | served).sum() > 0.6, "the same defect, in the same view"


def test_a_defect_of_one_pixel_is_learnt_from(made, tmp_path):
    """At 96 x 96 it covers a ninth of a pixel of what is encoded, and a 144th of a cell."""
    root = make_mvtec(tmp_path / "data", train_good=2, test_good=1, defects={"crack": 6}, size=(96, 96))
    for i in range(6):
        mask = np.zeros((96, 96), np.uint8)
        mask[50 + i, 20] = 255
        save(mask, root / "tile" / "ground_truth" / "crack" / f"{i:03d}_mask.png")
    task, watch = task_of(made.base, augment="none"), Watch()
    fit(task, parts(root, batches_per_epoch=2), callbacks=[watch], default_root_dir=tmp_path)
    masks = task._shots["train"].masks[:, 0].float()
    assert masks.flatten(1).sum(1).tolist() == [1, 1]
    for i, mask in enumerate(masks[:, 0]):
        assert mask[(50 + i) // 3, 20 // 3] == 1
    output = torch.zeros(2, 4, *GRID, requires_grad=True)
    task.loss(output, torch.ones(2, 4, *GRID), masks, None).backward()
    assert (output.grad != 0).flatten(1).sum(1).tolist() == [4, 4], "a cell in each channel"
    assert min(watch.losses) > 0


def test_the_training_split_is_the_first_third_exactly(made):
    data = parts(made.root)
    task = task_of(made.base)
    fit(task, data, default_root_dir=made.others)
    learnt = [f"tile/test/crack/{i:03d}.png" for i in range(3)] + [f"tile/test/hole/{i:03d}.png" for i in range(2)]
    assert sorted(name for name, _ in task.learnt_from) == learnt
    tested = {s.name for s in data.samples["test"]}
    assert {f"tile/test/crack/{i:03d}.png" for i in range(3, 9)} <= tested
    assert not tested & set(learnt)


# ---- checkpoints -----------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_what_was_learnt(made):
    checkpoint = torch.load(made.checkpoint, weights_only=True)
    kinds = Counter("lora" if ".lora_" in key else key.split(".")[1] for key in checkpoint["state_dict"])
    assert set(kinds) == {"tokens", "spatial", "lora"}
    assert checkpoint["state_dict"]["learnt.tokens.weight"].shape == (2, 2, 32)
    assert checkpoint["base"] == {"source": str(made.base), "fingerprint": LatentBase.open(str(made.base)).fingerprint}
    learnt = sum(value.numel() for value in checkpoint["state_dict"].values())
    states = sum(v.numel() for s in checkpoint["optimizer_states"] for p in s["state"].values() for v in p.values())
    assert states <= 2 * learnt + len(checkpoint["state_dict"]), "Adam's two moments of what is learnt"
    assert made.checkpoint.stat().st_size < 3 * 4 * learnt + 400_000
    json.dumps(checkpoint["hyper_parameters"]["pairs"])


def test_the_export(made):
    checkpoint = torch.load(made.checkpoint, weights_only=True)
    with safe_open(made.folder / EXPORT, framework="pt") as file:
        header, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert header["task"] == "AnomalyDiffusion"
    assert header["fingerprint"] == checkpoint["base"]["fingerprint"]
    assert json.loads(header["learnt_with"]) == {
        "template": "a photo of a *", "anomaly_tokens": 2, "spatial_tokens": 2, "lora": 2,
    }  # fmt: skip
    assert json.loads(header["pairs"]) == [list(pair) for pair in PAIRS]
    assert tensors.keys() == checkpoint["state_dict"].keys()
    assert all(torch.equal(tensors[key], value) for key, value in checkpoint["state_dict"].items())


def test_a_checkpoint_opens_without_data(made, opened):
    state = torch.load(made.checkpoint, weights_only=True)["state_dict"]
    assert opened.pairs == PAIRS
    assert opened.learnt_state().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in opened.learnt_state().items())
    masks = torch.zeros(2, 1, SIZE, SIZE)
    masks[..., 3:9, 3:9] = 1
    states = opened.states(torch.tensor([0, 1]), masks)
    assert states.shape == (2, 32, 32)
    assert not torch.allclose(states[0], states[1])
    assert len(opened.positions) == 4


def test_another_base_of_the_same_shapes(made, tmp_path):
    other = make_base(tmp_path / "other", seed=7)
    with pytest.raises(
        UserError, match=rf"model\.init_args\.base: {other} \(\w{{12}}\) is not the base .* {made.base}"
    ):
        AnomalyDiffusion.load_from_checkpoint(made.checkpoint, weights_only=True, base=str(other))


def test_a_base_of_another_latent_shape(made, tmp_path):
    other = make_base(tmp_path / "other", channels=8)
    with pytest.raises(UserError, match=r"is not the base that this checkpoint was learnt on"):
        AnomalyDiffusion.load_from_checkpoint(made.checkpoint, weights_only=True, base=str(other))
    with pytest.raises(UserError, match=r"takes 9 channels, its autoencoder gives 4: it is an inpainting model"):
        fit(task_of(make_base(tmp_path / "inpainting", extra_channels=5)), parts(made.root))


@pytest.mark.parametrize(
    "options",
    [{"anomaly_tokens": 3}, {"spatial_tokens": 0}, {"spatial_tokens": 3}, {"lora": 0}, {"lora": 4}],
    ids=lambda options: "-".join(f"{key}{value}" for key, value in options.items()),
)
def test_a_checkpoint_of_other_options(made, tmp_path, options):
    ((key, value),) = options.items()
    said = rf"model\.init_args\.{key} = {value}, but the checkpoint was learnt with 2; take that"
    with pytest.raises(UserError, match=said):
        AnomalyDiffusion.load_from_checkpoint(made.checkpoint, weights_only=True, **options)
    older = torch.load(made.checkpoint, weights_only=True)
    del older["learnt_with"]  # as an earlier version wrote it
    torch.save(older, tmp_path / "older.ckpt")
    with pytest.raises(UserError, match=r"does not fit this AnomalyDiffusion: .*config\.yaml"):
        AnomalyDiffusion.load_from_checkpoint(tmp_path / "older.ckpt", weights_only=True, **options)


def test_another_template_is_warned_of_and_taken(made):
    said = r"model\.init_args\.template = 'a \* on a wall', but the checkpoint was learnt with 'a photo of a \*'"
    with pytest.warns(UserWarning, match=said):
        task = AnomalyDiffusion.load_from_checkpoint(made.checkpoint, weights_only=True, template="a * on a wall")
    assert task.prompts["tile"].text == "a * on a wall"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "model.init_args")
        AnomalyDiffusion.load_from_checkpoint(made.checkpoint, weights_only=True)


def test_a_checkpoint_of_other_pairs_is_not_gone_on_with(made, tmp_path):
    root = make_parts(tmp_path / "data", defects={"crack": 9, "dent": 9})
    task = task_of(made.base, lora=2)
    with pytest.raises(UserError, match=r"knows tile/crack, tile/hole, the data have tile/crack, tile/dent"):
        make_trainer(2).fit(task, datamodule=parts(root), ckpt_path=made.checkpoint, weights_only=True)
    with pytest.raises(UserError, match=r"knows tile/crack, tile/hole, the data have tile/crack, tile/dent"):
        fit(AnomalyDiffusion.load_from_checkpoint(made.checkpoint, weights_only=True), parts(root))


def test_a_checkpoint_of_another_task(made, tmp_path):
    options = {"base": str(made.base), "anomaly_tokens": 2}
    masks = MaskDiffusion(**options)
    trainer = fit(masks, parts(made.root, batches_per_epoch=1), default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "masks.ckpt")
    with pytest.raises(UserError, match="is of MaskDiffusion, not of this AnomalyDiffusion"):
        AnomalyDiffusion.load_from_checkpoint(tmp_path / "masks.ckpt", weights_only=True, spatial_tokens=0)
    foreign = torch.load(tmp_path / "masks.ckpt", weights_only=True)
    del foreign["base"]
    torch.save(foreign, tmp_path / "foreign.ckpt")
    with pytest.raises(UserError, match="is of another task"):
        AnomalyDiffusion.load_from_checkpoint(tmp_path / "foreign.ckpt", weights_only=True, spatial_tokens=0)


def test_a_run_that_breaks_off_ends_as_an_undisturbed_one(made, tmp_path):
    """Everything that draws is on. (A real kill: tests/test_tasks_anomaly_diffusion_processes.py.)"""
    options = {"lora": 2, "prompt_noise": 0.2, "offset_noise": 0.1, "alignment": 0.1}

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "broken.ckpt")
                raise KeyError("stop")

    whole = task_of(made.base, **options)
    fit(whole, parts(made.root, batches_per_epoch=4), epochs=2, default_root_dir=tmp_path)
    with pytest.raises(KeyError):
        fit(task_of(made.base, **options), parts(made.root, batches_per_epoch=4), epochs=2, callbacks=[Stop()],
            default_root_dir=tmp_path)  # fmt: skip
    again = task_of(made.base, **options)
    trainer = make_trainer(2, default_root_dir=tmp_path)
    trainer.fit(again, parts(made.root, batches_per_epoch=4), ckpt_path=tmp_path / "broken.ckpt", weights_only=True)
    assert trainer.global_step == 8
    expected, found = whole.learnt_state(), again.learnt_state()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


# ---- what is refused -------------------------------------------------------------------------------------------


def rejects(made: Made, task: Any = None, data: Any = None, **trainer: Any) -> str:
    with pytest.raises((UserError, DataError)) as told:
        fit(task or task_of(made.base), data or parts(made.root), **trainer)
    return str(told.value)


def test_a_type_with_one_picture(made, tmp_path):
    root = make_parts(tmp_path / "data", defects={"crack": 9, "hole": 4})
    assert "tile/hole has 1 training picture: AnomalyDiffusion needs 2" in rejects(made, data=parts(root))


@pytest.mark.parametrize(("value", "state"), [(0, "empty mask"), (255, "marks everything")])
def test_a_mask_without_a_border(made, tmp_path, value, state):
    root = make_parts(tmp_path / "data")
    save(np.full(NATIVE, value, np.uint8), root / "tile" / "ground_truth" / "hole" / "001_mask.png")
    message = rejects(made, data=parts(root))
    assert state in message
    assert "tile/test/hole/001.png" in message


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"setting": "one_class"}, "none trains: set data.setting to few_shot"),
        ({"with_masks": False}, "set data.init_args.with_masks"),
        ({"image_size": None}, "set data.init_args.image_size"),
        ({"image_size": 36}, "image_size = 36x36: the sides must be multiples of 8"),
        ({"image_size": (32, 36)}, "such as 32x32"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_data_that_do_not_do(made, settings, expected):
    assert expected in rejects(made, data=parts(made.root, **settings))


def test_pictures_need_not_be_square(made):
    task = task_of(made.base)
    fit(task, parts(made.root, image_size=(24, 40), batches_per_epoch=1), default_root_dir=made.others)
    assert task._shots["train"].moments.shape == (5, 4, 8, 6, 10)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"template": "a photo of a defect"}, r"expected one \"*\", where the 4 learnt tokens go"),
        ({"template": "a * with a *"}, r"expected one \"*\""),
        ({"template": "tile " * 40 + "*"}, "take fewer tokens or words"),
        ({"anomaly_tokens": 40}, "take fewer tokens or words"),
        ({"start_word": " "}, "model.init_args.start_word"),
    ],
)
def test_templates(made, options, expected):
    assert expected.replace('\\"', '"') in rejects(made, task_of(made.base, **options))


def test_words_behind_the_vectors_that_are_cut_are_told_once(made):
    task = task_of(made.base, template="a photo of a * " + "on a tile " * 20)
    with pytest.warns(UserWarning, match="is cut off; take fewer tokens or words") as said:
        fit(task, parts(made.root, batches_per_epoch=1), default_root_dir=made.others)
    cut = task.prompts["tile"].cut
    assert cut.endswith("on a tile")
    told = [str(one.message) for one in said if "is cut off" in str(one.message)]
    assert len(told) == 1
    assert f'"{cut}" does not fit behind the 4 learnt tokens' in told[0]


def test_the_category_stands_behind_the_vectors(made, tmp_path):
    root = make_mvtec(tmp_path / "data", categories=("tile", "metal_nut"), size=(32, 32), train_good=2, test_good=1,
                      defects={"crack": 6})  # fmt: skip
    before = task_of(made.base, template="a photo of a {category} with *")
    assert 'put {category} behind the "*"' in rejects(made, before, parts(root))
    behind = task_of(made.base, template="a photo of * on a {category}")
    fit(behind, parts(root, batches_per_epoch=2), default_root_dir=tmp_path)
    assert {prompt.text for prompt in behind.prompts.values()} == {
        "a photo of * on a tile", "a photo of * on a metal nut",
    }  # fmt: skip
    one = task_of(made.base, template="a photo of a {category} with *")
    fit(one, parts(root, category="metal_nut", batches_per_epoch=1), default_root_dir=tmp_path)
    assert one.prompts["metal_nut"].text == "a photo of a metal nut with *"


@pytest.mark.parametrize(
    "key", ["anomaly_tokens", "spatial_tokens", "lora", "prompt_noise", "offset_noise", "alignment"]
)
def test_numbers_out_of_range(made, key):
    with pytest.raises(UserError, match=rf"model\.init_args\.{key} = -1"):
        task_of(made.base, **{key: -1})


def test_weights_of_half_the_precision(made):
    assert "trainer.precision = bf16-true" in rejects(made, precision="bf16-true")


def test_a_base_that_is_not_there(made, tmp_path):
    assert "no folder of a diffusers pipeline" in rejects(made, task_of(tmp_path / "nothing"))


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_verbs_that_do_not_apply(made, tmp_path, capsys, verb):
    config = write_config(tmp_path / "tiny.yaml", made.root, made.base, lora=2)

    def run(*arguments: object) -> Any:
        return command(tmp_path, *arguments)

    message = refused(capsys, run, verb, "--config", config, "--ckpt_path", made.checkpoint)
    assert "AnomalyDiffusion is judged by what it makes" in message
    assert f"no verb {verb}" in message


@pytest.mark.parametrize("model", ["AnomalyDiffusion", "MaskDiffusion"])
def test_a_test_after_the_training_is_refused_before_it(made, tmp_path, capsys, model):
    config = tmp_path / "tiny.yaml"
    config.write_text(
        yaml.safe_dump({
            "experiment": "tiny",
            "model": {"class_path": model, "init_args": {"base": str(made.base)}},
            "data": {"class_path": "MVTecAD", "init_args": {"root": str(made.root), **SERVED}},
        })
    )  # fmt: skip
    words = ("fit", "--config", config, "--run_id", "one", "--test_after_fit", "true")
    message = refused(capsys, lambda *arguments: command(tmp_path, *arguments), *words)
    assert f"--test_after_fit true: {model} is judged by what it makes" in message
    assert message.strip().endswith("set it to false")
    assert not (tmp_path / "runs" / "tiny" / "one").exists()


def test_the_attention_is_left_as_it_was(opened):
    """The processors of the U-Net answer as diffusers' own while nothing is recorded."""
    unet = opened.base.unet
    x, t, states = torch.randn(1, 4, *GRID), torch.tensor([500]), torch.randn(1, 32, 32)
    with torch.no_grad():
        held = unet(x, t, states).sample
        opened.cross.remove()
        plain = unet(x, t, states).sample
        opened.cross = CrossAttention(unet)
    assert torch.equal(held, plain)
