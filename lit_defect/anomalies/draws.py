"""Uniform numbers in [0, 1) turned into what is drawn: sizes, places, shapes. All (n,), on the CPU, float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_defect.errors import UserError

KEY = "model.init_args.anomaly.init_args"


def between(u: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """Evenly in [low, high)."""
    return low + u * (high - low)


def log_between(u: Tensor, low: float, high: float) -> Tensor:
    """Evenly on a logarithmic scale: as often in [1, 2) as in [2, 4)."""
    return torch.exp(between(u, math.log(low), math.log(high)))


def whole(u: Tensor, count: Tensor | int) -> Tensor:
    """Evenly one of 0 .. count - 1, int64."""
    return (u * count).long().minimum(torch.as_tensor(count) - 1)


def rectangle(area: Tensor, aspect: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Whole height and width of rectangles, at least 1 and at most the picture's.

    Args:
        area: share of the picture.
        aspect: width over height.
        height: of the picture.
        width: of the picture.
    """
    pixels = area * (height * width)
    return (
        (pixels / aspect).sqrt().round().long().clamp(1, height),
        (pixels * aspect).sqrt().round().long().clamp(1, width),
    )


def check_range(key: str, value: tuple[float, float], low: float, high: float) -> None:
    """Refuse a range (a, b) unless low < a <= b <= high.

    Raises:
        UserError: with the key.
    """
    if not low < value[0] <= value[1] <= high:
        raise UserError(f"{KEY}.{key} = [{value[0]}, {value[1]}]: expected {low:g} < low <= high <= {high:g}")


def check_number(key: str, value: float, low: float, high: float) -> None:
    """Refuse a number outside of [low, high].

    Raises:
        UserError: with the key.
    """
    if not low <= value <= high:
        raise UserError(f"{KEY}.{key} = {value}: expected a number from {low:g} to {high:g}")
