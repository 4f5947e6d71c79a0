"""Where metrics go: the CSV file through resumption, W&B in all its moods."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import wandb

from lit_defect.callbacks.tracking import MetricsCSV, finishing, wandb_logger
from lit_defect.runs import RunFolder

CONFIG = {"model": {"class_path": "DefectClassifier", "init_args": {"lr": 0.25}}, "seed_everything": 3}


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def log(folder: Path, *records: tuple[int, dict[str, float]]) -> None:
    """One launch of a run."""
    logger = MetricsCSV(folder)
    for step, metrics in records:
        logger.log_metrics(metrics, step)
    logger.save()


# --- CSV ---


def test_a_second_launch_goes_on_with_the_file(tmp_path):
    log(tmp_path, (0, {"loss": 1.0}), (1, {"loss": 0.5}))
    log(tmp_path, (2, {"loss": 0.25}))
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [("0", "1.0"), ("1", "0.5"), ("2", "0.25")]


def test_a_new_column_comes_into_the_old_rows_empty(tmp_path):
    log(tmp_path, (0, {"loss": 1.0}))
    log(tmp_path, (1, {"loss": 0.5, "val/auroc": 0.75}), (2, {"val/auroc": 0.875}))
    found = [(row["step"], row["loss"], row["val/auroc"]) for row in rows(tmp_path)]
    assert found == [("0", "1.0", ""), ("1", "0.5", "0.75"), ("2", "", "0.875")]


def test_rewinding_drops_what_will_be_logged_again(tmp_path):
    log(tmp_path, (0, {"loss": 1.0}), (1, {"loss": 0.5, "rate": 3.0}), (2, {"loss": 0.1}))
    resumed = MetricsCSV(tmp_path)
    resumed.rewind(1)
    resumed.log_metrics({"loss": 0.25, "new": 1.0}, 1)
    resumed.save()
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [("0", "1.0"), ("1", "0.25")]
    assert not list(tmp_path.glob("*.tmp"))


def test_rewinding_without_a_file_is_nothing(tmp_path):
    logger = MetricsCSV(tmp_path)
    logger.rewind(5)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.save()
    assert len(rows(tmp_path)) == 1


# --- W&B ---


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run folder on a machine where nobody is logged in, and where a question would end the test."""

    def never(*_: object, **__: object) -> None:
        raise KeyboardInterrupt("W&B asked for a login")

    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setattr("wandb.sdk.wandb_login._login", never)
    return RunFolder(tmp_path / "runs" / "solar cells" / "one")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Arguments of every attempt to start W&B; each attempt fails."""
    calls: list[dict] = []

    def fails(**arguments: object) -> None:
        calls.append(arguments)
        raise RuntimeError("no server")

    monkeypatch.setattr(wandb, "init", fails)
    return calls


def test_a_real_run_off_line_lies_in_the_run_folder(run):
    with finishing():
        logger = wandb_logger("auto", run, CONFIG)
        assert logger is not None
        logger.log_metrics({"val/auroc": 0.75}, step=1)
    (record,) = (run.path / "wandb").glob("offline-run-*/run-*.wandb")
    assert record.name == "run-solar-cells-one.wandb"
    inspect = [Path(sys.executable).with_name("wandb"), "leet", "inspect"]
    if subprocess.run([*inspect, "--help"], capture_output=True, timeout=60).returncode:
        pytest.skip("this version of wandb cannot read a run back without a server")
    done = subprocess.run(
        [*inspect, "--summary", "--json", record.parent],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    told = json.loads(done.stdout)
    assert told["config"] == CONFIG
    assert told["tags"] == ["DefectClassifier"]
    assert told["summary"]["val/auroc"] == 0.75
    assert told["name"] == "solar cells/one"
    assert told["state"] == "finished"


@pytest.mark.parametrize(("mode", "variable"), [("off", None), ("auto", "disabled"), ("online", "disabled")])
def test_off_is_off(run, asked, monkeypatch, mode, variable):
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    assert wandb_logger(mode, run, CONFIG) is None
    assert asked == []
    assert not run.path.exists()


@pytest.mark.parametrize(
    ("mode", "key", "variable", "tried"),
    [
        ("auto", "", None, ["offline"]),
        ("auto", "k" * 40, None, ["online", "offline"]),
        ("auto", "k" * 40, "offline", ["offline"]),
        ("offline", "k" * 40, None, ["offline"]),
        ("online", "k" * 40, "offline", ["online", "offline"]),
        ("online", "", None, ["offline"]),
    ],
)
def test_which_modes_are_tried_and_that_none_fails_the_run(run, asked, monkeypatch, mode, key, variable, tried):
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    with pytest.warns(UserWarning, match="no server"):
        assert wandb_logger(mode, run, CONFIG) is None
    assert [call["mode"] for call in asked] == tried
    assert all(call["config"] == CONFIG for call in asked)


def test_a_login_in_the_netrc_file_counts(run, asked, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "k" * 40)
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.warns(UserWarning, match="no server"):
        wandb_logger("auto", run, CONFIG)
    assert [call["mode"] for call in asked] == ["online", "offline"]
    (tmp_path / "netrc").write_text("machine elsewhere login user password x")
    asked.clear()
    with pytest.warns(UserWarning, match="no server"):
        wandb_logger("auto", run, CONFIG)
    assert [call["mode"] for call in asked] == ["offline"]


def test_on_line_without_a_key_asks_nobody_and_goes_off_line(run):
    with finishing(), pytest.warns(UserWarning, match=r"WANDB_API_KEY.*off line"):
        logger = wandb_logger("online", run, CONFIG)
    assert logger is not None
    assert list((run.path / "wandb").glob("offline-run-*/run-*.wandb"))
