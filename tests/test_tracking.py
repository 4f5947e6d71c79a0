"""Where metrics go: the CSV file through resumption, W&B in all its moods."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import wandb
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from lit_defect.callbacks import tracking
from lit_defect.callbacks.tracking import LearningRate, MetricsCSV, _logged_steps, finishing, wandb_logger
from lit_defect.runs import RunFolder
from lit_defect.tracking_login import logged_in, server
from tests.sweeping import until
from tests.wandb_files import told

LOGIN = wandb.sdk.wandb_login._login
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


@pytest.mark.parametrize("kept", [8, 30, -1, -6, -12])
def test_a_half_line_of_a_killed_run_goes(tmp_path, kept):
    log(tmp_path, (0, {"loss": 1.0, "rate": 0.125}), (1, {"loss": 0.5, "rate": 0.25}), (2, {"loss": 0.5, "rate": 0.5}))
    file = tmp_path / "metrics.csv"
    file.write_bytes(file.read_bytes()[:kept])
    whole = file.read_text().count("\n") - 1
    assert _logged_steps(RunFolder(tmp_path)) == (
        {} if whole < 1 else dict.fromkeys(["loss", "rate", "step"], whole - 1)
    )
    resumed = MetricsCSV(tmp_path)
    resumed.rewind(2)
    resumed.log_metrics({"loss": 0.25, "rate": 1.0}, 2)
    resumed.save()
    assert [row["step"] for row in rows(tmp_path)] == [*map(str, range(max(0, min(whole, 2)))), "2"]
    assert {len(line.split(",")) for line in file.read_text().splitlines()} == {3}


def test_a_header_may_be_torn_within_a_letter(tmp_path):
    (tmp_path / "metrics.csv").write_bytes("step,recall/Käse".encode()[:13])
    assert _logged_steps(RunFolder(tmp_path)) == {}
    resumed = MetricsCSV(tmp_path)
    resumed.rewind(0)
    resumed.log_metrics({"recall/Käse": 1.0}, 0)
    resumed.save()
    assert rows(tmp_path) == [{"recall/Käse": "1.0", "step": "0"}]


def test_a_full_disk_takes_no_rows_where_columns_are_added_and_mixes_none(tmp_path, monkeypatch):
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.save()
    before = (tmp_path / "metrics.csv").read_bytes()
    logger.log_metrics({"auroc": 0.5}, 1)
    with monkeypatch.context() as patched:
        patched.setattr(tracking, "whole_file", lambda _: Path("/dev/full").open("wb"))  # noqa: SIM115
        for _ in range(2):  # again at the end of the run that this breaks off
            with pytest.raises(OSError, match="No space left"):
                logger.save()
            assert (tmp_path / "metrics.csv").read_bytes() == before
    logger.save()
    assert rows(tmp_path) == [
        {"auroc": "", "loss": "1.0", "step": "0"}, {"auroc": "0.5", "loss": "", "step": "1"}
    ]  # fmt: skip


def test_rewinding_without_a_file_is_nothing(tmp_path):
    logger = MetricsCSV(tmp_path)
    logger.rewind(5)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.save()
    assert len(rows(tmp_path)) == 1


@pytest.mark.parametrize(("rates", "columns"), [((0.5, 0.5), {"lr-SGD"}), ((0.5, 0.25), {"lr-SGD", "lr-SGD/least"})])
def test_rates_are_two_columns_at_most(tmp_path, rates, columns):
    model = BoringModel()
    groups = [{"params": [weight], "lr": rate} for weight, rate in zip(model.parameters(), rates, strict=True)]
    model.configure_optimizers = lambda: torch.optim.SGD(groups)
    trainer = Trainer(
        accelerator="cpu", max_steps=2, limit_val_batches=0, log_every_n_steps=1, logger=MetricsCSV(tmp_path),
        callbacks=[LearningRate("step")], enable_checkpointing=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(model)
    found = rows(tmp_path)
    assert {name for name in found[0] if name.startswith("lr-")} == columns
    assert [float(found[1][name]) for name in sorted(columns)] == sorted(set(rates), reverse=True)


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
    assert "WANDB_DATA_DIR" not in os.environ, "of this run's folder, and there may be a next one"
    assert all(call["config"] == CONFIG for call in asked)


def test_without_an_answer_a_run_is_kept_off_line(run, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setattr("lit_defect.callbacks.tracking._LOGIN_TIMEOUT", 1.0)
    monkeypatch.setattr("wandb.sdk.wandb_login._login", LOGIN)  # it has a key, so that it need not ask
    with finishing(), pytest.warns(UserWarning, match="could not be started on line"):
        logger = wandb_logger("auto", run, CONFIG)
    assert logger is not None
    assert list((run.path / "wandb").glob("offline-run-*/run-*.wandb"))


def services() -> list[int]:
    """Process ids of W&B's own processes that serve this one and still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            words = path.read_bytes().split(b"\0")
            if words[0].endswith(b"wandb-core") and str(os.getpid()).encode() in words:
                found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").is_file(), reason="looks for processes in /proc")
def test_what_was_logged_outlives_the_process_of_wandb(run):
    """Schedulers signal every process of a job; that of W&B ends at once, whatever it still holds in memory."""

    @finishing()
    def launch() -> None:
        logger = wandb_logger("auto", run, CONFIG)
        logger.log_metrics({"val/auroc": 0.75}, step=1)
        (file,) = (run.path / "wandb").glob("offline-run-*/run-*.wandb")
        until(lambda: b"val/auroc" in file.read_bytes(), 10)  # W&B's own settings take up to 15 seconds
        for service in services():
            os.kill(service, signal.SIGTERM)
        while services():
            time.sleep(0.05)

    with pytest.warns(UserWarning, match="finishing the run failed"):
        launch()
    (folder,) = (run.path / "wandb").glob("offline-run-*")
    found = told(folder)
    assert (found["config"], found["summary"]["val/auroc"]) == (CONFIG, 0.75)
    with finishing():
        assert wandb_logger("auto", RunFolder(run.path.with_name("next")), CONFIG) is not None


@pytest.mark.parametrize("machine", ["api.wandb.ai", "api.forge.coreweave.com"])
def test_wandb_is_known_by_either_name(monkeypatch, tmp_path, run, machine):
    (tmp_path / "netrc").write_text(f"machine {machine} login user password " + "k" * 40)
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    assert logged_in()
    (tmp_path / "settings").write_text("[default]\nbase_url = https://wandb.factory.example:8080\n")
    assert server() == "https://wandb.factory.example:8080"
    assert not logged_in()
    (tmp_path / "netrc").write_text("machine wandb.factory.example:8080 login user password " + "k" * 40)
    assert logged_in()


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
