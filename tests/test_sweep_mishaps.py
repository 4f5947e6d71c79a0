"""Off-line sweeps: what goes wrong on a shared folder, at stops, and with trials that cannot be."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import pytest

from lit_defect import runs
from lit_defect.claims import Claims, create
from lit_defect.runs import RunFolder
from lit_defect.sweep import _write_plan, main
from lit_defect.sweep.file import read_sweep
from lit_defect.sweep.search import _MendingLock, open_study
from lit_defect.sweep.training import Stops, Training
from tests.sweeping import at_once, hold, outcome, run_record, start, sweep_file, until


def work(file: Path, *words: str) -> int:
    """A worker in this process."""
    return main([str(file), "--runs_dir", str(file.parent / "runs"), *words])


# --- what may go wrong on a shared folder ---


def test_what_a_killed_worker_has_left_of_a_line_does_not_spoil_the_journal(tmp_path):
    file = sweep_file(tmp_path, method="random", run_cap=4, parameters={"x": {"min": 0.0, "max": 1.0}})
    assert work(file, "--count", "2") == 0
    with (tmp_path / "runs/toy/journal.log").open("a") as journal:
        journal.write('{"op_code":4,"worker_id":"x","stu')
    assert work(file) == 0
    trials = outcome(file)["trials"]
    assert [trial["number"] for trial in trials] == [0, 1, 2, 3]
    assert {trial["state"] for trial in trials} == {"complete"}


def test_a_link_whose_answer_the_network_has_lost_is_ours(tmp_path, monkeypatch):
    link = os.link

    def lost(source, target):
        link(source, target)
        raise FileExistsError  # what the server says to the repeated request

    monkeypatch.setattr(os, "link", lost)
    assert create(tmp_path / "t0000-0.json", {})
    monkeypatch.undo()
    assert not create(tmp_path / "t0000-0.json", {})


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_links_will_do(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    assert create(tmp_path / "t0000-0.json", {"token": "x"})
    assert not create(tmp_path / "t0000-0.json", {"token": "y"})
    assert [path.read_text() for path in tmp_path.iterdir()] == ['{\n  "token": "x"\n}\n']


def test_workers_that_come_to_an_empty_database_at_the_same_moment_all_find_the_study(tmp_path):
    for name in "abc":
        assert at_once(tmp_path, f"sqlite:///{tmp_path}/{name}.db") == ["toy"] * 6


def test_a_worker_waits_for_one_that_writes_to_the_same_file_for_long(tmp_path):
    """As on a slow disk, where SQLite's own five seconds are soon over."""
    study = open_study(read_sweep(sweep_file(tmp_path)), tmp_path, f"sqlite:///{tmp_path}/a.db", "of this folder")
    with study._storage._backend.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 60_000  # milliseconds


def test_a_trial_too_many_is_not_lost_when_more_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_defect.claims.DEAD_AFTER", 1.0)
    monkeypatch.setattr("lit_defect.claims.Claims.__init__.__defaults__", (1.0,))
    grid = {"parameters": {"x": {"values": [1, 2, 3]}}, "options": {"epochs": 1}}
    assert work(sweep_file(tmp_path, lit_defect={"trials": 2}, **grid)) == 0
    file = sweep_file(tmp_path, lit_defect={"trials": 2}, **grid)
    from lit_defect.sweep.worker import Worker

    sweep, plan = read_sweep(file), json.loads((tmp_path / "runs/toy/sweep_plan.json").read_text())
    study = open_study(sweep, tmp_path / "runs/toy", None, plan["id"])
    assert Worker(sweep, study, tmp_path / "runs", "toy", [0], [], Stops())._begin() is None  # another was quicker
    file = sweep_file(tmp_path, **grid)
    assert work(file) == 0
    trials = outcome(file)["trials"]
    assert [(trial["state"], trial["params"]) for trial in trials] == [("complete", {"x": x}) for x in (1, 2, 3)]


def test_a_trial_that_another_worker_has_ended_meanwhile_costs_nothing(tmp_path, monkeypatch, capsys):
    """A worker that has slept finds its trial ended by the one that took it over."""
    from optuna.exceptions import UpdateFinishedTrialError

    from lit_defect.sweep.worker import Worker

    train, slept = Worker._train, []

    def sleeps(self, trial, *words, **named):
        value = train(self, trial, *words, **named)
        if not slept:
            slept.append(1)
            self.study.tell(trial.number, value)
            with pytest.raises(UpdateFinishedTrialError):
                trial.set_user_attr("x", 1)
        return value

    monkeypatch.setattr(Worker, "_train", sleeps)
    file = sweep_file(tmp_path)
    assert work(file) == 0
    assert "trial 0: another worker has taken it over" in capsys.readouterr().out
    assert {trial["state"] for trial in outcome(file)["trials"]} == {"complete"}


def test_a_journal_that_cannot_be_written_says_so(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device", "journal.log")

    file = sweep_file(tmp_path)
    monkeypatch.setattr("optuna.Trial.set_user_attr", full)  # which writes there
    assert work(file) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "Traceback" not in said


def test_a_folder_that_is_away_while_a_trial_trains_costs_nothing(tmp_path, monkeypatch):
    import optuna

    report, exists, away, asked = optuna.Trial.report, Path.exists, [1, 1, 1], []

    def reported(self, value, step):
        if away:
            away.pop()
            raise OSError(116, "Stale file handle")
        report(self, value, step)

    def existing(self, **named):
        if self.match("t000?-1.json") and not asked:
            asked.append(self)
            raise OSError(5, "Input/output error")
        return exists(self, **named)

    monkeypatch.setattr(optuna.Trial, "report", reported)
    monkeypatch.setattr(Path, "exists", existing)
    file = sweep_file(tmp_path, lit_defect={"pruner": "median"}, options={"epochs": 8, "pause": 0.3},
                      parameters={"x": {"values": [1, 2]}})  # fmt: skip
    assert work(file) == 0
    assert not away
    assert asked
    assert [trial["state"] for trial in outcome(file)["trials"]] == ["complete", "complete"]


def test_a_storage_that_is_away_when_a_trial_ends_is_waited_for(tmp_path, monkeypatch, capsys):
    import optuna

    told, written, away = optuna.Study.tell, runs.write_json, {"tell": 2, "sweep.json": 2}

    def unless_away(which):
        if away[which]:
            away[which] -= 1
            raise OSError(116, "Stale file handle")

    def tell(self, *words, **named):
        unless_away("tell")
        return told(self, *words, **named)

    def write(path, content):
        if path.name == "sweep.json":
            unless_away("sweep.json")
        written(path, content)

    monkeypatch.setattr("lit_defect.sweep.worker._POLL", 0.01)
    monkeypatch.setattr(optuna.Study, "tell", tell)
    monkeypatch.setattr(runs, "write_json", write)
    file = sweep_file(tmp_path, parameters={"x": {"values": [1, 2]}})
    assert work(file) == 0
    assert not any(away.values())
    assert [trial["state"] for trial in outcome(file)["trials"]] == ["complete", "complete"]
    assert "tries again" in capsys.readouterr().out


def test_a_storage_that_stays_away_is_not_waited_for_for_ever(tmp_path, monkeypatch, capsys):
    def away(*_, **__):
        raise OSError(28, "No space left on device", "journal.log")

    monkeypatch.setattr("lit_defect.sweep.worker._POLL", 0.01)
    monkeypatch.setattr("lit_defect.claims.Claims.__init__.__defaults__", (0.2,))
    monkeypatch.setattr("optuna.Study.tell", away)
    assert work(sweep_file(tmp_path, parameters={"x": {"values": [1, 2]}})) == 2
    assert "No space left on device" in capsys.readouterr().err


def test_a_journal_that_cannot_be_opened_is_left_unlocked(tmp_path):
    lock = _MendingLock(tmp_path / "journal.log")
    with pytest.raises(FileNotFoundError):  # it has gone with its folder, which is back
        lock.acquire()
    assert not list(tmp_path.iterdir()), "else other workers wait half a minute for it"


def test_a_claim_is_kept_alive_when_the_folder_is_back(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_defect.claims.BEAT", 0.01)
    exists, away = Path.exists, [1, 1]

    def existing(self, **named):
        if self.parent == tmp_path and away:
            away.pop()
            raise OSError(116, "Stale file handle")
        return exists(self, **named)

    monkeypatch.setattr(Path, "exists", existing)
    with Claims(tmp_path).take("t0000") as held:
        os.utime(held.claim.path, (1, 1))
        until(lambda: held.claim.path.stat().st_mtime > 1 and not away, 10)


def test_a_runs_folder_may_be_moved(tmp_path):
    file = sweep_file(tmp_path, options={"epochs": 4}, parameters={"x": {"values": [1, 2]}})
    assert work(file, "--count", "1") == 0
    (tmp_path / "runs").rename(tmp_path / "moved")
    assert main([str(file), "--runs_dir", str(tmp_path / "moved")]) == 0
    trials = json.loads((tmp_path / "moved/toy/sweep.json").read_text())["trials"]
    assert [trial["state"] for trial in trials] == ["complete", "complete"]
    assert not (tmp_path / "runs").exists()


# --- stops ---


def test_ctrl_c_again_does_not_wait(tmp_path):
    file = sweep_file(tmp_path, options={"epochs": 2, "pause": 600}, parameters={"x": {"values": [1, 2]}})
    worker = start(file)
    until(lambda: (tmp_path / "runs/toy/toy-t0000-s0/metrics.csv").exists())
    worker.send_signal(signal.SIGINT)
    said = until(lambda: worker.stdout.readline().startswith("stopping") and "Ctrl-C again: at once")
    worker.send_signal(signal.SIGINT)
    said, _ = worker.communicate(timeout=120)
    assert worker.returncode == 130, said
    assert [trial["state"] for trial in outcome(file)["trials"]] == ["waiting"]


def test_ctrl_c_again_reaches_all_workers_of_a_machine(tmp_path):
    file = sweep_file(tmp_path, options={"epochs": 2, "pause": 60}, parameters={"x": {"values": [1, 2]}})
    parent = start(file, "--workers", "2", "--offline")
    until(lambda: len(list((tmp_path / "runs/toy").glob("toy-t000?-s0/metrics.csv"))) == 2)
    parent.send_signal(signal.SIGINT)
    for _ in range(2):
        until(lambda: "Ctrl-C again: at once" in parent.stdout.readline())
    parent.send_signal(signal.SIGINT)
    said, _ = parent.communicate(timeout=20)
    assert parent.returncode == 130, said
    assert [trial["state"] for trial in outcome(file)["trials"]] == ["waiting"] * 2


def test_ctrl_c_in_a_terminal_which_the_whole_group_hears_counts_once(tmp_path):
    file = sweep_file(tmp_path, options={"hold": hold(tmp_path)}, parameters={"x": {"values": [1, 2]}})
    parent = start(file, "--workers", "2", "--offline", session=True)
    until(lambda: len(list((tmp_path / "runs/toy").glob("toy-t000?-s0/state.json"))) == 2)
    os.killpg(parent.pid, signal.SIGINT)
    said, _ = parent.communicate(timeout=60)
    assert parent.returncode == 130, said
    assert [run_record(file, f"toy/toy-t000{n}-s0")["status"] for n in range(2)] == ["preempted"] * 2  # not killed


def test_a_signal_after_ctrl_c_twice_takes_nothing_back():
    """As a scheduler's, or of whoever is still not content."""
    with Stops().noted() as stops:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
    assert (stops.at_once, stops.status) == (True, 130)


def test_a_worker_puts_its_slurm_job_back_when_its_trial_is_given_back(tmp_path, monkeypatch):
    """The worker and not its training, which is no task of the job."""
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin/scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\ncp {tmp_path}/runs/toy/claims/*.json {tmp_path}\n')
    scontrol.chmod(0o755)
    for name, value in {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "11", "SLURM_ARRAY_TASK_ID": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    file = sweep_file(tmp_path, options={"epochs": 8, "hold": hold(tmp_path)})
    program = tmp_path / "play.py"
    program.write_text('import os\nassert "SLURM_JOB_ID" not in os.environ\n' + program.read_text())
    worker = start(file)
    until(lambda: (tmp_path / "runs/toy/toy-t0000-s0/state.json").exists())
    worker.send_signal(signal.SIGUSR1)
    said, _ = worker.communicate(timeout=120)
    assert worker.returncode == 138, said
    assert (tmp_path / "asked").read_text() == "requeue 11_3\n"
    assert json.loads((tmp_path / "t0000-0.json").read_text())["released"]


def test_workers_end_with_what_has_started_them(tmp_path):
    file = sweep_file(tmp_path, options={"hold": hold(tmp_path)})
    parent = start(file, "--workers", "2", "--offline")
    claims = until(lambda: len(found := Claims(tmp_path / "runs/toy/claims").newest()) == 2 and found)
    until(lambda: (tmp_path / "runs/toy/toy-t0001-s0/state.json").exists())
    parent.kill()
    parent.wait()
    until(lambda: not any(runs.process_start(claim.pid) for claim in claims.values()))
    assert all(claim.released for claim in Claims(tmp_path / "runs/toy/claims").newest().values())


# --- trials that cannot be ---


def test_a_combination_that_cannot_be_does_not_hold_up_the_others(tmp_path, capsys):
    file = sweep_file(tmp_path, options={"refuses": 2})
    assert work(file) == 2
    assert "start the worker again, and the trial counts as failed" in capsys.readouterr().err
    assert work(file) == 1
    trials = outcome(file)["trials"]
    assert [trial["state"] for trial in trials] == ["complete", "failed", "complete"]
    assert "--x: cannot be so" in trials[1]["reason"]


def test_a_run_whose_test_was_killed_is_not_done(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.update(status="finished")
    (run.path / "metrics.csv").write_text("step,val/auroc,test/auroc\n29,0.7,\n")
    assert not Training(run, [], tmp_path / "log", "test/auroc").is_done()
    assert Training(run, [], tmp_path / "log", "val/auroc").is_done()
    (run.path / "metrics.csv").write_text("step,val/auroc,test/auroc\n29,0.7,\n30,,0.65\n")
    assert Training(run, [], tmp_path / "log", "test/auroc").is_done()


def test_other_options_than_those_of_the_first_worker_are_told(tmp_path, capsys):
    file = sweep_file(tmp_path, options={"epochs": 1})
    assert work(file, "--count", "1", "--options", "--note a") == 0
    assert work(file, "--count", "1", "--options", "--note a") == 0
    assert "warning" not in capsys.readouterr().err
    assert work(file) == 0
    assert "begun with --options '--note a', this worker has ''" in capsys.readouterr().err


def test_status_in_a_narrow_file_is_readable(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    names = ("model.lr", "model.weight_decay", "data.seed", "model.seed")
    file = sweep_file(tmp_path, parameters={name: {"values": [0.12345, 1]} for name in names}, run_cap=None,
                      lit_defect={"trials": 1})  # fmt: skip
    assert work(file) == 0
    capsys.readouterr()
    summary = tmp_path / "runs/toy/sweep.json"
    summary.unlink()
    assert main(["status", str(file), "--runs_dir", str(tmp_path / "runs")]) == 0
    assert summary.is_file()
    head = capsys.readouterr().out.splitlines()[2]
    wanted = "trial state val/score lr weight_decay data.seed model.seed seconds worker"
    assert head.split()[1:-1:2] == wanted.split()


def test_an_empty_sweep_has_a_status(tmp_path, capsys):
    file = sweep_file(tmp_path)
    _write_plan(read_sweep(file), tmp_path / "runs", {})
    assert main(["status", str(file), "--runs_dir", str(tmp_path / "runs")]) == 2
    assert "has no sweep yet" in capsys.readouterr().err
    open_study(
        read_sweep(file),
        tmp_path / "runs/toy",
        None,
        json.loads((tmp_path / "runs/toy/sweep_plan.json").read_text())["id"],
    )
    assert main(["status", str(file), "--runs_dir", str(tmp_path / "runs")]) == 0
    assert "0 of 3 trials begun" in capsys.readouterr().out


def test_options_that_are_no_words_are_named(tmp_path, capsys):
    assert work(sweep_file(tmp_path), "--options", "--note 'a") == 2
    assert "error: --options --note 'a: no closing quotation" in capsys.readouterr().err
