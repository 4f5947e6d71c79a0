"""The sweep's file: what W&B's entries become, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from lit_defect.errors import UserError
from lit_defect.sweep import main
from lit_defect.sweep.commands import check, warnings, words
from lit_defect.sweep.file import Hyperband, read_sweep
from lit_defect.sweep.online import registration
from lit_defect.sweep.search import _first_line, pruner, without_password
from lit_defect.sweep.space import Parameter, combinations, read_parameters
from tests.sweeping import sweep_file


def drawn(entry: dict, number: int = 200) -> tuple[Parameter, list]:
    (parameter,), constant = read_parameters({"x": entry}, "f.yaml")
    assert not constant
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return parameter, [parameter.suggest(study.ask()) for _ in range(number)]


def test_uniform_numbers():
    parameter, values = drawn({"min": 0.5, "max": 2.5})
    assert parameter == Parameter("x", low=0.5, high=2.5)
    assert all(0.5 <= value <= 2.5 for value in values)
    assert len(set(values)) == 200
    assert drawn({"distribution": "uniform", "min": 1, "max": 2})[0] == Parameter("x", low=1, high=2)


def test_whole_numbers():
    for entry in ({"min": 1, "max": 4}, {"distribution": "int_uniform", "min": 1, "max": 4}):
        assert set(drawn(entry)[1]) == {1, 2, 3, 4}
        assert all(type(value) is int for value in drawn(entry)[1])


def test_logarithms_are_uniform():
    _, values = drawn({"distribution": "log_uniform_values", "min": 1e-4, "max": 1.0}, 1000)
    assert sum(value < 1e-2 for value in values) == pytest.approx(500, abs=60)  # half of the decades
    assert min(values) >= 1e-4


def test_multiples_of_q():
    assert set(drawn({"distribution": "q_uniform", "min": 0.05, "max": 0.55, "q": 0.2})[1]) == {0.2, 0.4}
    _, whole = drawn({"distribution": "q_uniform", "min": 3, "max": 9, "q": 2})
    assert set(whole) == {4, 6, 8}
    assert all(type(value) is int for value in whole)
    _, log = drawn({"distribution": "q_log_uniform_values", "min": 8, "max": 256, "q": 8}, 500)
    assert set(log) <= set(range(8, 257, 8))
    assert sum(value <= 40 for value in log) > 200  # of linear ones it would be 80
    assert set(drawn({"distribution": "q_log_uniform_values", "min": 0.1, "max": 0.9, "q": 0.1}, 500)[1]) <= {
        round(n / 10, 1) for n in range(1, 10)
    }


def test_choices_keep_their_kind():
    choices = [1, True, 1.5, "1", None, ["cat"], {"a": 1}]
    _, values = drawn({"values": choices}, 300)
    assert all(any(value is one or (value == one and type(value) is type(one)) for one in choices) for value in values)
    assert {type(value) for value in values} == {type(value) for value in choices}


def test_constants_and_nested_parameters():
    said = {
        "a": {"value": 3},
        "b": {"distribution": "constant", "value": "x"},
        "c": {"values": [7]},
        "model": {"parameters": {"lr": {"min": 0.1, "max": 0.2}, "deep": {"parameters": {"n": {"values": [1, 2]}}}}},
    }
    varied, constant = read_parameters(said, "f")
    assert constant == {"a": 3, "b": "x", "c": 7}
    assert [parameter.name for parameter in varied] == ["model.lr", "model.deep.n"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"distribution": "normal", "mu": 0, "sigma": 1}, "x.distribution normal cannot be mapped.*uniform with min"),
        ({"mu": 0, "sigma": 1}, "normal cannot be mapped"),
        ({"distribution": "beta"}, "beta cannot be mapped"),
        ({"distribution": "log_uniform", "min": -9, "max": 0}, "log_uniform cannot.*not their exponents"),
        ({"distribution": "log_normal"}, "use log_uniform_values"),
        ({"values": [1, 2], "probabilities": [0.1, 0.9]}, "probabilities cannot be mapped: leave them out"),
        ({"distribution": "uniforn", "min": 0, "max": 1}, "uniforn is unknown; did you mean uniform"),
        ({"vales": [1]}, "x.vales is unknown; did you mean value"),
        ({}, "needs `values`, or `min` and `max`"),
        ({"min": 1}, "needs `values`"),
        ({"distribution": "uniform", "min": 1}, "x.max is needed"),
        ({"distribution": "uniform", "min": "1e-4", "max": 1}, "text '1e-4': YAML reads 1.0e-4"),
        ({"min": 2, "max": 1}, "min 2 is not below max 1"),
        ({"distribution": "log_uniform_values", "min": 0, "max": 1}, "a number above 0"),
        ({"distribution": "int_uniform", "min": 0.5, "max": 2}, "whole numbers"),
        ({"distribution": "q_uniform", "min": 0.1, "max": 0.2, "q": 1}, "no two multiples of 1"),
        ({"distribution": "q_uniform", "min": 0, "max": 1, "q": 0}, "q is 0"),
        ({"values": []}, "expected a list"),
        ({"values": [1, 1]}, "has 1 twice"),
        (3, "is 3: expected"),
    ],
)
def test_what_cannot_be_mapped_names_parameter_and_remedy(entry, message):
    with pytest.raises(UserError, match=f"(?s)f.yaml: parameters.*{message}"):
        read_parameters({"x": entry}, "f.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metod": "grid"}, "metod is unknown; did you mean method"),
        ({"method": "bayesian"}, "method is bayesian: expected one of grid, random, bayes"),
        ({"metric": {"nane": "x"}}, "metric.nane is unknown; did you mean name"),
        ({"metric": {"goal": "maximize"}}, "metric.name is needed"),
        ({"metric": {"name": "a", "goal": "up"}}, "metric.goal is up"),
        ({"parameters": None}, "parameters is needed"),
        ({"parameters": {"x": {"value": 1}}}, "nothing that varies"),
        ({"parameters": {"run_id": {"values": [1, 2]}}}, "run_id is set by the sweep itself"),
        ({"parameters": {"a": {"parameters": {"b": {"values": [1, 2]}}}, "a.b": {"value": 1}}}, "a.b stands twice"),
        ({"parameters": {"x": {"min": 0.0, "max": 1.0}}}, "of which a grid has no end: list its `values`"),
        ({"parameters": {"x": {"min": 0, "max": 999_999}}}, "1,000,000 combinations"),
        ({"command": ["python"]}, r"has no \$\{args\}"),
        ({"command": ["${program}", "${args}"]}, "program` is not given"),
        ({"command": ["python", "${args_no_hyphens}"]}, r"args_no_hyphens\}: write \$\{args\}"),
        ({"command": ["python", "--run_id", "x", "${args}"]}, "has --run_id, which the sweep sets"),
        ({"command": ["${envvar:NOT_THERE}", "${args}"]}, "NOT_THERE, which is not set"),
        ({"run_cap": 0}, "run_cap is 0"),
        ({"early_terminate": {"type": "median"}}, "early_terminate.type is median"),
        ({"early_terminate": {"type": "hyperband"}}, "needs min_iter, or max_iter and s"),
        ({"early_terminate": {"type": "hyperband", "max_iter": 9}}, "early_terminate.s is needed"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 9, "max_iter": 9}}, "max_iter is 9"),
        ({"lit_defect": {"seed_s": [0]}}, "lit_defect.seed_s is unknown; did you mean seeds"),
        ({"lit_defect": {"seeds": [0, 0]}}, "seeds is .*different whole numbers"),
        ({"lit_defect": {"sampler": "tpe"}}, "sampler is tpe with method grid"),
        ({"lit_defect": {"pruner": "asha"}}, "pruner is asha: expected one of none, median, hyperband"),
        ({"lit_defect": {"value": "first"}}, "expected one of checkpoint, best, last"),
        (
            {"lit_defect": {"seeds": [0]}, "parameters": {"seed_everything": {"values": [0, 1]}}},
            "both set the seed",
        ),
        ({"lit_defect": {"seeded": ["data.val_seed"]}}, "seeded needs lit_defect.seeds"),
        ({"lit_defect": {"seeds": [0], "seeded": "x"}}, "seeded is x: expected names of options"),
        ({"lit_defect": {"seeds": [0], "seeded": ["x"]}}, "seeded names x, which is set twice"),
        ({"lit_defect": {"seeds": [0], "seeded": ["a", "a"]}}, "seeded names a, which is set twice"),
        ({"lit_defect": {"seeds": [0], "seeded": ["run_id"]}}, "names run_id, which is set by the sweep itself"),
        ({"name": "a/b"}, "name is 'a/b'"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        read_sweep(sweep_file(tmp_path, **changes))


def test_a_file_that_is_none(tmp_path, capsys):
    assert main([str(tmp_path / "gone.yaml")]) == 2
    assert "gone.yaml" in capsys.readouterr().err
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(UserError, match="is no YAML"):
        read_sweep(tmp_path / "broken.yaml")
    (tmp_path / "twice.yaml").write_text("name: a\nname: b\n")
    with pytest.raises(UserError, match="name stands twice"):
        read_sweep(tmp_path / "twice.yaml")


def test_commands_are_written_as_the_command_line_reads_them(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", "/data")
    command = ["${env}", "${interpreter}", "-m", "lit_defect", "--root", "${envvar:PLACE}", "${args}"]
    parameters = {"a": {"values": [None, True]}, "b": {"values": [["x"], ["y"]]}, "c": {"value": "off"}}
    sweep = read_sweep(sweep_file(tmp_path, command=command, parameters=parameters))
    made = words(sweep, {"a": None, "b": ["x"]}, ["--wandb", "off"])
    assert made[1:] == [
        "-m", "lit_defect", "--root", "/data", "--c=off", "--a=null", '--b=["x"]', "--wandb", "off",
    ]  # fmt: skip
    assert made[0].endswith("python") or "python" in made[0]


def test_the_last_parameter_of_a_grid_changes_fastest(tmp_path):
    parameters = {"x": {"values": [1, 2]}, "y": {"min": 0, "max": 2}}
    sweep = read_sweep(sweep_file(tmp_path, parameters=parameters))
    assert combinations(sweep.parameters)[:4] == [
        {"x": 1, "y": 0},
        {"x": 1, "y": 1},
        {"x": 1, "y": 2},
        {"x": 2, "y": 0},
    ]
    assert sweep.limit == 6
    assert read_sweep(sweep_file(tmp_path, parameters=parameters, run_cap=4)).limit == 4


def test_pruners(tmp_path):
    of = {"type": "hyperband", "max_iter": 27, "s": 2, "eta": 3}
    sweep = read_sweep(sweep_file(tmp_path, method="bayes", early_terminate=of))
    assert sweep.hyperband == Hyperband(3, 27, 3)
    assert isinstance(pruner(sweep), optuna.pruners.HyperbandPruner)
    median = read_sweep(sweep_file(tmp_path, lit_defect={"pruner": "median"}))
    assert isinstance(pruner(median), optuna.pruners.MedianPruner)
    assert isinstance(pruner(read_sweep(sweep_file(tmp_path))), optuna.pruners.NopPruner)


def test_a_goal_that_is_not_given_is_told(tmp_path):
    (text,) = warnings(read_sweep(sweep_file(tmp_path, metric={"name": "val/auroc"})))
    assert "the smallest val/auroc is looked for" in text
    assert not warnings(read_sweep(sweep_file(tmp_path, metric={"name": "val/loss"})))


def test_the_test_split_must_not_choose(tmp_path):
    metric = {"name": "test/auroc", "goal": "maximize"}
    assert not warnings(read_sweep(sweep_file(tmp_path, metric=metric)))  # a grid chooses nothing
    (text,) = warnings(read_sweep(sweep_file(tmp_path, metric=metric, method="random", run_cap=3)))
    assert "no test any more" in text
    assert any("no end" in text for text in warnings(read_sweep(sweep_file(tmp_path, method="random"))))


def test_what_is_registered_at_wandb_is_without_our_block(tmp_path):
    nested = {"model": {"parameters": {"lr": {"min": 0.1, "max": 0.2}}}, "x": {"value": 1}}
    file = sweep_file(tmp_path, method="bayes", parameters=nested, lit_defect={"seeds": [0, 1], "trials": 5})
    told = registration(read_sweep(file), tmp_path, ["--a", "b c"])
    assert "lit_defect" not in told
    assert told["parameters"] == {"model.lr": {"min": 0.1, "max": 0.2}, "x": {"value": 1}}
    assert told["run_cap"] == 5
    assert told["command"][:6] == ["${env}", "${interpreter}", "-m", "lit_defect", "sweep", "trial"]
    assert told["command"][-2:] == ["--options=--a 'b c'", "${args}"]


def test_passwords_are_not_shown():
    assert without_password("postgresql://me:se@cret@host:5/db") == "postgresql://me:***@host:5/db"
    assert without_password("postgresql://me@host/db") == "postgresql://me@host/db"
    assert without_password("sqlite:///x.db") == "sqlite:///x.db"
    error = ValueError("cannot reach postgresql://me:se@cret@host\nand more")
    assert _first_line(error, "postgresql://me:se@cret@host:5/db") == "cannot reach postgresql://me:***@host"


def test_lists_and_dry_runs_write_nothing(tmp_path, capsys):
    file = sweep_file(tmp_path)
    for word in ("--list", "--dry_run"):
        assert main([str(file), "--runs_dir", str(tmp_path / "runs"), word]) == 0
    shown = capsys.readouterr().out
    assert "0  x=1" in shown
    assert "--x=1" in shown
    assert not (tmp_path / "runs").exists()


# --- options and metric against a real configuration ---

REAL = ["${interpreter}", "-m", "lit_defect", "fit", "--config", "experiments/classification/elpv_lite0_finetune.yaml"]
LR = {"model.lr": {"values": [0.1, 0.2]}}


def real(tmp_path, monkeypatch, **changes):
    monkeypatch.chdir(Path(__file__).parent.parent)
    metric = {"name": "val/auroc", "goal": "maximize"}
    return read_sweep(sweep_file(tmp_path, **{"command": [*REAL, "${args}"], "metric": metric, **changes}))


@pytest.mark.slow
def test_options_are_checked_with_every_choice(tmp_path, monkeypatch):
    parameters = {"model.augment": {"values": ["none", "flips", "fips"]}, **LR}
    with pytest.raises(UserError, match=r"(?s)sweep.yaml: with .*fips.*model.augment = fips: expected one of none"):
        check(real(tmp_path, monkeypatch, parameters=parameters), [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"model.lrr": {"values": [0.1, 0.2]}}, "unknown key --model.lrr; did you mean lr"),
        ({"trainer.max_epochs": {"distribution": "uniform", "min": 1, "max": 2.5}}, "max_epochs = 2.5: expected int"),
    ],
)
def test_options_are_checked_at_both_ends(tmp_path, monkeypatch, parameters, message):
    with pytest.raises(UserError, match=message):
        check(real(tmp_path, monkeypatch, parameters=parameters), [])


@pytest.mark.slow
def test_options_that_are_given_the_seed_are_checked(tmp_path, monkeypatch):
    seeded = {"seeds": [3], "seeded": ["data.val_sed"]}
    with pytest.raises(UserError, match=r"unknown key --data\.val_sed; did you mean val_seed"):
        check(real(tmp_path, monkeypatch, parameters=LR, lit_defect=seeded), [])
    seeded["seeded"] = ["data.val_seed"]
    config = check(real(tmp_path, monkeypatch, parameters=LR, lit_defect=seeded), [])
    assert config["data"]["init_args"]["val_seed"] == 3


@pytest.fixture
def config(monkeypatch):
    """The configuration that every command comes to."""
    said = {"test_after_fit": True, "model": {"init_args": {"monitor": "val/auroc"}}}
    monkeypatch.setattr("lit_defect.study_check.parsed", lambda commands: dict.fromkeys(commands, said))
    return said


def test_a_test_metric_needs_the_test(tmp_path, monkeypatch, config):
    sweep = real(tmp_path, monkeypatch, metric={"name": "test/auroc", "goal": "maximize"}, parameters=LR)
    assert check(sweep, []) is config
    config["test_after_fit"] = False
    with pytest.raises(UserError, match="does not test: add --test_after_fit=true"):
        check(sweep, [])


def test_a_metric_that_is_not_monitored_is_looked_for(tmp_path, monkeypatch, config):
    asked = []
    monkeypatch.setattr(
        "lit_defect.sweep.commands._probed", lambda *words: asked.append(words) or ["val/f1", "val/loss"]
    )
    check(real(tmp_path, monkeypatch, parameters=LR), [])
    assert not asked
    check(real(tmp_path, monkeypatch, parameters=LR, metric={"name": "val/f1"}), [])
    assert len(asked) == 1
    with pytest.raises(UserError, match=r"val/f2, which this experiment does not log; did you mean val/f1\?"):
        check(real(tmp_path, monkeypatch, parameters=LR, metric={"name": "val/f2"}), [])
    check(real(tmp_path, monkeypatch, parameters=LR, metric={"name": "val/f2"}), [], probe=False)


def test_trials_are_runs_of_fit(tmp_path, monkeypatch):
    command = [word if word != "fit" else "validate" for word in REAL]
    with pytest.raises(UserError, match="verb validate"):
        check(real(tmp_path, monkeypatch, command=[*command, "${args}"]), [])
