"""Real W&B runs off line, and what they have written, read back with wandb's own program."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fakes import make_mvtec


def off_line(patch: pytest.MonkeyPatch, home: Path) -> None:
    """Nobody is logged in, and W&B is on."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_DATA_DIR"):
        patch.delenv(name, raising=False)
    patch.setenv("HOME", str(home))
    patch.setenv("NETRC", str(home / "no-netrc"))


def launches(run: Path) -> list[Path]:
    """W&B's folders of a run, the earliest first."""
    return sorted((run / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime_ns)


def _inspect(*arguments: object) -> str:
    program = [Path(sys.executable).with_name("wandb"), "leet", "inspect"]
    if subprocess.run([*program, "--help"], capture_output=True, timeout=60).returncode:
        pytest.skip("this version of wandb cannot read a run back without a server")
    command = [*program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def told(folder: Path) -> dict[str, Any]:
    """State, config and summary."""
    return json.loads(_inspect("--summary", "--json", folder))


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind, in order."""
    lines = [json.loads(line) for line in _inspect("--json", folder).splitlines()]
    return [line[kind] for line in lines if line["type"] == kind]


def history(folder: Path) -> list[dict[str, Any]]:
    """The rows that were logged."""
    return [record["item"] for record in records(folder, "history")]


def artifacts(folder: Path) -> dict[str, dict[str, Any]]:
    """The artifacts by name, but for those that W&B makes of tables."""
    return {one["name"]: one for one in records(folder, "artifact") if not one["name"].startswith("run-")}


def write_config(path: Path, **trainer: Any) -> Path:
    """A tiny classifier on tiny pictures."""
    root = make_mvtec(path.parent / "data", train_good=30, test_good=21, defects={"crack": 21, "hole": 20})
    content = {
        "experiment": "tiny",
        "trainer": {"max_epochs": 3, "accelerator": "cpu", "log_every_n_steps": 1, **trainer},
        "model": {
            "class_path": "DefectClassifier",
            "init_args": {
                "backbone": "test_resnet", "weights": None, "transfer": "all", "image_size": 32, "lr": 0.01,
                "anomaly": {"class_path": "CutPaste"},
            },
        },
        "data": {
            "class_path": "MVTecAD",
            "init_args": {
                "root": str(root), "setting": "supervised", "image_size": 32, "batch_size": 8, "leakage": "off",
            },
        },
    }  # fmt: skip
    path.write_text(yaml.safe_dump(content))
    return path
