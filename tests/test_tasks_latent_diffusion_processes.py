"""The two steps of a base of one's own on two processes, and killed for good: the same tokenizer, latents and weights everywhere."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from lit_defect.diffusion.base_model import LatentBase
from lit_defect.tasks import latent_bank
from lit_defect.tasks.latent_bank import LatentBank
from lit_defect.tasks.views import unit_range
from tests.contrastive import make_trainer
from tests.fakes import make_mvtec
from tests.latent import tiny_vae
from tests.latent_tasks import EPOCHS, SAVING, autoencoder, base, few_samples, ready, tiles, write
from tests.segmentation import fit, weights
from tests.test_survival import LIMIT, reached, run, start

WORLD = 2
KINDS = ["ImageAutoencoder", "LatentDiffusion"]


class Found(NamedTuple):
    root: Path  # of the data
    folder: Path  # of the runs
    ranks: list[dict[str, Any]]  # what each process found


def on_one_rank(rank: int, root: str, folder: str, port: int) -> None:
    """Everything that needs two processes, in one launch."""
    torch.set_num_threads(1)
    warnings.filterwarnings("error", "torch.distributed", FutureWarning)  # about what torch will drop
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0")
    os.environ["LIT_DEFECT_CACHE"] = f"{folder}/cache{rank}"
    found: dict[str, Any] = {}
    read: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        few_samples(patch)
        patch.setattr(latent_bank, "unit_range", lambda images: read.append(len(images)) or unit_range(images))
        for name in KINDS:
            task = autoencoder() if name == "ImageAutoencoder" else base(Path(folder) / "given")
            data, own = tiles(Path(root)), f"{folder}/{name}"
            trainer = fit(task, data, epochs=2, default_root_dir=own, devices=WORLD, strategy="ddp")
            trainer.save_checkpoint(f"{own}.ckpt")
            found[name] = {key: value.clone() for key, value in task.state_dict().items()}
            found[f"{name} watched"] = {key: float(value) for key, value in trainer.callback_metrics.items()}
            if name == "ImageAutoencoder":
                found["tested"] = trainer.test(task, datamodule=data, verbose=False)[0] | task._figures
            else:
                found["vocabulary"] = task.tokenizer.get_vocab()
                found["banks"] = {split: tuple(bank) for split, bank in task._banks.items()}
                found["read"] = sum(read)
                found["banks"]["one batch"] = tuple(in_one_batch(task))
    torch.save(found, Path(folder) / f"{rank}.pt")


def in_one_batch(task: Any) -> LatentBank:
    """The training pictures' bank, of which only one process has a share."""
    task.data.serve_images, task.data.eval_batch_size = True, 32
    return task._bank("train", 2)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("processes")
    root = make_mvtec(folder / "data", size=(32, 32), train_good=22, test_good=4, defects={"crack": 3, "hole": 4})
    tiny_vae(channels=2, factor=2).save_pretrained(folder / "given")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A fork has all modules already, but no process may fork once its autograd has threads for a GPU.
    way = "fork" if sys.platform == "linux" and not torch.cuda.is_available() else "spawn"
    torch.multiprocessing.start_processes(on_one_rank, (str(root), str(folder), port), WORLD, start_method=way)
    return Found(root, folder, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)])


@pytest.mark.parametrize("name", KINDS)
def test_two_processes_hold_the_same_weights(two, name):
    first, second = (rank[name] for rank in two.ranks)
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    one, other = (rank[f"{name} watched"] for rank in two.ranks)
    assert one["val/loss"] == pytest.approx(other["val/loss"])
    if name == "LatentDiffusion":
        assert int(first["ema.n_averaged"]) == 2 * 2, "2 steps an epoch"


def test_two_processes_validate_like_one(two):
    """Each picture has noise of its own, wherever it is judged; one process has another number of them in a batch."""
    task, data = base(two.folder / "given"), tiles(two.root)
    ready(task, data).load_state_dict(two.ranks[0]["LatentDiffusion"])
    task.on_fit_start()
    judged: list[tuple[float, int]] = []
    task.log = lambda name, value, batch_size, **_: judged.append((float(value) * batch_size, batch_size))
    with torch.no_grad():
        for batch in data.loader("val"):
            task.validation_step(batch, 0)
    total, count = (sum(column) for column in zip(*judged, strict=True))
    assert count == len(data.samples["val"]) == 6
    for rank in two.ranks:
        assert rank["LatentDiffusion watched"]["val/loss"] == pytest.approx(total / count, rel=1e-4)


def test_two_processes_speak_one_language(two):
    first, second = two.ranks
    assert first["vocabulary"] == second["vocabulary"]
    for split in ("train", "val", "one batch"):
        moments, ids, captions = zip(*(rank["banks"][split] for rank in two.ranks), strict=True)
        assert torch.equal(*moments)
        assert torch.equal(*ids)
        assert captions[0] == captions[1]


def test_two_processes_encode_what_one_does(two):
    """Together, and each of them some."""
    task, data = base(two.folder / "given"), tiles(two.root)
    with pytest.MonkeyPatch.context() as patch:
        few_samples(patch)
        fit(task, data, epochs=1, default_root_dir=str(two.folder / "alone"))
    read = [rank["read"] for rank in two.ranks]
    assert sum(read) == sum(len(bank.ids) for bank in task._banks.values()) == 22
    assert min(read) >= 8
    for split, bank in {**task._banks, "one batch": in_one_batch(task)}.items():
        moments, ids, captions = two.ranks[0]["banks"][split]
        assert captions == bank.captions
        assert torch.equal(ids, bank.ids)
        torch.testing.assert_close(moments, bank.moments, rtol=1e-2, atol=1e-3)


def test_one_process_writes_the_result_of_both(two):
    opened = LatentBase.open(str(two.folder / "LatentDiffusion"))
    for key, value in opened.unet.state_dict().items():
        assert torch.equal(value, two.ranks[0]["LatentDiffusion"][f"ema.module.unet.{key}"])
    assert [path.name for path in (two.folder / "LatentDiffusion").glob("pipeline*")] == ["pipeline"]
    assert [path.name for path in (two.folder / "ImageAutoencoder").glob("autoencoder*")] == ["autoencoder"]


def test_two_processes_test_like_one(two):
    task = autoencoder()
    trainer = make_trainer()
    alone = trainer.test(
        task, datamodule=tiles(two.root), ckpt_path=two.folder / "ImageAutoencoder.ckpt", verbose=False
    )[0]
    expected = alone | task._figures
    assert set(expected) == {"test/loss", "test/psnr", "psnr_good", "psnr_defective"}
    for rank in two.ranks:
        for key in ("test/psnr", "psnr_good", "psnr_defective"):  # 11 pictures: one process has one more
            assert rank["tested"][key] == pytest.approx(expected[key], abs=1e-3), key


# ---- through the command line ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(two, tmp_path, name):
    own = {"autoencoder": str(two.folder / "given"), "variants": 3} if name == "LatentDiffusion" else {}
    trainer = {"max_epochs": 4 * EPOCHS[name], "callbacks": [SAVING]}
    words = ("fit", "--config", write(tmp_path / "tiny.yaml", name, two.root, trainer=trainer, **own), "--run_id")
    run(tmp_path, *words, "whole")
    whole, killed = (tmp_path / "runs" / name / run_id for run_id in ("whole", "killed"))
    for _ in range(2):
        process = start(tmp_path, *words, "killed", "--resume")
        seen, deadline = reached(killed), time.monotonic() + LIMIT
        while reached(killed) < seen + 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert 0 < reached(killed) < json.loads((whole / "run.json").read_text())["steps"]
    run(tmp_path, *words, "killed", "--resume")
    expected, found = weights(whole), weights(killed)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    if name == "LatentDiffusion":
        one, other = (LatentBase.open(str(folder)) for folder in (whole, killed))
        assert one.fingerprint == other.fingerprint
        assert one.tokenizer.get_vocab() == other.tokenizer.get_vocab()


@pytest.mark.slow
def test_two_processes_through_the_command_line(two, tmp_path):
    config = write(tmp_path / "tiny.yaml", "LatentDiffusion", two.root, autoencoder=str(two.folder / "given"))
    run(tmp_path, "fit", "--config", config, "--run_id", "one", "--trainer.devices", "2", "--trainer.strategy", "ddp")
    folder = tmp_path / "runs" / "LatentDiffusion" / "one"
    assert json.loads((folder / "run.json").read_text())["devices"] == 2
    opened = LatentBase.open(str(folder))
    assert all(torch.equal(v, weights(folder)[f"ema.module.unet.{k}"]) for k, v in opened.unet.state_dict().items())
