"""The command line: `python -m lit_defect {fit,validate,test,predict} --config FILE`.

One LightningCLI in subclass mode. What it adds to Lightning's: a run folder for every run, `--resume`,
checkpoints by name (`--ckpt_path best`), and errors of one or two lines that name the key.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console

import lit_defect.data
import lit_defect.tasks  # imported so that the classes are found by their bare names
from lit_defect import runs
from lit_defect.callbacks.artifacts import Checkpoints
from lit_defect.callbacks.results_tracking import ResultsTracking
from lit_defect.callbacks.run import BestCheckpoint, LastCheckpoint, RunRecorder
from lit_defect.callbacks.seen import SeenPictures
from lit_defect.callbacks.startup import EpochLines, StartupSummary
from lit_defect.callbacks.storage import keep_files_whole
from lit_defect.callbacks.throughput import Throughput
from lit_defect.callbacks.tracking import LearningRate, MetricsCSV, TrackingMode, finishing, wandb_logger
from lit_defect.checking import Findings, Job, Launch, examine, one_process, sources
from lit_defect.errors import UserError
from lit_defect.spelling import explain, unknown_environment
from lit_defect.stopping import STOP, Stopped, ended, take_over
from lit_defect.tasks.base import DefectTask

PROGRAM = "lit_defect"
ENVIRONMENT_PREFIX = "LIT_DEFECT"
_PATIENCE = 10.0  # seconds that the other processes of a run that ends early have to end by themselves
_NOTHING = (
    "nothing to resume: a new run starts in {}\n  (a run of another configuration goes on when --run_id names it)"
)
VERBS = {
    "fit": "Train a model; --resume goes on with a run that was stopped.",
    "check": "Say whether fit would work, and at what cost: data, weights, a step, memory, disk. Takes fit's options.",
    "validate": "Evaluate a checkpoint on the validation split.",
    "test": "Evaluate a checkpoint on the test split.",
    "predict": "Write the predictions of a checkpoint for new pictures (--data.predict_root) or a split "
    "(--data.predict_split; the test split if neither is given).",
}


_LIKE_FIT = ("fit", "check")


class CheckingTrainer(Trainer):
    """A trainer with the verb `check`, which `CLI.check` carries out; its options are those of `fit`."""

    check = Trainer.fit


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
    findings: Findings | None = None

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's verbs, and `check` with the options of `fit`."""
        verbs = LightningCLI.subcommands()
        return {"fit": verbs["fit"], "check": verbs["fit"], **verbs}

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
        group.add_argument(
            "--wandb_checkpoints",
            type=Checkpoints,
            default="reference",
            help="What W&B keeps of checkpoints: where they lie, the best one itself, or nothing.",
        )
        group.add_argument("--test_after_fit", type=bool, default=False, help="Test the best checkpoint after fit.")

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """The verbs, described by ourselves: Lightning cuts its docstrings off after a line."""
        super()._add_subcommands(parser, **{v: {"description": text, **kwargs.get(v, {})} for v, text in VERBS.items()})
        for action in parser._actions:
            for choice in getattr(action, "_choices_actions", ()):
                choice.help = VERBS[choice.dest]
        check = self._subcommand_parsers["check"]
        check.env_prefix = self._subcommand_parsers["fit"].env_prefix  # it checks what these variables say, too
        group = check.add_argument_group("What the check says")
        group.add_argument(
            "--json", type=str | None, default=None, help="File for the findings; - for standard output."
        )
        group.add_argument("--strict", action="store_true", help="Let warnings count as failures.")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Refuse environment variables that would be ignored, then parse."""
        own = {verb: known for verb, known in self._subcommand_parsers.items() if verb != "check"}  # it takes fit's
        unknown_environment(ENVIRONMENT_PREFIX, os.environ, own)
        super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration as the user gave it (Lightning would let the checkpoint overrule it)."""

    def before_instantiate_classes(self) -> None:
        """Decide on the run folder before anything heavy is made."""
        config = self.config[self.subcommand]
        if "verbose" in config:
            config.verbose = False  # the task prints a table of its own
        if self.subcommand == "predict" and config.return_predictions is None:
            config.return_predictions = False  # they are written to files; Lightning would keep all of them in memory
        experiment = config.experiment or _default_experiment(config)
        runs.check_name("--experiment", experiment)
        if config.run_id is not None:
            runs.check_name("--run_id", config.run_id)
        if config.trainer.default_root_dir is not None:
            raise UserError(
                "trainer.default_root_dir is the run's folder here: set --runs_dir and --experiment instead"
            )
        experiment_dir = Path(config.runs_dir) / experiment
        self._dump_config()
        for key in ("json", "strict"):  # of `check` alone: what is left is what fit computes
            self.config_dump.pop(key, None)
        if config.ckpt_path:
            self._take_checkpoint(config, experiment_dir)
        elif self.subcommand not in _LIKE_FIT and _learns(config.model.class_path):
            raise UserError(
                f"{self.subcommand} needs --ckpt_path best, last or a file: without one it would score random weights"
            )
        if config.trainer.fast_dev_run or self.subcommand == "check":
            return
        if self.subcommand == "fit":
            self.run = self._run_to_fit(config, experiment_dir)
        else:
            own = runs.run_of_checkpoint(Path(config.ckpt_path)) if config.ckpt_path else None
            self.run = own or self._run_folder(config, experiment_dir)
            if config.resume and own is None:
                _say(f"going on in {self.run.path}" if self.run.record() else _NOTHING.format(self.run.path))
        os.environ[runs.RUN_ID_VARIABLE] = self.run.run_id  # inherited by the processes that Lightning starts
        self.config_dump.update(experiment=experiment, run_id=self.run.run_id, resume=False)

    def _take_checkpoint(self, config: Any, experiment_dir: Path) -> None:
        if self.subcommand in _LIKE_FIT and config.ckpt_path in ("best", "last"):
            raise UserError(
                f"fit --ckpt_path {config.ckpt_path}: --resume goes on with a run; a file may be given, too"
            )
        checkpoint = runs.resolve_checkpoint(config.ckpt_path, experiment_dir, config.run_id)
        config.ckpt_path, config.weights_only = str(runs.whole_checkpoint(checkpoint)), True

    def _run_to_fit(self, config: Any, experiment_dir: Path) -> runs.RunFolder:
        """The folder to train in: a new one, or with `--resume` the one to go on with."""
        run = self._run_folder(config, experiment_dir)
        config_hash = runs.hash_config(self.config_dump)
        if not getattr(rank_zero_only, "rank", 0):
            self._check_run(config, run, config_hash)
        elif config.resume and _is_finished(run, self.config_dump, config_hash):
            raise SystemExit(0)  # as the first process does, which nobody shall wait for
        if config.resume and run.last.is_file():
            config.ckpt_path, config.weights_only = str(runs.whole_checkpoint(run.last)), True
            _say(f"resuming {run.path} from its last state")
        return run

    def _run_folder(self, config: Any, experiment_dir: Path) -> runs.RunFolder:
        """The folder that is named, or with `--resume` that of the newest run of this verb, or a new one."""
        launched = runs.launched_run_id()
        run = runs.RunFolder(experiment_dir / (config.run_id or launched or runs.new_run_id(config.seed_everything)))
        inherited = "LOCAL_RANK" in os.environ and launched == os.environ.get(runs.RUN_ID_VARIABLE)
        if not config.resume or inherited or config.run_id or run.record():
            return run
        config_hash = runs.hash_config(self.config_dump)  # looked for under a new job of a scheduler, too
        return runs.find_resumable(experiment_dir, config_hash, trains=self.subcommand in _LIKE_FIT) or run

    def _check_run(self, config: Any, run: runs.RunFolder, config_hash: str) -> None:
        """Refuse to overwrite what is there; say what resuming finds. On rank 0: the others follow it."""
        record = run.record()
        try:
            run.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{run.path.parent} cannot be made ({error.strerror}): choose another --runs_dir") from None
        if not record:
            there = list(run.path.iterdir()) if run.path.exists() else []
            if not all(config.resume and _is_of_beginning(path) for path in there):
                raise UserError(f"{run.path} exists and is no run folder; choose another --run_id or --experiment")
            if config.resume:
                _say(_NOTHING.format(run.path))
        elif not config.resume:
            raise UserError(
                f"the run {run.path} exists and is never overwritten; go on with it by --resume, "
                "or start another one with --run_id NEW_NAME"
            )
        elif run.is_alive():
            raise UserError(f"{run.path} is being written by process {record.get('pid')}; wait for it or stop it")
        elif _is_finished(run, self.config_dump, config_hash):
            _say(f"nothing to do: {run.path} is finished")
            raise SystemExit(0)
        elif (wanted := config.trainer.max_epochs) is not None and 0 <= wanted < record.get("epochs", 0):
            raise UserError(
                f"{run.path} has trained {record['epochs']} epochs already, so --trainer.max_epochs {wanted} leaves "
                "nothing to do; name a larger number"
            )
        elif changes := runs.changed_options(run.config(), self.config_dump):
            warnings.warn(
                f"the run goes on with other options ({'; '.join(changes)}); what its checkpoint holds, such as the "
                "optimizer with its learning rates, comes from there",
                stacklevel=2,
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Lightning's trainer with the run folder's loggers and callbacks added to the user's own."""
        config = self._get(self.config_init, "trainer")
        if self.subcommand == "check":
            return one_process(config.as_dict(), Launch.of(config.as_dict()), CheckingTrainer)
        if self.subcommand == "fit" and self._get(self.config, "test_after_fit"):
            self._check_test(checkpoints=config.get("enable_checkpointing") is not False)
        own = config.get("callbacks") or []
        own = list(own) if isinstance(own, list) else [own]
        callbacks: list[Callback] = [StartupSummary(self.run.path if self.run else None)]
        if not any(isinstance(callback, ProgressBar) for callback in own):
            shown = config.get("enable_progress_bar")
            shown = sys.stdout.isatty() if shown is None else shown
            callbacks += [RichProgressBar()] if shown else [EpochLines()]
            kwargs["enable_progress_bar"] = shown
        if self.run is not None:
            callbacks += self._keeping_the_run(self.run, checkpoints=config.get("enable_checkpointing") is not False)
            kwargs["logger"] = self._loggers(self.run, config.get("logger"))
            kwargs["default_root_dir"] = str(self.run.path)
            if self.subcommand == "fit" and kwargs["logger"]:
                callbacks += [Throughput()]
                if not any(isinstance(callback, LearningRateMonitor) for callback in own):
                    callbacks += [LearningRate("step")]
        try:
            trainer = super().instantiate_trainer(callbacks=[*own, *_missing(own, callbacks)], **kwargs)
        except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"trainer: {error}") from error
        keep_files_whole(trainer)
        take_over(trainer)
        return trainer

    def _check_test(self, checkpoints: bool) -> None:
        """Refuse before the training a test that could not follow it."""
        if isinstance(self.model, DefectTask) and (reason := self.model.objection("test")):
            raise UserError(f"--test_after_fit true: {reason}; set it to false")
        if not checkpoints:
            raise UserError("--test_after_fit true tests a checkpoint: leave trainer.enable_checkpointing on")

    def _keeping_the_run(self, run: runs.RunFolder, checkpoints: bool) -> list[Callback]:
        """What writes into the run's folder; without `checkpoints` a fit leaves its record only."""
        recorder = RunRecorder(run, str(self.subcommand), self.config_dump, runs.hash_config(self.config_dump))
        kept = self.config_dump.get("wandb_checkpoints", "reference")
        tracking = ResultsTracking(run, str(self.subcommand), self.config_dump, kept)
        callbacks: list[Callback] = [SeenPictures(run, self.config_dump), recorder, tracking]
        if self.subcommand == "fit" and checkpoints:
            watched = getattr(self.model, "monitor", ("val/loss", "min"))
            callbacks += [BestCheckpoint(run.checkpoints, *watched)] if watched else []
            callbacks += [LastCheckpoint(run.last)]
        return callbacks

    def _loggers(self, run: runs.RunFolder, own: Any) -> list[Any] | bool:
        """CSV always while training, and the user's own or W&B; none for `--trainer.logger false`."""
        if own is False:
            return False
        if own not in (None, True):
            return [MetricsCSV(run.path), *(own if isinstance(own, list) else [own])]
        tracking = wandb_logger(self.config_dump.get("wandb", "auto"), run, self.config_dump, str(self.subcommand))
        csv = [MetricsCSV(run.path, every_n_steps=1 if tracking else 50)] if self.subcommand == "fit" else []
        return [*csv, *([tracking] if tracking else [])] or False

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the verb; what stops this process for good stops those that it has started, too."""
        try:
            super()._run_subcommand(subcommand)
        except BaseException as error:
            if STOP.number is not None and not isinstance(error, Stopped):
                error = Stopped(STOP.number)  # another process was quicker, so that this one has lost its connection
            if (launcher := self.trainer.strategy.launcher) is not None and hasattr(launcher, "kill"):
                _end_all(getattr(launcher, "procs", ()))
            raise error

    def check(self, model: LightningModule, datamodule: Any = None, **_: Any) -> None:
        """The verb `check`: say what `fit` would meet with.

        Raises:
            SystemExit: with 1 if something failed.
        """
        if getattr(rank_zero_only, "rank", 0):
            return  # one process of a launch checks
        options, config = self.config_init["check"], self.config["check"]
        folder = Path(config.runs_dir) / (config.experiment or _default_experiment(config))
        job = Job(
            options=options,
            dump=self.config_dump,
            sources=sources(sys.argv[1:], os.environ, f"{ENVIRONMENT_PREFIX}_FIT__"),
            model=model,
            data=datamodule,
            trainer=self.trainer,
            launch=Launch.of(options.trainer.as_dict()),
            folder=folder,
            choose=lambda: self._run_to_fit(config, folder),
            state=lambda: config.ckpt_path,
        )
        piped = options.json == "-"  # nothing but JSON there
        with contextlib.redirect_stdout(sys.stderr) if piped else contextlib.nullcontext():
            self.findings = examine(job)
            self.findings.show()
        if options.json:
            self.findings.write(options.json, options.strict)
        if not self.findings.passes(options.strict):
            raise SystemExit(1)

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
    with STOP.heeded():
        try:
            return _run(args)
        except (UserError, MisconfigurationException) as error:
            raise SystemExit(_fail(str(error))) from None
        except ValueError as error:
            if (own := _user_error_behind(error)) is None:
                raise
            raise SystemExit(_fail(str(own))) from None
        except Stopped as stop:
            raise SystemExit(ended(stop)) from None
        except SystemExit as stop:
            if isinstance(stop.__context__, KeyboardInterrupt):
                raise SystemExit(128 + signal.SIGINT) from None  # Lightning says 1, as if the run had failed
            raise


@finishing()
def _run(args: list[str] | None) -> CLI:
    return CLI(
        trainer_class=CheckingTrainer,
        model_class=LightningModule,
        datamodule_class=LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_class=Parser,
        parser_kwargs={
            "prog": PROGRAM,
            "description": lit_defect.__doc__,
            "default_env": True,
            "env_prefix": ENVIRONMENT_PREFIX,
        },
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


def _end_all(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Let processes that Lightning has started end by themselves for a while, then end them."""
    deadline = time.monotonic() + _PATIENCE
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        process.kill()


def _user_error_behind(error: BaseException | None) -> UserError | None:
    """What a class said that jsonargparse was to make for an argument, such as a pseudo-anomaly for a model."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def _missing(own: list[Callback], extra: list[Callback]) -> list[Callback]:
    """Those of `extra` whose kind the user has not configured."""
    kinds = {type(callback) for callback in own}
    return [callback for callback in extra if type(callback) not in kinds]


def _is_finished(run: runs.RunFolder, config: Mapping[str, Any], config_hash: str) -> bool:
    """Whether a run of this very configuration has nothing left to do, the test included that may have been killed."""
    record = run.record()
    tested = not config.get("test_after_fit") or (run.path / f"{runs.test_name(config)}_metrics.json").is_file()
    return record.get("status") == "finished" and record.get("config_hash") == config_hash and tested


def _is_of_beginning(path: Path) -> bool:
    """Whether a file of a run folder is written before `run.json`, so that a killed run may have left it alone."""
    return path.name in ("config.yaml", "wandb") or path.name.startswith(".run.json.")


def _learns(class_path: str) -> bool:
    """Whether a task of this class is nothing without a checkpoint."""
    module, _, name = class_path.rpartition(".")
    return bool(getattr(getattr(importlib.import_module(module), name), "learns", True))


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
        r".*Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided.*",
        r".*does not have many workers which may be a bottleneck.*",
        r".*The number of training batches .* is smaller than the logging interval.*",
        r".*Checkpoint directory .* exists and is not empty.*",
        r".*is not currently supported for.*_pin_memory.*",
        r".*Found .* module\(s\) in eval mode at the start of training.*",
        r".*`LightningModule.configure_optimizers` returned `None`.*",  # as a task does that trains nothing
        r".*Total length of `list` across ranks is zero.*",  # no validation split
        r".*LeafSpec.*is deprecated.*",
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
        r".*'pin_memory' argument is set as true but no accelerator is found.*",
    ):
        warnings.filterwarnings("ignore", message=message)
