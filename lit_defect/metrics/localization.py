"""Pixel figures of anomaly maps: AUPRO, AUROC, average precision and the best F1, over all pictures together.

AUPRO, the area under the per-region overlap curve, counts every defect the same, however small it is:

1. A region is a connected component (8-connectivity) of a mask. PRO at a threshold is the mean, over the regions
   of all pictures, of the share of a region's pixels whose score reaches the threshold.
2. FPR at a threshold is the share of the normal pixels, of good and of defective pictures, that reach it.
3. AUPRO is the area under PRO over FPR from 0 to a limit, divided by the limit. Between two successive thresholds,
   and at the limit, the curve is a straight line.

No loop over thresholds is needed. A defective pixel of score s adds 1 / (regions * size of its region) to PRO while
FPR rises from the share of normal pixels above s to the share of those that reach s (the two differ by ties). So
the area is a sum over the defective pixels, and all it takes is how many normal pixels lie above, and at, each of
their scores: one sort of the normal scores, values only. AUROC, average precision and F1 follow from the same counts.

    metric = PixelMetrics()                  # exact; holds 4 bytes a normal pixel, 8 a defective one
    metric = BinnedPixelMetrics(bits=20)     # 24 MB, however many pixels
    metric.update(maps, masks)               # (B, H, W) scores of any range, (B, H, W) masks
    metric.compute()                         # {"aupro": ..., "pixel_auroc": ..., ...}

Sources: Bergmann et al., Uninformed Students, CVPR 2020 (PRO, limit 0.3), and The MVTec Anomaly Detection Dataset,
IJCV 2021.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.prints import rank_zero_warn

from lit_defect.errors import UserError

FIGURES = ("aupro", "pixel_auroc", "pixel_average_precision", "pixel_f1_max")

_NEIGHBOURS = np.zeros((3, 3, 3), dtype=bool)  # of a pixel in (B, H, W): the eight around it, in its own picture
_NEIGHBOURS[1] = True


class _Steps(NamedTuple):
    """Scores that defective pixels have, one entry each; entries of equal score hold equal counts. float64, CPU."""

    above: Tensor  # (U,) normal pixels whose score is higher
    reached: Tensor  # (U,) normal pixels whose score is at least as high
    found: Tensor  # (U,) defective pixels whose score is at least as high
    pixels: Tensor  # (U,) defective pixels in this entry
    overlap: Tensor  # (U,) sum of 1 / (size of its region) over these pixels


class _PixelFigures(Metric):
    """What the exact and the binned metric share: the door, and the figures from the counts."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, *, fpr_limit: float = 0.3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < fpr_limit <= 1:
            raise UserError(f"fpr_limit = {fpr_limit}: expected a share above 0 and at most 1")
        self.fpr_limit = fpr_limit

    def update(self, maps: Tensor | Sequence[Tensor], masks: Tensor | Sequence[Tensor]) -> None:
        """Take in pictures.

        Args:
            maps: (B, H, W) scores, higher means more defective; or a sequence of (H, W) of different sizes. They
                are ranked in float32, as they are: never clamped or rescaled.
            masks: of the same shapes, bool or {0, 1}; 1 is defective.

        Raises:
            UserError: nan among the scores.
            ValueError: shapes that do not fit, or masks with other values.
        """
        for scores, mask in _checked(maps, masks, self.device):
            self._add(scores.masked_select(~mask), scores.masked_select(mask), region_sizes(mask))

    def compute(self) -> dict[str, Tensor]:
        """`aupro`, `pixel_auroc`, `pixel_average_precision`, `pixel_f1_max`: scalars, float64.

        All are nan while there is no defective pixel or no normal one. `pixel_f1_max` is the F1 of the best of
        all thresholds, chosen on these very pixels.
        """
        values = self._values()
        return {name: values[name].to(self.device) for name in FIGURES}

    def _values(self) -> dict[str, Tensor]:
        normal, steps = self._steps()
        defective = float(steps.pixels.sum())
        if not normal or not defective:
            return dict.fromkeys(FIGURES, torch.tensor(torch.nan, dtype=torch.float64))
        above, reached, found, pixels, overlap = steps
        limit = self.fpr_limit * normal
        precision = found / (found + reached)
        return {
            # The overlap adds up to the number of regions, but for rounding, which must not lead above 1.
            "aupro": (_area(above, reached, overlap, limit) / (limit * overlap.sum())).clamp(max=1),
            "pixel_auroc": _area(above, reached, pixels, normal) / (normal * defective),
            "pixel_average_precision": (pixels * precision).sum() / defective,
            "pixel_f1_max": (2 * found / (found + reached + defective)).max(),
        }

    @abstractmethod
    def _add(self, normal: Tensor, defective: Tensor, sizes: Tensor) -> None:
        """Keep what matters of (n,) and (d,) float32 scores and the (d,) sizes of the defective pixels' regions."""

    @abstractmethod
    def _steps(self) -> tuple[float, _Steps]:
        """Number of normal pixels, and what lies above each score of a defective one."""


class PixelMetrics(_PixelFigures):
    """Exact pixel figures of anomaly maps.

    The states are the scores themselves, so processes are joined exactly, by torchmetrics' own synchronisation;
    each then holds the pixels of all. `compute` needs about as much memory again. Where that is too much, use
    `BinnedPixelMetrics`.

    Args:
        fpr_limit: where the integration of PRO over FPR ends, in (0, 1].
        kwargs: of torchmetrics.Metric.

    Example:
        >>> import torch
        >>> metric = PixelMetrics()
        >>> metric.update(torch.tensor([[[0.1, 7.0, 2.0], [0.2, 0.3, 0.4]]]), torch.tensor([[[0, 1, 1], [0, 0, 0]]]))
        >>> round(metric.compute()["aupro"].item(), 6)
        1.0
    """

    normal: list[Tensor] | Tensor
    defective: list[Tensor] | Tensor
    sizes: list[Tensor] | Tensor

    def __init__(self, *, fpr_limit: float = 0.3, **kwargs: Any) -> None:
        super().__init__(fpr_limit=fpr_limit, **kwargs)
        # All float32: what torchmetrics assumes of a process that saw no picture.
        for name in ("normal", "defective", "sizes"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def _add(self, normal: Tensor, defective: Tensor, sizes: Tensor) -> None:
        for state, values in ((self.normal, normal), (self.defective, defective), (self.sizes, sizes)):
            state.append(values)  # type: ignore[union-attr]

    def _steps(self) -> tuple[float, _Steps]:
        normal = _sorted(_joined(self.normal))
        defective, order = _joined(self.defective).sort()
        total = len(normal), len(defective)
        above = total[0] - torch.searchsorted(normal, defective, right=True)
        reached = total[0] - torch.searchsorted(normal, defective)
        found = total[1] - torch.searchsorted(defective, defective)
        overlap = 1 / _joined(self.sizes)[order].cpu().double()
        above, reached, found = (count.cpu().double() for count in (above, reached, found))
        return float(total[0]), _Steps(above, reached, found, torch.ones_like(overlap), overlap)


class AUPRO(PixelMetrics):
    """The exact AUPRO alone, as a scalar: for torchmetrics collections and loggers."""

    def compute(self) -> Tensor:  # type: ignore[override]
        return self._values()["aupro"].to(self.device)


class BinnedPixelMetrics(_PixelFigures):
    """Pixel figures from histograms: memory does not grow with the pictures, and no range need be known.

    A score's bin is the leading `bits` of its float32: sign, eight bits of exponent and the first bits - 9 of the
    mantissa. So the figures are exactly those of maps whose scores are cut off after that digit, which changes a
    score by less than a share of 2^(9 - bits): for 20 bits, 0.05 %. The order of two pixels is lost only where they
    share a bin. With A_i normal pixels in higher bins than defective pixel i, B_i in higher bins or its own, s_i the
    size of its region and k = fpr_limit * normal pixels,

        |error of AUPRO| <= sum_i (min(B_i, k) - min(A_i, k)) / s_i / (k * regions)
        |error of AUROC| <= sum_i (B_i - A_i) / 2 / (normal * defective pixels)

    and F1 is never above the exact one, since its thresholds are some of the exact one's. `compute` warns when a
    bound lies above 0.001, as with scores of a large common offset: subtract it, or take more bits.

    Args:
        fpr_limit: where the integration of PRO over FPR ends, in (0, 1].
        bits: 10 to 24; the three histograms take 24 * 2^bits bytes.
        kwargs: of torchmetrics.Metric.
    """

    normal: Tensor
    defective: Tensor
    overlap: Tensor

    def __init__(self, *, fpr_limit: float = 0.3, bits: int = 20, **kwargs: Any) -> None:
        super().__init__(fpr_limit=fpr_limit, **kwargs)
        if not 10 <= bits <= 24:
            raise UserError(f"bits = {bits}: expected 10 to 24")
        self.bits = bits
        for name, dtype in (("normal", torch.int64), ("defective", torch.int64), ("overlap", torch.float64)):
            self.add_state(name, torch.zeros(2**bits, dtype=dtype), dist_reduce_fx="sum")

    def _add(self, normal: Tensor, defective: Tensor, sizes: Tensor) -> None:
        bins = 2**self.bits
        self.normal = self.normal + torch.bincount(self._bin(normal), minlength=bins)
        if len(defective):
            index = self._bin(defective)
            self.defective = self.defective + torch.bincount(index, minlength=bins)
            self.overlap = self.overlap.index_add(0, index, 1 / sizes.double())

    def _bin(self, scores: Tensor) -> Tensor:
        """(n,) float32 -> (n,) bins 0 to 2^bits - 1, in the order of the scores."""
        pattern = (scores + 0.0).view(torch.int32)  # adding 0 makes -0 a 0
        ordered = torch.where(pattern < 0, pattern ^ 0x7FFFFFFF, pattern)
        return (ordered >> (32 - self.bits)) + 2 ** (self.bits - 1)

    def _steps(self) -> tuple[float, _Steps]:
        reached = self.normal.flip(0).cumsum(0).flip(0)
        found = self.defective.flip(0).cumsum(0).flip(0)
        used = self.defective.nonzero()[:, 0]
        columns = (reached - self.normal, reached, found, self.defective, self.overlap)
        return float(reached[0]), _Steps(*(column[used].cpu().double() for column in columns))

    def _values(self) -> dict[str, Tensor]:
        values = super()._values()
        for name, bound in self._bounds().items():
            if bound > 1e-3:
                rank_zero_warn(
                    f"{name} from histograms may be wrong by up to {bound:.4f}: many scores share a bin of {self.bits} "
                    "bits, which does no harm where they are equal. Use PixelMetrics or more bits, or subtract what is "
                    "common to all scores."
                )
        return values

    def _bounds(self) -> dict[str, float]:
        """How far the areas may lie from the exact ones, whatever the order within the bins."""
        normal, (above, reached, _, pixels, overlap) = self._steps()
        defective, limit = float(pixels.sum()), self.fpr_limit * normal
        if not normal or not defective:
            return {}
        shared = reached.clamp(max=limit) - above.clamp(max=limit)
        return {
            "aupro": float(overlap @ shared / overlap.sum()) / limit,
            "pixel_auroc": float(pixels @ (reached - above)) / (2 * normal * defective),
        }


def region_sizes(masks: Tensor) -> Tensor:
    """Sizes of the connected regions (8-connectivity) of (B, H, W) bool masks.

    Returns:
        (d,) float32, for each True pixel in row-major order: the number of pixels of its region.
    """
    if not masks.any():
        return torch.zeros(0, device=masks.device)
    labels, _ = ndimage.label(masks.cpu().numpy(), structure=_NEIGHBOURS)
    region = labels[labels > 0]
    return torch.from_numpy(np.bincount(region)[region].astype(np.float32)).to(masks.device)


def _checked(
    maps: Tensor | Sequence[Tensor], masks: Tensor | Sequence[Tensor], device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Pairs of (B, H, W) float32 and bool tensors on the device; nothing is counted before all are checked."""
    if isinstance(maps, Tensor) and isinstance(masks, Tensor):
        pairs = [(maps, masks)]
    else:
        pairs = [(scores[None], mask[None]) for scores, mask in zip(maps, masks, strict=True)]
    checked = []
    for scores, mask in pairs:
        if scores.ndim != 3 or scores.shape != mask.shape:
            raise ValueError(
                "expected maps and masks (B, H, W), or sequences of (H, W), alike in shape, "
                f"not {tuple(scores.shape)} and {tuple(mask.shape)}"
            )
        defective = mask != 0
        if mask.dtype != torch.bool and not torch.equal(defective.to(mask.dtype), mask):
            raise ValueError("masks must be bool, or hold 0 and 1 only")
        scores = scores.detach().float()
        if scores.isnan().any():
            raise UserError(
                "the anomaly maps contain nan: the training diverged, or features overflowed in half precision "
                "(trainer.precision: 32-true)"
            )
        checked.append((scores.to(device), defective.to(device)))
    return checked


def _area(above: Tensor, reached: Tensor, weight: Tensor, limit: float) -> Tensor:
    """Area, over normal pixels from 0 to `limit`, of ramps that rise by `weight` from `above` to `reached`."""
    whole = limit - (above + reached) / 2
    cut = (limit - above).clamp(min=0).square() / (2 * (reached - above).clamp(min=1))
    return weight @ torch.where(reached <= limit, whole, cut)


def _joined(state: list[Tensor] | Tensor) -> Tensor:
    """A cat state is a list, empty at first, until torchmetrics has joined the processes."""
    if isinstance(state, Tensor):
        return state
    return torch.cat(state) if state else torch.zeros(0)


def _sorted(values: Tensor) -> Tensor:
    """Ascending; on the CPU in place and without the indices, which take torch most of the time and memory."""
    if values.device.type != "cpu":
        return values.sort().values
    values.numpy().sort()  # the order within a state means nothing, so it may change
    return values
