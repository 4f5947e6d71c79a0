"""Where a run would be written, what would become of one that is there, and where it is tracked."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lit_defect.checking.findings import Findings, size
from lit_defect.errors import UserError
from lit_defect.runs import RunFolder
from lit_defect.tracking_login import logged_in, server

PROBE = 8 * 2**20  # bytes of the file that is written to see whether it can be
_PATIENCE = 5.0  # seconds that a server of W&B may take to answer


def check_run(findings: Findings, choose: Callable[[], RunFolder], folder: Path) -> bool:
    """What `fit` would do: begin a run, go on with one, or refuse; and whether it can write.

    Args:
        choose: what chooses the folder for `fit`; it raises, warns, prints and exits as that would.
        folder: of the experiment; it is as it was afterwards.

    Returns:
        whether there is a run to train.
    """
    trains = True
    with _put_back(folder):
        heard = io.StringIO()
        try:
            with findings.hearing("run folder"), contextlib.redirect_stdout(heard):
                run = choose()
        except UserError as error:
            findings.fail("run folder", str(error))
        except SystemExit:  # a finished run, which is no error
            trains = False
            findings.warn("run folder", heard.getvalue().strip(), "name another --run_id, or another configuration")
        else:
            begun = bool(run.record())
            findings.ok("run folder", heard.getvalue().strip() or f"a new run in {run.path.parent}", resumes=begun)
        with findings.noting("writable"):
            _check_writable(findings, folder)
    return trains


def _check_writable(findings: Findings, folder: Path) -> None:
    """Really write a file: a quota or a read-only file system shows only then."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=".check-", dir=folder) as file:
            file.write(bytes(PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        findings.fail(
            "writable", f"{folder} cannot be written ({error.strerror})", "choose another --runs_dir, or free space"
        )
        return
    findings.ok("writable", f"wrote and removed {size(PROBE)} in {folder}; {size(shutil.disk_usage(folder).free)} free")


@contextlib.contextmanager
def _put_back(folder: Path) -> Iterator[None]:
    """Remove the folders that come to be in here, down to `folder`."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in missing:
            with contextlib.suppress(OSError):  # not made, or somebody else has put something into it
                path.rmdir()


def check_space(findings: Findings, folder: Path, checkpoint: int, kept: int | None) -> None:
    """Whether the disk has room for the checkpoints.

    Args:
        folder: of the experiment.
        checkpoint: bytes of one.
        kept: how many there are at a time; None where all are kept.
    """
    folder = folder.absolute()
    place = next(path for path in (folder, *folder.parents) if path.exists())
    needed, free = checkpoint * (kept or 1), shutil.disk_usage(place).free
    count = "all are kept" if kept is None else f"{kept} at a time with the one being written, {size(needed)}"
    text = f"a checkpoint has {size(checkpoint)}; {count}; {size(free)} free"
    values = {"checkpoint_bytes": checkpoint, "needed_bytes": needed, "free_bytes": free}
    if needed > free:
        findings.fail("disk", f"{text} in {place}", "free space, or choose another --runs_dir", **values)
    else:
        findings.ok("disk", text, **values)


def check_tracking(findings: Findings, mode: str, logger: Any) -> None:
    """Whether W&B can be had as asked.

    Args:
        mode: of `--wandb`.
        logger: of the trainer, as asked.
    """
    if logger is False:
        findings.ok("tracking", "none: trainer.logger is false")
        return
    if logger not in (None, True):
        kinds = [type(one).__name__ for one in (logger if isinstance(logger, list) else [logger])]
        findings.ok("tracking", f"metrics.csv and {', '.join(kinds)}")
        return
    if mode == "off" or os.environ.get("WANDB_MODE") == "disabled":
        findings.ok("tracking", "metrics.csv alone: W&B is off")
        return
    key = logged_in()
    if mode == "online" and not key:
        findings.warn(
            "tracking", "W&B has no API key: the run would be kept off line", "wandb login, or set WANDB_API_KEY"
        )
    elif mode == "offline" or not key or (mode == "auto" and os.environ.get("WANDB_MODE") == "offline"):
        findings.ok("tracking", "metrics.csv and W&B off line (`wandb sync` sends it later)")
    else:
        address = server()
        if reason := _unreachable(address):
            findings.warn(
                "tracking", f"{address} does not answer ({reason}): the run would be kept off line", "--wandb offline"
            )
        else:
            findings.ok("tracking", f"metrics.csv and W&B on line: {address} answers, the key is not tried")


def _unreachable(server: str) -> str:
    """Why no connection is to be had; empty if there is one."""
    address = urlsplit(server)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=_PATIENCE).close()
    except OSError as error:
        return str(error.strerror or error)
    return ""
