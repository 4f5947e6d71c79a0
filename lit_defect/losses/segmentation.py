"""Losses for masks with void pixels.

`make_mask_loss` gives, for logits z (B, C, H, W), p = softmax(z), truth y (B, H, W) and weights w_c (1 by default):

    ce          mean over the pixels of -w_y log p_y
    focal       mean over the pixels of -w_y (1 - p_y)^2 log p_y           Lin et al., ICCV 2017, eq. 4
    dice        mean over the classes, weighted by w_c, of 1 - 2 sum p_c [y = c] / (sum p_c + sum [y = c]);
                sums over all pixels of the batch                           Milletari et al., 3DV 2016, with plain sums
    ce_dice     ce + dice
    focal_dice  focal + dice

Pixels that are void (255) are in no sum and no mean and have no gradient. All are scalars in float32, under
autocast too; a batch that is all void gives 0.

Why not `segmentation_models_pytorch.losses`: its focal loss is one of sigmoids, class against rest, so that the
softmax of the logits, from which a refiner samples labels, is not what was trained, and it is nan for an all-void
batch; its soft cross-entropy counts void pixels in the mean; its Dice loss counts classes that the batch lacks as
solved, so that with 21 classes its size follows how many are in the batch. Here the mean is over those it has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lit_defect.errors import UserError

VOID = 255
GAMMA = 2.0  # of the focal loss: the paper's

MASK_LOSSES = ("ce", "dice", "focal", "ce_dice", "focal_dice")


def make_mask_loss(name: str, *, class_weights: Sequence[float] | None = None) -> MaskLoss:
    """The loss called `name`.

    Args:
        name: ce, dice, focal, ce_dice or focal_dice.
        class_weights: (C,) weight of each class, none negative; null for 1 each. They are not brought to a mean of 1.

    Raises:
        UserError: unknown name, or weights that are not finite, negative or all zero.
    """
    if name not in MASK_LOSSES:
        raise UserError(f"model.init_args.loss = {name!r}: expected one of {', '.join(MASK_LOSSES)}")
    if class_weights is not None:
        weights = list(class_weights)
        if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
            raise UserError(
                f"model.init_args.class_weights = {weights}: expected a number >= 0 for each class, not all 0"
            )
    return MaskLoss(name.split("_"), class_weights)


class MaskLoss(nn.Module):
    """The sum of some of ce, focal and dice; see the top of the file.

    Args:
        terms: names of the terms.
        class_weights: (C,) or None.
    """

    weight: Tensor | None

    def __init__(self, terms: Sequence[str], class_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.terms = tuple(terms)
        weight = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("weight", weight, persistent=False)  # an option, no part of what was learned

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Logits (B, C, H, W), target (B, H, W) int64 in 0..C-1 or 255 -> scalar float32.

        Raises:
            UserError: other than C class weights.
            ValueError: the shapes do not match.
        """
        if logits.ndim != 4 or target.shape != (len(logits), *logits.shape[2:]):
            shapes = f"logits {tuple(logits.shape)} and target {tuple(target.shape)}"
            raise ValueError(f"{shapes}: expected (B, C, H, W) and (B, H, W)")
        logits = logits.float()
        classes = logits.shape[1]
        weight = logits.new_ones(classes) if self.weight is None else self.weight.to(logits.device)
        if len(weight) != classes:
            raise UserError(
                f"model.init_args.class_weights: {len(weight)} given, but the masks have {classes} classes, the "
                "background among them"
            )
        loss = logits.new_zeros(())
        if "ce" in self.terms or "focal" in self.terms:
            loss = loss + _pixel_loss(logits, target, weight, GAMMA if "focal" in self.terms else 0.0)
        if "dice" in self.terms:
            loss = loss + _dice_loss(logits, target, weight)
        return loss


def _pixel_loss(logits: Tensor, target: Tensor, weight: Tensor, gamma: float) -> Tensor:
    """Cross-entropy (gamma = 0) or focal loss, averaged over the pixels that count."""
    valid = target != VOID  # (B, H, W)
    loss = cross_entropy(logits, target, ignore_index=VOID, reduction="none")  # (B, H, W), 0 where void
    if gamma:
        miss = -torch.expm1(-loss)  # 1 - p_y, exact where p_y is almost 1
        loss = miss**gamma * loss
    loss = loss * weight[target.where(valid, 0)]
    return loss.sum() / valid.sum().clamp(min=1)


def _dice_loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Soft Dice loss over the batch, averaged over the classes that the batch has."""
    ids = torch.arange(logits.shape[1], device=target.device).view(1, -1, 1, 1)
    truth = target[:, None] == ids  # (B, C, H, W), false where void
    p = logits.softmax(dim=1).where((target != VOID)[:, None], 0.0)
    pixels = (0, 2, 3)
    size = truth.sum(pixels)  # (C,)
    overlap = p.where(truth, 0.0).sum(pixels)
    loss = 1 - 2 * overlap / (p.sum(pixels) + size).clamp(min=1)
    share = weight * (size > 0)
    return (share * loss).sum() / share.sum().clamp(min=torch.finfo(torch.float32).tiny)
