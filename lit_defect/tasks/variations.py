"""Pictures for a base model that is trained on one's own normal photographs, each with the words that describe it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_defect.anomalies import CutPasteScar, LocalPseudoAnomaly, MixedAnomaly, PerlinAnomaly, PseudoAnomaly
from lit_defect.diffusion.captions import MASK, PHOTO, edit_of, light_of
from lit_defect.errors import UserError
from lit_defect.tasks.pixels import Listed, augmented
from lit_defect.tasks.views import random_light
from lit_defect.transfer import sent


def arbitrary_edits() -> PseudoAnomaly:
    """Spots, scars and clouds of any tone, from a few pixels to a tenth of the picture."""
    local = LocalPseudoAnomaly(
        area=(0.001, 0.1), aspect=(0.15, 6.0), brightness=0.7, contrast=0.7, candidates=1, ssim_scope="off"
    )
    return MixedAnomaly([local, CutPasteScar(candidates=1, ssim_scope="off"), PerlinAnomaly(candidates=1)])


class _Varied(NamedTuple):
    """Pictures with all that is known of them."""

    pictures: Tensor  # (B, 3, H, W) in [0, 1]
    views: Tensor  # (B, 3, H, W), before the edits
    rows: Tensor  # (n,) int64, the pictures with an edit
    edits: Tensor  # (n, 3, H, W)
    masks: Tensor  # (n, 1, H, W), the pixels that an edit has changed
    as_masks: Tensor  # (n,) bool, whether the picture is that mask


class Variations:
    """Makes of normal pictures plain, edited and mask pictures in random views and light.

    An edit that the gate of `anomaly` rejects is not made: its picture stays plain.

    Args:
        anomaly: makes the edits; None for `arbitrary_edits`.
        edited: share of the pictures with an edit.
        masks: share of the pictures that are the mask of an edit instead.
        augment: views that are drawn from.
        light: share by which brightness and contrast change, at most.

    Raises:
        UserError: shares out of range.
    """

    def __init__(
        self, anomaly: PseudoAnomaly | None, *, edited: float, masks: float, augment: Listed, light: float
    ) -> None:
        for key, share in (("edited", edited), ("masks", masks), ("light", light)):
            if not 0 <= share < 1:
                raise UserError(f"model.init_args.{key} = {share}: expected a share, 0 <= s < 1")
        if edited + masks > 1:
            raise UserError(f"model.init_args: edited + masks = {edited + masks:g} is more than all pictures")
        self.anomaly = anomaly or arbitrary_edits()
        self.edited = edited
        self.masks = masks
        self.augment: Listed = augment
        self.light = light

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> as many pictures.

        Everything is drawn from torch's global generator.
        """
        return self._varied(images).pictures

    def captioned(self, images: Tensor, names: list[str]) -> tuple[Tensor, list[str]]:
        """The same pictures, and a caption of each: B `names` say what they show."""
        made = self._varied(images)
        views, edits, masks = (part.float().cpu().numpy() for part in (made.views, made.edits, made.masks))
        captions = [f"{light_of(view)} {name}" for view, name in zip(views, names, strict=True)]
        openings = [PHOTO] * len(names)
        for row, edit, mask, is_mask in zip(made.rows.tolist(), edits, masks, made.as_masks.tolist(), strict=True):
            captions[row] += " " + edit_of(views[row], edit, mask[0] > 0)
            openings[row] = MASK if is_mask else PHOTO
        return made.pictures, [f"{opening} {caption}" for opening, caption in zip(openings, captions, strict=True)]

    def _varied(self, images: Tensor) -> _Varied:
        (views,) = augmented([images], self.augment, None)
        views = random_light(views, self.light) if self.light else views
        chance = torch.rand(len(views))
        rows = sent((chance < self.edited + self.masks).nonzero()[:, 0], views.device)
        if not len(rows):
            return _Varied(views, views, rows, views[:0], views[:0, :1], rows)
        made = self.anomaly.one_of_each(views[rows])
        kept = made.accepted.nonzero()[:, 0]
        rows, edits, masks = rows[kept], made.images[kept], made.masks[kept]
        as_masks = sent(chance, views.device)[rows] < self.masks
        shown = torch.where(as_masks.view(-1, 1, 1, 1), masks.to(edits.dtype), edits)
        return _Varied(views.index_copy(0, rows, shown), views, rows, edits, masks, as_masks)


def spoken(category: str) -> str:
    """A folder's name as words: `magnetic_tile` -> `magnetic tile`."""
    return category.replace("_", " ").replace("-", " ").strip() or "product"
