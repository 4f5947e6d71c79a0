"""Runs that are killed, and runs on several processes: real subprocesses, as a cluster would start them."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer

from tests.fakes import make_mvtec, without_times

LIMIT = 240  # seconds for one process


class Waits(Callback):
    """A training that comes to a step waits to be killed, where the environment says so: else it might end before."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        while str(trainer.global_step) == os.environ.get("WAIT_AT"):
            time.sleep(0.1)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Everything that draws random numbers is on: dropout, random views, shuffling. 23 test pictures: an odd count."""
    root = make_mvtec(tmp_path / "data", train_good=30, test_good=21, defects={"crack": 21, "hole": 20})
    path = tmp_path / "tiny.yaml"
    content = {
        "experiment": "tiny",
        "wandb": "off",
        "trainer": {
            "max_epochs": 4,
            "accelerator": "cpu",
            "callbacks": [
                {"class_path": "lit_defect.callbacks.run.LastCheckpoint", "init_args": {"every_n_steps": 3}},
                {"class_path": "tests.test_survival.Waits"},
            ],
        },
        "model": {
            "class_path": "DefectClassifier",
            "init_args": {
                "backbone": "test_resnet",
                "weights": None,
                "transfer": "all",
                "image_size": 32,
                "augment": "strong",
                "drop_rate": 0.3,
                "lr": 0.01,
            },
        },
        "data": {
            "class_path": "MVTecAD",
            "init_args": {
                "root": str(root), "setting": "supervised", "image_size": 32, "batch_size": 4, "leakage": "off",
            },
        },
    }  # fmt: skip
    path.write_text(yaml.safe_dump(content))
    return path


def start(folder: Path, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "lit_defect", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    log = (folder / "log.txt").open("ab")
    return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment, start_new_session=True)


def run(folder: Path, *arguments: object) -> None:
    """Run to the end; a hang is killed with all its children and fails."""
    process = start(folder, *arguments)
    try:
        code = process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert code == 0, (folder / "log.txt").read_text()[-3000:]


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def rows(run_folder: Path) -> list[dict[str, str]]:
    with (run_folder / "metrics.csv").open() as file:
        return without_times(list(csv.DictReader(file)))


def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(config, tmp_path, monkeypatch):
    arguments = ("fit", "--config", config, "--run_id")
    run(tmp_path, *arguments, "whole")
    whole, killed = (tmp_path / "runs" / "tiny" / name for name in ("whole", "killed"))
    steps = json.loads((whole / "run.json").read_text())["steps"]
    monkeypatch.setenv("WAIT_AT", str(steps - 2))
    for kill in range(2):
        process = start(tmp_path, *arguments, "killed", "--resume")
        seen = reached(killed)
        deadline = time.monotonic() + LIMIT
        while reached(killed) < seen + 4 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert 0 < reached(killed) < steps, f"kill {kill} came too early"
        assert json.loads((killed / "run.json").read_text())["status"] == "running"
    monkeypatch.delenv("WAIT_AT")
    run(tmp_path, *arguments, "killed", "--resume")
    expected, found = weights(whole), weights(killed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert json.loads((killed / "run.json").read_text())["status"] == "finished"
    assert len(json.loads((killed / "run.json").read_text())["resumed"]) == 2
    assert rows(killed) == rows(whole)  # nothing logged twice, nothing lost


def reached(run_folder: Path) -> int:
    """Optimizer step of the last checkpoint; it can be read at any moment, since it is replaced atomically."""
    path = run_folder / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True)["global_step"] if path.is_file() else 0


def test_two_processes_test_like_one(config, tmp_path):
    run(tmp_path, "fit", "--config", config, "--run_id", "one", "--trainer.max_epochs", "1")
    folder = tmp_path / "runs" / "tiny" / "one"
    evaluate = ("test", "--config", config, "--run_id", "one", "--ckpt_path", "best")
    run(tmp_path, *evaluate)
    run(tmp_path, *evaluate, "--trainer.devices", "2", "--trainer.strategy", "ddp")
    alone, together = (json.loads((folder / name).read_text()) for name in ("test_metrics.1.json", "test_metrics.json"))
    assert alone["n"] == 23, "an odd number, so that one process has a picture more"
    for key in ("n", "counts", "confusion", "accuracy", "auroc", "recall", "escape_rate", "overkill_rate"):
        assert alone[key] == together[key], key
    for key in ("nll", "ece", "brier", "average_precision"):  # sums of floats: other batches, other rounding
        assert alone[key]["value"] == pytest.approx(together[key]["value"], abs=1e-6), key
    lines = [(folder / name).read_text().splitlines() for name in ("test_predictions.1.csv", "test_predictions.csv")]
    assert [line.split(",")[1] for line in lines[0]] == [line.split(",")[1] for line in lines[1]]


def test_two_processes_train_and_leave_one_run_folder(config, tmp_path):
    run(
        tmp_path, "fit", "--config", config, "--trainer.devices", "2", "--trainer.strategy", "ddp",
        "--trainer.max_epochs", "2", "--test_after_fit", "true",
    )  # fmt: skip
    (folder,) = (tmp_path / "runs" / "tiny").iterdir()
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["devices"] == 2
    result = json.loads((folder / "test_metrics.json").read_text())
    assert result["n"] == 23
    assert (folder / "checkpoints" / "best.ckpt").is_file()
    assert [row["epoch"] for row in rows(folder) if row["val/loss"]] == ["0", "1"]


def test_a_step_of_as_many_pictures_means_the_same_on_one_process_and_on_two(config, tmp_path):
    arguments = (
        "fit", "--config", config, "--model.transfer", "head", "--model.augment", "none", "--model.drop_rate", "0",
        "--data.global_batch_size", "8", "--model.lr_batch", "16", "--trainer.max_epochs", "2", "--run_id",
    )  # fmt: skip
    run(tmp_path, *arguments, "one")
    run(tmp_path, *arguments, "two", "--trainer.devices", "2", "--trainer.strategy", "ddp")
    run(tmp_path, *arguments, "added_up", "--trainer.accumulate_grad_batches", "2")
    one, *others = (tmp_path / "runs" / "tiny" / name for name in ("one", "two", "added_up"))
    expected = weights(one)
    for other in others:
        found = weights(other)
        assert all(torch.allclose(expected[key], found[key], atol=1e-5) for key in expected), other.name
    (state,) = torch.load(one / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"]
    assert {group["initial_lr"] for group in state["param_groups"]} == {0.01 * 8 / 16}


def test_frozen_features_are_computed_by_both_processes(config, tmp_path):
    arguments = (
        "fit",
        "--config",
        config,
        "--model.transfer",
        "head",
        "--model.augment",
        "flips",
        "--test_after_fit",
        "true",
    )
    run(tmp_path, *arguments, "--run_id", "two", "--trainer.devices", "2", "--trainer.strategy", "ddp")
    parts = list((tmp_path / "cache" / "features").rglob("*.safetensors"))
    run(tmp_path, *arguments, "--run_id", "again", "--trainer.max_epochs", "1")
    assert len(parts) >= 2 * 4  # each process wrote its share of each view
    assert set((tmp_path / "cache" / "features").rglob("*.safetensors")) == set(parts)  # one process found them all
