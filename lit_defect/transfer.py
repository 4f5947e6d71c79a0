"""Tensors on their way to an accelerator."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, or the tensor itself where it lies there already; a GPU is not waited for.

    A plain `.to` first waits until CUDA has done all it was asked, so that it has nothing to do while the next kernels
    are launched. From memory that is not pinned the asynchronous copy has read everything when it returns; in pinned
    memory the tensor must not change afterwards. MPS has no safe copy of this kind.
    """
    return tensor.to(device, non_blocking=device.type not in ("cpu", "mps"))
