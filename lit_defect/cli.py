"""The command line: `python -m lit_defect {fit,validate,test,predict} --config FILE`.

One LightningCLI in subclass mode. What it adds to Lightning's: a run folder for every run, `--resume`,
checkpoints by name (`--ckpt_path best`), and errors of one or two lines that name the key.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Any, NoReturn

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

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
from lit_defect.callbacks.tracking import LearningRate, MetricsCSV, StartTracking, TrackingMode, finishing
from lit_defect.checking import Findings, Job, Launch, examine, one_process, sources, strategy_objection
from lit_defect.choosing import RunChoice
from lit_defect.claims import launching
from lit_defect.console import fail, quiet
from lit_defect.errors import UserError
from lit_defect.spelling import explain, unknown_environment
from lit_defect.stopping import STOP, Stopped, end_all, take_over
from lit_defect.tasks.base import DefectTask
from lit_defect.verbs import VERBS

PROGRAM = "lit_defect"
ENVIRONMENT_PREFIX = "LIT_DEFECT"


class CheckingTrainer(Trainer):
    """A trainer with the verb `check`, which `CLI.check` carries out; its options are those of `fit`."""

    check = Trainer.fit

    def _run(self, model: LightningModule, ckpt_path: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Set `trainer.ckpt_path` before `configure_model`, which may leave weights to the checkpoint."""
        self._checkpoint_connector._ckpt_path = ckpt_path
        return super()._run(model, ckpt_path, *args, **kwargs)


class Parser(LightningArgumentParser):
    """A parser whose errors are short, and which takes no abbreviated option for another one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong, the nearest right key and where help is to be had; exit with 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise SystemExit(fail(explain(message, self, sys.argv[1:])))


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
        self._dump_config()
        for key in ("json", "strict"):  # of `check` alone: what is left is what fit computes
            self.config_dump.pop(key, None)
        self.choice = RunChoice(str(self.subcommand), config, self.config_dump)
        self.choice.find_checkpoint()
        if config.trainer.fast_dev_run or self.subcommand == "check":
            return
        self.run = self.choice.run()
        os.environ[runs.RUN_ID_VARIABLE] = self.run.run_id  # inherited by the processes that Lightning starts
        self.config_dump.update(experiment=self.choice.experiment, run_id=self.run.run_id, resume=False)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Lightning's trainer with the run folder's loggers and callbacks added to the user's own."""
        config = self._get(self.config_init, "trainer")
        if self.subcommand == "check":
            return one_process(config.as_dict(), Launch.of(config.as_dict()), CheckingTrainer)
        if objection := strategy_objection(config.get("strategy")):
            raise UserError(objection)
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
            kwargs["logger"] = self._loggers(self.run, config.get("logger"))
            tracks = config.get("logger") in (None, True)
            callbacks += self._keeping_the_run(self.run, config.get("enable_checkpointing") is not False, tracks)
            kwargs["default_root_dir"] = str(self.run.path)
            if self.subcommand == "fit" and kwargs["logger"]:
                callbacks += [Throughput()]
                if not any(isinstance(callback, LearningRateMonitor) for callback in own):
                    callbacks += [LearningRate("step")]
        try:
            trainer = super().instantiate_trainer(callbacks=[*own, *_missing(own, callbacks)], **kwargs)
        except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
            hint = " PyTorch sees none on this machine: set --trainer.accelerator cpu --trainer.devices 1." * (
                "gpu backend" in str(error)
            )
            raise UserError(f"trainer: {error}{hint}") from error
        keep_files_whole(trainer)
        take_over(trainer)
        return trainer

    def _check_test(self, checkpoints: bool) -> None:
        """Refuse before the training a test that could not follow it."""
        if isinstance(self.model, DefectTask) and (reason := self.model.objection("test")):
            raise UserError(f"--test_after_fit true: {reason}; set it to false")
        if not checkpoints:
            raise UserError("--test_after_fit true tests a checkpoint: leave trainer.enable_checkpointing on")

    def _keeping_the_run(self, run: runs.RunFolder, checkpoints: bool, tracks: bool) -> list[Callback]:
        """What writes into the run's folder; without `checkpoints` a fit leaves its record only.

        Without `tracks` W&B is not started, as the user's own loggers take its place.
        """
        config_hash = runs.hash_config(self.config_dump)
        recorder = RunRecorder(run, str(self.subcommand), self.config_dump, config_hash, self.choice.before)
        kept = self.config_dump.get("wandb_checkpoints", "reference")
        tracking = ResultsTracking(run, str(self.subcommand), self.config_dump, kept)
        start = [StartTracking(run, self.config_dump, str(self.subcommand))] * tracks
        callbacks: list[Callback] = [SeenPictures(run, self.config_dump), recorder, *start, tracking]
        if self.subcommand == "fit" and checkpoints:
            watched = getattr(self.model, "monitor", ("val/loss", "min"))
            callbacks += [BestCheckpoint(run.checkpoints, *watched)] if watched else []
            callbacks += [LastCheckpoint(run.last)]
        return callbacks

    def _loggers(self, run: runs.RunFolder, own: Any) -> list[Any] | bool:
        """CSV always while training, and the user's own; W&B comes later. None for `--trainer.logger false`."""
        if own is False:
            return False
        if own not in (None, True):
            return [MetricsCSV(run.path), *(own if isinstance(own, list) else [own])]
        tracks = self.config_dump.get("wandb") != "off"  # a resumed run sends W&B what metrics.csv has not
        return [MetricsCSV(run.path, every_n_steps=1 if tracks else 50)] if self.subcommand == "fit" else False

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the verb; what stops this process for good stops those that it has started, too."""
        try:
            super()._run_subcommand(subcommand)
        except BaseException as error:
            end_all(self.trainer.strategy.launcher)
            if isinstance(stop := STOP.explained(error), Stopped):
                raise stop from None
            raise

    def check(self, model: LightningModule, datamodule: Any = None, **_: Any) -> None:
        """The verb `check`: say what `fit` would meet with.

        Raises:
            SystemExit: with 1 if something failed.
        """
        if getattr(rank_zero_only, "rank", 0):
            return  # one process of a launch checks
        options, config = self.config_init["check"], self.config["check"]
        job = Job(
            options=options,
            dump=self.config_dump,
            sources=sources(sys.argv[1:], os.environ, f"{ENVIRONMENT_PREFIX}_FIT__"),
            model=model,
            data=datamodule,
            trainer=self.trainer,
            launch=Launch.of(options.trainer.as_dict()),
            folder=self.choice.folder,
            choose=self.choice.run,
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
    quiet()
    with STOP.heeded():
        try:
            return _run(args)
        except (UserError, MisconfigurationException) as error:
            raise SystemExit(fail(str(error))) from None
        except ValueError as error:
            if (own := _user_error_behind(error)) is None:
                raise
            raise SystemExit(fail(str(own))) from None
        except SystemExit as stop:
            if isinstance(stop.__context__, KeyboardInterrupt):
                raise SystemExit(128 + signal.SIGINT) from None  # Lightning says 1, as if the run had failed
            raise


@launching()
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


def _user_error_behind(error: BaseException | None) -> UserError | None:
    """What a class said that jsonargparse was to make for an argument, such as a pseudo-anomaly for a model."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def _missing(own: list[Callback], extra: list[Callback]) -> list[Callback]:
    """Those of `extra` whose kind the user has not configured."""
    kinds = {type(callback) for callback in own}
    return [callback for callback in extra if type(callback) not in kinds]
