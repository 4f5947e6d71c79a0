"""Masks of the pictures that are edited: drawn by hand, boxes, the pictures' own, or blobs at random places.

A `MaskSource`, whose masks are of a type of defect and do for any picture, is one of these, too: all answer `draw_for`.
"""

from __future__ import annotations

import csv
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from scipy import ndimage

from lit_defect.errors import DataError
from lit_defect.generation.files import Bools, mask_file, read_grey
from lit_defect.generation.mask_rules import ANY, MaskRules
from lit_defect.generation.mask_shapes import BEND, KNOTS, fit_mask
from lit_defect.generation.mask_sources import Drawn, MaskFolder, Pair, no_larger

COLUMNS = ("path", "x", "y", "width", "height")
LONGEST = 3.0  # times as long as wide is the ellipse that a blob is bent from, at most


class PlacedMasks(Protocol):
    """Where the masks of an editing come from.

    Attributes:
        learnt_from: name and group of every picture that the masks were learnt from, as far as that is known.
    """

    learnt_from: set[tuple[str, str]]

    def draw_for(self, name: str, pair: Pair, rng: np.random.Generator, foreground: Bools) -> Drawn:
        """The mask of one picture; the same generator state gives the same mask.

        Args:
            name: of the picture in its data set.
            pair: category and type of what is to come out.
            rng: the randomness, if there is any.
            foreground: (H, W), where its object is.

        Raises:
            DataError: there is none for it, or it does not fit.
        """


class OwnMasks:
    """What the picture's own mask marks.

    Args:
        mask_of: gives it by the picture's name, (H, W), or None.
    """

    def __init__(self, mask_of: Callable[[str], Bools | None]) -> None:
        self.learnt_from: set[tuple[str, str]] = set()
        self._mask_of = mask_of

    def draw_for(self, name: str, pair: Pair, rng: np.random.Generator, foreground: Bools) -> Drawn:
        mask = self._mask_of(name)
        if mask is None or not mask.any():
            raise DataError(f"{name} has no mask of its own: edit types of defects, or draw masks another way")
        return Drawn(mask, "own", Counter())


class DrawnMasks:
    """A file for each picture, drawn by hand: 0 outside, another value inside.

    Args:
        folder: of PNG files, named as the pictures are in their data set (`files.mask_file`).
        threshold: grey value from which on a pixel is inside; None refuses files of more than these two values, such as
            blurred ones.

    Raises:
        DataError: there is no such folder.
    """

    def __init__(self, folder: Path, threshold: int | None = None) -> None:
        self.learnt_from: set[tuple[str, str]] = set()
        self.folder, self.threshold = Path(folder), threshold
        if not self.folder.is_dir():
            raise DataError(f"{folder} is no folder of masks")

    def draw_for(self, name: str, pair: Pair, rng: np.random.Generator, foreground: Bools) -> Drawn:
        path = mask_file(self.folder, name)
        values = read_grey(path)  # (H, W)
        if values.shape != foreground.shape:
            sizes = f"{_size(values.shape)}, its picture {name} {_size(foreground.shape)}"
            raise DataError(f"{path} is {sizes}; give each mask the size of its picture")
        marks = np.unique(values[values > 0])
        if self.threshold is None and len(marks) > 1:
            raise DataError(
                f"{path} has {len(np.unique(values))} grey values, so where it ends is not known; draw it in 0 and "
                "255 alone, or set mask_threshold to the value from which on a pixel counts"
            )
        mask = values >= (self.threshold or marks.min(initial=255))
        if not mask.any():
            below = "" if self.threshold is None else f" from mask_threshold {self.threshold} on"
            raise DataError(f"{path} marks nothing{below}; mark what is to be edited")
        return Drawn(np.asarray(mask), f"drawn {path.name}", Counter())


class Box(NamedTuple):
    """A line of a list of boxes: pixels of the picture."""

    line: int
    x: int
    y: int
    width: int
    height: int


class Boxes:
    """A list of boxes; all those of a picture together are its mask.

    Args:
        file: CSV with the columns `path` (as the picture is called in its data set), `x`, `y`, `width` and `height`,
            in pixels.

    Raises:
        DataError: no such file, other columns, or no numbers; each box is checked with its picture.
    """

    def __init__(self, file: Path) -> None:
        self.learnt_from: set[tuple[str, str]] = set()
        self.file = Path(file)
        self.boxes: defaultdict[str, list[Box]] = defaultdict(list)
        try:
            with self.file.open(newline="", encoding="utf-8-sig") as stream:
                lines = list(csv.reader(stream))
        except (OSError, UnicodeDecodeError, csv.Error) as problem:
            raise DataError(f"{file} cannot be read ({problem}); give a CSV file of boxes") from problem
        if not lines or tuple(cell.strip() for cell in lines[0]) != COLUMNS:
            raise DataError(f"{file} has other columns than {','.join(COLUMNS)}")
        for number, cells in enumerate(lines[1:], 2):
            if cells:
                self._add(number, cells)

    def _add(self, number: int, cells: list[str]) -> None:
        try:
            name, *figures = cells
            x, y, width, height = (int(figure) for figure in figures)
        except ValueError:
            raise DataError(f"{self.file}:{number}: expected a path and four whole numbers") from None
        if min(x, y) < 0 or min(width, height) < 1:
            raise DataError(f"{self.file}:{number}: expected x and y of 0 or more, width and height of 1 or more")
        self.boxes[name.strip()].append(Box(number, x, y, width, height))

    def check(self, name: str) -> None:
        """Raises DataError if a picture has no box."""
        if name not in self.boxes:
            near = get_close_matches(name, self.boxes, 1)
            hint = f"; it has {near[0]}" if near else ""
            raise DataError(f"{self.file} has no box of {name}{hint}. Add one, or edit fewer pictures")

    def draw_for(self, name: str, pair: Pair, rng: np.random.Generator, foreground: Bools) -> Drawn:
        self.check(name)
        mask: Bools = np.zeros(foreground.shape, dtype=np.bool_)
        for line, x, y, width, height in self.boxes[name]:
            if x + width > mask.shape[1] or y + height > mask.shape[0]:
                told = f"the box {x},{y},{width},{height} lies outside {name}, which is {_size(mask.shape)}"
                raise DataError(f"{self.file}:{line}: {told}; correct it")
            mask[y : y + height, x : x + width] = True
        return Drawn(mask, f"{len(self.boxes[name])} boxes of {self.file.name}", Counter())


class RandomMasks:
    """A blob at a random place of the object.

    An ellipse, up to `LONGEST` times as long as wide, turned at random and bent as real masks are when they are
    augmented. Where it reaches beyond the object it gives way along the outline: its area is as drawn.

    Args:
        area: least and largest share of the object, drawn evenly by its logarithm.
    """

    def __init__(self, area: tuple[float, float]) -> None:
        self.learnt_from: set[tuple[str, str]] = set()
        self.area = area

    def draw_for(self, name: str, pair: Pair, rng: np.random.Generator, foreground: Bools) -> Drawn:
        small = no_larger(foreground)
        if not small.any():
            raise DataError(f"the object's mask of {name} is empty: no mask has a place on it")
        share = math.exp(rng.uniform(*np.log(self.area)))
        area = max(1, round(share * int(small.sum())))
        return Drawn(fit_mask(_blob(area, small, rng), foreground.shape), f"random, {share:.2%}", Counter())


def with_masks(path: Path, names: Iterable[str]) -> set[str]:
    """Which of some pictures a path given as `masks` has masks for; all of them where it has masks for each type.

    Raises:
        DataError: neither a list of boxes nor a folder; or the list has no box of any of them.
    """
    path, asked = Path(path), set(names)
    if path.suffix.lower() == ".csv":
        boxes = Boxes(path)
        if not (found := asked & boxes.boxes.keys()):
            boxes.check(min(asked))
        return found
    folder = DrawnMasks(path).folder
    return {name for name in asked if mask_file(folder, name).is_file()} or asked


def strange_masks(path: Path, names: Collection[str]) -> list[str]:
    """What a path given as `masks` names that is none of these pictures; nothing where it has masks for each type.

    Args:
        path: of a list of boxes or a folder, as for `with_masks`.
        names: of all pictures that masks may be for.
    """
    if path.suffix.lower() == ".csv":
        return sorted(Boxes(path).boxes.keys() - set(names))
    known = {mask_file(path, name) for name in names}
    files = {file for file in path.rglob("*.png") if not file.name.startswith(".")}
    return sorted(file.relative_to(path).as_posix() for file in files - known) if files & known else []


def read_placed(
    path: Path,
    names: Collection[str],
    pairs: Iterable[Pair],
    rules: Mapping[Pair, MaskRules],
    threshold: int | None = None,
) -> PlacedMasks:
    """What a path given as `masks` means: a list of boxes, a mask for each picture, or masks for each type.

    Args:
        path: a CSV file; or a folder, which is of drawn masks if it has that of any of the pictures.
        names: of the pictures to be edited.
        pairs: that are to come out.
        rules: of those of them that have real masks, which masks for each type have to keep.
        threshold: of `DrawnMasks`.

    Raises:
        DataError: neither, or it is damaged.
    """
    path = Path(path)
    if path.suffix.lower() == ".csv":
        return Boxes(path)
    drawn = DrawnMasks(path, threshold)
    if any(mask_file(path, name).is_file() for name in names):
        return drawn
    try:
        return MaskFolder(path, {pair: rules.get(pair, ANY) for pair in pairs})
    except DataError as problem:
        named = f"{problem}; a mask that is drawn for one picture has its name, such as {mask_file(path, min(names))}"
        raise DataError(named) from problem


def _blob(area: int, within: Bools, rng: np.random.Generator) -> Bools:
    """A blob (H, W) of `area` pixels, or all, of a region (H, W): those nearest to its middle as the ellipse counts."""
    places = np.argwhere(within)  # (n, 2)
    middle = places[int(rng.integers(len(places)))]
    longer = math.sqrt(LONGEST ** rng.uniform())
    half = math.sqrt(area / math.pi) * np.array([longer, 1 / longer])  # of the ellipse's axes
    turn = rng.uniform(0, math.pi)
    knots = 2 * float(np.linalg.norm(half)) * BEND * rng.normal(size=(2, KNOTS, KNOTS))
    off = (places - middle).T  # (2, n)
    grid = (KNOTS - 1) * (off / (2 * half.max()) + 0.5)
    bent = off + [ndimage.map_coordinates(values, grid, order=3, mode="nearest") for values in knots]
    turned = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]]) @ bent
    nearest = np.square(turned / half[:, None]).sum(axis=0).argsort(kind="stable")[:area]
    blob: Bools = np.zeros_like(within)
    blob[tuple(places[nearest].T)] = True
    return blob


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"
