"""The scripts of `experiments/cluster/` on a real SLURM: launch, pre-emption, requeue, arrays.

    pytest -m slurm        # as root on Debian; SLURM_PACKAGES=FOLDER keeps the downloaded packages

Two nodes of one machine, processes without GPUs. Each wait has a limit, and a failure shows the job's log.
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.fakes import make_mvtec
from tests.slurm import NO_GPU, ROOT, NoSlurmError, Slurm

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
        except NoSlurmError as reason:
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
    slurm.wait(job)
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
    """What was logged of the training, not of the machine (after how many steps that is, a resumed run counts anew)."""
    with (run / "metrics.csv").open(newline="") as lines:
        found = list(csv.DictReader(lines))
    found = [{key: value for key, value in row.items() if not key.startswith(("time/", "memory/"))} for row in found]
    return [row for row in found if any(row[key] for key in row.keys() - {"step", "epoch"})]


def assert_same(run: Path, expected: Path) -> None:
    """Metrics of every step, weights and test are those of the other run, to the last bit."""
    assert rows(run) == rows(expected)
    states = [torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (run, expected)]
    assert states[0]["global_step"] == states[1]["global_step"]
    torch.testing.assert_close(states[0]["state_dict"], states[1]["state_dict"], rtol=0, atol=0)
    tests = [json.loads((folder / "test_metrics.json").read_text()) for folder in (run, expected)]
    timeless = [{key: value for key, value in test.items() if "second" not in key} for test in tests]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_slurm_takes_every_script_as_it_stands(slurm, path):
    slurm.call("sbatch", "--test-only", NO_GPU, path)
    slurm.call("sbatch", "--test-only", NO_GPU, "--nodes=2", path)


def test_two_processes_are_one_run(slurm, undisturbed):
    found = record(undisturbed)
    assert (found["status"], found["devices"], found["resumed"]) == ("finished", 2, [])
    assert [path.name for path in undisturbed.parent.iterdir()] == [undisturbed.name]


def preempt(slurm: Slurm, job: str, run: Path, epochs: int = 1) -> dict[str, Any]:
    """Signal USR1 to a job in the middle of its training, as scancel does; returns `run.json` when it has ended."""
    slurm.wait_for(job, lambda: trains(run, epochs))
    slurm.call("scancel", "--signal=USR1", job)
    slurm.wait_for(job, lambda: slurm.record(job)["Restarts"] == "1")
    assert record(run)["status"] in ("preempted", "running"), slurm.log(job)  # running: it has been started again
    slurm.wait(job)
    assert slurm.record(job)["Restarts"] == "1"
    return record(run)


def test_a_preempted_job_goes_on_as_if_nothing_had_been(slurm, config, undisturbed):
    job = slurm.submit("run.sbatch", "fit", "--config", config, options=TWO)
    found = preempt(slurm, job, run_of(slurm, job), epochs=2)
    assert (found["status"], len(found["resumed"])) == ("finished", 1)
    assert "resuming" in slurm.log(job)
    assert_same(run_of(slurm, job), undisturbed)


def test_processes_that_decode_outlive_the_signal(slurm, config, undisturbed):
    """SLURM signals every process of a step, also the workers of data loaders."""
    words = ("--data.cache", "off", "--data.num_workers", "2")
    job = slurm.submit("run.sbatch", "fit", "--config", config, *words, options=TWO)
    found = preempt(slurm, job, run_of(slurm, job))
    assert found["status"] == "finished"
    assert "DataLoader worker" not in slurm.log(job), slurm.log(
        job
    )  # "(pid 17) is killed by signal", at the end as well
    assert_same(run_of(slurm, job), undisturbed)


def test_nodes_are_one_run_too(slurm, config, undisturbed):
    job = slurm.submit("run.sbatch", "fit", "--config", config, options=("--nodes=2", "--ntasks-per-node=1"))
    found = preempt(slurm, job, run_of(slurm, job))
    assert (found["status"], found["devices"]) == ("finished", 2)
    assert_same(run_of(slurm, job), undisturbed)


def test_torchrun_is_preempted_as_well(slurm, config, undisturbed, monkeypatch):
    monkeypatch.setitem(slurm.environment, "PROCESSES_PER_NODE", "2")
    job = slurm.submit("torchrun.sbatch", "fit", "--config", config)
    found = preempt(slurm, job, run_of(slurm, job))
    assert (found["status"], found["devices"]) == ("finished", 2)
    assert_same(run_of(slurm, job), undisturbed)


def test_a_finished_run_is_left_alone(slurm, config, undisturbed):
    """By all of its processes: none waits for the others."""
    before = record(undisturbed)
    job = slurm.submit("run.sbatch", "fit", "--config", config, "--run_id", undisturbed.name, options=TWO)
    slurm.wait(job, seconds=90)
    assert "nothing to do" in slurm.log(job)
    assert record(undisturbed) == before


def test_the_time_limit_puts_a_job_back(slurm, config):
    """The scripts' own --signal, without anybody's help. SLURM counts minutes, and signals up to one too early."""
    forever = ("--trainer.max_epochs", "100000", "--data.batches_per_epoch", "50")
    limit = ("--time=3", "--signal=USR1@90", "--ntasks-per-node=1")
    job = slurm.submit("run.sbatch", "fit", "--config", config, *forever, options=limit)
    run = run_of(slurm, job)
    slurm.wait_for(job, lambda: record(run).get("status") == "preempted", seconds=200)
    slurm.wait_for(job, lambda: len(record(run)["resumed"]) == 1)
    slurm.call("scancel", job)
    slurm.wait(job, "CANCELLED")
    assert slurm.record(job)["Restarts"] == "1"
    assert record(run)["status"] == "interrupted"  # by scancel's SIGTERM: its state is saved, and it is not put back


def test_a_study_runs_and_only_its_preempted_job_is_put_back(slurm, config):
    arms = {"A": {"title": "as it is"}, "B": {"title": "slower", "options": {"model.lr": 0.003}}}
    study = {"study": "pair", "seeds": [0], "runs_dir": str(slurm.folder / "runs"), "judged_by": "accuracy"}
    path = slurm.folder / "pair.yaml"
    path.write_text(yaml.safe_dump({**study, "config": str(config), "arms": arms}))
    said = slurm.call("experiments/cluster/study.sh", NO_GPU, path, "--runs_dir", slurm.folder / "runs")
    array, report = re.fullmatch(r"jobs 0-1: (\d+)\nreport: (\d+)\n", said).groups()
    runs = [slurm.folder / "runs" / f"pair_{arm}" / "s0" for arm in arms]
    slurm.wait_for(f"{array}_0", lambda: trains(runs[0]) and trains(runs[1]))
    slurm.call("scancel", "--signal=USR1", f"{array}_1")
    for task in (0, 1):
        slurm.wait(f"{array}_{task}")
        found = record(runs[task])
        assert slurm.record(f"{array}_{task}")["Restarts"] == str(task), slurm.log(f"{array}_{task}")
        assert (found["status"], len(found["resumed"])) == ("finished", task)
    slurm.wait(report)
    assert "slower" in (slurm.folder / "runs" / "pair" / "report.md").read_text()


def test_only_what_passes_the_check_is_submitted(slurm, config):
    command = ("experiments/cluster/submit.sh", NO_GPU, "--test-only", "fit", "--config", str(config))
    before = slurm.call("squeue", "--noheader")
    for words, code in ((("--data.root", "/nowhere"), 1), ((), 0)):
        done = subprocess.run(
            [*command, *words], cwd=ROOT, env=slurm.environment, text=True, capture_output=True, timeout=300
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert ("to start at" in done.stderr) is (code == 0), done.stderr
    assert slurm.call("squeue", "--noheader") == before


def test_workers_of_an_array_share_a_sweep_and_go_on_when_preempted(slurm, config):
    rates = {"model.lr": {"values": [0.01, 0.003, 0.001, 0.0003]}}
    command = ["${env}", "${interpreter}", "-m", "lit_defect", "fit", "--config", str(config), "${args}"]
    metric = {"name": "val/auroc", "goal": "maximize"}
    path = slurm.folder / "rates.yaml"
    path.write_text(
        yaml.safe_dump({"name": "rates", "method": "grid", "metric": metric, "command": command, "parameters": rates})
    )
    folder = slurm.folder / "runs"
    array = slurm.submit("sweep.sbatch", path, "--runs_dir", folder, options=("--array=0-1",))
    first = f"{array}_0"
    slurm.wait_for(first, lambda: sum(trains(run) for run in (folder / "tiny").glob("rates-*")) >= 2, seconds=300)
    slurm.call("scancel", "--signal=USR1", first)
    for task in (f"{array}_1", first):
        slurm.wait(task, seconds=400)
    assert [slurm.record(f"{array}_{task}")["Restarts"] for task in (0, 1)] == ["1", "0"]
    trials = json.loads((folder / "rates" / "sweep.json").read_text())["trials"]
    assert sorted(trial["params"]["model.lr"] for trial in trials) == sorted(rates["model.lr"]["values"])
    assert {trial["state"] for trial in trials} == {"complete"}
    assert len({trial["worker"] for trial in trials}) >= 2
    runs = [record(run) for run in sorted((folder / "tiny").glob("rates-*"))]
    assert [run["status"] for run in runs] == ["finished"] * 4
    assert sum(len(run["resumed"]) for run in runs) == 1  # the one that was preempted went on; nothing was run twice
