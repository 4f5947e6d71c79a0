"""A sweep of the real `fit` on tiny pictures."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_defect.sweep import main
from tests.fakes import make_mvtec
from tests.sweeping import outcome, run_record, start, sweep_file, until

pytestmark = pytest.mark.slow


def tiny_sweep(folder: Path, epochs: int = 3, **changes: Any) -> Path:
    root = make_mvtec(folder / "data", train_good=16, test_good=8, defects={"crack": 14, "hole": 10})
    network = {"backbone": "test_resnet", "weights": None, "transfer": "all", "image_size": 32}
    pictures = {"root": str(root), "setting": "supervised", "image_size": 32, "batch_size": 8}
    said = {
        "experiment": "tiny",
        "seed_everything": 7,
        "trainer": {"max_epochs": epochs, "accelerator": "cpu"},
        "model": {"class_path": "DefectClassifier", "init_args": network},
        "data": {"class_path": "MVTecAD", "init_args": pictures},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(said))
    command = ["${interpreter}", "-m", "lit_defect", "fit", "--config", str(folder / "tiny.yaml"), "--wandb=off"]
    return sweep_file(
        folder,
        **{
            "method": "bayes",
            "metric": {"name": "val/average_precision", "goal": "maximize"},  # which is not what the task monitors
            "command": [*command, "${args}"],
            "parameters": {"model.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}},
            "run_cap": 2,
            **changes,
        },
    )


def work(file: Path, *words: str) -> int:
    return main([str(file), "--runs_dir", str(file.parent / "runs"), *words])


def test_trials_are_runs_and_the_value_is_that_of_the_checkpoint(tmp_path):
    file = tiny_sweep(tmp_path)
    assert work(file) == 0
    trials = outcome(file)["trials"]
    assert [trial["runs"] for trial in trials] == [["tiny/toy-t0000-s7"], ["tiny/toy-t0001-s7"]]
    for trial in trials:
        run = tmp_path / "runs" / trial["runs"][0]
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert config["model"]["init_args"]["lr"] == pytest.approx(trial["params"]["model.lr"])
        assert run_record(file, trial["runs"][0])["status"] == "finished"
        with (run / "metrics.csv").open(newline="") as lines:
            rows = [row for row in csv.DictReader(lines) if row["val/auroc"]]
        best = max(rows, key=lambda row: float(row["val/auroc"]))  # what the checkpoint was chosen by
        assert trial["value"] == float(best["val/average_precision"])


def test_mistakes_are_found_before_the_first_trial(tmp_path, capsys):
    assert work(tiny_sweep(tmp_path, metric={"name": "val/aurox", "goal": "maximize"})) == 2
    said = capsys.readouterr().err
    assert "val/aurox, which this experiment does not log; did you mean val/auroc?" in said
    assert "val/average_precision" in said
    assert work(tiny_sweep(tmp_path, parameters={"model.lrr": {"values": [1, 2]}})) == 2
    assert "unknown key --model.lrr" in capsys.readouterr().err
    assert work(tiny_sweep(tmp_path, parameters={"model.warmup": {"values": [2.0, 3.0]}})) == 2
    assert "warmup = 2.0: expected a share" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_stopped_trial_goes_on_from_its_state(tmp_path):
    file = tiny_sweep(tmp_path, epochs=40, metric={"name": "val/auroc", "goal": "maximize"}, run_cap=1)
    worker = start(file)
    run = tmp_path / "runs/tiny/toy-t0000-s7"
    until(lambda: (run / "checkpoints/last.ckpt").exists(), 120)
    worker.send_signal(signal.SIGTERM)
    said, _ = worker.communicate(timeout=120)
    assert worker.returncode == 143, said
    assert [trial["state"] for trial in outcome(file)["trials"]] == ["waiting"]
    assert work(file) == 0
    (trial,) = outcome(file)["trials"]
    assert trial["state"] == "complete"
    assert run_record(file, trial["runs"][0])["epochs"] == 40
    assert len(run_record(file, trial["runs"][0])["resumed"]) == 1
    assert validated(run) == list(range(40))  # each epoch once


def test_a_killed_workers_training_ends_and_goes_on(tmp_path):
    """The training is tied to its worker: it saves its state, and another worker takes the trial up."""
    file = tiny_sweep(tmp_path, epochs=40, metric={"name": "val/auroc", "goal": "maximize"}, run_cap=1)
    worker = start(file)
    run = tmp_path / "runs/tiny/toy-t0000-s7"
    until(lambda: (run / "checkpoints/last.ckpt").exists(), 120)
    worker.kill()
    worker.wait()
    assert work(file) == 0
    (trial,) = outcome(file)["trials"]
    assert trial["state"] == "complete"
    assert run_record(file, trial["runs"][0])["status"] == "finished"
    assert len(run_record(file, trial["runs"][0])["resumed"]) == 1
    assert validated(run) == list(range(40))


def test_a_trial_whose_training_was_killed_goes_on_from_its_state_when_it_is_run_again(tmp_path):
    file = tiny_sweep(tmp_path, epochs=40, metric={"name": "val/auroc", "goal": "maximize"}, run_cap=1)
    worker = start(file)
    run = tmp_path / "runs/tiny/toy-t0000-s7"
    until(lambda: (run / "checkpoints/last.ckpt").exists(), 120)
    os.kill(run_record(file, "tiny/toy-t0000-s7")["pid"], signal.SIGKILL)  # as the kernel does for want of memory
    said, _ = worker.communicate(timeout=120)
    assert worker.returncode == 1, said
    assert "exit status 137" in outcome(file)["trials"][0]["reason"]
    assert main(["retry", str(file), "--runs_dir", str(tmp_path / "runs")]) == 0
    assert work(file) == 0
    (trial,) = outcome(file)["trials"]
    assert (trial["state"], trial["attempts"]) == ("complete", 2)
    assert len(run_record(file, trial["runs"][0])["resumed"]) == 1
    assert validated(run) == list(range(40))


def validated(run: Path) -> list[int]:
    """Epochs that have a row of the validation, in order."""
    with (run / "metrics.csv").open(newline="") as lines:
        return [int(row["epoch"]) for row in csv.DictReader(lines) if row["val/auroc"]]
