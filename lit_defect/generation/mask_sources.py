"""Where the masks of new defects come from: real masks changed a little and moved, or a folder of generated ones.

Masks are drawn at the size of the picture that they are for, not at that of the network: a crack stays as thin as
cracks are. One that breaks the rules of its type on that picture is drawn again, at most `TRIES` times, and the reason
is counted. If none passes, the one that comes nearest is cut to the object.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lit_defect.errors import DataError
from lit_defect.generation.files import Bools, read_mask
from lit_defect.generation.mask_rules import MaskRules, fix_to
from lit_defect.generation.mask_shapes import fit_mask, vary
from lit_defect.generation.store import find_trained_on, place

Pair = tuple[str, str]  # category, defect type
RealMasks = Mapping[Pair, Sequence[tuple[str, Bools]]]  # name and mask (H, W) of the real defects; sizes may differ

TRIES = 20
LARGEST = 1024  # pixels along the longer side that masks are drawn at; those of larger pictures are enlarged from it


@dataclass(frozen=True)
class Drawn:
    """A mask for one picture.

    Attributes:
        mask: (H, W) bool.
        source: what it was made of, in words.
        rejected: how many were drawn before, by what was wrong with them.
    """

    mask: Bools
    source: str
    rejected: Counter[str]


def rules_of(masks: RealMasks) -> dict[Pair, MaskRules]:
    """The rules of each pair that its real masks imply.

    Raises:
        DataError: an empty or full mask, or fewer than two of a pair.
    """
    _check(masks)
    return {pair: MaskRules.of([mask for _, mask in named]) for pair, named in masks.items()}


def _check(masks: RealMasks) -> None:
    for pair, named in masks.items():
        for name, mask in named:
            if not mask.any() or mask.all():
                state = "marks nothing" if not mask.any() else "marks the whole picture"
                raise DataError(f"the mask of {name} {state}; mend it, or take the picture out of the training set")
        if len(named) < 2:
            raise DataError(
                f"{'/'.join(pair)} has {len(named)} training masks; new ones need at least 2: "
                "add pictures of this type, or leave it out"
            )


class MaskSource(ABC):
    """Draws masks that keep the rules of their type.

    Args:
        rules: of each (category, defect type).

    Attributes:
        learnt_from: name and group of every picture that the masks were learnt from, as far as that is known.
    """

    def __init__(self, rules: Mapping[Pair, MaskRules]) -> None:
        self.rules = dict(rules)
        self.learnt_from: set[tuple[str, str]] = set()

    @abstractmethod
    def candidate(self, pair: Pair, rng: np.random.Generator, foreground: Bools) -> tuple[Bools, str]:
        """A mask (H, W) of the object's size that may break rules, and what it was made of."""

    def draw_for(self, name: str, pair: Pair, rng: np.random.Generator, foreground: Bools) -> Drawn:
        """As `PlacedMasks` has it: a mask of the type does for any picture."""
        return self.draw(pair, rng, foreground)

    def draw(self, pair: Pair, rng: np.random.Generator, foreground: Bools) -> Drawn:
        """A mask (H, W) for a picture whose object is `foreground` (H, W).

        The same generator state gives the same mask.

        Raises:
            DataError: the pair has no masks; or in no try any of the mask lay on the object.
        """
        whole, foreground = foreground, no_larger(foreground)
        if pair not in self.rules:
            known = ", ".join("/".join(known) for known in sorted(self.rules))
            raise DataError(f"there are no masks of {'/'.join(pair)}; there are of {known}")
        rules, rejected = self.rules[pair], Counter[str]()
        best: tuple[tuple[bool, float], Bools, str] | None = None
        for _ in range(TRIES):
            mask, source = self.candidate(pair, rng, foreground)
            fault = rules.fault(mask, foreground)
            if fault is None:
                return Drawn(fit_mask(mask, whole.shape), source, rejected)
            rejected[fault] += 1
            fixed = fix_to(mask, foreground)
            merit = (rules.fault(fixed, foreground) is None, float(fixed.sum()) / max(1, int(mask.sum())))
            if fixed.any() and (best is None or merit > best[0]):
                best = merit, fixed, f"{source}, cut to the object"
        if best is None:
            told = ", ".join(f"{times} {reason}" for reason, times in rejected.most_common())
            raise DataError(
                f"no mask of {'/'.join(pair)} lies on the object ({TRIES} tries: {told}); look at the object's mask, "
                "or set the option foreground to all"
            )
        return Drawn(fit_mask(best[1], whole.shape), best[2], rejected)


class AugmentedMasks(MaskSource):
    """Masks of real defects: flipped, turned, scaled, bent and moved to a random place of the object.

    One that touches an edge of its picture goes to that edge again (the other one when flipped): a broken rim stays
    a broken rim.

    Args:
        masks: of the real defects.
        rules: of each pair.

    Raises:
        DataError: an empty or full mask, or fewer than two of a pair.
    """

    def __init__(self, masks: RealMasks, rules: Mapping[Pair, MaskRules]) -> None:
        _check(masks)
        super().__init__({pair: rules[pair] for pair in masks})
        self._masks = {pair: list(named) for pair, named in masks.items()}

    def candidate(self, pair: Pair, rng: np.random.Generator, foreground: Bools) -> tuple[Bools, str]:
        named = self._masks[pair]
        name, real = named[int(rng.integers(len(named)))]
        shape, edges = vary(real, foreground.shape, rng)
        top, left = _corner(shape, edges, foreground, rng)
        mask = np.zeros_like(foreground)
        mask[top : top + shape.shape[0], left : left + shape.shape[1]] = shape
        return mask, f"augmented {name}"


class MaskFolder(MaskSource):
    """Masks as they lie in `<folder>/<category>/<defect type>/*.png`, not 0 on the defect; any size.

    Args:
        folder: of the masks, such as `MaskDiffusion` writes.
        rules: of each pair that is asked for.

    Raises:
        DataError: a pair has no files there, or the list of what they were learnt from is damaged.
    """

    def __init__(self, folder: Path, rules: Mapping[Pair, MaskRules]) -> None:
        super().__init__(rules)
        self.learnt_from = find_trained_on(folder)
        homes = {pair: Path(folder, place(*pair)) for pair in rules}
        self._files = {pair: sorted(home.glob("*.png")) for pair, home in homes.items()}
        for pair, files in self._files.items():
            if not files:
                raise DataError(
                    f"{homes[pair]} has no masks (*.png); generate masks of {'/'.join(pair)} first, or take "
                    "augmented real masks"
                )

    def candidate(self, pair: Pair, rng: np.random.Generator, foreground: Bools) -> tuple[Bools, str]:
        files = self._files[pair]
        path = files[int(rng.integers(len(files)))]
        mask = read_mask(path)
        return fit_mask(mask, foreground.shape), path.name


def no_larger(mask: Bools) -> Bools:
    """A mask (H, W) made smaller if it is larger than `LARGEST`: of the size that rules are looked at."""
    share = LARGEST / max(mask.shape)
    height, width = (max(1, round(share * side)) for side in mask.shape)
    return fit_mask(mask, (height, width)) if share < 1 else mask


def _corner(shape: Bools, edges: Bools, foreground: Bools, rng: np.random.Generator) -> tuple[int, int]:
    """Top and left of a shape (h, w) in a picture (H, W): its box within the frame, its middle on the object if it can.

    Args:
        edges: (2, 2) edges that it has to touch: top and bottom, left and right; two opposite ones: in the middle.
    """
    rooms = [full - side for full, side in zip(foreground.shape, shape.shape, strict=True)]
    half = [side // 2 for side in shape.shape]
    middles = foreground[half[0] : half[0] + rooms[0] + 1, half[1] : half[1] + rooms[1] + 1]
    places = np.argwhere(middles if middles.any() else np.ones_like(middles))
    corner = [int(start) for start in places[int(rng.integers(len(places)))]]
    for axis, (first, last) in enumerate(edges):
        if first or last:
            corner[axis] = rooms[axis] // 2 if first and last else 0 if first else rooms[axis]
    return corner[0], corner[1]
