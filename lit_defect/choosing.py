"""Which run a command line means: a new one, one that goes on, or that of a checkpoint; and what it refuses."""

from __future__ import annotations

import importlib
import os
import warnings
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only

from lit_defect import runs
from lit_defect.claims import LAUNCHES, Claim, last_launch, still_writes
from lit_defect.console import say
from lit_defect.errors import UserError

LIKE_FIT = ("fit", "check")
_NOTHING = (
    "nothing to resume: a new run starts in {}\n  (a run of another configuration goes on when --run_id names it)"
)


class RunChoice:
    """Chooses a run's folder and checkpoint.

    Args:
        verb: of the command line.
        config: its options; `ckpt_path` and `weights_only` are changed where a checkpoint is found.
        dump: the same in plain types, as what is computed is compared.

    Attributes:
        experiment: its name.
        folder: of all its runs.
        before: the last launch that has written the folder which `run` gives.

    Raises:
        UserError: a name that is none.
    """

    def __init__(self, verb: str, config: Any, dump: dict[str, Any]) -> None:
        self.verb, self.config, self.dump = verb, config, dump
        classes = (str(config[key].class_path).rsplit(".", 1)[-1] for key in ("model", "data"))
        self.experiment: str = config.experiment or "-".join(classes)
        runs.check_name("--experiment", self.experiment)
        if config.run_id is not None:
            runs.check_name("--run_id", config.run_id)
        if config.trainer.default_root_dir is not None:
            raise UserError(
                "trainer.default_root_dir is the run's folder here: set --runs_dir and --experiment instead"
            )
        self.folder = Path(config.runs_dir) / self.experiment
        self.before: Claim | None = None

    def find_checkpoint(self) -> None:
        """Find the file behind `--ckpt_path`, where the verb takes one.

        Raises:
            UserError: there is no such file, or the verb needs one.
        """
        name = self.config.ckpt_path
        if name and self.verb in LIKE_FIT and name in ("best", "last"):
            raise UserError(f"fit --ckpt_path {name}: --resume goes on with a run; a file may be given, too")
        if name:
            self._take(runs.resolve_checkpoint(name, self.folder, self.config.run_id))
        elif self.verb not in LIKE_FIT and _learns(self.config.model.class_path):
            raise UserError(
                f"{self.verb} needs --ckpt_path best, last or a file: without one it would score random weights"
            )

    def run(self) -> runs.RunFolder:
        """The folder to write into.

        Raises:
            UserError: `fit` would overwrite a run, or has nothing to do in it.
            SystemExit: with 0, the run to go on with is finished.
        """
        if self.verb in LIKE_FIT:
            return self._to_fit()
        path = self.config.ckpt_path
        if path and (own := runs.run_of_checkpoint(Path(path))):
            return own
        run = self._folder()
        if self.config.resume:
            say(f"going on in {run.path}" if run.record() else _NOTHING.format(run.path))
        return run

    def _take(self, checkpoint: Path) -> None:
        self.config.ckpt_path, self.config.weights_only = str(runs.whole_checkpoint(checkpoint)), True

    def _to_fit(self) -> runs.RunFolder:
        """The folder to train in: a new one, or with `--resume` the one to go on with."""
        run = self._folder()
        self.before = last_launch(run.path)  # looked up before the run: what changes it from here on is another launch
        finished = runs.is_finished(run, self.dump)
        if not getattr(rank_zero_only, "rank", 0):
            self._check(run, finished)
        elif self.config.resume and finished:
            raise SystemExit(0)  # as the first process does, which nobody shall wait for
        if self.config.resume and run.last.is_file():
            self._take(run.last)
            say(f"resuming {run.path} from its last state")
        return run

    def _folder(self) -> runs.RunFolder:
        """The folder that is named, or with `--resume` that of the newest run of this verb, or a new one."""
        config = self.config
        launched = runs.launched_run_id()
        run = runs.RunFolder(self.folder / (config.run_id or launched or runs.new_run_id(config.seed_everything)))
        inherited = "LOCAL_RANK" in os.environ and launched == os.environ.get(runs.RUN_ID_VARIABLE)
        if not config.resume or inherited or config.run_id or run.record():
            return run
        config_hash = runs.hash_config(self.dump)  # looked for under a new job of a scheduler, too
        return runs.find_resumable(self.folder, config_hash, trains=self.verb in LIKE_FIT) or run

    def _check(self, run: runs.RunFolder, finished: bool) -> None:
        """Refuse to overwrite what is there; say what resuming finds. On rank 0: the others follow it."""
        config, record = self.config, run.record()
        try:
            run.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{run.path.parent} cannot be made ({error.strerror}): choose another --runs_dir") from None
        if not record:
            there = list(run.path.iterdir()) if run.path.exists() else []
            if not all(map(_is_of_beginning, there)):
                raise UserError(f"{run.path} exists and is no run folder; choose another --run_id or --experiment")
            if there and not config.resume:  # it may also be another's that is just beginning
                raise UserError(
                    f"{run.path} was left by a launch that ended before its run began; start it there by --resume, "
                    "or choose another --run_id"
                )
            if config.resume:
                say(_NOTHING.format(run.path))
        elif not config.resume:
            raise UserError(
                f"the run {run.path} exists and is never overwritten; go on with it by --resume, "
                "or start another one with --run_id NEW_NAME"
            )
        elif run.is_alive():
            raise UserError(f"{run.path} is being written by process {record.get('pid')}; wait for it or stop it")
        elif finished:
            say(f"nothing to do: {run.path} is finished")
            raise SystemExit(0)
        elif (wanted := config.trainer.max_epochs) is not None and 0 <= wanted < record.get("epochs", 0):
            raise UserError(
                f"{run.path} has trained {record['epochs']} epochs already, so --trainer.max_epochs {wanted} leaves "
                "nothing to do; name a larger number"
            )
        elif changes := runs.changed_options(run.config(), self.dump):
            warnings.warn(
                f"the run goes on with other options ({'; '.join(changes)}); what its checkpoint holds, such as the "
                "optimizer with its learning rates, comes from there",
                stacklevel=2,
            )
        if self.before is not None and self.verb == "fit" and still_writes(self.before):  # `check` does not wait
            raise UserError(
                f"{run.path} is being written by {self.before.worker}; wait for it or stop it, or start another run "
                "with --run_id NEW_NAME"
            )


def _is_of_beginning(path: Path) -> bool:
    """Whether a file of a run folder is written before `run.json`, so that a killed run may have left it alone."""
    return path.name in ("config.yaml", "wandb", LAUNCHES) or path.name.startswith((".run.json.", ".config.yaml."))


def _learns(class_path: str) -> bool:
    """Whether a task of this class is nothing without a checkpoint."""
    module, _, name = class_path.rpartition(".")
    return bool(getattr(getattr(importlib.import_module(module), name), "learns", True))
