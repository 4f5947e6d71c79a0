"""Whole runs with a real W&B off line: what a reader would see, through restarts, failures and evaluations."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from lightning.pytorch import Callback
from PIL import Image

from lit_defect.cli import main
from tests.anomaly_diffusion import make_base, make_parts
from tests.anomaly_diffusion import write_config as generator_config
from tests.segmentation import make_tiles
from tests.segmentation import write_config as segmenter_config
from tests.wandb_files import artifacts, history, launches, off_line, records, told, write_config

STEP = "trainer/global_step"


def command(folder: Path, *arguments: object, **environment: str) -> Any:
    words = [str(argument) for argument in arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["lit_defect", *words])
        for name in ("LIT_DEFECT_RUN_ID", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        patch.setenv("LIT_DEFECT_CACHE", str(folder / "cache"))
        off_line(patch, folder / "home")
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.chdir(folder)
        return main()


def csv_rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tracked")
    write_config(folder / "tiny.yaml")
    return folder


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """A finished fit with its test."""
    command(place, "fit", "--config", "tiny.yaml", "--run_id", "one", "--test_after_fit", "true")
    return place / "runs" / "tiny" / "one"


@pytest.fixture(scope="module")
def seen(run: Path) -> Path:
    (folder,) = launches(run)
    return folder


# --- one run ---


def test_config_record_and_labels_of_a_run(run, seen):
    found, record = told(seen), json.loads((run / "run.json").read_text())
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert {key: value for key, value in found["config"].items() if key not in ("run", "lineage")} == config
    assert found["config"]["run"]["commit"] == record["commit"]
    assert found["config"]["run"]["data_fingerprint"] == record["data_fingerprint"]
    assert found["config"]["run"]["data"]["counts"]["test"] == {"good": 13, "defective": 10}
    assert found["config"]["run"]["versions"]["torch"] == record["versions"]["torch"]
    (begun,) = records(seen, "run")
    assert (begun["run_group"], begun["job_type"], begun["run_id"]) == ("tiny", "fit", "tiny-one")
    assert begun["tags"] == ["DefectClassifier", "MVTecAD"]
    assert begun["notes"].startswith("python -m lit_defect fit --config tiny.yaml")
    assert (found["state"], found["exit_code"], found["summary"]["status"]) == ("finished", 0, "finished")


def test_curves_run_against_the_global_step_and_the_summary_has_the_best(run, seen):
    rows = [row for row in history(seen) if "train/loss" in row]
    there = [(int(row["step"]), float(row["train/loss"])) for row in csv_rows(run) if row["train/loss"]]
    assert [(row[STEP], row["train/loss"]) for row in rows] == there
    axes = {metric.get("name") or metric.get("glob_name"): metric for metric in records(seen, "metric")}
    assert axes["*"]["step_metric"] == STEP or axes["*"].get("step_metric_index")
    best = max(float(row["val/auroc"]) for row in csv_rows(run) if row["val/auroc"])
    assert told(seen)["summary"]["val/auroc"] == {"max": best}


def test_results_stand_in_the_summary_with_their_intervals(run, seen):
    summary, result = told(seen)["summary"], json.loads((run / "test_metrics.json").read_text())
    assert [summary[f"test/auroc{suffix}"] for suffix in ("", "_low", "_high")] == [
        result["auroc"][key] for key in ("value", "low", "high")
    ]


def test_media_are_there_and_open(run, seen):
    summary = told(seen)["summary"]
    figures = {key for key in summary if key.startswith("figures/")}
    assert {"figures/pseudo_anomalies", "figures/test_roc", "figures/test_mistakes", "figures/training"} <= figures
    for key in figures:
        with Image.open(seen / "files" / summary[key]["path"]) as shown, Image.open(run / f"{key}.png") as written:
            assert shown.size == written.size
    assert summary["figures/test_roc"]["caption"] == "test roc"
    assert sum(summary["test/scores/good"]["values"]) == 13
    table = json.loads((seen / "files" / summary["test/confusion_table"]["path"]).read_text())
    assert sum(row[2] for row in table["data"]) == 23
    curve = json.loads((seen / "files" / summary["test/roc_table"]["path"]).read_text())["data"]
    assert (curve[0][1:], curve[-1][1:]) == ([0, 0], [1, 1])


def test_the_table_of_samples_begins_with_the_mistakes_and_holds_pictures(run, seen):
    (table,) = (one for one in records(seen, "artifact") if "-testsamples" in one["name"])
    files = {entry["path"]: Path(entry["local_path"]) for entry in table["manifest"]["contents"]}
    assert all(run in path.parents for path in files.values())  # they wait beside the run for `wandb sync`
    content = json.loads(next(path for name, path in files.items() if name.endswith(".json")).read_text())
    right = [row[content["columns"].index("right")] for row in content["data"]]
    assert len(right) == 23
    assert right == sorted(right)
    picture = content["data"][0][0]
    with Image.open(files[picture["path"]]) as image:
        assert max(image.size) == 224


def test_artifacts_name_their_run_and_hold_its_files(run, seen):
    found = artifacts(seen)
    fingerprint = json.loads((run / "run.json").read_text())["data_fingerprint"]
    model, data = found["model-tiny-one"], found[f"data-MVTecAD-{fingerprint}"]
    assert {entry["path"]: entry["ref"] for entry in model["manifest"]["contents"]} == {
        name: (run / "checkpoints" / name).as_uri() for name in ("best.ckpt", "last.ckpt")
    }
    (splits,) = data["manifest"]["contents"]
    assert Path(splits["local_path"]).read_text() == (run / "splits.csv").read_text()
    assert json.loads(model["metadata"])["data"] == f"data-MVTecAD-{fingerprint}"
    assert told(seen)["config"]["lineage"] == {"data": f"data-MVTecAD-{fingerprint}", "uses": []}


def test_throughput_is_logged_of_every_epoch(run):
    rows = [row for row in csv_rows(run) if row["time/step_seconds"]]
    assert len(rows) == 3
    assert all(0 <= float(row["time/data_share"]) <= 1 for row in rows)
    assert all(float(row["time/pictures_per_second"]) > 0 for row in rows)


# --- evaluations ---


def test_an_evaluation_goes_on_with_the_run_of_the_training(place, run, seen):
    command(place, "validate", "--config", "tiny.yaml", "--run_id", "one", "--ckpt_path", "best")
    later = launches(run)[-1]
    assert later != seen
    found, (begun,) = told(later), records(later, "run")
    assert begun["run_id"] == "tiny-one"
    assert begun["job_type"] == "fit"
    assert not found["config"]  # that of the training stays
    assert found["summary"]["val/accuracy_low"] < found["summary"]["val/accuracy"]
    steps = {row[STEP] for row in history(later)}
    assert steps == {json.loads((run / "run.json").read_text())["steps"]}


def test_an_evaluation_of_an_untracked_training_stays_untracked(place):
    command(place, "fit", "--config", "tiny.yaml", "--run_id", "off", "--wandb", "off", "--trainer.max_epochs", "1")
    command(place, "test", "--config", "tiny.yaml", "--run_id", "off", "--ckpt_path", "best")
    assert not (place / "runs" / "tiny" / "off" / "wandb").exists()


# --- other systems ---


def config_of(written: Path, **changes: Any) -> Path:
    """A configuration of another test module, tracked."""
    config = {**yaml.safe_load(written.read_text()), "wandb": "auto", **changes}
    written.write_text(yaml.safe_dump(config))
    return written


def test_a_segmenter_shows_the_same_pictures_with_true_and_predicted_masks(tmp_path):
    root = make_tiles(tmp_path / "data")
    path = config_of(segmenter_config(tmp_path / "masks.yaml", "Segmenter", root))
    command(tmp_path, "fit", "--config", path, "--run_id", "a", "--test_after_fit", "true")
    (folder,) = launches(tmp_path / "runs" / "tiny" / "a")
    summary = told(folder)["summary"]
    for stage in ("val", "test"):
        shown = summary[f"{stage}/masks"]
        assert shown["captions"] == sorted(shown["captions"], key=shown["captions"].index)
        masks = shown["all_masks"]
        assert set(masks[0]) == {"ground_truth", "segmenter"}
        with Image.open(folder / "files" / masks[0]["ground_truth"]["path"]) as mask:
            assert set(mask.getdata()) == {0, 1}  # a defect is shown
            assert mask.size == (shown["width"], shown["height"])
    result = json.loads((tmp_path / "runs" / "tiny" / "a" / "test_metrics.json").read_text())
    assert summary["test/iou_low"] == result["methods"]["segmenter"]["iou"]["low"]


def test_a_generated_set_names_its_model_and_a_classifier_names_the_set(tmp_path):
    root, base = make_parts(tmp_path / "data"), make_base(tmp_path / "base")
    path = config_of(generator_config(tmp_path / "generator.yaml", root, base))
    command(tmp_path, "fit", "--config", path, "--run_id", "g")
    command(tmp_path, "predict", "--config", path, "--run_id", "g", "--ckpt_path", "last")
    run = tmp_path / "runs" / "tiny" / "g"
    first, second = launches(run)
    assert "model-tiny-g" in artifacts(first)
    made = artifacts(second)["generated-tiny-g"]
    assert {"manifest.csv", "about.json"} <= {entry["path"] for entry in made["manifest"]["contents"]}
    assert json.loads(made["metadata"])["uses"] == ["model-tiny-g"]
    assert told(second)["summary"]["generated/pictures"]["nrows"] >= 2
    classifier = yaml.safe_load(write_config(tmp_path / "tiny.yaml").read_text())
    classifier["data"] = yaml.safe_load(path.read_text())["data"]  # the same split
    classifier["data"]["init_args"]["synthetic"] = str(run / "generated")
    classifier["trainer"]["max_epochs"] = 1
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(classifier))
    command(tmp_path, "fit", "--config", "tiny.yaml", "--run_id", "c")
    (folder,) = launches(tmp_path / "runs" / "tiny" / "c")
    assert told(folder)["config"]["lineage"]["uses"] == ["generated-tiny-g"]
    assert json.loads(artifacts(folder)["model-tiny-c"]["metadata"])["uses"] == ["generated-tiny-g"]


# --- what goes wrong ---


class StopAt(Callback):
    """Breaks a training off, once it has come to a step, where the environment says so."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if os.environ.get("STOP_AT") == str(trainer.global_step):
            raise RuntimeError("the machine is gone")


@pytest.fixture
def breakable(tmp_path: Path) -> Path:
    callbacks = [{"class_path": "tests.test_tracking_runs.StopAt"}]
    return write_config(tmp_path / "tiny.yaml", callbacks=callbacks).parent


def test_a_resumed_run_goes_on_with_its_curve_under_the_same_id(breakable):
    with pytest.raises(RuntimeError, match="gone"):
        command(breakable, "fit", "--config", "tiny.yaml", "--run_id", "two", STOP_AT="10")
    command(breakable, "fit", "--config", "tiny.yaml", "--run_id", "two", "--resume")
    run = breakable / "runs" / "tiny" / "two"
    first, second = launches(run)
    assert [told(folder)["run_id"] for folder in (first, second)] == ["tiny-two"] * 2
    assert [(told(folder)["state"], told(folder)["summary"]["status"]) for folder in (first, second)] == [
        ("failed", "failed"),
        ("finished", "finished"),
    ]
    rows = [row for folder in (first, second) for row in history(folder)]
    for key in ("train/loss", "val/loss", "lr-AdamW"):
        steps = [row[STEP] for row in rows if key in row]
        assert steps == [int(row["step"]) for row in csv_rows(run) if row[key]]
        assert steps == sorted(set(steps))
    assert min(row[STEP] for row in history(first) if "train/loss" in row) == 0
    assert max(row[STEP] for row in history(first) if "train/loss" in row) >= 8  # beyond the end of the first epoch


def test_calls_of_wandb_that_fail_cost_nothing_but_warnings(breakable, monkeypatch, capsys):
    def fails(*_: object, **__: object) -> None:
        raise OSError("disk quota")

    for call in ("log", "log_artifact", "define_metric"):  # all that a run does
        monkeypatch.setattr(wandb.Run, call, fails)
    monkeypatch.setattr("lit_defect.callbacks.results_tracking.artifacts.used_by", fails)
    command(breakable, "fit", "--config", "tiny.yaml", "--run_id", "three", "--trainer.max_epochs", "1")
    run = breakable / "runs" / "tiny" / "three"
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert (run / "checkpoints" / "best.ckpt").is_file()
    said = capsys.readouterr().err
    for what in ("logging metrics", "logging what run.json says", "logging figures", "logging artifacts"):
        assert f"W&B: {what} failed (OSError: disk quota)" in said


def test_a_run_that_cannot_be_finished_keeps_its_results(breakable, monkeypatch, capsys):
    real = wandb.Run.finish

    def fails(run: Any, *arguments: Any, **options: Any) -> None:
        real(run, *arguments, **options)
        raise OSError("no route to host")

    monkeypatch.setattr(wandb.Run, "finish", fails)
    command(breakable, "fit", "--config", "tiny.yaml", "--run_id", "three", "--trainer.max_epochs", "1")
    assert "no route to host" in capsys.readouterr().err


def test_without_wandb_a_run_goes_on(breakable, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    command(breakable, "fit", "--config", "tiny.yaml", "--run_id", "four", "--trainer.max_epochs", "1")
    assert "W&B could not be started off line" in capsys.readouterr().err
    assert json.loads((breakable / "runs" / "tiny" / "four" / "run.json").read_text())["status"] == "finished"


def test_other_loggers_get_the_metrics(breakable):
    loggers = [{"class_path": "CSVLogger", "init_args": {"save_dir": "elsewhere", "name": name}} for name in "ab"]
    config = yaml.safe_load((breakable / "tiny.yaml").read_text())
    config["trainer"] |= {"max_epochs": 1, "logger": loggers}
    (breakable / "tiny.yaml").write_text(yaml.safe_dump(config))
    command(breakable, "fit", "--config", "tiny.yaml", "--run_id", "five", "--test_after_fit", "true")
    run = breakable / "runs" / "tiny" / "five"
    assert not (run / "wandb").exists()
    for folder in (run, *(next((breakable / "elsewhere").glob(f"{name}/version_0")) for name in "ab")):
        assert any(row["time/step_seconds"] for row in csv_rows(folder))


# --- several processes ---


@pytest.mark.slow
def test_of_several_processes_only_the_first_tracks(breakable, monkeypatch):
    off_line(monkeypatch, breakable / "home")
    arguments = ("fit", "--config", "tiny.yaml", "--run_id", "six", "--trainer.devices", "2",
                 "--trainer.strategy", "ddp", "--trainer.max_epochs", "2")  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run(
        [sys.executable, "-m", "lit_defect", *arguments], cwd=breakable, env=environment, timeout=240, check=True
    )
    run = breakable / "runs" / "tiny" / "six"
    (folder,) = launches(run)
    assert told(folder)["state"] == "finished"
    rows = [row for row in csv_rows(run) if row["time/step_seconds"]]
    assert len(rows) == 2
    steps = [row[STEP] for row in history(folder) if "train/loss" in row]
    assert steps == sorted(set(steps))
