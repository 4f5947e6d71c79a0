"""The verb `sweep`: hyper-parameters are searched by any number of workers, from one file in W&B's format.

    python -m lit_defect sweep FILE.yaml            a worker, begins the sweep or joins it: the same command on each GPU
    python -m lit_defect sweep status FILE.yaml     trials, the best one, importance of the parameters; sweep.json
    python -m lit_defect sweep retry FILE.yaml      failed trials, all or --trials 3 7, wait to be run again
    python -m lit_defect sweep FILE.yaml --dry_run  checks the options and the metric and shows a trial's command

Logged in to W&B, the sweep is registered there once and its agents run here (online.py). Else Optuna draws the trials
(search.py): they are kept in a journal in the sweep's folder, or in a database. What a file says is told in file.py and
space.py, how workers share trials and take up those of dead ones in claims.py and worker.py, and which of the logged
values counts in results.py.

    <runs_dir>/<sweep>/            sweep.json, sweep_plan.json, journal.log, claims/, logs/
    <runs_dir>/<experiment>/<sweep>-t0007-s0/    the run of trial 7 with seed 0

Exit status: 0 when nothing is left for this worker; 1 when trials of it have failed; 2 for what the user can mend;
128 + signal when it was stopped, and its trial waits for another worker; by SIGUSR1 under SLURM the worker's job is put
back into the queue. No PyTorch here: the trials import it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_defect import runs
from lit_defect.claims import Claims, create
from lit_defect.errors import UserError
from lit_defect.stopping import requeue
from lit_defect.study import words_of
from lit_defect.sweep import commands, several
from lit_defect.sweep.file import SEED, Sweep, read_sweep
from lit_defect.sweep.space import combinations
from lit_defect.sweep.training import Stops
from lit_defect.tracking_login import logged_in

if TYPE_CHECKING:
    import optuna

PLAN = "sweep_plan.json"


def main(arguments: Sequence[str]) -> int:
    """Run the verb; returns the exit status."""
    words = list(arguments)
    verb = words.pop(0) if words[:1] in (["status"], ["retry"], ["trial"]) else "work"
    options, others = _parser(verb).parse_known_args(words)
    if others and verb != "trial":
        _parser(verb).error(f"unknown: {' '.join(others)}")
    try:
        sweep = read_sweep(options.file)
        if verb == "status":
            return _status(sweep, options)
        if verb == "retry":
            return _retry(sweep, options)
        if verb == "trial":
            from lit_defect.sweep.online import run_trial

            return run_trial(sweep, options.runs_dir, _plan(sweep, options.runs_dir), others)
        status = _work(sweep, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        print("error: a sweep off line needs optuna: pip install 'lit_defect[sweep]'", file=sys.stderr)
        return 2
    if status == 128 + signal.SIGUSR1:
        requeue()
    return status


def _parser(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lit_defect sweep" + ("" if verb == "work" else f" {verb}"),
        description=(__doc__ or "").partition("\n\nLogged in")[0] if verb == "work" else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, help="what is varied, YAML in W&B's format")
    parser.add_argument("--runs_dir", type=Path, default=Path("runs"), help="folder that all workers share [runs]")
    if verb == "trial":
        return parser
    parser.add_argument(
        "--storage", help="Optuna's, such as postgresql://user@host/database (password: PGPASSWORD or ~/.pgpass)"
    )
    if verb == "retry":
        parser.add_argument("--trials", type=int, nargs="+", metavar="NUMBER", help="only these [all that have failed]")
    if verb != "work":
        return parser
    parser.add_argument("--count", type=_positive, help="leave after this many trials, each worker")
    parser.add_argument(
        "--workers", type=_positive, default=1, help="start several on this machine, each with its part of the GPUs [1]"
    )
    parser.add_argument("--share_gpus", action="store_true", help="let several workers of --workers use one GPU")
    parser.add_argument("--options", default="", help='added to every command, such as "--trainer.devices 2"')
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--online", action="store_true", help="by W&B [if logged in, and no --storage is given]")
    where.add_argument("--offline", action="store_true", help="by Optuna")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry_run", action="store_true", help="check everything, show a command, run nothing")
    what.add_argument("--list", action="store_true", help="the combinations of a grid")
    parser.add_argument(
        "--unprobed", action="store_true", help="do not train a step to see whether the metric is logged"
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 1 on")
    return int(text)


def is_online(sweep: Sweep, options: argparse.Namespace) -> bool:
    """Whether W&B draws the trials: when told so, or when logged in and nothing says otherwise."""
    if options.online or options.offline:
        return bool(options.online)
    off = os.environ.get("WANDB_MODE") in ("offline", "disabled") or options.storage or sweep.storage
    return not off and logged_in()


def _work(sweep: Sweep, options: argparse.Namespace) -> int:
    extra = words_of(options.options)
    if options.list:
        return _list(sweep)
    workers = options.workers
    devices = several.shares(several.gpus(), workers, share_gpus=options.share_gpus) if workers > 1 else []
    for text in commands.warnings(sweep):
        print(f"warning: {text}", file=sys.stderr)
    plan = _plan(sweep, options.runs_dir)
    config: dict[str, Any] = {}
    if plan is None or options.dry_run:
        if plan is None:
            _say("checks the options, and that the metric is logged ...")
        config = commands.check(sweep, extra, probe=not options.unprobed)
        if options.dry_run:
            example = {parameter.name: parameter.extremes()[0] for parameter in sweep.parameters}
            print(shlex.join(commands.words(sweep, example, extra)))
            return 0
        plan = _write_plan(sweep, options.runs_dir, config, options.options)
    if (begun := plan.get("options", options.options)) != options.options:  # older plans do not tell
        print(
            f"warning: the sweep was begun with --options {begun!r}, this worker has {options.options!r}: "
            "trials can be compared if they differ in where and how fast only",
            file=sys.stderr,
        )
    online = is_online(sweep, options)
    if devices:
        told = [str(options.file), "--runs_dir", str(options.runs_dir), f"--options={options.options}"]
        told += ["--online" if online else "--offline"]
        told += ["--storage", options.storage] if options.storage else []
        told += ["--count", str(options.count)] if options.count else []
        return several.work(devices, told)
    if online:
        from lit_defect.sweep.online import join

        return join(sweep, options.runs_dir, options.count, extra)
    return _offline(sweep, options, plan, extra)


def _offline(sweep: Sweep, options: argparse.Namespace, plan: dict[str, Any], extra: Sequence[str]) -> int:
    if sweep.limit is None and options.count is None:
        raise UserError(f"{sweep.file}: the sweep has no end: set lit_defect.trials or run_cap, or give --count")
    from lit_defect.sweep.search import open_study
    from lit_defect.sweep.summary import write_summary
    from lit_defect.sweep.worker import StoppedError, Worker

    folder = options.runs_dir / sweep.name
    study = open_study(sweep, folder, options.storage or sweep.storage, plan["id"])
    with Stops().noted() as stops:
        worker = Worker(sweep, study, options.runs_dir, plan["experiment"], plan["told_seeds"], extra, stops)
        try:
            failed = worker.work(options.count)
        except StoppedError:
            _say("stopped; the same command goes on")
            return stops.status
        except OSError as error:
            raise UserError(f"{error}\n{folder} must be writable and have room; the same command goes on") from None
    _say(f"sweep  {write_summary(sweep, study, folder, worker.claims)}")
    return 1 if failed else 0


def _status(sweep: Sweep, options: argparse.Namespace) -> int:
    from rich.console import Console

    from lit_defect.sweep.summary import show, write_summary

    folder = options.runs_dir / sweep.name
    study, claims = _begun(sweep, options)
    with contextlib.suppress(OSError):  # whoever only looks may not be allowed to write
        write_summary(sweep, study, folder, claims)
    show(sweep, study, claims, Console(highlight=False))
    return 0


def _retry(sweep: Sweep, options: argparse.Namespace) -> int:
    from lit_defect.sweep.attempts import retry
    from lit_defect.sweep.summary import write_summary

    folder = options.runs_dir / sweep.name
    study, claims = _begun(sweep, options)
    try:
        again = retry(study, sweep, claims, options.trials)
        write_summary(sweep, study, folder, claims)
    except OSError as error:
        raise UserError(f"{error}\n{folder} must be writable and have room") from None
    if not again:
        _say("no trial has failed and does not wait already")
        return 0
    _say(f"trials that wait to be run again: {', '.join(map(str, again))}")
    _say(f"workers that still run take them up; else start one: sweep {sweep.file}")
    return 0


def _begun(sweep: Sweep, options: argparse.Namespace) -> tuple[optuna.Study, Claims]:
    """An off-line sweep that there is.

    Raises:
        UserError: there is none, or it is at W&B.
    """
    from lit_defect.sweep.search import open_study

    folder = options.runs_dir / sweep.name
    plan = _plan(sweep, options.runs_dir)
    if plan is None or (not (options.storage or sweep.storage) and not (folder / "journal.log").is_file()):
        if known := runs.read_json(folder / "wandb_sweep.json"):
            raise UserError(f"{folder} is a sweep at W&B, which shows how it stands: {known['project']}, {known['id']}")
        raise UserError(f"{folder} has no sweep yet: start it by sweep {sweep.file}")
    study = open_study(sweep, folder, options.storage or sweep.storage, plan["id"], create=False)
    return study, Claims(folder / "claims")


def _list(sweep: Sweep) -> int:
    if sweep.sampler != "grid":
        raise UserError(f"--list shows the combinations of a grid, and {sweep.file} has method {sweep.method}")
    for number, chosen in enumerate(combinations(sweep.parameters)[: sweep.limit]):
        print(f"{number:4d}  " + "  ".join(f"{name}={value}" for name, value in chosen.items()))
    return 0


def _plan(sweep: Sweep, runs_dir: Path) -> dict[str, Any] | None:
    """What the sweep's first worker has written down; None if there was none.

    Raises:
        UserError: the file says something else now.
    """
    path = runs_dir / sweep.name / PLAN
    if not (before := runs.read_json(path)):
        return None
    if changes := runs.changed_options(before["plan"], sweep.plan()):
        shown = "\n  ".join(changes)
        raise UserError(
            f"{sweep.file} is not what {path.parent} was begun with:\n  {shown}\n"
            "give the changed sweep another `name`; its trials could not be compared with those"
        )
    return before


def _write_plan(sweep: Sweep, runs_dir: Path, config: dict[str, Any], extra: str = "") -> dict[str, Any]:
    """Write down what must not change; of several workers that begin at once the first one's word holds."""
    seed = config.get(SEED)
    given = SEED in sweep.constant or any(parameter.name == SEED for parameter in sweep.parameters)
    own = [seed if type(seed) is int else 0]
    experiment = config.get("experiment") or sweep.name
    plan = {
        "id": secrets.token_hex(8),
        "experiment": experiment,
        "told_seeds": None if given else list(sweep.seeds or own),
        "options": extra,
        "begun": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "plan": sweep.plan(),
    }
    try:
        create(runs_dir / sweep.name / PLAN, plan)
    except OSError as error:
        raise UserError(
            f"{runs_dir / sweep.name} cannot be written ({error.strerror}): choose another --runs_dir"
        ) from None
    found = _plan(sweep, runs_dir)
    assert found is not None
    return found


def _say(text: str) -> None:
    print(text, flush=True)
