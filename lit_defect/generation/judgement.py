"""Which of several candidates for one picture is taken: a rule that can be said in a sentence.

A candidate is rejected if any of its figures is not a number, if nothing changed inside the mask, if most of its label
was lost because the change covers too little of it, if what is left of the label breaks a rule of its type, or if the
defect stands out from its surroundings less than nearly all real ones do; an edit also if it is black, if so much
changed that it is another picture, or if the border of its mask shows. Of the others the one most like the real
training defects is taken; of equals, as where there are none to compare with, the one whose border shows least, and of
these the first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from lit_defect.errors import UserError
from lit_defect.generation.files import Bools, Picture
from lit_defect.generation.options import KEY

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Measures:
    """What is known of a candidate.

    Attributes:
        change_inside: mean absolute change within the mask, grey levels.
        change_outside: the same outside, before the paste-back undoes it.
        covered: share of the asked mask that the repaired label keeps.
        likeness: to the real training defects, at most 0, in standard deviations; 0 for all candidates where there is
            no descriptor, or fewer than two real ones.
        mask_fault: what rule the repaired label breaks, if any.
        contrast: of the label against what is around it, grey levels; infinite where nothing is around it.
        seam: step across the mask's border, beyond that of the source, grey levels.
        black: whether the network has given nothing but black for a picture that is not.
    """

    change_inside: float
    change_outside: float
    covered: float
    likeness: float = 0.0
    mask_fault: str | None = None
    contrast: float = math.inf
    seam: float = 0.0
    black: bool = False


@dataclass(frozen=True)
class Verdict:
    """The candidate taken, if any, and why the others were rejected.

    Attributes:
        chosen: its index, or None.
        reasons: one a candidate; None for those that could have been taken.
    """

    chosen: int | None
    reasons: tuple[str | None, ...]

    @property
    def rejected(self) -> dict[str, int]:
        """How many candidates each reason spoke against, the most frequent first."""
        return dict(Counter(reason for reason in self.reasons if reason).most_common())

    @property
    def reason(self) -> str:
        """Why none was taken: the most frequent reason; empty if one was."""
        return "" if self.chosen is not None else next(iter(self.rejected), "no candidates")


@dataclass(frozen=True)
class Rule:
    """When a candidate counts as a defect.

    Attributes:
        least_change: grey levels within the mask, on average.
        least_covered: share of the asked mask.
        least_contrast: grey levels against the surroundings.

    Raises:
        UserError: a number out of range.
    """

    least_change: float
    least_covered: float
    least_contrast: float = 0.0
    key: ClassVar[str] = KEY  # what the numbers are called where the user gives them

    def __post_init__(self) -> None:
        if not 0 <= self.least_change <= 255:
            raise UserError(f"{self.key}.least_change = {self.least_change}: expected 0 to 255 grey levels")
        if not 0 <= self.least_covered <= 1:
            raise UserError(f"{self.key}.least_covered = {self.least_covered}: expected a share from 0 to 1")

    def objection(self, candidate: Measures) -> str | None:
        """Why a candidate is rejected; None if it may be taken."""
        changes = (candidate.change_inside, candidate.change_outside, candidate.covered)
        figures = (*changes, candidate.likeness, candidate.seam)
        if not all(math.isfinite(figure) for figure in figures) or math.isnan(candidate.contrast):
            return "not a number"
        if candidate.change_inside < self.least_change:
            return "nothing changed"
        if candidate.covered < self.least_covered:
            return "label mostly lost"
        if candidate.mask_fault:
            return f"mask: {candidate.mask_fault}"
        if candidate.contrast < self.least_contrast:
            return "fainter than real ones"
        return None

    def judge(self, candidates: Sequence[Measures]) -> Verdict:
        """Take the candidate most like the real defects among those that nothing speaks against."""
        reasons = tuple(self.objection(candidate) for candidate in candidates)
        fit = [index for index, reason in enumerate(reasons) if reason is None]
        chosen = max(fit, key=lambda index: _merit(candidates[index]), default=None)
        return Verdict(chosen, reasons)


@dataclass(frozen=True)
class EditRule(Rule):
    """When the edit of a picture counts.

    Attributes:
        most_change: grey levels within the mask, on average, above which it is another picture; None for no limit.
        most_seam: grey levels; None for no limit.
    """

    most_change: float | None = None
    most_seam: float | None = None
    key: ClassVar[str] = "model.init_args.edit"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.most_change is not None and not self.most_change > self.least_change:
            least = f"{self.key}.least_change = {self.least_change}"
            raise UserError(f"{self.key}.most_change = {self.most_change}: expected more than {least}")
        if self.most_seam is not None and not self.most_seam >= 0:
            raise UserError(f"{self.key}.most_seam = {self.most_seam}: expected grey levels, 0 or more")

    def objection(self, candidate: Measures) -> str | None:
        """Why a candidate is rejected; None if it may be taken."""
        if candidate.black:
            return "black"
        if reason := super().objection(candidate):
            return reason
        if self.most_change is not None and candidate.change_inside > self.most_change:
            return "another picture"
        if self.most_seam is not None and candidate.seam > self.most_seam:
            return "its border shows"
        return None


def _merit(candidate: Measures) -> tuple[float, float]:
    """Likeness first, then how little of a border shows; one smoother than the source's own has no merit."""
    return candidate.likeness, -max(0.0, candidate.seam)


def change(normal: Floats, generated: Floats, mask: Bools) -> tuple[float, float]:
    """Mean absolute change inside and outside of a mask, in grey levels; 0 where there are no such pixels.

    Args:
        normal, generated: (h, w, 3) in [0, 1].
        mask: (h, w) bool.
    """
    difference = 255 * np.abs(generated - normal).mean(axis=2)
    inside, outside = (float(difference[part].mean()) if part.any() else 0.0 for part in (mask, ~mask))
    return inside, outside


class Outside(NamedTuple):
    """What an edit did where it should have done nothing.

    Attributes:
        mean: absolute change of the pixels outside the mask, grey levels.
        most: of all their channels, grey levels.
        share: of them that changed, by half a grey level at least; 0 where there are none, as the others.
    """

    mean: float
    most: float
    share: float


def outside(source: Picture | Floats, edited: Picture | Floats, mask: Bools | None = None) -> Outside:
    """How a picture changed outside a mask; without one, how it changed at all.

    Args:
        source, edited: (H, W, 3), 0 to 255; before the paste-back, or after it.
        mask: (H, W) bool.
    """
    difference = np.abs(edited.astype(np.float64) - source)
    difference = difference.reshape(-1, difference.shape[-1]) if mask is None else difference[~mask]  # (n, 3)
    if not len(difference):
        return Outside(0.0, 0.0, 0.0)
    changed = (difference >= 0.5).any(axis=1)
    return Outside(float(difference.mean()), float(difference.max()), float(changed.mean()))


def seam(picture: Picture | Floats, mask: Bools, source: Picture | Floats) -> float:
    """The step across a mask's border beyond that which the source has there, in grey levels; 0 without a border.

    A step is the mean absolute difference between the pixels just inside and those just outside, their neighbours
    above, below, left or right.

    Args:
        picture, source: (H, W, 3), 0 to 255.
        mask: (H, W) bool.
    """
    rows, columns = mask[1:] != mask[:-1], mask[:, 1:] != mask[:, :-1]  # pairs that the border runs between
    count = int(rows.sum() + columns.sum())
    if not count:
        return 0.0
    steps = []
    for pixels in (picture, source):
        values = pixels.astype(np.float64)
        down, across = np.abs(np.diff(values, axis=0))[rows], np.abs(np.diff(values, axis=1))[columns]
        steps.append(float(down.mean(axis=1).sum() + across.mean(axis=1).sum()) / count)
    return steps[0] - steps[1]


def stands_out(picture: Picture | Floats, mask: Bools) -> float:
    """Mean inside a defect's mask minus the mean of a ring around it, in grey levels; infinite where one is empty.

    The ring begins 1 % of the picture's shorter side from the mask, a pixel at least, and is three times as wide.

    Args:
        picture: (H, W, 3), 0 to 255.
        mask: (H, W) bool.
    """
    if not mask.any():
        return math.inf
    gap = max(1, round(0.01 * min(mask.shape)))
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    box = tuple(slice(max(0, found[0] - 5 * gap), found[-1] + 5 * gap + 1) for found in (rows, columns))
    grey, mask = picture[box].mean(axis=2), mask[box]
    distance = np.asarray(ndimage.distance_transform_edt(~mask))
    ring = (distance > gap) & (distance <= 4 * gap)
    return float(grey[mask].mean() - grey[ring].mean()) if ring.any() else math.inf


def contrast_gain(real: Sequence[float], reconstructed: Sequence[float]) -> float:
    """How much contrast the autoencoder takes of the defects of a type, as the factor that gives it back, 1 to 4.

    The least-squares slope through zero of what real defects have (`stands_out`) on what their reconstructions have:
    small and thin defects lose most.
    """
    pairs = [(a, b) for a, b in zip(real, reconstructed, strict=True) if math.isfinite(a) and math.isfinite(b)]
    power = sum(b * b for _, b in pairs)
    return min(4.0, max(1.0, sum(a * b for a, b in pairs) / power)) if power else 1.0


@dataclass(frozen=True)
class Contrasts:
    """How real defects of a type stand out from their surroundings, regardless of the sign.

    Attributes:
        values: (n,) grey levels, of those that have surroundings.
        least: what a generated one stands out at least.
        most: what it stands out at most.
    """

    values: NDArray[np.float64]
    least: float
    most: float

    @classmethod
    def of(cls, real: Sequence[float], fainter: float, stronger: float) -> Contrasts:
        """Limits that a share `fainter` of the `real` defects and a share `stronger` of them break; 0 for no limit."""
        values = np.array([abs(value) for value in real if math.isfinite(value)])
        least = float(np.quantile(values, fainter)) if fainter and len(values) else 0.0
        most = float(np.quantile(values, 1 - stronger)) if stronger and len(values) else math.inf
        return cls(values, least, most)

    def one(self, rng: np.random.Generator) -> float:
        """Of a real defect within the limits, drawn at random."""
        within = self.values[(self.values >= self.least) & (self.values <= self.most)]
        return float(rng.choice(within)) if len(within) else self.most


def weakened(gain: float, plain: float, found: float, wanted: float) -> float:
    """The factor of a change, 0 to `gain`, with which a defect stands out by `wanted`.

    Contrast follows the factor linearly, but for clipped pixels.

    Args:
        gain: a larger factor.
        plain: grey levels by which the place stands out without the change.
        found: by which it does with `gain`; its sign is kept.
        wanted: regardless of the sign.
    """
    if found == plain:
        return gain
    return float(np.clip(gain * (math.copysign(wanted, found) - plain) / (found - plain), 0, gain))


def covered(asked: Bools, repaired: Bools) -> float:
    """Share of the asked mask (H, W) that the repaired label (H, W) keeps; 0 if nothing was asked for."""
    return float((asked & repaired).sum()) / max(1, int(asked.sum()))


def likeness(candidate: Floats, real: Floats) -> float:
    """Minus the distance of a candidate's descriptor to the nearest real one, in standard deviations of the real ones.

    The distance is the root mean square over the D dimensions, each in its own standard deviations. These are at least
    the 2 N-th part of their mean, all being of latents: few defects may agree in one by chance, which would then decide
    alone. Where all agree in everything, it counts in their own units.

    Args:
        candidate: (D,).
        real: (N, D), of the real training defects of the type; at least 2.

    Raises:
        ValueError: other shapes.
    """
    if real.ndim != 2 or len(real) < 2 or candidate.shape != real.shape[1:]:
        raise ValueError(f"expected descriptors (D,) and (N >= 2, D), not {candidate.shape} and {real.shape}")
    spread = real.std(axis=0)
    spread = np.maximum(spread, spread.mean() / (2 * len(real))) if spread.any() else np.ones_like(spread)
    steps = (real - candidate) / spread
    return -float(np.sqrt(np.square(steps).mean(axis=1)).min())
