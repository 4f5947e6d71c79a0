"""The command line as a user types it: runs, resumption, evaluation, and what it says about mistakes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from lit_defect.__main__ import main as run_module
from lit_defect.callbacks.run import RunRecorder
from lit_defect.claims import begin_launch, last_launch
from lit_defect.data import MVTecAD
from lit_defect.errors import UserError
from lit_defect.nets.backbones import Backbone
from lit_defect.runs import RunFolder
from tests.anomaly_diffusion import make_base, make_parts
from tests.editing import write_config
from tests.fakes import make_mvtec


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A classifier small enough to train in a second, on pictures that it can tell apart."""
    root = make_mvtec(tmp_path / "data", train_good=16, test_good=8, defects={"crack": 14, "hole": 10})
    path = tmp_path / "tiny.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "experiment": "tiny",
                "trainer": {"max_epochs": 3, "accelerator": "cpu"},
                "model": {
                    "class_path": "DefectClassifier",
                    "init_args": {
                        "backbone": "test_resnet",
                        "weights": None,
                        "transfer": "all",
                        "image_size": 32,
                        "lr": 0.01,
                    },
                },
                "data": {
                    "class_path": "MVTecAD",
                    "init_args": {
                        "root": str(root),
                        "setting": "supervised",
                        "image_size": 32,
                        "batch_size": 8,
                    },
                },
            }
        )
    )
    return path


def only_run(tmp_path: Path) -> Path:
    (run,) = (tmp_path / "runs" / "tiny").iterdir()
    return run


def fails(capsys: pytest.CaptureFixture, lit_defect, *arguments: object) -> str:
    """What the command line says when it refuses."""
    with pytest.raises(SystemExit) as stop:
        lit_defect(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_fit_leaves_a_complete_run_folder(lit_defect, config, tmp_path):
    lit_defect("fit", "--config", config, "--test_after_fit", "true")
    run = only_run(tmp_path)
    for name in (
        "config.yaml",
        "run.json",
        "metrics.csv",
        "splits.csv",
        "test_metrics.json",
        "test_predictions.csv",
    ):
        assert (run / name).is_file(), name
    for name in ("last", "best"):
        torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["steps"] == 3 * record["epochs"] or record["steps"] > 0
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["data"]["init_args"]["val_fraction"] == 0.2  # defaults are written down too
    assert saved["run_id"] == run.name
    result = json.loads((run / "test_metrics.json").read_text())
    with (run / "test_predictions.csv").open() as file:
        predictions = list(csv.DictReader(file))
    assert len(predictions) == result["n"]
    right = sum(row["label"] == row["prediction"] for row in predictions)
    assert right / len(predictions) == pytest.approx(result["accuracy"]["value"])
    assert {row["split"] for row in predictions} == {"test"}
    assert (run / "figures" / "test_confusion.png").is_file()
    assert (run / "figures" / "test_mistakes.png").is_file()


def test_a_saved_config_loads_in_test_and_finds_its_own_run(lit_defect, config, tmp_path):
    lit_defect("fit", "--config", config)
    run = only_run(tmp_path)
    for expected in ("test_metrics.json", "test_metrics.1.json"):  # the second evaluation keeps the first
        lit_defect("test", "--config", run / "config.yaml", "--ckpt_path", "best")
        assert (run / expected).is_file()
    assert only_run(tmp_path) == run
    lit_defect("validate", "--config", config, "--ckpt_path", "last")
    assert json.loads((run / "val_metrics.json").read_text())["n"] > 0
    lit_defect("predict", "--config", config, "--ckpt_path", "last")
    assert (run / "predict_predictions.csv").is_file()


def test_predict_takes_a_folder_of_new_pictures(lit_defect, config, tmp_path):
    lit_defect("fit", "--config", config)
    new = tmp_path / "data" / "tile" / "test" / "hole"
    lit_defect("predict", "--config", config, "--ckpt_path", "best", "--data.predict_root", new)
    with (only_run(tmp_path) / "predict_predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    assert {row["label"] for row in rows} == {""}


@pytest.mark.parametrize("verb", ["test", "validate", "predict"])
def test_evaluation_without_a_checkpoint_is_refused(lit_defect, config, capsys, verb):
    message = fails(capsys, lit_defect, verb, "--config", config)
    assert "--ckpt_path" in message
    assert "random weights" in message


def test_missing_checkpoints_are_named(lit_defect, config, capsys, tmp_path):
    assert "no run in" in fails(capsys, lit_defect, "test", "--config", config, "--ckpt_path", "best")
    message = fails(capsys, lit_defect, "test", "--config", config, "--ckpt_path", "nowhere.ckpt")
    assert "nowhere.ckpt" in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.lrr", "3"], ["--model.lrr", "did you mean lr?", "fit --model.help DefectClassifier"]),
        (["--data.batchsize", "3"], ["--data.batchsize", "batch_size", "fit --data.help"]),
        (["--trainer.max_epoch", "3"], ["trainer.max_epoch", "trainer.max_epochs"]),
        (["--resum"], ["resum", "resume"]),
        (["--model", "DefectClasifier"], ["DefectClasifier", "did you mean DefectClassifier?"]),
        (["--data", "MVTec"], ["MVTec", "MVTecAD"]),
        (["--model.lr", "abc"], ["lr", "float", "abc"]),
        (["--model.transfer", "haed"], ["transfer", "head"]),
    ],
)
def test_a_wrong_key_is_named_with_the_nearest_right_one(lit_defect, config, capsys, arguments, expected):
    message = fails(capsys, lit_defect, "fit", "--config", config, *arguments)
    for part in expected:
        assert part in message
    assert len(message.splitlines()) <= 8


@pytest.mark.parametrize(
    ("place", "key", "near"),
    [
        ((), "trainr", "trainer"),
        (("trainer",), "max_epoch", "max_epochs"),
        (("model", "init_args"), "backbon", "backbone"),
        (("data", "init_args"), "imagesize", "image_size"),
    ],
)
def test_a_wrong_key_in_a_file_is_named_too(lit_defect, config, capsys, place, key, near):
    content = yaml.safe_load(config.read_text())
    spot = content
    for part in place:
        spot = spot[part]
    spot[key] = 1
    config.write_text(yaml.safe_dump(content))
    message = fails(capsys, lit_defect, "fit", "--config", config)
    assert key in message
    assert near in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {class_path: DefectClassifier\ndata: [", "not valid YAML"),
        ("", "holds no options"),
        (
            "model: {class_path: lit_defect.tasks.DefectClasifier}\ndata: {class_path: ELPV}",
            "did you mean DefectClassifier",
        ),
        (
            "model: {class_path: DefectClassifier}\ndata: {class_path: ELPV}\n"
            "trainer: {callbacks: [{class_path: LearningRateMonitr}]}",
            "did you mean LearningRateMonitor",
        ),
        (
            "model: {class_path: DefectClassifier, init_args: {image_size: wide}}\ndata: {class_path: ELPV}",
            "model.image_size = wide: expected ",
        ),
    ],
)
def test_a_broken_file_is_named_in_two_lines(lit_defect, tmp_path, capsys, text, expected):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    message = fails(capsys, lit_defect, "fit", "--config", path)
    assert expected in message
    assert len(message.splitlines()) <= 2


def test_unknown_verbs_and_missing_parts(lit_defect, config, capsys):
    assert "did you mean fit?" in fails(capsys, lit_defect, "fitt", "--config", config)
    message = fails(capsys, lit_defect, "fit", "--data", "MVTecAD")
    assert "root" in message
    assert len(message) < 500
    assert "fit.model" in fails(capsys, lit_defect, "fit", "--data", "ELPV")


def test_later_configs_and_options_win(lit_defect, config, tmp_path, capsys):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"trainer": {"max_epochs": 7}, "model": {"init_args": {"lr": 0.5}}}))
    with pytest.raises(SystemExit) as stop:
        lit_defect("fit", "--config", config, "--config", overlay, "--model.lr", "0.25", "--print_config")
    assert stop.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["trainer"]["max_epochs"] == 7
    assert shown["model"]["init_args"]["lr"] == 0.25
    assert shown["model"]["init_args"]["backbone"] == "test_resnet"


def test_environment_variables(lit_defect, config, monkeypatch, capsys):
    monkeypatch.setenv("LIT_DEFECT_FIT__TRAINER__MIN_EPOCHS", "2")
    with pytest.raises(SystemExit):
        lit_defect("fit", "--config", config, "--print_config")
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["min_epochs"] == 2
    monkeypatch.setenv("LIT_DEFECT_FIT__MODEL__INIT_ARGS__LR", "2")
    message = fails(capsys, lit_defect, "fit", "--config", config)
    assert "LIT_DEFECT_FIT__MODEL__INIT_ARGS__LR" in message


def test_a_run_is_never_overwritten_and_can_be_resumed(lit_defect, config, tmp_path, capsys):
    lit_defect("fit", "--config", config, "--run_id", "one")
    message = fails(capsys, lit_defect, "fit", "--config", config, "--run_id", "one")
    assert "never overwritten" in message
    with pytest.raises(SystemExit) as stop:
        lit_defect("fit", "--config", config, "--run_id", "one", "--resume")
    assert stop.value.code == 0
    assert "finished" in capsys.readouterr().out
    fewer = ("--run_id", "one", "--resume", "--trainer.max_epochs", "2")
    assert "3 epochs already" in fails(capsys, lit_defect, "fit", "--config", config, *fewer)
    assert json.loads((tmp_path / "runs" / "tiny" / "one" / "run.json").read_text())["status"] == "finished"
    # More epochs: the run goes on where it ended, and keeps its earlier rows.
    lit_defect("fit", "--config", config, "--run_id", "one", "--resume", "--trainer.max_epochs", "5")
    with (tmp_path / "runs" / "tiny" / "one" / "metrics.csv").open() as file:
        epochs = [int(row["epoch"]) for row in csv.DictReader(file) if row.get("val/loss")]
    assert epochs == [0, 1, 2, 3, 4]


def test_of_launches_that_begin_one_run_at_the_same_moment_the_first_one_has_it(
    lit_defect, config, tmp_path, capsys, monkeypatch
):
    run = RunFolder(tmp_path / "runs" / "tiny" / "one")
    look, words = MVTecAD.prepare_data, ("fit", "--config", config, "--run_id", "one")

    def look_while_another_begins(data: MVTecAD) -> None:
        look(data)
        assert begin_launch(run.path, last_launch(run.path)) is not None

    monkeypatch.setattr(MVTecAD, "prepare_data", look_while_another_begins)
    assert "was taken by another process" in fails(capsys, lit_defect, *words, "--wandb", "offline")
    assert [path.name for path in run.path.iterdir()] == [".launches"], "nothing was written into the other's folder"
    monkeypatch.setattr(MVTecAD, "prepare_data", look)
    lit_defect(*words, "--resume", "--trainer.max_epochs", "1")  # the other was killed before it wrote anything
    before = run.record()
    monkeypatch.setattr(MVTecAD, "prepare_data", look_while_another_begins)
    assert "was taken by another process" in fails(capsys, lit_defect, *words, "--resume")
    assert run.record() == before


def test_a_run_goes_on_that_an_earlier_version_began_with_a_group_of_parameters_for_each_layer(
    lit_defect, config, tmp_path, monkeypatch
):
    words = ("fit", "--config", config, "--resume", "--model.schedule", "constant")
    groups = Backbone.parameter_groups
    with monkeypatch.context() as earlier:
        earlier.setattr(Backbone, "parameter_groups", lambda *args, **options: groups(*args, **options, by_layer=True))
        lit_defect(*words, "--run_id", "old", "--trainer.max_epochs", "1")
    lit_defect(*words, "--run_id", "old", "--trainer.max_epochs", "2")
    lit_defect(*words, "--run_id", "new", "--trainer.max_epochs", "2")
    old, new = (
        torch.load(RunFolder(tmp_path / "runs" / "tiny" / name).last, weights_only=True) for name in ("old", "new")
    )
    assert len(old["optimizer_states"][0]["param_groups"]) > len(new["optimizer_states"][0]["param_groups"])
    for key, value in new["state_dict"].items():
        torch.testing.assert_close(old["state_dict"][key], value)


@pytest.mark.parametrize("process", [0, 1])
def test_why_a_folder_cannot_be_begun_all_processes_are_told(tmp_path, process):
    """The first one's error alone would leave the others waiting: with NCCL for half an hour."""
    run, said = RunFolder(tmp_path / "one"), []
    run.path.mkdir()
    (run.path / ".launches").write_text("where no folder can be made, as on a disk that may only be read")

    class Strategy:
        def broadcast(self, own: object) -> object:
            said.append(own)
            return own if len(said) == 1 or process == 0 else "why not"

        def reduce_boolean_decision(self, own: bool) -> bool:
            return own

    trainer = SimpleNamespace(strategy=Strategy(), is_global_zero=process == 0, world_size=2)
    with pytest.raises(UserError, match=r"cannot be written .*--runs_dir" if process == 0 else "why not"):
        RunRecorder(run, "fit", {}, "hash").setup(trainer, None, "fit")
    assert len(said) == 2, "the first process has spoken, and the other listened"


@pytest.mark.parametrize("own", ["one", "two"])
def test_processes_that_disagree_on_the_folder_all_say_so(tmp_path, own):
    """As two machines without --run_id: one of them alone would leave the other a lost connection."""
    strategy = SimpleNamespace(broadcast=lambda _: "one", reduce_boolean_decision=lambda agrees: False)
    trainer = SimpleNamespace(strategy=strategy, is_global_zero=own == "one", world_size=2)
    with pytest.raises(UserError, match="give all of them one --run_id"):
        RunRecorder(RunFolder(tmp_path / own), "fit", {}, "hash").setup(trainer, None, "fit")


def test_a_run_that_was_killed_in_its_test_is_tested_by_resume(lit_defect, config, tmp_path, capsys):
    words = ("fit", "--config", config, "--run_id", "one", "--test_after_fit", "true")
    lit_defect(*words)
    run = tmp_path / "runs" / "tiny" / "one"
    before, rows = json.loads((run / "test_metrics.json").read_text()), (run / "metrics.csv").read_text()
    (run / "test_metrics.json").unlink()
    lines = rows.splitlines(keepends=True)
    (run / "metrics.csv").write_text("".join(lines[:-1]))  # the test's figures
    lit_defect(*words, "--resume")
    assert json.loads((run / "test_metrics.json").read_text())["nll"] == before["nll"]
    assert (run / "metrics.csv").read_text() == rows
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    with pytest.raises(SystemExit):
        lit_defect(*words, "--resume")
    assert "nothing to do" in capsys.readouterr().out


def test_a_run_that_was_killed_before_it_was_recorded_is_begun_anew(lit_defect, config, tmp_path, capsys):
    run = tmp_path / "runs" / "tiny" / "one"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("experiment: tiny\n")
    (run / ".run.json.host.123").write_text("{")
    assert "start it there by --resume" in fails(capsys, lit_defect, "fit", "--config", config, "--run_id", "one")
    (run / "thesis.docx").touch()
    for words in ((), ("--resume",)):
        assert "is no run folder" in fails(capsys, lit_defect, "fit", "--config", config, "--run_id", "one", *words)
    (run / "thesis.docx").unlink()
    lit_defect("fit", "--config", config, "--run_id", "one", "--resume")
    assert json.loads((run / "run.json").read_text())["status"] == "finished"


def test_resume_starts_anew_where_there_is_nothing_to_resume(lit_defect, config, tmp_path, capsys):
    lit_defect("fit", "--config", config, "--resume")
    assert "nothing to resume" in capsys.readouterr().out
    lit_defect("fit", "--config", config, "--model.lr", "0.02", "--resume")  # another experiment, another run
    assert len(list((tmp_path / "runs" / "tiny").iterdir())) == 2


def test_a_generation_without_a_checkpoint_is_resumed(lit_defect, tmp_path, capsys):
    """The newest run of the same configuration, not of another one; a run that is named comes before it."""
    root, base = make_parts(tmp_path / "parts"), make_base(tmp_path / "base")
    data = {"class_path": "MVTecAD", "init_args": {"root": str(root), "with_masks": True, "leakage": "off"}}
    config = write_config(tmp_path / "edit.yaml", base, data, "img2img", count=1)
    lit_defect("predict", "--config", config, "--resume")
    assert "nothing to resume" in capsys.readouterr().out
    run = only_run(tmp_path)
    stamp = (run / "edited" / "about.json").stat().st_mtime_ns
    (picture,) = (run / "edited" / "tile").rglob("*.png")
    made = picture.stat().st_mtime_ns
    lit_defect("predict", "--config", config, "--resume")
    assert f"going on in {run.relative_to(tmp_path)}" in capsys.readouterr().out.replace(str(tmp_path) + "/", "")
    assert only_run(tmp_path) == run
    assert picture.stat().st_mtime_ns == made
    assert (run / "edited" / "about.json").stat().st_mtime_ns > stamp  # it has been there
    lit_defect("predict", "--config", config, "--resume", "--model.edit.steps", "6")
    lit_defect("predict", "--config", config, "--resume", "--run_id", "named")
    assert len(list((tmp_path / "runs" / "tiny").iterdir())) == 3


def test_a_checkpoint_of_other_classes_is_refused(lit_defect, config, tmp_path, capsys):
    lit_defect("fit", "--config", config)
    message = fails(capsys, lit_defect, "test", "--config", config, "--data.target", "type", "--ckpt_path", "best")
    assert "classes" in message
    assert "crack" in message


def test_help_is_light():
    """`--help` pays neither for diffusion nor for the segmentation models, beyond what Lightning's own CLI imports.

    That is torchmetrics, which looks into transformers where it is installed, but not for its models.
    """
    code = (
        "import sys; sys.argv = ['lit_defect', 'fit', '--help']\n"
        "import lightning.pytorch.cli\nbefore = set(sys.modules)\n"
        "from lit_defect.cli import main\n"
        "try:\n    main()\nexcept SystemExit: pass\n"
        "heavy = {'diffusers', 'transformers', 'transformers.modeling_utils', 'peft', 'segmentation_models_pytorch', 'timm', "
        "'kornia', 'wandb'} & (set(sys.modules) - before)\n"
        "print('HEAVY', sorted(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ)
    assert "HEAVY []" in done.stdout, done.stdout[-500:] + done.stderr[-500:]
    assert "--resume" in done.stdout


def test_all_verbs_are_listed_at_once():
    code = "import sys; from lit_defect.__main__ import usage; print(usage()); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for verb in ("fit", "check", "validate", "test", "predict", "study", "sweep", "report", "export"):
        assert f"\n  {verb} " in done.stdout


def test_a_verb_that_is_none(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["lit_defect", "swep"])
    with pytest.raises(SystemExit) as stop:
        run_module()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: unknown verb 'swep': did you mean sweep?\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(lit_defect, config, capsys):
    message = fails(capsys, lit_defect, "fit", "--config", config, "--trainer.accelerator", "gpu")
    assert message.endswith("set --trainer.accelerator cpu --trainer.devices 1.\n")


def test_going_on_with_other_devices_is_said_to_change_the_steps(lit_defect, config, capsys, tmp_path):
    lit_defect("fit", "--config", config, "--run_id", "one", "--trainer.max_epochs", "1")
    record = tmp_path / "runs" / "tiny" / "one" / "run.json"
    for epochs, option, said in ((2, (), True), (3, ("--data.global_batch_size", "8"), False)):
        record.write_text(json.dumps(json.loads(record.read_text()) | {"devices": 2, "status": "interrupted"}))
        words = ("--run_id", "one", "--resume", "--trainer.max_epochs", epochs, *option)
        lit_defect("fit", "--config", config, *words)
        err = capsys.readouterr().err
        assert ("the run had 2 processes and goes on with 1" in err) is said, err


def test_pictures_that_were_trained_on_are_not_evaluated(lit_defect, config, capsys, tmp_path):
    lit_defect("fit", "--config", config, "--run_id", "one")
    run = tmp_path / "runs" / "tiny" / "one"
    splits = (run / "splits.csv").read_text()
    for arguments in (["test", "--ckpt_path", "best"], ["fit", "--resume", "--trainer.max_epochs", "5"]):
        message = fails(capsys, lit_defect, *arguments, "--config", config, "--run_id", "one", "--data.seed", "7")
        assert "were used in the training" in message
        assert "--data.split_file" in message
    assert (run / "splits.csv").read_text() == splits
    assert json.loads((run / "run.json").read_text())["status"] == "finished"  # a refusal leaves no trace
    assert not (run / "config.1.yaml").exists()
    remedy = ("--data.seed", "7", "--data.split_file", run / "splits.csv")
    lit_defect("test", "--config", config, "--run_id", "one", "--ckpt_path", "best", *remedy)
    assert (run / "test_metrics.json").is_file()


def test_equal_names_under_another_root_may_be_other_pictures(lit_defect, config, capsys, tmp_path):
    lit_defect("fit", "--config", config)
    other = make_mvtec(tmp_path / "other", train_good=16, test_good=8, defects={"crack": 14, "hole": 10}, seed=1)
    lit_defect("test", "--config", config, "--ckpt_path", "best", "--data.root", other, "--data.seed", "7")
    assert "if these are the same pictures" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fit", "--run_id", "../../elsewhere"], "plain name"),
        (["fit", "--experiment", ".."], "plain name"),
        (["fit", "--ckpt_path", "best"], "--resume"),
        (["fit", "--ckpt_path", "nowhere.ckpt"], "no such file"),
        (["fit", "--trainer.default_root_dir", "x"], "--runs_dir"),
        (["fit", "--trainer.accelerator", "cuba"], "cuba"),
        (["fit", "--test_after_fit", "true", "--trainer.enable_checkpointing", "false"], "tests a checkpoint"),
        (["test", "--trainer.fast_dev_run", "true"], "random weights"),
        (["test", "--ckpt_path", "tiny.yaml"], "no checkpoint"),
    ],
)
def test_what_cannot_be_done_is_refused_at_once(lit_defect, config, capsys, arguments, expected):
    assert expected in fails(capsys, lit_defect, arguments[0], "--config", config, *arguments[1:])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--trainer.logger", "false"],
        ["--trainer.enable_checkpointing", "false"],
        ["--trainer.callbacks+=TQDMProgressBar"],
        ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor", "val/auroc", "--trainer.callbacks.mode", "max"],
    ],
)  # fmt: skip
def test_own_loggers_and_callbacks_go_with_ours(lit_defect, config, tmp_path, arguments):
    lit_defect("fit", "--config", config, "--trainer.max_epochs", "1", *arguments)
    record = json.loads((only_run(tmp_path) / "run.json").read_text())
    assert record["status"] == "finished"


def test_misspelt_environment_variables_are_refused(lit_defect, config, monkeypatch, capsys):
    monkeypatch.setenv("LIT_DEFECT_FIT__TRAINER__MAX_EPOCS", "2")
    assert "LIT_DEFECT_FIT__TRAINER__MAX_EPOCHS?" in fails(capsys, lit_defect, "fit", "--config", config)


def test_an_interrupted_write_leaves_the_older_checkpoint(tmp_path):
    from lit_defect.callbacks.storage import WholeFiles

    path, files = tmp_path / "checkpoints" / "last.ckpt", WholeFiles()
    files.save_checkpoint({"step": torch.tensor(1)}, path)
    with pytest.raises((AttributeError, TypeError)):
        files.save_checkpoint({"step": (lambda: None), "big": torch.zeros(9)}, path)  # cannot be pickled
    assert torch.load(path, weights_only=True) == {"step": torch.tensor(1)}
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
