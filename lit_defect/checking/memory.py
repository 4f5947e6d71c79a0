"""What a step of training takes in memory, and a checkpoint on disk."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor


@dataclass
class Memory:
    """Bytes of one process, by what they are for.

    Attributes:
        weights: parameters and buffers.
        gradients: of what is trained.
        optimizer: its state.
        activations: kept from forward to backward for a batch; a copy for each tensor that autograd saves.
        peak: the most that was allocated on the device; 0 where that is not measured.
        device: bytes that the device has; 0 where that is not asked.
        process: the most that this process had in main memory, libraries and cached pictures with it.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    peak: int = 0
    device: int = 0
    process: int = 0

    def estimate(self, share: float = 1.0) -> int:
        """All of it, for a batch that is `share` times as large."""
        return self.weights + self.gradients + self.optimizer + int(self.activations * share)

    @contextmanager
    def counting(self, module: LightningModule) -> Iterator[None]:
        """Count what autograd saves in here, each storage once, and without the weights."""
        known = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                self.activations += storage.nbytes()
            return tensor.detach()  # the tensor itself would be part of a cycle

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def weigh(self, trainer: Trainer, module: LightningModule) -> None:
        """Look at the weights, gradients and optimizer after a step."""
        self.weights = _bytes([*module.parameters(), *module.buffers()])
        self.gradients = _bytes([p for p in module.parameters() if p.requires_grad])
        states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
        self.optimizer = _bytes([value for state in states for value in state.values() if isinstance(value, Tensor)])
        self.process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        if module.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(module.device)
            self.device = torch.cuda.get_device_properties(module.device).total_memory


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def checkpoint_bytes(trainer: Trainer) -> int:
    """How large a checkpoint is that is written now; it is written to nowhere."""
    counter = _Counter()
    former, trainer.strategy.checkpoint_io = trainer.strategy.checkpoint_io, counter
    try:
        trainer.save_checkpoint("nowhere.ckpt", weights_only=False)
    finally:
        trainer.strategy.checkpoint_io = former
    return counter.bytes


class _Counter(TorchCheckpointIO):
    """Counts the bytes of a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Count only."""
        torch.save(checkpoint, self)  # type: ignore[arg-type]

    def write(self, part: Any) -> int:
        """As a file takes bytes."""
        count = memoryview(part).nbytes
        self.bytes += count
        return count

    def flush(self) -> None:
        """As a file has it."""
