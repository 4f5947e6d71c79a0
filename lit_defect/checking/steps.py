"""A few real steps of training and a batch of validation, watched: does it learn, how long does it take?

The task's own hooks run under a real Trainer in their usual order. Two things differ from `fit`: before the first
step only a part of the samples is left, so that what a task prepares for all of them (features, latents) is quick;
and all ends in an exception after the last step that is needed.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from lit_defect.checking.findings import said
from lit_defect.checking.memory import Memory, checkpoint_bytes
from lit_defect.data.module import DefectDataModule
from lit_defect.errors import UserError

STEPS = 5  # at most; the first two warm up
_WARM_UP = 2
_LONG = 20.0  # seconds after which no further step is begun
_FEW = 8  # samples of a batch where a CPU stands in for another device
_EACH = 3  # samples that are left of each kind at least

Samples = dict[str, list[Any]]


class _Enough(Exception):  # noqa: N818 - no error
    """All has been seen."""


@dataclass
class Seen:
    """What a trial has shown.

    Attributes:
        stage: how far it came: data, model, preparation, training, validation, or the end.
        error: what stopped it; None where nothing did.
        losses: of each step.
        seconds: of each step, the wait for its data included.
        waited: seconds of each step until its batch was there.
        batch: samples of a step.
        missing: trained parameters that had no gradient in any step.
        broken: parameters with a gradient that was not finite in the last step.
        trained: parameters in the optimizer.
        prepared: seconds before the first step, for `share` of the samples.
        share: of the training samples that were left.
        validated: seconds of one batch of validation; None without.
        metrics: what was logged.
        checkpoint: bytes of one.
        memory: what a step takes.
    """

    stage: str = "data"
    error: BaseException | None = None
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    batch: int = 0
    missing: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    trained: int = 0
    prepared: float = 0.0
    share: float = 1.0
    validated: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    checkpoint: int = 0
    memory: Memory = field(default_factory=Memory)

    @property
    def warm(self) -> bool:
        """Whether there are steps beside those that warm up."""
        return len(self.seconds) > _WARM_UP

    @property
    def step_seconds(self) -> float:
        """Median of the steps, without those that warm up where there are others."""
        return median(self.seconds[_WARM_UP:] if self.warm else self.seconds[-1:])

    @property
    def data_share(self) -> float:
        """Share of these steps that was spent waiting for data."""
        taken = slice(_WARM_UP, None) if self.warm else slice(-1, None)
        return sum(self.waited[taken]) / max(1e-9, sum(self.seconds[taken]))


class Watch(Callback):
    """Watches a training, and ends it when enough is seen.

    Args:
        cache_dir: where the task may keep what it prepares.
        resumes: whether it goes on from a state, which may stand behind the last of fewer batches.
    """

    def __init__(self, cache_dir: Path, resumes: bool = False) -> None:
        self.cache_dir = cache_dir
        self.resumes = resumes
        self.seen = Seen()
        self._counting = ExitStack()
        self._without: set[str] = set()
        self._began = self._ended = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the task look at all samples, as it would; then leave some of them."""
        self.seen.stage = "model"
        data = getattr(trainer, "datamodule", None)
        if stage != "fit" or not isinstance(data, DefectDataModule) or self.resumes:
            return
        pl_module.setup(stage)
        whole, few = data.samples, fewer(data.samples, STEPS * data.batch_size)
        data.samples, data.cache_dir = few, self.cache_dir
        try:
            pl_module.setup(stage)
        except UserError:  # it needs more of them
            data.samples = whole
        self.seen.share = len(data.samples["train"]) / max(1, len(whole["train"]))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The model is built; what a task prepares comes next."""
        self.seen.stage = "preparation"
        self._began = time.monotonic()
        self._without = {name for name, parameter in pl_module.named_parameters() if parameter.requires_grad}
        optimized = {id(p) for optimizer in trainer.optimizers for g in optimizer.param_groups for p in g["params"]}
        self.seen.trained = sum(p.numel() for p in pl_module.parameters() if id(p) in optimized)
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first step is next."""
        self.seen.stage = "training"
        self.seen.prepared = time.monotonic() - self._began
        self._ended = self._first = time.monotonic()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch is there; count what the first forward pass keeps."""
        self.seen.waited.append(time.monotonic() - self._ended)
        self.seen.batch = _length(batch)
        if not self.seen.losses:
            self._counting.enter_context(self.seen.memory.counting(pl_module))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """The forward pass is done."""
        self._counting.close()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """All gradients of a step are there."""
        gradients = {name: p.grad for name, p in pl_module.named_parameters() if p.requires_grad and p.grad is not None}
        self._without -= gradients.keys()
        self.seen.broken = [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """A step is done."""
        seen = self.seen
        self._counting.close()
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        now = time.monotonic()
        seen.seconds.append(now - self._ended)
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        seen.losses.append(float(loss) if loss is not None else 0.0)
        self._ended = now
        if len(seen.seconds) < STEPS and now - self._first < _LONG and not trainer.is_last_batch:
            return
        seen.missing = [] if not trainer.optimizers else sorted(self._without)
        seen.memory.weigh(trainer, pl_module)
        seen.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        seen.checkpoint = checkpoint_bytes(trainer)
        trainer.should_stop = True  # which lets the validation follow

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One batch of validation."""
        self.seen.stage = "validation"
        self._ended = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing more is needed.

        Raises:
            _Enough: always.
        """
        self.seen.validated = time.monotonic() - self._ended
        self.seen.metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
        raise _Enough

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """There is no validation.

        Raises:
            _Enough: always.
        """
        raise _Enough

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Count no longer."""
        self._counting.close()


def try_steps(
    trainer: Any,
    model: LightningModule,
    data: LightningDataModule | None,
    ckpt_path: str | None = None,
    small: bool = False,
) -> Seen:
    """Train a few steps, validate a batch.

    Args:
        trainer: of one process; what the task prepares goes into its root folder.
        ckpt_path: state to go on from, or None.
        small: take small batches.
    """
    watch = Watch(Path(trainer.default_root_dir) / "cache", resumes=ckpt_path is not None)
    trainer.callbacks.insert(0, watch)
    with _batches_of(data, _FEW if small else None):
        try:
            trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        except _Enough:
            watch.seen.stage = "the end"
        except Exception as error:
            watch.seen.error = error
    return watch.seen


@contextmanager
def _batches_of(data: LightningDataModule | None, most: int | None) -> Iterator[None]:
    """Batches of at most so many samples; afterwards, all is as it was."""
    if not isinstance(data, DefectDataModule):
        yield
        return
    kept = ("batch_size", "global_batch_size", "eval_batch_size", "samples", "cache_dir")
    former = {name: getattr(data, name) for name in kept}
    data.global_batch_size = None  # `check_sharing` has put this process's share into `batch_size`
    if most is not None:
        data.batch_size, data.eval_batch_size = min(most, data.batch_size), min(most, data.eval_batch_size)
    try:
        yield
    finally:
        for name, value in former.items():
            setattr(data, name, value)


def fewer(samples: Samples, count: int) -> Samples:
    """About `count` samples of each split, spread over their kinds, in their order; `_EACH` of each kind at least."""
    return {split: _spread(some, count) for split, some in samples.items()}


def _spread(samples: list[Any], count: int) -> list[Any]:
    kinds: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for position, sample in enumerate(samples):
        kinds[sample.category, sample.label, sample.defect_type, sample.source].append(position)
    each = max(_EACH, -(-count // max(1, len(kinds))))
    taken = {position for positions in kinds.values() for position in positions[:each]}
    rest = [position for position in range(len(samples)) if position not in taken]
    taken.update(rest[: max(0, count - len(taken))])
    return [samples[position] for position in sorted(taken)]


def _length(batch: Any) -> int:
    """Samples of a batch; 0 for one of an unknown kind."""
    tensors = [
        value for value in (batch.values() if isinstance(batch, dict) else batch) if isinstance(value, torch.Tensor)
    ]
    return len(tensors[0]) if tensors and tensors[0].ndim else 0


def explained(error: BaseException) -> tuple[str, str]:
    """What an error of a trial says, and its remedy where it has none of its own."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return str(error).split(". ")[0], "a smaller --data.batch_size, --trainer.precision bf16-mixed"
    return said(error), ""
