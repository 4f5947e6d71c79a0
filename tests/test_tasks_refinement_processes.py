"""A Segmenter and a DDPMRefiner on two processes, and killed: weights, figures and maps of one, undisturbed."""

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

import numpy as np
import pytest
import torch

from lit_defect.reporting.probabilities import ProbabilityMaps
from tests.contrastive import make_trainer
from tests.segmentation import (
    DEFECTS,
    QUICK,
    figures,
    fit,
    make_tiles,
    read_masks,
    refiner,
    segmenter,
    tiles,
    weights,
    write_config,
)
from tests.test_survival import LIMIT, reached, run, start

WORLD = 2
SAMPLES = QUICK | {"num_samples": 2}
TASKS = ["segmenter", "refiner"]


class Found(NamedTuple):
    root: Path  # of the data
    folder: Path  # of the checkpoints
    ranks: list[dict[str, Any]]  # what each process found


def make(name: str, folder: Path) -> Any:
    return segmenter() if name == "segmenter" else refiner(**SAMPLES, stage1=str(folder / "segmenter.ckpt"))


def evaluated(task: Any) -> dict[str, Any]:
    kept = task._evaluation
    found = {"names": [sample.name for sample in kept.samples], **kept.figures()}
    return found | ({} if kept.doubt is None else {"uncertainty": kept.doubt.figures()})


def on_one_rank(rank: int, root: str, folder: str, port: int) -> None:
    """Everything that needs two processes, in one launch."""
    torch.set_num_threads(1)
    warnings.filterwarnings("error", "torch.distributed", FutureWarning)  # about what torch will drop
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0")
    os.environ["LIT_DEFECT_CACHE"] = f"{folder}/cache{rank}"
    two = {"devices": WORLD, "strategy": "ddp"}
    found: dict[str, Any] = {}
    for name in TASKS:
        task, data = make(name, Path(folder)), tiles(Path(root))
        trainer = fit(task, data, epochs=2, default_root_dir=f"{folder}/{name}", **two)
        trainer.save_checkpoint(f"{folder}/{name}.ckpt")
        found[name] = {key: value.clone() for key, value in task.state_dict().items()}
        found[f"{name} watched"] = {key: float(value) for key, value in trainer.callback_metrics.items()}
        trainer.test(task, datamodule=data, verbose=False)
        found[f"{name} test"] = evaluated(task)
        trainer.predict(task, datamodule=data, return_predictions=False)
    torch.save(found, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("processes")
    root = make_tiles(folder / "data", train_good=12)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A fork has all modules already, but no process may fork once its autograd has threads for a GPU.
    way = "fork" if sys.platform == "linux" and not torch.cuda.is_available() else "spawn"
    torch.multiprocessing.start_processes(on_one_rank, (str(root), str(folder), port), WORLD, start_method=way)
    return Found(root, folder, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)])


@pytest.mark.parametrize("name", TASKS)
def test_two_processes_hold_the_same_weights(two, name):
    first, second = (rank[name] for rank in two.ranks)
    own = [key for key in first if "running_" not in key]  # norms see the pictures of their process
    assert [key for key in own if not torch.equal(first[key], second[key])] == []
    if name == "refiner":
        assert [key for key in own if key.startswith("ema.module.")]
        assert int(first["ema.n_averaged"]) == 2 * 2, "2 steps an epoch"
    watched, other = (rank[f"{name} watched"] for rank in two.ranks)
    for key in ("val/loss", "val/iou", "val/pooled_iou"):
        assert watched[key] == pytest.approx(other[key]), key


@pytest.mark.parametrize("name", TASKS)
def test_two_processes_test_like_one(two, name):
    task, data = make(name, two.folder), tiles(two.root)
    make_trainer().test(task, datamodule=data, ckpt_path=two.folder / f"{name}.ckpt", verbose=False)
    alone = evaluated(task)
    assert len(alone["names"]) == len(set(alone["names"])) == 9, "an odd number, so that one process has one more"
    for rank in two.ranks:
        together = rank[f"{name} test"]
        assert together["names"] == alone["names"]
        assert set(together["methods"]) == set(alone["methods"])
        for method, expected in alone["methods"].items():
            found = together["methods"][method]
            assert found["n_defined"] == expected["n_defined"]
            for key in ("iou", "pooled_iou", "boundary_iou", "pixel_accuracy"):  # other batches, other rounding
                assert found[key]["value"] == pytest.approx(expected[key]["value"], abs=2e-3), (method, key)
        for method, gain in alone.get("gain", {}).items():
            assert together["gain"][method]["iou"]["value"] == pytest.approx(gain["iou"]["value"], abs=4e-3)
        if "uncertainty" in alone:
            assert together["uncertainty"] == pytest.approx(alone["uncertainty"], abs=2e-3)


@pytest.mark.parametrize("name", TASKS)
def test_two_processes_write_every_map_once(two, name):
    data = tiles(two.root)
    data.setup("test")
    names = [sample.name for sample in data.samples["test"]]
    folder = two.folder / name
    ProbabilityMaps(folder / "probabilities", DEFECTS).check(names, [(32, 32)] * len(names))
    assert len(read_masks(folder, names)) == len(names) == 9
    assert not (folder / "probabilities.1").exists(), "one process makes room"


# ---- through the command line ----------------------------------------------------------------------------------


@pytest.fixture
def words(two: Found, tmp_path: Path) -> tuple[object, ...]:
    saving = {"class_path": "lit_defect.callbacks.run.LastCheckpoint", "init_args": {"every_n_steps": 3}}
    trainer = {"max_epochs": 4, "callbacks": [saving]}
    stage1 = str(two.folder / "segmenter.ckpt")
    config = write_config(tmp_path / "tiny.yaml", "DDPMRefiner", two.root, trainer=trainer, **SAMPLES, stage1=stage1)
    return ("--config", config, "--run_id")


@pytest.mark.slow
def test_two_processes_through_the_command_line(words, tmp_path):
    pair = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
    run(tmp_path, "fit", *words, "one", *pair, "--test_after_fit", "true")
    run(tmp_path, "test", *words, "one", "--ckpt_path", "best")
    folder = tmp_path / "runs" / "tiny" / "one"
    together, alone = json.loads((folder / "test_metrics.1.json").read_text()), figures(folder)
    assert together["n"] == alone["n"] == 9
    for method, expected in alone["methods"].items():
        assert together["methods"][method]["iou"]["value"] == pytest.approx(expected["iou"]["value"], abs=2e-3)
    names = [[line.split(",")[1] for line in (folder / f"test_predictions{end}.csv").read_text().splitlines()]
             for end in (".1", "")]  # fmt: skip
    assert names[0] == names[1]


@pytest.mark.slow
def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(words, tmp_path):
    run(tmp_path, "fit", *words, "whole")
    whole, killed = (tmp_path / "runs" / "tiny" / name for name in ("whole", "killed"))
    for _ in range(2):
        process = start(tmp_path, "fit", *words, "killed", "--resume")
        seen, deadline = reached(killed), time.monotonic() + LIMIT
        while reached(killed) < seen + 4 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert 0 < reached(killed) < json.loads((whole / "run.json").read_text())["steps"]
    run(tmp_path, "fit", *words, "killed", "--resume")
    expected, found = weights(whole), weights(killed)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert any(key.startswith("ema.module.") for key in expected)
    assert np.isfinite([float(value.float().sum()) for value in found.values()]).all()
