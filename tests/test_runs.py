"""Run folders: names, records, what counts as the same run, and where checkpoints are found."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_defect import runs
from lit_defect.errors import UserError
from lit_defect.runs import RunFolder


@pytest.fixture
def dead_pid() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def make_run(folder: Path, started: str = "2026-01-01T00:00:00", **record: object) -> RunFolder:
    run = RunFolder(folder)
    run.update(started=started, **record)
    return run


def test_places_and_names(tmp_path):
    run = RunFolder(tmp_path / "solar" / "one")
    assert (run.experiment, run.run_id) == ("solar", "one")
    assert run.last == tmp_path / "solar" / "one" / "checkpoints" / "last.ckpt"
    assert run.best.parent == run.checkpoints == run.last.parent
    assert run.figures.parent == run.path
    assert not run.path.exists()  # naming it creates nothing
    assert run.record() == {}


def test_records_are_updated_and_survive_damage(tmp_path):
    run = make_run(tmp_path / "a" / "b", status="running")
    run.update(status="finished", steps=3)
    assert run.record() == {"started": "2026-01-01T00:00:00", "status": "finished", "steps": 3}
    (run.path / "run.json").write_text('{"status": "fin')
    assert run.record() == {}


def test_new_run_ids_are_unique_and_sort_by_time(monkeypatch):
    drawn = iter(range(51))
    monkeypatch.setattr("lit_defect.runs.secrets.token_hex", lambda size: f"{next(drawn):0{2 * size}x}")
    ids = {runs.new_run_id(7) for _ in range(50)}
    assert len(ids) == 50
    assert all(re.fullmatch(r"\d{8}-\d{6}-s7-[0-9a-f]{8}", name) for name in ids)
    assert "-sx-" in runs.new_run_id(None)


# --- alive ---


def test_a_run_is_alive_as_long_as_its_process(tmp_path, dead_pid):
    here = socket.gethostname()
    parent = {"pid": os.getppid(), "host": here, "status": "running"}
    assert make_run(tmp_path / "e" / "1", **parent).is_alive()
    assert not make_run(tmp_path / "e" / "2", **{**parent, "pid": dead_pid}).is_alive()
    assert not make_run(tmp_path / "e" / "3", **{**parent, "status": "finished"}).is_alive()
    assert not make_run(tmp_path / "e" / "4", **{**parent, "pid": os.getpid()}).is_alive()  # this process itself
    assert not make_run(tmp_path / "e" / "5", **{**parent, "host": "elsewhere"}).is_alive()
    assert not RunFolder(tmp_path / "e" / "6").is_alive()
    assert make_run(tmp_path / "e" / "7", **parent, process_start=runs.process_start(os.getppid())).is_alive()
    assert not make_run(tmp_path / "e" / "8", **parent, process_start="1").is_alive(), "its number was given again"


def test_the_newest_free_run_of_the_same_configuration_is_resumed(tmp_path):
    def add(name: str, day: int, config_hash: str, **record: object) -> RunFolder:
        return make_run(tmp_path / name, f"2026-01-{day:02d}T00:00:00", config_hash=config_hash, **record)

    add("a-old", 1, "x")
    newest = add("b-new", 3, "x", status="failed")
    add("c-other", 4, "y")
    add("d-alive", 5, "x", status="running", pid=os.getppid(), host=socket.gethostname())
    (tmp_path / "e-no-run").mkdir()
    assert runs.find_resumable(tmp_path, "x") == newest
    assert runs.find_resumable(tmp_path, "z") is None
    assert runs.find_resumable(tmp_path / "nowhere", "x") is None
    assert [run.run_id for run in runs.list_runs(tmp_path)] == ["d-alive", "c-other", "b-new", "a-old"]


# --- the configuration's hash ---


def test_where_and_how_a_run_is_done_is_not_what_it_computes():
    config = {"model": {"lr": 0.1}, "data": {"seed": 0}, "seed_everything": 0, "trainer": {"max_epochs": 3}}
    aside = {"run_id": "a", "runs_dir": "/b", "wandb": "off", "resume": True, "ckpt_path": "c", "test_after_fit": True}
    expected = runs.hash_config(config)
    assert runs.hash_config({**config, **aside}) == expected
    assert runs.hash_config(dict(reversed(config.items()))) == expected
    for changed in ({"model": {"lr": 0.2}}, {"seed_everything": 1}, {"trainer": {"max_epochs": 4}}):
        assert runs.hash_config({**config, **changed}) != expected
    assert re.fullmatch("[0-9a-f]{16}", expected)


# --- launchers ---


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"LIT_DEFECT_RUN_ID": "x"}, None),  # left over from a run that has ended
        ({"LOCAL_RANK": "1", "LIT_DEFECT_RUN_ID": "x"}, "x"),  # Lightning's own launcher
        ({"LOCAL_RANK": "0"}, None),
        ({"TORCHELASTIC_RUN_ID": "job7", "LOCAL_RANK": "1"}, "torchrun-job7"),
        ({"SLURM_JOB_ID": "42", "SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, "slurm-42"),
        ({"SLURM_JOB_ID": "42", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None),  # one process names itself
        ({"SLURM_JOB_ID": "42"}, None),  # sbatch without srun
        (
            {"SLURM_JOB_ID": "43", "SLURM_PROCID": "0", "SLURM_NTASKS": "2",
             "SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "3"},
            "slurm-40_3",
        ),
    ],
)  # fmt: skip
def test_processes_of_one_launch_agree_on_the_run(environ, expected):
    assert runs.launched_run_id(environ) == expected


def test_torchrun_without_an_id_is_refused():
    with pytest.raises(UserError, match=r"--run_id.*--standalone"):
        runs.launched_run_id({"TORCHELASTIC_RUN_ID": "none", "LOCAL_RANK": "0"})


# --- checkpoints ---


def test_checkpoints_by_name_are_those_of_the_newest_run_that_has_them(tmp_path):
    old, new = (make_run(tmp_path / name, f"2026-01-0{day}T00:00:00") for day, name in ((1, "old"), (2, "new")))
    for path in (old.best, old.last, new.last):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert runs.resolve_checkpoint("last", tmp_path, None) == new.last
    assert runs.resolve_checkpoint("best", tmp_path, None) == old.best
    assert runs.resolve_checkpoint("last", tmp_path, "old") == old.last
    assert runs.resolve_checkpoint(str(old.best), tmp_path / "other", None) == old.best
    assert runs.run_of_checkpoint(new.last) == RunFolder(new.path.resolve())
    with pytest.raises(UserError, match=r"new.*best\.ckpt"):
        runs.resolve_checkpoint("best", tmp_path, "new")
    with pytest.raises(UserError, match="nowhere"):
        runs.resolve_checkpoint("last", tmp_path / "nowhere", None)
    with pytest.raises(UserError, match=r"lost\.ckpt: no such file"):
        runs.resolve_checkpoint("lost.ckpt", tmp_path, None)


def test_a_foreign_checkpoint_has_no_run(tmp_path):
    for path in (tmp_path / "model.ckpt", tmp_path / "run" / "checkpoints" / "model.ckpt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert runs.run_of_checkpoint(path) is None


# --- files ---


def test_previous_results_are_kept_under_numbers(tmp_path):
    path = tmp_path / "test_metrics.json"
    runs.keep_previous(path)  # nothing there, nothing to do
    for content in "abc":
        runs.keep_previous(path)
        path.write_text(content)
    found = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert found == {"test_metrics.1.json": "a", "test_metrics.2.json": "b", "test_metrics.json": "c"}


def test_a_reader_never_sees_half_a_file(tmp_path):
    path, stop, damaged = tmp_path / "run.json", threading.Event(), []
    runs.write_json(path, {"n": 0})

    def read() -> None:
        while not stop.is_set():
            try:
                json.loads(path.read_text())
            except (OSError, ValueError) as error:
                damaged.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for n in range(200):
        runs.write_json(path, {"n": n, "long": "x" * 20_000})
    stop.set()
    reader.join()
    assert not damaged
    assert json.loads(path.read_text())["n"] == 199
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_several_that_write_or_keep_one_file_do_not_trip_over_each_other(tmp_path):
    path, count, rounds = tmp_path / "test_metrics.json", 6, 60
    together, troubles = threading.Barrier(count), []

    def work(do: Callable[[int], None]) -> None:
        for number in range(rounds):
            together.wait()
            try:
                do(number)
            except OSError as error:
                troubles.append(error)

    def at_once(do: Callable[[int], None]) -> None:
        threads = [threading.Thread(target=work, args=(do,)) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not troubles

    at_once(lambda number: runs.write_json(path, {"n": number}))
    assert [file.name for file in tmp_path.iterdir()] == ["test_metrics.json"]
    for number in range(rounds):
        (tmp_path / f"{number}.csv").write_text(str(number))
    at_once(lambda number: runs.keep_previous(tmp_path / f"{number}.csv"))
    kept = [path for path in tmp_path.iterdir() if path.suffix == ".csv"]  # once each, whoever was first
    assert sorted(path.read_text() for path in kept) == sorted(map(str, range(rounds)))
    assert all(path.stem.count(".") == 1 for path in kept)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "run.json"
    runs.write_json(path, {"n": 1})
    with pytest.raises(TypeError):
        runs.write_json(path, {"n": {1, 2}})  # JSON has no sets
    assert json.loads(path.read_text()) == {"n": 1}


def test_a_run_says_who_it_was():
    told = runs.describe_process(["lit_defect", "fit"])
    assert told["command"] == ["lit_defect", "fit"]
    assert told["pid"] == os.getpid()
    assert {"torch", "lightning", "timm"} <= told["versions"].keys()
    assert told["commit"] is None or re.fullmatch(r"[0-9a-f]{12}\+?", told["commit"])
