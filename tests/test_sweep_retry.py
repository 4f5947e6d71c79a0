"""`sweep retry`: a failed trial is run again as the trial that it was, and counts once."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from lit_defect.claims import Claims, create, machine
from lit_defect.report.sweeps import read_sweep as read_summary
from lit_defect.sweep import main
from lit_defect.sweep.attempts import counted, retry
from lit_defect.sweep.file import read_sweep
from lit_defect.sweep.search import importance, open_study
from tests.sweeping import epochs_of, outcome, run_record, sweep_file


def work(file: Path, *words: str) -> int:
    return main([str(file), "--runs_dir", str(file.parent / "runs"), *words])


def again(file: Path, *words: str) -> int:
    return main(["retry", str(file), "--runs_dir", str(file.parent / "runs"), *words])


def broken(file: Path) -> Path:
    """Lets trainings fail after an epoch from their second on as long as the file that is given is there."""
    flag = file.parent / "full"
    flag.touch()
    program = file.parent / "play.py"
    fault = f"    if epoch >= 1 and Path({str(flag)!r}).exists():\n        note('failed'); sys.exit('No space left')\n"
    program.write_text(program.read_text().replace("    if stopped:\n", f"{fault}    if stopped:\n"))
    return flag


def test_a_trial_that_has_failed_goes_on_in_its_folders_and_counts_once(tmp_path, capsys):
    file = sweep_file(tmp_path, options={"epochs": 4}, lit_defect={"seeds": [0, 1], "max_failures": 9})
    assert work(file, "--count", "1") == 0
    flag = broken(file)
    assert work(file) == 1
    assert [trial["state"] for trial in outcome(file)["trials"]] == ["complete", "failed", "failed"]
    capsys.readouterr()
    assert main(["status", str(file), "--runs_dir", str(tmp_path / "runs")]) == 0
    assert f"failed trials are run again after: sweep retry {file}" in capsys.readouterr().out
    flag.unlink()
    assert again(file, "--trials", "2") == 0
    assert "trials that wait to be run again: 2\n" in capsys.readouterr().out
    trials = outcome(file)["trials"]
    assert [trial["state"] for trial in trials] == ["complete", "failed", "waiting"]
    assert trials[2]["params"] == {"x": 3}
    assert trials[2]["runs"] == ["toy/toy-t0002-s0", "toy/toy-t0002-s1"]
    assert again(file) == 0
    assert "trials that wait to be run again: 1\n" in capsys.readouterr().out
    assert again(file) == 0
    assert "no trial has failed and does not wait already" in capsys.readouterr().out
    assert work(file) == 0
    trials = outcome(file)["trials"]
    assert [(trial["number"], trial["params"]["x"]) for trial in trials] == [(0, 1), (1, 2), (2, 3)]
    assert [trial["state"] for trial in trials] == ["complete"] * 3
    assert [trial["attempts"] for trial in trials] == [1, 2, 2]
    assert trials[2]["runs"] == ["toy/toy-t0002-s0", "toy/toy-t0002-s1"]
    assert [run_record(file, run)["launches"] for run in trials[2]["runs"]] == [2, 1]  # the second was never begun
    assert all(epochs_of(file, run) == [0, 1, 2, 3] for trial in trials for run in trial["runs"])
    assert [trial["number"] for trial in read_summary(tmp_path / "runs/toy").trials] == [0, 1, 2]
    assert work(file) == 0  # nothing is left
    assert outcome(file)["trials"] == trials


@pytest.mark.parametrize("method", ["grid", "random"])
def test_numbers_and_parameters_go_on_as_if_nothing_had_failed(tmp_path, method):
    changes = {"method": method, "run_cap": 6, "options": {"epochs": 4}, "lit_defect": {"max_failures": 9}}
    changes["parameters"] = {
        "x": {"values": list(range(6))},
        **({} if method == "grid" else {"y": {"min": 0.0, "max": 1.0}}),
    }
    whole = sweep_file(tmp_path, name="whole", **changes)
    assert work(whole) == 0
    file = sweep_file(tmp_path, **changes)
    flag = broken(file)
    assert work(file, "--count", "2") == 1
    assert again(file) == 0
    assert work(file, "--count", "3") == 1  # both again, and a third
    flag.unlink()
    assert again(file, "--trials", "0", "1") == 0
    assert work(file) == 0
    assert again(file) == 0
    assert work(file) == 0
    trials = outcome(file)["trials"]
    assert [trial["params"] for trial in trials] == [trial["params"] for trial in outcome(whole)["trials"]]
    assert [(trial["state"], trial["attempts"]) for trial in trials] == [
        ("complete", 3), ("complete", 3), ("complete", 2), *[("complete", 1)] * 3,
    ]  # fmt: skip
    assert len(list((tmp_path / "runs/toy").glob("toy-t*"))) == 6


@pytest.mark.parametrize("method", ["grid", "random"])
def test_numbers_and_parameters_go_on_under_hyperband_too_which_shows_samplers_a_part_of_the_trials(tmp_path, method):
    bands = {"type": "hyperband", "min_iter": 1, "max_iter": 27}
    parameters = {"x": {"values": list(range(12))}, **({} if method == "grid" else {"y": {"min": 0.0, "max": 1.0}})}
    file = sweep_file(tmp_path, method=method, run_cap=12, parameters=parameters, early_terminate=bands)
    sweep = read_sweep(file)

    def drawn(folder: Path, failing: int) -> list[dict[str, object]]:
        folder.mkdir()
        study = open_study(sweep, folder, None, "of this folder")
        found = []
        for place in range(12):
            trial = study.ask()
            found.append({parameter.name: parameter.suggest(trial) for parameter in sweep.parameters})
            trial.report(1.0, 1)
            trial.should_prune()  # makes the brackets
            if place < failing:
                study.tell(trial, state=TrialState.FAIL)
                assert retry(study, sweep, Claims(folder / "claims")) == [place]
        return found

    assert drawn(tmp_path / "some", failing=3) == drawn(tmp_path / "none", failing=0)


def test_what_has_failed_is_not_looked_at_by_importance(tmp_path):
    file = sweep_file(tmp_path, method="random", run_cap=10, parameters={"x": {"min": 0.0, "max": 1.0}},
                      lit_defect={"max_failures": 99}, options={"epochs": 2})  # fmt: skip
    flag = broken(file)
    assert work(file, "--count", "4") == 1
    flag.unlink()
    assert again(file) == 0
    assert work(file) == 0
    sweep = read_sweep(file)
    study = study_of(file)
    assert len(study.trials) == 14
    assert list(counted(study, sweep)) == list(range(10))
    assert importance(study, sweep) == {"x": 1.0}


def test_importance_holds_five_trials_at_least_against_the_others(tmp_path):
    """Of 20 trials Optuna would take the best two, and call the parameter important that does nothing."""
    parameters = {name: {"min": 0.0, "max": 1.0} for name in ("x", "y", "z")}
    sweep = read_sweep(sweep_file(tmp_path, method="random", run_cap=20, parameters=parameters))
    right = 0
    for seed in range(10):
        study = optuna.create_study(direction=sweep.goal, sampler=optuna.samplers.RandomSampler(seed=seed))
        noise = random.Random(seed)
        for _ in range(20):
            trial = study.ask()
            drawn = [trial.suggest_float(name, 0, 1) for name in parameters]
            study.tell(trial, drawn[0] + 0.1 * noise.gauss(0, 1))
        shares = importance(study, sweep)
        assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
        right += max(shares, key=shares.get) == "x"
    assert right == 10


def study_of(file: Path, url: str | None = None):
    folder = file.parent / "runs/toy"
    plan = json.loads((folder / "sweep_plan.json").read_text())
    return open_study(read_sweep(file), folder, url, plan["id"])


@pytest.mark.parametrize("database", [False, True])
def test_of_many_at_once_one_lets_a_trial_be_run_again(tmp_path, database):
    file = sweep_file(tmp_path, lit_defect={"max_failures": 9})
    url = f"sqlite:///{tmp_path}/x.db" if database else None
    flag = broken(file)
    assert work(file, *(["--storage", url] if url else [])) == 1
    flag.unlink()
    sweep, together = read_sweep(file), threading.Barrier(4)

    def ask(_: int) -> list[int]:
        study, claims = study_of(file, url), Claims(tmp_path / "runs/toy/claims")
        together.wait()
        return retry(study, sweep, claims)

    with ThreadPoolExecutor(4) as pool:
        begun = sorted(number for numbers in pool.map(ask, range(4)) for number in numbers)
    assert begun == [0, 1, 2]
    assert len(study_of(file, url).trials) == 6
    assert work(file, *(["--storage", url] if url else [])) == 0
    assert [trial["attempts"] for trial in outcome(file)["trials"]] == [2, 2, 2]


def test_who_comes_late_does_not_let_a_trial_be_run_again_twice(tmp_path, monkeypatch):
    file = sweep_file(tmp_path, parameters={"x": {"values": [1, 2]}})
    broken(file)
    assert work(file) == 1
    late, sweep, claims = study_of(file), read_sweep(file), Claims(tmp_path / "runs/toy/claims")
    newest = claims.newest

    def look():
        monkeypatch.undo()
        assert retry(study_of(file), sweep, Claims(claims.folder), [0]) == [0]
        return newest()

    monkeypatch.setattr(claims, "newest", look)  # after it has seen which have failed
    assert retry(late, sweep, claims) == [1]
    assert len(study_of(file).trials) == 4


def test_what_died_while_it_let_a_trial_be_run_again_is_no_hindrance(tmp_path):
    file = sweep_file(tmp_path, parameters={"x": {"values": [1, 2]}})
    flag = broken(file)
    assert work(file) == 1
    flag.unlink()
    gone = {"token": "x", "machine": machine(), "pid": 0, "born": "", "worker": "e:1", "deaths": 0}
    create(tmp_path / "runs/toy/claims/t0000.1-0.json", gone)
    assert again(file) == 0
    assert work(file) == 0
    assert [(trial["state"], trial["attempts"]) for trial in outcome(file)["trials"]] == [("complete", 2)] * 2


def test_only_what_has_failed_is_run_again(tmp_path, capsys):
    file = sweep_file(tmp_path)
    assert again(file) == 2
    assert "has no sweep yet" in capsys.readouterr().err
    assert work(file) == 0
    for number, said in (("1", "--trials 1: it is complete, and only failed ones"), ("7", "there is no such trial")):
        assert again(file, "--trials", number) == 2
        assert said in capsys.readouterr().err
    assert again(file) == 0
    assert [trial["attempts"] for trial in outcome(file)["trials"]] == [1, 1, 1]


@pytest.mark.parametrize("verb", [[], ["status"], ["retry"]])
def test_without_optuna_it_says_what_to_install(tmp_path, verb):
    file = sweep_file(tmp_path)
    assert work(file) == 0
    code = "import sys; sys.modules['optuna'] = None; from lit_defect.sweep import main; sys.exit(main(sys.argv[1:]))"
    words = [*verb, str(file), "--runs_dir", str(tmp_path / "runs"), *([] if verb else ["--offline"])]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "error: a sweep off line needs optuna: pip install 'lit_defect[sweep]'\n"
