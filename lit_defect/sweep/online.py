"""The same sweep at W&B: registered once, joined by any number of agents.

W&B draws the parameters and shows the sweep. What its agents start is not `fit` itself but `sweep trial`, below: it
trains with each seed, each training being a run of its own at W&B as ever, shows the first seed's curve in the sweep's
run, so that W&B can end it early, and logs there the mean that the off-line sweep would take. Run folders are named by
W&B's run id, so that a trial that was pre-empted goes on in them when an agent is given it again.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_defect import runs
from lit_defect.claims import Claims
from lit_defect.errors import UserError
from lit_defect.runs import RunFolder
from lit_defect.study import end_of
from lit_defect.sweep.commands import placed, seeding, words
from lit_defect.sweep.file import SEED, Sweep
from lit_defect.sweep.results import Logged, NoValueError, value_of
from lit_defect.sweep.training import STOPPED, Stops, Training

REGISTERED = "wandb_sweep.json"
_OF_AGENT = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH")  # else a training would take the sweep's run
_WAIT = 120.0  # seconds for another worker to register


def registration(sweep: Sweep, runs_dir: Path, extra: Sequence[str] = ()) -> dict[str, Any]:
    """What W&B is told: the file without our block, parameters by their dotted names, and our own command."""
    said = {key: value for key, value in sweep.said.items() if key not in ("lit_defect", "command", "program")}
    trial = ["-m", "lit_defect", "sweep", "trial", str(sweep.file), "--runs_dir", str(runs_dir)]
    options = [f"--options={shlex.join(extra)}"] if extra else []
    command = ["${env}", "${interpreter}", *trial, *options, "${args}"]
    if sweep.limit is not None and sweep.sampler != "grid":
        said["run_cap"] = sweep.limit
    return {**said, "name": sweep.name, "parameters": _flat(sweep.said["parameters"]), "command": command}


def _flat(said: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, entry in said.items():
        below = entry.get("parameters")
        found |= _flat(below, f"{above}{name}.") if below else {f"{above}{name}": entry}
    return found


def join(sweep: Sweep, runs_dir: Path, count: int | None, extra: Sequence[str]) -> int:
    """Register the sweep if nobody has, and run an agent; returns its exit status.

    Raises:
        UserError: W&B cannot be reached, or does not take the sweep.
    """
    import wandb

    folder = runs_dir / sweep.name
    known = _registered(sweep, folder, registration(sweep, runs_dir, extra))
    print(f"W&B sweep {known['id']}", flush=True)
    with Stops().noted() as stops:
        wandb.agent(
            known["id"], entity=known["entity"], project=known["project"], count=count, forward_signals=True,
            max_consecutive_failed_runs=sweep.max_failures,
        )  # fmt: skip
    return stops.status if stops.number else 0


def _registered(sweep: Sweep, folder: Path, told: Mapping[str, Any]) -> dict[str, Any]:
    """The sweep's id at W&B; of several workers that begin at once, one registers it and the others wait for that."""
    import wandb

    file = folder / REGISTERED
    claims = Claims(folder / "claims")
    until = time.monotonic() + _WAIT
    while not (known := runs.read_json(file)):
        before = claims.newest("wandb").get("wandb")
        if (before is None or before.released or claims.is_dead(before)) and (held := claims.take("wandb", before)):
            project = sweep.said.get("project") or os.environ.get("WANDB_PROJECT", "lit_defect")
            entity = sweep.said.get("entity") or os.environ.get("WANDB_ENTITY")
            with held:
                if known := runs.read_json(file):  # by another worker, which has ended since the last look
                    return known
                try:
                    name = wandb.sweep(dict(told), entity=entity, project=project)
                except Exception as error:
                    held.release()
                    raise UserError(f"W&B does not take the sweep: {error}\n  without W&B: --offline") from None
                runs.write_json(file, {"id": name, "entity": entity, "project": project})
        elif time.monotonic() > until:
            raise UserError(
                f"another worker has not registered the sweep at W&B; if it is gone, remove {claims.folder}"
            )
        else:
            time.sleep(0.5)
    return known


def run_trial(sweep: Sweep, runs_dir: Path, plan: Mapping[str, Any] | None, arguments: Sequence[str]) -> int:
    """What W&B's agent starts: one trial with each seed; returns the exit status.

    A trial that was pre-empted is marked so that W&B gives it to another agent: stopped by SIGUSR1, or by SIGTERM where
    the file has no `early_terminate`, by which W&B itself sends SIGTERM.

    Args:
        sweep: the sweep.
        runs_dir: folder of all experiments.
        plan: what the sweep's first worker has written down.
        arguments: `--name=value` for each parameter, and `--options=...`.

    Raises:
        UserError: without a plan.
    """
    import wandb

    if plan is None:
        raise UserError(
            f"{runs_dir / sweep.name} has no plan: start the sweep by sweep {sweep.file}, not by wandb sweep"
        )
    told = dict(word.removeprefix("--").split("=", 1) for word in arguments)
    extra = shlex.split(told.pop("options", ""))
    parameters = {name: yaml.safe_load(text) for name, text in told.items()}
    seeds = plan["told_seeds"] or [int(parameters.get(SEED, sweep.constant.get(SEED, 0)))]
    with Stops().noted() as stops, wandb.init() as ours:
        name = f"{sweep.name}-{re.sub(r'[^a-zA-Z0-9_.-]', '-', ours.id)}"
        folders = {seed: RunFolder(runs_dir / plan["experiment"] / f"{name}-s{seed}") for seed in seeds}
        ours.config.update({"runs": [str(run.path.relative_to(runs_dir)) for run in folders.values()]})
        values: list[float] = []
        for seed, run in folders.items():
            log = runs_dir / sweep.name / "logs" / f"{run.run_id}.log"
            told_seed = seeding(sweep, seed if plan["told_seeds"] else None)
            command = words(sweep, parameters, [*extra, *told_seed, *placed(run)])
            environment = {key: value for key, value in os.environ.items() if key not in _OF_AGENT}
            training = Training(run, command, log, sweep.metric, environment)
            follow = _Follower(ours, sweep.metric) if not values else lambda _: False
            status = 0 if training.is_done() else training.carry_out(stops, follow)[0]
            if status in STOPPED or (stops.number and status):
                if stops.number != signal.SIGTERM or "early_terminate" not in sweep.said:
                    ours.mark_preempting()
                ours.finish(exit_code=status)
                return status
            if status:
                print(f"{training.log} ends\n{end_of(training.log)}", flush=True)
                ours.finish(exit_code=status)
                return status
            try:
                values.append(value_of(run, sweep.metric, sweep.goal, sweep.value))
            except NoValueError as error:
                print(error, flush=True)
                ours.finish(exit_code=1)
                return 1
        ours.log({sweep.metric: sum(values) / len(values), "seeds": len(values)})
        ours.config.update({"values": values})
    return 0


class _Follower:
    """Logs a curve to the sweep's run as it grows."""

    def __init__(self, ours: Any, metric: str) -> None:
        self.ours, self.metric = ours, metric
        self.known = 0

    def __call__(self, values: list[Logged]) -> bool:
        for logged in values[self.known :]:
            self.ours.log({self.metric: logged.value, "trainer/global_step": logged.step})
        self.known = len(values)
        return False
