"""A real SLURM in a folder of this machine: two nodes of 64 processors, as far as it knows, and nothing installed.

    with Slurm(folder, packages) as slurm:
        job = slurm.submit("experiments/cluster/run.sbatch", "fit", "--config", ...)
        slurm.wait(job, "COMPLETED")

Debian's packages are unpacked below the folder, so no other program finds an `srun` (Lightning warns where it does).
The daemons are children of this process and end with it. Wants root, as slurmd does, and Debian's package index.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PACKAGES = ("munge", "libmunge2", "slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "libhwloc15")
PACKAGES += ("liblua5.1-0",)
NODES = ("node1", "node2")
ROOT = Path(__file__).parent.parent
NO_GPU = "--gres=none"  # the one option by which a script must be fitted to this machine
SECONDS = 180  # what a job may take to get somewhere; a busy machine imports torch in half a minute

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5  # a requeued job starts after 8 s instead of 2 min
PluginDir={libraries}/slurm-wlm
PlugStackConfig={folder}/plugstack.conf
SlurmctldPort={controller}
SlurmdParameters=config_overrides  # what the nodes are said to have, not what there is
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
JobRequeue=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
{nodes}
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class NoSlurmError(Exception):
    """SLURM cannot be had here, and why."""


class Slurm:
    """The cluster; a context manager.

    Args:
        folder: where everything lies, with a short path (of a socket).
        packages: folder of the downloaded packages; they are fetched where it lacks them.

    Raises:
        NoSlurmError: on entering: it cannot run here.
    """

    def __init__(self, folder: Path, packages: Path) -> None:
        self.folder = folder
        self.packages = packages
        self.root = folder / "root"
        self.libraries = self.root / "usr" / "lib" / f"{os.uname().machine}-linux-gnu"
        self.environment = {
            **os.environ,
            "PATH": os.pathsep.join(
                [str(Path(sys.executable).parent), f"{self.root}/usr/bin", f"{self.root}/usr/sbin", os.environ["PATH"]]
            ),
            "LD_LIBRARY_PATH": f"{self.libraries}:{self.libraries}/slurm-wlm",
            "PYTHONPATH": str(ROOT),
            "SLURM_CONF": f"{folder}/slurm.conf",
            "USER": "root",
            "SBATCH_OUTPUT": f"{folder}/%j.out",
            "MASTER_ADDR": "127.0.0.1",  # the nodes are called what no resolver knows
        }
        for name in ("RANK", "LOCAL_RANK", "LIT_DEFECT_RUN_ID"):
            self.environment.pop(name, None)
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Slurm:
        self._unpack()
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=socket.gethostname(),
                folder=self.folder,
                libraries=self.libraries,
                controller=_free_port(),
                nodes="\n".join(
                    f"NodeName={node} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={_free_port()} CPUs=64"
                    for node in NODES
                ),
            )
        )
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        of_munge = [f"--{kind}-file={self.folder}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
        try:
            self._start("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *of_munge)
            self._until(lambda: (self.folder / "munge.socket").exists())
            self._start("slurmctld-wlm", "-D")
            for node in NODES:
                self._start("slurmd-wlm", "-D", "-N", node, "-d", f"{self.root}/usr/sbin/slurmstepd-wlm")
            self._until(
                lambda: (
                    self.call("sinfo", "-N", "--noheader", "--format=%t", check=False).split() == ["idle"] * len(NODES)
                )
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if len(self._daemons) == 2 + len(NODES):
            self.call("scancel", "--full", "--signal=KILL", "--user=root", check=False)
            self.call("scancel", "--user=root", check=False)
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline and self.call("squeue", "--noheader", check=False).strip():
                time.sleep(0.5)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def call(self, *words: object, check: bool = True) -> str:
        """Output of one of SLURM's commands, or of another one in the cluster's environment."""
        done = subprocess.run(
            [str(word) for word in words], cwd=ROOT, env=self.environment, text=True, capture_output=True, timeout=120
        )
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, script: str, *words: object, options: Sequence[str] = ()) -> str:
        """Submit one of the shipped scripts as it is; returns the job's number."""
        return self.call("sbatch", "--parsable", NO_GPU, *options, f"experiments/cluster/{script}", *words).strip()

    def record(self, job: str) -> dict[str, str]:
        """What SLURM says of a job, or of one of an array as `1_0`."""
        text = self.call("scontrol", "show", "job", "--oneliner", job)
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def log(self, job: str) -> str:
        """What a job has written, all its starts."""
        file = Path(self.record(job)["StdOut"].replace("%j", self.record(job)["JobId"]))
        return file.read_text(errors="replace") if file.is_file() else "(no output)"

    def wait(self, job: str, state: str = "COMPLETED", seconds: float = SECONDS) -> dict[str, str]:
        """Wait until the job is in this state; returns its record. Fails with its log at any other end."""
        self.wait_for(job, lambda: self.record(job)["JobState"] == state, seconds)
        return self.record(job)

    def wait_for(self, job: str, condition: Callable[[], bool], seconds: float = SECONDS) -> None:
        """Wait until something has come true. Fails with the job's log, at once when the job has ended without it."""
        deadline = time.monotonic() + seconds
        while not condition():
            found = self.record(job)
            ended = found["JobState"] in ENDED and not condition()
            assert not ended, f"{job} has ended as {found['JobState']}, {found['ExitCode']}\n{self.log(job)}"
            assert time.monotonic() < deadline, f"{job} is still {found['JobState']}\n{self.log(job)}"
            time.sleep(0.2)

    def _unpack(self) -> None:
        if os.geteuid() != 0:
            raise NoSlurmError("SLURM's daemons want root")
        if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
            raise NoSlurmError("there is no apt-get here")
        self.packages.mkdir(parents=True, exist_ok=True)
        missing = [name for name in PACKAGES if not list(self.packages.glob(f"{name}_*.deb"))]
        if missing:
            quietly = {"cwd": self.packages, "capture_output": True, "text": True, "timeout": 300}
            subprocess.run(["apt-get", "update"], **quietly)
            done = subprocess.run(["apt-get", "download", *missing], **quietly)
            if done.returncode:
                raise NoSlurmError(f"Debian's packages cannot be fetched: {done.stderr.strip()[-500:]}")
        for name in PACKAGES:
            subprocess.run(["dpkg", "-x", next(self.packages.glob(f"{name}_*.deb")), self.root], check=True, timeout=60)

    def _start(self, program: str, *words: str) -> None:
        with (self.folder / f"{len(self._daemons)}-{program}.log").open("wb") as log:
            command = [f"{self.root}/usr/sbin/{program}", *words]
            self._daemons.append(
                subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            )

    def _until(self, condition: Callable[[], bool], seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in self._daemons):
                logs = "\n".join(f"{log.name}:\n{log.read_text()[-1500:]}" for log in self.folder.glob("*.log"))
                raise NoSlurmError(f"SLURM does not start:\n{logs}")
            time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
