"""Off-line sweeps: several worker processes, killed ones, stops, pruning, seeds; `fit` is played by a quick program."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from lit_defect.claims import Claim, Claims, create
from lit_defect.errors import UserError
from lit_defect.runs import RunFolder
from lit_defect.sweep import main
from lit_defect.sweep.results import NotLoggedError, NoValueError, value_of
from tests.sweeping import claimed_by, epochs_of, hold, outcome, run_record, start, sweep_file, until


def work(file: Path, *words: str) -> int:
    """A worker in this process."""
    return main([str(file), "--runs_dir", str(file.parent / "runs"), *words])


def test_a_grid_is_complete(tmp_path, capsys):
    parameters = {"x": {"values": [1, 2]}, "y": {"values": ["a", "b"]}, "seed_everything": {"values": [0, 3]}}
    file = sweep_file(tmp_path, parameters=parameters)
    assert work(file) == 0
    result = outcome(file)
    assert [trial["params"] for trial in result["trials"]] == [
        {"x": x, "y": y, "seed_everything": seed} for x in (1, 2) for y in ("a", "b") for seed in (0, 3)
    ]
    assert result["trials"][3]["runs"] == ["toy/toy-t0003-s3"]
    assert result["trials"][3]["value"] == pytest.approx(1 + 30 + 0.01)
    assert run_record(file, "toy/toy-t0003-s3")["told"]["y"] == "b"
    assert result["metric"] == {"name": "val/score", "goal": "maximize"}
    assert result["parameters"]["x"] == {"log": False, "choices": True}
    assert (tmp_path / "runs/toy/logs/toy-t0003-s3.log").is_file()
    assert work(file) == 0  # again: nothing is left
    assert outcome(file) == result
    capsys.readouterr()
    assert main(["status", str(file), "--runs_dir", str(tmp_path / "runs")]) == 0
    shown = capsys.readouterr().out
    assert "8 of 8 trials begun: 8 complete" in shown
    assert "best  trial 5" in shown


def test_twelve_trials_by_two_workers_of_which_one_is_killed(tmp_path):
    """Nothing is lost and nothing is run twice; the killed one's trial goes on in its folder with its parameters."""
    held = hold(tmp_path)
    file = sweep_file(
        tmp_path, method="bayes", run_cap=14, options={"epochs": 4, "hold": held}, lit_defect={"startup": 4},
        parameters={"x": {"min": 0.0, "max": 1.0}, "y": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1.0}},
    )  # fmt: skip
    first, second = start(file), start(file)
    of_first = until(lambda: claimed_by(tmp_path, first.pid))
    run = tmp_path / f"runs/toy/toy-{of_first[0]}-s0"
    until(lambda: (run / "state.json").exists())  # within its epochs
    first.kill()
    first.wait()
    held.unlink()
    said, _ = second.communicate(timeout=240)
    assert second.returncode == 0, said
    assert f"trial {int(of_first[0][1:])}: lost its worker, and is taken up again" in said
    trials = outcome(file)["trials"]
    assert [trial["number"] for trial in trials] == list(range(14))
    assert {trial["state"] for trial in trials} == {"complete"}
    folders = {path.name for path in (tmp_path / "runs/toy").glob("toy-t*")}
    assert folders == {f"toy-t{number:04d}-s0" for number in range(14)}
    launches = Counter()
    for trial in trials:
        (name,) = trial["runs"]
        assert epochs_of(file, name) == [0, 1, 2, 3]  # each epoch once
        record = run_record(file, name)
        launches[record["launches"]] += 1
        assert float(record["told"]["x"]) == trial["params"]["x"]
        assert trial["value"] == pytest.approx(trial["params"]["x"] + 0.03)
    assert launches == {1: 13, 2: 1}
    taken_up = trials[int(of_first[0][1:])]
    assert taken_up["worker"].endswith(f":{second.pid}")
    assert run_record(file, taken_up["runs"][0])["launches"] == 2
    assert len({trial["params"]["x"] for trial in trials}) == 14  # no two workers have drawn the same


def test_workers_share_a_grid_without_doubles(tmp_path):
    file = sweep_file(tmp_path, parameters={"x": {"values": list(range(12))}}, options={"epochs": 1})
    assert work(file, "--workers", "3", "--offline") == 0
    trials = outcome(file)["trials"]
    assert [trial["params"]["x"] for trial in trials] == list(range(12))
    assert all(run_record(file, trial["runs"][0])["launches"] == 1 for trial in trials)
    assert len(list((tmp_path / "runs/toy").glob("toy-t*"))) == 12


@pytest.mark.parametrize(
    ("number", "status", "of_child"), [(signal.SIGTERM, 143, 15), (signal.SIGINT, 130, 15), (signal.SIGUSR1, 138, 10)]
)
def test_a_stopped_worker_gives_its_trial_back(tmp_path, number, status, of_child):
    held = hold(tmp_path)
    file = sweep_file(tmp_path, options={"epochs": 8, "hold": held}, parameters={"x": {"values": [1, 2]}})
    worker = start(file)
    run = tmp_path / "runs/toy/toy-t0000-s0"
    until(lambda: (run / "state.json").exists())
    worker.send_signal(number)
    said, _ = worker.communicate(timeout=120)
    assert worker.returncode == status, said
    assert "the same command goes on" in said
    assert run_record(file, "toy/toy-t0000-s0")["status"] == "preempted"
    assert [trial["state"] for trial in outcome(file)["trials"]] == ["waiting"]
    assert len(epochs_of(file, "toy/toy-t0000-s0")) == 1
    held.unlink()
    assert work(file) == 0
    trials = outcome(file)["trials"]
    assert [trial["state"] for trial in trials] == ["complete", "complete"]
    assert epochs_of(file, "toy/toy-t0000-s0") == list(range(8))
    assert run_record(file, "toy/toy-t0000-s0")["launches"] == 2


def test_the_mean_over_seeds_is_the_objective(tmp_path):
    file = sweep_file(tmp_path, lit_defect={"seeds": [0, 1, 5]})
    assert work(file) == 0
    for trial in outcome(file)["trials"]:
        assert trial["seeds"] == [0, 1, 5]
        assert trial["values"] == pytest.approx([trial["params"]["x"] + 10 * seed + 0.01 for seed in (0, 1, 5)])
        assert trial["value"] == pytest.approx(trial["params"]["x"] + 20 + 0.01)
        assert len(trial["runs"]) == 3


def test_the_seed_is_given_to_other_options_as_well(tmp_path):
    file = sweep_file(tmp_path, lit_defect={"seeds": [0, 4], "seeded": ["data.val_seed"]}, run_cap=1)
    assert work(file) == 0
    told = [run_record(file, f"toy/toy-t0000-s{seed}")["told"] for seed in (0, 4)]
    assert [(one["seed_everything"], one["data.val_seed"]) for one in told] == [("0", "0"), ("4", "4")]
    changed = sweep_file(tmp_path, lit_defect={"seeds": [0, 4]}, run_cap=1)
    assert work(changed) == 2  # they are other trainings


def test_pruning_stops_the_training(tmp_path):
    file = sweep_file(
        tmp_path, parameters={"x": {"values": [5, 6, 7, 8, 9, 1]}}, options={"epochs": 200, "pause": 0.25},
        lit_defect={"pruner": "median", "warmup": 1, "seeds": [0, 1]},
    )  # fmt: skip
    quick = file.read_text()
    file.write_text(quick.replace("--pause=0.25", "--pause=0"))
    assert work(file, "--count", "5") == 0  # whose curves stand for those of others
    (tmp_path / "play.py").write_text((tmp_path / "play.py").read_text().replace('number("pause", 0)', "0.25"))
    assert work(file) == 0
    trials = outcome(file)["trials"]
    assert [trial["state"] for trial in trials] == ["complete"] * 5 + ["pruned"]
    assert trials[-1]["value"] is None
    assert 1 < len(epochs_of(file, "toy/toy-t0005-s0")) < 200
    assert not (tmp_path / "runs/toy/toy-t0005-s1").exists()  # the other seed has not been begun


def test_failures_do_not_stop_a_sweep_until_there_are_too_many(tmp_path, capsys):
    file = sweep_file(tmp_path, options={"fails": 2, "nan": 3}, parameters={"x": {"values": [1, 2, 3, 4]}})
    assert work(file) == 1
    trials = outcome(file)["trials"]
    assert [trial["state"] for trial in trials] == ["complete", "failed", "failed", "complete"]
    assert "out of memory" in trials[1]["reason"]
    assert "val/score is nan" in trials[2]["reason"]
    assert "| Traceback: out of memory" in capsys.readouterr().out
    again = sweep_file(tmp_path, name="two", options={"fails": 2, "nan": 3}, lit_defect={"max_failures": 2},
                       parameters={"x": {"values": [1, 2, 3, 4]}})  # fmt: skip
    assert work(again) == 2
    assert "2 trials have failed in succession" in capsys.readouterr().err


def test_what_the_user_must_mend_stops_the_sweep(tmp_path, capsys):
    file = sweep_file(tmp_path, options={"refuses": 1})
    assert work(file) == 2
    assert "--x: cannot be so" in capsys.readouterr().err
    assert [trial["state"] for trial in outcome(file)["trials"]] == ["waiting"]
    play = tmp_path / "play.py"
    play.write_text(play.read_text().replace('number("refuses", -1)', "-1"))  # mended
    assert work(file) == 0
    assert [trial["state"] for trial in outcome(file)["trials"]] == ["complete"] * 3


def test_a_metric_that_is_not_logged_stops_the_first_trial(tmp_path, capsys):
    file = sweep_file(tmp_path, metric={"name": "val/scor", "goal": "maximize"})
    assert work(file) == 2
    assert "val/scor was not logged" in capsys.readouterr().err
    assert len(list((tmp_path / "runs/toy").glob("toy-t*"))) == 1


def test_a_changed_file_is_refused_under_the_same_name(tmp_path, capsys):
    file = sweep_file(tmp_path)
    assert work(file) == 0
    sweep_file(tmp_path, parameters={"x": {"values": [1, 2, 4]}})
    assert work(file) == 2
    assert "parameters.x.values: [1, 2, 3] -> [1, 2, 4]" in capsys.readouterr().err
    sweep_file(tmp_path, run_cap=1)  # how many there are may change
    assert work(file) == 0


def test_more_trials_may_be_asked_for(tmp_path):
    for cap in (2, 3):
        file = sweep_file(tmp_path, method="random", run_cap=cap, parameters={"x": {"min": 0.0, "max": 1.0}})
        assert work(file) == 0
        assert len(outcome(file)["trials"]) == cap


def test_one_worker_draws_again_what_it_has_drawn(tmp_path):
    params = []
    for name in ("a", "b"):
        file = sweep_file(tmp_path, name=name, method="bayes", run_cap=12, options={"epochs": 1},
                          lit_defect={"startup": 3}, parameters={"x": {"min": 0.0, "max": 1.0}})  # fmt: skip
        assert work(file) == 0
        params.append([trial["params"] for trial in outcome(file)["trials"]])
    assert params[0] == params[1]
    assert outcome(file)["importance"] == {"x": 1.0}


def test_a_sweep_without_an_end_needs_a_count(tmp_path, capsys):
    file = sweep_file(tmp_path, method="random")
    assert work(file) == 2
    assert "give --count" in capsys.readouterr().err
    assert work(file, "--count", "2") == 0
    assert len(outcome(file)["trials"]) == 2


# --- claims ---


def test_one_of_many_gets_a_task_and_a_late_one_takes_nothing_away(tmp_path):
    one, two = Claims(tmp_path), Claims(tmp_path)
    held = one.take("t0000")
    assert two.take("t0000") is None
    dead = Claim("t0000", 0, held.claim.path)
    taken = two.take("t0000", dead)
    assert taken.claim.deaths == 1
    assert one.take("t0000", dead) is None  # which had noticed it as well, later
    assert not held.is_mine()
    assert held.lost.is_set()
    assert taken.is_mine()


def test_a_worker_of_another_machine_is_dead_when_its_file_stays_the_same(tmp_path, monkeypatch):
    now = SimpleNamespace(monotonic=lambda: now.seconds, seconds=0.0)
    monkeypatch.setattr("lit_defect.claims.time", now)
    create(tmp_path / "t0000-0.json", {"token": "x", "machine": "elsewhere", "pid": os.getpid(), "worker": "e:1"})
    claims = Claims(tmp_path, dead_after=30.0)
    claim = claims.newest()["t0000"]
    assert not claims.is_dead(claim)  # seen for the first time
    now.seconds = 20.0
    os.utime(claim.path, (0, 0))  # another time than before, whatever the clocks say
    assert not claims.is_dead(claim)
    assert claims.is_alive(claim)
    now.seconds = 50.0
    assert not claims.is_dead(claim)
    now.seconds = 50.1
    assert claims.is_dead(claim)


def test_a_task_belongs_to_its_thread_from_the_moment_that_others_see_it_to_its_end(tmp_path, monkeypatch):
    seen, claims = [], Claims(tmp_path)

    def look_at_once(path, entries):
        made = create(path, entries)
        seen.append(claims.is_dead(claims.newest()["t0000"]))
        return made

    monkeypatch.setattr("lit_defect.claims.create", look_at_once)
    with claims.take("t0000"):
        seen.append(claims.is_dead(claims.newest()["t0000"]))
    assert seen == [False, False]
    assert claims.is_dead(claims.newest()["t0000"]), "ended without being given back"


def test_a_number_that_is_used_again_is_another_process(tmp_path):
    claims = Claims(tmp_path)
    claims.take("t0000")
    claim = claims.newest()["t0000"]
    assert not claims.is_dead(claim)
    entries = json.loads(claim.path.read_text())
    claim.path.write_text(json.dumps({**entries, "born": "1"}))
    assert claims.is_dead(claims.newest()["t0000"])


def test_a_trial_that_kills_its_workers_fails(tmp_path):
    file = sweep_file(tmp_path, parameters={"x": {"values": [1, 2]}}, options={"epochs": 1})
    assert work(file, "--count", "1") == 0
    study_trial_without_worker(file)
    gone = {"token": "x", "machine": "", "pid": 0, "born": "", "worker": "e:1", "deaths": 3}
    from lit_defect.claims import machine

    create(tmp_path / "runs/toy/claims/t0001-0.json", {**gone, "machine": machine()})
    assert work(file) == 0
    last = outcome(file)["trials"][1]
    assert (last["state"], last["reason"]) == ("failed", "its worker has died 4 times")


def study_trial_without_worker(file: Path) -> None:
    from lit_defect.sweep.file import read_sweep
    from lit_defect.sweep.search import open_study

    folder = file.parent / "runs/toy"
    plan = json.loads((folder / "sweep_plan.json").read_text())
    open_study(read_sweep(file), folder, None, plan["id"]).ask()


# --- which value counts ---


def finished(folder: Path, monitor: str | None, table: str) -> RunFolder:
    run = RunFolder(folder / "run")
    run.checkpoints.mkdir(parents=True)
    run.best.touch()
    (run.path / "config.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"monitor": monitor}}}))
    (run.path / "metrics.csv").write_text(table)
    return run


TABLE = "step,lr-AdamW,val/auroc,val/f1,val/loss,test/auroc\n9,,0.6,0.9,0.3,\n9,0.1,,,,\n19,,0.8,0.5,0.5,\n29,,0.7,0.6,0.4,\n30,,,,,0.65\n"


@pytest.mark.parametrize(
    ("monitor", "metric", "which", "value"),
    [
        ("val/auroc", "val/auroc", "checkpoint", 0.8),
        ("val/auroc", "val/f1", "checkpoint", 0.5),
        ("val/loss", "val/auroc", "checkpoint", 0.6),
        (None, "val/auroc", "checkpoint", 0.7),
        ("val/auroc", "test/auroc", "checkpoint", 0.65),
        ("val/auroc", "val/f1", "best", 0.9),
        ("val/auroc", "val/auroc", "last", 0.7),
    ],
)
def test_the_value_is_that_of_the_checkpoint(tmp_path, monitor, metric, which, value):
    assert value_of(finished(tmp_path, monitor, TABLE), metric, "maximize", which) == value


def test_no_value_says_why(tmp_path):
    run = finished(tmp_path, None, TABLE + "39,,nan,,,\n")
    with pytest.raises(NoValueError, match="val/auroc is nan at step 39"):
        value_of(run, "val/auroc", "maximize", "checkpoint")
    with pytest.raises(NotLoggedError, match=r"val/au was not logged; .*has val/auroc, val/f1, val/loss, test/auroc"):
        value_of(run, "val/au", "maximize", "checkpoint")


def test_a_study_of_another_folder_is_not_joined(tmp_path):
    from lit_defect.sweep.file import read_sweep
    from lit_defect.sweep.search import open_study

    sweep, url = read_sweep(sweep_file(tmp_path)), f"sqlite:///{tmp_path}/x.db"
    open_study(sweep, tmp_path, url, "one")
    open_study(sweep, tmp_path, url, "one")
    with pytest.raises(UserError, match="of another folder"):
        open_study(sweep, tmp_path, url, "two")
    with pytest.raises(UserError, match=r"--storage nonsense: expected a URL"):
        open_study(sweep, tmp_path, "nonsense", "one")
