"""Edited pictures beside their sources: what changed, where, and what became of the candidates.

    python -m lit_defect.reporting.editing [NAME=]SET... --real ROOT [--output FOLDER] [--count N]

SET is a data set of edited or generated pictures, or the run that made it; ROOT the data set that its sources are of.
Several sets, one of each function, are shown side by side on the same sources. Written are

| file | |
|---|---|
| `edits_NAME.png` | source, mask, result, difference and both close up, of the first pictures of each type |
| `edits.png` | a row for each source, a column for each set |
| `candidates.png` | candidates by what became of them |
| `edits.md` | the numbers of each set, which are printed, too |

A picture that was not accepted is shown by its first rejected candidate, where `keep_rejected` kept any.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lit_defect.errors import DataError, UserError
from lit_defect.files import whole_file
from lit_defect.generation.store import ABOUT, REJECTED, place, read_about, read_area, read_manifest
from lit_defect.reporting.edit_sheets import EditTile, edit_sheet, joined_sheet
from lit_defect.reporting.edit_tables import candidates_figure, numbers_table, reasons_table
from lit_defect.reporting.sheets import Picture
from lit_defect.reporting.style import save_figure

_FOLDERS = ("", "edited", "generated")  # a set, or where a run keeps its own
_WINDOW = re.compile(r"(?P<path>.*?)(?:#(\d+),(\d+),(\d+),(\d+))?(?P<mirror>#mirrored)?")
_UNFIT = re.compile(r"[^\w.+-]")  # for the name of a file


@dataclass(frozen=True)
class EditedSet:
    """A data set on disk.

    Attributes:
        name: of the function that made it.
        root: its folder.
        real: the data set of its sources.
        rows: of its manifest.
    """

    name: str
    root: Path
    real: Path
    rows: list[dict[str, Any]]

    def tile(self, row: dict[str, Any]) -> EditTile:
        """The pictures of a line.

        Raises:
            DataError: the source is not there, or of another size than the result.
        """
        source, result, mask = _source(self.real, row["source"]), self._result(row), read_area(self.root, row)
        sizes = {part.shape[:2] for part in (source, result, mask) if part is not None}
        if len(sizes) > 1:
            raise DataError(
                f"number {row['number']} of {self.root}, its mask and its source {self.real / row['source']} are of "
                f"different sizes (height, width): {sorted(sizes)}; is --real the data set that it was made from?"
            )
        return EditTile(source, result, mask, row, self.name)

    def _result(self, row: dict[str, Any]) -> Picture | None:
        """The accepted picture, else the first candidate that was kept."""
        folder = self.root / REJECTED / place(row["category"], row["defect_type"])
        kept = sorted(folder.glob(f"{row['number']:05d}_*.png"), key=lambda path: (len(path.name), path.name))
        path = self.root / row["image"] if row["accepted"] else next(iter(kept), None)
        if path is None:
            return None
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))

    def first(self, count: int) -> Iterator[dict[str, Any]]:
        """The first lines of each type, accepted or not."""
        seen: Counter[str] = Counter()
        for row in self.rows:
            seen[row["defect_type"]] += 1
            if seen[row["defect_type"]] <= count:
                yield row


def read_sets(words: Sequence[str], real: Path) -> list[EditedSet]:
    """The sets behind [NAME=]SET, each of a name of its own; without a name, the function is.

    Raises:
        UserError: two of one name.
        DataError: no data set, or a damaged one.
    """
    sets = []
    for word in words:
        name, sign, folder = word.partition("=")
        named = bool(sign and name) and not Path(word).exists()
        root = Path(folder if named else word)
        root = next((root / part for part in _FOLDERS if (root / part / ABOUT).is_file()), root)
        rows = [dict(row) for row in read_manifest(root)]
        made_by = str(next((row["mode"] for row in rows if row.get("mode")), read_about(root)["generator"]))
        sets.append(EditedSet(name if named else made_by, root, real, rows))
    if twice := [name for name, times in Counter(part.name for part in sets).items() if times > 1]:
        raise UserError(f"{twice[0]} is the name of several sets: give each its own, such as {twice[0]}_2=SET")
    return sets


def joined(sets: Sequence[EditedSet], count: int) -> list[list[EditTile | None]]:
    """Tiles of the same source and type side by side, at most `count` rows of each type.

    Sources that most sets were asked for come first. Where a set has several pictures of a source and a type, the first
    accepted one stands for them.
    """
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for part in sets:
        for row in part.rows:
            asked = found.setdefault((row["source"], row["defect_type"]), {})
            if part.name not in asked or (row["accepted"] and not asked[part.name]["accepted"]):
                asked[part.name] = row
    rows = []
    for kind in dict.fromkeys(kind for _, kind in found):
        same = [asked for (_, other), asked in found.items() if other == kind]
        rows += sorted(same, key=lambda asked: -len(asked))[:count]
    return [[part.tile(asked[part.name]) if part.name in asked else None for part in sets] for asked in rows]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the sheets and print the tables; returns the exit status, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m lit_defect.reporting.editing", description="Edited pictures beside their sources."
    )
    parser.add_argument("sets", nargs="+", help="data sets or runs; NAME=SET gives one a name")
    parser.add_argument("--real", type=Path, required=True, help="the data set that the sources are of")
    parser.add_argument("--output", type=Path, help="folder to write to; `figures` beside the first set by default")
    parser.add_argument("--count", type=int, default=8, help="rows of the sheets, of each type")
    options = parser.parse_args(arguments)
    try:
        sets = read_sets(options.sets, options.real)
        folder = options.output or sets[0].root.parent / "figures"
        text = _write(sets, folder, options.count)
    except (UserError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{text}\nfigures: {folder}")
    return 0


def _write(sets: Sequence[EditedSet], folder: Path, count: int) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for part in sets:
        tiles = [part.tile(row) for row in part.first(count)]
        title = f"{part.name}: the first {count} pictures of each type"
        edit_sheet(tiles, title=title).save(folder / f"edits_{_UNFIT.sub('_', part.name)}.png")
    if len(sets) > 1:
        title = "The same sources, edited by each function"
        joined_sheet(joined(sets, count), title=title).save(folder / "edits.png")
    lines = {part.name: part.rows for part in sets}
    save_figure(candidates_figure(lines), folder / "candidates.png")
    text = f"{numbers_table(lines)}\n{reasons_table(lines)}"
    with whole_file(folder / "edits.md") as file:
        file.write(text.encode())
    return text


def _source(real: Path, name: str) -> Picture:
    """The picture of this name, upright, in colour; a crop where the name says so.

    Raises:
        DataError: it is not there or cannot be read.
    """
    from lit_defect.data.images import read_image  # its package brings torch along, which no sheet needs

    found = _WINDOW.fullmatch(name)
    assert found is not None  # any name is a path
    path = real / found["path"]
    if not path.is_file():
        raise DataError(f"{path} is not there, but a picture was made from it: is --real the data set of the sources?")
    x, y, width, height = (int(number or 0) for number in found.groups()[1:5])
    box = (x, y, width, height) if found[2] else None
    return read_image(path, box=box, mirror=bool(found["mirror"]), convert=True)


if __name__ == "__main__":
    sys.exit(main())
