"""What two pictures differ in, made visible: signed differences around middle grey, enlarged."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from lit_defect.reporting.sheets import Picture

_NO_CHANGE = 128  # grey where nothing changed


def difference(source: Picture, result: Picture, gain: float) -> Picture:
    """`result` less `source`, both (H, W, 3), times `gain`: grey where nothing changed, brighter where it became so.

    Raises:
        ValueError: they differ in size.
    """
    if source.shape != result.shape:
        raise ValueError(f"pictures of {source.shape} and {result.shape} cannot be compared")
    return np.clip(np.rint(_NO_CHANGE + gain * (result.astype(np.float32) - source)), 0, 255).astype(np.uint8)


def gain_of(pairs: Iterable[tuple[Picture, Picture]]) -> float:
    """The power of two, 1 to 32, that brings the differences of these pairs to the whole range of grey."""
    found = [np.abs(result.astype(np.int16) - source).max(axis=2) for source, result in pairs]
    seen = np.concatenate([part[part > 0] for part in found]) if found else np.array([])
    typical = float(np.quantile(seen, 0.95)) if seen.size else 127.0
    return float(2 ** np.clip(np.floor(np.log2(127 / typical)), 0, 5))
