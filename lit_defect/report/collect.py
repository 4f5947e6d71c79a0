"""Run folders as a report needs them: found below what is given, read quickly, and never fatal when broken."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lit_defect.errors import UserError
from lit_defect.report.figures import Measured, read_measured
from lit_defect.runs import RunFolder, flatten

DEPTH = 3
"""How far below a given folder runs are looked for."""
STAGES = ("test", "val", "mirrored")


@dataclass(frozen=True, eq=False)
class RunInfo:
    """What a run folder says; equal to itself only.

    Attributes:
        folder: where it lies.
        record: of `run.json`; empty where that is missing or broken.
        config: of `config.yaml`, likewise.
        measured: by stage.
        problems: what could not be read.
    """

    folder: RunFolder
    record: Mapping[str, Any]
    config: Mapping[str, Any]
    measured: Mapping[str, Measured]
    problems: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """`experiment/run id`."""
        return f"{self.folder.experiment}/{self.folder.run_id}"

    @cached_property
    def options(self) -> dict[str, Any]:
        """The configuration, flat."""
        return flatten(self.config)

    @cached_property
    def seeds(self) -> tuple[Any, Any]:
        """Of training and of the split, as the results or else the configuration have them."""
        for found in self.measured.values():
            if "training_seed" in found.about:
                return found.about["training_seed"], found.about.get("split_seed")
        return self.record.get("seed", self.config.get("seed_everything")), self.options.get("data.init_args.seed")

    @cached_property
    def state(self) -> str:
        """`finished`, `failed`, `preempted`, `running`, ...; `lost` where the process of a running one is gone."""
        status = str(self.record.get("status") or "unknown")
        if status != "running":
            return status
        here = self.record.get("host") == socket.gethostname()
        return "lost" if here and not self.folder.is_alive() else "running"

    @property
    def task(self) -> str:
        """Name of the model's class."""
        return str((self.config.get("model") or {}).get("class_path") or "").rpartition(".")[2]

    @property
    def data(self) -> str:
        """Name of the data's class, and the category where there is one."""
        name = str((self.config.get("data") or {}).get("class_path") or "").rpartition(".")[2]
        category = self.options.get("data.init_args.category")
        return f"{name} {category}" if category else name


@dataclass(frozen=True)
class Found:
    """Runs, and what was wrong on the way to them."""

    runs: Sequence[RunInfo]
    problems: Sequence[str] = field(default_factory=tuple)


def find_runs(given: Iterable[Path]) -> list[Path]:
    """Run folders: the given ones, and those up to `DEPTH` folders below, by name.

    Raises:
        UserError: a given folder does not exist, or no run lies in any of them or below.
    """
    found: dict[Path, None] = {}
    empty: list[Path] = []
    for folder in given:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give run folders, experiments, or the folder of all of them")
        below = list(_below(str(folder), DEPTH))
        found |= dict.fromkeys(Path(path).resolve() for path in below)
        empty += [] if below else [folder]
    if empty and not found:
        raise UserError(
            f"{empty[0]}: no run here, nor up to {DEPTH} folders below: a run folder has a `run.json`; "
            "give the `--runs_dir` of your experiments, or folders in it"
        )
    return list(found)


def without_runs(given: Iterable[Path]) -> list[Path]:
    """Those of the folders in which no run lies, such as a study's own, which `runs/elpv*` takes in."""
    return [folder for folder in given if next(_below(str(folder), DEPTH), None) is None]


def read_runs(paths: Iterable[Path]) -> Found:
    """Read run folders; what is missing or broken in them is told, and nothing is raised for it."""
    runs = [read_run(path) for path in paths]
    return Found(runs, [f"{run.name}: {problem}" for run in runs for problem in run.problems])


def read_run(path: Path) -> RunInfo:
    """Read one run folder."""
    folder, problems = RunFolder(path), []
    record, config = folder.record(), folder.config()
    if not isinstance(record, Mapping) or not record:
        problems.append("`run.json` is missing or broken")
        record = {}
    if odd := [key for key, value in record.items() if not _sound(key, value)]:
        problems.append(f"`run.json` has no sound {', '.join(odd)}")
        record = {key: value for key, value in record.items() if key not in odd}
    if not isinstance(config, Mapping) or not config:
        problems.append("`config.yaml` is missing or broken")
        config = {}
    measured = {}
    for stage in STAGES:
        file = path / f"{stage}_metrics.json"
        try:
            said = json.loads(file.read_bytes())
            if not isinstance(said, Mapping):
                raise ValueError("no figures in it")
            measured[stage] = read_measured(said)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError) as error:
            problems.append(f"`{file.name}` cannot be read: {str(error).splitlines()[0]}")
    return RunInfo(folder, record, config, measured, tuple(problems))


def _sound(key: str, value: Any) -> bool:
    """Whether a field of `run.json` can be read; what is not told of here is only shown."""
    if key == "seconds":
        return isinstance(value, list) and all(isinstance(part, (int, float)) for part in value)
    if key in ("epochs", "steps", "devices"):
        return value is None or isinstance(value, (int, float))
    return isinstance(value, Mapping) if key == "versions" else True


def _below(folder: str, depth: int) -> Iterator[str]:
    """Run folders in the order of their names; nothing in a run folder is another one."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: _natural(entry.name))
    except OSError:
        return
    names = {entry.name for entry in entries}
    if "run.json" in names or ("config.yaml" in names and names & {"checkpoints", "metrics.csv"}):
        yield folder
    elif depth:
        for entry in entries:
            if not entry.name.startswith(".") and entry.is_dir():
                yield from _below(entry.path, depth - 1)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """`s2` before `s10`."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]
