"""Lists of crops over large photographs, CSV or JSON; every row is checked before a picture is read."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lit_defect.data.images import Box
from lit_defect.data.samples import REAL
from lit_defect.data.splits import PRIORITY
from lit_defect.errors import DataError

BOX = ("x", "y", "width", "height")
COLUMNS = ("path", *BOX, "label", "mask", "split", "group", "source")
SHOWN = 20  # wrong rows named in one error


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """One row: a photograph or a box in it, and what it shows.

    Attributes:
        path, mask: absolute files; the mask is of the whole photograph.
        name: `path` relative to the root, and `#x,y,width,height` if there is a box.
        box: (x, y, width, height) in pixels, or None for the whole photograph.
    """

    path: Path
    name: str
    label: str
    box: Box | None = None
    mask: Path | None = None
    split: str = ""
    group: str = ""
    source: str = REAL

    def with_box(self, box: Box) -> Annotation:
        """The same photograph with another box."""
        return replace(self, box=box, name=box_name(self.name.partition("#")[0], box))


def box_name(photograph: str, box: Box) -> str:
    """`photos/1.png#x,y,width,height`."""
    return f"{photograph}#{','.join(map(str, box))}"


def read_annotations(root: Path, file: Path) -> list[Annotation]:
    """The rows of a CSV file with a header, or of a JSON file that holds a list of objects.

    Raises:
        DataError: the file cannot be read, or rows are wrong; the first of them are listed together.
    """
    rows = _read_json(file) if file.suffix.lower() == ".json" else _read_csv(file)
    base = root.resolve()
    done, wrong = [], []
    first: dict[str, str] = {}  # name -> place
    for place, row in rows:
        try:
            annotation = _parse(row, root, base)
            if annotation.name in first:
                raise ValueError(f"{annotation.name} stands at {first[annotation.name]}, too")
            first[annotation.name] = place
            done.append(annotation)
        except ValueError as problem:
            wrong.append(f"  {place}: {problem}")
    if wrong:
        more = f"\n  ... and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise DataError(f"{file}: {len(wrong)} rows are wrong:\n" + "\n".join(wrong[:SHOWN]) + more)
    if not done:
        raise DataError(f"{file} has no rows; expected the columns {', '.join(COLUMNS)}.")
    return done


def _parse(row: Mapping[Any, Any], root: Path, base: Path) -> Annotation:
    """One row; `base` is the root without symbolic links. Raises ValueError with what is wrong."""
    if None in row:
        raise ValueError("more cells than the header has; quote texts that hold commas")
    text = {key: str(row[key]).strip() for key in COLUMNS if row.get(key) is not None}
    for key in ("path", "label"):
        if not text.get(key):
            raise ValueError(f"no {key}")
    path = _inside(text["path"], root, base)
    mask = _inside(text["mask"], root, base) if text.get("mask") else None
    split = text.get("split", "")
    if split not in ("", *PRIORITY):
        raise ValueError(f"split '{split}'; expected train, val, test or nothing")
    name = path.relative_to(root).as_posix()
    box = _box([text.get(key, "") for key in BOX])
    return Annotation(
        path=path,
        name=box_name(name, box) if box else name,
        label=text["label"],
        box=box,
        mask=mask,
        split=split,
        group=text.get("group") or name,
        source=text.get("source") or REAL,
    )


def _inside(text: str, root: Path, base: Path) -> Path:
    """The file below the root that `text` means; neither `..` nor a symbolic link may lead out of it."""
    path = root / text.replace("\\", "/")
    if not path.resolve().is_relative_to(base):
        raise ValueError(f"'{text}' leads out of {root}")
    normal = Path(*path.parts) if ".." not in path.parts else path.resolve()
    return normal if normal.is_relative_to(root) else root / normal.relative_to(base)


def _box(sides: list[str]) -> Box | None:
    if not any(sides):
        return None
    try:
        x, y, width, height = (float(side) for side in sides)
        if not all(value.is_integer() for value in (x, y, width, height)):
            raise ValueError
    except (ValueError, OverflowError):
        raise ValueError(f"x, y, width, height are {', '.join(sides)}; expected four whole numbers") from None
    if min(x, y) < 0 or min(width, height) < 1:
        raise ValueError(f"the box {', '.join(sides)} is empty or begins outside of the picture")
    return int(x), int(y), int(width), int(height)


def _read_csv(file: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            header = reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            rows = [(f"line {reader.line_num}", row) for row in reader]
    except FileNotFoundError:
        raise DataError(f"data.annotations: {file} is not there.") from None
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        text = f"data.annotations: {file} cannot be read ({problem}); expected a CSV file in UTF-8."
        raise DataError(text) from problem
    unknown = [name for name in header if name not in COLUMNS]
    if unknown or not {"path", "label"} <= set(header):
        raise DataError(
            f"{file}: the header is '{','.join(header)}'; expected path, label and some of "
            f"{', '.join(COLUMNS)}, separated by commas."
        )
    return rows


def _read_json(file: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"data.annotations: {file} is not there.") from None
    except (OSError, ValueError) as problem:
        raise DataError(f"data.annotations: {file} cannot be read ({problem}).") from problem
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f'{file}: expected a list of objects such as {{"path": "1.png", "label": "good"}}.')
    unknown = {key for entry in entries for key in entry} - set(COLUMNS)
    if unknown:
        raise DataError(f"{file}: unknown keys {', '.join(sorted(unknown))}; expected some of {', '.join(COLUMNS)}.")
    return [(f"entry {number}", entry) for number, entry in enumerate(entries, start=1)]
