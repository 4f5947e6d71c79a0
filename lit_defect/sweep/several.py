"""`--workers N`: several workers of one machine, which share its threads and its GPUs out among them.

Each worker gets as many GPUs as every other, neighbours in the order of `nvidia-smi`, by CUDA_VISIBLE_DEVICES: a batch
size is often that of a device, so trials on two GPUs and trials on three could not be compared. What is left over stays
idle. Where CUDA_VISIBLE_DEVICES is set already, as SLURM does in a job, it is what is shared out, in its own words:
indices, UUIDs or names of MIG devices (of which CUDA lets a process use one). Without a GPU nothing is set.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from lit_defect.errors import UserError
from lit_defect.sweep.training import Stops, tied, without_slurm

VISIBLE = "CUDA_VISIBLE_DEVICES"
_DEVICES = Path("/dev")
_SECONDS = 60.0  # that nvidia-smi may take, which wakes sleeping GPUs one after the other


def work(devices: Sequence[Sequence[str]], words: Sequence[str]) -> int:
    """Start workers and wait for them; a stop is handed on to them.

    Args:
        devices: the GPUs of each worker; see `shares`.
        words: what follows `python -m lit_defect sweep` in their command.

    Returns:
        The exit status: 128 + signal when stopped, else the worst of theirs.
    """
    environment = {**without_slurm(os.environ), "OMP_NUM_THREADS": str(_threads(len(devices)))}
    command = tied([sys.executable, "-m", "lit_defect", "sweep", *words])
    for place, names in enumerate(devices):
        print(f"worker {place}: {'GPU ' + ', '.join(names) if names else 'no GPU'}", flush=True)
    with Stops().noted() as stops:
        workers = [
            subprocess.Popen(
                command, env={**environment, **({VISIBLE: ",".join(names)} if names else {})}, start_new_session=True
            )
            for names in devices
        ]  # fmt: skip
        handed_on = 0
        while any(worker.poll() is None for worker in workers):
            if handed_on < bool(stops.number) + stops.at_once:  # Ctrl-C again as well
                handed_on += 1
                for worker in workers:
                    worker.send_signal(stops.number)
            time.sleep(0.2)
    ends = [128 - worker.returncode if worker.returncode < 0 else worker.returncode for worker in workers]
    return stops.status if stops.number else max(ends)


def _threads(workers: int) -> int:
    """Of each worker: its share of the cores, or fewer where OMP_NUM_THREADS says so."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // workers)
    told = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(told)) if told.isdecimal() and int(told) else share


def gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them; asked without PyTorch.

    Raises:
        UserError: there are GPUs, and nvidia-smi does not tell which.
    """
    if VISIBLE in environment:
        names = [name.strip() for name in environment[VISIBLE].split(",")]
        valid = [bool(re.fullmatch(r"\d+|(GPU|MIG)-.+", name)) for name in names]
        read = names[: valid.index(False)] if False in valid else names  # CUDA reads up to the first that is none
        return list(dict.fromkeys(read))  # one that stands twice is still one
    try:
        asked = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, errors="replace", timeout=_SECONDS)
        found = asked.stdout if asked.returncode == 0 else ""
    except (OSError, subprocess.TimeoutExpired):
        found = ""
    if names := _listed(found):
        return names
    if any(_DEVICES.glob("nvidia[0-9]*")):
        raise UserError(
            f"--workers: there are GPUs, and nvidia-smi does not tell which: set {VISIBLE}, such as 0,1,2,3; "
            "empty for workers without a GPU"
        )
    return []


def _listed(text: str) -> list[str]:
    """UUIDs in what `nvidia-smi -L` says; of a GPU that is cut into MIG devices those of these."""
    found = re.findall(r"\(UUID: ((GPU|MIG)-[^)]+)\)", text)
    following = [kind for _, kind in found[1:]] + [""]  # a GPU's MIG devices stand behind it
    return [name for (name, kind), after in zip(found, following, strict=False) if (kind, after) != ("GPU", "MIG")]


def shares(names: Sequence[str], workers: int, *, share_gpus: bool = False) -> list[list[str]]:
    """The GPUs of each worker, the same number for all; empty lists where there is no GPU.

    Args:
        names: of the GPUs.
        workers: their number.
        share_gpus: whether several may use one GPU, where there are more workers than GPUs.

    Raises:
        UserError: there are more, and they may not.
    """
    if not names:
        return [[] for _ in range(workers)]
    each = len(names) // workers
    if each:
        return [list(names[place * each : (place + 1) * each]) for place in range(workers)]
    if not share_gpus:
        raise UserError(
            f"--workers {workers} with {len(names)} GPUs ({', '.join(names)}): give --workers {len(names)}, or "
            f"--share_gpus for several workers on one GPU; on the CPU: {VISIBLE}= before the command"
        )
    return [[names[place % len(names)]] for place in range(workers)]
