"""How a sweep stands: `sweep.json` for reports, and a table for people."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from lit_defect import runs
from lit_defect.claims import DEAD_AFTER, Claim, Claims
from lit_defect.sweep.attempts import attempts, counted, task_of
from lit_defect.sweep.file import Sweep
from lit_defect.sweep.search import importance

_STATES = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
_COLOURS = {"complete": "green", "pruned": "yellow", "failed": "red", "running": "cyan", "waiting": "magenta"}


def summarise(sweep: Sweep, study: optuna.Study, claims: Claims) -> dict[str, Any]:
    """Everything that is known of the trials, in plain types."""
    newest = claims.newest()
    trials = [
        {
            "number": number,
            "state": _state(trial, newest.get(task_of(number, trial)), claims),
            "value": trial.value if trial.state == TrialState.COMPLETE else None,
            "params": trial.user_attrs.get("parameters", {}),
            "seeds": trial.user_attrs.get("seeds", []),
            "values": trial.user_attrs.get("values", []),
            "runs": trial.user_attrs.get("runs", []),
            "seconds": trial.user_attrs.get("seconds"),
            "worker": trial.user_attrs.get("worker"),
            "attempts": attempts(trial),
            **({"reason": trial.user_attrs.get("reason", "")} if trial.state == TrialState.FAIL else {}),
        }
        for number, trial in counted(study, sweep).items()
    ]
    return {
        "sweep": sweep.name,
        "metric": {"name": sweep.metric, "goal": sweep.goal},
        "method": sweep.method,
        "parameters": {p.name: {"log": p.log, "choices": p.choices is not None} for p in sweep.parameters},
        "importance": importance(study, sweep),
        "trials": trials,
    }


def write_summary(sweep: Sweep, study: optuna.Study, folder: Path, claims: Claims) -> Path:
    """Write `sweep.json`, again if a trial has ended meanwhile: two workers may write, and the newer word must stay."""
    path = folder / "sweep.json"
    content = summarise(sweep, study, claims)
    while True:
        runs.write_json(path, content)
        if (now := summarise(sweep, study, claims))["trials"] == content["trials"]:
            return path
        content = now


def show(sweep: Sweep, study: optuna.Study, claims: Claims, console: Console) -> None:
    """Print trials, best one and importance."""
    content = summarise(sweep, study, claims)
    trials = content["trials"]
    table = Table(title=f"sweep {sweep.name}: {sweep.metric}, {sweep.goal}", title_justify="left", title_style="bold")
    table.add_column("trial", justify="right")
    table.add_column("state")
    table.add_column(sweep.metric, justify="right")
    for name in _short_names([parameter.name for parameter in sweep.parameters]):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("seconds", justify="right")
    table.add_column("worker", overflow="fold")
    best = _best(content)
    for trial in trials:
        state, value = trial["state"], trial["value"]
        cells = [_text(trial["params"].get(parameter.name, "")) for parameter in sweep.parameters]
        style = "bold" if trial is best else None
        seconds = "" if trial["seconds"] is None else f"{trial['seconds']:.0f}"
        shown = f"[{_COLOURS[state]}]{state}[/]"
        table.add_row(
            str(trial["number"]), shown, _text(value), *cells, seconds, str(trial["worker"] or ""), style=style
        )
    if not console.is_terminal:  # a file is as wide as it needs to be
        console.width = max(
            console.width, Measurement.get(console, console.options.update(max_width=1000), table).maximum
        )
    console.print(table)
    counts = {state: n for state in _COLOURS if (n := sum(trial["state"] == state for trial in trials))}
    limit = sweep.limit
    asked = f" of {limit}" if limit is not None else ""
    console.print(f"{len(trials)}{asked} trials begun: {', '.join(f'{n} {state}' for state, n in counts.items())}")
    if best is not None:
        told = "  ".join(f"{name} {_text(value)}" for name, value in best["params"].items())
        console.print(f"best  trial {best['number']}, {sweep.metric} {_text(best['value'])}: {told}", soft_wrap=True)
        console.print(f"      {' '.join(best['runs'])}", soft_wrap=True)
    if content["importance"]:
        shares = "  ".join(f"{name} {share:.0%}" for name, share in content["importance"].items())
        console.print(f"importance  {shares}", soft_wrap=True)
    elif sweep.method != "grid":
        console.print("importance  not yet: it needs ten trials, and four for each parameter")
    for trial in trials:
        if reason := trial.get("reason"):
            console.print(f"trial {trial['number']} failed: {reason}", soft_wrap=True, markup=False)
    if counts.get("failed"):
        console.print(f"failed trials are run again after: sweep retry {sweep.file}", soft_wrap=True)


def _short_names(names: list[str]) -> list[str]:
    """The last parts of dotted names, where they tell them apart."""
    last = [name.rpartition(".")[2] for name in names]
    return [short if last.count(short) == 1 else name for name, short in zip(names, last, strict=True)]


def _best(content: dict[str, Any]) -> dict[str, Any] | None:
    done = [trial for trial in content["trials"] if trial["value"] is not None]
    choose = max if content["metric"]["goal"] == "maximize" else min
    return choose(done, key=lambda trial: trial["value"]) if done else None


def _state(trial: FrozenTrial, claim: Claim | None, claims: Claims) -> str:
    """Running trials whose worker is gone wait; of a machine elsewhere that is told by the clock, for show only."""
    if trial.state != TrialState.RUNNING or claim is None:
        return _STATES.get(trial.state, "running")
    if claim.released or claims.is_dead(claim):
        return "waiting"
    try:
        return "waiting" if time.time() - claim.path.stat().st_mtime > 2 * DEAD_AFTER else "running"
    except OSError:
        return "running"


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
