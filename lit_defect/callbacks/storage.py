"""Checkpoint files that are whole at every moment, also when the process is killed or the disk is full."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy


class WholeFiles(TorchCheckpointIO):
    """Writes beside the target and renames.

    Lightning writes to the system's temporary folder and moves the file from there, which is a copy where
    that folder is another file system: a process killed meanwhile leaves half a checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to `path`; an older file there stays as it is until the new one is on disk."""
        if "://" in str(path):  # not a local file
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def keep_files_whole(trainer: Trainer) -> None:
    """Let the trainer write its checkpoints by `WholeFiles`, unless its strategy or the user has another way."""
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy | SingleDeviceStrategy) and type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = WholeFiles()
