"""What every task shares: optimizer, schedule, randomness that survives a restart, evaluation on all ranks."""

from __future__ import annotations

import atexit
import difflib
import math
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lit_defect.errors import UserError
from lit_defect.runs import MIRRORED, MIRRORED_TRAIN, better, keep_previous

Batch = dict[str, Any]
_PATIENCE = 5.0  # seconds for what other processes have not answered


class DefectTask(LightningModule):
    """Base of the tasks; a subclass says what is particular to its system.

    Args:
        optimizer: name of a timm optimizer, such as `adamw`, `sgd`, `lamb`.
        lr: largest learning rate.
        lr_batch: samples of an optimizer step that `lr` is meant for; where a step has others (`data.batch_size` times
            processes and accumulated batches), `lr` is scaled. None takes `lr` as it is.
        lr_scaling: by the ratio of the two, `linear` (Goyal et al., arXiv 1706.02677, section 2.1), or its root,
            `sqrt`, as is usual with Adam.
        weight_decay: decay of weights; norms and biases have none.
        schedule: `cosine` falls to zero over the whole training, `constant` does not; both after the warm-up.
        warmup: share of all optimizer steps over which the learning rate rises from zero.
        monitor: logged value that chooses the best checkpoint; smaller is better for losses and errors. None where
            the last state is the result.

    Attributes:
        verbs: that the task has.
        judged_by: what is looked at where there is no verb `test`.
        exports: file or folder in the run's folder that other runs build upon; empty for none.
        learns: whether its verbs beside `fit` need a checkpoint.
    """

    verbs: tuple[str, ...] = ("fit", "validate", "test", "predict")
    judged_by = ""
    exports = ""
    learns = True

    def __init__(
        self,
        *,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        lr_batch: int | None = None,
        lr_scaling: Literal["linear", "sqrt"] = "linear",
        weight_decay: float = 0.01,
        schedule: Literal["cosine", "constant"] = "cosine",
        warmup: float = 0.05,
        monitor: str | None = "val/loss",
    ) -> None:
        super().__init__()
        if not lr > 0:
            raise UserError(f"model.init_args.lr = {lr}: expected a number > 0")
        if lr_batch is not None and lr_batch < 1:
            raise UserError(f"model.init_args.lr_batch = {lr_batch}: expected the samples of a step, 1 or more")
        if not 0 <= warmup < 1:
            raise UserError(f"model.init_args.warmup = {warmup}: expected a share of the steps, 0 <= warmup < 1")
        self.optimizer_name = optimizer
        self.lr = lr
        self.lr_batch = lr_batch
        self.lr_scaling = lr_scaling
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.warmup = warmup
        self.monitor: tuple[str, str] | None = None
        if monitor is not None:
            self.monitor = (monitor, better(monitor))
        self._evaluated: list[dict[str, Tensor]] = []

    def setup(self, stage: str) -> None:
        """Forget what an evaluation that broke off has left.

        Raises:
            UserError: a verb that the task has not.
        """
        if reason := self.objection(getattr(stage, "value", stage)):
            raise UserError(reason)
        self._evaluated.clear()
        if _distributed():
            _part_in_the_end()

    def objection(self, verb: str) -> str | None:
        """Why the task has no such verb; None if it has."""
        if verb in self.verbs:
            return None
        return f"{type(self).__name__} is judged by {self.judged_by}: it has no verb {verb}"

    @property
    def begins(self) -> bool:
        """Whether a training begins, and no checkpoint brings the weights, as `configure_model` has to know.

        Lightning itself tells later; with a trainer of one's own, set `trainer.ckpt_path` before `fit`.
        """
        trainer = self._trainer
        return trainer is not None and trainer.state.fn == "fit" and trainer.ckpt_path is None

    @contextmanager
    def opening(self, option: str) -> Iterator[None]:
        """Open in here what no checkpoint of the task holds, and what `option` of the model names.

        Raises:
            UserError: as in here; where a checkpoint is waiting for it, also what to do.
        """
        try:
            yield
        except UserError as error:
            if self.begins:
                raise
            other = f", or give its new place by --model.{option}" if self._trainer is not None else ""
            remedy = f"The checkpoint was trained on it and does not hold it: put it back{other}"
            raise UserError(f"{error}\n{remedy}") from error

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Of a task without the verb: Lightning, which comes before `setup`, would refuse in words of its own."""
        raise NotImplementedError

    @property
    def data(self) -> Any:
        """The trainer's data module."""
        trainer: Any = self.trainer
        return trainer.datamodule

    def results_name(self, stage: str) -> str:
        """What the results of an evaluation are called: `mirrored` instead of `test` on mirrored training pictures."""
        return MIRRORED if stage == "test" and getattr(self.data, "test", None) == MIRRORED_TRAIN else stage

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed augmentation and dropout by (seed, epoch, batch, rank): a resumed run draws the same."""
        words = [int(os.environ.get("PL_GLOBAL_SEED", 0)), self.current_epoch, batch_idx, self.global_rank]
        seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # torch.manual_seed formats a stack trace if CUDA sleeps
        else:
            torch.manual_seed(seed)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained, with learning rate and decay; norms and biases (one dimension) have no decay."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [
            {"params": [p for p in trained if p.ndim > 1], "lr": self.lr, "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "lr": self.lr, "weight_decay": 0.0},
        ]

    def configure_optimizers(self) -> Any:
        """Optimizer by name and a schedule counted in optimizer steps."""
        from timm.optim import create_optimizer_v2, list_optimizers

        if self.optimizer_name not in list_optimizers():
            known = [str(name) for name in list_optimizers()]
            near = difflib.get_close_matches(self.optimizer_name, known, n=3, cutoff=0.3)
            raise UserError(
                f"model.init_args.optimizer = {self.optimizer_name}: unknown to timm; near: {', '.join(near)}"
            )
        factor = self._lr_factor()
        groups = [{**group, "lr": factor * group["lr"]} for group in self.parameter_groups() if group["params"]]
        optimizer = create_optimizer_v2(groups, opt=self.optimizer_name, lr=factor * self.lr)
        total = self.trainer.estimated_stepping_batches
        if self.schedule == "cosine" and (math.isinf(total) or total <= 0):
            raise UserError(
                "model.init_args.schedule = cosine needs an end: set trainer.max_epochs or trainer.max_steps"
            )
        course = partial(warmup_and_decay, total=total, warmup=self.warmup, schedule=self.schedule)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, course)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _lr_factor(self) -> float:
        """By which learning rates are scaled, as a step has other samples than they are meant for."""
        if self.lr_batch is None:
            return 1.0
        trainer: Any = self.trainer
        ratio = self.data.batch_size * trainer.world_size * trainer.accumulate_grad_batches / self.lr_batch
        return ratio if self.lr_scaling == "linear" else math.sqrt(ratio)

    def on_fit_end(self) -> None:
        """Export the best state where `monitor` chose one, else the last; an earlier export is kept under a number.

        Not in `on_train_end`, which Lightning leaves out where a resumed fit has nothing left to train: that of a run
        that was stopped after its last epoch, before it could export.
        """
        trainer: Any = self.trainer
        if not self.exports or trainer.fast_dev_run or not trainer.is_global_zero or not trainer.global_step:
            return
        self.to(trainer.strategy.root_device)  # Lightning has moved it to the CPU
        path = Path(trainer.default_root_dir) / self.exports
        unfinished = path.with_name(f".{path.name}")
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
        with self._best_state():
            self.export(unfinished)
            keep_previous(path)
            unfinished.rename(path)
            self.draw_export(path.parent / "figures")
        self.cpu()

    def export(self, path: Path) -> None:
        """Write what `exports` names to `path`, where nothing is; rank 0 only."""
        raise NotImplementedError

    def draw_export(self, folder: Path) -> None:
        """Figures of what was exported; rank 0 only."""

    @contextmanager
    def _best_state(self) -> Iterator[None]:
        """The state of the best checkpoint, if there is one; afterwards the last again, as on the other ranks."""
        kept = [c for c in self.trainer.checkpoint_callbacks if getattr(c, "monitor", None)]
        path = next((best for callback in kept if (best := getattr(callback, "best_model_path", ""))), None)
        if path is None:
            yield
            return
        best = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        last = {key: value.clone() for key, value in self.state_dict().items() if key in best}
        self.load_state_dict(best, strict=False)  # a frozen base is in no checkpoint
        try:
            yield
        finally:
            self.load_state_dict(last, strict=False)

    # --- for the factory: `lit_defect.export` ---

    def for_factory(self, images: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        """What an exported model says of pictures, by name: numbers as float32, decisions as bool or integers.

        Traced into a graph: no branch may hang on a value of a tensor, nor on a size that is not fixed.

        Args:
            images: (B, 3, h, w) as the data module gives them, uint8 or float in [0, 1].
            size: (H, W) of the camera's pictures, at which maps are told.
        """
        raise NotImplementedError

    def factory_facts(self) -> dict[str, Any]:
        """What goes with these answers: names of classes, `threshold` (None where it is unknown)."""
        return {}

    def decide_at(self, threshold: float) -> None:
        """Reject from this score on, whatever was learnt."""
        raise UserError(f"--threshold: {type(self).__name__} decides without one")

    def collect(self, **tensors: Tensor) -> None:
        """Keep one evaluated batch; `index` (B,) must be among the tensors (B, ...)."""
        self._evaluated.append({key: value.detach().cpu() for key, value in tensors.items()})

    def gathered(self) -> dict[str, Tensor]:
        """What `collect` kept, of all ranks, ordered by index, every sample once; empties the store.

        Raises:
            UserError: samples were repeated, as a padding distributed sampler does.
        """
        local = {key: torch.cat([part[key] for part in self._evaluated]) for key in self._evaluated[0]}
        self._evaluated.clear()
        if self.trainer.world_size > 1:
            from torchmetrics.utilities.distributed import gather_all_tensors

            device = self.device
            local = {key: torch.cat(gather_all_tensors(value.to(device))).cpu() for key, value in local.items()}
        order = local["index"].argsort(stable=True)
        merged = {key: value[order] for key, value in local.items()}
        if merged["index"].unique().numel() != merged["index"].numel():
            raise UserError("samples were evaluated twice: set trainer.use_distributed_sampler to false")
        return merged


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@cache
def _part_in_the_end() -> None:
    """Part from the other processes of a run while Python still lives; Lightning does so for NCCL alone.

    Gloo's threads may hold what needs Python to be let go: one in twenty CPU processes was aborted at its very end, and
    a launcher takes that for a failed run (pytorch/pytorch#179291). What waits for another process, as after an error
    in the midst of a step, is not waited for long.
    """
    ends = threading.Event()

    def part() -> None:
        ends.wait()
        if torch.distributed.get_backend() != "nccl":
            torch.distributed.destroy_process_group()

    def end() -> None:
        if _distributed():
            ends.set()
            thread.join(_PATIENCE)

    thread = threading.Thread(target=part, daemon=True)
    thread.start()  # in the end Python lets none begin
    atexit.register(end)


def warmup_and_decay(step: int, total: float, warmup: float, schedule: str) -> float:
    """Factor of the learning rate at an optimizer step: linear rise, then cosine to zero or constant.

    Cosine: Loshchilov & Hutter, SGDR, ICLR 2017, eq. 5, without restarts.
    """
    rise = math.ceil(warmup * total) if math.isfinite(total) else 0
    if step < rise:
        return (step + 1) / rise
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, total - rise))))
