"""Where metrics go: a CSV file always, Weights & Biases when it can be had, and never a failed run for it."""

from __future__ import annotations

import csv
import os
import re
import warnings
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lit_defect.runs import RunFolder
from lit_defect.tracking_login import logged_in

TrackingMode = Literal["auto", "online", "offline", "off"]
_LOGIN_TIMEOUT = 20.0  # seconds that W&B may take to answer before the run goes on off line


class _AppendingWriter(ExperimentWriter):
    """Lightning's CSV writer, keeping the rows of earlier launches (the original deletes them)."""

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                self.metrics_keys = next(csv.reader(file), [])

    def rewind(self, step: int) -> None:
        """Drop the rows from `step` on: the resumed run logs them again."""
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) < step]
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(path)


class MetricsCSV(CSVLogger):
    """`metrics.csv` in the run folder; a resumed run goes on with the same file.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(save_dir=folder, name="", version="", flush_logs_every_n_steps=50)

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


@rank_zero_only
def wandb_logger(mode: TrackingMode, run: RunFolder, config: dict[str, Any]) -> Logger | None:
    """A started W&B logger, or None when it is off or cannot be started.

    Args:
        mode: `auto` is on line when an API key is found, off line otherwise; `online` warns if there is none.
        run: the run folder; W&B's own files go into its folder `wandb`.
        config: the whole configuration.
    """
    if mode == "off" or os.environ.get("WANDB_MODE") == "disabled":
        return None
    wanted = mode == "online" or (mode == "auto" and os.environ.get("WANDB_MODE") != "offline")
    online = wanted and logged_in()  # without a key W&B would stop and ask for one
    if mode == "online" and not online:
        warnings.warn("W&B: no API key (wandb login, or WANDB_API_KEY); this run is kept off line", stacklevel=2)
    for offline in [False, True] if online else [True]:
        try:
            return _start_wandb(offline, run, config)
        except Exception as error:  # W&B raises many kinds; none of them may cost a training run
            warnings.warn(f"W&B could not be started {'off' if offline else 'on'} line: {error}", stacklevel=2)
    return None


def _start_wandb(offline: bool, run: RunFolder, config: dict[str, Any]) -> WandbLogger:
    import wandb

    (run.path / "wandb").mkdir(parents=True, exist_ok=True)
    started = wandb.init(
        name=f"{run.experiment}/{run.run_id}",
        id=re.sub(r"[^\w.-]", "-", f"{run.experiment}-{run.run_id}")[-128:],
        dir=run.path,
        project=os.environ.get("WANDB_PROJECT", "lit_defect"),
        group=run.experiment,
        mode="offline" if offline else "online",
        config=config,
        settings=wandb.Settings(init_timeout=_LOGIN_TIMEOUT, silent=True, console="off"),
        resume=None if offline else "allow",
    )
    return WandbLogger(experiment=started)
