"""A folder of generated masks, as `MaskDiffusion` writes it and `generation.masks` of `AnomalyDiffusion` takes it.

    ROOT/about.json            what decides the masks, and how many were made
    ROOT/trained_on.csv        name,group of every picture whose mask was learnt from
    ROOT/masks.csv             category,defect_type,number,mask,rejected: a line per mask asked for; how often it was
                               drawn in vain, by reason (JSON); no mask where every try was
    ROOT/<category>/<type>/00000.png       0 and 255

Written by several processes, killed and gone on with as told in `store.py`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from lit_defect.claims import forget_launches
from lit_defect.errors import DataError
from lit_defect.generation.files import Bools, png, write_whole
from lit_defect.generation.manifest import append_line, read_table, table
from lit_defect.generation.store import Store, place

MASKS = "masks.csv"
COLUMNS = ("category", "defect_type", "number", "mask", "rejected")


class Asked(NamedTuple):
    """A mask that is asked for: its category and type, and its number among them."""

    category: str
    defect_type: str
    number: int


class Line(NamedTuple):
    """What became of it: its file relative to the root, empty if there is none, and how often it was rejected, why."""

    mask: str
    rejected: Counter[str]


class MaskStore(Store):
    """Generated masks that are being written; see `Store`."""

    kind = "set of generated masks"
    manifest = MASKS

    def done(self, tries: int) -> set[Asked]:
        """The masks that are there, and those that were drawn in vain so often."""
        return {asked for asked, line in self.lines().items() if line.mask or line.rejected.total() >= tries}

    def add(self, asked: Asked, mask: Bools | None, rejected: Counter[str]) -> None:
        """Write a mask (H, W), if one was found, and then its line.

        Raises:
            UserError: the disk is full or cannot be written, or a name of a category or type is no folder's name.
        """
        name = "" if mask is None else f"{place(*asked[:2])}/{asked.number:05d}.png"
        with self._writing():
            if mask is not None:
                write_whole(self.root / name, png(mask))
            append_line(self._part, COLUMNS, _cells(asked, Line(name, rejected)))

    def merge(self) -> dict[Asked, Line]:
        """Make the parts of all processes one sorted `masks.csv`, and count; gives its lines.

        To be called by one process when all have finished. Doing it twice, or being killed in it, harms nothing.

        Raises:
            UserError: the disk is full; the parts are still there.
        """
        parts, lines = self._parts(), dict(sorted(self.lines().items()))
        with self._writing():
            write_whole(self.root / MASKS, table([COLUMNS, *(_cells(*entry) for entry in lines.items())]))
            self._write_about(count(lines.items()))
            for part in parts:
                part.unlink(missing_ok=True)
            forget_launches(self.root)
        return lines

    def lines(self) -> dict[Asked, Line]:
        """All lines of `masks.csv` and parts; of two about one mask the one that says more."""
        merged = self.root / MASKS
        found: dict[Asked, Line] = {}
        for path in ([merged] if merged.is_file() else []) + self._parts():
            for asked, line in _read(path, part=path != merged):
                if asked not in found or _weight(line) > _weight(found[asked]):
                    found[asked] = line
        return found


def count(lines: Iterable[tuple[Asked, Line]]) -> dict[str, Any]:
    """How many masks were asked for and made, and the rejections by reason; all together and by category/type."""
    pairs: dict[str, dict[str, Any]] = {}
    for asked, line in lines:
        pair = str(PurePosixPath(*asked[:2]))
        found = pairs.setdefault(pair, {"asked": 0, "made": 0, "rejections": Counter()})
        found["asked"] += 1
        found["made"] += bool(line.mask)
        found["rejections"] += line.rejected
    whole = {key: sum(found[key] for found in pairs.values()) for key in ("asked", "made")}
    return {**whole, "pairs": pairs}


def _weight(line: Line) -> tuple[bool, int]:
    return bool(line.mask), line.rejected.total()


def _cells(asked: Asked, line: Line) -> list[object]:
    return [*asked, line.mask, json.dumps(line.rejected)]


def _read(path: Path, part: bool) -> Iterable[tuple[Asked, Line]]:
    for number, (category, kind, name, mask, rejected) in read_table(path, COLUMNS, part):
        try:
            counts = Counter({reason: int(times) for reason, times in json.loads(rejected).items()})
            yield Asked(category, kind, int(name)), Line(mask, counts)
        except (ValueError, AttributeError):
            raise DataError(f"{path}:{number} is damaged; take the line out and run the generation again") from None
