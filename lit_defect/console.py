"""What the command line says: errors, news, warnings; and what it leaves unsaid."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from rich.console import Console


def fail(message: str) -> int:
    """Print an error that the user can mend; returns the exit code."""
    Console(stderr=True, highlight=False, soft_wrap=True).print("error:", style="bold red", end=" ")
    print(message, file=sys.stderr)
    return 2


@rank_zero_only
def say(message: str) -> None:
    """Print a line, once for all processes of a launch."""
    print(message, flush=True)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning as a reader wants it: what it says, not which line of whose code said it."""
    print(f"warning: {message}", file=sys.stderr)


def quiet() -> None:
    """Silence what is no news to anybody: device banners, advertisements, worker advice for cached data."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    warnings.showwarning = _show_warning
    for message in (
        r".*Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided.*",
        r".*does not have many workers which may be a bottleneck.*",
        r".*The number of training batches .* is smaller than the logging interval.*",
        r".*Checkpoint directory .* exists and is not empty.*",
        r".*is not currently supported for.*_pin_memory.*",
        r".*Found .* module\(s\) in eval mode at the start of training.*",
        r".*`LightningModule.configure_optimizers` returned `None`.*",  # as a task does that trains nothing
        r".*Total length of `list` across ranks is zero.*",  # no validation split
        r".*LeafSpec.*is deprecated.*",
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
        r".*'pin_memory' argument is set as true but no accelerator is found.*",
    ):
        warnings.filterwarnings("ignore", message=message)
