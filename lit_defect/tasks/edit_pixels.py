"""Pixels of an edit between the network's frame and the whole picture."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from lit_defect.generation.files import Bools, Picture
from lit_defect.generation.judgement import Outside
from lit_defect.tasks.edit_inputs import Ready


def wider(box: tuple[slice, slice], shape: tuple[int, ...]) -> tuple[slice, slice]:
    """A box with a pixel more on each side where the picture goes on."""
    rows, columns = (slice(max(0, s.start - 1), min(side, s.stop + 1)) for s, side in zip(box, shape, strict=True))
    return rows, columns


def of_whole(found: Outside, part: Bools, whole: Bools) -> Outside:
    """What was measured outside a mask in a part of a picture, the rest of which is as it was."""
    share = float((~part).sum()) / max(1, int((~whole).sum()))
    return Outside(found.mean * share, found.most, found.share * share)


def within(one: Ready, part: Any) -> Any:
    """The source with another part in its frame's box, (H, W, 3) in [0, 1]."""
    whole = one.picture / np.float32(255)
    whole[one.frame.box] = part
    return whole


def to_bytes(picture: Any) -> Picture:
    """(H, W, 3) in [0, 1] -> uint8."""
    return np.asarray(np.rint(255 * picture.clip(0, 1)), dtype=np.uint8)


def plain(picture: Tensor) -> Any:
    """(3, h, w) of the network -> (h, w, 3) float32 in [0, 1] on the CPU."""
    return picture.float().clamp(0, 1).permute(1, 2, 0).cpu().numpy()
