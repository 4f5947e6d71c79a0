"""Pixel figures of a whole split, and of each kind of defect against the good pictures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from lit_defect.metrics.localization import BinnedPixelMetrics, PixelMetrics

METRICS = {"exact": PixelMetrics, "binned": BinnedPixelMetrics}


class PixelsByKind:
    """Takes in pictures, each of one kind, and gives the figures of all, and of each kind beside the good ones.

    The pixels of a picture are held once, whatever they count for.

    Args:
        how: all scores are kept (`exact`), or counted in bins (`binned`).
        kinds: of the pictures to come, the same on all processes; the empty one is that of good pictures.
        device: where the counting is done.
    """

    def __init__(self, how: Literal["exact", "binned"], kinds: Iterable[str], device: torch.device) -> None:
        self._make = METRICS[how]
        self._parts = {kind: self._make().to(device) for kind in sorted(kinds)}  # one order on all processes
        self._device = device

    def update(self, kind: str, scores: Tensor, mask: Tensor) -> None:
        """Take in the map and the mask (H, W) of a picture."""
        self._parts[kind].update(scores[None], mask[None])

    def figures(self) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """Of all pictures of all processes; and by kind, against the pixels of good pictures and its own normal ones.

        A figure is nan where it is not defined.
        """
        whole = self._figures_of(list(self._parts))
        defects = [kind for kind in self._parts if kind]
        if len(defects) == 1:
            return whole, {defects[0]: whole}
        return whole, {kind: self._figures_of([kind, ""]) for kind in defects}

    def _figures_of(self, kinds: list[str]) -> dict[str, float]:
        joined = self._make().to(self._device)
        joined.update([], [])  # torchmetrics warns of what has seen no update, and merging is none
        for kind in kinds:
            if kind in self._parts:
                joined.merge_state(self._parts[kind])
        return {name: float(value) for name, value in joined.compute().items()}
