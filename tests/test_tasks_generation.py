"""AnomalyDiffusion makes data sets: whole, repeatable, as asked for, and untouched where nothing was asked for."""

from __future__ import annotations

import errno
import io
import itertools
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image
from torch import Tensor

from lit_defect.data import CustomCrops
from lit_defect.diffusion.base_model import LatentBase
from lit_defect.errors import DataError, UserError
from lit_defect.generation import store as stores
from lit_defect.generation.judgement import seam, stands_out
from lit_defect.generation.options import Generation
from lit_defect.generation.store import GeneratedStore, read_manifest, read_trained_on
from lit_defect.tasks import AnomalyDiffusion
from lit_defect.tasks import defect_generation as generation
from lit_defect.tasks.defect_generation import DefectGeneration
from tests.anomaly_diffusion import (
    NATIVE,
    PAIRS,
    QUICK,
    contents,
    generate,
    lines,
    make_base,
    make_parts,
    marked,
    parts,
    pixels,
    task_of,
)
from tests.contrastive import make_trainer
from tests.fakes import make_crops_csv, make_mvtec, save, surface
from tests.segmentation import fit

NO_OTHER = dict.fromkeys(
    ("sampler", "steps", "strength", "guidance", "reweight", "candidates")
)  # options than the preset's
NORMAL = [f"tile/train/good/{i:03d}.png" for i in range(6)]


class Learnt(NamedTuple):
    root: Path
    base: Path
    checkpoint: Path
    task: Any  # that the generations of this file share, since a base takes a while to open


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Learnt:
    folder = tmp_path_factory.mktemp("learnt")
    root, base = make_parts(folder / "data"), make_base(folder / "base")
    task = task_of(base, prompt_noise=0.1)
    trainer = fit(task, parts(root, cache_dir=str(folder / "cache")), default_root_dir=folder)
    trainer.save_checkpoint(folder / "learnt.ckpt")
    return Learnt(root, base, folder / "learnt.ckpt", task)


def made(learnt: Learnt, root: Path, data: Any = None, seed: int = 0, trainer: Any = None, **options: Any) -> Any:
    """Generate into `root` with some options; gives the lines of the manifest."""
    learnt.task.generation = Generation(**{**QUICK, **options})
    return generate(learnt.checkpoint, learnt.task, data or parts(learnt.root), root, seed, **(trainer or {}))


@pytest.fixture(scope="module")
def plain(learnt, tmp_path_factory) -> Path:
    """Two pictures of each pair."""
    folder = tmp_path_factory.mktemp("plain")
    made(learnt, folder / "set", parts(learnt.root, cache_dir=str(folder / "cache")))
    return folder / "set"


def differing(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def pictures(root: Path) -> dict[str, bytes]:
    return {key: value for key, value in contents(root).items() if "/test/" in key}


def smaller(path: Path) -> np.ndarray:
    """As the base sees it, made smaller by another library."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)).astype(float)


def decoded(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image)


# ---- the data set ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paste", ["change", "picture"])
@pytest.mark.parametrize("repair", [True, False])
def test_outside_its_mask_a_picture_is_the_normal_one(learnt, tmp_path, repair, paste):
    root = tmp_path / "set"
    rows = [row for row in made(learnt, root, repair=repair, paste=paste, least_change=5.0) if row["accepted"] == "1"]
    assert rows
    for row in rows:
        normal = pixels(learnt.root / row["source"])
        picture, mask = pixels(root / row["image"]), marked(root / row["mask"])
        assert picture.shape == (*NATIVE, 3), "its own size, which nothing divides"
        assert mask.shape == NATIVE
        assert np.array_equal(picture[~mask], normal[~mask]), "to the last bit"
        assert (picture[mask] != normal[mask]).any(axis=-1).mean() > 0.5
        assert float(row["area"]) == pytest.approx(mask.mean())
        assert float(row["share_changed"]) == pytest.approx((picture != normal).any(axis=-1).mean())
        assert float(row["seam"]) == pytest.approx(seam(picture, mask, normal), abs=1e-3)
        assert float(row["most_outside"]) >= float(row["change_outside"]) > 0, "of the autoencoder"
        assert (row["mode"], row["retried"]) == ("", "0")
        with Image.open(root / row["mask"]) as image:
            assert set(np.unique(np.asarray(image))) == {0, 255}


def test_every_picture_asked_for_has_one_line(learnt, plain):
    rows = lines(plain / "manifest.csv")
    assert [int(row["number"]) for row in rows] == [0, 1, 2, 3]
    assert Counter((row["category"], row["defect_type"]) for row in rows) == dict.fromkeys(PAIRS, 2)
    wanted = {"about.json", "manifest.csv", "trained_on.csv"}
    for row in rows:
        assert row["accepted"] == "1"
        assert row["image"] == f"tile/test/{row['defect_type']}/{int(row['number']):05d}.png"
        assert row["mask"] == f"tile/ground_truth/{row['defect_type']}/{int(row['number']):05d}_mask.png"
        assert row["source"] in NORMAL
        assert row["prompt"] == "a photo of a *"
        assert row["mask_source"].startswith(f"augmented tile/test/{row['defect_type']}/")
        wanted |= {row["image"], row["mask"]}
    assert contents(plain).keys() == wanted, "and nothing else is left"
    assert len(read_manifest(plain)) == 4
    about = json.loads((plain / "about.json").read_text())
    assert about["counts"]["pairs"] == {
        "tile/crack": {"asked": 2, "accepted": 2},
        "tile/hole": {"asked": 2, "accepted": 2},
    }
    assert about["base"]["fingerprint"] == LatentBase.open(str(learnt.base)).fingerprint == rows[0]["base"]


def test_what_it_learnt_from_is_told_and_is_no_test_picture(learnt, plain):
    known = {name for name, _ in read_trained_on(plain)}
    assert known == {f"tile/test/crack/{i:03d}.png" for i in range(3)} | {
        f"tile/test/hole/{i:03d}.png" for i in range(2)
    }
    data = parts(learnt.root)
    data.setup("fit")
    assert not known & {s.name for s in data.samples["test"]}


def test_what_was_learnt_from_is_told_also_under_other_settings(learnt, tmp_path):
    """With half of the defects in training now, those of the training of old must not be forgotten."""
    data = parts(learnt.root, setting="supervised", test_fraction=0.5, seed=3)
    made(learnt, tmp_path / "set", data, count=1)
    known = {name for name, _ in read_trained_on(tmp_path / "set")}
    assert known >= {f"tile/test/crack/{i:03d}.png" for i in range(3)} | {
        f"tile/test/hole/{i:03d}.png" for i in range(2)
    }
    assert known >= {s.name for s in data.samples["train"] if s.label}


def test_every_draw_follows_from_the_seed(learnt, plain, tmp_path):
    made(learnt, tmp_path / "again")
    assert differing(contents(plain), contents(tmp_path / "again")) == []
    made(learnt, tmp_path / "other", seed=1)
    one, other = pictures(plain), pictures(tmp_path / "other")
    assert not set(one.values()) & set(other.values())


def test_more_pictures_leave_the_earlier_ones(learnt, plain, tmp_path):
    shutil.copytree(plain, tmp_path / "set")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*.png")}
    made(learnt, tmp_path / "set", count=3)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "not even written anew"
    made(learnt, tmp_path / "whole", count=3)
    assert differing(contents(tmp_path / "whole"), contents(tmp_path / "set")) == []
    assert len(lines(tmp_path / "set" / "manifest.csv")) == 6


def test_what_is_there_is_not_made_again(learnt, plain, tmp_path, monkeypatch):
    shutil.copytree(plain, tmp_path / "set")
    before = contents(tmp_path / "set")
    monkeypatch.setattr(DefectGeneration, "generate", lambda *_: pytest.fail("it samples"))
    made(learnt, tmp_path / "set")
    assert contents(tmp_path / "set") == before


def test_types(learnt, plain, tmp_path):
    rows = made(learnt, tmp_path / "set", types=["hole"])
    assert [(row["number"], row["defect_type"]) for row in rows] == [("1", "hole"), ("3", "hole")]
    made(learnt, tmp_path / "set")
    assert differing(contents(plain), contents(tmp_path / "set")) == []
    with pytest.raises(UserError, match=r"generation\.types: 'dent' was not learnt; there are crack, hole"):
        made(learnt, tmp_path / "other", types=["dent"])
    assert not (tmp_path / "other").exists()


def test_a_step_is_a_group(learnt, tmp_path):
    """What shows the progress counts steps."""
    seen: list[int] = []

    class Steps(Callback):
        def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
            seen.append(len(batch["index"]))

    data = parts(learnt.root, eval_batch_size=32)
    made(learnt, tmp_path / "set", data, trainer={"callbacks": [Steps()]})
    assert seen == [1, 1], "four pictures, three of which go through the network together"
    assert data.eval_batch_size == 32


def test_one_category_of_those_learnt(learnt, tmp_path):
    """The others need neither normal pictures nor defects; what was learnt from theirs is told all the same."""
    root = make_mvtec(tmp_path / "data", categories=("tile", "wood"), size=(32, 24), train_good=3, test_good=1,
                      defects={"crack": 6})  # fmt: skip
    task = task_of(learnt.base)
    fit(task, parts(root), default_root_dir=tmp_path).save_checkpoint(tmp_path / "two.ckpt")
    rows = generate(tmp_path / "two.ckpt", task, parts(root, category="wood"), tmp_path / "set")
    assert {row["category"] for row in rows} == {"wood"}
    known = {f"{name}/test/crack/{i:03d}.png" for name in ("tile", "wood") for i in range(2)}
    assert {name for name, _ in read_trained_on(tmp_path / "set")} == known
    generate(tmp_path / "two.ckpt", task, parts(root), tmp_path / "set")
    assert len(read_manifest(tmp_path / "set")) == 4, "the same data set, gone on with"


def test_new_pictures_of_one_of_several_products(learnt, tmp_path):
    """Defects of another product must not go onto them; whose they are says data.category."""
    root = make_mvtec(tmp_path / "data", categories=("tile", "wood"), size=(32, 24), train_good=3, test_good=1,
                      defects={"crack": 6})  # fmt: skip
    save(surface(np.random.default_rng(0), (40, 30)), tmp_path / "new" / "one.png")
    task = task_of(learnt.base)
    fit(task, parts(root), default_root_dir=tmp_path).save_checkpoint(tmp_path / "two.ckpt")
    new = {"predict_root": str(tmp_path / "new")}
    with pytest.raises(UserError, match=r"are these pictures of tile or wood\? Set data.category to theirs"):
        generate(tmp_path / "two.ckpt", task, parts(root, **new), tmp_path / "both")
    rows = generate(tmp_path / "two.ckpt", task, parts(root, category="wood", **new), tmp_path / "set")
    assert {(row["category"], row["source"]) for row in rows} == {("wood", "one.png")}


def test_another_split_is_no_source(learnt, tmp_path):
    with pytest.raises(UserError, match=r"data.predict_split = val: AnomalyDiffusion puts defects onto the normal"):
        made(learnt, tmp_path / "set", parts(learnt.root, predict_split="val"))


def test_each_category_takes_its_own_normal_pictures(learnt, tmp_path):
    root = make_mvtec(tmp_path / "data", categories=("tile", "wood"), size=(32, 24), train_good=3, test_good=1,
                      defects={"crack": 6})  # fmt: skip
    task = task_of(learnt.base)
    trainer = fit(task, parts(root), default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    rows = generate(tmp_path / "two.ckpt", task, parts(root), tmp_path / "set")
    assert Counter(row["category"] for row in rows) == {"tile": 2, "wood": 2}
    for row in rows:
        assert row["source"].startswith(f"{row['category']}/train/good/")
        assert row["image"].startswith(f"{row['category']}/test/crack/")


# ---- broken off ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 2, 3])
def test_broken_off_and_gone_on_with(learnt, plain, tmp_path, monkeypatch, after):
    """Between groups and in the middle of one: what is made anew beside what is there comes out the same."""
    add, count = GeneratedStore.add, iter(range(10))

    def broken(self: Any, *arguments: Any) -> Any:
        if next(count) == after:
            raise KeyError("power cut")
        return add(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(GeneratedStore, "add", broken)
        with pytest.raises(KeyError):
            made(learnt, tmp_path / "set")
    assert not (tmp_path / "set" / "manifest.csv").exists()
    with pytest.raises(DataError, match="has not finished"):
        read_manifest(tmp_path / "set")
    made(learnt, tmp_path / "set")
    assert differing(contents(plain), contents(tmp_path / "set")) == []


@pytest.mark.parametrize("writes", [4, 5, 9])
def test_a_full_disk(learnt, plain, tmp_path, monkeypatch, writes):
    """trained_on, about, mask 0, picture 0, mask 1, ...: the disk is full before any of them, or the manifest."""
    write, count = stores.write_whole, iter(range(100))

    def full(path: Path, content: bytes) -> None:
        if next(count) >= writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(stores, "write_whole", full)
        with pytest.raises(UserError, match=r"No space left on device.*the same command then goes on"):
            made(learnt, tmp_path / "set")
    kept = [row for part in (tmp_path / "set" / ".parts").glob("*") for row in lines(part)]
    assert len(kept) == {4: 1, 5: 1, 9: 3}[writes]
    for row in kept:
        assert (tmp_path / "set" / row["image"]).read_bytes() == (plain / row["image"]).read_bytes()
        assert (tmp_path / "set" / row["mask"]).read_bytes() == (plain / row["mask"]).read_bytes()
    made(learnt, tmp_path / "set")
    assert differing(contents(plain), contents(tmp_path / "set")) == []


def test_another_generation_in_the_same_folder(learnt, plain, tmp_path):
    shutil.copytree(plain, tmp_path / "set")
    before = contents(tmp_path / "set")
    for options in ({"steps": 5}, {"feather": 1.0}, {"guidance": 2.0}, {"masks": str(tmp_path)}):
        key = next(iter(options))
        with pytest.raises((UserError, DataError), match=rf"options\.{key} was|has no masks"):
            made(learnt, tmp_path / "set", **options)
    with pytest.raises(UserError, match="seed was 0, is 5"):
        made(learnt, tmp_path / "set", seed=5)
    with pytest.raises(UserError, match="is no generated data set, but holds"):
        made(learnt, learnt.root)
    assert contents(tmp_path / "set") == before


# ---- how it is sampled -----------------------------------------------------------------------------------------


def test_without_reweighting_the_network_is_the_plain_one(learnt, plain, tmp_path, monkeypatch):
    """Its own processors, put back for good, give the same pictures."""
    learnt.task.cross.remove()
    try:
        made(learnt, tmp_path / "set")
    finally:
        learnt.task.cross.__init__(learnt.task.base.unet)
    assert differing(contents(plain), contents(tmp_path / "set")) == []


@pytest.fixture
def attentive(learnt):
    """Random weights look everywhere alike; now the network looks somewhere."""
    layers = [m.to_q.weight for name, m in learnt.task.base.unet.named_modules() if name.endswith("attn2")]
    before = [weight.clone() for weight in layers]
    with torch.no_grad():
        for weight in layers:
            weight *= 30
    yield
    with torch.no_grad():
        for weight, old in zip(layers, before, strict=True):
            weight.copy_(old)


@pytest.mark.usefixtures("attentive")
def test_reweighting_changes_the_pictures(learnt, tmp_path):
    made(learnt, tmp_path / "off", steps=10)
    off = pictures(tmp_path / "off")
    for mode in ("paper", "official"):
        rows = made(learnt, tmp_path / mode, steps=10, reweight=mode)
        assert learnt.task.cross.idle, "the network is left as it was"
        assert [row["reweight"] for row in rows] == [mode] * 4
        other = pictures(tmp_path / mode)
        assert off.keys() == other.keys()
        assert all(off[key] != other[key] for key in off), mode
        for row in rows:
            outside = ~marked(tmp_path / mode / row["mask"])
            same = pixels(tmp_path / mode / row["image"])[outside] == pixels(learnt.root / row["source"])[outside]
            assert same.all()


@pytest.mark.usefixtures("attentive")
def test_under_guidance_only_what_is_told_the_prompt_is_reweighted(learnt, tmp_path, monkeypatch):
    """As by two calls, of which one is not re-weighted."""
    options = {"guidance": 3.0, "reweight": "paper", "count": 1, "steps": 10}
    made(learnt, tmp_path / "joined", **options)
    cross = learnt.task.cross

    def apart(unet, told, untold, scale):
        def denoise(state, t):
            both, cross.reweight = cross.reweight, None
            plain = unet(state, t, untold).sample
            if both is not None:
                cross.reweight = replace(both, weights=both.weights[len(state) :])
            asked = unet(state, t, told).sample
            return plain + scale * (asked - plain)

        return denoise

    monkeypatch.setattr(generation, "guided", apart)
    made(learnt, tmp_path / "apart", **options)
    one, other = pictures(tmp_path / "joined"), pictures(tmp_path / "apart")
    assert one.keys() == other.keys()
    assert one
    for key, content in one.items():
        assert abs(decoded(content).astype(int) - decoded(other[key])).max() <= 1, key


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("mode", ["paper", "official"])
def test_reweighting_looks_at_the_pictures_as_they_are_foreseen(learnt, tmp_path, monkeypatch, mode, guidance):
    """The authors' weights compare what the call itself sees; the paper's what was foreseen last, so its first has none."""
    weigh, looks, used = getattr(generation, f"{mode}_weights"), [], []
    monkeypatch.setattr(
        generation, f"{mode}_weights", lambda *given: looks.append((*given, weigh(*given))) or looks[-1][-1]
    )
    states: list[Tensor] = []

    def note(unet: Any, arguments: tuple[Any, ...]) -> None:
        used.append(learnt.task.cross.reweight)
        states.append(arguments[0].clone())

    hook = learnt.task.base.unet.register_forward_pre_hook(note)
    try:
        rows = made(learnt, tmp_path / "set", reweight=mode, grow=0.5, guidance=guidance, count=1, candidates=2)
    finally:
        hook.remove()
    assert len(used) == 4
    if mode == "paper":
        assert used.pop(0) is None
    assert len(looks) == len(used), "and nothing is decoded after the last call"
    for asked, (foreseen, normal, mask, weights) in zip(used, looks, strict=True):
        *plain, own = asked.weights.split(4)
        assert torch.equal(own, weights)
        assert [half.unique().tolist() for half in plain] == [[1.0]] * (guidance > 1), "without condition"
        assert asked.positions == learnt.task.positions
        assert set(mask.unique().tolist()) == {0, 1}
        side = 32 if mode == "paper" else 8
        assert foreseen.shape[2:] == normal.shape[2:] == mask.shape[2:] == weights.shape[2:] == (side, side)
        assert len(mask) == 4, "each candidate of both pictures has its own"
    if mode == "paper":
        for i, row in enumerate(rows):
            served = smaller(learnt.root / row["source"])
            for n in (2 * i, 2 * i + 1):
                assert abs((looks[0][1][n].permute(1, 2, 0).cpu().numpy() + 1) * 127.5 - served).mean() < 2
    else:
        for state, (seen, latents, _, _) in zip(states, looks, strict=True):
            assert torch.equal(seen, state[-4:])
            assert latents.shape[1] == 4, "latents"
        sizes = [float(mask.mean()) for _, _, mask, _ in looks]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] > sizes[-1], "wider at first"


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        (NO_OTHER | {"preset": "paper", "steps": 4}, 4),
        (NO_OTHER | {"preset": "fast", "steps": 10}, 9),
        ({"sampler": "ddpm"}, 4),
        ({"sampler": "unipc", "strength": 0.5}, 2),
        ({"sampler": "ddim", "eta": 0.7}, 4),
        ({"guidance": 3.0}, 4),
    ],
    ids=["paper", "fast", "ddpm", "unipc", "eta", "guidance"],
)
def test_presets_samplers_and_guidance(learnt, plain, tmp_path, options, calls):
    sizes: list[int] = []
    hook = learnt.task.base.unet.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0])))
    try:
        rows = made(learnt, tmp_path / "set", **options, count=1)
    finally:
        hook.remove()
    resolved = Generation(**{**QUICK, **options}).resolved()
    halves = 1 if resolved["guidance"] == 1 else 2
    assert sizes == [2 * resolved["candidates"] * halves] * calls, "both pictures with all their candidates at once"
    assert {row["accepted"] for row in rows} == {"1"}
    assert [(row["sampler"], int(row["candidates"])) for row in rows] == [
        (resolved["sampler"], resolved["candidates"])
    ] * 2
    one, other = pictures(plain), pictures(tmp_path / "set")
    assert all(value != one[key] for key, value in other.items())


def test_mixed_precision(learnt, tmp_path):
    for mode in ("paper", "official"):
        rows = made(learnt, tmp_path / mode, reweight=mode, trainer={"precision": "bf16-mixed"}, count=1)
        for row in rows:
            outside = ~marked(tmp_path / mode / row["mask"])
            source = pixels(learnt.root / row["source"])
            assert (pixels(tmp_path / mode / row["image"])[outside] == source[outside]).all()


# ---- what is accepted ------------------------------------------------------------------------------------------


def test_what_no_candidate_passes_is_counted_and_left_out(learnt, tmp_path):
    rows = made(learnt, tmp_path / "set", least_change=255.0, candidates=3)
    assert [row["number"] for row in rows] == ["0", "1", "2", "3"]
    for row in rows:
        assert (row["accepted"], row["image"], row["mask"], row["reason"]) == ("0", "", "", "nothing changed")
        assert json.loads(row["rejected"])["nothing changed"] == 3
    assert contents(tmp_path / "set").keys() == {"about.json", "manifest.csv", "trained_on.csv"}
    counts = json.loads((tmp_path / "set" / "about.json").read_text())["counts"]
    assert (counts["asked"], counts["accepted"], counts["rejections"]["nothing changed"]) == (4, 0, 12)


def test_what_is_fainter_than_real_defects_is_left_out(learnt, tmp_path):
    """Real ones are 60 grey levels or more from their surroundings, noise hardly any."""
    rows = made(learnt, tmp_path / "set", least_contrast=1.0)
    assert [row["reason"] for row in rows] == ["fainter than real ones"] * 4
    assert all(float(row["contrast"]) < 60 for row in rows)


def test_lost_contrast_is_given_back(learnt, plain, tmp_path):
    """The change is enlarged by what real defects of the type have lost, four times at most."""
    rows = made(learnt, tmp_path / "set", restore=True)
    gains = learnt.task._maker.gains
    assert max(gains.values()) > 1, "a random autoencoder takes nearly all"
    assert all(1 <= gain <= 4 for gain in gains.values())
    for row in rows:
        gain = gains[row["category"], row["defect_type"]]
        normal = pixels(learnt.root / row["source"]).astype(int)
        once, more = (pixels(root / row["image"]).astype(int) for root in (plain, tmp_path / "set"))
        inside = (more > 0) & (more < 255) & (once > 0) & (once < 255) & (once != normal)
        assert inside.any()
        assert (abs((more - normal) - gain * (once - normal))[inside] <= (gain + 1) / 2).all(), "but for whole levels"


def test_what_stands_out_more_than_real_ones_is_weakened(learnt, tmp_path):
    """The real ones are hardly seen: their masks lie on plain surface."""
    root = make_parts(tmp_path / "data")
    rng = np.random.default_rng(0)
    for path in root.glob("tile/test/*/*.png"):
        save(surface(rng, NATIVE), path)
    options = {"restore": True, "count": 4}
    free = made(learnt, tmp_path / "free", parts(root), **options)
    rows = made(learnt, tmp_path / "set", parts(root), most_contrast=0.5, **options)
    seen = learnt.task._maker.contrasts
    weaker = 0
    for before, row in zip(free, rows, strict=True):
        limit = seen[row["category"], row["defect_type"]].most
        was, now = float(before["contrast"]), float(row["contrast"])
        if was <= limit:
            assert was == now
            continue
        weaker += 1
        picture, normal = pixels(tmp_path / "set" / row["image"]), pixels(root / row["source"])
        mask = marked(tmp_path / "set" / row["mask"])
        plain = abs(stands_out(normal, mask))  # no change makes the place itself less so
        assert now <= max(limit, plain) + 0.5, "but for whole grey levels"
        assert (picture[~mask] == normal[~mask]).all()
    assert weaker >= 3
    whole = [
        made(learnt, tmp_path / f"{most}", parts(root), most_contrast=most, paste="picture") for most in (0.0, 0.5)
    ]
    assert whole[0] == whole[1], "it has no change to weaken"


def test_each_picture_is_encoded_once(learnt, tmp_path, monkeypatch):
    """For its descriptor and its contrast together; the normal pictures come as a group."""
    encode, sizes = LatentBase.encode, []
    monkeypatch.setattr(LatentBase, "encode", lambda self, images: sizes.append(len(images)) or encode(self, images))
    made(learnt, tmp_path / "set", restore=True, count=1)
    assert sizes == [1] * 5 + [2], "three cracks and two holes, and both normal pictures"
    described = learnt.task._maker.real
    assert {pair: found.shape for pair, found in described.items()} == {PAIRS[0]: (3, 8), PAIRS[1]: (2, 8)}
    assert all(np.isfinite(found).all() for found in described.values())


def test_rejected_candidates_are_kept_for_a_look(learnt, tmp_path):
    made(learnt, tmp_path / "set", least_change=255.0, candidates=2, keep_rejected=True, count=1)
    kept = {key for key in contents(tmp_path / "set") if key.endswith(".png")}
    assert kept == {f"rejected/tile/{kind}/{number:05d}_{candidate}.png"
                    for number, kind in enumerate(("crack", "hole")) for candidate in (0, 1)}  # fmt: skip


def test_what_is_not_a_number_is_no_picture(learnt, tmp_path, monkeypatch):
    decode = LatentBase.decode
    monkeypatch.setattr(LatentBase, "decode", lambda self, latents: decode(self, latents) * float("nan"))
    rows = made(learnt, tmp_path / "set", count=1)
    assert [row["reason"] for row in rows] == ["not a number"] * 2
    assert len(read_manifest(tmp_path / "set")) == 2


def test_the_best_candidate_is_taken(learnt, plain, tmp_path, monkeypatch):
    def judged(name: str, *figures: float) -> dict[str, bytes]:
        turn = itertools.cycle(figures)
        with monkeypatch.context() as patch:
            patch.setattr(generation, "likeness", lambda *_: next(turn))
            rows = made(learnt, tmp_path / name, candidates=len(figures))
        assert [float(row["likeness"]) for row in rows] == [max(figures)] * 4
        return pictures(tmp_path / name)

    first, second, third = judged("1", -1, -2, -3), judged("2", -2, -1, -2), judged("3", -2, -2, -1)
    for key, one in pictures(plain).items():
        assert len({first[key], second[key], third[key]}) == 3
        assert abs(decoded(first[key]).astype(int) - decoded(one)).max() <= 1, "draws are those of one candidate alone"


def test_the_whole_mask_is_the_label_without_repair(learnt, plain, tmp_path):
    rows = made(learnt, tmp_path / "set", repair=True, least_change=10.0)
    assert any(float(row["covered"]) < 1 for row in rows)
    for row, whole in zip(rows, lines(plain / "manifest.csv"), strict=True):
        assert float(whole["covered"]) == 1
        if row["accepted"] == "1":
            asked, kept = marked(plain / whole["mask"]), marked(tmp_path / "set" / row["mask"])
            assert (asked | kept).sum() == asked.sum()
            assert float(row["covered"]) == pytest.approx(kept.sum() / asked.sum())


# ---- masks and objects -----------------------------------------------------------------------------------------


def test_masks_of_a_folder(learnt, tmp_path):
    mask = np.zeros((64, 64), np.uint8)
    mask[20:36, 10:30] = 255
    for kind in ("crack", "hole"):
        save(mask, tmp_path / "masks" / "tile" / kind / "0.png")
    rows = made(learnt, tmp_path / "set", masks=str(tmp_path / "masks"))
    assert {row["mask_source"] for row in rows} == {"0.png"}
    expected = np.zeros(NATIVE, bool)
    expected[round(20 / 64 * 37) : round(36 / 64 * 37), round(10 / 64 * 45) : round(30 / 64 * 45)] = True
    for row in rows:
        found = marked(tmp_path / "set" / row["mask"])
        assert (found & expected).sum() / (found | expected).sum() > 0.75
    (tmp_path / "masks" / "tile" / "hole" / "0.png").unlink()
    with pytest.raises(DataError, match=r"masks/tile/hole has no masks"):
        made(learnt, tmp_path / "other", masks=str(tmp_path / "masks"))


def test_objects_of_a_folder(learnt, tmp_path):
    left = np.zeros(NATIVE, np.uint8)
    left[:, :22] = 255
    for name in NORMAL:
        save(left, tmp_path / "objects" / name)
    rows = made(learnt, tmp_path / "set", foreground=str(tmp_path / "objects"), count=4)
    assert len(rows) == 8
    for row in rows:
        if row["accepted"] == "1":
            mask = marked(tmp_path / "set" / row["mask"])
            assert (mask & (left > 0)).sum() >= 0.9 * mask.sum()
    assert sum(row["accepted"] == "1" for row in rows) >= 6
    (tmp_path / "objects" / NORMAL[3]).unlink()
    with pytest.raises(DataError, match=r"003\.png: there is no such mask"):
        made(learnt, tmp_path / "third", foreground=str(tmp_path / "objects"), count=6)
    with pytest.raises(UserError, match=r"generation\.foreground = nowhere"):
        made(learnt, tmp_path / "fourth", foreground="nowhere")


def test_objects_are_found(learnt, tmp_path):
    """Discs before a dark, even background: no defect lies beside them."""
    root = make_parts(tmp_path / "data")
    y, x = np.mgrid[: NATIVE[0], : NATIVE[1]]
    disc = (y - 18) ** 2 + (x - 22) ** 2 < 15**2
    for i in range(6):
        part = surface(np.random.default_rng(i), NATIVE)
        save(np.where(disc, part, np.uint8(8)), root / "tile" / "train" / "good" / f"{i:03d}.png")
    rows = made(learnt, tmp_path / "set", parts(root), foreground="auto", count=4)
    taken = [marked(tmp_path / "set" / row["mask"]) for row in rows if row["accepted"] == "1"]
    assert len(taken) >= 5
    assert all((mask & disc).sum() >= 0.85 * mask.sum() for mask in taken)


def test_defects_of_one_pixel(learnt, tmp_path):
    """Smaller than a cell of the latents, and than a pixel of what the base sees."""
    root = make_mvtec(tmp_path / "data", train_good=3, test_good=1, defects={"crack": 6, "hole": 6}, size=(96, 81))
    for kind in ("crack", "hole"):
        for i in range(6):
            mask = np.zeros((96, 81), np.uint8)
            mask[30 + i, 20 + i] = 255
            save(mask, root / "tile" / "ground_truth" / kind / f"{i:03d}_mask.png")
    for repair in (False, True):
        folder = tmp_path / f"repair {repair}"
        rows = made(learnt, folder, parts(root), least_change=0.0, repair=repair)
        assert [row["reason"] for row in rows] == [""] * 4
        changed = 0
        for row in rows:
            picture, normal = pixels(folder / row["image"]), pixels(root / row["source"])
            mask = marked(folder / row["mask"])
            assert 1 <= mask.sum() <= 2, "as small as they are, not as a pixel of what the base sees"
            assert (picture[~mask] == normal[~mask]).all()
            changed += int((picture[mask] != normal[mask]).any())
        assert changed >= 2, "not all: a pixel may happen to be given its own grey"


def test_defects_of_one_pixel_in_pictures_larger_than_masks_are_drawn_at(learnt, tmp_path, monkeypatch):
    """Enlarged again they are of several pixels, which are one where rules are looked at."""
    monkeypatch.setattr("lit_defect.generation.mask_sources.LARGEST", 32)
    root = make_mvtec(tmp_path / "data", train_good=3, test_good=1, defects={"crack": 6, "hole": 6}, size=(96, 81))
    for path in root.glob("tile/ground_truth/*/*.png"):
        mask = np.zeros((96, 81), np.uint8)
        mask[40, 30] = 255
        save(mask, path)
    rows = made(learnt, tmp_path / "set", parts(root), least_change=0.0)
    assert [row["reason"] for row in rows] == [""] * 4
    assert all(marked(tmp_path / "set" / row["mask"]).sum() > 4 for row in rows)


# ---- pictures of one's own -------------------------------------------------------------------------------------


def test_new_normal_pictures(learnt, tmp_path):
    """Of any size, grey or not, in folders, that the data set does not know."""
    rng = np.random.default_rng(0)
    sizes = {"one.png": (50, 41), "below/two.jpg": (21, 33), "three.bmp": (32, 32)}
    for name, size in sizes.items():
        part = surface(rng, size)
        save(np.stack([part, part // 2, part], axis=-1) if name == "one.png" else part, tmp_path / "new" / name)
    data = parts(learnt.root, predict_root=str(tmp_path / "new"))
    rows = made(learnt, tmp_path / "set", data, count=3)
    assert Counter(row["source"] for row in rows) == dict.fromkeys(sizes, 2)
    assert Counter(row["category"] for row in rows) == {"tile": 6}
    for row in rows:
        picture, normal = pixels(tmp_path / "set" / row["image"]), pixels(tmp_path / "new" / row["source"])
        assert picture.shape[:2] == sizes[row["source"]]
        outside = ~marked(tmp_path / "set" / row["mask"])
        assert (picture[outside] == normal[outside]).all()
    known = {name for name, _ in read_trained_on(tmp_path / "set")}
    assert len(known) == 5, "and no new picture"
    assert [s.name for s in data.samples["test"]], "the data set is still there"


def test_a_set_is_of_the_same_normal_pictures_when_gone_on_with(learnt, tmp_path):
    """Its lines name them by where they lie below one folder; and what has a number is not made again."""
    for folder, count in (("one", 2), ("other", 2), ("more", 3)):
        for i in range(count):
            part = surface(np.random.default_rng([count, i]), (40, 30 + len(folder)))
            save(part, tmp_path / folder / f"{i}.png")
    new = {name: parts(learnt.root, predict_root=str(tmp_path / name)) for name in ("one", "other", "more")}
    first = made(learnt, tmp_path / "set", new["one"], count=1)
    assert [row["number"] for row in made(learnt, tmp_path / "set", new["one"], count=2)][:2] == [
        r["number"] for r in first
    ]
    for other in (new["other"], new["more"], parts(learnt.root)):
        with pytest.raises(UserError, match=r"options\.sources"):
            made(learnt, tmp_path / "set", other, count=3)


def test_crops_of_photographs(learnt, tmp_path):
    """Without a category, and with several pictures in a file; what is made of one trains there."""
    table = make_crops_csv(tmp_path / "data", photographs=12, size=(70, 101), crop=(25, 27), masks=True)

    def crops(**settings: Any) -> CustomCrops:
        served = {"image_size": 32, "batch_size": 4, "leakage": "off", "with_masks": True, "val_fraction": 0.0}
        return CustomCrops(str(tmp_path / "data"), annotations=str(table), test_fraction=0.3, **served, **settings)

    task = task_of(learnt.base)
    trainer = fit(task, crops(), default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "crops.ckpt")
    rows = generate(tmp_path / "crops.ckpt", task, crops(), tmp_path / "set")
    assert [row["image"] for row in rows] == [f"test/defective/{number:05d}.png" for number in range(2)]
    for row in rows:
        file, _, window = row["source"].partition("#")
        x, y, width, height = map(int, window.split(","))
        normal = pixels(tmp_path / "data" / file)[y : y + height, x : x + width]
        picture, mask = pixels(tmp_path / "set" / row["image"]), marked(tmp_path / "set" / row["mask"])
        assert picture.shape == (25, 27, 3)
        assert (picture[~mask] == normal[~mask]).all()
        assert row["source_group"] == file
    data = crops(synthetic=str(tmp_path / "set"))
    data.setup("fit")
    assert data.counts()["train (synthetic)"] == {"good": 0, "defective": 2}


def test_straight_after_training_without_a_checkpoint(learnt, tmp_path):
    task, data = task_of(learnt.base), parts(learnt.root)
    fit(task, data, default_root_dir=tmp_path)
    task.generation = Generation(**{**QUICK, "output": str(tmp_path / "set")})
    make_trainer(default_root_dir=tmp_path).predict(task, datamodule=data, return_predictions=False)
    assert len(read_manifest(tmp_path / "set")) == 4


def test_options_that_the_training_had_not(learnt, tmp_path):
    root = make_parts(tmp_path / "data", defects={"crack": 9})
    with pytest.raises(UserError, match="no training pictures of tile/hole, whose masks a generation needs"):
        made(learnt, tmp_path / "set", parts(root))
    assert not (tmp_path / "set").exists()


# ---- the set trains ----------------------------------------------------------------------------------------------


def test_the_set_trains_beside_real_pictures_and_nothing_else(learnt, plain):
    data = parts(learnt.root, synthetic=str(plain), val_fraction=0.34, split_file=None)
    data.setup("fit")
    found = {split: {s.name for s in samples if s.source != "real"} for split, samples in data.samples.items()}
    rows = {row["image"]: row["source"] for row in lines(plain / "manifest.csv")}
    trains = {s.name for s in data.samples["train"] if s.source == "real"}
    assert found["train"] == {f"synthetic/{image}" for image, source in rows.items() if source in trains}
    assert found["train"]
    assert not found["val"] | found["test"] | found["predict"]
    batch = data.loader("train").batch([i for i, s in enumerate(data.samples["train"]) if s.source != "real"])
    assert set(batch["source"]) == {"AnomalyDiffusion"}
    assert batch["mask"].flatten(1).any(1).all()


def test_the_set_is_refused_where_its_teachers_test(learnt, plain):
    data = parts(learnt.root, synthetic=str(plain), setting="supervised", test_fraction=0.5)
    with pytest.raises(DataError, match=r"has learnt from .* that test here"):
        data.setup("fit")


def test_the_set_is_refused_where_the_normal_pictures_of_its_base_test(learnt, tmp_path):
    """An own base knows what it was trained on; both who learns upon it and who generates from an older run tell."""
    own = shutil.copytree(learnt.base, tmp_path / "base")
    (own / "trained_on.csv").write_text("name,group\ntile/test/good/000.png,part 7\n")
    task = task_of(own, QUICK | {"count": 1}, prompt_noise=0.1)
    generate(learnt.checkpoint, task, parts(learnt.root), tmp_path / "set")
    known = {("tile/test/good/000.png", "part 7")}
    assert set(read_trained_on(tmp_path / "set")) >= known
    task.trainer.save_checkpoint(tmp_path / "later.ckpt", weights_only=True)
    assert AnomalyDiffusion.load_from_checkpoint(
        tmp_path / "later.ckpt", weights_only=True, base=str(learnt.base)
    ).learnt_from == task.learnt_from >= known, "also without the list"  # fmt: skip
    with pytest.raises(DataError, match=r"has learnt from 1 pictures.* that test here .*good/000\.png"):
        parts(learnt.root, synthetic=str(tmp_path / "set")).setup("fit")


def test_the_set_is_not_learnt_from_again(learnt, plain, tmp_path):
    """A generator trained with generated pictures beside the real ones learns from the real ones alone."""
    task, data = task_of(learnt.base), parts(learnt.root, synthetic=str(plain))
    fit(task, data, default_root_dir=tmp_path)
    assert len(task._shots["train"].moments) == 5
    assert not any(name.startswith("synthetic/") for name, _ in task.learnt_from)
