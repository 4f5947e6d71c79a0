"""Parses the commands of a study as the command line would, without running any, and compares with what was run.

    python -m lit_defect.study_check < COMMANDS > ANSWERS

Commands are JSON, a list of words by the job's name; the answer is a configuration or an error for each. A process of
its own, since parsing imports torch and all tasks, once for all commands.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_defect import runs
from lit_defect.errors import UserError
from lit_defect.reporting.seeds import INCIDENTAL
from lit_defect.study_plan import Job

_DECIDING = ("seed_everything", "data.init_args.seed", "data.init_args.val_seed", "data.init_args.category")
_ELSEWHERE = tuple(key for key in INCIDENTAL if key not in _DECIDING)


def parsed(commands: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """The whole configuration of each command, by the job's name.

    Args:
        commands: verb and options, as they follow the program's name.

    Raises:
        UserError: one of them has an unknown key or a value that cannot be.
    """
    process = subprocess.run(
        [sys.executable, "-m", "lit_defect.study_check"], input=json.dumps(commands), capture_output=True, text=True
    )
    if process.returncode:
        raise RuntimeError(f"the options could not be checked:\n{process.stderr}")
    answers = json.loads(process.stdout)
    for name, answer in answers.items():
        if "error" in answer:
            raise UserError(f"{name}: {answer['error']}")
    return {name: answer["config"] for name, answer in answers.items()}


def changes_since(job: Job, config: Mapping[str, Any], extra: Sequence[str] = ()) -> list[str]:
    """In what the options of a job that was begun differ from those that it would be run with now.

    Options that say where or how fast do not count, nor do other spellings of a path. Options that were added to the
    program since count where the study sets them.

    Args:
        job: what would be run.
        config: its whole configuration as parsed now.
        extra: words that its command ends with.

    Raises:
        UserError: the run does not say what it was made with.
    """
    if job.verb == "predict":
        if not job.mark.is_file():
            return []
        mark = json.loads(job.mark.read_text(encoding="utf-8"))
        before = mark.get("config")
        if before is None:  # a mark of before marks had options
            same = _same(mark["command"], list(job.words))
            return [] if same else [f"{shlex.join(mark['command'])}, now {shlex.join(job.words)}"]
    else:
        if not job.run.record():
            return []
        before = job.run.config()
    if not before:
        where = job.mark if job.verb == "predict" else job.run.path / "config.yaml"
        raise UserError(
            f"{job.name}: {where} has no options, so that nobody knows what {job.run.path} was made with: remove that "
            "folder and those of the runs that build upon it"
        )
    old, new, told = runs.flatten(before), runs.flatten(config), _told([*job.words, *extra])
    changed = (change.partition(":")[0] for change in runs.changed_options(before, config))
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in changed
        if not key.startswith(_ELSEWHERE) and not _same(old.get(key), new.get(key)) and _counts(key, old, told)
    ]


def _same(old: Any, new: Any) -> bool:
    """Whether two values are equal, or paths of the same place."""
    if isinstance(old, str) and isinstance(new, str):
        return old == new or Path(old).resolve() == Path(new).resolve()
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(_same, old, new))
    return bool(old == new)


def _counts(key: str, old: Mapping[str, Any], told: Sequence[str]) -> bool:
    """Whether a difference is more than the default of an option that was added since.

    The option was there if `old` has it or something below or above it; else it counts where the study tells it.
    """
    parts = key.split(".")
    for length in range(1, len(parts) + 1):
        option = ".".join(parts[:length])
        if option in old:
            return True
        if not any(known.startswith(f"{option}.") for known in old):  # added since, with all that is below it
            added, whole = _spoken(option), _spoken(key)
            return any(f"{name}.".startswith(f"{added}.") and f"{whole}.".startswith(f"{name}.") for name in told)
    return True


def _told(words: Sequence[str]) -> list[str]:
    """Names of the options that a command and its YAML file set, as `_spoken`."""
    found: list[str] = []
    for name, value in itertools.pairwise([*words, ""]):
        if not name.startswith("--"):
            continue
        name, _, given = name[2:].partition("=")
        if name == "config":
            said = yaml.safe_load(Path(given or value).read_text(encoding="utf-8")) or {}
            found += map(_spoken, runs.flatten(said))
            continue
        try:
            said = json.loads(given or value)
        except ValueError:
            said = None
        found += [_spoken(key) for key in runs.flatten({name: said})]
    return found


def _spoken(key: str) -> str:
    """An option as it may be written: `model.lr` for `model.init_args.lr`."""
    return ".".join(part for part in key.split(".") if part != "init_args")


def parse(words: Sequence[str]) -> dict[str, Any]:
    """`{"config": ...}`, or `{"error": ...}` in the command line's own words."""
    from lit_defect.cli import main

    said, failed = io.StringIO(), io.StringIO()
    sys.argv = ["lit_defect", *words, "--print_config"]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(failed):
            main()
    except SystemExit as stop:
        if stop.code:
            return {"error": failed.getvalue().strip().removeprefix("error: ")}
    return {"config": yaml.safe_load(said.getvalue())}


if __name__ == "__main__":
    json.dump({name: parse(words) for name, words in json.load(sys.stdin).items()}, sys.stdout)
