"""A generated data set on disk: pictures and masks in MVTec AD's layout, and a line about each picture asked for.

    ROOT/about.json              what decides the pixels: generator, base model, tokens, options, seed; and the counts
    ROOT/trained_on.csv          name,group of every picture that the generator, or a base of one's own, has learnt from
    ROOT/manifest.csv            a line per picture asked for, accepted or not; the columns are those of `manifest.Row`
    ROOT/<category>/test/<type>/00000.png
    ROOT/<category>/ground_truth/<type>/00000_mask.png     accepted ones only; 0 and 255; none of a normal picture, and
                                 none where the label is not known by the pixel
    ROOT/rejected/<category>/<type>/00000_<candidate>.png  where they are kept
    ROOT/areas/00000.png         where edited pictures were edited, if not all over; 0 and 255
    ROOT/photographs/00000.png   what edited crops were cut from, with these in it, where asked for

Several processes write at once and any of them may be killed. Each appends to a part of its own,
`ROOT/.parts/manifest.<rank>.csv`, and a picture gets its line when it and its mask are whole on disk. So what has a
line is valid, and what has none is made again: the same command goes on where it stopped, with as many processes as it
likes. When all have finished, one merges the parts. Two launches at once are refused: the one that merges would take
away what the other writes.

A set without categories has no folders of them, as the layout allows for one product. No torch here.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from lit_defect.claims import begin_launch, forget_launches, last_launch, still_writes
from lit_defect.errors import DataError, UserError
from lit_defect.generation.files import Bools, Picture, png, read_mask, write_whole
from lit_defect.generation.manifest import COLUMNS, Made, Row, append, cells, read_rows, read_table, table

ABOUT, MANIFEST, TRAINED_ON, PARTS = "about.json", "manifest.csv", "trained_on.csv", ".parts"
REJECTED, PHOTOGRAPHS, AREAS = "rejected", "photographs", "areas"
KIND = "generated data set"
VERSION = 1


@dataclass(frozen=True)
class About:
    """What decides the pixels of a generation: another value is another data set.

    Attributes:
        generator: its name, the `source` of the pictures where they train.
        base: of the base model: where it came from (`source`) and the hash of its weights (`fingerprint`).
        tokens: hash of what was learnt.
        options: of sampling, masks and judgement, as JSON knows them; not how many pictures, nor on what machine.
        seed: of the generation.
    """

    generator: str
    base: dict[str, str]
    tokens: str
    options: dict[str, Any]
    seed: int


class Store:
    """A folder that one generation writes into, by one process or several; begun once, then gone on with.

    Args:
        root: its folder; made if need be.
        about: what decides the pixels, the same in all processes.
        trained_on: name and group of every picture that the generator has learnt from.
        rank: number of this process; each has another.

    Raises:
        UserError: `root` holds another generation, or anything else; it cannot be written, or another launch writes it.
    """

    kind = KIND
    manifest = MANIFEST

    def __init__(self, root: Path, about: About, trained_on: Iterable[tuple[str, str]], rank: int = 0) -> None:
        self.root = Path(root)
        self._part = self.root / PARTS / f"manifest.{rank}.csv"
        learnt = _listed(trained_on)
        content = {"format": _format(self.kind), "version": VERSION, **asdict(about)}
        self._about = json.loads(json.dumps(content | {"trained_on": hashlib.sha256(learnt).hexdigest()}))
        with self._writing():
            if self._is_new():
                write_whole(self.root / TRAINED_ON, learnt)
                self._write_about({})
        self._check_same()
        if rank == 0:
            self._begin()

    def _begin(self) -> None:
        """Begin to write, for all processes of this launch, if no other launch does."""
        before = last_launch(self.root)
        with self._writing():
            begun = not still_writes(before) and begin_launch(self.root, before)
        if not begun:
            by = f" by {before.worker}" if before is not None else ""
            raise UserError(
                f"{self.root} is being written{by}; wait for it or stop it. To be faster, give one command more devices"
            )

    def _parts(self) -> list[Path]:
        return sorted((self.root / PARTS).glob("manifest.*.csv"))

    def _is_new(self) -> bool:
        """Whether nobody has begun here.

        The first process of a launch writes `about.json` before any picture, so another that finds pictures finds it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        strange = [path.name for path in self.root.iterdir() if path.name[0] != "." and path.name != TRAINED_ON]
        if (self.root / ABOUT).is_file():
            return False
        if strange:
            raise UserError(
                f"{self.root} is no {self.kind}, but holds {sorted(strange)[0]}; give an empty or a new folder"
            )
        return True

    def _check_same(self) -> None:
        """What is written here goes together with what was written before."""
        there = {key: value for key, value in read_about(self.root, self.kind).items() if key != "counts"}
        before, now = dict(_flat(there)), dict(_flat(self._about))
        known = (before.keys() | now.keys()) - {"base.source"}  # a folder may have moved; its hash has not
        keys = sorted(key for key in known if before.get(key) != now.get(key))
        if keys:
            told = "; ".join(f"{key} was {before.get(key)}, is {now.get(key)}" for key in keys[:5])
            raise UserError(
                f"{self.root} holds another generation ({told}). Give a new folder, or the options of {ABOUT} there."
            )

    def _write_about(self, counts: Mapping[str, Any]) -> None:
        text = json.dumps({**self._about, "counts": counts}, indent=2, ensure_ascii=False)
        write_whole(self.root / ABOUT, (text + "\n").encode())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What the disk refuses is told to the user, with what it means."""
        try:
            yield
        except OSError as problem:
            raise UserError(
                f"{self.root} cannot be written ({problem.strerror or problem}). Every picture with a line in "
                f"{self.manifest} or {PARTS}/ is whole. Make room or mend the folder; the same command then goes on "
                "where it stopped."
            ) from problem


class GeneratedStore(Store):
    """A generated data set that is being written; see `Store`."""

    def done(self) -> set[int]:
        """Numbers of the pictures that need not be made any more, whichever process made them."""
        return {row["number"] for row in self._rows()}

    def add(
        self,
        made: Made,
        picture: Picture | None = None,
        mask: Bools | None = None,
        rejected: Mapping[int, Picture] | None = None,
        photograph: Picture | None = None,
        area: Bools | None = None,
    ) -> Row:
        """Write a picture, its mask and then its line.

        Args:
            made: what is known of it.
            picture: (H, W, 3) uint8, if it was accepted.
            mask: (H, W) bool, where the defect of an accepted picture is; None where nobody knows, or of a normal one.
            rejected: candidates to keep for a look at them, by number.
            photograph: what the picture is a crop of, with the crop in it.
            area: (H, W) bool, where the picture was edited.

        Returns:
            The line.

        Raises:
            UserError: the disk is full or cannot be written, or a name of a category or type is no folder's name.
            ValueError: accepted without picture, not accepted with it, a mask alone, or of different sizes.
        """
        if made["accepted"] != (picture is not None) or (mask is not None and picture is None):
            raise ValueError("an accepted picture comes with its pixels, one that is not with neither them nor a mask")
        stem, pair = f"{made['number']:05d}", (made["category"], made["defect_type"])
        row = cast(Row, {**made, "image": "", "mask": ""})
        with self._writing():
            if picture is not None:
                row["image"] = place(*pair, "test") + f"/{stem}.png"
                if mask is not None:
                    if picture.shape != (*mask.shape, 3):
                        raise ValueError(f"a picture of {picture.shape} does not fit a mask of {mask.shape}")
                    row["mask"] = place(*pair, "ground_truth") + f"/{stem}_mask.png"
                    write_whole(self.root / row["mask"], png(mask))
                write_whole(self.root / row["image"], png(picture))
            if photograph is not None:
                write_whole(self.root / PHOTOGRAPHS / f"{stem}.png", png(photograph))
            if area is not None:
                write_whole(self.root / AREAS / f"{stem}.png", png(area))
            for number, pixels in (rejected or {}).items():
                write_whole(self.root / REJECTED / place(*pair) / f"{stem}_{number}.png", png(pixels))
            append(self._part, row)
        return row

    def merge(self) -> list[Row]:
        """Make the parts of all processes one manifest, sorted by number, and count; gives its rows.

        To be called by one process when all have finished. Doing it twice, or being killed in it, harms nothing.

        Raises:
            UserError: the disk is full; the parts are still there.
        """
        parts = self._parts()
        rows = sorted(self._rows(), key=lambda row: row["number"])
        with self._writing():
            write_whole(self.root / MANIFEST, table([COLUMNS, *map(cells, rows)]))
            self._write_about(count(rows))
            for part in parts:
                part.unlink(missing_ok=True)
            forget_launches(self.root)
        return rows

    def _rows(self) -> list[Row]:
        """All lines of manifest and parts, one a number."""
        found = {row["number"]: row for path in self._parts() for row in read_rows(path, part=True)}
        manifest = self.root / MANIFEST
        merged = read_rows(manifest) if manifest.is_file() else []
        return list(({row["number"]: row for row in merged} | found).values())


def count(rows: Iterable[Row]) -> dict[str, Any]:
    """How many pictures were asked for and accepted, by category/type, and the candidates' rejections by reason."""
    asked: Counter[str] = Counter()
    accepted: Counter[str] = Counter()
    rejections: Counter[str] = Counter()
    for row in rows:
        pair = str(PurePosixPath(row["category"], row["defect_type"]))
        asked[pair] += 1
        accepted[pair] += row["accepted"]
        rejections.update(row["rejected"])
    by_pair = {pair: {"asked": asked[pair], "accepted": accepted[pair]} for pair in sorted(asked)}
    return {
        "asked": asked.total(),
        "accepted": accepted.total(),
        "pairs": by_pair,
        "rejections": dict(rejections.most_common()),
    }


def read_manifest(root: Path) -> list[Row]:
    """The lines of a generated data set's manifest, checked.

    Raises:
        DataError: `root` is no generated data set or an unfinished one, its manifest is foreign or damaged, a path in
            it leaves the root, or an accepted picture or its mask is not there.
    """
    root = Path(root)
    read_about(root)
    if not (root / MANIFEST).is_file():
        raise DataError(f"{root} has no {MANIFEST}: its generation has not finished; run the same command again")
    rows = read_rows(root / MANIFEST)
    home = root.resolve()
    for row in rows:
        for name in (row["image"], *([row["mask"]] if row["mask"] else [])) if row["accepted"] else ():
            path = (home / name).resolve()
            if not path.is_relative_to(home) or path == home:
                raise DataError(f"{root / MANIFEST}: number {row['number']} names {name!r}, which is not in {root}")
            if not path.is_file():
                raise DataError(
                    f"{path} is not there, but {MANIFEST} lists it; copy the whole data set, or take the line out"
                )
    return rows


def read_area(root: Path, row: Row | Mapping[str, Any]) -> Bools | None:
    """(H, W) bool, where a picture was edited, or else where its defect is; None where neither is known.

    Raises:
        DataError: the file cannot be read.
    """
    area = Path(root) / AREAS / f"{row['number']:05d}.png"
    if area.is_file():
        return read_mask(area)
    return read_mask(Path(root) / row["mask"]) if row["mask"] else None


def read_about(root: Path, kind: str = KIND) -> dict[str, Any]:
    """What `about.json` says: the fields of `About`, `trained_on` (hash) and `counts`.

    Raises:
        DataError: there is none, or it is another program's.
    """
    path = Path(root) / ABOUT
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{root} is no {kind}: it has no {ABOUT}; give a folder that predict wrote") from None
    except (OSError, ValueError) as problem:
        raise DataError(f"{path} cannot be read ({problem}); generate the {kind} anew") from problem
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (_format(kind), VERSION):
        raise DataError(f"{path} is not of a {kind} of version {VERSION}; generate it with this version")
    return content


def read_trained_on(root: Path) -> list[tuple[str, str]]:
    """Name and group of every picture that the generator has learnt from; the group may be empty.

    Raises:
        DataError: `trained_on.csv` is not there or not a list of them.
    """
    path = Path(root) / TRAINED_ON
    lines = read_table(path, ("name", "group"))
    return [(name, group) for _, (name, group) in lines]


def find_trained_on(folder: Path) -> set[tuple[str, str]]:
    """The same of a folder that need not have a list: empty where it was not made here, or drawn by somebody.

    Raises:
        DataError: the list is damaged.
    """
    return set(read_trained_on(folder)) if (Path(folder) / TRAINED_ON).is_file() else set()


def write_trained_on(folder: Path, pictures: Iterable[tuple[str, str]]) -> None:
    """Write `trained_on.csv`: name and group of every picture that what lies in the folder was trained on."""
    write_whole(Path(folder) / TRAINED_ON, _listed(pictures))


def _listed(pictures: Iterable[tuple[str, str]]) -> bytes:
    return table([("name", "group"), *sorted(set(pictures))])


def _format(kind: str) -> str:
    return f"lit_defect {kind}"


def place(category: str, kind: str, *between: str) -> str:
    """Folder of the pictures of a pair below the root: category, `between`, defect type.

    A slash in a type, as in "defective 1/3", becomes an underscore.

    Raises:
        UserError: the names are no folders' names.
    """
    words = kind.split("/")
    no_words = {"", ".", ".."} & set(words) or category in (".", "..")
    if no_words or "/" in category or set(category + kind) & set("\\\0"):
        raise UserError(f"the category {category!r} with the defect type {kind!r} gives no folder; rename it")
    return str(PurePosixPath(category, *between, "_".join(words)))


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested options by dotted key."""
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
