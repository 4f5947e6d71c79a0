"""The section on a sweep, from its `sweep.json` alone: best trial, progress, parallel coordinates, importance."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lit_defect.errors import UserError
from lit_defect.report.blocks import Bars, Block, Cell, Code, Column, Curve, Lines, Parallel, Section, Table, Text
from lit_defect.report.collect import RunInfo
from lit_defect.report.figures import digits
from lit_defect.report.keys import short
from lit_defect.runs import RunFolder, flatten

FILE = "sweep.json"


@dataclass(frozen=True)
class Sweep:
    """A sweep's file and the folder that holds it."""

    folder: Path
    said: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.said.get("sweep", self.folder.name))

    @property
    def metric(self) -> str:
        return str(self.said["metric"]["name"])

    @property
    def maximize(self) -> bool:
        return str(self.said["metric"].get("goal", "maximize")) == "maximize"

    @property
    def trials(self) -> Sequence[Mapping[str, Any]]:
        return self.said["trials"]

    def complete(self) -> list[Mapping[str, Any]]:
        """Trials with a value, in the order of their numbers."""
        found = [trial for trial in self.trials if trial.get("state") == "complete" and _finite(trial.get("value"))]
        return sorted(found, key=lambda trial: trial["number"])

    def run_folders(self) -> list[Path]:
        """Folders of the trials' runs, as far as they exist."""
        names = dict.fromkeys(name for trial in self.trials for name in trial.get("runs") or ())
        return [path.resolve() for name in names if (path := self.folder.parent / name).is_dir()]

    def in_full(self, names: Sequence[str]) -> list[str]:
        """Options as a run's configuration has them, `model.init_args.lr` for `model.lr`; as they are, without runs."""
        folder = next(iter(self.run_folders()), None)
        options = {short(key): key for key in flatten(RunFolder(folder).config())} if folder else {}
        return [options.get(short(name), name) for name in names]

    def made(self, run: RunInfo) -> bool:
        """Whether a run is of one of its trials, also of one that the file does not tell of yet."""
        return run.folder.run_id.startswith(f"{self.name}-t") or run.folder.path.resolve() in self._folders

    @cached_property
    def _folders(self) -> frozenset[Path]:
        return frozenset(self.run_folders())


def find_sweeps(given: Sequence[Path]) -> list[Sweep]:
    """Sweeps whose file lies in a given folder, or in a folder of it."""
    files = [file for folder in given for file in (folder / FILE, *sorted(folder.glob(f"*/{FILE}"))) if file.is_file()]
    return [read_sweep(file.parent) for file in dict.fromkeys(files)]


def read_sweep(folder: Path) -> Sweep:
    """Read a sweep.

    Raises:
        UserError: there is no `sweep.json`, or it is not what the verb `sweep` writes.
    """
    file = folder if folder.name == FILE else folder / FILE
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        sweep = Sweep(file.parent, said)
        _ = sweep.metric, [(trial["number"], trial["params"]) for trial in sweep.trials]
        return sweep
    except FileNotFoundError:
        raise UserError(f"--sweep {folder}: no {FILE} here; the verb `sweep` writes it into RUNS_DIR/NAME") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file} is not what the verb `sweep` writes; `sweep status` writes it anew") from None


def section(sweep: Sweep) -> Section:
    """All of it."""
    return Section(f"Sweep {sweep.name}", list(_blocks(sweep)))


def _blocks(sweep: Sweep) -> Iterator[Block]:
    complete = sweep.complete()
    states = Counter(str(trial.get("state")) for trial in sweep.trials)
    yield Text(
        f"{len(sweep.trials)} trials ({', '.join(f'{count} {state}' for state, count in states.items())}) by "
        f"{sweep.said.get('method', 'an unnamed method')}, in search of the "
        f"{'largest' if sweep.maximize else 'smallest'} `{sweep.metric}`."
    )
    names = list(sweep.said.get("parameters") or (complete[0]["params"] if complete else {}))
    if not complete:
        yield Text("No trial is complete yet.", "warning")
    else:
        best = (max if sweep.maximize else min)(complete, key=lambda trial: trial["value"])
        values = best.get("values") or []
        over = f", the mean of {len(values)} seeds" if len(values) > 1 else ""
        yield Text(f"Best: trial {best['number']} with {sweep.metric} = {best['value']:.4g}{over}.")
        options = " ".join(f"--{short(name)} {value}" for name, value in best["params"].items())
        yield Code(options, f"options of trial {best['number']}")
        yield Text(
            "The best of many trials flatters: it was chosen by the very value that is shown. What it is worth is told "
            "by fresh runs on pictures that the sweep has not looked at, such as the test set.",
            "warning",
        )
        yield _progress(sweep, complete)
        yield Parallel(
            "Each line is a complete trial",
            [*map(short, names), sweep.metric],
            [[*(_coordinate(trial["params"].get(name)) for name in names), trial["value"]] for trial in complete],
            [short(name) for name in names if (sweep.said["parameters"].get(name) or {}).get("log")]
            if sweep.said.get("parameters")
            else [],
            "larger" if sweep.maximize else "smaller",
            sweep.in_full(names),
        )
    if importance := sweep.said.get("importance"):
        bars = sorted(((short(name), float(share)) for name, share in importance.items()), key=lambda bar: -bar[1])
        yield Bars("Importance (PED-ANOVA): share of a parameter in what sets the best trials apart", "share", bars)
    yield _table(sweep, names)


def _progress(sweep: Sweep, complete: Sequence[Mapping[str, Any]]) -> Lines:
    best, reached = math.nan, []
    for trial in complete:
        value = float(trial["value"])
        best = value if math.isnan(best) else (max if sweep.maximize else min)(best, value)
        reached.append(best)
    numbers = [float(trial["number"]) for trial in complete]
    own = Curve("trial", numbers, [float(trial["value"]) for trial in complete])
    return Lines("Best value over trials", "trial", sweep.metric, [Curve("best so far", numbers, reached), own])


def _table(sweep: Sweep, names: Sequence[str]) -> Table:
    ranked = sorted(
        sweep.trials,
        key=lambda trial: (not _finite(trial.get("value")), _signed(trial.get("value"), sweep.maximize)),
    )
    values = [trial["value"] for trial in ranked if _finite(trial.get("value"))]
    columns = [
        Column("trial", 0),
        Column("state"),
        Column(sweep.metric, max(4, digits(values)), better="larger" if sweep.maximize else "smaller"),
        Column("seeds", 0),
        *(Column(short(name), 6) for name in names),
        Column("minutes", 1),
        Column("worker"),
    ]
    rows: list[list[Cell]] = [
        [
            trial["number"],
            str(trial.get("state", "")),
            trial["value"] if _finite(trial.get("value")) else None,
            len(trial.get("seeds") or ()),
            *(_text(trial["params"].get(name)) for name in names),
            trial["seconds"] / 60 if _finite(trial.get("seconds")) else None,
            str(trial.get("worker") or ""),
        ]
        for trial in ranked
    ]
    return Table(f"trials_{sweep.name}", columns, rows, "All trials, the best first.")


def _coordinate(value: Any) -> float | str | None:
    return value if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)) else str(value)


def _text(value: Any) -> Cell:
    return None if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _signed(value: Any, maximize: bool) -> float:
    return (-value if maximize else value) if _finite(value) else 0.0


def summary(sweeps: Sequence[Sweep]) -> str:
    """The best value of each sweep, and what it is worth."""
    said = []
    for sweep in sweeps:
        complete = sweep.complete()
        if not complete:
            said.append(f"Sweep {sweep.name}: no trial is complete yet.")
            continue
        best = (max if sweep.maximize else min)(complete, key=lambda trial: trial["value"])
        said.append(
            f"Sweep {sweep.name}: best of {len(complete)} complete trials is trial {best['number']} with "
            f"{sweep.metric} = {best['value']:.4g}, chosen by that very value."
        )
    return " ".join(said)
