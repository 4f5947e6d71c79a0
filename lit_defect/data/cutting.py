"""Windows and tiles out of large photographs, each with the label of what it shows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from PIL import Image

from lit_defect.data.annotations import Annotation
from lit_defect.data.cache import in_threads
from lit_defect.data.images import Box, read_mask
from lit_defect.data.splits import some
from lit_defect.errors import DataError

Size = tuple[int, int]  # height, width


def picture_sizes(paths: Iterable[Path]) -> dict[Path, Size]:
    """(height, width) of every picture that can be opened; only its header is read."""

    def look(path: Path) -> Size | None:
        try:
            with Image.open(path) as picture:
                return picture.height, picture.width
        except OSError:
            return None

    ordered = sorted(paths)
    return {path: size for path, size in zip(ordered, in_threads(look, ordered), strict=True) if size}


def windows(rows: Sequence[Annotation], sizes: Mapping[Path, Size], window: Size, good: str | None) -> list[Annotation]:
    """A window (height, width) around the centre of each box, shifted to lie inside its photograph.

    Windows of good boxes that meet a defect's box are left out, with a warning, and so are repeated windows. Rows of
    unreadable photographs and boxes that are not inside stay as they are, for inspection to report.

    Raises:
        DataError: a photograph is smaller than the window, or has no box, or one window has two labels.
    """
    height, width = window
    _check_fit(rows, sizes, window, "data.window")
    defects: defaultdict[Path, list[Box]] = defaultdict(list)
    for row in rows:
        if row.box is None:
            raise DataError(f"data.window needs a box in every row; {row.name} has none.")
        if row.label != good:
            defects[row.path].append(row.box)
    result: dict[str, Annotation] = {}
    spoiled = []
    for row in rows:
        if row.box is None or row.path not in sizes or _outside(row, sizes[row.path]):
            result[row.name] = row
            continue
        x, y, w, h = row.box
        full_height, full_width = sizes[row.path]
        left = min(max(x + w // 2 - width // 2, 0), full_width - width)
        top = min(max(y + h // 2 - height // 2, 0), full_height - height)
        box = (left, top, width, height)
        made = row.with_box(box)
        if row.label == good and any(_shared(box, defect) for defect in defects[row.path]):
            spoiled.append(row.name)
        elif result.setdefault(made.name, made).label != made.label:
            raise DataError(
                f"data.window: {made.label} and {result[made.name].label} boxes in {row.path} get the same "
                "window, so near are they. Make the window smaller or keep one of them."
            )
    if spoiled:
        rank_zero_warn(
            f"data.window: {len(spoiled)} windows of {good} boxes show a defect and are left out ({some(spoiled)})."
        )
    return list(result.values())


def tiles(
    rows: Sequence[Annotation], sizes: Mapping[Path, Size], tile: Size, overlap: float, good: str
) -> list[Annotation]:
    """Tiles (height, width) that cover every photograph; the last of a row or column is shifted to fit.

    A tile's label is that of the defect (box, or mask where the row has one) that covers most of it, and the
    flawless class where none does. Of unreadable photographs, and of those with a box that is not inside, only the
    rows concerned are given, for inspection to report.

    Raises:
        DataError: a photograph is smaller than a tile, a mask is unreadable or of another size than its photograph,
            or nothing tells where in it a defect is.
    """
    _check_fit(rows, sizes, tile, "data.tile")
    photographs: defaultdict[Path, list[Annotation]] = defaultdict(list)
    for row in rows:
        photographs[row.path].append(row)

    def cut(listed: list[Annotation]) -> list[Annotation]:
        first = listed[0]
        if any((row.split, row.group, row.source) != (first.split, first.group, first.source) for row in listed):
            raise DataError(f"data.tile: the rows of {first.path} differ in split, group or source.")
        if first.path not in sizes:
            return [first]
        size = sizes[first.path]
        if outside := [row for row in listed if _outside(row, size)]:
            return outside
        return list(_tiles_of(listed, size, tile, overlap, good))

    return [made for part in in_threads(cut, photographs.values()) for made in part]


def _tiles_of(listed: Sequence[Annotation], size: Size, tile: Size, overlap: float, good: str) -> Iterator[Annotation]:
    """The tiles of one photograph of (height, width) `size`."""
    height, width = tile
    defects = [row for row in listed if row.label != good]
    areas = [_area(row, size) for row in defects]
    for top in _starts(size[0], height, overlap):
        for left in _starts(size[1], width, overlap):
            box = (left, top, width, height)
            covered = [area(box) for area in areas]
            worst = max(range(len(covered)), key=covered.__getitem__, default=None)
            label = defects[worst].label if worst is not None and covered[worst] else good
            mask = defects[worst].mask if worst is not None and covered[worst] else None
            yield replace(listed[0].with_box(box), label=label, mask=mask)


def _area(row: Annotation, size: Size) -> Callable[[Box], int]:
    """Box -> how many pixels of the row's defect lie in it."""
    if row.mask is not None:
        marked = read_mask(row.mask) > 0
        if marked.shape != size:
            sizes = f"{marked.shape[1]}x{marked.shape[0]}, the picture {size[1]}x{size[0]}"
            raise DataError(f"data.tile: {row.mask} is {sizes}. Give each mask the size of its picture.")

        def count(box: Box) -> int:
            x, y, width, height = box
            return int(marked[y : y + height, x : x + width].sum())

        return count
    if row.box is None:
        raise DataError(f"data.tile: nothing tells where in {row.path} the {row.label} is; give a box or a mask.")
    return partial(_shared, row.box)


def _shared(a: Box, b: Box) -> int:
    """Pixels that two boxes share."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def _starts(full: int, side: int, overlap: float) -> list[int]:
    """Where tiles of `side` begin on an axis of `full` pixels; the last one ends at the edge."""
    step = max(1, round(side * (1 - overlap)))
    return [*range(0, full - side, step), full - side]


def _check_fit(rows: Sequence[Annotation], sizes: Mapping[Path, Size], crop: Size, key: str) -> None:
    """Every photograph holds the crop."""
    small = set()
    for row in rows:
        height, width = sizes.get(row.path, crop)
        if height < crop[0] or width < crop[1]:
            small.add(row.path.name)
    if small:
        raise DataError(
            f"{key} is {crop[0]}x{crop[1]}, but {len(small)} photographs are smaller ({some(small)}). "
            "Make it smaller, or take these photographs out of the list."
        )


def _outside(row: Annotation, size: Size) -> bool:
    """Whether the row's box reaches over the edge of its photograph of (height, width) `size`."""
    if row.box is None:
        return False
    x, y, width, height = row.box
    return x + width > size[1] or y + height > size[0]
