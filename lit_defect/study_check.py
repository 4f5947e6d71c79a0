"""Parses the commands of a study as the command line would, without running any.

    python -m lit_defect.study_check < COMMANDS > ANSWERS

Commands are JSON, a list of words by the job's name; the answer is a configuration or an error for each. A process of
its own, since parsing imports torch and all tasks, once for all commands.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from lit_defect.errors import UserError


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
