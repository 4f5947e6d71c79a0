"""Callbacks that keep a run: its folder and record, its last state, its results."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_defect.callbacks.tracking import MetricsCSV, mark_preempting
from lit_defect.claims import Claim, begin_launch, last_launch, still_writes
from lit_defect.errors import UserError
from lit_defect.files import whole_file
from lit_defect.runs import RunFolder, describe_process, keep_previous
from lit_defect.stopping import STOP, Stopped

_STEPS_BETWEEN = 1000  # at most, until several processes ask each other again whether to stop


class RunRecorder(Callback):
    """Creates the run folder, writes config, splits and status into it, and lets the task write its results.

    Args:
        run: the folder, decided by the command line.
        stage: the verb.
        config: the whole configuration, plain types.
        config_hash: hash of what the configuration computes.
        before: the last launch that had written the folder when it was decided on.
    """

    def __init__(
        self, run: RunFolder, stage: str, config: dict[str, Any], config_hash: str, before: Claim | None = None
    ) -> None:
        self.run = run
        self.stage = stage
        self.config = config
        self.config_hash = config_hash
        self.before = before
        self._begun = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the folder before anything else writes into it.

        Raises:
            UserError: the processes of one launch have not come to the same folder; another launch has taken it;
                it cannot be written.
        """
        agrees = trainer.strategy.broadcast(self.run.run_id) == self.run.run_id
        if not trainer.strategy.reduce_boolean_decision(agrees):  # all say so, rather than that others are gone
            raise UserError("the processes of this launch disagree on the run's folder: give all of them one --run_id")
        if self._begun:
            return
        # What keeps the first process from it is said to all: none waits for one that has ended.
        if reason := trainer.strategy.broadcast(self._begin(trainer) if trainer.is_global_zero else ""):
            raise UserError(reason)
        self._begun = True

    def _begin(self, trainer: Trainer) -> str:
        """Take the folder and write which run it is; why that cannot be, empty if it is done."""
        try:
            # The folder was chosen before data were looked at, which may have taken minutes.
            if self.stage == "fit" and (self.run.is_alive() or not begin_launch(self.run.path, self.before)):
                return (
                    f"{self.run.path} was taken by another process, which began at the same time; wait for it or stop "
                    "it, or start another run with --run_id NEW_NAME"
                )
            if self.stage != "fit":  # beside a training, whose best state may be evaluated while it goes on
                before = last_launch(self.run.path, self.stage)
                if still_writes(before) or not begin_launch(self.run.path, before, self.stage):
                    by = f" by {before.worker}" if before is not None else ""
                    return f"{self.stage} of {self.run.path} is being written{by}; wait for it or stop it"
            if self.stage == "fit" or not self.run.record():
                self._write(trainer)
        except OSError as error:
            return (
                f"{self.run.path} cannot be written ({error.strerror or error}): make room or mend the folder, or "
                "choose another --runs_dir"
            )
        return ""

    def _write(self, trainer: Trainer) -> None:
        if self.stage == "fit" and self.run.last.is_file():
            self._compare_devices(trainer)
        self.run.path.mkdir(parents=True, exist_ok=True)
        config = self.run.path / "config.yaml"
        text = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)
        if not config.is_file() or config.read_text(encoding="utf-8") != text:
            keep_previous(config)  # of a run that goes on with other options
            with whole_file(config) as file:
                file.write(text.encode())
        process, before = describe_process(sys.argv), self.run.record()
        self.run.update(
            **{**process, "started": before.get("started", process["started"])},
            resumed=[*before.get("resumed", []), *([process["started"]] if before else [])],
            status="running" if self.stage == "fit" else "evaluation",
            seed=self.config.get("seed_everything"),
            config_hash=self.config_hash,
            devices=trainer.world_size,
        )

    def _compare_devices(self, trainer: Trainer) -> None:
        """Warn where a run goes on with steps of other samples than those that its schedule counts."""
        before = self.run.record().get("devices", trainer.world_size)
        data: Any = getattr(trainer, "datamodule", None)
        if before != trainer.world_size and getattr(data, "global_batch_size", None) is None:
            rank_zero_warn(
                f"the run had {before} processes and goes on with {trainer.world_size}: its steps have other samples, "
                "while its learning rate and the steps that are behind it stay as they were. "
                "Go on with as many, or train with data.global_batch_size from the start"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write which sample went into which split, and what the checks found."""
        records = getattr(getattr(pl_module, "data", None), "write_records", None)
        if trainer.is_global_zero and records is not None:
            records(self.run.path)
        self._describe_data(trainer)
        self._start = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the task show what it will train on; drop the rows that a resumed run will log again."""
        preview = getattr(pl_module, "write_preview", None)
        if preview is not None and trainer.is_global_zero:
            preview(self.run.path)
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.rewind(trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say in `run.json` that the run is complete, after the task has exported, and how long it took."""
        if stage == "fit" and trainer.is_global_zero:
            seconds = round(time.monotonic() - self._start, 1)
            self.run.update(
                status="interrupted" if trainer.interrupted else "finished",
                seconds=[*self.run.record().get("seconds", []), seconds],
                epochs=trainer.current_epoch,
                steps=trainer.global_step,
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say in `run.json` that the run broke off, and why."""
        if trainer.is_global_zero and self.stage == "fit" and self._begun:
            exception = STOP.explained(exception)
            stopped = isinstance(exception, KeyboardInterrupt | SystemExit)
            if preempted := isinstance(exception, Stopped) and exception.preempted:
                mark_preempting(trainer)
            with contextlib.suppress(OSError):  # a full disk must not hide what it has caused
                self.run.update(
                    status="preempted" if preempted else "interrupted" if stopped else "failed",
                    error=f"{type(exception).__name__}: {exception}"[:2000],
                )
            if stopped:
                print(f"\nstopped; --resume goes on with {self.run.path}", flush=True)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Describe the data of a run that only evaluates."""
        self._describe_data(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same, for a run that generates; with `data.predict_root` there is no data set to describe."""
        if getattr(trainer.datamodule, "predict_root", None) is None:  # type: ignore[attr-defined]
            self._describe_data(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the results of the test split."""
        self._write_results(trainer, pl_module, "test")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the results of the `validate` verb (not of the epochs of a fit)."""
        if not trainer.sanity_checking and self.stage == "validate":
            self._write_results(trainer, pl_module, "val")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the predictions."""
        self._write_results(trainer, pl_module, "predict")

    def _describe_data(self, trainer: Trainer) -> None:
        """`data` and `data_fingerprint` of `run.json`; an evaluation leaves those of the training as they are."""
        data: Any = getattr(trainer, "datamodule", None)
        if not trainer.is_global_zero or not hasattr(data, "fingerprint"):
            return
        record = self.run.record()
        if self.stage == "fit" or (record.get("status") == "evaluation" and "data" not in record):
            self.run.update(
                data={"class": type(data).__name__, "counts": data.counts()}, data_fingerprint=data.fingerprint()
            )

    def _write_results(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        write = getattr(pl_module, "write_results", None)
        if write is not None and trainer.is_global_zero:
            write(self.run.path, stage)


class BestCheckpoint(ModelCheckpoint):
    """Keeps `best.ckpt`, the best state by what the task monitors; without validation, the latest.

    Args:
        folder: where it lies.
        monitor: logged value, such as `val/auroc`.
        mode: `min` or `max`.
    """

    def __init__(self, folder: Path, monitor: str, mode: str) -> None:
        super().__init__(dirpath=folder, filename="best", monitor=monitor, mode=mode, enable_version_counter=False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Expect nothing of a validation that will not be; before a resumed run restores this callback."""
        super().setup(trainer, pl_module, stage)
        counts = getattr(getattr(trainer, "datamodule", None), "counts", None)
        validates = trainer.limit_val_batches and (counts is None or "val" in counts())
        if not validates and str(self.monitor).startswith("val/"):
            self.monitor = None


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt`, the state that a killed run goes on from.

    Saves after every training epoch and, within long epochs, whenever `every_n_seconds` have passed
    or `every_n_steps` optimizer steps are done. Lightning's ModelCheckpoint takes one trigger only.
    When a signal asks the run to stop (`lit_defect.stopping`), on all processes or on one, it saves after the batch
    and stops; in a validation, too, which a resumed run then begins anew before it trains on. Several processes look
    for that about once a second: they reduce a few numbers, among them after how many batches they do it again.

    Args:
        path: the file; it is replaced atomically. None takes `checkpoints/last.ckpt` in the trainer's root.
        every_n_steps: optimizer steps between saves, or None.
        every_n_seconds: seconds between saves, or None.
    """

    def __init__(
        self,
        path: Path | None = None,
        every_n_steps: int | None = None,
        every_n_seconds: float | None = 300.0,
    ) -> None:
        self.path = path
        self.every_n_steps = every_n_steps
        self.every_n_seconds = every_n_seconds
        self._seen_step = 0
        self._saved_at = time.monotonic()
        self._agreed_at = (0, time.monotonic())  # step, or batch of a validation, and time of the last agreement
        self._agrees_from = 0  # step or batch of the next one
        self._stops_until = 0.0  # batch of a validation: all processes have so many

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count time and steps from here; note a signal instead of acting on it at once."""
        STOP.defer()
        self._saved_at = time.monotonic()
        self._seen_step = trainer.global_step
        self._agree_soon(trainer.global_step)
        trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset_on_restart()  # after `_begin_anew`

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save within an epoch when it is due; stop when told so.

        Raises:
            Stopped: on all processes, after the state is saved.
        """
        step = trainer.global_step
        if step == self._seen_step:
            return  # half of an accumulated gradient, which no checkpoint holds
        self._seen_step = step
        if trainer.is_last_batch:
            return  # the epoch's own save follows, with its validation done
        due, number = bool(self.every_n_steps) and step % int(self.every_n_steps or 1) == 0, 0
        if step >= self._agrees_from or trainer.world_size == 1:
            late = self.every_n_seconds is not None and time.monotonic() - self._saved_at > self.every_n_seconds
            late, number = self._agree(trainer, late)
            due |= late
        if due or number:
            _log_step(trainer)
            self._save(trainer)
        if number:
            STOP.stop(number, follows=not trainer.is_global_zero)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle within which batches it may be stopped: processes that have fewer do not wait for the others."""
        self._stops_until = 0.0
        if trainer.state.fn == "fit" and not trainer.sanity_checking and _can_begin_anew(trainer):
            own = torch.tensor(trainer.num_val_batches[0], dtype=torch.float32)
            least: Any = trainer.strategy.reduce(own.to(trainer.strategy.root_device), reduce_op="min")
            self._stops_until = float(least)
            self._agree_soon(0)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop when told so: the validation may last longer than the time that is left.

        Raises:
            Stopped: on all processes, after the state is saved, to which nothing of the validation belongs.
        """
        done = batch_idx + 1
        if dataloader_idx or done > self._stops_until or (done < self._agrees_from and trainer.world_size > 1):
            return
        if number := self._agree(trainer, count=done)[1]:
            _begin_anew(trainer)
            self._save(trainer)
            STOP.stop(number, follows=not trainer.is_global_zero)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on steps are counted again."""
        self._agree_soon(trainer.global_step)

    def _agree_soon(self, count: int) -> None:
        self._agreed_at, self._agrees_from = (count, time.monotonic()), 0

    def _agree(self, trainer: Trainer, late: bool = False, count: int | None = None) -> tuple[bool, int]:
        """Whether a save is due and which signal asks to stop (0 for none), of any process, on all of them.

        Args:
            late: whether this process finds a save due.
            count: batches of a validation that are done; None counts steps.
        """
        number = STOP.number or 0
        if trainer.world_size == 1:
            return late, number
        step, now = trainer.global_step if count is None else count, time.monotonic()
        seen_step, seen_at = self._agreed_at
        pace = (step - seen_step) / max(now - seen_at, 1e-3)  # steps a second
        told = torch.tensor([int(late), number, int(pace)], dtype=torch.int32, device=trainer.strategy.root_device)
        late, number, pace = trainer.strategy.reduce(told, reduce_op="max").tolist()  # type: ignore[union-attr]
        self._agreed_at, self._agrees_from = (step, now), step + max(1, min(pace, _STEPS_BETWEEN))
        return bool(late), number

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after the epoch and its validation, with what the task adds at the end; stop when told so.

        Raises:
            Stopped: on all processes.
        """
        complete = getattr(pl_module, "complete", None)
        if complete is not None:
            complete()  # EarlyStopping may have ended the training just now, after the task's own hook
        self._save(trainer)
        if number := self._agree(trainer)[1]:
            STOP.stop(number, follows=not trainer.is_global_zero)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All is saved: from here on a signal stops the run at once.

        Raises:
            Stopped: on all processes, where one came since the last epoch's end.
        """
        if number := self._agree(trainer)[1]:
            STOP.stop(number, follows=not trainer.is_global_zero)
        STOP.at_once()

    def _save(self, trainer: Trainer) -> None:
        if getattr(trainer, "fast_dev_run", False):
            return
        path = self.path or Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        for logger in trainer.loggers:
            logger.save()  # what was logged before this state is on disk with it
        trainer.save_checkpoint(path, weights_only=False)
        self._saved_at = time.monotonic()


def _log_step(trainer: Trainer) -> None:
    """Log what Lightning would log of this step after the hook: a state must not be ahead of its metrics.

    Whoever goes on from it logs the next step, and the row of this one would be missing.
    """
    connector = trainer._logger_connector
    connector.update_train_step_metrics()

    def only_once() -> None:
        del connector.__dict__["update_train_step_metrics"]

    connector.__dict__["update_train_step_metrics"] = only_once  # in place of Lightning's own call, which follows


def _can_begin_anew(trainer: Any) -> bool:
    """Whether a run that goes on from a state within this validation would come to it again.

    Lightning does not where the training is over, nor where the clock says when to validate; and `WeightAveraging` has
    put other weights in the model's place meanwhile.
    """
    over = trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step
    lent = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)
    return not (over or lent or trainer._val_check_time_interval is not None)


def _begin_anew(trainer: Any) -> None:
    """Let the state that is saved next say that the first batch of this validation is on its way.

    There Lightning goes on with a validation; after a batch that is done it would go on training.
    """
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    before = progress.total.completed - progress.current.completed
    progress.total.processed = progress.total.completed = before
    progress.total.ready = progress.total.started = before + 1
    progress.current.reset()
