"""Pseudo-anomalies for tasks that learn from labels: normal training pictures become defective ones, anew each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_defect.anomalies import PseudoAnomaly
from lit_defect.errors import UserError
from lit_defect.tasks.base import Batch
from lit_defect.transfer import sent

_PROBED = 64  # pictures whose pseudo-anomalies are looked at before the training


class Preview:
    """Some pseudo-anomalies, looked at before anything is trained on them.

    Args:
        maker: makes them.
        data: the data module, whose normal training pictures are taken.
        pixels: pictures (B, 3, H, W) of a batch -> float in [0, 1], on the device.

    Raises:
        UserError: none of them changes, or the gate rejects everything.
    """

    def __init__(self, maker: PseudoAnomaly, data: Any, pixels: Callable[[Tensor], Tensor]) -> None:
        from lit_defect.tasks.anomaly_report import first_look  # it draws: not needed without pseudo-anomalies

        samples = data.samples["train"]
        good = [position for position, sample in enumerate(samples) if sample.label == data.normal_class]
        self._positions = good[:: max(1, len(good) // _PROBED)][:_PROBED]
        self._maker, self._data, self._pixels = maker, data, pixels
        self._made = first_look(maker, self._sources())

    def write(self, folder: Path) -> None:
        """`figures/pseudo_anomalies.png` in the run folder, and what the gate discards."""
        from lit_defect.tasks.anomaly_report import write_preview

        names = [self._data.samples["train"][position].name for position in self._positions]
        write_preview(folder, self._sources(), names, self._made, self._maker)

    def _sources(self) -> Tensor:
        return self._pixels(self._data.loader("train").batch(self._positions)["image"])


def sizes_with_anomalies(counts: dict[str, int], normal: int | None, share: float) -> dict[str, int]:
    """Sizes of the two classes as a training meets them that turns this share of its pictures into defective ones.

    Raises:
        UserError: there are other classes than a good and a defective one, or no good picture.
    """
    if normal is None or len(counts) != 2:
        raise UserError(
            "model.init_args.anomaly makes defective pictures of good ones, but the classes are "
            f"{', '.join(counts)}: leave it out, or take data with a good and one defective class"
        )
    names = list(counts)
    good, defective = names[normal], names[1 - normal]
    if not counts[good]:
        raise UserError("model.init_args.anomaly makes defects of good pictures, and no good one trains: leave it out")
    changed = min(math.ceil(share * sum(counts.values())), counts[good] // 2)
    return {**counts, good: counts[good] - changed, defective: counts[defective] + changed}


def share_of(batch: Batch, normal: int, share: float) -> Tensor:
    """Rows (n,) of the normal pictures of a batch of B that are to change: B x `share`, and at most every other one.

    Drawn from torch's global generator on the CPU; so is whether a part of a picture counts as one.
    """
    good = (batch["label"].cpu() == normal).nonzero()[:, 0]
    count = min(int(share * len(batch["label"]) + float(torch.rand(()))), len(good) // 2)
    return sent(good[torch.randperm(len(good))[:count]], batch["label"].device)


def with_anomalies(images: Tensor, rows: Tensor, maker: PseudoAnomaly) -> tuple[Tensor, Tensor, Tensor]:
    """Change some pictures; one whose pseudo-anomaly is rejected stays as it is.

    Args:
        images: (B, 3, H, W) float32 in [0, 1]; stays as it is.
        rows: (n,) which are to change, at least one.
        maker: makes the pseudo-anomalies, from torch's global generator.

    Returns:
        The pictures (B, 3, H, W), the rows (m,) of those that have changed, their masks (m, H, W) bool.
    """
    made = maker.one_of_each(images[rows])
    kept = made.accepted.nonzero()[:, 0]
    rows = rows[kept]
    return images.index_copy(0, rows, made.images[kept]), rows, made.masks[kept, 0]
