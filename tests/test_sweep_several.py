"""`sweep --workers N` on a machine with GPUs: a script in the place of nvidia-smi, programs that tell what they see."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from lit_defect.errors import UserError
from lit_defect.sweep import main, several
from lit_defect.sweep.several import gpus, shares
from tests.sweeping import outcome, sweep_file

CARDS = "".join(f"GPU {number}: NVIDIA H200 (UUID: GPU-{number}a-b)\n" for number in range(8))
CUT = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-a)
  MIG 3g.20gb     Device  0: (UUID: MIG-c)
  MIG 3g.20gb     Device  1: (UUID: MIG-d)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-b)
"""
# Waits for the other workers, so that each of them has a trial.
SEES = """
import os, sys, time
from pathlib import Path
seen = Path("seen"); seen.mkdir(exist_ok=True)
(seen / str(os.getpid())).touch()
while len(list(seen.iterdir())) < WORKERS: time.sleep(0.05)
print("sees", os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["OMP_NUM_THREADS"])
"""


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Puts a script in the place of nvidia-smi; without a call there is none on the PATH, and no GPU."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "dev").mkdir()
    others = [place for place in os.environ["PATH"].split(":") if not Path(place, "nvidia-smi").exists()]
    monkeypatch.setenv("PATH", ":".join([str(tmp_path / "bin"), *others]))
    monkeypatch.setattr(several, "_DEVICES", tmp_path / "dev")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def says(text: str, status: int = 0) -> None:
        script = tmp_path / "bin/nvidia-smi"
        script.write_text(f"#!/bin/sh\n[ \"$1\" = -L ] || exit 9\ncat <<'END'\n{text}END\nexit {status}\n")
        script.chmod(0o755)

    return says


def seen_by_trials(tmp_path, monkeypatch, workers: int, *words: str, **changes) -> list[tuple[str, str]]:
    """GPUs and threads that the training of each worker has."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    file = sweep_file(tmp_path, parameters={"x": {"values": list(range(workers))}}, options={"epochs": 1}, **changes)
    program = tmp_path / "play.py"
    program.write_text(SEES.replace("WORKERS", str(workers)) + program.read_text())
    assert main([str(file), "--runs_dir", "runs", "--workers", str(workers), "--offline", *words]) == 0
    assert len({trial["worker"] for trial in outcome(file)["trials"]}) == workers
    logs = [path.read_text() for path in sorted((tmp_path / "runs/toy/logs").iterdir())]
    return sorted(re.search(r"^sees (\S+) (\S+)$", text, re.MULTILINE).groups() for text in logs)


def test_workers_have_gpus_of_their_own_and_as_many_each(tmp_path, monkeypatch, smi, capfd):
    smi(CARDS)
    seen = seen_by_trials(tmp_path, monkeypatch, 3, "--options=--note=a")
    assert [names for names, _ in seen] == ["GPU-0a-b,GPU-1a-b", "GPU-2a-b,GPU-3a-b", "GPU-4a-b,GPU-5a-b"]
    assert "worker 1: GPU GPU-2a-b, GPU-3a-b\n" in capfd.readouterr().out


def test_threads_that_a_job_script_sets_for_the_job_are_shared_as_well(tmp_path, monkeypatch, smi, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "512")  # experiments/cluster/environment.sh sets those of all its cores
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(7), raising=False)
    assert seen_by_trials(tmp_path, monkeypatch, 2) == [("None", "3")] * 2  # and without a GPU nothing is set
    assert "worker 1: no GPU\n" in capfd.readouterr().out


def test_a_worker_that_is_killed_ends_all_with_the_status_of_its_signal(monkeypatch, capfd):
    monkeypatch.setattr(several, "tied", lambda words: [sys.executable, "-c", words[-1]])
    assert several.work([[], []], ["import os; os.kill(os.getpid(), 9)"]) == 137


def test_more_workers_than_gpus_are_refused_until_they_are_to_share(tmp_path, monkeypatch, smi, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    file = sweep_file(tmp_path)
    assert main([str(file), "--runs_dir", str(tmp_path / "runs"), "--workers", "2", "--offline"]) == 2
    said = capsys.readouterr().err
    assert "--workers 2 with 1 GPUs (5): give --workers 1, or --share_gpus for several workers on one GPU" in said
    assert not (tmp_path / "runs").exists()
    assert [names for names, _ in seen_by_trials(tmp_path, monkeypatch, 2, "--share_gpus")] == ["5", "5"]


def test_the_same_number_for_all():
    assert shares(["0", "1"], 2) == [["0"], ["1"]]
    assert shares(list("01234567"), 4) == [["0", "1"], ["2", "3"], ["4", "5"], ["6", "7"]]
    assert shares(list("01234"), 2, share_gpus=True) == [["0", "1"], ["2", "3"]]
    assert shares(list("01"), 5, share_gpus=True) == [["0"], ["1"], ["0"], ["1"], ["0"]]
    assert shares([], 3) == [[], [], []]
    with pytest.raises(UserError, match=r"--workers 3 with 2 GPUs \(0, 1\): give --workers 2"):
        shares(["0", "1"], 3)


@pytest.mark.parametrize(
    ("said", "names"),
    [
        ("2,5", ["2", "5"]),
        (" 0, 1 ", ["0", "1"]),
        ("GPU-1a-b,GPU-2a-b", ["GPU-1a-b", "GPU-2a-b"]),
        ("MIG-c,MIG-GPU-x/1/0", ["MIG-c", "MIG-GPU-x/1/0"]),
        ("0,-1,1", ["0"]),  # as CUDA reads it
        ("0,0,1", ["0", "1"]),
        ("-1", []),
        ("", []),
        ("NoDevFiles", []),  # SLURM, to a job that has asked for none
    ],
)
def test_what_is_set_already_is_shared_out(smi, said, names):
    smi(CARDS)
    assert gpus({"CUDA_VISIBLE_DEVICES": said}) == names


def test_devices_of_this_machine(tmp_path, smi):
    assert gpus({}) == []
    smi(CUT)
    assert gpus({}) == ["MIG-c", "MIG-d", "GPU-b"]
    smi(f"WARNING: infoROM is corrupted BYTE\n{CUT}")
    script = tmp_path / "bin/nvidia-smi"
    script.write_bytes(script.read_bytes().replace(b"BYTE", b"\xff"))
    assert gpus({}) == ["MIG-c", "MIG-d", "GPU-b"]
    smi("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", 9)
    assert gpus({}) == []
    (tmp_path / "dev/nvidiactl").touch()
    assert gpus({}) == []
    (tmp_path / "dev/nvidia3").touch()
    with pytest.raises(UserError, match="nvidia-smi does not tell which: set CUDA_VISIBLE_DEVICES, such as 0,1,2,3"):
        gpus({})


def test_workers_at_wandb_have_gpus_of_their_own_as_well(tmp_path, monkeypatch, smi):
    smi(CARDS)
    (tmp_path / "wandb").mkdir()
    told = "from pathlib import Path\nimport os\n"
    told += "def sweep(*_, **__): return 'abc'\n"
    told += "def agent(name, **_): Path(os.environ['CUDA_VISIBLE_DEVICES'].replace('/', '_')).write_text(name)\n"
    (tmp_path / "wandb/__init__.py").write_text(told)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parent.parent}")
    file = sweep_file(tmp_path)
    assert main([str(file), "--runs_dir", "runs", "--workers", "2", "--online"]) == 0
    first, second = (",".join(f"GPU-{n}a-b" for n in numbers) for numbers in (range(4), range(4, 8)))
    assert (tmp_path / first).read_text() == (tmp_path / second).read_text() == "abc"
