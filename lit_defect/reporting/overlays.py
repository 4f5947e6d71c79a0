"""A picture with what is to be laid over it: masks by name, and a map. For those who show them, such as W&B."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lit_defect.reporting.maps import Map, Scale
from lit_defect.reporting.sheets import Picture

Mask = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Overlay:
    """One sample.

    Attributes:
        name: of the sample.
        picture: (H, W, 3) uint8.
        masks: class ids (H, W) by name, `ground_truth` first where it is known.
        class_names: by class id.
        heat: scores (H, W), or None.
        scale: the scores' range, where they have one.
        threshold: on a pixel's score, where there is one.
    """

    name: str
    picture: Picture
    masks: Mapping[str, Mask] = field(default_factory=dict)
    class_names: Mapping[int, str] = field(default_factory=dict)
    heat: Map | None = None
    scale: Scale | None = None
    threshold: float | None = None


def within(overlay: Overlay, least: int, most: int) -> Overlay:
    """The same with its longer side between `least` and `most` pixels; a tiny picture is enlarged by a whole number."""
    height, width = overlay.picture.shape[:2]
    side = max(height, width)
    factor = float(-(-least // side)) if side < least else min(1.0, most / side)
    if factor == 1:
        return overlay
    size = max(1, round(width * factor)), max(1, round(height * factor))

    def scaled(pixels: Any, method: Image.Resampling) -> Any:
        return np.asarray(Image.fromarray(pixels).resize(size, method))

    near = Image.Resampling.NEAREST
    return replace(
        overlay,
        picture=scaled(np.ascontiguousarray(overlay.picture), near if factor > 1 else Image.Resampling.LANCZOS),
        masks={name: scaled(np.ascontiguousarray(mask, np.uint8), near) for name, mask in overlay.masks.items()},
        heat=None
        if overlay.heat is None
        else scaled(np.ascontiguousarray(overlay.heat, np.float32), Image.Resampling.BILINEAR),
    )


def fixed_positions(samples: Sequence[Any], normal_class: int | None, count: int) -> list[int]:
    """Positions of the same few samples at every call: defects, the types in turn, one picture of a part.

    Args:
        samples: of a split, with `name`, `label`, `defect_type` and `group`.
        normal_class: label of good samples, which are taken only where there are no others.
        count: at most so many.
    """
    order = sorted(range(len(samples)), key=lambda place: samples[place].name)
    defects = [place for place in order if samples[place].label != normal_class] or order
    first_of_part = {samples[place].group or samples[place].name: place for place in reversed(defects)}.values()
    by_type: dict[str, list[int]] = {}
    for place in sorted(first_of_part, key=lambda place: samples[place].name):
        by_type.setdefault(samples[place].defect_type, []).append(place)
    turns: Iterable[Any] = zip_longest(*(by_type[kind] for kind in sorted(by_type)))
    return [place for turn in turns for place in turn if place is not None][:count]
