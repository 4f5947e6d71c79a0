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

_AROUND = 242  # grey level
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


def framed(overlay: Overlay, side: int) -> Overlay:
    """The same, scaled into the middle of a square of `side` pixels; around it is grey, and nothing is marked."""
    height, width = overlay.picture.shape[:2]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (side - size[0]) // 2, (side - size[1]) // 2

    def placed(pixels: Any, method: Image.Resampling, around: Any) -> Any:
        canvas = np.full((side, side, *pixels.shape[2:]), around, pixels.dtype)
        scaled = Image.fromarray(np.ascontiguousarray(pixels)).resize(size, method)
        canvas[top : top + size[1], left : left + size[0]] = np.asarray(scaled)
        return canvas

    near = Image.Resampling.NEAREST
    heat = overlay.heat
    return replace(
        overlay,
        picture=placed(overlay.picture, near if scale > 2 else Image.Resampling.LANCZOS, _AROUND),
        masks={name: placed(np.asarray(mask, np.uint8), near, 0) for name, mask in overlay.masks.items()},
        heat=None if heat is None else placed(np.float32(heat), Image.Resampling.BILINEAR, np.float32(heat).min()),
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
