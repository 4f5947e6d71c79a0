"""The manifest of a generated data set: a line per picture asked for, and how lines are written and read.

CSV in UTF-8 with the columns `COLUMNS`. A file that grows line by line may end in the middle of one, where a process
was killed: what follows the last line break does not count, so no cell holds one. The columns of `LATER` came when
sets were there already: a line without all of them has their defaults.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypedDict, cast, get_type_hints

from lit_defect.errors import DataError


class Made(TypedDict):
    """What its maker knows of a picture asked for; the store adds the names of the files."""

    number: int  # of the picture in this generation, from 0
    source: str  # name of the picture that it was made from, in its data set
    source_group: str  # the physical part behind it
    category: str
    defect_type: str  # of the result; also the name of the normal class, where a normal picture was made
    seed: int
    prompt: str
    base: str  # fingerprint of the base model
    tokens: str  # fingerprint of the learnt tokens
    sampler: str
    steps: int
    strength: float
    guidance: float
    reweight: str
    mask_source: str
    candidates: int
    rejected: dict[str, int]  # candidates by the reason that spoke against them
    change_inside: float  # this and the next: grey levels
    change_outside: float
    covered: float  # share of the asked mask that the repaired label keeps
    contrast: float  # grey levels against the surroundings
    likeness: float
    area: float  # share of the picture that the mask covers
    accepted: bool
    reason: str  # why not
    mode: str  # function of an editing; empty where defects are drawn by a generator that learnt them
    most_outside: float  # largest change outside the mask, before the paste-back undoes it; grey levels
    most_after: float  # the same in the result
    share_changed: float  # share of the result's pixels that differ from the source
    seam: float  # step across the mask's border, beyond that of the source; grey levels
    retried: int  # candidates that were made again in float32


class Row(Made):
    """A line of the manifest."""

    image: str  # relative to the root, with forward slashes; empty where not accepted
    mask: str  # empty where there is none, too: of a normal picture, and in data sets without masks


LATER = {
    "mode": "",
    "most_outside": "nan",
    "most_after": "nan",
    "share_changed": "nan",
    "seam": "nan",
    "retried": "0",
}  # cells by default
COLUMNS = ("number", "image", "mask", *(name for name in get_type_hints(Made) if name != "number"))
_TYPES = get_type_hints(Row)


def table(rows: Iterable[Iterable[object]]) -> bytes:
    """Lines of CSV."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue().encode()


def cells(row: Row) -> list[object]:
    """The cells of a line; `read_rows` gives the row back, its line breaks as spaces."""
    values = cast(dict[str, Any], row)
    return [_cell(_TYPES[name], values[name]) for name in COLUMNS]


def append(path: Path, row: Row) -> None:
    """Add a row; see `append_line`."""
    append_line(path, COLUMNS, cells(row))


def append_line(path: Path, columns: Iterable[object], line: Iterable[object]) -> None:
    """Add a line that is whole on disk, or nothing; what a killed process left of its last line goes.

    Args:
        path: a CSV file; where it is new or empty, the line comes after one of its columns' names.
        columns: their names.
        line: the cells, without line breaks.

    Raises:
        OSError: as the disk says; the file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        end = _whole(file)
        content = table([line] if end else [columns, line])
        try:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


def read_rows(path: Path, part: bool = False) -> list[Row]:
    """The rows of a manifest, or of a part of one that may end in the middle of a line.

    Raises:
        DataError: missing, unreadable, of another version or damaged.
    """
    rows = []
    for number, texts in read_table(path, COLUMNS, part, tuple(LATER.values())):
        try:
            values = {name: _value(_TYPES[name], text) for name, text in zip(COLUMNS, texts, strict=True)}
        except (ValueError, KeyError, AttributeError):
            raise DataError(f"{path}:{number} is damaged; take the line out and run the generation again") from None
        rows.append(cast(Row, values))
    return rows


def read_table(
    path: Path, columns: tuple[str, ...], part: bool = False, later: tuple[str, ...] = ()
) -> list[tuple[int, list[str]]]:
    """Line numbers and cells of a CSV file with just these columns.

    Args:
        path: the file.
        columns: their names.
        part: as in `read_rows`.
        later: the cells that an older file lacks at the end of its lines, all or none of them.

    Raises:
        DataError: as `read_rows`.
    """
    try:
        content = path.read_bytes()
        text = (content[: content.rfind(b"\n") + 1] if part else content).decode("utf-8-sig")
        lines = list(csv.reader(io.StringIO(text, newline="")))
    except FileNotFoundError:
        raise DataError(f"{path} is not there; copy the whole data set, or generate it anew") from None
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise DataError(f"{path} cannot be read ({problem}); copy it again, or generate the data set anew") from problem
    if not lines and part:
        return []
    widths = len(columns), len(columns) - len(later)  # an older file that was gone on with has lines of both
    if not lines or tuple(lines[0]) not in [columns[:width] for width in widths]:
        raise DataError(f"{path} has other columns than {','.join(columns)}; generate the data set with this version")
    if wrong := [number for number, line in enumerate(lines, 1) if line and len(line) not in widths]:
        raise DataError(f"{path}:{wrong[0]} is damaged; take the line out and run the generation again")
    return [(n, line + [*later][: len(columns) - len(line)]) for n, line in enumerate(lines[1:], 2) if line]


def _whole(file: io.FileIO) -> int:
    """Cut a file open for appending behind its last line break; gives its length in bytes."""
    end = file.seek(0, os.SEEK_END)
    if end:
        file.seek(end - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            end = file.readall().rfind(b"\n") + 1
            file.truncate(end)
    return end


def _cell(kind: type, value: Any) -> object:
    if kind is bool:
        return int(value)
    if kind is float:
        return float(value)  # numpy's floats would be written as text of their own
    if kind is str:
        return " ".join(value.splitlines())
    return json.dumps(value) if isinstance(value, dict) else value


def _value(kind: type, text: str) -> Any:
    if kind is bool:
        return {"0": False, "1": True}[text]
    if kind in (int, float, str):
        return kind(text)
    return {reason: int(times) for reason, times in json.loads(text).items()}
