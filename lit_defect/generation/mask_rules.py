"""What a mask must be like to stand for a defect of a type: rules taken from the masks of the real ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lit_defect.generation.files import Bools

SLACK = 1.5  # how far beyond the real masks' areas a new one may go, as a factor: few masks do not show the extremes
BORDER = 1 / 3  # of a row or column at the edge that any mask may fill; the rule of AnomalyDiffusion's authors
ON_OBJECT = 0.9  # of a mask must lie on the object: the estimate of the object's outline is a few pixels off


@dataclass(frozen=True)
class MaskRules:
    """Rules for the masks of one type of defect.

    Attributes:
        least, most: area, as a share of the picture.
        border: largest share of a row or column at the picture's edge.
    """

    least: float
    most: float
    border: float

    @classmethod
    def of(cls, masks: Sequence[Bools]) -> MaskRules:
        """The rules that (H, W) real masks, of any sizes, imply: their own figures with some slack.

        Raises:
            ValueError: no masks, or an empty one.
        """
        areas = [float(mask.mean()) for mask in masks]
        if not areas or min(areas) == 0:
            raise ValueError("rules are taken from masks that mark something")
        border = max(BORDER, *(largest_border_share(mask) for mask in masks))
        return cls(min(areas) / SLACK, min(1.0, max(areas) * SLACK), border)

    def fault(self, mask: Bools, foreground: Bools) -> str | None:
        """What is wrong with a mask (H, W) on a picture whose object is `foreground` (H, W); None if nothing is.

        Small defects may cover less than a pixel of a small picture, where one pixel is not too large.
        """
        area = float(mask.mean())
        if area == 0:
            return "empty"
        if area == 1:
            return "full"
        if area < self.least:
            return "too small"
        if area > self.most and mask.sum() > 1:
            return "too large"
        if (mask & foreground).sum() < ON_OBJECT * mask.sum():
            return "off the object"
        if largest_border_share(mask) > self.border:
            return "along the border"
        return None


ANY = MaskRules(0.0, 1.0, 1.0)  # of types without real masks: neither empty nor full, and on the object


def fix_to(mask: Bools, foreground: Bools) -> Bools:
    """What of a mask lies on the object."""
    return mask & foreground


def largest_border_share(mask: Bools) -> float:
    """The largest share of the first or last row or column that a mask fills."""
    return float(max(side.mean() for side in (mask[0], mask[-1], mask[:, 0], mask[:, -1])))
