"""Pictures for a base model that is trained on one's own normal photographs, each with the words that describe it."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_defect.anomalies import CutPasteScar, LocalPseudoAnomaly, MixedAnomaly, PerlinAnomaly, PseudoAnomaly
from lit_defect.diffusion.captions import MASK, PHOTO, edit_of, light_of
from lit_defect.errors import UserError
from lit_defect.tasks.pixels import Listed, augmented
from lit_defect.tasks.views import random_light


def arbitrary_edits() -> PseudoAnomaly:
    """Spots, scars and clouds of any tone, from a few pixels to a tenth of the picture."""
    local = LocalPseudoAnomaly(
        area=(0.001, 0.1), aspect=(0.15, 6.0), brightness=0.7, contrast=0.7, candidates=1, ssim_scope="off"
    )
    return MixedAnomaly([local, CutPasteScar(candidates=1, ssim_scope="off"), PerlinAnomaly(candidates=1)])


class Variations:
    """Makes of normal pictures plain, edited and mask pictures in random views and light.

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

    def __call__(self, images: Tensor, names: list[str]) -> tuple[Tensor, list[str]]:
        """(B, 3, H, W) in [0, 1] and what they show -> as many pictures, and a caption of each.

        Everything is drawn from torch's global generator.
        """
        (images,) = augmented([images], self.augment, None)
        images = random_light(images, self.light) if self.light else images
        seed = int(torch.randint(2**62, ()))
        kind = torch.rand(len(images))
        pictures, captions = images.clone(), []
        made = None
        if self.edited + self.masks > 0:
            made = self.anomaly(images, torch.Generator().manual_seed(seed))
        for row, name in enumerate(names):
            image = images[row].float().cpu().numpy()
            caption = f"{light_of(image)} {name}"
            opening = PHOTO
            if made is not None and kind[row] < self.edited + self.masks and bool(made.masks[row].any()):
                mask, edit = made.masks[row, 0], made.images[row]
                caption += " " + edit_of(image, edit.float().cpu().numpy(), mask.cpu().numpy())
                shows_mask = bool(kind[row] < self.masks)
                opening = MASK if shows_mask else PHOTO
                pictures[row] = mask.to(images.dtype) if shows_mask else edit
            captions.append(f"{opening} {caption}")
        return pictures, captions


def spoken(category: str) -> str:
    """A folder's name as words: `magnetic_tile` -> `magnetic tile`."""
    return category.replace("_", " ").replace("-", " ").strip() or "product"
