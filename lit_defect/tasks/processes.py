"""What several processes of one launch know together."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


def joined(part: Tensor) -> Tensor:
    """(n, ...) of each process -> (N, ...) of all, by rank; n may differ, and no gradient passes."""
    from torchmetrics.utilities.distributed import gather_all_tensors

    return torch.cat(gather_all_tensors(part.contiguous()))


def joined_by_key(part: dict[int, T]) -> dict[int, T]:
    """What each process has under keys of its own, of any kind that pickles -> what all have, the same on each."""
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, part)
    return {key: value for found in parts for key, value in found.items()}


def joined_with_gradient(part: Tensor, dim: int) -> Tensor:
    """What every process has, of one shape, joined along `dim` by rank; gradients flow back to where it came from."""
    parts: Any = _Gather.apply(part)  # type: ignore[no-untyped-call]
    return torch.cat(parts.unbind(), dim=dim)


class _Gather(torch.autograd.Function):
    """Tensors of all processes stacked (W, ...); backwards, each gets the sum of all gradients of its own part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        parts = [
            torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(distributed.get_world_size())
        ]
        distributed.all_gather(parts, part.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total[distributed.get_rank()]
