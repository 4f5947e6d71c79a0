"""The lines that stand for a progress bar: each tells the figures of its own epoch, and not too often."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader

from lit_defect.callbacks import startup
from lit_defect.callbacks.startup import EpochLines
from tests.contrastive import make_trainer


class Counting(LightningModule):
    """Logs the number of the epoch in every hook that a task logs in."""

    monitor = ("synthetic/figure", "max")

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = 0 * self.layer(batch).sum() + self.current_epoch
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", float(self.current_epoch))

    def on_train_epoch_end(self) -> None:
        self.log("synthetic/figure", float(self.current_epoch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def lines(capsys: pytest.CaptureFixture[str], folder: Path, epochs: int) -> list[str]:
    loader = DataLoader(torch.zeros(4, 1), batch_size=2)
    capsys.readouterr()
    make_trainer(epochs, callbacks=[EpochLines()], default_root_dir=folder).fit(Counting(), loader, loader)
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]


def clock(monkeypatch: pytest.MonkeyPatch, seconds: int) -> None:
    """Each look at it is so many seconds after the last."""
    now = itertools.count(1000, seconds)
    monkeypatch.setattr(startup, "time", SimpleNamespace(monotonic=lambda: float(next(now))))


def test_each_line_tells_of_its_own_epoch(capsys, monkeypatch, tmp_path):
    """Also what the task logs when the callbacks have ended the epoch already."""
    clock(monkeypatch, 11)
    assert lines(capsys, tmp_path, 3) == [
        f"epoch {n + 1}/3  step {2 * n + 2}  train/loss {n}  val/loss {n}  synthetic/figure {n}" for n in range(3)
    ]


def test_at_most_one_in_ten_seconds_and_the_last(capsys, monkeypatch, tmp_path):
    clock(monkeypatch, 4)
    shown = [line.split()[1] for line in lines(capsys, tmp_path, 8)]
    assert shown == ["1/8", "4/8", "7/8", "8/8"]
