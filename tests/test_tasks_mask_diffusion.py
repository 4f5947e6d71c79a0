"""MaskDiffusion: what it learns from, the masks that it writes, what it tells of them, and how it is broken off."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import seed_everything
from PIL import Image
from torch import Tensor

from lit_defect.diffusion.base_model import LatentBase
from lit_defect.errors import DataError, UserError
from lit_defect.generation import mask_store
from lit_defect.generation.mask_rules import MaskRules, largest_border_share
from lit_defect.generation.mask_store import MaskStore
from lit_defect.generation.store import read_about, read_trained_on
from lit_defect.tasks import AnomalyLocalizer, MaskDiffusion
from lit_defect.tasks.mask_diffusion import MaskGeneration
from lit_defect.tasks.views import view
from tests.anomaly_diffusion import (
    PAIRS,
    SIZE,
    contents,
    generate,
    lines,
    make_base,
    make_parts,
    marked,
    parts,
    task_of,
    write_config,
)
from tests.contrastive import make_trainer
from tests.fakes import SHADES, save
from tests.segmentation import command, fit, refused
from tests.test_survival import LIMIT

QUICK = {"count": 3, "steps": 2, "guidance": 2.0, "batch": 4}
LEARNT = [f"tile/test/crack/{i:03d}.png" for i in range(3)] + [f"tile/test/hole/{i:03d}.png" for i in range(2)]
# Of the blobs below, in pixels: three in eight are as large as the defects are.
SIDES = {0: "empty", 4: "too small", 16: "too large", 24: "too large", 32: "full", 9: None, 10: None, 11: None}


class Learnt(NamedTuple):
    root: Path
    base: Path
    checkpoint: Path
    task: MaskDiffusion  # that the generations of this file share, since a base takes a while to open


def task_for(base: Path, **settings: Any) -> MaskDiffusion:
    return MaskDiffusion(**{"base": str(base), "anomaly_tokens": 2, "lr": 0.01, **settings})


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Learnt:
    folder = tmp_path_factory.mktemp("learnt")
    root, base = make_parts(folder / "data"), make_base(folder / "base")
    task = task_for(base, prompt_noise=0.1)
    trainer = fit(task, parts(root, cache_dir=str(folder / "cache")), default_root_dir=folder)
    trainer.save_checkpoint(folder / "learnt.ckpt")
    return Learnt(root, base, folder / "learnt.ckpt", task)


def blobs(self: Any, latents: Tensor) -> Tensor:
    """In place of a decoder: of each latent a white square, whose side and place follow from the signs in it."""
    pictures = -torch.ones(len(latents), 3, SIZE, SIZE)
    for picture, latent in zip(pictures, latents, strict=True):
        bits = [int(latent[c, 2 * i, 2 * i] > 0) for i in range(3) for c in range(3)]
        side = list(SIDES)[bits[0] + 2 * bits[1] + 4 * bits[2]]
        top, left = (2 * (bits[k] + 2 * bits[k + 1] + 4 * bits[k + 2]) for k in (3, 6))
        picture[:, min(top, SIZE - side) :, min(left, SIZE - side) :][:, :side, :side] = 1
    return pictures


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LatentBase, "decode", blobs)


def made(learnt: Learnt, root: Path, data: Any = None, seed: int = 0, **options: Any) -> list[dict[str, str]]:
    """Generate masks into `root`; gives the lines of the list."""
    learnt.task.generation = MaskGeneration(**{**QUICK, **options, "output": str(root)})
    seed_everything(seed, verbose=False)
    make_trainer(default_root_dir=root.parent).predict(
        learnt.task, datamodule=data or parts(learnt.root), ckpt_path=learnt.checkpoint, return_predictions=False,
        weights_only=True,
    )  # fmt: skip
    return lines(root / "masks.csv")


def masks_of(root: Path) -> dict[str, np.ndarray]:
    """(H, W) bool of every file by its name."""
    found = {}
    for path in sorted(root.rglob("*.png")):
        with Image.open(path) as image:
            assert image.mode == "L"
            values = np.asarray(image)
        assert set(np.unique(values)) <= {0, 255}
        found[path.relative_to(root).as_posix()] = values > 0
    return found


# ---- what is learnt --------------------------------------------------------------------------------------------


def test_the_masks_are_encoded_in_all_views(learnt, tmp_path):
    task, data = task_for(learnt.base), parts(learnt.root, batches_per_epoch=1)
    fit(task, data, default_root_dir=tmp_path)
    shots = task._shots["train"]
    assert shots.moments.shape == (5, 4, 8, 8, 8)
    for index, row in shots.row_of.items():
        sample = data.samples["train"][index]
        with Image.open(sample.mask) as image:
            small = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX)) >= 128
        for number in range(4):
            white = view(torch.from_numpy(small)[None, None].float(), number).expand(-1, 3, -1, -1)
            stored = shots.masks[row, number].float()
            assert (stored[0].bool() == white[0, 0].bool()).float().mean() > 0.95, "the file's, in the same view"
            with torch.no_grad():
                expected = task.network.moments(2 * stored[None].expand(-1, 3, -1, -1) - 1)[0]
            assert torch.allclose(shots.moments[row, number], expected, atol=1e-5)


def test_pictures_make_no_difference_and_masks_do(learnt, tmp_path):
    """Bright cracks made dark ones: the same vectors. The masks moved: others."""

    def tokens(root: Path) -> Tensor:
        task = task_for(learnt.base)
        fit(task, parts(root, batches_per_epoch=2), default_root_dir=tmp_path)
        return task.learnt_state()["learnt.tokens.weight"]

    other, moved = (Path(shutil.copytree(learnt.root, tmp_path / name)) for name in ("other", "moved"))
    for path in (other / "tile" / "test" / "crack").glob("*.png"):
        with Image.open(path) as image:
            pixels = np.array(image)
        pixels[pixels == SHADES[0]] = 10
        save(pixels, path)
    for path in (moved / "tile" / "ground_truth" / "crack").glob("*.png"):
        with Image.open(path) as image:
            save(np.roll(np.asarray(image), 9, axis=1), path)
    expected = tokens(learnt.root)
    assert torch.equal(tokens(other), expected)
    assert not torch.equal(tokens(moved), expected)


def test_the_loss_is_that_of_the_whole_picture(learnt):
    torch.manual_seed(0)
    output, target = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 4, 8, 8)
    masks = torch.zeros(2, 1, SIZE, SIZE)
    masks[:, :, 4:8, 4:8] = 1
    loss = learnt.task.loss(output, target, masks, None)
    loss.backward()
    assert (output.grad != 0).all()
    error = (output.detach() - target).numpy().astype(np.float64) ** 2
    assert float(loss.detach()) == pytest.approx(error.mean(), rel=1e-6)
    weighted = learnt.task.loss(output, target, masks, torch.tensor([1.0, 3.0]))
    assert float(weighted.detach()) == pytest.approx((error.mean((1, 2, 3)) * [1, 3]).mean(), rel=1e-6)


def test_training_lowers_the_loss_of_the_same_steps(learnt, tmp_path):
    task = task_for(learnt.base, lora=4, lr=0.02, warmup=0.0, augment="none")

    def loss() -> float:
        torch.manual_seed(5)
        rows = torch.arange(5).repeat(10)
        with torch.no_grad():
            return float(task._loss(task._shots["train"], rows, torch.zeros_like(rows)))

    fit(task, parts(learnt.root, batches_per_epoch=1), default_root_dir=tmp_path)
    before = loss()
    fit(task, parts(learnt.root, batches_per_epoch=25), default_root_dir=tmp_path)
    assert loss() < 0.98 * before


# ---- the masks -------------------------------------------------------------------------------------------------


def test_masks_keep_the_rules_of_their_type(learnt, drawing, tmp_path):
    rows = made(learnt, tmp_path / "masks", count=8, tries=20)
    assert [(row["category"], row["defect_type"], int(row["number"])) for row in rows] == [
        (*pair, number) for pair in PAIRS for number in range(8)
    ]
    files = masks_of(tmp_path / "masks")
    assert sorted(files) == [f"tile/{kind}/{n:05d}.png" for kind in ("crack", "hole") for n in range(8)]
    assert [row["mask"] for row in rows] == sorted(files)
    for name, mask in files.items():
        real = [marked(learnt.root / n.replace("test", "ground_truth").replace(".png", "_mask.png"))
                for n in LEARNT if Path(name).parts[1] in n]  # fmt: skip
        shares = [m.mean() for m in real]
        assert mask.shape == (SIZE, SIZE)
        assert min(shares) / 1.5 <= mask.mean() <= 1.5 * max(shares)
        assert largest_border_share(mask) <= max(1 / 3, *map(largest_border_share, real))
    assert len({mask.tobytes() for mask in files.values()}) > 8, "drawn one by one"


def test_rejections_are_counted_by_their_reasons(learnt, monkeypatch, tmp_path):
    """Each mask by the script: number 0 at once, 1 at the third time, 2 never."""

    def square(side: int) -> np.ndarray:
        mask = np.zeros((SIZE, SIZE), bool)
        mask[5 : 5 + side, 5 : 5 + side] = True
        return mask

    border, full = np.zeros((SIZE, SIZE), bool), np.ones((SIZE, SIZE), bool)
    border[:4] = True
    script = {0: [square(10)], 1: [full, border, square(9)], 2: [square(0), square(4), square(20), square(0)]}
    monkeypatch.setattr(
        MaskDiffusion, "_sampled",
        lambda self, jobs, attempt: [script[job.number][min(attempt, len(script[job.number]) - 1)] for job in jobs],
    )  # fmt: skip
    rows = made(learnt, tmp_path / "masks", tries=4)
    told = {(row["defect_type"], int(row["number"])): (row["mask"], json.loads(row["rejected"])) for row in rows}
    for kind in ("crack", "hole"):
        assert told[kind, 0] == (f"tile/{kind}/00000.png", {})
        assert told[kind, 1] == (f"tile/{kind}/00001.png", {"full": 1, "along the border": 1})
        assert told[kind, 2] == ("", {"empty": 2, "too small": 1, "too large": 1})
    assert len(masks_of(tmp_path / "masks")) == 4
    counts = read_about(tmp_path / "masks", MaskStore.kind)["counts"]
    assert (counts["asked"], counts["made"]) == (6, 4)
    assert counts["pairs"]["tile/hole"] == {
        "asked": 3, "made": 2,
        "rejections": {"full": 1, "along the border": 1, "empty": 2, "too small": 1, "too large": 1},
    }  # fmt: skip


@pytest.mark.parametrize(("threshold", "columns"), [(0.25, 24), (0.5, 16), (0.8, 6)])
def test_a_pixel_is_marked_above_the_threshold(learnt, monkeypatch, tmp_path, threshold, columns):
    """The decoder answers with a ramp from 0 at the left to 31/32 at the right, in [-1, 1], its channels apart."""
    ramp = (2 * torch.arange(SIZE) / SIZE - 1).expand(SIZE, -1)
    colours = torch.stack([ramp - 0.5, ramp, ramp + 0.5])
    monkeypatch.setattr(LatentBase, "decode", lambda self, latents: colours.expand(len(latents), -1, -1, -1))
    monkeypatch.setattr(MaskRules, "fault", lambda *_: None)
    made(learnt, tmp_path / "masks", threshold=threshold, count=1)
    expected = np.zeros((SIZE, SIZE), bool)
    expected[:, SIZE - columns + (threshold < 0.8) :] = True  # a value equal to the threshold is not above it
    for mask in masks_of(tmp_path / "masks").values():
        assert np.array_equal(mask, expected)


@pytest.mark.parametrize(
    ("options", "calls", "halves"), [({"guidance": 1.0}, 2, 1), ({"steps": 4}, 4, 2), ({"sampler": "ddpm"}, 2, 2)]
)
def test_steps_and_guidance(learnt, monkeypatch, tmp_path, options, calls, halves):
    sizes: list[int] = []
    monkeypatch.setattr(MaskRules, "fault", lambda *_: None)
    hook = learnt.task.network.unet.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    try:
        made(learnt, tmp_path / "masks", **options)
    finally:
        hook.remove()
    expected = [4 * halves] * calls + [2 * halves] * calls
    assert sizes == expected, "six masks, four at a time, with and without condition"


def test_seeds_types_and_numbers(learnt, drawing, tmp_path):
    made(learnt, tmp_path / "one")
    made(learnt, tmp_path / "again")
    assert contents(tmp_path / "one") == contents(tmp_path / "again")
    made(learnt, tmp_path / "other", seed=1)
    one, other = ({m.tobytes() for m in masks_of(tmp_path / name).values()} for name in ("one", "other"))
    assert one != other
    rows = made(learnt, tmp_path / "holes", types=["hole"])
    assert {row["defect_type"] for row in rows} == {"hole"}
    assert len(rows) == 3
    with pytest.raises(UserError, match=r"generation\.types: 'dent' was not learnt; there are crack, hole"):
        made(learnt, tmp_path / "dents", types=["dent"])
    assert not (tmp_path / "dents").exists()


def test_what_was_learnt_from_is_told(learnt, drawing, tmp_path):
    made(learnt, tmp_path / "masks", count=1)
    assert [name for name, _ in read_trained_on(tmp_path / "masks")] == LEARNT
    about = read_about(tmp_path / "masks", MaskStore.kind)
    assert about["generator"] == "MaskDiffusion"
    assert about["base"]["fingerprint"] == LatentBase.open(str(learnt.base)).fingerprint
    assert about["options"]["threshold"] == 0.9
    with pytest.raises(DataError, match="is not of a generated data set"):
        read_about(tmp_path / "masks")


def test_right_after_the_training(learnt, drawing, tmp_path):
    """From Python, without a checkpoint."""
    task = task_for(learnt.base, generation=MaskGeneration(**QUICK))
    data = parts(learnt.root, batches_per_epoch=1)
    trainer = fit(task, data, default_root_dir=tmp_path)
    trainer.predict(task, datamodule=data, return_predictions=False)
    assert len(lines(tmp_path / "masks" / "masks.csv")) == 6


# ---- broken off ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(learnt, tmp_path_factory) -> Path:
    """Undisturbed."""
    folder = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatentBase, "decode", blobs)
        rows = made(learnt, folder / "masks", parts(learnt.root, cache_dir=str(folder / "cache")), count=4)
    assert any(row["mask"] for row in rows)
    assert any(row["rejected"] != "{}" for row in rows)
    return folder / "masks"


@pytest.mark.parametrize("after", [0, 2, 5])
def test_broken_off_and_gone_on_with(learnt, drawing, plain, tmp_path, monkeypatch, after):
    add, turn = MaskStore.add, iter(range(20))

    def broken(self: Any, *arguments: Any) -> None:
        if next(turn) == after:
            raise KeyError("power cut")
        add(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(MaskStore, "add", broken)
        with pytest.raises(KeyError):
            made(learnt, tmp_path / "masks", count=4)
    assert not (tmp_path / "masks" / "masks.csv").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "masks").rglob("*.png")}
    made(learnt, tmp_path / "masks", count=4)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "not even written anew"
    assert contents(tmp_path / "masks") == contents(plain)


def test_what_is_there_or_was_tried_is_not_made_again(learnt, drawing, plain, tmp_path, monkeypatch):
    shutil.copytree(plain, tmp_path / "masks")
    next((tmp_path / "masks").rglob("*.png")).unlink()  # one that somebody did not like
    before = contents(tmp_path / "masks")
    monkeypatch.setattr(MaskDiffusion, "_sampled", lambda *_: pytest.fail("it samples"))
    made(learnt, tmp_path / "masks", count=4)
    assert contents(tmp_path / "masks") == before


def test_more_masks_and_more_tries_leave_the_earlier_ones(learnt, drawing, plain, tmp_path):
    made(learnt, tmp_path / "masks", count=2, tries=1)
    assert "" in [row["mask"] for row in lines(tmp_path / "masks" / "masks.csv")], "so that there is something to try"
    made(learnt, tmp_path / "masks", count=4)
    assert contents(tmp_path / "masks") == contents(plain)


def test_another_generation_in_the_same_folder(learnt, drawing, plain, tmp_path):
    shutil.copytree(plain, tmp_path / "masks")
    before = contents(tmp_path / "masks")
    for key, value in (("threshold", 0.5), ("guidance", 3.0), ("steps", 4), ("sampler", "ddpm")):
        with pytest.raises(UserError, match=rf"holds another generation \(options\.{key} was .*, is {value}"):
            made(learnt, tmp_path / "masks", **{key: value})
    with pytest.raises(UserError, match="seed was 0, is 5"):
        made(learnt, tmp_path / "masks", seed=5)
    with pytest.raises(UserError, match="is no set of generated masks, but holds"):
        made(learnt, learnt.root)
    assert contents(tmp_path / "masks") == before


def test_a_full_disk(learnt, drawing, plain, tmp_path, monkeypatch):
    write, turn = mask_store.write_whole, iter(range(20))

    def full(path: Path, content: bytes) -> None:
        if next(turn) >= 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(mask_store, "write_whole", full)
        with pytest.raises(UserError, match=r"No space left on device.*the same command then goes on"):
            made(learnt, tmp_path / "masks", count=4)
    assert len(masks_of(tmp_path / "masks")) == 2
    made(learnt, tmp_path / "masks", count=4)
    assert contents(tmp_path / "masks") == contents(plain)


def test_a_damaged_list_is_named(learnt, drawing, plain, tmp_path):
    shutil.copytree(plain, tmp_path / "masks")
    with (tmp_path / "masks" / "masks.csv").open("a") as file:
        file.write("tile,crack,seven,,{}\n")
    with pytest.raises(DataError, match=r"masks\.csv:10 is damaged"):
        made(learnt, tmp_path / "masks", count=4)


# ---- on two processes ------------------------------------------------------------------------------------------


def on_one_rank(rank: int, root: str, base: str, checkpoint: str, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("error", "torch.distributed", FutureWarning)  # about what torch will drop
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0")
    os.environ["LIT_DEFECT_CACHE"] = f"{folder}/cache{rank}"
    LatentBase.decode = blobs  # type: ignore[method-assign]
    task = task_for(Path(base), prompt_noise=0.1)
    for name, options in (("many", {"count": 4, "batch": 2}), ("few", {"count": 1, "types": ["hole"]})):
        seed_everything(0, verbose=False)
        task.generation = MaskGeneration(**{**QUICK, **options, "output": f"{folder}/{name}"})
        make_trainer(devices=2, strategy="ddp", default_root_dir=folder).predict(
            task, datamodule=parts(Path(root)), ckpt_path=checkpoint, return_predictions=False, weights_only=True
        )


def on_two(function: Any, learnt: Learnt, folder: Path) -> None:
    """Start two processes; a hang is killed and fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A fork has all modules already, but no process may fork once its autograd has threads for a GPU.
    way = "fork" if sys.platform == "linux" and not torch.cuda.is_available() else "spawn"
    given = (str(learnt.root), str(learnt.base), str(learnt.checkpoint), str(folder), port)
    processes = torch.multiprocessing.start_processes(function, given, 2, join=False, start_method=way)
    deadline = time.monotonic() + LIMIT
    while not processes.join(1):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            pytest.fail("a process waits for another that has stopped")


def test_two_processes_make_the_masks_of_one(learnt, drawing, tmp_path):
    """Also where there are fewer groups than processes."""
    on_two(on_one_rank, learnt, tmp_path / "two")
    made(learnt, tmp_path / "one" / "many", count=4, batch=2)
    made(learnt, tmp_path / "one" / "few", count=1, types=["hole"])
    for name, asked in (("many", 8), ("few", 1)):
        alone, together = (contents(tmp_path / part / name) for part in ("one", "two"))
        assert sorted(alone) == sorted(together)
        assert [key for key in alone if alone[key] != together[key]] == []
        assert len(lines(tmp_path / "two" / name / "masks.csv")) == asked


def refused_on_one_rank(rank: int, root: str, base: str, checkpoint: str, folder: str, port: int) -> None:
    """What each process says when the first cannot begin, and when it cannot join the lists."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0")
    os.environ["LIT_DEFECT_CACHE"] = f"{folder}/cache{rank}"
    LatentBase.decode = blobs  # type: ignore[method-assign]
    task, said = task_for(Path(base), prompt_noise=0.1), []
    for name in ("another", "full"):
        task.generation = MaskGeneration(**{**QUICK, "output": f"{folder}/{name}"})
        if name == "full" and rank == 0:
            MaskStore.merge = full  # type: ignore[method-assign]
        seed_everything(0, verbose=False)
        trainer = make_trainer(devices=2, strategy="ddp", default_root_dir=folder)
        with pytest.raises(UserError) as told:
            trainer.predict(
                task, datamodule=parts(Path(root)), ckpt_path=checkpoint, return_predictions=False, weights_only=True
            )
        said.append(str(told.value))
    (Path(folder) / f"{rank}.json").write_text(json.dumps(said))


def full(store: MaskStore) -> None:
    raise UserError("the disk is full")


def test_what_the_first_process_cannot_do_stops_all(learnt, drawing, tmp_path):
    made(learnt, tmp_path / "two" / "another", seed=1)
    on_two(refused_on_one_rank, learnt, tmp_path / "two")
    first, second = (json.loads((tmp_path / "two" / f"{rank}.json").read_text()) for rank in range(2))
    assert "holds another generation (seed was 1, is 0)" in first[0]
    assert first[1] == "the disk is full"
    assert second == ["the first process (rank 0) has stopped; its own message says why"] * 2


def test_the_data_module_is_left_as_it_was(learnt, drawing, tmp_path):
    """One object for one task after another, also after a verb that was refused."""
    data = parts(learnt.root, cache_dir=str(tmp_path / "cache"))

    def served() -> tuple[Any, ...]:
        return data.serve_images, data.eval_batch_size, dict(data.samples)

    fit(task_for(learnt.base), data, default_root_dir=tmp_path)
    before = served()
    made(learnt, tmp_path / "set", data=data)
    assert served() == before
    with pytest.raises(UserError, match="holds another generation"):
        made(learnt, tmp_path / "set", data=data, seed=1)
    assert served() == before
    task = task_of(learnt.base, {"masks": str(tmp_path / "set")})
    fit(task, data, default_root_dir=tmp_path).save_checkpoint(tmp_path / "defects.ckpt")
    generate(tmp_path / "defects.ckpt", task, data, tmp_path / "defects")
    assert served() == before
    localizer = AnomalyLocalizer(encoder="tu-test_convnext", options={"encoder_depth": 2, "decoder_channels": [16, 8]})
    trainer = fit(localizer, data, default_root_dir=tmp_path)
    scores = [batch["map_max"] for batch in trainer.predict(localizer, datamodule=data) or ()]
    assert len(torch.cat(scores)) == len(data.samples["test"])


# ---- what takes the masks --------------------------------------------------------------------------------------


def test_anomaly_diffusion_takes_the_folder(learnt, drawing, monkeypatch, tmp_path):
    made(learnt, tmp_path / "masks", tries=30)
    monkeypatch.undo()
    with (tmp_path / "masks" / "trained_on.csv").open("a") as file:
        file.write("tile/test/hole/005.png,part\n")  # as if the masks had been learnt on another split
    task = task_of(learnt.base)
    trainer = fit(task, parts(learnt.root), default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "look.ckpt")
    task = task_of(learnt.base, {"masks": str(tmp_path / "masks"), "repair": False, "least_change": 0.0, "count": 3})
    rows = generate(tmp_path / "look.ckpt", task, parts(learnt.root), tmp_path / "set")
    known = masks_of(tmp_path / "masks")
    assert Counter(row["defect_type"] for row in rows) == {"crack": 3, "hole": 3}
    for row in rows:
        drawn = known[f"tile/{row['defect_type']}/{row['mask_source']}"]
        assert marked(tmp_path / "set" / row["mask"]).mean() == pytest.approx(drawn.mean(), rel=0.2)
    assert [name for name, _ in read_trained_on(tmp_path / "set")] == [*LEARNT, "tile/test/hole/005.png"]


# ---- through the command line ----------------------------------------------------------------------------------


def test_learnt_and_made_through_the_command_line(learnt, drawing, capsys, tmp_path):
    config = write_config(tmp_path / "tiny.yaml", learnt.root, learnt.base)
    content = yaml.safe_load(config.read_text())
    content["model"] = {"class_path": "MaskDiffusion", "init_args": {
        "base": str(learnt.base), "anomaly_tokens": 2, "generation": QUICK | {"tries": 2}}}  # fmt: skip
    config.write_text(yaml.safe_dump(content))
    command(tmp_path, "fit", "--config", config, "--run_id", "a")
    run = tmp_path / "runs" / "tiny" / "a"
    capsys.readouterr()
    command(tmp_path, "predict", "--config", run / "config.yaml", "--run_id", "a", "--ckpt_path", "last")
    said = capsys.readouterr().out
    rows = lines(run / "masks" / "masks.csv")
    for kind in ("crack", "hole"):
        here = [row for row in rows if row["defect_type"] == kind]
        (line,) = [line for line in said.splitlines() if line.startswith(f"tile/{kind}")]
        assert f"{sum(bool(row['mask']) for row in here)} of 3" in line
        faults = sum((Counter(json.loads(row["rejected"])) for row in here), Counter[str]())
        assert all(f"{times} {fault}" in line for fault, times in faults.items())
        assert ("rejected" in line) == bool(faults)
    with Image.open(run / "figures" / "masks.png") as image:
        assert min(image.size) > 100
    again = ("predict", "--config", run / "config.yaml", "--run_id", "a", "--ckpt_path", "last")
    new = refused(capsys, command, tmp_path, *again, "--data.predict_root", learnt.root / "tile" / "test" / "good")
    assert "data.predict_root: MaskDiffusion makes masks of noise" in new
    trial = refused(capsys, command, tmp_path, *again, "--trainer.fast_dev_run", "true")
    assert "set model.init_args.generation.count instead" in trial
    assert not (tmp_path / "masks").exists()


# ---- bad options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [("count", 0), ("tries", 0), ("batch", 0), ("threshold", 0.0), ("threshold", 1.0), ("threshold", float("nan")),
     ("guidance", 0.5), ("guidance", float("nan"))],
)  # fmt: skip
def test_numbers_out_of_range(key, value):
    with pytest.raises(UserError, match=rf"model\.init_args\.generation\.{key} = {value}"):
        MaskGeneration(**{key: value})


@pytest.mark.parametrize(
    ("options", "key"), [({"steps": 3}, "steps"), ({"eta": 2.0}, "eta"), ({"sampler": "unipc", "eta": 0.5}, "eta")]
)
def test_what_the_sampler_refuses(learnt, tmp_path, options, key):
    with pytest.raises(UserError, match=rf"model\.init_args\.generation\.{key} = "):
        made(learnt, tmp_path / "masks", **options)
    assert not (tmp_path / "masks").exists()


def test_it_is_told_no_masks(learnt):
    with pytest.raises(UserError, match=r"model\.init_args\.spatial_tokens"):
        task_for(learnt.base, spatial_tokens=2)
    with pytest.raises(UserError, match="MaskDiffusion learns from defective pictures"):
        fit(task_for(learnt.base), parts(learnt.root, setting="one_class"))
