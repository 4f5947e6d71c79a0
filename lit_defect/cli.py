"""The command line: `python -m lit_defect {fit,validate,test,predict} --config FILE`.

One LightningCLI in subclass mode. What it adds to Lightning's: a run folder for every run, `--resume`,
checkpoints by name (`--ckpt_path best`), and errors of one or two lines that name the key.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console

import lit_defect.data
import lit_defect.tasks  # noqa: F401  (imported so that the classes are found by their bare names)
from lit_defect import runs
from lit_defect.callbacks.run import BestCheckpoint, LastCheckpoint, RunRecorder
from lit_defect.callbacks.startup import StartupSummary
from lit_defect.callbacks.tracking import MetricsCSV, TrackingMode, wandb_logger
from lit_defect.errors import UserError
from lit_defect.spelling import explain, unknown_environment

PROGRAM = "lit_defect"
ENVIRONMENT_PREFIX = "LIT_DEFECT"


class Parser(LightningArgumentParser):
    """A parser whose errors are short, and which takes no abbreviated option for another one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong, the nearest right key and where help is to be had; exit with 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise SystemExit(_fail(explain(message, self, sys.argv[1:])))


class CLI(LightningCLI):
    """LightningCLI with run folders; see the module's docstring."""

    run: runs.RunFolder | None = None

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options of a run beside those of trainer, model and data."""
        group = parser.add_argument_group("The run's folder and tracking")
        group.add_argument("--experiment", type=str | None, default=None, help="Name of the experiment [Model-Data].")
        group.add_argument("--run_id", type=str | None, default=None, help="Name of the run [time, seed, random].")
        group.add_argument("--runs_dir", type=str, default="runs", help="Folder of all experiments.")
        group.add_argument("--resume", action="store_true", help="Go on with the newest run of this configuration.")
        group.add_argument(
            "--wandb",
            type=TrackingMode,
            default="auto",
            help="Weights & Biases: auto is on line when logged in.",
        )
        group.add_argument("--test_after_fit", type=bool, default=False, help="Test the best checkpoint after fit.")

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration as the user gave it (Lightning would let the checkpoint overrule it)."""

    def before_instantiate_classes(self) -> None:
        """Decide on the run folder before anything heavy is made."""
        config = self.config[self.subcommand]
        if config.get("fast_dev_run") or config.trainer.get("fast_dev_run"):
            return
        experiment = config.experiment or _default_experiment(config)
        if Path(experiment).name != experiment:
            raise UserError(f"--experiment {experiment}: a name without slashes is needed; folders go into --runs_dir")
        experiment_dir = Path(config.runs_dir) / experiment
        self._dump_config()
        if self.subcommand == "fit":
            self.run = self._run_to_fit(config, experiment_dir)
        else:
            self.run = self._run_to_evaluate(config, experiment_dir)
        os.environ[runs.RUN_ID_VARIABLE] = self.run.run_id  # inherited by the processes that Lightning starts
        self.config_dump.update(experiment=experiment, run_id=self.run.run_id, resume=False)

    def _run_to_fit(self, config: Any, experiment_dir: Path) -> runs.RunFolder:
        """The folder to train in: a new one, or with `--resume` the one to go on with."""
        config_hash = runs.hash_config(self.config_dump)
        run_id = config.run_id or runs.launched_run_id()
        if run_id:
            run = runs.RunFolder(experiment_dir / run_id)
        elif config.resume and (found := runs.find_resumable(experiment_dir, config_hash)):
            run = found
        else:
            run = runs.RunFolder(experiment_dir / runs.new_run_id(config.seed_everything))
        record = run.record()
        launched_by_rank_zero = "LOCAL_RANK" in os.environ and record.get("pid") == os.getppid()
        if not record or launched_by_rank_zero:
            if run.path.exists() and not record and any(run.path.iterdir()):
                raise UserError(f"{run.path} exists and is no run folder; choose another --run_id or --experiment")
            if config.resume:
                _say(f"nothing to resume: a new run starts in {run.path}")
        elif not config.resume:
            raise UserError(
                f"the run {run.path} exists and is never overwritten; go on with it by --resume, "
                "or start another one with --run_id NEW_NAME"
            )
        elif run.is_alive():
            raise UserError(f"{run.path} is being written by process {record.get('pid')}; wait for it or stop it")
        elif record.get("status") == "finished" and record.get("config_hash") == config_hash:
            _say(f"nothing to do: {run.path} is finished")
            raise SystemExit(0)
        if config.resume and run.last.is_file():
            config.ckpt_path, config.weights_only = str(run.last), True
            _say(f"resuming {run.path} from its last state")
        return run

    def _run_to_evaluate(self, config: Any, experiment_dir: Path) -> runs.RunFolder:
        """The folder that results go to: the checkpoint's own run, or a new one for a foreign checkpoint."""
        if not config.get("ckpt_path"):
            raise UserError(
                f"{self.subcommand} needs --ckpt_path best, last or a file: without one it would score random weights"
            )
        checkpoint = runs.resolve_checkpoint(config.ckpt_path, experiment_dir, config.run_id)
        config.ckpt_path, config.weights_only = str(checkpoint), True
        config.verbose = False  # the task prints a table of its own
        run_id = runs.launched_run_id() or runs.new_run_id(config.seed_everything)
        return runs.run_of_checkpoint(checkpoint) or runs.RunFolder(experiment_dir / run_id)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Lightning's trainer with the run folder's loggers and callbacks added to the user's own."""
        config = self._get(self.config_init, "trainer")
        own = list(config.get("callbacks") or [])
        if self.run is None:
            return super().instantiate_trainer(callbacks=[*own, *_missing(own, [StartupSummary()])], **kwargs)
        fitting = self.subcommand == "fit"
        recorder = RunRecorder(self.run, str(self.subcommand), self.config_dump, runs.hash_config(self.config_dump))
        callbacks: list[Callback] = [recorder, StartupSummary(self.run.path)]
        if fitting:
            monitor, mode = getattr(self.model, "monitor", ("val/loss", "min"))
            callbacks += [BestCheckpoint(self.run.checkpoints, monitor, mode), LastCheckpoint(self.run.last)]
            callbacks += [LearningRateMonitor("step")]
        if sys.stdout.isatty() and config.get("enable_progress_bar") is not False:
            callbacks += [RichProgressBar()]
        else:
            kwargs.setdefault("enable_progress_bar", False)
        loggers = config.get("logger")
        if fitting and loggers in (None, True):
            loggers = [MetricsCSV(self.run.path)]
            tracking = wandb_logger(self.config_dump.get("wandb", "auto"), self.run, self.config_dump)
            loggers += [tracking] if tracking else []
        elif loggers in (None, True):
            loggers = False
        return super().instantiate_trainer(
            callbacks=[*own, *_missing(own, callbacks)],
            logger=loggers,
            default_root_dir=str(self.run.path),
            **kwargs,
        )

    def after_fit(self) -> None:
        """Test the best checkpoint when `--test_after_fit` says so."""
        if self.run is None or not self._get(self.config, "test_after_fit") or self.trainer.interrupted:
            return
        checkpoint = self.run.best if self.run.best.is_file() else self.run.last
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=str(checkpoint), verbose=False)


def main(args: list[str] | None = None) -> CLI:
    """Run the command line; returns the CLI object after the run, for use from Python and in tests.

    Args:
        args: the arguments; None takes them from `sys.argv`.

    Raises:
        SystemExit: with 2 and a message on standard error for what the user can mend.
    """
    _quiet()
    try:
        unknown_environment(ENVIRONMENT_PREFIX, os.environ)
        return CLI(
            model_class=LightningModule,
            datamodule_class=LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=Parser,
            parser_kwargs={"prog": PROGRAM, "default_env": True, "env_prefix": ENVIRONMENT_PREFIX},
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults={
                "use_distributed_sampler": False,
                "enable_model_summary": False,
                "log_every_n_steps": 10,
            },
            auto_configure_optimizers=False,
            args=args,
        )
    except UserError as error:
        raise SystemExit(_fail(str(error))) from None


def _missing(own: list[Callback], extra: list[Callback]) -> list[Callback]:
    """Those of `extra` whose kind the user has not configured."""
    kinds = {type(callback) for callback in own}
    return [callback for callback in extra if type(callback) not in kinds]


def _default_experiment(config: Any) -> str:
    """`Model-Data`, from the class names."""
    return "-".join(str(config[key].class_path).rsplit(".", 1)[-1] for key in ("model", "data"))


def _fail(message: str) -> int:
    """Print an error; returns the exit code."""
    Console(stderr=True, highlight=False, soft_wrap=True).print("error:", style="bold red", end=" ")
    print(message, file=sys.stderr)
    return 2


@rank_zero_only
def _say(message: str) -> None:
    print(message, flush=True)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning as a reader wants it: what it says, not which line of whose code said it."""
    print(f"warning: {message}", file=sys.stderr)


def _quiet() -> None:
    """Silence what is no news to anybody: device banners, advertisements, worker advice for cached data."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    warnings.showwarning = _show_warning
    for message in (
        r".*does not have many workers which may be a bottleneck.*",
        r".*The number of training batches .* is smaller than the logging interval.*",
        r".*Checkpoint directory .* exists and is not empty.*",
        r".*is not currently supported for.*_pin_memory.*",
        r".*Found .* module\(s\) in eval mode at the start of training.*",
        r".*LeafSpec.*is deprecated.*",
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
        r".*'pin_memory' argument is set as true but no accelerator is found.*",
    ):
        warnings.filterwarnings("ignore", message=message)
