"""The verb `check`: what it says about a configuration, each failure made for real, and that it changes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import nn

from lit_defect.checking.cost import Cost, kept
from lit_defect.checking.findings import Findings, duration
from lit_defect.checking.launch import Launch, strategy_objection
from lit_defect.checking.memory import Memory
from lit_defect.checking.sources import sources
from lit_defect.checking.steps import fewer
from lit_defect.data.samples import Sample
from lit_defect.errors import UserError
from lit_defect.tasks import DefectClassifier
from tests.fakes import make_mvtec
from tests.test_experiments import FILES, named, tiny, verb

QUICK = [path for path in FILES if named(path) in (
    "quickstart.yaml", "contrastive/simclr_magnetic_tile.yaml", "refinement/ddpm_magnetic_tile.yaml",
    "anomaly_diffusion/anomaly_magnetic_tile.yaml", "editing/hazelnut_inpaint.yaml",
)]  # fmt: skip


class WithUnused(DefectClassifier):
    """A classifier with a layer that nothing uses."""

    def configure_model(self) -> None:
        super().configure_model()
        self.forgotten = nn.Linear(2, 2)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A classifier small enough to train in a second."""
    root = make_mvtec(tmp_path / "data", train_good=16, test_good=8, defects={"crack": 14, "hole": 10})
    model = {"backbone": "test_resnet", "weights": None, "transfer": "all", "image_size": 32, "lr": 0.01}
    data = {"root": str(root), "setting": "supervised", "image_size": 32, "batch_size": 4}
    content = {
        "experiment": "tiny",
        "trainer": {"max_epochs": 3, "accelerator": "cpu"},
        "model": {"class_path": "DefectClassifier", "init_args": model},
        "data": {"class_path": "MVTecAD", "init_args": data},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def check(lit_defect: Any, config: Path, tmp_path: Path) -> Any:
    """`check(*options)`: exit code and findings, by name the lines of their states."""

    def run(*options: object) -> tuple[int, dict[str, Any]]:
        file = tmp_path / "found.json"
        code = 0
        try:
            lit_defect("check", "--config", config, *options, "--json", file)
        except SystemExit as stop:
            code = int(stop.code)  # type: ignore[arg-type]
        found = json.loads(file.read_text())
        assert found["passes"] is (code == 0)
        by_name: dict[str, Any] = {}
        for one in found["checks"]:
            if one["state"] == "failed" or one["name"] not in by_name:
                by_name[one["name"]] = SimpleNamespace(**one)
        return code, by_name

    return run


def failed(found: dict[str, Any]) -> set[str]:
    return {name for name, one in found.items() if one.state == "failed"}


def tree(folder: Path) -> dict[str, Any]:
    """All files and folders with their content and time of change."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


def test_all_is_right(check, tmp_path, capsys):
    code, found = check()
    assert code == 0
    assert not failed(found)
    assert found["train"].values["classes"] == {"good": 14, "defective": 15}
    assert found["loss"].values["losses"]
    batches = found["train"].values["samples"] // 4
    assert found["cost"].values["steps_per_epoch"] == batches
    assert found["cost"].values["steps"] == 3 * batches
    assert found["cost"].values["pictures"] == 3 * batches * 4
    assert found["time"].values["seconds"] > 0
    weights, gradients = (found["memory"].values[key] for key in ("weights", "gradients"))
    assert 0 < gradients < weights < 1.1 * gradients  # buffers have none
    assert found["memory"].values["optimizer"] == pytest.approx(2 * gradients, rel=0.01)  # AdamW's two moments
    assert not (tmp_path / "runs").exists()
    lines = capsys.readouterr().out.splitlines()
    assert all("\x1b" not in line for line in lines)
    assert sum(line.startswith("ok ") for line in lines) >= 12
    assert lines[-1].endswith("0 failed")


def test_the_size_of_a_checkpoint_is_that_of_the_run(check, lit_defect, config, tmp_path):
    _, found = check()
    lit_defect("fit", "--config", config, "--run_id", "a", "--wandb", "off")
    written = (tmp_path / "runs" / "tiny" / "a" / "checkpoints" / "last.ckpt").stat().st_size
    assert found["disk"].values["checkpoint_bytes"] == pytest.approx(written, rel=0.05)
    assert found["disk"].values["needed_bytes"] == 3 * found["disk"].values["checkpoint_bytes"]


@pytest.mark.parametrize("transfer", ["all", "head"])  # the second keeps features of its frozen network
def test_a_check_changes_nothing_that_fit_computes(lit_defect, config, tmp_path, monkeypatch, transfer):
    def weights(name: str) -> dict[str, torch.Tensor]:
        monkeypatch.setenv("LIT_DEFECT_CACHE", str(tmp_path / f"cache-{name}"))
        lit_defect("fit", "--config", config, "--model.transfer", transfer, "--run_id", name, "--wandb", "off")
        file = tmp_path / "runs" / "tiny" / name / "checkpoints" / "last.ckpt"
        return torch.load(file, weights_only=True)["state_dict"]

    alone = weights("alone")
    monkeypatch.setenv("LIT_DEFECT_CACHE", str(tmp_path / "cache-after"))
    lit_defect("check", "--config", config, "--model.transfer", transfer)
    assert not list((tmp_path / "cache-after").rglob("*.safetensors"))  # features in other batches may differ by a bit
    after = weights("after")
    assert alone.keys() == after.keys()
    assert all(torch.equal(alone[key], after[key]) for key in alone)


# --- the run folder ---


def test_a_run_that_exists_is_refused_resumed_or_finished(check, lit_defect, config, tmp_path):
    lit_defect("fit", "--config", config, "--run_id", "a", "--wandb", "off")
    before = tree(tmp_path / "runs" / "tiny" / "a")
    code, found = check("--run_id", "a")
    assert (code, failed(found)) == (1, {"run folder"})
    assert "never overwritten" in found["run folder"].found
    assert found["loss"].state == "ok"  # the other checks were made
    code, found = check("--run_id", "a", "--resume")
    assert code == 0
    assert "nothing to do" in found["run folder"].found
    code, found = check("--run_id", "a", "--resume", "--trainer.max_epochs", "5")
    assert code == 0
    assert any("other options" in one.found for one in found.values())
    assert len(found["loss"].values["losses"]) == 5
    assert tree(tmp_path / "runs" / "tiny" / "a") == before
    assert [path.name for path in (tmp_path / "runs" / "tiny").iterdir()] == ["a"]


def test_a_folder_that_cannot_be_written(check, tmp_path):
    (tmp_path / "file").write_text("no folder")
    code, found = check("--runs_dir", tmp_path / "file" / "runs")
    assert code == 1
    assert failed(found) == {"run folder", "writable"}
    assert "--runs_dir" in found["writable"].remedy


def test_a_full_disk(check, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=10_000)
    monkeypatch.setattr("lit_defect.checking.place.shutil.disk_usage", lambda _: usage)
    code, found = check()
    assert (code, failed(found)) == (1, {"disk"})


def test_a_server_that_does_not_answer(check, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    code, found = check("--wandb", "online")
    assert code == 0
    assert found["tracking"].state == "warning"
    assert "127.0.0.1:9" in found["tracking"].found


# --- data ---


def test_near_duplicates_are_refused_and_the_checks_go_on(check, tmp_path):
    good = tmp_path / "data" / "tile"
    shutil.copy(good / "train" / "good" / "000.png", good / "test" / "good" / "900.png")
    code, found = check("--data.leakage", "error")
    assert code == 1
    assert failed(found) == {"leakage"}
    assert "near-duplicate" in found["leakage"].found
    assert found["loss"].state == "ok"
    code, found = check()
    assert code == 0
    assert found["leakage"].state == "warning"
    assert check("--strict")[0] == 1


def test_files_that_cannot_be_read(check, tmp_path):
    file = tmp_path / "data" / "tile" / "train" / "good" / "003.png"
    file.write_bytes(file.read_bytes()[:200])
    code, found = check()
    assert code == 1
    assert failed(found) == {"data"}
    assert "003.png" in found["data"].found
    assert found["loss"].state == "ok"


def test_data_that_are_not_there(check, tmp_path):
    code, found = check("--data.root", tmp_path / "nowhere")
    assert (code, failed(found)) == (1, {"data"})
    assert found["run folder"].state == "ok"
    assert "loss" not in found


def test_too_few_samples_for_the_processes(check):
    code, found = check("--trainer.devices", "12", "--trainer.strategy", "ddp")
    assert code == 1
    assert failed(found) == {"val shared"}
    assert "12 processes" in found["val shared"].found
    assert found["batch size"].state == "warning"


def test_a_step_that_the_processes_share(check):
    options = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accumulate_grad_batches", "2")
    _, alone = check("--data.global_batch_size", "8")
    code, found = check("--data.global_batch_size", "8", *options)
    assert code == 0
    assert found["cost"].values == alone["cost"].values, "as many steps, of as many pictures"
    code, found = check("--data.global_batch_size", "6", *options)
    assert (code, failed(found)) == (1, {"batch size"})
    assert "8 can" in found["batch size"].found


def test_a_cache_that_does_not_fit(check, monkeypatch):
    monkeypatch.setattr("lit_defect.checking.pictures.available_memory", lambda: 1000)
    code, found = check("--trainer.devices", "2")
    assert (code, failed(found)) == (1, {"cache"})
    assert found["cache"].remedy == "--data.cache disk"
    assert found["cache"].values["cache_bytes_per_node"] == 2 * found["cache"].values["cache_bytes"]


# --- model and steps ---


def test_weights_that_are_not_there(check, tmp_path):
    code, found = check("--model.weights", tmp_path / "nowhere.safetensors")
    assert (code, failed(found)) == (1, {"model"})
    assert "nowhere.safetensors" in found["model"].found


def test_weights_of_the_hub_without_a_network(check):
    code, found = check("--model.backbone", "resnet18", "--model.weights", "hub")
    assert (code, failed(found)) == (1, {"model"})


def test_a_loss_that_is_not_finite(check):
    code, found = check(
        "--model.lr", "1e30", "--model.optimizer", "sgd", "--model.schedule", "constant", "--model.warmup", "0"
    )
    assert code == 1
    assert "loss" in failed(found)


def test_a_parameter_without_gradient(check):
    unused = "tests.test_checking.WithUnused"
    code, found = check("--model.class_path", unused)
    assert code == 0
    assert found["gradients"].state == "warning"
    assert found["gradients"].values["missing"] == ["forgotten.bias", "forgotten.weight"]
    code, found = check("--model.class_path", unused, "--trainer.devices", "2", "--trainer.strategy", "ddp")
    assert (code, failed(found)) == (1, {"gradients"})
    spared = "ddp_find_unused_parameters_true"
    assert check("--model.class_path", unused, "--trainer.devices", "2", "--trainer.strategy", spared)[0] == 0


def test_a_task_that_asks_for_what_the_data_lack(check):
    code, found = check("--model.monitor", "val/nonsense")
    assert (code, failed(found)) == (1, {"model"})
    assert "val/nonsense" in found["model"].found


# --- the machine ---


def test_a_node_of_gpus_is_checked_without_one(check):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    code, found = check("--trainer.accelerator", "gpu", "--trainer.devices", "2", "--trainer.strategy", "ddp",
                        "--trainer.precision", "16-mixed", "--data.batch_size", "12")  # fmt: skip
    assert code == 0
    assert "no gpu" in found["launch"].found
    assert found["launch"].values["processes"] == 2
    assert "bf16-mixed" in found["precision"].found
    assert found["memory"].values["batch"] == 12
    assert "of 8 samples" in found["loss"].found
    assert found["cost"].values["steps_per_epoch"] == found["train"].values["samples"] // 24


def test_a_strategy_that_is_none(check):
    code, found = check("--trainer.strategy", "dpp")
    assert (code, failed(found)) == (1, {"launch"})
    assert found["launch"].remedy == "--trainer.strategy ddp"


@pytest.mark.parametrize("strategy", ["fsdp", "ddp_spawn", "ddp_fork_find_unused_parameters_true", "deepspeed_stage_2"])
def test_a_strategy_that_does_not_serve_is_refused_with_one_that_does(check, strategy):
    code, found = check("--trainer.devices", "2", "--trainer.strategy", strategy)
    assert (code, failed(found)) == (1, {"launch"})
    assert strategy in found["launch"].found
    assert found["launch"].remedy == "--trainer.strategy ddp"


@pytest.mark.parametrize(
    ("strategy", "serves"),
    [
        (None, True), ("auto", True), ("ddp", True), ("ddp_find_unused_parameters_true", True), (DDPStrategy(), True),
        (FSDPStrategy(), False), (DDPStrategy(start_method="spawn"), False), ("ddp_notebook", False),
    ],
    ids=["none", "auto", "ddp", "unused", "its object", "FSDP's", "spawning", "notebook"],
)  # fmt: skip
def test_strategies_that_serve(strategy, serves):
    assert (not strategy_objection(strategy)) == serves


@pytest.mark.parametrize(
    ("trainer", "processes"),
    [({"devices": "3"}, 3), ({"devices": "0,2"}, 2), ({"devices": [1, 2, 5], "num_nodes": 4}, 12), ({"devices": 2}, 2)],
)
def test_processes_that_are_asked_for(trainer, processes):
    assert Launch.of({"accelerator": "gpu", **trainer}).processes == processes


def test_several_processes_of_whatever_there_is_are_of_gpus():
    here = torch.cuda.is_available() or torch.backends.mps.is_available()
    assert Launch.of({"devices": 8}).here is here
    assert Launch.of({"devices": 8, "accelerator": "cpu"}).here
    assert Launch.of({}).here


@pytest.mark.parametrize("trainer", [{"accelerator": "gpuu"}, {"devices": 0}, {"devices": "many"}])
def test_a_machine_that_cannot_be(trainer):
    with pytest.raises(UserError, match=f"trainer.{next(iter(trainer))}"):
        Launch.of(trainer)


# --- the command line ---


def test_a_wrong_key_is_a_mistake_of_the_configuration(lit_defect, config, capsys):
    with pytest.raises(SystemExit) as stop:
        lit_defect("check", "--config", config, "--model.lrr", "3")
    assert stop.value.code == 2
    assert "did you mean lr?" in capsys.readouterr().err


def test_json_on_standard_output_is_nothing_but_json(lit_defect, config, capsys):
    lit_defect("check", "--config", config, "--json", "-")
    out, err = capsys.readouterr()
    assert json.loads(out)["passes"] is True
    assert "gradients" in err


def test_variables_of_fit_are_those_of_check(check, monkeypatch, lit_defect, config):
    monkeypatch.setenv("LIT_DEFECT_FIT__TRAINER__MAX_EPOCHS", "7")
    monkeypatch.setenv("LIT_DEFECT_FIT__TRAINER__ACCUMULATE_GRAD_BATCHES", "2")
    config.write_text(config.read_text().replace("  max_epochs: 3\n", ""))
    _, found = check()
    assert found["cost"].values["epochs"] == 7
    assert found["cost"].values["steps_per_epoch"] == -(-(found["train"].values["samples"] // 4) // 2)
    assert "LIT_DEFECT_FIT__TRAINER__MAX_EPOCHS" in found["options"].found
    monkeypatch.setenv("LIT_DEFECT_CHECK__TRAINER__MAX_EPOCHS", "7")
    with pytest.raises(SystemExit) as stop:
        lit_defect("check", "--config", config)
    assert stop.value.code == 2


def test_where_options_come_from():
    words = ["check", "--config", "a.yaml", "--config=b.yaml", "--model.lr", "1", "--strict"]
    text = sources(words, {"X__SEED": "1", "Y": "2"}, "X__")
    assert text == "a.yaml, b.yaml; environment: X__SEED; command line: model.lr"


# --- cost and samples ---


@pytest.mark.parametrize(
    ("trainer", "steps", "total", "validations"),
    [
        ({"max_epochs": 4}, 10, 40, 4),
        ({"max_epochs": 4, "accumulate_grad_batches": 3}, 4, 16, 4),
        ({"max_steps": 25}, 10, 25, 2),
        ({"max_epochs": 4, "limit_train_batches": 0.5}, 5, 20, 4),
        ({"max_epochs": 4, "limit_train_batches": 1}, 1, 4, 4),
        ({"max_epochs": 4, "limit_train_batches": 1.0}, 10, 40, 4),
        ({"max_epochs": 6, "check_val_every_n_epoch": 3}, 10, 60, 2),
        ({"max_epochs": 4, "val_check_interval": 0.5}, 10, 40, 8),
        ({"max_epochs": 4, "val_check_interval": 5, "check_val_every_n_epoch": None}, 10, 40, 8),
        ({"max_epochs": 4, "limit_val_batches": 0}, 10, 40, 0),
        ({"fast_dev_run": True, "max_epochs": 9}, 1, 1, 1),
        ({}, 10, 10_000, 1000),
    ],
)
def test_steps_of_a_run(trainer, steps, total, validations):
    cost = Cost.of({"check_val_every_n_epoch": 1, **trainer}, 10, 6)
    assert (cost.steps, cost.total, cost.validations) == (steps, total, validations)


def test_a_run_without_an_end():
    assert Cost.of({"max_epochs": -1}, 10, 0).total == float("inf")


def test_checkpoints_that_are_kept():
    from lightning.pytorch.callbacks import ModelCheckpoint

    assert kept(None, True, True) == 3
    assert kept([ModelCheckpoint(save_top_k=2, monitor="x", save_last=True)], True, False) == 5
    assert kept(ModelCheckpoint(save_top_k=-1), True, True) is None
    assert kept(None, False, True) == 0


def test_a_part_of_the_samples_has_each_kind():
    samples = [Sample(path=str(i), name=str(i), label=0, split="train") for i in range(90)]
    samples += [Sample(path=str(i), name=str(i), label=1, split="train", defect_type="rare") for i in range(90, 100)]
    part = fewer({"train": samples, "val": []}, 20)
    assert part["val"] == []
    assert len(part["train"]) == 20
    assert [sample.label for sample in part["train"]].count(1) == 10
    assert [int(sample.name) for sample in part["train"]] == sorted(int(sample.name) for sample in part["train"])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "12 ms"), (5.2, "5.2 s"), (61.0, "61 s"), (600, "10 min"), (7200, "2.0 h"), (3e5, "3.5 days")],
)
def test_times_in_words(seconds, text):
    assert duration(seconds) == text


def test_errors_of_foreign_code_are_findings_with_their_place():
    findings = Findings()
    with findings.noting("this"):
        raise KeyError("lost")
    assert findings.failed()
    assert "KeyError: 'lost' (test_checking.py:" in findings[0].found


def test_activations_are_counted_once_and_without_weights():
    network, memory = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 1)), Memory()
    with memory.counting(network):  # type: ignore[arg-type]
        network(torch.rand(5, 10))
    assert memory.activations == 4 * (5 * 10 + 5 * 20)  # the input, and what ReLU and the second layer share
    memory.weights = 1000
    assert memory.estimate(2.0) == 1000 + 2 * memory.activations


# --- every configuration ---


def passes(lit_defect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Path) -> Any:
    words = tiny(tmp_path, path, monkeypatch)
    cli = lit_defect("check", "--config", path, *words)
    assert not cli.findings.failed()
    assert not (tmp_path / "runs").exists()
    return {finding.name: finding for finding in cli.findings}


@pytest.mark.parametrize("path", QUICK, ids=named)
def test_a_configuration_of_each_system_is_checked(lit_defect, tmp_path, monkeypatch, path):
    found = passes(lit_defect, tmp_path, monkeypatch, path)
    if verb(path) == "predict":
        assert found["verbs"].values["verbs"] == ("predict",)
    else:
        assert found["gradients"].state == "ok", found["gradients"]


def test_a_pipeline_that_is_not_there(lit_defect, tmp_path, monkeypatch):
    path = next(path for path in QUICK if verb(path) == "predict")
    words = [*tiny(tmp_path, path, monkeypatch), "--model.base", str(tmp_path / "nowhere")]
    with pytest.raises(SystemExit) as stop:
        lit_defect("check", "--config", path, *words, "--json", tmp_path / "found.json")
    assert stop.value.code == 1
    found = json.loads((tmp_path / "found.json").read_text())["checks"]
    assert [(one["name"], "nowhere" in one["found"]) for one in found if one["state"] == "failed"] == [("model", True)]


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in FILES if path not in QUICK], ids=named)
def test_every_configuration_is_checked(lit_defect, tmp_path, monkeypatch, path):
    passes(lit_defect, tmp_path, monkeypatch, path)
