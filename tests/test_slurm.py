"""The scripts of `experiments/cluster/` on a real SLURM: launch, pre-emption, requeue, arrays.

    pytest -m slurm        # as root on Debian; SLURM_PACKAGES=FOLDER keeps the downloaded packages

Two nodes of one machine, processes without GPUs. Each wait has a limit, and a failure shows the job's log.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.fakes import make_mvtec
from tests.slurm import NO_GPU, ROOT, NoSlurm, Slurm

SCRIPTS = sorted((ROOT / "experiments" / "cluster").glob("*.sbatch"))
TWO = ("--ntasks-per-node=2",)

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with tempfile.TemporaryDirectory(prefix="slurm") as folder:  # pytest's own are too long for a socket
        packages = os.environ.get("SLURM_PACKAGES", f"{folder}/packages")
        try:
            with Slurm(Path(folder), Path(packages)) as cluster:
                cluster.environment["LIT_DEFECT_CACHE"] = f"{folder}/cache"
                yield cluster
        except NoSlurm as reason:
            pytest.skip(str(reason))


@pytest.fixture(scope="module")
def config(slurm: Slurm) -> Path:
    """A classifier small enough to train a thousand steps in some seconds."""
    root = make_mvtec(slurm.folder / "data", train_good=16, test_good=8, defects={"crack": 14, "hole": 10})
    network = {"backbone": "test_resnet", "weights": None, "transfer": "all", "image_size": 32, "lr": 0.01}
    data = {"root": str(root), "setting": "supervised", "image_size": 32, "batch_size": 8, "batches_per_epoch": 100}
    content = {
        "experiment": "tiny",
        "runs_dir": str(slurm.folder / "runs"),
        "wandb": "off",
        "test_after_fit": True,
        "trainer": {"max_epochs": 6, "accelerator": "cpu"},
        "model": {"class_path": "DefectClassifier", "init_args": network},
        "data": {"class_path": "MVTecAD", "init_args": data},
    }
    path = slurm.folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def undisturbed(slurm: Slurm, config: Path) -> Path:
    """The folder of a run on two processes that nobody has interrupted."""
    job = slurm.submit("run.sbatch", "fit", "--config", config, options=TWO)
    slurm.wait(job, "COMPLETED")
    return run_of(slurm, job)


def run_of(slurm: Slurm, job: str) -> Path:
    return slurm.folder / "runs" / "tiny" / f"slurm-{job}"


def record(run: Path) -> dict[str, Any]:
    """`run.json`, as far as it is there."""
    file = run / "run.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def trains(run: Path, epochs: int = 1) -> bool:
    """Whether a run has so many epochs behind it."""
    file = run / "metrics.csv"
    return file.is_file() and any(int(row["epoch"]) >= epochs for row in rows(run) if row.get("epoch"))


def rows(run: Path) -> list[dict[str, str]]:
    """What was logged, without what is measured of the machine."""
    with (run / "metrics.csv").open(newline="") as lines:
        found = list(csv.DictReader(lines))
    return [{key: value for key, value in row.items() if not key.startswith(("time/", "memory/"))} for row in found]


def assert_same(run: Path, expected: Path) -> None:
    """Metrics of every step, weights and test are those of the other run, to the last bit."""
    assert rows(run) == rows(expected)
    states = [torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (run, expected)]
    assert states[0]["global_step"] == states[1]["global_step"]
    torch.testing.assert_close(states[0]["state_dict"], states[1]["state_dict"], rtol=0, atol=0)
    tests = [json.loads((folder / "test_metrics.json").read_text()) for folder in (run, expected)]
    assert [test.pop("pictures_per_second") > 0 for test in tests] == [True, True]
    assert tests[0] == tests[1]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_slurm_takes_every_script_as_it_stands(slurm, path):
    slurm.call("sbatch", "--test-only", NO_GPU, path)
    slurm.call("sbatch", "--test-only", NO_GPU, "--nodes=2", path)


def test_two_processes_are_one_run(slurm, undisturbed):
    found = record(undisturbed)
    assert (found["status"], found["devices"], found["resumed"]) == ("finished", 2, [])
    assert [path.name for path in undisturbed.parent.iterdir()] == [undisturbed.name]


def test_a_preempted_job_goes_on_as_if_nothing_had_been(slurm, config, undisturbed):
    job = slurm.submit("run.sbatch", "fit", "--config", config, options=TWO)
    run = run_of(slurm, job)
    slurm.wait_for(job, lambda: trains(run, epochs=2))
    slurm.call("scancel", "--signal=USR1", job)
    slurm.wait_for(job, lambda: record(run).get("status") == "preempted", seconds=60)
    begun = record(run)["started"]
    assert slurm.wait(job, "COMPLETED")["Restarts"] == "1", slurm.log(job)
    found = record(run)
    assert (found["status"], len(found["resumed"]), found["started"]) == ("finished", 1, begun)
    assert "resuming" in slurm.log(job)
    assert_same(run, undisturbed)
