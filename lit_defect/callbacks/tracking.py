"""Where metrics go: a CSV file always, Weights & Biases when it can be had, and never a failed run for it."""

from __future__ import annotations

import csv
import io
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lit_defect.callbacks.artifacts import name_of
from lit_defect.errors import UserError
from lit_defect.files import whole_file
from lit_defect.runs import RunFolder, whole_rows
from lit_defect.tracking_login import logged_in

TrackingMode = Literal["auto", "online", "offline", "off"]
GLOBAL_STEP = "trainer/global_step"
"""The axis of every curve, by Lightning's name for it."""
_LOGIN_TIMEOUT = 20.0  # seconds that W&B may take to answer before the run goes on off line
_FINISH_TIMEOUT = 300.0  # seconds that the end of a run may wait for its upload; what is left stays on disk
_YOUNGER = {  # settings that the oldest version that serves has not
    "finish_timeout": _FINISH_TIMEOUT,
    # seconds until what was logged is on disk, 15 by default: W&B's process loses the rest when it is ended, as by a
    # scheduler that signals all processes of a job, or with a run that is killed
    "x_transaction_log_flush_interval": 1.0,
}
_WAITING = "WANDB_DATA_DIR"
_started: list[tuple[Any, RunFolder]] = []  # W&B's runs that this process has to finish, and their folders


class _AppendingWriter(ExperimentWriter):
    """Lightning's CSV writer, keeping the rows of earlier launches (the original deletes them)."""

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            self.metrics_keys = list(next(iter(whole_rows(path)), ()))

    def rewind(self, step: int) -> None:
        """Drop the rows from `step` on: the resumed run logs them again."""
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        rows = [row for row in whole_rows(path) if int(row["step"]) < step]
        if not rows:
            path.unlink()
            return
        self._write(rows)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """Add columns; the original leaves no rows where it is killed or the disk is full."""
        try:
            self._write(whole_rows(Path(self.metrics_file_path)))
        except OSError:
            self._check_log_dir_exists()  # the columns are the old ones still, also for what is logged at the end
            raise

    def _write(self, rows: Iterable[Mapping[str, str]]) -> None:
        path = Path(self.metrics_file_path)
        with whole_file(path) as file, io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
            writer = csv.DictWriter(text, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)


class MetricsCSV(CSVLogger):
    """`metrics.csv` in the run folder; a resumed run goes on with the same file.

    Args:
        folder: the run folder.
        every_n_steps: how often rows go to the disk, at the least.
    """

    def __init__(self, folder: Path, every_n_steps: int = 50) -> None:
        super().__init__(save_dir=folder, name="", version="", flush_logs_every_n_steps=every_n_steps)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer, made at its first use."""
        if self._experiment is None:
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = _AppendingWriter(log_dir=self.log_dir)
        return self._experiment

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop the rows from `step` on, before a resumed run logs them again."""
        self.experiment.rewind(step)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing: `config.yaml` has them all."""


class LearningRate(LearningRateMonitor):
    """Logs an optimizer's largest rate as `lr-<name>` and, where its groups differ, the least as `lr-<name>/least`.

    Lightning logs one column for each group: two for weights with and without decay, dozens for rates by layer.
    """

    def _get_optimizer_stats(self, optimizer: Any, names: list[str]) -> dict[str, float]:
        rates = list(super()._get_optimizer_stats(optimizer, names).values())
        name = names[0].partition("/")[0]
        return {name: max(rates)} | ({f"{name}/least": min(rates)} if min(rates) < max(rates) else {})


class RunWandb(WandbLogger):
    """Lightning's W&B logger over a run that was started here; a call of W&B that fails warns and costs nothing else.

    Args:
        run: W&B's.
        logged: by metric, the last step that an earlier launch of this run has logged: a resumed run repeats the steps
            since its checkpoint, and its curves would go back.
        evaluates: whether the figures are those of a finished training: they go to the summary, not to its curves.
    """

    def __init__(self, run: Any, logged: Mapping[str, int] | None = None, evaluates: bool = False) -> None:
        super().__init__(experiment=run)
        self.logged = dict(logged or {})
        self.evaluates = evaluates

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log what is new."""
        with harmless("logging metrics"):
            if self.evaluates:
                self.experiment.summary.update({key: value for key, value in metrics.items() if key != "epoch"})
                return
            new = {key: value for key, value in metrics.items() if step is None or step > self.logged.get(key, -1)}
            if new.keys() - {"epoch"}:
                super().log_metrics(new, step)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing: W&B has the whole configuration from the start."""


class StartTracking(Callback):
    """Starts W&B once the run's folder is this launch's: one that is refused, also for its data, leaves nothing there.

    Args:
        run, config, verb: as of `wandb_logger`, whose `mode` is the option `wandb`.
    """

    def __init__(self, run: RunFolder, config: dict[str, Any], verb: str) -> None:
        self.run = run
        self.config = config
        self.verb = verb
        self._begun = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Add its logger to the trainer's; a test that follows a fit has it already."""
        if self._begun:
            return
        self._begun = True
        if logger := wandb_logger(self.config.get("wandb", "auto"), self.run, self.config, self.verb):
            trainer.loggers = [*trainer.loggers, logger]


@contextmanager
def harmless(what: str) -> Iterator[None]:
    """Turn whatever W&B raises into a warning: tracking may never cost a training run."""
    try:
        yield
    except Exception as error:  # W&B raises many kinds
        warnings.warn(f"W&B: {what} failed ({type(error).__name__}: {error}); the run goes on", stacklevel=3)


@rank_zero_only
def wandb_logger(mode: TrackingMode, run: RunFolder, config: dict[str, Any], verb: str = "fit") -> RunWandb | None:
    """A started W&B logger, or None when it is off or cannot be started.

    An evaluation goes on with the W&B run of the training, under the same id. With `auto` it does so only where the
    training was tracked, or where the run folder is its own, as that of a generated set.

    Args:
        mode: `auto` is on line when an API key is found, off line otherwise; `online` warns if there is none.
        run: the run folder; W&B's own files go into its folder `wandb`.
        config: the whole configuration.
        verb: fit, validate, test or predict.
    """
    if mode == "off" or os.environ.get("WANDB_MODE") == "disabled":
        return None
    of_a_fit = verb != "fit" and run.record().get("status", "evaluation") != "evaluation"
    if of_a_fit and mode == "auto" and not _tracked(run):
        return None
    wanted = mode == "online" or (mode == "auto" and os.environ.get("WANDB_MODE") != "offline")
    online = wanted and logged_in()  # without a key W&B would stop and ask for one
    if mode == "online" and not online:
        warnings.warn("W&B: no API key (wandb login, or WANDB_API_KEY); this run is kept off line", stacklevel=2)
    logged = _logged_steps(run) if verb == "fit" and _tracked(run) else None
    about = describe(config, "fit" if of_a_fit else verb, run.record().get("command") if of_a_fit else sys.argv)
    if not of_a_fit:
        about["config"] = config
    for offline in [False, True] if online else [True]:
        try:
            return RunWandb(_start_wandb(offline, run, about), logged, evaluates=of_a_fit)
        except Exception as error:  # W&B raises many kinds; none of them may cost a training run
            warnings.warn(f"W&B could not be started {'off' if offline else 'on'} line: {error}", stacklevel=2)
            _end_wandb()  # its process holds the run's id from here on
            _forget_folder(run)
    return None


def describe(config: Mapping[str, Any], verb: str, command: Sequence[str] | None) -> dict[str, Any]:
    """What W&B is told of a run beside its configuration: the verb, system and data set as tags, the command as notes.

    An evaluation tells what the training has told, so that neither takes the place of the other.
    """
    classes = [str((config.get(part) or {}).get("class_path", "")).rpartition(".")[2] for part in ("model", "data")]
    return {
        "job_type": verb,
        "tags": [name[:64] for name in classes if name],
        "notes": " ".join(["python -m lit_defect", *(command or [])[1:]]),
    }


def _start_wandb(offline: bool, run: RunFolder, about: dict[str, Any]) -> Any:
    import wandb

    folder = run.path.resolve() / "wandb"  # W&B's own process may have begun in another folder
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault(_WAITING, str(folder))  # files to be uploaded wait beside the run, not in the user's home
    settings: dict[str, Any] = {"silent": True, "console": "off", "init_timeout": _LOGIN_TIMEOUT}
    settings |= {key: value for key, value in _YOUNGER.items() if key in wandb.Settings.model_fields}
    started = wandb.init(
        name=f"{run.experiment}/{run.run_id}",
        id=wandb_id(run),
        dir=folder.parent,
        project=os.environ.get("WANDB_PROJECT", "lit_defect"),
        group=run.experiment,
        mode="offline" if offline else "online",
        settings=wandb.Settings(**settings),
        resume=None if offline else "allow",
        **about,
    )
    _started.append((started, run))
    with harmless("naming the axis"):
        started.define_metric(GLOBAL_STEP)
        started.define_metric("*", step_metric=GLOBAL_STEP, step_sync=True)
    return started


def _forget_folder(run: RunFolder) -> None:
    """The next run of this process has another one."""
    if os.environ.get(_WAITING) == str(run.path.resolve() / "wandb"):
        del os.environ[_WAITING]


def _end_wandb() -> None:
    """End W&B's own process, whatever state it is in; the next call starts another one."""
    with suppress(Exception):  # it is gone, or there is no wandb
        import wandb

        wandb.teardown()


def wandb_id(run: RunFolder) -> str:
    """The id of a run folder's W&B run, the same after every restart."""
    return name_of(run.experiment, run.run_id)[-128:]


def _tracked(run: RunFolder) -> bool:
    """Whether an earlier launch of this run was logged to W&B."""
    return any((run.path / "wandb").glob(f"*run-*-{wandb_id(run)}"))


def _logged_steps(run: RunFolder) -> dict[str, int]:
    """By metric, the last step that `metrics.csv` holds."""
    last: dict[str, int] = {}
    for row in whole_rows(run.path / "metrics.csv"):
        last |= {key: int(row["step"]) for key, value in row.items() if value}
    return last


@contextmanager
def finishing() -> Iterator[None]:
    """Finish the W&B runs that begin inside, with the exit code that the program will have; a decorator, too."""
    code = 0
    try:
        yield
    except BaseException as error:
        code = _exit_code(error)
        raise
    finally:
        while _started:
            started, run = _started.pop()
            with harmless("finishing the run"):
                try:
                    started.summary["status"] = run.record().get("status")
                    started.finish(exit_code=code)
                except Exception:
                    _end_wandb()  # which is gone, or it would fail again, and loudly, when Python ends
                    raise
            _forget_folder(run)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 130 if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, UserError) else 1


def wandb_runs(trainer: Trainer) -> list[Any]:
    """W&B's runs that a trainer logs to; none on other processes than the first."""
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def mark_preempting(trainer: Trainer) -> None:
    """Tell W&B that this run is stopped to go on later; for who pre-empts, before the process exits with its code."""
    for run in wandb_runs(trainer):
        with harmless("marking the run as pre-empted"):
            run.mark_preempting()
