"""StableDiffusionLoRA: what learns and from what, what diffusers makes of the export, and what is refused."""

from __future__ import annotations

import csv
import json
import os
import socket
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import compute_snr
from lightning.pytorch import Callback
from safetensors.torch import load_file

from lit_defect.data import ELPV
from lit_defect.diffusion.base_model import LatentBase
from lit_defect.diffusion.prompts import encode_prompt, text_states
from lit_defect.errors import UserError
from lit_defect.generation.store import write_trained_on
from lit_defect.tasks import AnomalyDiffusion, StableDiffusionLoRA
from lit_defect.tasks.few_shots import FewShots
from tests.anomaly_diffusion import SIZE, make_base, make_parts, parts, pixels
from tests.contrastive import make_trainer
from tests.fakes import make_elpv
from tests.latent import tiny_pipeline
from tests.segmentation import fit

GRID = (SIZE // 4, SIZE // 4)  # of the latents
TINY = {"rank": 2, "lr": 0.01, "augment": "flip"}
SAID = ["a photo of a tile with a crack", "a photo of a tile with a hole"]


class Made(NamedTuple):
    root: Path
    base: Path
    folder: Path  # of the run
    checkpoint: Path
    task: StableDiffusionLoRA  # as the training left it


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_defect.tasks.prompt_samples._STEPS", 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """With everything that there is: adapters in both networks, another alpha, normal pictures, masks."""
    folder = tmp_path_factory.mktemp("made")
    root, base = make_parts(folder / "data"), make_base(folder / "base")
    write_trained_on(base, [("of/the/base.png", "part")])
    options = {"alpha": 6.0, "text_encoder": True, "prior": 0.4, "mask_weight": 2.0}
    task = lora(base, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lit_defect.tasks.prompt_samples._STEPS", 2)
        trainer = fit(task, parts(root, batches_per_epoch=2), default_root_dir=folder / "run")
    trainer.save_checkpoint(folder / "made.ckpt", weights_only=False)
    return Made(root, base, folder / "run", folder / "made.ckpt", task)


def lora(base: Path, **options: Any) -> StableDiffusionLoRA:
    return StableDiffusionLoRA(**{"base": str(base), **TINY, **options})


def ready(task: Any, data: Any) -> Any:
    """A task with its networks, pictures and prompts, without a step of training."""
    trainer = make_trainer()
    trainer.datamodule = data
    task._trainer = trainer
    data.setup("fit")
    task.setup("fit")
    task.configure_model()
    task.on_fit_start()
    return task


class Watch(Callback):
    """What a training does to the parameters."""

    def __init__(self) -> None:
        self.before: dict[str, torch.Tensor] = {}
        self.graded: set[str] = set()
        self.losses: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.before = {key: value.detach().clone() for key, value in pl_module.state_dict().items()}

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.graded |= {name for name, p in pl_module.named_parameters() if p.grad is not None}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))


# ---- what learns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text_encoder", [False, True])
def test_only_the_adapters_learn(made, tmp_path, text_encoder):
    watch, task = Watch(), lora(made.base, text_encoder=text_encoder, warmup=0.0, schedule="constant")
    fit(task, parts(made.root, batches_per_epoch=3), callbacks=[watch], default_root_dir=tmp_path)
    changed = {key for key, value in task.state_dict().items() if not torch.equal(value, watch.before[key])}
    adapters = {name for name, _ in task.named_parameters() if ".lora_" in name}
    assert watch.graded == adapters
    assert changed == adapters
    assert {name.split(".")[1] for name in adapters} == {"unet"} | ({"text_encoder"} if text_encoder else set())
    layers = {name.split(".lora_")[0].rsplit("attn", 1)[1] for name in adapters if ".unet." in name}
    assert layers == {f"{number}.{layer}" for number in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0")}
    assert np.isfinite(watch.losses).all()
    assert not task.base.training, "dropout stays off"
    assert task.base.fingerprint == LatentBase.open(str(made.base)).fingerprint


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 8.0},
        {"prior": 0.5},
        {"prompt": "a broken {category}"},
        {"types": ["crack"]},
        {"mask_weight": 3.0},
        {"drop_caption": 0.6},
        {"min_snr_gamma": None},
        {"offset_noise": 0.5},
        {"augment": "dihedral"},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_option_makes_a_difference(made, tmp_path, options):
    def train(**settings: Any) -> list[float]:
        watch = Watch()
        task = lora(made.base, schedule="constant", warmup=0.0, **settings)
        fit(task, parts(made.root, batches_per_epoch=2), callbacks=[watch], default_root_dir=tmp_path)
        return watch.losses

    found = train(**options)
    assert np.isfinite(found).all()
    assert found != train()


def test_it_learns_what_it_is_shown(made, tmp_path):
    """By heart, on the same draws: the loss falls."""
    task = lora(made.base, rank=8, lr=0.02, drop_caption=0.0, text_encoder=True, warmup=0.0, schedule="constant")
    data = parts(made.root, batches_per_epoch=60)

    def judged() -> float:
        torch.manual_seed(5)
        with torch.no_grad():
            return float(np.mean([float(task._weighed(*task._drawn("train", 5, 2, 0))) for _ in range(8)]))

    seen = []

    class Look(Callback):
        def on_train_start(self, *_: Any) -> None:
            seen.append(judged())

    fit(task, data, callbacks=[Look()], default_root_dir=tmp_path)
    assert judged() < 0.97 * seen[0]


# ---- from what -------------------------------------------------------------------------------------------------


def test_pictures_are_encoded_once(made, tmp_path, monkeypatch):
    calls: list[int] = []
    encode = LatentBase.moments
    monkeypatch.setattr(LatentBase, "moments", lambda self, images: calls.append(len(images)) or encode(self, images))
    task = lora(made.base, prior=0.3)
    fit(task, parts(made.root, batches_per_epoch=2), epochs=3, default_root_dir=tmp_path)
    assert calls == [2] * (5 + 6), "3 cracks, 2 holes and 6 good ones in two views, whatever the number of epochs"
    assert task._shots["train"].pairs.tolist().count(0) == 3
    assert not task._shots["train"].masks.any(), "which nobody has asked for"


def test_pairs_equally_often_and_a_share_of_normal_ones(made, monkeypatch):
    task = lora(made.base, prior=0.25, drop_caption=0.2)
    task.pairs, task.categories, task.said = [("tile", "crack"), ("tile", "hole")], ["tile"], ["c", "h", "good"]
    blank = torch.zeros(32, 4, 1, 1, 1)
    task._shots["train"] = FewShots(blank, blank, torch.tensor([0] * 30 + [1] * 2), {})
    task._shots["prior"] = FewShots(blank + 1, blank, torch.zeros(32, dtype=torch.int64), {})
    drawn: list[tuple[int, int]] = []
    monkeypatch.setattr(task, "_weighed", lambda moments, masks, prompts: drawn.extend(
        zip(moments.flatten().int().tolist(), prompts.tolist(), strict=True)) or torch.zeros(()))  # fmt: skip
    monkeypatch.setattr(task, "log", lambda *_, **__: None)
    torch.manual_seed(0)
    for step in range(100):
        task.training_step({"index": torch.zeros(32, dtype=torch.int64)}, step)
    seen = Counter(drawn)
    assert seen.total() == 3200
    assert set(seen) == {(0, 0), (0, 1), (0, 3), (1, 2), (1, 3)}, "each by its own prompt, or by none"
    for key, share in {(0, 0): 0.3, (0, 1): 0.3, (0, 3): 0.15, (1, 2): 0.2, (1, 3): 0.05}.items():
        deviation = (3200 * share * (1 - share)) ** 0.5
        assert abs(seen[key] - 3200 * share) < 5 * deviation, key


def test_each_type_by_its_prompt(made):
    prompt = {"crack": "a {category} {type}", "hole": "a metal nut"}
    task = ready(lora(made.base, prompt=prompt, prior=0.5, prior_prompt="wood"), parts(made.root))
    assert task.said == ["a tile crack", "a metal nut", "wood"]
    base = task.network
    for row, text in enumerate([*task.said, ""]):
        states = text_states(base.text_encoder, encode_prompt(base.tokenizer, text, 0).ids[None])
        assert torch.allclose(task._states[row], states[0], atol=1e-6), text


def test_normal_pictures_may_be_what_is_learnt(made):
    """With their own type in the prompt; they have no mask, and it is not asked for."""
    task = ready(lora(made.base, types=["good", "hole"], mask_weight=1.0), parts(made.root))
    assert task.said == ["a photo of a tile with a good", "a photo of a tile with a hole"]
    shots = task._shots["train"]
    marked = shots.masks.flatten(1).any(1)
    assert (marked == (shots.pairs == 1)).all()
    assert shots.pairs.tolist() == [0] * 6 + [1] * 2


def test_a_data_set_without_masks(made, tmp_path, monkeypatch):
    make_elpv(tmp_path / "site", cells=32, size=(SIZE, SIZE))
    monkeypatch.syspath_prepend(tmp_path / "site")
    prompt = "a photo of a {category} anomaly"
    task, data = lora(made.base, prompt=prompt, prior=0.5), ELPV(image_size=SIZE, batch_size=4, leakage="off")
    fit(task, data, default_root_dir=tmp_path / "run")
    assert task.pairs == [(cell, kind) for cell in ("mono", "poly") for kind in ("defective", "defective 2/3")]
    assert task.said == [prompt.format(category=c) for c in ("mono", "mono", "poly", "poly")] + [
        "a photo of a mono", "a photo of a poly"]  # fmt: skip
    assert (tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").is_file()


def test_the_loss_weighs_the_mask(made):
    task = ready(lora(made.base, mask_weight=3.0, min_snr_gamma=None), parts(made.root))
    masks = torch.zeros(2, 1, SIZE, SIZE)
    masks[0, 0, 17, 22] = 1  # a pixel in the middle of a cell
    moments = torch.randn(2, 8, *GRID, generator=torch.Generator().manual_seed(0))
    answers: list[tuple[Any, ...]] = []
    task.base.unet.register_forward_hook(lambda _, args, output: answers.append((*args[:2], output.sample)))
    torch.manual_seed(4)
    with torch.no_grad():
        found = float(task._weighed(moments, masks, torch.tensor([0, 1])))
    state, t, output = (part.double() for part in answers[0])
    torch.manual_seed(4)
    latents = task.base.latents(moments, torch.randn(2, 4, *GRID)).double()
    share = torch.from_numpy(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))[t.long()].view(
        2, 1, 1, 1
    )
    noise = (state - share.sqrt() * latents) / (1 - share).sqrt()
    error = (output - noise).square().numpy()
    weights = np.ones((2, 1, *GRID))
    weights[0, 0, 17 // 4, 22 // 4] = 4
    by_hand = [(error[i] * weights[i]).sum() / (4 * weights[i].sum()) for i in range(2)]
    assert found == pytest.approx(np.mean(by_hand), rel=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("gamma", "offset", "text_encoder"), [(None, 0.0, False), (5.0, 0.1, True)])
def test_loss_and_gradients_are_those_of_diffusers_own_training(
    made, tmp_path, prediction, gamma, offset, text_encoder
):
    """By the parts that its scripts train with: `add_noise`, `get_velocity`, `compute_snr`."""
    folder = tiny_pipeline(tmp_path / "base", prediction=prediction)
    task = ready(lora(folder, min_snr_gamma=gamma, offset_noise=offset, text_encoder=text_encoder), parts(made.root))
    base = task.network
    learnt = {name: p for name, p in base.named_parameters() if p.requires_grad}
    for name, weight in learnt.items():
        if "lora_B" in name:  # which are zero at first
            torch.nn.init.normal_(weight, std=0.1)
    moments = torch.randn(2, 8, *GRID)
    torch.manual_seed(3)
    found = task._weighed(moments, torch.zeros(2, 1, SIZE, SIZE), torch.tensor([0, len(task.said)]))
    found.backward()
    own = {name: p.grad.clone() for name, p in learnt.items()}
    base.zero_grad()

    scheduler: Any = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    told = {"max_length": base.tokenizer.model_max_length, "padding": "max_length", "return_tensors": "pt"}
    states = base.text_encoder(base.tokenizer([task.said[0], ""], **told).input_ids)[0]
    torch.manual_seed(3)
    latents = DiagonalGaussianDistribution(moments).sample() * base.vae.config.scaling_factor
    t = torch.randint(0, 1000, (2,))
    noise = torch.randn_like(latents)
    if offset:
        noise = noise + offset * torch.randn(2, 4, 1, 1)
    target = {"epsilon": noise, "v_prediction": scheduler.get_velocity(latents, noise, t), "sample": latents}[
        prediction
    ]
    output = base.unet(scheduler.add_noise(latents, noise, t), t, states).sample
    error = (output - target).square().mean(dim=(1, 2, 3))
    if gamma is not None:
        snr = compute_snr(scheduler, t)
        error = error * snr.clamp(max=gamma) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction]
    error.mean().backward()
    torch.testing.assert_close(found, error.mean(), rtol=1e-5, atol=0)
    for name, weight in learnt.items():
        torch.testing.assert_close(own[name], weight.grad, rtol=1e-3, atol=1e-5 * float(weight.grad.abs().max()))


def test_validation_is_the_same_for_the_same_weights(made, tmp_path):
    root = make_parts(tmp_path / "data", defects={"crack": 18, "hole": 18})
    task, data = lora(made.base, lr=1e-12), parts(root, val_fraction=0.4, batches_per_epoch=1)
    seen = []

    class Losses(Callback):
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if "val/loss" in trainer.callback_metrics:  # that of the epoch before
                seen.append(float(trainer.callback_metrics["val/loss"]))

    fit(task, data, epochs=3, callbacks=[Losses()], default_root_dir=tmp_path)
    assert any(s.label for s in data.samples["val"])
    assert len(seen) == 2
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)


# ---- the result ------------------------------------------------------------------------------------------------


def test_diffusers_opens_the_export(made):
    """And its networks answer as the trained ones do, although their alpha was another than their rank."""
    from diffusers import StableDiffusionPipeline

    pipe: Any = StableDiffusionPipeline.from_pretrained(made.base)
    network = made.task.network
    state, t = torch.randn(1, 4, *GRID, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    ids = encode_prompt(network.tokenizer, SAID[0], 0).ids[None]

    def answer(unet: Any, encoder: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            states = text_states(encoder, ids)
            return states, unet(state, t, states).sample

    plain = answer(pipe.unet, pipe.text_encoder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe.load_lora_weights(made.folder / "lora")
    found, expected = answer(pipe.unet, pipe.text_encoder), answer(network.unet, network.text_encoder)
    for before, after, own in zip(plain, found, expected, strict=True):
        torch.testing.assert_close(after, own, rtol=1e-4, atol=1e-5)
        assert (after - before).abs().max() > 1e-3, "it has learnt something"


def test_the_export_has_the_names_of_other_peoples_files(made):
    names = load_file(made.folder / "lora" / "pytorch_lora_weights.safetensors").keys()
    assert {name.split(".")[0] for name in names} == {"unet", "text_encoder"}
    encoder = [name for name in names if name.startswith("text_encoder.")]
    assert all(name.startswith("text_encoder.text_model.encoder.layers.") for name in encoder), (
        "as diffusers had them before transformers 5.6 dropped text_model, and as other programs look for them"
    )


def test_the_export_says_what_it_is_of(made):
    about = json.loads((made.folder / "lora" / "lora.json").read_text())
    base = LatentBase.open(str(made.base))
    assert about == {
        "base": {"source": str(made.base), "fingerprint": base.fingerprint},
        "prompts": [*SAID, "a photo of a tile"],
        "rank": 2,
        "text_encoder": True,
    }
    with (made.folder / "lora" / "trained_on.csv").open(newline="") as file:
        names = {row["name"] for row in csv.DictReader(file)}
    train = made.task.learnt_from
    assert names == {name for name, _ in train}
    assert Counter(name.split("/")[-2] for name in names) == {"crack": 3, "hole": 2, "good": 6, "the": 1}


def test_the_samples_are_drawn_with_and_without(made):
    picture = pixels(made.folder / "figures" / "samples.png")
    assert picture.std() > 10
    adapters = [m for m in made.task.network.unet.modules() if hasattr(m, "lora_A")]
    assert adapters
    assert not any(m.disable_adapters for m in adapters), "they are on again"


# ---- checkpoints -----------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_the_adapters_only(made):
    checkpoint = torch.load(made.checkpoint, weights_only=True)
    assert checkpoint["state_dict"]
    assert all(".lora_" in key for key in checkpoint["state_dict"])
    assert checkpoint["base"]["fingerprint"] == made.task.network.fingerprint
    assert len(checkpoint["learnt_from"]) == 12


def test_a_run_that_breaks_off_ends_as_an_undisturbed_one(made, tmp_path):
    options = {"prior": 0.3, "offset_noise": 0.1, "text_encoder": True}

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "broken.ckpt")
                raise KeyError("stop")

    whole = lora(made.base, **options)
    fit(whole, parts(made.root, batches_per_epoch=2), epochs=2, default_root_dir=tmp_path / "whole")
    with pytest.raises(KeyError):
        fit(lora(made.base, **options), parts(made.root, batches_per_epoch=2), epochs=2, callbacks=[Stop()],
            default_root_dir=tmp_path)  # fmt: skip
    again = lora(made.base, **options)
    torch.manual_seed(99)
    make_trainer(2, default_root_dir=tmp_path / "again").fit(
        again, datamodule=parts(made.root, batches_per_epoch=2), ckpt_path=tmp_path / "broken.ckpt", weights_only=True
    )
    expected, found = whole.state_dict(), again.state_dict()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    files = [tmp_path / name / "lora" / "pytorch_lora_weights.safetensors" for name in ("whole", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rank": 4}, r"model\.init_args\.rank = 4, but the checkpoint was learnt with 2; take that"),
        ({"alpha": 1.0}, r"model\.init_args\.alpha = 1\.0, but the checkpoint was learnt with 6\.0"),
        ({"text_encoder": False}, r"model\.init_args\.text_encoder = False, but the checkpoint was learnt with True"),
        ({"base": "other"}, r"model\.init_args\.base: .* is not the base that this checkpoint was learnt on"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_something_else(made, tmp_path, options, expected):
    if "base" in options:
        options = {"base": str(make_base(tmp_path / "other", seed=7))}
    task = StableDiffusionLoRA(**{"base": str(made.base), **TINY, "alpha": 6.0, "text_encoder": True, **options})
    with pytest.raises(UserError, match=expected):
        make_trainer(2).fit(task, datamodule=parts(made.root), ckpt_path=made.checkpoint, weights_only=True)


def test_a_checkpoint_of_another_task(made, tmp_path):
    other = AnomalyDiffusion(str(made.base), anomaly_tokens=2, spatial_tokens=0, monitor=None)
    trainer = fit(other, parts(made.root, batches_per_epoch=1), default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "other.ckpt", weights_only=False)
    with pytest.raises(UserError, match="is of AnomalyDiffusion, not of this StableDiffusionLoRA"):
        make_trainer(2).fit(lora(made.base), datamodule=parts(made.root), ckpt_path=tmp_path / "other.ckpt",
                            weights_only=True)  # fmt: skip


# ---- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "data", "expected"),
    [
        ({"types": ["hole", "dent"]}, {}, r"types: no training picture is dent; there are crack, good, hole"),
        ({}, {"setting": "one_class"}, r"no defective picture trains.*setting to\s+supervised or few_shot"),
        (
            {"mask_weight": 1.0},
            {"with_masks": False},
            r"mask_weight = 1\.0 needs masks: set data\.init_args\.with_masks",
        ),
        ({"prompt": {"crack": "a"}}, {}, r"model\.init_args\.prompt has none for hole; it has crack"),
        ({"prior": 0.5, "types": ["good"]}, {}, r"prior = 0\.5: no normal picture trains, or .*types has them"),
        ({}, {"image_size": None}, r"set data\.init_args\.image_size"),
        ({}, {"image_size": 36}, r"multiples of 8"),
    ],
    ids=str,
)
def test_data_that_does_not_do(made, options, data, expected):
    with pytest.raises(UserError, match=expected):
        fit(lora(made.base, **options), parts(made.root, **data))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rank": 0}, r"rank = 0: expected at least 1"),
        ({"alpha": 0.0}, r"alpha = 0\.0: expected a number > 0"),
        ({"prior": 1.0}, r"prior = 1\.0: expected a share"),
        ({"drop_caption": -0.1}, r"drop_caption = -0\.1: expected a share"),
        ({"mask_weight": -1.0}, r"mask_weight = -1\.0"),
        ({"offset_noise": float("inf")}, r"offset_noise = inf"),
        ({"min_snr_gamma": 0.0}, r"min_snr_gamma = 0\.0"),
        ({"prompt": "a {caption}"}, r"model\.init_args\.prompt = .*no \{caption\}, only \{category\}, \{type\}"),
        ({"prior_prompt": "a {kind}"}, r"model\.init_args\.prior_prompt"),
    ],
    ids=str,
)
def test_options_out_of_range(options, expected):
    with pytest.raises(UserError, match=expected):
        lora(Path("base"), **options)


def test_words_that_do_not_fit_are_told(made):
    with pytest.warns(UserWarning, match=r'model\.init_args\.prompt: "hole.*" of ".*" does not fit'):
        ready(lora(made.base, prompt="crack " * 30 + "hole"), parts(made.root))


# ---- two processes ---------------------------------------------------------------------------------------------


def on_one_rank(rank: int, root: str, base: str, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("error", "torch.distributed", FutureWarning)  # about what torch will drop
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0")
    os.environ["LIT_DEFECT_CACHE"] = f"{folder}/cache{rank}"
    task = lora(Path(base), text_encoder=True, prior=0.3)
    data = parts(Path(root), batch_size=2, batches_per_epoch=2)
    fit(task, data, default_root_dir=f"{folder}/run", devices=2, strategy="ddp")
    learnt = {key: value.clone() for key, value in task.state_dict().items() if ".lora_" in key}
    torch.save(learnt, f"{folder}/{rank}.pt")


def test_two_processes_learn_the_same(made, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A fork has all modules already, but no process may fork once its autograd has threads for a GPU.
    way = "fork" if sys.platform == "linux" and not torch.cuda.is_available() else "spawn"
    arguments = (str(made.root), str(made.base), str(tmp_path), port)
    torch.multiprocessing.start_processes(on_one_rank, arguments, 2, start_method=way)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    assert any(value.any() for key, value in first.items() if "lora_B" in key)
    assert [path.name for path in (tmp_path / "run").glob("lora*")] == ["lora"]
