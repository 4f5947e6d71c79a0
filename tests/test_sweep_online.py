"""The sweep at W&B, of which there is no server here: its functions are replaced, the program of a trial runs off line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb

from lit_defect.errors import UserError
from lit_defect.sweep import _write_plan, is_online, main
from lit_defect.sweep.file import read_sweep
from lit_defect.sweep.online import join
from tests.sweeping import epochs_of, hold, run_record, sweep_file, until


@pytest.fixture
def server(monkeypatch):
    """What W&B was asked for."""
    asked = SimpleNamespace(sweeps=[], agents=[])

    def register(told, entity=None, project=None):
        asked.sweeps.append((told, entity, project))
        return f"sweep{len(asked.sweeps)}"

    monkeypatch.setattr(wandb, "sweep", register)
    monkeypatch.setattr(wandb, "agent", lambda *words, **named: asked.agents.append((words, named)))
    return asked


def test_a_sweep_is_registered_once_and_joined_by_all(tmp_path, server, capsys):
    file = sweep_file(tmp_path, project="tiles", entity="us", lit_defect={"seeds": [0, 1]})
    words = [str(file), "--runs_dir", str(tmp_path / "runs"), "--online", "--count", "2"]
    assert main(words) == main(words) == 0
    ((told, entity, project),) = server.sweeps
    assert (entity, project) == ("us", "tiles")
    assert "lit_defect" not in told
    assert [agent[0] for agent in server.agents] == [("sweep1",), ("sweep1",)]
    assert server.agents[0][1]["count"] == 2
    assert server.agents[0][1]["project"] == "tiles"
    assert main(["status", *words[:3]]) == 2
    said = capsys.readouterr().err
    assert "is a sweep at W&B, which shows how it stands: tiles, sweep1" in said


def test_workers_that_begin_at_once_register_one(tmp_path, server):
    sweep = read_sweep(sweep_file(tmp_path))
    threads = [threading.Thread(target=_join_quietly, args=(sweep, tmp_path / "runs")) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.sweeps) == 1


def _join_quietly(sweep, runs_dir):
    from lit_defect.sweep.online import _registered

    _registered(sweep, runs_dir / sweep.name, {})


def test_what_wandb_says_is_told_and_another_may_try(tmp_path, server, monkeypatch):
    sweep = read_sweep(sweep_file(tmp_path))

    def refuse(*_, **__):
        raise ValueError("no such project")

    register, _ = wandb.sweep, monkeypatch.setattr(wandb, "sweep", refuse)
    with pytest.raises(UserError, match="does not take the sweep: no such project"):
        join(sweep, tmp_path / "runs", None, [])
    monkeypatch.setattr(wandb, "sweep", register)
    assert join(sweep, tmp_path / "runs", None, []) == 0


def test_on_line_when_logged_in(tmp_path, monkeypatch):
    sweep = read_sweep(sweep_file(tmp_path))
    options = SimpleNamespace(online=False, offline=False, storage=None)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_MODE", "online")
    assert is_online(sweep, options)
    assert not is_online(sweep, SimpleNamespace(online=False, offline=True, storage=None))
    assert not is_online(sweep, SimpleNamespace(online=False, offline=False, storage="sqlite:///x"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert not is_online(sweep, options)


def trial_of(file: Path, *words: str, run_id: str = "ab12") -> subprocess.Popen[str]:
    """As W&B's agent starts it."""
    command = [sys.executable, "-m", "lit_defect", "sweep", "trial", str(file)]
    environment = {
        **os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "WANDB_MODE": "offline", "WANDB_SILENT": "true",
        "WANDB_DIR": str(file.parent), "WANDB_RUN_ID": run_id, "HOME": str(file.parent),
    }  # fmt: skip
    return subprocess.Popen(
        [*command, "--runs_dir", str(file.parent / "runs"), *words], cwd=file.parent, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def planned(tmp_path, **changes):
    file = sweep_file(tmp_path, **changes)
    _write_plan(read_sweep(file), tmp_path / "runs", {})
    return file


def test_a_trial_trains_with_each_seed_and_logs_the_mean(tmp_path):
    file = planned(tmp_path, lit_defect={"seeds": [0, 1], "seeded": ["data.val_seed"]})
    trial = trial_of(file, "--x=2", "--options=--note 'a b'")
    said, _ = trial.communicate(timeout=120)
    assert trial.returncode == 0, said
    for seed in (0, 1):
        told = run_record(file, f"toy/toy-ab12-s{seed}")["told"]
        assert (told["x"], told["seed_everything"], told["note"]) == ("2", str(seed), "a b")
        assert told["data.val_seed"] == str(seed)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*-ab12")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(folder)]
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HOME": str(tmp_path)})
    shown = json.loads(found.stdout)
    assert shown["summary"]["val/score"] == pytest.approx(2 + 5 + 0.01), found


def test_a_preempted_trial_goes_on_in_its_folders(tmp_path):
    held = hold(tmp_path)
    file = planned(tmp_path, options={"epochs": 12, "hold": held})
    trial = trial_of(file, "--x=2")
    until(lambda: (tmp_path / "runs/toy/toy-ab12-s0/state.json").exists())
    trial.send_signal(signal.SIGUSR1)
    said, _ = trial.communicate(timeout=120)
    assert trial.returncode == 138, said
    held.unlink()
    again = trial_of(file, "--x=2")
    said, _ = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert epochs_of(file, "toy/toy-ab12-s0") == list(range(12))
    assert run_record(file, "toy/toy-ab12-s0")["launches"] == 2


def test_pre_empted_is_told_to_wandb_and_ended_early_is_not(tmp_path, monkeypatch):
    from lit_defect.sweep import online

    marked = []
    ours = SimpleNamespace(
        id="x", config={}, log=lambda *_: None, finish=lambda exit_code: None, mark_preempting=lambda: marked.append(1)
    )
    from contextlib import nullcontext

    monkeypatch.setattr(wandb, "init", lambda: nullcontext(ours))

    def stopped(number):
        def carry_out(self, stops, *_):
            stops.number = number
            return 128 + number, False

        return carry_out

    expected = [(signal.SIGUSR1, {}, 1), (signal.SIGTERM, {}, 1),
                (signal.SIGTERM, {"early_terminate": {"type": "hyperband", "min_iter": 2}}, 0)]  # fmt: skip
    for number, changes, times in expected:
        marked.clear()
        monkeypatch.setattr(online.Training, "carry_out", stopped(number))
        sweep = read_sweep(sweep_file(tmp_path, method="random", run_cap=3, **changes))
        plan = {"experiment": "toy", "told_seeds": [0]}
        assert online.run_trial(sweep, tmp_path / "runs", plan, ["--x=1"]) == 128 + number
        assert len(marked) == times


def test_a_failed_training_fails_the_trial(tmp_path):
    file = planned(tmp_path, options={"fails": 2})
    trial = trial_of(file, "--x=2")
    said, _ = trial.communicate(timeout=120)
    assert trial.returncode == 1
    assert "out of memory" in said
