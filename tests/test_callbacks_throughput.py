"""How fast a training runs and what it waits for, by a clock that only the loader, the step and validation move."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import SimpleProfiler
from torch.utils.data import DataLoader, Dataset

from lit_defect.callbacks.throughput import Throughput


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Slow(Dataset):
    """24 samples; each takes a second to load."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> torch.Tensor:
        self.clock.now += self.seconds
        return torch.ones(1)


class Working(LightningModule):
    """A step takes two seconds, the first one a hundred, and a validation batch a thousand."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.layer = torch.nn.Linear(1, 1)
        self.steps = itertools.count()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.clock.now += 2 if next(self.steps) else 100
        return self.layer(batch).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.clock.now += 1000

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Kept(CSVLogger):
    def __init__(self, folder: Any) -> None:
        super().__init__(folder)
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows += [(step, {key: v for key, v in metrics.items() if "/" in key})] if step is not None else []


def measured(tmp_path: Any, seconds: float = 0.5, every: int = 500, **settings: Any) -> list[tuple[int, dict]]:
    clock, logger = Clock(), Kept(tmp_path)
    loader = DataLoader(Slow(clock, seconds), batch_size=4)
    callback = Throughput(every, clock)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    given = {"accelerator": "cpu", "max_epochs": 2, "num_sanity_val_steps": 1, **quiet, **settings}
    trainer = Trainer(callbacks=[callback], logger=logger, default_root_dir=tmp_path, **given)
    trainer.fit(Working(clock), loader, DataLoader(Slow(clock, 100.0), batch_size=24))
    return [row for row in logger.rows if "time/step_seconds" in row[1]]


def test_a_step_its_wait_and_its_pictures_without_validation_and_the_first_batch(tmp_path):
    rows = measured(tmp_path)
    assert [step for step, _ in rows] == [5, 11]
    for _, row in rows:  # 4 pictures of half a second, and two seconds of work
        assert row == pytest.approx({"time/step_seconds": 4.0, "time/data_share": 0.5, "time/pictures_per_second": 1.0})


def test_a_loader_that_sleeps_takes_most_of_the_time(tmp_path):
    assert all(row["time/data_share"] > 0.9 for _, row in measured(tmp_path, seconds=10.0))
    assert all(row["time/data_share"] == 0 for _, row in measured(tmp_path, seconds=0.0))


def test_a_long_epoch_is_told_in_parts(tmp_path):
    rows = measured(tmp_path, every=2)
    assert [step for step, _ in rows] == [2, 4, 5, 7, 9, 11]
    assert all(row["time/step_seconds"] == pytest.approx(4.0) for _, row in rows)


def test_a_step_is_that_of_the_optimizer(tmp_path):
    rows = measured(tmp_path, accumulate_grad_batches=2)
    assert rows[-1][1]["time/step_seconds"] == pytest.approx(8.0)
    assert rows[-1][1]["time/pictures_per_second"] == pytest.approx(1.0)


def test_a_profiler_of_the_user_stays(tmp_path):
    rows = measured(tmp_path, profiler=SimpleProfiler())
    assert all("time/data_share" not in row for _, row in rows)
    assert rows[-1][1]["time/step_seconds"] == pytest.approx(4.0)
