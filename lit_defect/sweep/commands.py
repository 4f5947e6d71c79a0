"""The commands of trials, and whether they can work: asked before the first trial, not after a night in a queue."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_defect.errors import UserError
from lit_defect.runs import RunFolder, better
from lit_defect.study import end_of
from lit_defect.sweep.file import SEED, Sweep
from lit_defect.sweep.results import logged_names
from lit_defect.yaml_files import near_word

_ALWAYS = ("train/loss",)


def words(sweep: Sweep, parameters: Mapping[str, Any], extra: Sequence[str] = ()) -> list[str]:
    """A command with these parameters, and the same ones in every trial, as `--name=value`.

    Args:
        sweep: the sweep.
        parameters: of the trial.
        extra: words that it ends with.
    """
    made: list[str] = []
    for word in sweep.command:
        if word == "${args}":
            made += [f"--{name}={_written(value)}" for name, value in {**sweep.constant, **parameters}.items()]
        elif word == "${interpreter}":
            made.append(sys.executable)
        elif word.startswith("${envvar:"):
            made.append(os.environ[word[9:-1]])
        elif word != "${env}":  # which finds the interpreter, and we have that
            made.append(word)
    return [*made, *extra]


def seeding(sweep: Sweep, seed: int | None) -> list[str]:
    """Options of a training's seed; none where the seed is a parameter."""
    return [] if seed is None else [f"--{name}={seed}" for name in (SEED, *sweep.seeded)]


def placed(run: RunFolder) -> list[str]:
    """Options that say where a run is kept and that it goes on if it was begun."""
    where = ["--runs_dir", str(run.path.parent.parent), "--experiment", run.experiment, "--run_id", run.run_id]
    return [*where, "--resume"]


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _ours(command: Sequence[str]) -> list[str] | None:
    """What follows the program's name in `... -m lit_defect fit ...`; None for another program."""
    for place, word in enumerate(command):
        if (word == "lit_defect" and command[place - 1] == "-m") or Path(word).name == "lit-defect":
            return list(command[place + 1 :])
    return None


def check(sweep: Sweep, extra: Sequence[str], *, probe: bool = True) -> dict[str, Any]:
    """Parse the command with every choice and both ends of every range, and look for the metric.

    Args:
        sweep: the sweep.
        extra: words that every command ends with.
        probe: whether to train one step where the configuration does not tell that the metric will be there.

    Returns:
        The configuration of the first of these commands; empty for another program than ours, which cannot be asked.

    Raises:
        UserError: an option that there is not, a value that cannot be, a metric that is not logged.
    """
    varied = {parameter.name: parameter.extremes() for parameter in sweep.parameters}
    tried = [
        {name: values[min(number, len(values) - 1)] for name, values in varied.items()}
        for number in range(max(map(len, varied.values())))
    ]
    seed = sweep.seeds[0] if sweep.seeds else None
    asked = {json.dumps(values): _ours(words(sweep, values, [*extra, *seeding(sweep, seed)])) for values in tried}
    first = next(iter(asked.values()))
    if first is None:
        return {}
    if first[:1] != ["fit"]:
        raise UserError(
            f"{sweep.file}: command runs the verb {' '.join(first[:1])}: a sweep's trials are runs of `fit`"
        )
    from lit_defect.study_check import parsed

    try:
        configs = parsed({name: command for name, command in asked.items() if command is not None})
    except UserError as error:
        raise UserError(f"{sweep.file}: with {error}") from None
    config = next(iter(configs.values()))
    _check_metric(sweep, config, first if probe else None)
    return config


def _check_metric(sweep: Sweep, config: Mapping[str, Any], command: Sequence[str] | None) -> None:
    """Whether the metric will be logged: what the task monitors is; else one step is trained to see.

    The test's figures are not probed, since all of the test split would have to be gone through.
    """
    stage = sweep.metric.partition("/")[0]
    if stage == "test":
        if not config.get("test_after_fit"):
            raise UserError(
                f"{sweep.file}: metric.name is {sweep.metric}, and the command does not test: "
                "add --test_after_fit=true, or name a metric of the validation"
            )
        return
    monitor = ((config.get("model") or {}).get("init_args") or {}).get("monitor")
    if sweep.metric in (monitor, *_ALWAYS) or command is None:
        return
    names = _probed(sweep, command)
    if sweep.metric not in names:
        raise UserError(
            f"{sweep.file}: metric.name is {sweep.metric}, which this experiment does not log"
            f"{near_word(sweep.metric, names)}\n  logged after a step: {', '.join(sorted(names))}"
            "\n  (if it is logged later on only, start the sweep with --unprobed)"
        )


def _probed(sweep: Sweep, command: Sequence[str]) -> list[str]:
    """What is logged by one step and the validation that follows.

    Raises:
        UserError: the step failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder) / "probe" / "probe")
        one = ["--trainer.max_epochs=1", "--trainer.max_steps=1", "--trainer.limit_train_batches=1"]
        one += [
            "--trainer.check_val_every_n_epoch=1",
            "--trainer.val_check_interval=1.0",
            "--trainer.log_every_n_steps=1",
        ]
        one += ["--test_after_fit=false", "--wandb=off"]
        log = Path(folder) / "log"
        line = [sys.executable, "-m", "lit_defect", *command, *one, *placed(run)]
        with log.open("w", encoding="utf-8") as file:
            status = subprocess.run(line, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT).returncode
        if status:
            raise UserError(
                f"{sweep.file}: a step on trial failed with exit status {status}\n  $ {shlex.join(line)}\n{end_of(log)}"
            )
        return logged_names(run.path / "metrics.csv")


def warnings(sweep: Sweep) -> list[str]:
    """What a user should think over, though it can be done."""
    found = []
    if "goal" not in sweep.said["metric"] and better(sweep.metric) == "max":
        found.append(f"{sweep.file}: the smallest {sweep.metric} is looked for, as metric.goal is not given")
    if sweep.metric.startswith("test/") and sweep.method != "grid":
        found.append(
            f"{sweep.file}: {sweep.metric} chooses among the trials, so its figure is no test any more: choose by the "
            "validation, and test what was chosen once"
        )
    if sweep.pruner != "none" and sweep.metric.startswith("test/"):
        found.append(f"{sweep.file}: {sweep.metric} is logged at the end only, so that no trial will be pruned")
    if sweep.limit is None:
        found.append(f"{sweep.file}: the sweep has no end: set lit_defect.trials or run_cap")
    return found
