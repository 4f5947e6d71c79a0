"""A quick program in the place of `fit`, and sweeps of it: the run folder, the exit codes and the stops are fit's."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from lit_defect.claims import Claims
from lit_defect.errors import UserError
from lit_defect.sweep.file import read_sweep
from lit_defect.sweep.search import open_study

PLAY = """
import json, os, signal, sys, time
from pathlib import Path

told, words = {}, sys.argv[1:]
while words:
    name, equals, value = words.pop(0).lstrip("-").partition("=")
    told[name] = value if equals else True if name == "resume" else words.pop(0)
number = lambda name, other: float(told.get(name, other))
run = Path(told["runs_dir"]) / told["experiment"] / told["run_id"]
state, record, metrics = run / "state.json", run / "run.json", run / "metrics.csv"
if state.exists() and not told.get("resume"):
    sys.exit(2)
run.mkdir(parents=True, exist_ok=True)
done = json.loads(state.read_text())["epochs"] if state.exists() else 0
before = json.loads(record.read_text()) if record.exists() else {}
launches = before.get("launches", 0) + 1
def note(status):
    text = {"status": status, "pid": os.getpid(), "host": os.uname().nodename, "launches": launches, "told": told}
    (run / ".run").write_text(json.dumps(text)); (run / ".run").replace(record)
note("running")
stopped = []
for known in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(known, lambda number, _: stopped.append(number))
if number("x", 0) == number("refuses", -1):
    print("error: --x: cannot be so"); note("failed"); sys.exit(2)
if number("x", 0) == number("fails", -1):
    print("Traceback: out of memory"); note("failed"); sys.exit(1)
if not metrics.exists():
    metrics.write_text("epoch,step,val/score\\n")
for epoch in range(done, int(number("epochs", 2))):
    time.sleep(number("pause", 0))
    value = number("x", 0) + 10 * number("seed_everything", 0) + epoch / 100
    with metrics.open("a") as file:
        file.write(f"{epoch},{epoch + 1},{'nan' if number('x', 0) == number('nan', -1) else value}\\n")
    (run / ".state").write_text(json.dumps({"epochs": epoch + 1})); (run / ".state").replace(state)
    patience = time.monotonic() + 600  # where the test has failed meanwhile
    while "hold" in told and os.path.exists(told["hold"]) and not stopped and time.monotonic() < patience:
        time.sleep(0.02)
    if stopped:
        note("preempted"); sys.exit(128 + stopped[0])
note("finished")
"""


def sweep_file(folder: Path, **changes: Any) -> Path:
    """A sweep of the play; entries of None are left out, those of `options` go into the command."""
    program = folder / "play.py"
    program.write_text(PLAY)
    options = [f"--{name}={value}" for name, value in changes.pop("options", {}).items()]
    said = {
        "name": "toy",
        "method": "grid",
        "metric": {"name": "val/score", "goal": "maximize"},
        "command": ["${env}", "${interpreter}", str(program), *options, "${args}"],
        "parameters": {"x": {"values": [1, 2, 3]}},
        **changes,
    }
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in said.items() if value is not None}, sort_keys=False))
    return file


def hold(folder: Path) -> Path:
    """While this file is there, trainings with the option `hold` wait after an epoch: a test need not be quicker."""
    file = folder / "hold"
    file.touch()
    return file


def start(file: Path, *words: str, session: bool = False) -> subprocess.Popen[str]:
    """A worker in a process of its own; with `session` also a group of its own, as what is started in a terminal."""
    command = [sys.executable, "-m", "lit_defect", "sweep", str(file), "--runs_dir", str(file.parent / "runs"), *words]
    root = str(Path(__file__).parent.parent)
    return subprocess.Popen(
        command, cwd=file.parent, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": root}, start_new_session=session,
    )  # fmt: skip


def claimed_by(folder: Path, pid: int) -> list[str]:
    """Tasks of a worker, the sweep's file being in the folder."""
    claims = Claims(folder / "runs/toy/claims").newest()
    return [task for task, claim in claims.items() if claim.pid == pid]


def at_once(folder: Path, url: str, workers: int = 6) -> list[str]:
    """Names of the study that workers find in a database that all come to at the same moment; errors as their text."""
    sweep = read_sweep(sweep_file(folder))
    together = threading.Barrier(workers)

    def join(_: int) -> str:
        together.wait()
        try:
            return open_study(sweep, folder, url, "of this folder").study_name
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(join, range(workers)))


def outcome(file: Path) -> dict[str, Any]:
    """What `sweep.json` says."""
    name = yaml.safe_load(file.read_text())["name"]
    return json.loads((file.parent / "runs" / name / "sweep.json").read_text())


def run_record(file: Path, run: str) -> dict[str, Any]:
    return json.loads((file.parent / "runs" / run / "run.json").read_text())


def epochs_of(file: Path, run: str) -> list[int]:
    with (file.parent / "runs" / run / "metrics.csv").open(newline="") as lines:
        return [int(row["epoch"]) for row in csv.DictReader(lines)]


def until(true: Any, seconds: float = 120) -> Any:
    """Wait for something, and give it."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found
