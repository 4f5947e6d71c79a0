"""How fast a training runs and what it waits for.

Lightning's own monitors do not serve here: `ThroughputMonitor` waits for the GPU after every step, does not see the
time that goes into loading, and counts what the first process sees; `DeviceStatsMonitor` logs some sixty values of
the allocator. This one reads the host's clock and asks the other processes when it logs, not at every step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import PassThroughProfiler, Profiler

_FETCHES = "train_dataloader_next"  # how Lightning calls the wait for a training batch
_GIB = 2**30


class Throughput(Callback):
    """Logs, after each epoch and every `every_n_steps` of a long one, means since the last time:

    - `time/step_seconds`: of an optimizer step, without validation, checkpoints and the very first batch;
    - `time/data_share`: how much of it the training waited for its loader; without it where `trainer.profiler` is
      the user's own, which tells that itself;
    - `time/pictures_per_second`: of all processes together;
    - `memory/gpu_gib`: the most that tensors have taken on one GPU in the run so far.

    Of several processes the slowest counts. The host runs ahead of a GPU by some steps at most, which a mean
    over many does not notice.

    Args:
        every_n_steps: optimizer steps.
        clock: () -> seconds.
    """

    def __init__(self, every_n_steps: int = 500, clock: Callable[[], float] = time.perf_counter) -> None:
        self.every_n_steps = every_n_steps
        self.clock = clock
        self._waits = _Waits(clock)
        self._running_since: float | None = None  # None while something else than training goes on
        self._warm = False
        self._begin(0)

    def _begin(self, step: int) -> None:
        self._seconds, self._pictures, self._from_step = 0.0, 0, step
        self._waits.seconds = 0.0

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Listen to how long the loader takes, in the place of a profiler."""
        if stage == "fit" and isinstance(trainer.profiler, PassThroughProfiler):
            trainer.profiler = self._waits

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count; what was measured before a restart is logged already."""
        self._warm = False
        self._begin(trainer.global_step)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on."""
        self._running_since = self.clock()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; log within a long epoch."""
        if not self._warm:  # the first batch starts workers, compiles and tunes: no step is like it
            self._warm = True
            self._running_since = self.clock()
            self._begin(trainer.global_step)
            return
        self._pictures += _count(batch)
        if trainer.global_step - self._from_step >= self.every_n_steps and not trainer.is_last_batch:
            self._pause()
            self._log(trainer, on_step=True)
            self._running_since = self.clock()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on, if the epoch does."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._running_since = self.clock()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log."""
        self._pause()
        self._log(trainer, on_step=False)

    def _pause(self) -> None:
        if self._running_since is not None:
            self._seconds += self.clock() - self._running_since
            self._running_since = None

    def _log(self, trainer: Any, on_step: bool) -> None:
        steps = trainer.global_step - self._from_step
        if steps < 1 or self._seconds <= 0:
            return
        device = trainer.strategy.root_device
        gpu = torch.cuda.max_memory_allocated(device) / _GIB if device.type == "cuda" else 0.0
        slowest = torch.tensor([self._seconds, self._waits.seconds / self._seconds, gpu], device=device)
        pictures = torch.tensor(self._pictures, device=device)
        seconds, share, gpu = trainer.strategy.reduce(slowest, reduce_op="max").tolist()
        pictures = trainer.strategy.reduce(pictures, reduce_op="sum")
        values = {"time/step_seconds": seconds / steps, "time/pictures_per_second": float(pictures) / seconds}
        if trainer.profiler is self._waits:
            values["time/data_share"] = share
        if device.type == "cuda":
            values["memory/gpu_gib"] = gpu
        if on_step:  # Lightning would keep the values back until its own next logging step
            for logger in trainer.loggers:
                logger.log_metrics(values, trainer.global_step - 1)
        else:
            trainer.lightning_module.log_dict(values, on_step=False, on_epoch=True, rank_zero_only=True)
        self._begin(trainer.global_step)


class _Waits(Profiler):
    """Counts the seconds that the training loop waits for its next batch, and profiles nothing else."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self.clock = clock
        self.seconds = 0.0
        self._since = 0.0

    def start(self, action_name: str) -> None:
        """A wait begins."""
        if action_name.endswith(_FETCHES):
            self._since = self.clock()

    def stop(self, action_name: str) -> None:
        """It ends."""
        if action_name.endswith(_FETCHES):
            self.seconds += self.clock() - self._since


def _count(batch: Any) -> int:
    """How many pictures a batch has."""
    if isinstance(batch, dict):
        batch = batch.get("image", batch.get("index", ()))
    elif isinstance(batch, list | tuple) and batch:
        batch = batch[0]
    return len(batch) if hasattr(batch, "__len__") else 0
