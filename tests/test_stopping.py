"""Runs that are told to stop: all processes at once, at any moment, and the scheduler's part of it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from lit_defect import stopping
from lit_defect.callbacks.run import LastCheckpoint
from lit_defect.stopping import STOP, Stopped, ended, slurm_job
from lit_defect.tasks import DefectClassifier
from tests.sweeping import until
from tests.test_survival import LIMIT, config, rows, run, start, weights  # noqa: F401  (config is a fixture)

IN_TIME = 60  # seconds in which a signalled run has to end; a hang takes half an hour
TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_epochs", "12")


def interrupt(folder: Path, after: float, number: int, *arguments: object) -> int | None:
    """Start a run and signal all its processes after some seconds; the exit code, None if it had ended before."""
    process = start(folder, *arguments)
    try:
        process.wait(after)
        return None
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, number)
    try:
        return process.wait(IN_TIME) or None
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"hangs since a signal after {after:.1f} s:\n{(folder / 'log.txt').read_text()[-3000:]}")


@pytest.mark.parametrize(
    ("times", "seed"), [pytest.param(2, 0, id="twice"), pytest.param(20, 1, id="20 times", marks=pytest.mark.slow)]
)
@pytest.mark.timeout(3600)
def test_processes_that_are_all_told_to_stop_at_any_moment_end_and_go_on(config, tmp_path, times, seed):  # noqa: F811
    arguments = ("fit", "--config", config, *TWO, "--run_id")
    begun = time.monotonic()
    run(tmp_path, *arguments, "whole")
    whole_time = time.monotonic() - begun
    draw, number, codes = random.Random(seed), 0, []
    while len(codes) < times:
        stopped = tmp_path / "runs" / "tiny" / f"stopped{number}"
        after = draw.uniform(0.1, 1) * whole_time
        code = interrupt(tmp_path, after, signal.SIGTERM, *arguments, stopped.name, "--resume")
        if code is None:  # it was quicker: the next one is another run
            number += 1
            continue
        codes.append(code)
        # -15: before Python has come to the program's first line
        assert code in (143, -15), f"{code} after {after:.2f} s:\n" + (tmp_path / "log.txt").read_text()[-5000:]
        last = stopped / "checkpoints" / "last.ckpt"
        if last.is_file():
            torch.load(last, weights_only=True)
    assert 143 in codes
    run(tmp_path, *arguments, stopped.name, "--resume")
    expected = weights(tmp_path / "runs" / "tiny" / "whole")
    for folder in (tmp_path / "runs" / "tiny").glob("stopped*"):
        assert json.loads((folder / "run.json").read_text())["status"] == "finished"
        assert all(torch.equal(weights(folder)[key], expected[key]) for key in expected), folder
        assert rows(folder) == rows(tmp_path / "runs" / "tiny" / "whole"), folder


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_workers_of_a_data_loader_outlive_the_signal_until_the_state_is_saved(config, tmp_path, number):  # noqa: F811
    """A scheduler signals every process of a job; a worker that dies of it would take the run along."""
    words = ("fit", "--config", config, "--run_id", "one", "--data.num_workers", "2", "--data.cache", "off")
    process = start(tmp_path, *words, "--trainer.max_epochs", "1000")
    last, deadline = tmp_path / "runs" / "tiny" / "one" / "checkpoints" / "last.ckpt", time.monotonic() + LIMIT
    while not last.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, number)
    assert process.wait(IN_TIME) == 128 + number, (tmp_path / "log.txt").read_text()[-3000:]
    status = json.loads((last.parent.parent / "run.json").read_text())["status"]
    assert status == ("preempted" if number == signal.SIGUSR1 else "interrupted")
    assert not living(process.pid), "a worker is left"


def living(group: int) -> list[str]:
    """Processes of a group, without those that have ended and that nobody has asked for."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            words = path.read_text().rpartition(")")[2].split()
            if words[2] == str(group) and words[0] != "Z":
                found.append(" ".join(words[:4]))
    return found


SELF_SIGNALLED = """
import os, signal, sys
import lit_defect.tasks.classification as module
from lit_defect.__main__ import main

step = module.DefectClassifier.training_step

def training_step(self, batch, batch_idx):
    if self.trainer.global_step == {at} and self.global_rank in {ranks} and not os.path.exists("signalled"):
        if self.global_rank == max({ranks}):
            open("signalled", "w").close()
        os.kill(os.getpid(), signal.{name})
    return step(self, batch, batch_idx)

module.DefectClassifier.training_step = training_step
sys.argv = ["lit_defect", *sys.argv[1:]]
main()
"""


def signalled(folder: Path, name: str, ranks: tuple[int, ...], environment: dict[str, str], *words: object) -> int:
    """The exit code of a fit in whose tenth step, which is logged, these ranks get a signal; the processes start by torchrun if several."""
    script = folder / "signalled.py"
    script.write_text(textwrap.dedent(SELF_SIGNALLED).format(at=9, ranks=ranks, name=name))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*(launch if len(ranks) > 1 or max(ranks) else [sys.executable]), str(script), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), **environment}
    with (folder / "log.txt").open("ab") as log:
        return subprocess.run(command, cwd=folder, stdout=log, stderr=log, env=environment, timeout=LIMIT).returncode


def scontrol(folder: Path) -> dict[str, str]:
    """An environment whose `scontrol` writes down what it is asked for."""
    program = folder / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked.txt\n')
    program.chmod(0o755)
    return {"PATH": f"{program.parent}:{os.environ['PATH']}"}


def test_usr1_saves_puts_the_job_back_and_the_run_goes_on(config, tmp_path):  # noqa: F811
    words = ("fit", "--config", config, "--run_id", "one", "--resume")
    job = {"SLURM_JOB_ID": "17", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "5", **scontrol(tmp_path)}
    assert signalled(tmp_path, "SIGUSR1", (0,), job, *words) == 138
    folder = tmp_path / "runs" / "tiny" / "one"
    assert json.loads((folder / "run.json").read_text())["status"] == "preempted"
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 10, "after the batch"
    assert (tmp_path / "asked.txt").read_text() == "requeue 12_5\n"
    assert signalled(tmp_path, "SIGUSR1", (0,), job, *words) == 0
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    run(tmp_path, *words[:-2], "whole")
    assert rows(folder) == rows(tmp_path / "runs" / "tiny" / "whole")


SIGNALLED_IN_VALIDATION = """
import os, signal, sys, time
import lit_defect.tasks.classification as module
from lit_defect.__main__ import main

step, own = module.DefectClassifier.validation_step, "first" if os.environ.get("RANK", "0") == "0" else "second"
begun = 0

def validation_step(self, batch, batch_idx):
    global begun
    step(self, batch, batch_idx)
    begun += batch_idx == 0 and not self.trainer.sanity_checking
    if begun != {number} or not os.path.exists("armed"):
        return
    time.sleep(0.3)
    with open(own, "a") as seen:
        seen.write("x")
    if batch_idx == 1 and own == "{signalled}":
        os.kill(os.getpid(), signal.SIGUSR1)

module.DefectClassifier.validation_step = validation_step
sys.argv = ["lit_defect", *sys.argv[1:]]
main()
"""
EARLY = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss", "patience": 3}}


@pytest.mark.parametrize(
    ("processes", "number", "options"),
    [
        pytest.param(1, 3, (), id="at the end of the last epoch"),
        pytest.param(1, 3, ("--trainer.val_check_interval", "0.5"), id="within an epoch"),
        pytest.param(2, 2, (), id="of two processes"),
    ],
)
def test_a_validation_that_a_signal_breaks_off_is_begun_anew(config, tmp_path, processes, number, options):  # noqa: F811
    content = yaml.safe_load(config.read_text())
    content["trainer"]["callbacks"].append(EARLY)
    content["data"]["init_args"] |= {"val_fraction": 0.4, "eval_batch_size": 1}
    config.write_text(yaml.safe_dump(content))
    script = tmp_path / "signalled.py"
    signalled = "second" if processes == 2 else "first"
    script.write_text(SIGNALLED_IN_VALIDATION.format(number=number, signalled=signalled))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}

    def train(name: str) -> int:
        words = ("fit", "--config", config, "--run_id", name, "--resume", "--trainer.max_epochs", "3", *options)
        devices = ("--trainer.devices", "2", "--trainer.strategy", "ddp") if processes == 2 else ()
        command = [*(launch if processes == 2 else [sys.executable]), str(script), *map(str, (*words, *devices))]
        with (tmp_path / "log.txt").open("ab") as log:
            return subprocess.run(
                command, cwd=tmp_path, stdout=log, stderr=log, env=environment, timeout=LIMIT
            ).returncode

    assert train("whole") == 0, (tmp_path / "log.txt").read_text()[-3000:]
    whole, stopped = (tmp_path / "runs" / "tiny" / name for name in ("whole", "stopped"))
    (tmp_path / "armed").touch()
    assert train("stopped") != 0
    (tmp_path / "armed").unlink()
    assert json.loads((stopped / "run.json").read_text())["status"] == "preempted"
    for seen in ("first", "second")[:processes]:
        assert 2 <= len((tmp_path / seen).read_text()) <= 8, "the validation was not waited for"
    assert train("stopped") == 0, (tmp_path / "log.txt").read_text()[-3000:]
    assert rows(stopped) == rows(whole)
    for name in ("last", "best"):
        one, other = (torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True) for run in (whole, stopped))
        assert all(torch.equal(value, other["state_dict"][key]) for key, value in one["state_dict"].items()), name
        assert one["epoch"] == other["epoch"]
        loops = [
            {key: value for key, value in state["loops"]["fit_loop"].items() if key != "state_dict"}  # of the loader
            for state in (one, other)
        ]
        assert loops[0] == loops[1], name
        watched = [key for key in one["callbacks"] if key.startswith("EarlyStopping")]
        assert watched
        assert all(str(one["callbacks"][key]) == str(other["callbacks"][key]) for key in watched)


def test_a_signal_after_the_end_changes_nothing(tmp_path):
    """Python takes seconds to leave a process with PyTorch; the exit code of a finished run stands."""
    script = tmp_path / "late.py"
    script.write_text(
        "import atexit, os, signal, sys\n"
        "atexit.register(lambda: [os.kill(os.getpid(), number) for number in (signal.SIGTERM, signal.SIGUSR1)])\n"
        "from lit_defect.__main__ import main\n"
        "sys.argv = ['lit_defect', 'fit', '--help']\n"
        "main()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    assert subprocess.run([sys.executable, str(script)], env=environment, stdout=subprocess.DEVNULL).returncode == 0


def test_a_signal_to_one_process_stops_all(config, tmp_path):  # noqa: F811
    words = ("fit", "--config", config, "--run_id", "one", "--trainer.devices", "2", "--trainer.strategy", "ddp")
    assert signalled(tmp_path, "SIGTERM", (1,), {}, *words) != 0  # torchrun has an exit code of its own
    record = json.loads((tmp_path / "runs" / "tiny" / "one" / "run.json").read_text())
    assert record["status"] == "interrupted"
    assert record["error"] == "Stopped: 143"
    assert (tmp_path / "runs" / "tiny" / "one" / "checkpoints" / "last.ckpt").is_file()


def test_a_stop_is_noted_or_obeyed():
    with STOP.heeded():
        with pytest.raises(Stopped) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.value.code, stop.value.preempted) == (143, False)
    with STOP.heeded():
        STOP.defer()
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert STOP.number == signal.SIGUSR1, "the first one counts"
        with pytest.raises(Stopped) as stop:
            STOP.at_once()
        assert (stop.value.code, stop.value.preempted) == (138, True)
    assert STOP.number is None
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_an_error_that_follows_from_a_stop_is_one():
    """Libraries that are stopped while they are imported fail in their own ways: the exit code was 1."""
    with pytest.raises(SystemExit) as end:
        failing_after_a_stop()
    assert end.value.code == 143
    with pytest.raises(RecursionError), STOP.heeded():
        raise RecursionError("its own")
    with pytest.raises(RecursionError):
        failing_after_a_stop(deferred=True)  # of the training, which was still to hear of the signal


def failing_after_a_stop(deferred: bool = False) -> None:
    with STOP.heeded():
        if deferred:
            STOP.defer()
        with contextlib.suppress(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
        raise RecursionError("maximum recursion depth exceeded")


STUCK = """
import torch.distributed as distributed
from lit_defect.stopping import STOP
with STOP.heeded():
    print("waits", flush=True)
    distributed.TCPStore("127.0.0.1", 0, 2, True)  # for a second process
"""


@pytest.mark.parametrize(("number", "asked"), [(signal.SIGTERM, False), (signal.SIGUSR1, True)])
def test_a_process_that_waits_in_cpp_ends_all_the_same(tmp_path, number, asked):
    """As for a process of the launch that will never come: Python's own handlers are not run meanwhile."""
    program = tmp_path / "stuck.py"
    program.write_text(STUCK)
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent.parent),
        **scontrol(tmp_path),
        "SLURM_JOB_ID": "17",
    }
    process = subprocess.Popen([sys.executable, str(program)], env=environment, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"waits\n"
    time.sleep(1)
    process.send_signal(number)
    assert process.wait(IN_TIME) == 128 + number
    assert (tmp_path / "asked.txt").exists() == asked


def watchers() -> list[threading.Thread]:
    """Threads that would end this process after a signal that nobody sees."""
    return [thread for thread in threading.enumerate() if "_watch" in thread.name]


def test_a_signal_of_before_ends_no_later_program(monkeypatch):
    with STOP.heeded(), pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGTERM)
    left: list[int] = []
    monkeypatch.setattr(stopping, "_STUCK", 0.1)
    monkeypatch.setattr(os, "_exit", left.append)
    with STOP.heeded():
        time.sleep(0.5)
    until(lambda: not watchers())
    assert not left


def test_a_signal_at_the_very_end_is_too_late(monkeypatch):
    """All is done; the handlers are just taken down."""
    before, close = signal.getsignal(signal.SIGTERM), os.close
    monkeypatch.setattr(os, "close", lambda file: (os.kill(os.getpid(), signal.SIGTERM), close(file)))
    with STOP.heeded():
        pass
    monkeypatch.undo()
    assert STOP.number is None
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_echo_of_the_signal_does_not_break_into_what_is_done_at_the_end(monkeypatch, tmp_path):
    """torchrun, SLURM and a sweep may each tell the same process."""
    monkeypatch.setenv("PATH", scontrol(tmp_path)["PATH"])
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    done = []

    @STOP.heeded()
    def told_twice():
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("run.json")

    with pytest.raises(SystemExit) as stop:
        told_twice()
    assert (stop.value.code, done) == (138, ["run.json"])
    assert (tmp_path / "asked.txt").read_text() == "requeue 17\n"


def test_a_program_that_ends_while_the_job_is_put_back_breaks_no_pipe(monkeypatch):
    """A process with data loaders listens to SIGCHLD, and `scontrol` sends one; nobody reads of signals any more."""
    unraised: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", unraised.append)

    def puts_back(stop: Stopped) -> int:
        until(lambda: not watchers())
        subprocess.run([sys.executable, "-S", "-c", ""], check=True)
        return int(stop.code)

    monkeypatch.setattr(stopping, "ended", puts_back)
    before = signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        with pytest.raises(SystemExit), STOP.heeded():
            os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert not unraised


def test_a_server_that_hangs_keeps_no_job_from_the_queue(monkeypatch):
    monkeypatch.setattr(stopping, "_STUCK", 0.1)
    monkeypatch.setattr(stopping, "_LEFT", {signal.SIGUSR1: 0.3})
    monkeypatch.setattr(stopping, "ended", lambda stop: stop.code)
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)

    @STOP.heeded()
    def hangs():
        STOP.defer()
        try:
            STOP.stop(signal.SIGUSR1)  # as another process has asked for
        finally:
            until(lambda: left)

    with pytest.raises(SystemExit):
        hangs()
    assert left[:1] == [138]


def test_a_signal_to_a_forked_process_is_not_taken_for_ours(monkeypatch):
    leave, left = os._exit, []
    monkeypatch.setattr(stopping, "_STUCK", 0.1)
    with STOP.heeded():
        if not (child := os.fork()):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                leave(0)
            finally:
                leave(1)
        monkeypatch.setattr(os, "_exit", left.append)
        assert os.waitpid(child, 0)[1] == 0
        time.sleep(0.5)
    assert STOP.number is None
    assert not left


@pytest.mark.parametrize(
    ("error", "stops"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1"), True),
        (torch.distributed.DistNetworkError("failed to recv, got 0 bytes"), True),
        (OSError(28, "No space left on device"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_only_a_lost_connection_is_explained_by_a_signal(error, stops):
    assert STOP.explained(error) is error, "nobody has asked to stop"
    with STOP.heeded():
        STOP.defer()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert isinstance(STOP.explained(error), Stopped) is stops


def test_a_state_that_could_not_be_saved_is_a_failure(lit_defect, config, tmp_path, monkeypatch):  # noqa: F811
    """Not `preempted`: the job would be put back, and fail again, for ever."""

    def full(self, trainer):
        raise OSError(28, "No space left on device")

    step = DefectClassifier.training_step

    def told(self, batch, batch_idx):
        os.kill(os.getpid(), signal.SIGUSR1)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LastCheckpoint, "_save", full)
    monkeypatch.setattr(DefectClassifier, "training_step", told)
    with pytest.raises(OSError, match="No space"):
        lit_defect("fit", "--config", config, "--run_id", "one")
    assert json.loads((tmp_path / "runs" / "tiny" / "one" / "run.json").read_text())["status"] == "failed"


def test_a_stop_that_a_destructor_has_swallowed_is_not_forgotten(monkeypatch):
    class Careless:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    with STOP.heeded():
        monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
        thing = Careless()
        del thing
        with pytest.raises(Stopped):
            STOP.defer()


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "17"}, "17"),
        ({"SLURM_JOB_ID": "17", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "5"}, "12_5"),
        ({"SLURM_JOB_ID": "17; rm -rf /"}, None),
    ],
)
def test_the_job_of_a_process(environment, job):
    assert slurm_job(environment) == job


@pytest.mark.parametrize(
    ("number", "environment", "asked"),
    [
        (signal.SIGUSR1, {"SLURM_JOB_ID": "17"}, "requeue 17\n"),
        (signal.SIGUSR1, {"SLURM_JOB_ID": "17", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, None),
        (signal.SIGUSR1, {"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", "RANK": "1"}, None),
        (signal.SIGUSR1, {}, None),
        (signal.SIGTERM, {"SLURM_JOB_ID": "17"}, None),
    ],
)
def test_one_process_puts_the_job_back_where_it_was_preempted(tmp_path, monkeypatch, number, environment, asked):
    monkeypatch.setenv("PATH", scontrol(tmp_path)["PATH"])
    assert ended(Stopped(number), environment) == 128 + number
    file = tmp_path / "asked.txt"
    assert (file.read_text() if file.exists() else None) == asked


def test_the_first_process_speaks_for_all_that_have_agreed(tmp_path, monkeypatch):
    """srun --kill-on-bad-exit and torchrun end the others when one ends with another code than 0."""
    monkeypatch.setenv("PATH", scontrol(tmp_path)["PATH"])
    assert ended(Stopped(signal.SIGUSR1, follows=True), {"SLURM_JOB_ID": "17"}) == 0
    assert not (tmp_path / "asked.txt").exists()


@pytest.mark.parametrize("environment", [{"GROUP_RANK": "1"}, {"NODE_RANK": "1"}], ids=str)
def test_other_nodes_say_themselves_that_they_were_stopped(environment):
    """Else torchrun there waits five minutes for the first node's and ends with 0, as if all were done."""
    stop = Stopped(signal.SIGTERM, follows=True)
    assert ended(stop, environment) == 143
    assert ended(stop, {**environment, "SLURM_JOB_ID": "17"}) == 0, "srun would end the first process"
    assert ended(stop, dict.fromkeys(environment, "0")) == 0, "torchrun would end the first process"


def test_without_scontrol_the_user_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    stopping.requeue({"SLURM_JOB_ID": "17"})
    assert "scontrol requeue 17" in capsys.readouterr().err
    program = tmp_path / "scontrol"
    program.write_text("#!/bin/sh\necho Invalid job id >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    stopping.requeue({"SLURM_JOB_ID": "17"})
    assert "Invalid job id" in capsys.readouterr().err


def test_a_process_of_lightnings_launcher_tells_its_parent(monkeypatch):
    told = []
    monkeypatch.setattr(os, "kill", lambda *words: told.append(words))
    assert ended(Stopped(signal.SIGTERM), {"_LIT_DEFECT_PARENT": str(os.getppid())}) == 0, "else the launcher kills it"
    assert told == [(os.getppid(), signal.SIGTERM)]
    assert ended(Stopped(signal.SIGTERM), {"_LIT_DEFECT_PARENT": str(os.getpid())}) == 143, "its parent is gone"
    assert len(told) == 1
    parents = iter([17, 1])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))  # it dies meanwhile
    assert ended(Stopped(signal.SIGTERM), {"_LIT_DEFECT_PARENT": "17"}) == 0
    assert told[1:] == [(17, signal.SIGTERM)]


def test_the_mark_of_a_launched_process_is_inherited_by_no_other():
    seen = []
    stopping._start_shielded(lambda: seen.append(os.environ.get("_LIT_DEFECT_PARENT")))
    assert seen == [str(os.getpid())]
    assert "_LIT_DEFECT_PARENT" not in os.environ


def test_an_orphan_of_a_launch_does_not_put_the_job_back_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", scontrol(tmp_path)["PATH"])
    assert ended(Stopped(signal.SIGUSR1), {"_LIT_DEFECT_PARENT": "1", "SLURM_JOB_ID": "17"}) == 138
    assert not (tmp_path / "asked.txt").exists()


def test_processes_that_are_started_elsewhere_do_not_hide_an_error():
    """As those of ddp_spawn, which are of another kind."""
    stopping.end_all(SimpleNamespace(procs=[SimpleNamespace(pid=1)]))
    stopping.end_all(None)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    stopping.end_all(SimpleNamespace(procs=[process]), patience=0.0)
    assert process.wait() == -signal.SIGKILL


class FakeTrainer:
    """Of two processes; `reduce` gives what the other one adds."""

    world_size = 2

    def __init__(self, other: list[int]) -> None:
        self.strategy, self.global_step, self.asked, self.other = self, 0, [], other
        self.root_device = torch.device("cpu")

    def reduce(self, told, reduce_op):
        assert reduce_op == "max"
        self.asked.append((self.global_step, told.tolist()))
        return torch.maximum(told, torch.tensor(self.other, dtype=torch.int32))


def test_processes_agree_about_once_a_second(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("lit_defect.callbacks.run.time.monotonic", lambda: now[0])
    trainer, last = FakeTrainer([0, 0, 0]), LastCheckpoint()
    last._agreed_at, last._agrees_from = (0, 0.0), 0
    for step in range(1, 101):
        now[0], trainer.global_step = step / 16, step
        if step >= last._agrees_from:
            last._agree(trainer)
    assert [step for step, _ in trainer.asked] == [1, 17, 33, 49, 65, 81, 97]
    assert last._agree(FakeTrainer([1, 15, 0]), late=False) == (True, 15), "what the other process knows counts"
