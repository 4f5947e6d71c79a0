"""Pascal VOC's segmentation layout: 2012, 2007, and other data sets in it (Everingham et al., IJCV 2015).

    root/VOCdevkit/VOC2012/
      JPEGImages/2007_000032.jpg
      SegmentationClass/2007_000032.png      palette PNG: the index is the class, 255 is void
      ImageSets/Segmentation/train.txt       one name a line

Masks are (B, H, W) int64. VOC's own test masks are not public, so by default its `val` is the test split, and
validation is carved out of `train`; nothing is then selected on what is reported. A name that several image
sets contain stays in the test (or else the validation) split alone, and the overlap is reported.

SBD (Hariharan et al., ICCV 2011) adds its masks to the training split, without the names of the other splits:
with VOC 2012 that is the 10,582 pictures known as `trainaug`.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from PIL import Image

from lit_defect.data.cache import in_threads, write_whole
from lit_defect.data.download import Archive, by_hand, fetch_archive
from lit_defect.data.images import Array, Box, ImageError, read_mask
from lit_defect.data.inspection import Problem, digest
from lit_defect.data.module import DefectDataModule
from lit_defect.data.samples import Sample
from lit_defect.data.sbd import read_sbd
from lit_defect.data.splits import PRIORITY, some
from lit_defect.errors import DataError, UserError

VOID = 255
NAMELESS = "mask value without a name"
BACKGROUND = "background"
NAMES = (
    BACKGROUND, "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip

TREE = """\
  VOCdevkit/VOC{year}/JPEGImages/<name>.jpg
  VOCdevkit/VOC{year}/SegmentationClass/<name>.png
  VOCdevkit/VOC{year}/ImageSets/Segmentation/train.txt"""


def _archive(year: str, file: str, md5: str) -> Archive:
    return Archive(
        title=f"Pascal VOC {year}",
        urls=(
            f"https://thor.robots.ox.ac.uk/pascal/VOC/voc{year}/{file}",
            f"http://host.robots.ox.ac.uk/pascal/VOC/voc{year}/{file}",
        ),
        algorithm="md5",
        digest=md5,
        licence="the photographs come from flickr, whose terms of use apply; cite Everingham et al.",
        page=f"http://host.robots.ox.ac.uk/pascal/VOC/voc{year}/",
        tree=TREE.format(year=year),
    )


ARCHIVES = {
    "2012": [_archive("2012", "VOCtrainval_11-May-2012.tar", "6cd6e144f989b92b3379bac3b3de84fd")],
    "2007": [
        _archive("2007", "VOCtrainval_06-Nov-2007.tar", "c52e279531787c972589f7e41ab4ae64"),
        _archive("2007", "VOCtest_06-Nov-2007.tar", "b6e924de25625d8de591ea690078ad9f"),
    ],
}


class PascalVOC(DefectDataModule):
    """Pictures with a class for every pixel.

    The label of a sample, used to balance the splits, is the chosen class that covers most of it.

    Args:
        root: folder that holds `VOCdevkit`.
        year: `VOC<year>` is read.
        classes: names of the classes to keep as mask ids 1, 2, ...; all others become background, and
            pictures without a chosen class are left out. None keeps all classes and pictures.
        merge: the chosen classes become one, so that masks hold 0 and 1.
        void: keep 255 for pixels that no loss and no metric should count, or make them background.
        crop: `square` cuts left and right (of upright pictures: top and bottom) off to the centre square.
        image_sets: split (train, val, test) -> name of an image set; what is missing is carved or drawn.
        names: names of the mask values 0, 1, ... of another data set in this layout.
        sbd_root: folder of an unpacked SBD (with `dataset/img` and `dataset/cls`), to add to training.
        download: fetch VOC 2012 or 2007 if it is not there.
        kwargs: as for `DefectDataModule`; masks are always served.

    Raises:
        UserError: an unknown class or split, or settings that contradict each other.
        DataError: folders, lists or pictures are missing.
    """

    def __init__(
        self,
        root: str,
        year: str = "2012",
        classes: list[str] | None = None,
        merge: bool = False,
        void: Literal["ignore", "background"] = "ignore",
        crop: Literal["none", "square"] = "square",
        image_sets: dict[str, str] | None = None,
        names: list[str] | None = None,
        sbd_root: str | None = None,
        download: bool = False,
        **kwargs: Any,
    ) -> None:
        if "with_masks" in kwargs:
            raise UserError("data.with_masks: PascalVOC always serves masks; leave it out.")
        if kwargs.get("synthetic") is not None:
            raise UserError("data.synthetic: masks of generated pictures mark defects, not classes; leave it out here.")
        super().__init__(with_masks=True, **kwargs)
        self.root = Path(root).expanduser().absolute()
        self.year = year
        self.names = list(names or NAMES)
        self.classes = classes
        self.merge = merge
        self.void = void
        self.crop = crop
        self.image_sets = {"train": "train", "test": "val"} if image_sets is None else image_sets
        self.sbd_root = Path(sbd_root).expanduser().absolute() if sbd_root else None
        self.download = download
        self._check_choice()
        self._table = self._mask_table()

    @property
    def class_names(self) -> list[str]:
        """`background` (or what stands first in `names`) and the chosen classes: what labels mean."""
        return self.names if self.classes is None else [self.names[0], *self.classes]

    @property
    def mask_names(self) -> list[str]:
        """What the mask values 0, 1, ... mean; two with `merge`."""
        return [self.names[0], "+".join(self.class_names[1:])] if self.merge else self.class_names

    @property
    def needed_classes(self) -> list[str]:
        """No class is needed as a label: every picture may show something larger."""
        return []

    def prepare_data(self) -> None:
        """Fetches VOC if asked to and needed, then does what the base class does."""
        if self.download and not (self.root / "VOCdevkit" / f"VOC{self.year}").is_dir():
            for archive in ARCHIVES[self.year]:
                fetch_archive(archive, self.root)
        super().prepare_data()

    def find_samples(self) -> list[Sample]:
        """Every picture of the image sets, by split and name."""
        home = self._home()
        found: dict[str, tuple[str, Path, Path]] = {}  # name -> split, picture, mask
        pictures = {path.stem: path for path in sorted((home / "JPEGImages").iterdir())}
        for split, names in self._read_sets(home).items():
            for name in names:
                picture = pictures.get(name, home / "JPEGImages" / f"{name}.jpg")
                found[name] = (split, picture, home / "SegmentationClass" / f"{name}.png")
        self.layout_problems += [
            Problem(f"SegmentationClass/{path.name}", "mask without image", "JPEGImages has no such picture")
            for path in sorted((home / "SegmentationClass").glob("*.png"))
            if path.stem not in pictures and path.stem not in found
        ]
        if self.sbd_root is not None:
            folder = self.cache_dir / f"sbd-{digest(str(self.sbd_root)).hex()}"
            for name, (picture, mask) in read_sbd(self.sbd_root, folder, skip=found).items():
                found[name] = ("train", picture, mask)

        boxes = in_threads(self._box, [picture for _, picture, _ in found.values()])
        counts = self._count_pixels([(mask, box) for (_, _, mask), box in zip(found.values(), boxes, strict=True)])
        samples = []
        for (split, picture, mask), box, pixels in zip(found.values(), boxes, counts, strict=True):
            chosen = pixels[[self.names.index(name) for name in self.class_names[1:]]]  # (classes,)
            if nameless := np.flatnonzero(pixels[:VOID] * (self._table[:VOID] < 0)).tolist():
                text = f"{mask} holds {nameless}; data.names has {len(self.names)} names, and 255 is void"
                self.layout_problems.append(Problem(self._name(picture), NAMELESS, text))
                continue
            if self.classes is not None and pixels.any() and not chosen.any():
                continue
            samples.append(
                Sample(
                    path=str(picture),
                    name=self._name(picture),
                    label=int(chosen.argmax()) + 1 if chosen.any() else 0,
                    mask=str(mask),
                    box=box,
                    split=split,
                )
            )
        return samples

    def prepare_mask(self, values: Array, sample: Sample) -> npt.NDArray[np.int64]:
        """(H, W) palette indices -> (H, W) int64 mask ids; 255 is void."""
        return self._table[values]

    def _check_choice(self) -> None:
        for name in self.classes or []:
            if name not in self.names[1:]:
                near = get_close_matches(name, self.names[1:], 1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise UserError(f"data.classes: there is no class {name}.{hint} There are {', '.join(self.names[1:])}.")
        if self.classes is not None and len(set(self.classes)) != len(self.classes):
            raise UserError(f"data.classes names a class twice: {self.classes}.")
        if self.classes == []:
            raise UserError("data.classes is an empty list; give names, or leave it out for all classes.")
        if self.merge and self.classes is None:
            raise UserError("data.merge=true needs data.classes: the classes to make one of.")
        if not self.image_sets:
            raise UserError("data.image_sets is empty; give train, val or test and the name of a set.")
        if unknown := set(self.image_sets) - set(PRIORITY):
            raise UserError(f"data.image_sets has {some(unknown)}; expected train, val and test as keys.")
        if self.download and self.year not in ARCHIVES:
            raise UserError(f"data.download knows VOC {' and '.join(ARCHIVES)}, not {self.year}.")

    def _mask_table(self) -> npt.NDArray[np.int64]:
        """(256,) palette index -> mask id; -1 where an index has no name."""
        table = np.full(256, -1, np.int64)
        table[: len(self.names)] = np.arange(len(self.names)) if self.classes is None else 0
        for i, name in enumerate(self.classes or [], start=1):
            table[self.names.index(name)] = 1 if self.merge else i
        table[VOID] = VOID if self.void == "ignore" else 0
        return table

    def _home(self) -> Path:
        home = self.root / "VOCdevkit" / f"VOC{self.year}"
        for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
            if not (home / folder).is_dir():
                text = f"data.root: there is no folder {home / folder}."
                if self.year in ARCHIVES:
                    hint = "For Pascal VOC itself set data.download=true."
                    raise DataError(f"{text} {hint} {by_hand(ARCHIVES[self.year][0], self.root)}")
                raise DataError(f"{text} Expected in {self.root}:\n{TREE.format(year=self.year)}")
        return home

    def _read_sets(self, home: Path) -> dict[str, list[str]]:
        """Names by split; a name of several sets is left to the first of test, val and train."""
        listed = {split: _read_list(home, self.image_sets[split]) for split in PRIORITY if split in self.image_sets}
        owner: dict[str, str] = {}
        shared: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        for split, names in listed.items():
            for name in names:
                if owner.setdefault(name, split) != split:
                    shared[owner[name], split].append(name)
        for (first, second), names in shared.items():
            rank_zero_warn(
                f"data.image_sets: {len(names)} names stand both in {self.image_sets[first]} ({first}) and "
                f"{self.image_sets[second]} ({second}): {some(names)}. They are used in {first} only."
            )
        kept = {split: [name for name in names if owner[name] == split] for split, names in listed.items()}
        for split, names in kept.items():
            if not names:
                raise DataError(
                    f"data.image_sets: nothing is left of {self.image_sets[split]} for {split}; its names "
                    f"stand in another split. Leave {split} out, and it is carved out of training."
                )
        return kept

    def _box(self, picture: Path) -> Box | None:
        """The centre square, or None: it is square, or unreadable, which inspection will tell."""
        if self.crop == "none":
            return None
        try:
            with Image.open(picture) as opened:
                width, height = opened.size
        except OSError:
            return None
        side = min(width, height)
        return None if width == height else ((width - side) // 2, (height - side) // 2, side, side)

    def _count_pixels(self, masks: list[tuple[Path, Box | None]]) -> npt.NDArray[np.int64]:
        """(N, 256) pixels of each value in each mask, remembered in `cache_dir`; zeros if unreadable."""
        entries = [(str(path), path.exists() and path.stat().st_mtime_ns, box) for path, box in masks]
        file = self.cache_dir / f"mask-values-{digest(entries).hex()}.npy"
        try:
            known = np.load(file, allow_pickle=False)
            if known.shape == (len(masks), 256):
                return known
        except (OSError, ValueError, EOFError):
            pass

        def count(entry: tuple[Path, Box | None]) -> npt.NDArray[np.int64]:
            path, box = entry
            try:
                return np.bincount(read_mask(path, box=box).ravel(), minlength=256)
            except ImageError:
                return np.zeros(256, np.int64)

        counts = np.array(in_threads(count, masks), np.int64).reshape(-1, 256)
        with suppress(DataError):  # without write access to the folder it is counted anew each time
            write_whole(file, lambda stream: np.save(stream, counts))
        return counts

    def _name(self, picture: Path) -> str:
        inside = picture.is_relative_to(self.root)
        return picture.relative_to(self.root).as_posix() if inside else f"SBD/{picture.name}"


def _read_list(home: Path, image_set: str) -> list[str]:
    """The names of an image set, in its order, each once; what follows a name in its line is not read."""
    folder = home / "ImageSets" / "Segmentation"
    file = folder / f"{image_set}.txt"
    if not file.is_file():
        there = some(path.stem for path in folder.glob("*.txt"))
        raise DataError(f"data.image_sets: there is no image set {image_set} in {folder}; it has {there}.")
    names = [line.split()[0] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    for name in names:
        if Path(name).name != name or name == "..":
            raise DataError(f"{file}: '{name}' is not the name of a picture in JPEGImages.")
    return list(dict.fromkeys(names))
