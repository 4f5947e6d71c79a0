"""What all tests share: no network, no tracking, caches in a temporary folder, one thread."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", OMP_NUM_THREADS="1", COLUMNS="160", TERM="dumb")

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_launch() -> Iterator[None]:
    """What a launch of several processes leaves in this one: the next would take its port, which may be gone by then."""
    yield
    for name in ("LIT_DEFECT_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def _own_folders(_own_launch: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches and runs of one test are not those of another, nor the user's."""
    monkeypatch.setenv("LIT_DEFECT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def lit_defect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """The command line, in this process: `lit_defect("fit", "--config", ...)` gives the CLI object."""

    def run(*arguments: object) -> object:
        from lit_defect.cli import main

        words = [str(argument) for argument in arguments]
        monkeypatch.setattr("sys.argv", ["lit_defect", *words])
        for name in ("LIT_DEFECT_RUN_ID", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        return main()

    monkeypatch.chdir(tmp_path)
    return run
