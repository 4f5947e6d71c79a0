"""Does the uncertainty of a segmentation know where it is wrong?

For each image: the AUROC of the uncertainty as a detector of wrong pixels; the share of the wrong pixels that a look at
the 10 % most uncertain ones would find; and the sparsification curve (Ilg et al., ECCV 2018): the error that remains
when more and more of the most uncertain pixels are left out, beside that of an oracle which leaves out wrong ones
first. The area between the two (AUSE) is 0 for an uncertainty that ranks every wrong pixel above every right one.

Pixels of equal uncertainty are taken in expectation over their orders, so that an uncertainty of few levels, such as
the variance of four samples, is treated fairly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from lit_defect.errors import UserError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Agreement:
    """`auroc` of the uncertainty for wrong pixels; `found`, the share of them among the most uncertain ones."""

    auroc: float
    found: float


@dataclass(frozen=True, slots=True)
class Sparsification:
    """Share of wrong pixels among those that remain, over the share left out; all nan where no pixel counts."""

    share: Floats
    """(P,) left out, from 0."""
    error: Floats
    """(P,) when the most uncertain pixels are left out."""
    oracle: Floats
    """(P,) when wrong pixels are left out first."""

    @property
    def random(self) -> float:
        """What remains when pixels are left out at random: the error itself, whatever the share."""
        return float(self.error[0])

    @property
    def ause(self) -> float:
        """Area between the curve and the oracle's, by trapezoids; not divided by the error."""
        return float(np.trapezoid(self.error - self.oracle, self.share))

    @staticmethod
    def mean(curves: Sequence[Sparsification]) -> Sparsification:
        """Mean curve of images, each counting the same; images without a pixel that counts are left out."""
        known = [curve for curve in curves if math.isfinite(curve.random)]
        if not known:
            raise ValueError("no image with a pixel that counts")
        return Sparsification(
            known[0].share,
            np.mean([curve.error for curve in known], axis=0),
            np.mean([curve.oracle for curve in known], axis=0),
        )


def error_agreement(uncertainty: ArrayLike, wrong: ArrayLike, valid: ArrayLike, *, share: float = 0.1) -> Agreement:
    """AUROC and find rate of one image; both nan where no pixel is wrong, or every one.

    Args:
        uncertainty: (H, W), higher means less sure.
        wrong: (H, W) booleans.
        valid: (H, W) booleans: pixels that count (not void).
        share: of the valid pixels that are looked at.

    Raises:
        ValueError: shapes do not fit.
        UserError: nan among the uncertainties that count.
    """
    values, failed = _checked(uncertainty, wrong, valid)
    errors = int(failed.sum())
    if errors in (0, len(failed)):
        return Agreement(math.nan, math.nan)
    rank_sum = float(stats.rankdata(values)[failed].sum())
    auroc = (rank_sum - errors * (errors + 1) / 2) / (errors * (len(failed) - errors))
    found = _found(values, failed, np.array([share * len(failed)]))
    return Agreement(auroc, float(found[0]) / errors)


def sparsification(uncertainty: ArrayLike, wrong: ArrayLike, valid: ArrayLike, *, steps: int = 100) -> Sparsification:
    """Sparsification curve of one image, at 0, 1/steps, ... (steps - 1)/steps left out; arguments as above."""
    values, failed = _checked(uncertainty, wrong, valid)
    share = np.arange(steps) / steps
    if not len(failed):
        nothing = np.full(steps, np.nan)
        return Sparsification(share, nothing, nothing)
    errors, left_out = int(failed.sum()), share * len(failed)
    remaining = len(failed) - left_out
    return Sparsification(
        share,
        (errors - _found(values, failed, left_out)) / remaining,
        np.maximum(errors - left_out, 0) / remaining,
    )


def _found(values: Floats, failed: Bools, counts: Floats) -> Floats:
    """Expected number of wrong pixels among the `counts` most uncertain ones; ties and parts of pixels shared."""
    _, level = np.unique(-values, return_inverse=True)
    pixels = np.concatenate([[0], np.cumsum(np.bincount(level))])
    errors = np.concatenate([[0], np.cumsum(np.bincount(level, weights=failed))])
    return np.interp(counts, pixels, errors)


def _checked(uncertainty: ArrayLike, wrong: ArrayLike, valid: ArrayLike) -> tuple[Floats, Bools]:
    """Uncertainty and failure of the pixels that count, (n,) each."""
    values = np.asarray(uncertainty, dtype=np.float64)
    failed, counted = np.asarray(wrong).astype(bool), np.asarray(valid).astype(bool)
    if values.ndim != 2 or not values.shape == failed.shape == counted.shape:
        raise ValueError(
            "expected uncertainty, wrong and valid (H, W), alike in shape, "
            f"not {values.shape}, {failed.shape} and {counted.shape}"
        )
    values, failed = values[counted], failed[counted]
    if np.isnan(values).any():
        raise UserError(
            "the uncertainty map contains nan: the training diverged, or values overflowed in half precision "
            "(trainer.precision: 32-true)"
        )
    return values, failed
