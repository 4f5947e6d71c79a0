"""Your own pictures: a folder per class, or a list of crops out of large photographs.

A folder per class (names good, ok and normal mean flawless), optionally below train, val and test:

    root/good/000.png                root/train/good/000.png
    root/scratched/000.png           root/test/good/000.png

A CSV file (or a JSON file with a list of such objects), named by `annotations`:

    path,x,y,width,height,label,mask,split,group,source
    photos/0001.jpg,410,220,1288,1288,good,,,,
    photos/0001.jpg,1000,640,180,96,scratched,masks/0001.png,train,part-17,real

Pixels count from the upper left corner; no box means the whole photograph. `mask` is a mask of the whole
photograph. Only path and label are needed. All crops of one photograph are one group, unless `group` says
which physical part it shows; `source` names the generator of a picture that is not real.

Boxes may be used as they are, or say where to cut: `window` cuts windows of one size around the boxes, `tile`
cuts the whole photographs into tiles. A window or tile is as good as what it shows: a window of a good box
that meets a defect is left out, a tile that meets one takes the defect's label.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_defect.data.annotations import Annotation, read_annotations
from lit_defect.data.cutting import Size, picture_sizes, tiles, windows
from lit_defect.data.images import SUFFIXES
from lit_defect.data.inspection import pictures_below
from lit_defect.data.module import DefectDataModule
from lit_defect.data.samples import Sample
from lit_defect.data.splits import PRIORITY, some
from lit_defect.errors import DataError, UserError

FLAWLESS = ("good", "ok", "normal")


class CustomCrops(DefectDataModule):
    """Pictures in a folder per class, or crops, windows and tiles of large photographs.

    Args:
        root: folder of the pictures; every path in a list is relative to it and stays inside.
        annotations: CSV or JSON file with the columns above, relative to `root`; None for a folder per class.
        window: (height, width) of windows around the centre of each box, shifted to lie inside.
        tile: (height, width) of tiles that cover each photograph of the list.
        overlap: share of a tile that the next one repeats, from 0 to less than 1.
        multiple_of: of what the sides of every crop (or of `image_size`) must be multiples; 8 for diffusion.
        normal_class: name of the flawless class; by default good, ok or normal, if there is one.
        setting: `one_class` trains and validates on flawless pictures only. All others test, but for those that the
            list wants to train on, and those of a part (`group`) that trains or validates: these are not used.
        kwargs: as for `DefectDataModule`.

    Raises:
        UserError: settings that contradict each other.
        DataError: files are missing, rows are wrong (all are listed), or sizes do not fit.
    """

    def __init__(
        self,
        root: str,
        annotations: str | None = None,
        window: tuple[int, int] | None = None,
        tile: tuple[int, int] | None = None,
        overlap: float = 0.0,
        multiple_of: int = 1,
        normal_class: str | None = None,
        setting: Literal["supervised", "one_class"] = "supervised",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root = Path(root).expanduser().absolute()
        self.annotations = annotations
        self.window = window
        self.tile = tile
        self.overlap = overlap
        self.multiple_of = multiple_of
        self.flawless = normal_class
        self.setting = setting
        self._rows: list[Annotation] | None = None
        self._check_choice()

    @property
    def class_names(self) -> list[str]:
        """The flawless class first, then the others by name."""
        names = {row.label for row in self.rows()}
        good = self._flawless_of(names)
        return [*([good] if good else []), *sorted(names - {good})]

    @property
    def normal_class(self) -> int | None:
        """0 if there is a flawless class."""
        return 0 if self._flawless_of({row.label for row in self.rows()}) else None

    @property
    def good_only(self) -> bool:
        """Whether the setting is `one_class`."""
        return self.setting == "one_class"

    def assign(self, samples: list[Sample]) -> list[Sample]:
        """As for every data module; with `one_class`, defects that were drawn to train or validate test instead."""
        divided = super().assign(samples)
        if not self.good_only:
            return divided
        if self.normal_class is None:
            raise UserError(
                f"data.setting one_class trains on flawless pictures, and none of the classes "
                f"{', '.join(self.class_names)} is called {', '.join(FLAWLESS)}: name it by data.normal_class"
            )
        learned = {s.group for s in divided if s.group and s.split in ("train", "val") and s.label == self.normal_class}
        drawn = {sample.name for sample in samples if not sample.split}

        def tests(sample: Sample) -> bool:
            defective = sample.label != self.normal_class
            return (
                defective and sample.name in drawn and sample.group not in learned and sample.split in ("train", "val")
            )

        return [replace(sample, split="test") if tests(sample) else sample for sample in divided]

    def rows(self) -> list[Annotation]:
        """What the list says, or the folders; read once."""
        if self._rows is None:
            if self.annotations is None:
                self._rows = read_folders(self.root)
            else:
                self._rows = read_annotations(self.root, self.root / self.annotations)
        return self._rows

    def find_samples(self) -> list[Sample]:
        """The pictures, crops, windows or tiles, by photograph."""
        rows = self.rows()
        names = self.class_names
        good = self._flawless_of(set(names))
        if self.window or self.tile or (self.multiple_of > 1 and self.image_size is None):
            sizes = picture_sizes({row.path for row in rows})
            if self.window:
                rows = windows(rows, sizes, self.window, good)
            elif self.tile and good:
                rows = tiles(rows, sizes, self.tile, self.overlap, good)
            self._check_multiples(rows, sizes)
        labels = {name: label for label, name in enumerate(names)}
        return [
            Sample(
                path=str(row.path),
                name=row.name,
                label=labels[row.label],
                mask=str(row.mask) if row.mask else None,
                defect_type=row.label,
                group=row.group,
                source=row.source,
                box=row.box,
                split=row.split,
            )
            for row in rows
        ]

    def _flawless_of(self, names: set[str]) -> str | None:
        if self.flawless in names or (self.flawless and self.tile):
            return self.flawless
        if self.flawless is None:
            found = sorted(name for name in names if name.lower() in FLAWLESS)
            if len(found) > 1:
                raise UserError(f"data.normal_class: {' and '.join(found)} may both be flawless; name one.")
            return found[0] if found else FLAWLESS[0] if self.tile else None  # tiles without a defect
        near = get_close_matches(self.flawless, names, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"data.normal_class: no class {self.flawless} in {some(names)}.{hint}")

    def _check_choice(self) -> None:
        if self.window and self.tile:
            raise UserError("data.window and data.tile exclude each other: set one of them.")
        for key, needs in (("window", self.window), ("tile", self.tile)):
            if needs and self.annotations is None:
                raise UserError(f"data.{key} needs data.annotations: a list with the boxes of the defects.")
            if needs and min(needs) < 1:
                raise UserError(f"data.{key} is {needs}; expected height and width of at least 1 pixel.")
        if not 0 <= self.overlap < 1:
            raise UserError(f"data.overlap is {self.overlap:g}; expected at least 0 and less than 1.")
        if self.multiple_of < 1:
            raise UserError(f"data.multiple_of is {self.multiple_of}; expected 1 or more.")
        for key, size in (("image_size", self.image_size), ("window", self.window), ("tile", self.tile)):
            if size and any(side % self.multiple_of for side in size):
                raise UserError(
                    f"data.{key} is {size[0]}x{size[1]}, which is no multiple of {self.multiple_of}; "
                    f"the nearest is {_nearest(size, self.multiple_of)}."
                )

    def _check_multiples(self, rows: Sequence[Annotation], sizes: Mapping[Path, Size]) -> None:
        """Crops that are served at their own size must have sides that are multiples of `multiple_of`."""
        if self.image_size is not None:
            return
        wrong: dict[Size, list[str]] = defaultdict(list)
        for row in rows:
            size = (row.box[3], row.box[2]) if row.box else sizes.get(row.path, (0, 0))
            if any(side % self.multiple_of for side in size):
                wrong[size].append(row.name)
        if wrong:
            lines = [
                f"  {height}x{width}: {len(names)} ({some(names)}); the nearest is "
                f"{_nearest((height, width), self.multiple_of)}"
                for (height, width), names in sorted(wrong.items())[:20]
            ]
            raise DataError(
                f"data.multiple_of is {self.multiple_of}, but these sizes, height x width, are not:\n"
                + "\n".join(lines)
                + "\nSet data.window or data.image_size, or correct the boxes."
            )


def read_folders(root: Path) -> list[Annotation]:
    """Every picture in `root/<class>` or `root/<split>/<class>`; its class is the folder's name.

    Raises:
        DataError: there is no such folder, or a class's folder has no pictures.
    """
    inside = _subfolders(root)
    if not inside:
        problem = f"{root} has no folders" if root.is_dir() else f"there is no folder {root}"
        raise DataError(
            f"data.root: {problem}. Expected a folder per class (root/good/000.png, "
            "root/scratched/000.png, ...), or a list of crops: data.annotations."
        )
    splits = [folder.name for folder in inside if folder.name.lower() in (*PRIORITY, "valid", "validation")]
    split_first = all(folder.name in PRIORITY for folder in inside)
    if splits and not split_first:
        raise DataError(
            f"data.root: {root} holds {some(folder.name for folder in inside)}, of which {some(splits)} "
            "sound like splits. Expected either a folder per class, or folders train, val and test alone, in small "
            "letters, with a folder per class in each. Rename or remove."
        )
    homes = (
        [(folder, f.name) for f in inside for folder in _subfolders(f)] if split_first else [(f, "") for f in inside]
    )
    loose = [p.name for home in (root, *inside[: len(inside) * split_first]) for p in home.iterdir() if _is_picture(p)]
    if loose:
        rank_zero_warn(f"data.root: {len(loose)} pictures stand in no class's folder and are not used ({some(loose)}).")
    rows = []
    for folder, split in homes:
        pictures = pictures_below(folder)
        if not pictures:
            raise DataError(f"{folder} has no pictures ({' '.join(sorted(SUFFIXES))}). Fill or remove it.")
        rows += [
            Annotation(path=path, name=path.relative_to(root).as_posix(), label=folder.name, split=split)
            for path in pictures
        ]
    return rows


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and not path.is_dir()


def _nearest(size: Size, multiple: int) -> str:
    """The nearest height and width that are multiples, at least one each."""
    return "x".join(str(max(1, round(side / multiple)) * multiple) for side in size)


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
