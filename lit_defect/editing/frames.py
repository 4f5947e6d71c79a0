"""Which part of a picture goes through the network, at what size, and how it comes back.

Either the whole picture or, with `only_masked`, the box of the mask with some padding, as in Stable Diffusion's web
interface: a defect of 20 pixels, brought to 512, is large enough for the network to draw it. The part keeps its
aspect; what is missing from the size that the network takes is added on the right and at the bottom, mirrored, and cut
off again. Without a resize every pixel comes back bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from lit_defect.editing.options import KEY
from lit_defect.errors import UserError
from lit_defect.generation.files import Bools, Picture
from lit_defect.generation.mask_shapes import fit_mask
from lit_defect.generation.pasting import resized

Size = tuple[int, int]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Frame:
    """A part of a picture and its working size.

    Attributes:
        box: rows and columns of the picture.
        inner: (h, w) that the box is resized to.
        padded: (h, w) with what is added on the right and at the bottom; the network's.
    """

    box: tuple[slice, slice]
    inner: Size
    padded: Size

    @classmethod
    def of(
        cls,
        shape: Size,
        mask: Bools | None,
        *,
        area: Literal["whole", "only_masked"],
        padding: int,
        size: Size | None,
        multiple: int,
        stretch: bool = False,
    ) -> Frame:
        """The frame of a picture.

        Args:
            shape: (H, W) of the picture.
            mask: (H, W), None if all of the picture is edited.
            area: `whole`, or `only_masked`: the mask's box and `padding` around it, widened to the aspect of `size`
                as far as the picture goes.
            padding: pixels of the picture.
            size: (h, w) that the network gets; None for the part's own, padded to the next multiple.
            multiple: of pixels that the network takes along each side.
            stretch: whether the part fills `size` whatever its aspect.

        Raises:
            UserError: the size does not fit, or there is no mask to take the box of.
        """
        if size is not None and (wrong := [side for side in size if side < 1 or side % multiple]):
            near = [max(1, round(side / multiple)) * multiple for side in size]
            raise UserError(
                f"{KEY}.size = {list(size)}: {wrong[0]} is no multiple of {multiple}, which the network needs; the "
                f"nearest is {near}"
            )
        box = (slice(0, shape[0]), slice(0, shape[1])) if area == "whole" else _masked(shape, mask, padding, size)
        sides = (box[0].stop - box[0].start, box[1].stop - box[1].start)
        if size is None:
            return cls(box, sides, (_next(sides[0], multiple), _next(sides[1], multiple)))
        return cls(box, size if stretch else _fitted(sides, size), size)

    def cut(self, picture: Picture) -> Floats:
        """(h, w, 3) of 0 to 1 at the padded size."""
        part = resized((picture[self.box] / 255).astype(np.float32), self.inner, _all(self.inner))
        return np.pad(part.astype(np.float32), (*self._missing, (0, 0)), mode="symmetric")

    def cut_mask(self, mask: Bools) -> Bools:
        """(h, w) at the padded size; no part of it vanishes, and nothing is masked in the padding."""
        return np.pad(fit_mask(mask[self.box], self.inner), self._missing)

    def back(self, generated: Floats) -> Floats:
        """What the network made, (h, w, 3) of 0 to 1 at the padded size, at the resolution of the box."""
        sides = (self.box[0].stop - self.box[0].start, self.box[1].stop - self.box[1].start)
        inner = generated[: self.inner[0], : self.inner[1]]
        return resized(inner, sides, _all(sides)).astype(np.float32)

    @property
    def _missing(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (0, self.padded[0] - self.inner[0]), (0, self.padded[1] - self.inner[1])


def _masked(shape: Size, mask: Bools | None, padding: int, size: Size | None) -> tuple[slice, slice]:
    """The box of a mask, padded and widened.

    Raises:
        UserError: nothing is masked.
    """
    if mask is None or not mask.any():
        missing = "there is no mask" if mask is None else "a mask is empty"
        raise UserError(f"{KEY}.area = only_masked: {missing}; set {KEY}.masks to what marks a part, or area to whole")
    spans = ndimage.find_objects(mask.astype(np.uint8))[0]
    rows, columns = (
        slice(max(0, span.start - padding), min(side, span.stop + padding))
        for span, side in zip(spans, shape, strict=True)
    )
    if size is None:
        return rows, columns
    height, width = rows.stop - rows.start, columns.stop - columns.start
    return (
        _widened(rows, width * size[0] // size[1], shape[0]),
        _widened(columns, height * size[1] // size[0], shape[1]),
    )


def _widened(span: slice, length: int, side: int) -> slice:
    """A span of at least this length, or of all of the side; shifted where it would leave the picture."""
    missing = max(0, min(length, side) - (span.stop - span.start))
    first = min(max(0, span.start - missing // 2), side - (span.stop - span.start) - missing)
    return slice(first, first + (span.stop - span.start) + missing)


def _fitted(sides: Size, size: Size) -> Size:
    """The largest size of this aspect within `size`; all of it where less than a pixel of the part is missing."""
    scale = min(size[0] / sides[0], size[1] / sides[1])
    return (
        size[0] if size[0] - sides[0] * scale < scale else max(1, round(sides[0] * scale)),
        size[1] if size[1] - sides[1] * scale < scale else max(1, round(sides[1] * scale)),
    )


def _next(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple


def _all(size: Size) -> tuple[slice, slice]:
    return slice(0, size[0]), slice(0, size[1])
