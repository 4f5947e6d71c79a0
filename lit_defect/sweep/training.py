"""One training of a trial: a process of its own, whose curve is followed and which stops are handed on to.

Exit statuses of `fit`: 0 finished; 2 something that the user must mend; 143 and 138 stopped by a signal, with its state
saved; everything else failed.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from lit_defect.runs import RunFolder, whole_rows
from lit_defect.sweep.results import Logged, curve

STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGUSR1)
MISTAKE = 2
POLL = 0.2  # seconds between looks at the process
LOOK = 1.0  # seconds between looks at its metrics
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Ends with its worker, also when that is killed, and saves its state then: two processes must not write one run folder.
# A worker that has died before the kernel was asked is noticed by the number of the parent.
_TIED = """
import ctypes, os, signal, sys
parent = int(sys.argv[1])
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != parent:
    sys.exit(143)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def tied(command: Sequence[str]) -> list[str]:
    """A command that is told to stop (SIGTERM) when this process is gone."""
    return [sys.executable, "-S", "-c", _TIED, str(os.getpid()), *command]


def without_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """For what a worker starts: it is no task of the job, which would be one process of a launch by srun, and it is the
    worker that puts its job back into the queue, when its trial is given back.
    """
    return {key: value for key, value in environment.items() if not key.startswith("SLURM_")}


class Stops:
    """Signals that were sent to this worker: noted, and handed on by whoever waits for a training.

    Attributes:
        number: the first one; 0 for none.
        at_once: whether the user has pressed Ctrl-C again and does not want to wait for a state that is saved.
    """

    def __init__(self) -> None:
        self.number = 0
        self.at_once = False

    @property
    def status(self) -> int:
        """Exit status of a worker that was stopped so."""
        return 128 + self.number

    def _note(self, number: int, _: FrameType | None) -> None:
        self.at_once |= number == self.number == signal.SIGINT
        self.number = self.number or number

    @contextlib.contextmanager
    def noted(self) -> Iterator[Stops]:
        """Within the block signals are noted in place of ending the process."""
        before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass
class Training:
    """A run of `fit` with one seed.

    Attributes:
        run: its folder.
        command: with everything that it is told.
        log: what it says goes here, behind what is there.
        metric: whose curve is followed.
        environment: in place of this process's own.
    """

    run: RunFolder
    command: Sequence[str]
    log: Path
    metric: str
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    def is_finished(self) -> bool:
        """Whether it has been trained to its end."""
        return self.run.record().get("status") == "finished"

    def is_done(self) -> bool:
        """Whether there is nothing left to do: a run is finished when it is trained, and tested only then."""
        tested = not self.metric.startswith("test/") or curve(whole_rows(self.run.path / "metrics.csv"), self.metric)
        return self.is_finished() and bool(tested)

    def carry_out(
        self,
        stops: Stops,
        follow: Callable[[list[Logged]], bool] = lambda _: False,
        is_mine: Callable[[], bool] = lambda: True,
    ) -> tuple[int, bool]:
        """Run it to its end, or until it is to be stopped.

        Args:
            stops: of this worker; what it notes is handed on to the training, SIGINT as SIGTERM.
            follow: given the curve whenever it has changed; True stops the training for good.
            is_mine: whether the trial is still this worker's; if not, the training is killed, since another writes.

        Returns:
            The exit status, and whether `follow` has stopped it.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"\n$ {shlex.join(self.command)}\n")
            file.flush()
            process = subprocess.Popen(
                tied(self.command), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True, env=without_slurm(self.environment),
            )  # fmt: skip
        try:
            return self._wait(process, stops, follow, is_mine)
        except BaseException:
            process.terminate()
            process.wait()
            raise

    def _wait(
        self, process: subprocess.Popen[Any], stops: Stops, follow: Callable[..., bool], is_mine: Callable[[], bool]
    ) -> tuple[int, bool]:
        file = self.run.path / "metrics.csv"
        looked, changed, known, handed_on, given_up = 0.0, None, 0, False, False
        while True:
            ended = process.poll()
            if stops.number and not handed_on and ended is None:
                handed_on = True
                process.send_signal(signal.SIGTERM if stops.number == signal.SIGINT else stops.number)
                again = "; Ctrl-C again: at once" if stops.number == signal.SIGINT else ""
                print(f"stopping: the training saves its state{again}", flush=True)
            if stops.at_once and ended is None:
                os.killpg(process.pid, signal.SIGKILL)
            now = time.monotonic()
            if ended is not None or now - looked > LOOK:
                looked = now
                if not is_mine() and ended is None:
                    os.killpg(process.pid, signal.SIGKILL)
                state = _state(file)
                if not given_up and state != changed:
                    changed = state
                    values = curve(whole_rows(file), self.metric)
                    if len(values) != known and (known := len(values)) and follow(values) and ended is None:
                        given_up = True
                        process.terminate()
            if ended is not None:
                return (128 - ended if ended < 0 else ended), given_up
            time.sleep(POLL)


def _state(file: Path) -> tuple[int, int] | None:
    """Changes with every write."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
