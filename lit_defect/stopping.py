"""How a run ends when a scheduler, a sweep or its user wants the machine back: in good order, with its state saved.

SIGTERM asks to stop, SIGUSR1 to stop and be put back into the queue. While a model trains the signal is only noted:
`LastCheckpoint` lets the processes agree, saves and stops. At any other time nothing is lost by stopping at once.
Lightning's own handlers communicate and save within the handler, which hangs where all processes are signalled.

Exit codes: 143 for SIGTERM, 138 for SIGUSR1 (128 + signal). No torch here.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_LOST = r"^Dist|gloo|NCCL|[Cc]onnection (closed|reset)"  # what errors of torch.distributed are known by
_PARENT = "_LIT_DEFECT_PARENT"  # process id of the one that has started this one as a part of its launch
_STUCK = 2.0  # seconds in which the main thread sees a signal unless it waits in C++
# Seconds that are left to a run that stops, most of them for W&B's upload; a job is put back while there is time.
_LEFT = {signal.SIGTERM: 330.0, signal.SIGUSR1: 120.0}
_PATIENCE = 10.0  # seconds in which the other processes of a run that ends early have to end by themselves


class Stopped(SystemExit):
    """The run stops because of a signal; the exit code says which.

    Args:
        number: of the signal.
        follows: whether this is not the run's first process, which all have agreed to stop with.
    """

    def __init__(self, number: int, follows: bool = False) -> None:
        super().__init__(128 + number)
        self.number = number
        self.follows = follows

    @property
    def preempted(self) -> bool:
        """Whether the run is to go on as soon as the machine is free again."""
        return self.number == signal.SIGUSR1


class StopRequest:
    """Whether this process was told to stop; there is one, `STOP`, as handlers belong to the process.

    Attributes:
        number: the signal that was noted; None for none.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._deferred = False
        self._ends_at = math.inf
        self._owner = 0
        self._tells = -1
        self._launcher: Any = None
        self._former: dict[int, Any] = {}

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """Handle the signals in here; outside the main thread, where that is impossible, they stay as they are.

        Raises:
            SystemExit: the run was stopped; what is left to do then (`ended`) is done.
        """
        if self._former or threading.current_thread() is not threading.main_thread():
            yield
            return
        told, self._tells = os.pipe()
        over = threading.Event()
        os.set_blocking(self._tells, False)
        self._forget()
        self._owner = os.getpid()
        self._former = {number: signal.signal(number, self._handle) for number in SIGNALS}
        waker = signal.set_wakeup_fd(self._tells, warn_on_full_buffer=False)
        watcher = threading.Thread(target=self._watch, args=(told, over), daemon=True)
        watcher.start()
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # see `take_over`
            yield
        except BaseException as error:
            if (stop := self._behind(error)) is None:
                raise
            signal.set_wakeup_fd(waker)  # first: the watcher closes its end, and `ended` starts a program (SIGCHLD)
            over.set()
            self.number, self._deferred = stop.number, True
            raise SystemExit(ended(stop)) from None
        finally:
            self._deferred = True  # it is too late to stop
            signal.set_wakeup_fd(waker)
            over.set()
            self._wake(0)  # a forked process may hold the pipe open
            os.close(self._tells)
            watcher.join(_STUCK)
            for number, handler in self._former.items():
                signal.signal(number, handler)
            self._former = {}
            self._forget()

    def _behind(self, error: BaseException) -> Stopped | None:
        """The stop that an exception is or follows from; None for others.

        Libraries that are stopped while they are imported end with errors of their own, as numpy with a RecursionError.
        """
        if isinstance(error, Stopped):
            return error
        return Stopped(self.number) if self.number is not None and math.isfinite(self._ends_at) else None

    def _forget(self) -> None:
        self.number, self._deferred, self._ends_at, self._launcher = None, False, math.inf, None

    def defer(self) -> None:
        """From here on only note a signal: the training asks for it.

        Raises:
            Stopped: there was one, and the exception was lost, as in a destructor.
        """
        self.at_once()
        self._deferred = True

    def at_once(self) -> None:
        """From here on stop at once.

        Raises:
            Stopped: a signal was noted meanwhile.
        """
        self._deferred = False
        if self.number is not None:
            self.stop(self.number)

    def stop(self, number: int, follows: bool = False) -> NoReturn:
        """Stop now, and end in good order in the time that is left.

        Args:
            number, follows: as in `Stopped`.

        Raises:
            Stopped: always.
        """
        self.number = number
        self._ends_at = time.monotonic() + _LEFT[signal.Signals(number)]
        if self._former:
            self._wake(number)  # where no signal has come to this process
        raise Stopped(number, follows)

    def leave(self, status: int) -> NoReturn:
        """End this process at once, and those that it has started: what it does is another's by now."""
        end_all(self._launcher, patience=0.0)
        os._exit(status)

    def explained(self, error: BaseException) -> BaseException:
        """The stop behind an error: another process was quicker, and this one has lost its connection."""
        if stop := self._behind(error):
            return stop
        lost = isinstance(error, RuntimeError) and re.search(_LOST, f"{type(error).__name__} {error}")
        return Stopped(self.number) if self.number is not None and lost else error

    def launches(self, launcher: Any) -> None:
        """The launcher's processes, if it has any, are told when this one has to end in a hurry."""
        self._launcher = launcher

    def _handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return  # a worker of a data loader, forked from here: it ends with its parent
        if self.number is not None:
            return  # an echo: schedulers and launchers tell all processes, which tell each other
        self.number = number
        if not self._deferred:
            self.stop(number)

    def _wake(self, number: int) -> None:
        with contextlib.suppress(OSError):  # full, or nobody listens any more
            os.write(self._tells, bytes([number]))

    def _watch(self, told: int, over: threading.Event) -> None:
        """End the process if the main thread does not get to see a signal, or does not get to its end after it.

        It waits in C++ then, as for processes of the launch that have stopped already, or for a server.
        """
        with open(told, "rb", buffering=0) as pipe:
            while not over.is_set() and (heard := pipe.read(1)):
                while heard[0] in SIGNALS and not over.wait(_STUCK):
                    unseen = self.number is None and not self._deferred
                    if unseen or time.monotonic() > self._ends_at:
                        end_all(self._launcher, patience=0.0, kill=False)
                        os._exit(ended(Stopped(self.number or heard[0])))


STOP = StopRequest()
# A process that is forked from here, as a worker of a data loader, must not tell `_watch` of its own signals.
os.register_at_fork(after_in_child=lambda: STOP._former and signal.set_wakeup_fd(-1))


def end_all(launcher: Any, patience: float = _PATIENCE, kill: bool = True) -> None:
    """End the processes that Lightning's launcher has started.

    Args:
        launcher: of the strategy, or None.
        patience: seconds in which they may end by themselves.
        kill: give them no further chance; otherwise they are told to end.
    """
    deadline = time.monotonic() + patience
    for process in getattr(launcher, "procs", ()):
        if isinstance(process, subprocess.Popen):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            process.kill() if kill else process.terminate()


def take_over(trainer: Any) -> None:
    """Let Lightning handle no signal, and spare each step the broadcast by which it spreads what it has heard.

    Its handlers broadcast and save within the handler: processes that are all signalled wait for each other for ever
    (Lightning-AI/pytorch-lightning#20806). The processes that it starts get no signal until they heed it: one that
    dies while it imports would take the others along.
    """
    for holder, name in (
        (getattr(trainer, "_signal_connector", None), "register_signal_handlers"),
        (trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor"),
    ):
        if hasattr(holder, name):
            setattr(holder, name, lambda: None)
    launcher = trainer.strategy.launcher
    STOP.launches(launcher)
    if hasattr(launcher, "_call_children_scripts"):
        launcher._call_children_scripts = functools.partial(_start_shielded, launcher._call_children_scripts)


def _start_shielded(start: Callable[[], None]) -> None:
    os.environ[_PARENT] = str(os.getpid())
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited
    try:
        start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        del os.environ[_PARENT]  # of these processes alone


def shield_worker(_: int = 0) -> None:
    """In a data loader's worker: end when the parent says so, not when a scheduler signals all processes of a job.

    The parent still needs the batches at hand, and would fail if a worker were gone.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_heed, args=(os.getppid(),), daemon=True).start()


def _heed(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)  # as torch's own handler does: at any other code the parent would raise an error


def ended(stop: Stopped, environ: Mapping[str, str] = os.environ) -> int:
    """What is left to do when a run has stopped: put the job back into the queue where that was asked for.

    A process that Lightning's launcher has started tells its parent, whatever it was told itself, and exits with 0:
    at any other code the launcher would kill the parent, which may still be saving. So would srun and torchrun, whose
    processes after the first leave the word to that one.

    Returns:
        The exit code.
    """
    parent = os.getppid()  # asked for once: where it dies meanwhile, the next answer is process 1
    if environ.get(_PARENT) == str(parent):
        with contextlib.suppress(ProcessLookupError):
            os.kill(parent, stop.number)
        return 0
    if stop.follows:
        # On another node nobody kills the first process for it; at 0 torchrun there would wait five minutes for that
        # node's, and then say that all went well. But srun does, while that process may still put the job back.
        node = environ.get("GROUP_RANK", environ.get("NODE_RANK", "0"))  # of torchrun, of Lightning
        return 128 + stop.number if node != "0" and not slurm_job(environ) else 0
    first = environ.get("RANK", environ.get("SLURM_PROCID", "0")) == "0"  # of torchrun, of srun
    if stop.preempted and first and _PARENT not in environ:
        requeue(environ)
    return 128 + stop.number


def requeue(environ: Mapping[str, str] = os.environ) -> None:
    """Put this SLURM job, or this task of its array, back into the queue; nothing without SLURM."""
    if not (job := slurm_job(environ)):
        return
    if shutil.which("scontrol") is None:
        print(f"warning: there is no scontrol here: put job {job} back by `scontrol requeue {job}`", file=sys.stderr)
        return
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr or done.stdout).strip()
        print(f"warning: job {job} could not be put back into the queue: {reason}", file=sys.stderr)


def slurm_job(environ: Mapping[str, str] = os.environ) -> str | None:
    """Id of the SLURM job that this process belongs to, `ARRAY_TASK` in an array; None outside of SLURM."""
    job = environ.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_JOB_ID" in environ:
        job = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ.get('SLURM_ARRAY_TASK_ID', '')}"
    return job if re.fullmatch(r"\d+(_\d+)?", job) else None
