"""What a run would cost: steps, pictures, time, as its options say and a trial has measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, Timer

EPOCHS = 1000  # Lightning's, where nothing else ends a training


@dataclass(frozen=True)
class Cost:
    """Steps and validations of a run.

    Attributes:
        epochs: that are trained, the last perhaps not to its end; inf without an end.
        batches: of a process in an epoch.
        steps: of the optimizer in an epoch.
        total: of the optimizer in all.
        validations: in all.
        val_batches: of a process in one.
    """

    epochs: float
    batches: int
    steps: int
    total: float
    validations: int
    val_batches: int

    @classmethod
    def of(cls, trainer: Mapping[str, Any], batches: int, val_batches: int) -> Cost:
        """Of the options of a trainer, and the batches of a process in its data."""
        if count := trainer.get("fast_dev_run"):
            limits: dict[str, Any] = {"limit_train_batches": int(count), "limit_val_batches": int(count)}
            trainer = {**trainer, **limits, "max_epochs": 1, "max_steps": int(count), "overfit_batches": 0.0}
        few = trainer.get("overfit_batches") or 0
        batches = limited(batches, few if few else trainer.get("limit_train_batches"))
        steps = math.ceil(batches / (trainer.get("accumulate_grad_batches") or 1))
        epochs, most = trainer.get("max_epochs"), trainer.get("max_steps")
        most = math.inf if most in (None, -1) else most
        if epochs is None:
            epochs = math.inf if most < math.inf or trainer.get("max_time") else EPOCHS
        epochs = math.inf if epochs == -1 else epochs
        total = min(most, epochs * steps) if steps else 0
        epochs = min(epochs, total / steps) if steps else 0
        val_batches = limited(val_batches, trainer.get("limit_val_batches"))
        validations = 0
        if val_batches and math.isfinite(total):
            validations = _validations(trainer, batches, epochs)
        return cls(epochs, batches, steps, total, validations, val_batches)


def _validations(trainer: Mapping[str, Any], batches: int, epochs: float) -> int:
    """How often it validates; 0 where that depends on the clock."""
    interval = trainer.get("val_check_interval")
    interval = 1.0 if interval is None else interval
    if not isinstance(interval, int | float):
        return 0
    every = trainer.get("check_val_every_n_epoch")
    between = max(1, int(batches * interval)) if isinstance(interval, float) else interval
    if every is None:
        return int(epochs * batches // between)
    return int(epochs / every * (batches // between))


def limited(count: int, limit: Any) -> int:
    """Batches that are left by `limit_*_batches`: a number of them, or a share."""
    if limit is None:
        return count
    return min(count, limit) if isinstance(limit, int) else int(count * limit)


def kept(callbacks: Any, checkpoints: bool, best: bool) -> int | None:
    """How many checkpoints lie on the disk at a time, with the one that is being written; None for all.

    Args:
        callbacks: the user's own.
        checkpoints: whether the run keeps its own.
        best: whether these have a best one beside the last.
    """
    own = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    count = 2 + best if checkpoints else 0
    for callback in own:
        if isinstance(callback, ModelCheckpoint):
            if callback.save_top_k == -1:
                return None
            count += callback.save_top_k + bool(callback.save_last)
        elif isinstance(callback, Checkpoint):
            count += 1
    return count


def seconds_of(max_time: Any) -> float | None:
    """What `trainer.max_time` allows; None for no limit."""
    return Timer(max_time).time_remaining() if max_time else None
