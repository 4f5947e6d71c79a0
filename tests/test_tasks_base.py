"""What all tasks share: seeds of steps, the schedule, optimizers, the gathering of evaluated samples."""

from __future__ import annotations

import atexit
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lit_defect.errors import UserError
from lit_defect.tasks.base import DefectTask, warmup_and_decay


class Numbers(Dataset):
    """Twelve points and their positions."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return {"x": torch.full((3,), float(position)), "index": torch.tensor(position)}


class Toy(DefectTask):
    """One linear layer that notes every random number it draws and every learning rate it learns at."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.layer = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
        self.drawn: list[float] = []
        self.rates: list[float] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.drawn.append(float(torch.rand(())))
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return self.layer(batch["x"]).square().mean()


def fit(task: Toy, epochs: int = 2, checkpoint: Any = None, **settings: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", max_epochs=epochs, enable_model_summary=False, **quiet, **settings)
    trainer.fit(task, DataLoader(Numbers(), batch_size=4), ckpt_path=checkpoint, weights_only=True)
    return trainer


class Last(Callback):
    """Notes at the very end of a process whether it is connected to others still."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def setup(self, trainer: Trainer, pl_module: DefectTask, stage: str) -> None:
        """Before the task's own: handlers are called last first."""
        atexit.register(self.note, trainer.global_rank)

    def note(self, rank: int) -> None:
        (self.folder / f"{rank}.txt").write_text(str(torch.distributed.is_initialized()))


# --- several processes ---


def test_processes_part_before_python_ends(tmp_path):
    """Else one in twenty is aborted by a thread of gloo's that needs Python still."""
    fit(Toy(), epochs=1, devices=2, strategy="ddp_spawn", use_distributed_sampler=False, callbacks=[Last(tmp_path)])
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["False", "False"]


# --- randomness ---


def test_every_step_draws_its_own_numbers_and_the_same_after_a_restart(tmp_path):
    seed_everything(3, verbose=False)
    whole = Toy()
    fit(whole, epochs=4)
    assert len(set(whole.drawn)) == 12

    seed_everything(3, verbose=False)
    first = Toy()
    torch.rand(100)  # whatever else was drawn before
    fit(first, epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    second = Toy()
    fit(second, epochs=4, checkpoint=tmp_path / "half.ckpt")
    assert first.drawn + second.drawn == whole.drawn
    assert first.rates != whole.rates[:6]  # another end, another schedule: what the drawn numbers do not see


def test_another_seed_draws_other_numbers():
    drawn = []
    for seed in (3, 4):
        seed_everything(seed, verbose=False)
        task = Toy()
        fit(task)
        drawn.append(task.drawn)
    assert not set(drawn[0]) & set(drawn[1])


# --- schedule ---


def test_warmup_and_cosine_by_hand():
    factors = [warmup_and_decay(step, total=10, warmup=0.2, schedule="cosine") for step in range(11)]
    half = 1 / math.sqrt(2)
    assert factors[:3] == [0.5, 1.0, 1.0]  # two steps of rise, then the cosine starts at its top
    assert factors[4] == pytest.approx((1 + half) / 2)  # a quarter of the eight steps
    assert factors[6] == pytest.approx(0.5)
    assert factors[8] == pytest.approx((1 - half) / 2)
    assert factors[10] == pytest.approx(0.0)
    assert warmup_and_decay(25, total=10, warmup=0.2, schedule="cosine") == pytest.approx(0.0)


def test_constant_after_the_warmup():
    factors = [warmup_and_decay(step, total=8, warmup=0.5, schedule="constant") for step in range(8)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert warmup_and_decay(0, total=math.inf, warmup=0.5, schedule="constant") == 1.0


def test_the_schedule_is_that_of_torch():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 5, total_iters=5),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=15),
        ],
        milestones=[5],
    )
    for step in range(20):
        rate = optimizer.param_groups[0]["lr"]
        # torch's linear rise has its steps between 1/5 and 1 at 0 .. 5, ours at 0 .. 4.
        expected = (step + 1) / 5 if step < 5 else rate
        assert warmup_and_decay(step, total=20, warmup=0.25, schedule="cosine") == pytest.approx(expected)
        optimizer.step()
        reference.step()


def test_rates_are_counted_in_optimizer_steps():
    task = Toy(lr=0.5, warmup=0.5)
    fit(task, epochs=4, accumulate_grad_batches=3)  # 12 batches, 4 steps
    half = [0.25] * 3 + [0.5] * 3 + [0.5] * 3 + [0.25] * 3
    assert task.rates == pytest.approx(half)


@pytest.mark.parametrize(("scaling", "rate"), [("linear", 0.5 * 12 / 48), ("sqrt", 0.5 * math.sqrt(12 / 48))])
def test_a_rate_that_is_meant_for_another_batch_is_scaled(monkeypatch, scaling, rate):
    task = Toy(lr=0.5, lr_batch=48, lr_scaling=scaling, warmup=0.0, schedule="constant")
    monkeypatch.setattr(Toy, "data", type("Data", (), {"batch_size": 4}))
    fit(task, epochs=1, accumulate_grad_batches=3)
    assert task.rates == pytest.approx([rate] * 3)


def test_a_rate_for_no_pictures_is_refused():
    with pytest.raises(UserError, match="lr_batch = 0"):
        Toy(lr_batch=0)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_a_training_without_an_end_cannot_fall_towards_it(schedule):
    task = Toy(schedule=schedule, lr=0.5)
    if schedule == "cosine":
        with pytest.raises(UserError, match=r"schedule = cosine.*max_epochs"):
            fit(task, epochs=-1)
    else:
        fit(task, epochs=-1, max_time={"seconds": 1})
        assert set(task.rates) == {0.5}


# --- optimizer ---


def test_an_unknown_optimizer_is_named_with_near_ones():
    with pytest.raises(UserError, match=r"optimizer = adamww.*adamw"):
        fit(Toy(optimizer="adamww"))


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_norms_and_biases_do_not_decay(name):
    task = Toy(optimizer=name, lr=0.1, weight_decay=0.3)
    (optimizer,) = fit(task).optimizers
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    linear, norm = task.layer
    assert decay == {id(linear.weight): 0.3, id(linear.bias): 0.0, id(norm.weight): 0.0, id(norm.bias): 0.0}
    assert name in type(optimizer).__name__.lower()


def test_frozen_parameters_are_not_in_the_optimizer():
    task = Toy()
    task.layer[0].requires_grad_(False)
    (optimizer,) = fit(task).optimizers
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


@pytest.mark.parametrize(
    ("monitor", "mode"),
    [("val/loss", "min"), ("val/ece", "min"), ("val/auroc", "max"), ("val/escape_rate", "min"),
     ("val/overkill_rate", "min"), ("val/balanced_accuracy", "max")],
)  # fmt: skip
def test_the_better_direction_of_what_is_watched(monitor, mode):
    assert Toy(monitor=monitor).monitor == (monitor, mode)


# --- evaluation ---


class Evaluated(Toy):
    """Collects what it sees, in the order that the loader has."""

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.collect(index=batch["index"], value=batch["x"][:, 0] * 10)

    def on_validation_epoch_end(self) -> None:
        self.result = self.gathered()


def validate(task: Evaluated, order: list[int]) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.validate(task, DataLoader(Numbers(), batch_size=5, sampler=order), verbose=False)


def test_evaluated_samples_come_back_in_order():
    task = Evaluated()
    validate(task, [3, 1, 11, 0, 2, 10, 5])
    assert task.result["index"].tolist() == [0, 1, 2, 3, 5, 10, 11]
    assert task.result["value"].tolist() == [0, 10, 20, 30, 50, 100, 110]


def test_repeated_samples_are_refused():
    with pytest.raises(UserError, match="use_distributed_sampler"):
        validate(Evaluated(), [3, 1, 2, 0, 4, 3])


def test_an_evaluation_that_broke_off_leaves_nothing_behind():
    task = Evaluated()
    task.collect(index=torch.tensor([0, 1]), value=torch.zeros(2))
    validate(task, [0, 1, 2])
    assert task.result["value"].tolist() == [0, 10, 20]
