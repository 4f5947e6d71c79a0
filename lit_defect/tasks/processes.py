"""What several processes of one launch know together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from lit_defect.errors import UserError

T = TypeVar("T")


@contextmanager
def first_process_first(trainer: Any) -> Iterator[None]:
    """What is done in it the first process does before the others; its error is one of all, so that nobody waits.

    Raises:
        UserError: on the others, if the first has failed.
    """
    strategy, first = trainer.strategy, trainer.is_global_zero
    if not first and not strategy.broadcast(False):  # what the first has said
        raise UserError("the first process (rank 0) has stopped; its own message says why")
    try:
        yield
    except Exception:
        if first:
            strategy.broadcast(False)
        raise
    if first:
        strategy.broadcast(True)


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
