"""Launches that write a folder: whoever comes later waits for a sign of life of one on another machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lit_defect import claims
from lit_defect.claims import Claims, begin_launch, last_launch, launching, still_writes
from tests.sweeping import until
from tests.test_survival import LIMIT, config, reached, start  # noqa: F401  (config is a fixture)

# A command on another machine: no process of ours is known there. Signs of life come more often, and are waited for
# less, than in earnest.
ELSEWHERE = """
import socket, sys
from lit_defect import claims
claims.BEAT, claims.DEAD_AFTER = 0.2, 4.0
if sys.argv[1] != "here":
    socket.gethostname = lambda: sys.argv[1]
sys.argv = ["lit_defect", *sys.argv[2:]]
from lit_defect.__main__ import main
main()
"""


@pytest.fixture(autouse=True)
def briefly(monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.05)
    monkeypatch.setattr(claims, "DEAD_AFTER", 1.0)
    monkeypatch.setattr(claims, "_POLL", 0.05)


@pytest.fixture
def elsewhere(monkeypatch):
    """What is called in here is called on another machine."""

    def go() -> None:
        monkeypatch.setattr(claims, "machine", lambda: "another machine")

    return go


def test_a_launch_of_another_machine_that_lives_is_noticed(tmp_path, elsewhere):
    with launching():
        assert begin_launch(tmp_path, None)
        elsewhere()
        assert still_writes(last_launch(tmp_path))
    assert not still_writes(last_launch(tmp_path)), "it has said that it ended"


def test_one_that_gives_no_sign_of_life_is_dead_after_a_while(tmp_path, elsewhere, capsys):
    Claims(tmp_path / ".launches").take("launch")  # of a machine that has failed since: nobody touches the file
    elsewhere()
    begun = time.monotonic()
    assert not still_writes(last_launch(tmp_path))
    assert time.monotonic() - begun > claims.DEAD_AFTER
    assert "waits for up to 1 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("restarts", "job", "waits"), [("1", "17", False), ("0", "17", True), ("1", "18", True)],
    ids=["after its node has failed", "another step of the job", "another job"],
)  # fmt: skip
def test_a_job_that_was_put_back_takes_over_at_once(tmp_path, monkeypatch, elsewhere, capsys, restarts, job, waits):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    Claims(tmp_path / ".launches").take("launch")
    elsewhere()
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    assert not still_writes(last_launch(tmp_path))
    assert ("waits" in capsys.readouterr().out) == waits


def test_of_two_that_wait_for_a_dead_one_the_first_has_the_folder(tmp_path):
    Claims(tmp_path / ".launches").take("launch")
    before = last_launch(tmp_path)
    with launching():
        assert begin_launch(tmp_path, before)
        assert not begin_launch(tmp_path, before)
        assert begin_launch(tmp_path, None, "test"), "an evaluation is none of its business"


def command(place: Path, machine: str, *words: object) -> subprocess.Popen[Any]:
    program = place / "elsewhere.py"
    program.write_text(ELSEWHERE)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    with (place / f"{machine}.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, str(program), machine, *map(str, words)],
            cwd=place,
            stdout=log,
            stderr=log,
            env=environment,
        )


def test_two_machines_never_train_into_one_run(config, tmp_path, monkeypatch):  # noqa: F811
    words = ("fit", "--config", config, "--run_id", "one", "--resume")
    run = tmp_path / "runs" / "tiny" / "one"
    monkeypatch.setenv("WAIT_AT", "7")
    first = command(tmp_path, "here", *words)
    monkeypatch.delenv("WAIT_AT")
    try:
        until(lambda: reached(run) == 6, LIMIT)
        assert command(tmp_path, "elsewhere", *words).wait(LIMIT) == 2
        assert f"is being written by {os.uname().nodename}:{first.pid}" in (tmp_path / "elsewhere.txt").read_text()
        first.send_signal(signal.SIGSTOP)  # as a machine without its network
        assert command(tmp_path, "elsewhere", *words).wait(LIMIT) == 0, (tmp_path / "elsewhere.txt").read_text()
        written = (run / "metrics.csv").read_text()
        first.send_signal(signal.SIGCONT)
        assert first.wait(LIMIT) == 1
    finally:
        first.kill()
    assert "was taken over by another process" in (tmp_path / "here.txt").read_text()
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert (run / "metrics.csv").read_text() == written


def test_a_run_is_evaluated_by_one_process_at_a_time(config, tmp_path, monkeypatch):  # noqa: F811
    assert start(tmp_path, "fit", "--config", config, "--run_id", "one", "--trainer.max_epochs", "1").wait(LIMIT) == 0
    run = tmp_path / "runs" / "tiny" / "one"
    words = ("test", "--config", config, "--run_id", "one", "--ckpt_path", "last")
    with launching():
        assert begin_launch(run, None, "test")
        process = command(tmp_path, "elsewhere", *words)
        assert process.wait(LIMIT) == 2
        assert "runs/tiny/one is being written by" in (tmp_path / "elsewhere.txt").read_text()
        assert not (run / "test_metrics.json").exists()
    assert command(tmp_path, "elsewhere", *words).wait(LIMIT) == 0
    assert (run / "test_metrics.json").is_file()
