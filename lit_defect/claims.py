"""Who carries a trial out, or writes a folder: files that all share, which hold also where a worker is killed.

A claim is the file `<task>-<generation>.json`, which only one worker can create. The newest generation holds. Its
owner touches it every few seconds; whoever finds that the owner is dead or has given the task back creates the next
generation, which again only one can. Nothing is ever deleted or renamed, so a worker that was late in noticing takes
nothing away from the one that was first, and an owner that has slept finds that there is a newer generation.

An owner is dead when

- it is of this machine (same host, same boot, same process namespace) and its process is gone, or is the observer's
  own, which has ended its work without giving the task back, as on a full disk;
- or is a job of SLURM that has been put back into the queue since, as after its node has failed, and is the observer's;
- or its file has not changed for `DEAD_AFTER` seconds of the observer's clock: no clocks are compared.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_defect import runs
from lit_defect.stopping import STOP, slurm_job

BEAT = 20.0  # seconds between signs of life
DEAD_AFTER = 180.0  # seconds without any; network folders may show a change a minute late
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)  # what file systems without links say
_POLL = 1.0  # seconds
_working: set[str] = set()  # tokens of what this process has taken and not ended
LAUNCH = "launch"
"""Task of the launches that train into a folder, or fill it."""
LAUNCHES = ".launches"
"""Folder of their claims in it."""
_launched: list[Held] = []  # what `begin_launch` has begun and `launching` ends


@dataclass(frozen=True)
class Claim:
    """One generation of a claim, as its file tells.

    Attributes:
        task: what is claimed, such as `t0007`.
        generation: counted from 0.
        path: its file.
        token: of the owner.
        machine, pid, born: the owner's process, and when the kernel started it.
        worker: the owner for people, `host:pid`.
        job, restarts: the owner's job of SLURM, empty without, and how often that had been put back into the queue.
        deaths: how many owners of this task have died.
        released: whether the owner has given it back.
    """

    task: str
    generation: int
    path: Path
    token: str = ""
    machine: str = ""
    pid: int = 0
    born: str = ""
    worker: str = ""
    job: str = ""
    restarts: int = 0
    deaths: int = 0
    released: bool = False


class Claims:
    """The claims in a folder, seen by one worker.

    Args:
        folder: that all workers share.
        dead_after: seconds without a sign of life after which an owner on another machine is dead.
    """

    def __init__(self, folder: Path, dead_after: float = DEAD_AFTER) -> None:
        self.folder = folder
        self.dead_after = dead_after
        self._seen: dict[Path, tuple[int, int, float]] = {}  # a file's first and last change, and when that was seen

    def newest(self, of: str = "") -> dict[str, Claim]:
        """The valid claim of each task; to read few files, of those only whose names begin with `of`."""
        found: dict[str, Claim] = {}
        for path in self.folder.glob(f"{of}*-*.json"):
            task, _, generation = path.stem.rpartition("-")
            if task not in found or int(generation) > found[task].generation:
                found[task] = Claim(task, int(generation), path)
        return {task: _read(claim) for task, claim in found.items()}

    def take(self, task: str, before: Claim | None = None) -> Held | None:
        """Claim a task; None if another worker was first.

        Args:
            task: a name without slashes.
            before: the claim that was found given back or dead; None for a task that nobody has had.
        """
        generation = 0 if before is None else before.generation + 1
        deaths = 0 if before is None else before.deaths + (not before.released)
        token = secrets.token_hex(8)
        entries = {**_myself(), "token": token, "deaths": deaths, "released": False}
        path = self.folder / f"{task}-{generation}.json"
        _working.add(token)  # before another thread can see the file
        if not create(path, entries):
            _working.discard(token)
            return None
        return Held(Claim(task, generation, path, **entries))

    def is_dead(self, claim: Claim) -> bool:
        """Whether the owner of a claim that was not given back is gone, as far as can be told now."""
        if claim.machine == machine():
            ended = claim.pid == os.getpid() and claim.token not in _working
            return ended or not claim.pid or runs.process_start(claim.pid) != claim.born
        job, restarts = _job()
        return bool(job and job == claim.job and restarts > claim.restarts) or self.unchanged(claim.path)

    def is_alive(self, claim: Claim) -> bool:
        """Whether the owner has given a sign of life since the claim was first looked at, or is a process here."""
        if claim.machine == machine():
            return runs.process_start(claim.pid) == claim.born
        before = self._seen.get(claim.path)
        return before is not None and _changed(claim.path) != before[0]  # the first one that was seen

    def unchanged(self, path: Path) -> bool:
        """Whether a file has stayed the same for `dead_after` seconds of looking at it."""
        changed, now = _changed(path), time.monotonic()
        before = self._seen.get(path)
        if before is None or before[1] != changed:
            self._seen[path] = (changed if before is None else before[0], changed, now)
            return False
        return now - before[2] > self.dead_after


class Held:
    """A claim of this worker, kept alive by a thread until it ends; a context manager.

    Attributes:
        claim: what is claimed.
        on_loss: called by the thread when it finds that the task is lost.
        lost: set when another worker has taken the task over, for whom this one seemed dead.
    """

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.on_loss: Callable[[], None] = lambda: None
        self.lost = threading.Event()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)

    def __enter__(self) -> Held:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()
        _working.discard(self.claim.token)

    def is_mine(self) -> bool:
        """Whether no other worker has taken the task over; also while the folder is away and nobody can tell."""
        following = self.claim.path.with_name(f"{self.claim.task}-{self.claim.generation + 1}.json")
        with contextlib.suppress(OSError):
            if following.exists():
                self.lost.set()
        return not self.lost.is_set()

    def release(self) -> None:
        """Give the task back, to be taken up by any worker."""
        entries = json.loads(self.claim.path.read_text(encoding="utf-8"))
        runs.write_json(self.claim.path, {**entries, "released": True})

    def _live(self) -> None:
        while not self._done.wait(BEAT):
            if not self.is_mine():
                self.on_loss()
                return
            with contextlib.suppress(OSError):  # the folder may be away for a while
                os.utime(self.claim.path)


def last_launch(folder: Path, task: str = LAUNCH) -> Claim | None:
    """The last launch that has begun to write into a folder, whether it has ended or not; None if there was none.

    To be looked up before it is decided to write there; see `begin_launch`.
    """
    return Claims(folder / LAUNCHES).newest(task).get(task)


def begin_launch(folder: Path, before: Claim | None, task: str = LAUNCH) -> bool:
    """Begin to write into a folder, until `launching` ends; False if another launch has begun since `before`.

    So of several that have decided the same, seconds or minutes ago, on any machines, the first one writes. Where
    another takes over, for whom this one seems dead, as while the folder is away, this process ends.

    Args:
        folder: that is written.
        before: the last launch when it was decided to write there, see `last_launch`; `still_writes` tells whether it
            is over.
        task: what is written: launches of one task are kept apart.
    """
    for own in [held for held in _launched if before is not None and held.claim.path == before.path]:
        own.__exit__()  # this process begins anew
        _launched.remove(own)
    held = Claims(folder / LAUNCHES).take(task, before)
    if held is None:
        return False
    held.on_loss = lambda: _leave_to_the_other(folder)
    _launched.append(held.__enter__())
    return True


def _leave_to_the_other(folder: Path) -> None:
    """Nothing is saved any more: the other goes on from the last state."""
    print(f"error: {folder} was taken over by another process, for which this one seemed dead", file=sys.stderr)
    STOP.leave(1)


@contextlib.contextmanager
def launching() -> Iterator[None]:
    """What `begin_launch` begins in here ends with it; a decorator, too."""
    try:
        yield
    finally:
        while _launched:
            held = _launched.pop()
            held.__exit__()
            if held.is_mine():
                with contextlib.suppress(OSError):  # a full disk, or the folder was handed on
                    held.release()


def still_writes(launch: Claim | None) -> bool:
    """Whether a launch writes still; of one on another machine it waits for a sign of life, `DEAD_AFTER` seconds."""
    if launch is None or launch.released or (launch.machine == machine() and launch.pid == os.getpid()):
        return False
    claims, told = Claims(launch.path.parent, DEAD_AFTER), False
    while not claims.is_dead(launch):
        if claims.is_alive(launch):
            return True
        if not told:
            told = True
            print(
                f"waits for up to {DEAD_AFTER:.0f} s to see whether {launch.worker} still writes "
                f"{launch.path.parent.parent}: it has not said that it ended",
                flush=True,
            )
        time.sleep(_POLL)
    return False


def forget_launches(folder: Path) -> None:
    """Take away what tells of the launches, where the folder is complete and is handed on without it."""
    shutil.rmtree(folder / LAUNCHES, ignore_errors=True)


def create(path: Path, content: Any) -> bool:
    """Write JSON to a new file, whole from its first moment; False if there is one already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    text = json.dumps(content, indent=2) + "\n"
    try:
        temporary.write_text(text, encoding="utf-8")
        os.link(temporary, path)  # unlike a rename, it fails where there is a file; also on NFS
    except FileExistsError:  # also if our own link was made, and NFS has lost the answer and asked again
        return os.stat(temporary).st_nlink == 2
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with contextlib.suppress(FileExistsError), path.open("x", encoding="utf-8") as file:  # whole a moment later
            file.write(text)
            return True
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def machine() -> str:
    """This machine as long as process numbers mean the same: host, boot and process namespace."""
    boot = namespace = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {boot} {namespace}"


def _read(claim: Claim) -> Claim:
    try:
        entries = json.loads(claim.path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return claim  # unreadable for now: neither given back nor of this machine
    return Claim(claim.task, claim.generation, claim.path, **entries)


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _myself() -> dict[str, Any]:
    pid = os.getpid()
    job, restarts = _job()
    return {
        "machine": machine(),
        "pid": pid,
        "born": runs.process_start(pid),
        "worker": f"{socket.gethostname()}:{pid}",
        "job": job,
        "restarts": restarts,
    }


def _job() -> tuple[str, int]:
    """This process's job of SLURM, and how often it has been put back into the queue."""
    restarts = os.environ.get("SLURM_RESTART_COUNT", "")
    return slurm_job() or "", int(restarts) if restarts.isdecimal() else 0
