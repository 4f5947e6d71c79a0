"""MVTec AD, and every data set in its layout (Bergmann et al., CVPR 2019 and IJCV 2021).

    root/
      hazelnut/                       one folder per category; `root` may be such a folder itself
        train/good/000.png            png, jpg, bmp or tif; sizes may differ
        test/good/000.png
        test/crack/000.png            one folder per kind of defect
        ground_truth/crack/000_mask.png    (or 000.png) not 0 where the defect is
        groups.csv                    optional: path,group, the physical part behind each picture
      ...

| setting | train | test |
|---|---|---|
| `one_class` | `train/good` | `test` |
| `few_shot` | `train/good`, and the first third of each kind of defect by file order | the rest of `test` |
| `supervised` | drawn from all pictures together | drawn from all pictures together |

Validation is always carved out of the training pictures, never out of `test`. (A folder `validation` beside
`train`, as MVTec LOCO and AD 2 have, is used instead where there is one.) The few-shot third is [0, n // 3),
after Hu et al. (AnomalyDiffusion, AAAI 2024) without their one picture on both sides. Where `groups.csv`
tells that one part was photographed several times, whole parts go to training, as many as bring their number
of pictures nearest to n // 3, together with the part's pictures in other folders of `test`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from lit_defect.data.download import Archive, by_hand, fetch_archive
from lit_defect.data.images import SUFFIXES
from lit_defect.data.inspection import Problem
from lit_defect.data.module import DefectDataModule
from lit_defect.data.samples import Sample
from lit_defect.data.splits import read_groups
from lit_defect.errors import DataError, UserError

GOOD = "good"
FOLDERS = {"train": "train", "validation": "val", "test": "test"}

TREE = """\
  <category>/train/good/000.png
  <category>/test/good/000.png
  <category>/test/<kind of defect>/000.png
  <category>/ground_truth/<kind of defect>/000_mask.png"""

ARCHIVE = Archive(
    title="MVTec AD (4.9 GiB)",
    urls=(
        "https://www.mydrive.ch/shares/150996/b52ecdcbf521176e9db9c731f2304b27/download/"
        "420938113-1629960298/mvtec_anomaly_detection.tar.xz",
        "https://www.mydrive.ch/shares/38536/3830184030e49fe74747669442f0f282/download/"
        "420938113-1629952094/mvtec_anomaly_detection.tar.xz",
    ),
    algorithm="sha256",
    digest="cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d",
    licence="Creative Commons BY-NC-SA 4.0: not for commercial use; cite Bergmann et al. (2019, 2021).",
    page="https://www.mvtec.com/company/research/datasets/mvtec-ad",
    tree=TREE,
)


class MVTecAD(DefectDataModule):
    """Pictures of good and defective products in MVTec AD's layout, for one, several or all categories.

    Args:
        root: folder of the categories, or of one category itself.
        category: name of a category, a list of them, or `all` that `root` has.
        setting: `one_class`, `few_shot` or `supervised`; the table above says what trains.
        target: labels are good and defective (`binary`), good and each kind of defect (`type`), or the kinds of defect
            alone (`defects`), without the good pictures.
        download: fetch MVTec AD if `root` has no such category; its licence forbids commercial use.
        kwargs: as for `DefectDataModule`.

    Raises:
        DataError: no such folder or category, or defects in `train` under `one_class`.
    """

    def __init__(
        self,
        root: str,
        category: str | list[str] = "all",
        setting: Literal["one_class", "few_shot", "supervised"] = "one_class",
        target: Literal["binary", "type", "defects"] = "binary",
        download: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root = Path(root).expanduser().absolute()
        self.category = category
        self.setting = setting
        self.target = target
        if target == "defects" and setting == "one_class":
            raise UserError(
                "data.target=defects tells kinds of defect apart, which data.setting=one_class does not train on: set "
                "data.setting to few_shot or supervised"
            )
        self.download = download

    @property
    def class_names(self) -> list[str]:
        """`good` first (not for `defects`), then `defective` or the kinds of all chosen categories, by name."""
        if self.target == "binary":
            return [GOOD, "defective"]
        kinds = {folder.name for home in self.homes().values() for folder in _folders(home)}
        return [*([GOOD] if self.target == "type" else []), *sorted(kinds - {GOOD})]

    @property
    def normal_class(self) -> int | None:
        """The label of `good`; None where it is left out."""
        return None if self.target == "defects" else 0

    @property
    def needed_classes(self) -> list[str]:
        """Under `one_class` good pictures are enough, to train on before the first defect has come."""
        return [GOOD] if self.good_only else self.class_names

    def label_of(self, defect_type: str) -> int | None:
        """As listed in `class_names`; with `binary`, every kind of defect is defective."""
        return int(defect_type != GOOD) if self.target == "binary" else super().label_of(defect_type)

    @property
    def good_only(self) -> bool:
        """Whether the setting is `one_class`; it matters where a `split_file` of another setting is repeated."""
        return self.setting == "one_class"

    def prepare_data(self) -> None:
        """Fetches MVTec AD if asked to and needed, then does what the base class does."""
        if self.download and not self._is_there():
            fetch_archive(ARCHIVE, self.root)
        super().prepare_data()

    def homes(self) -> dict[str, Path]:
        """The chosen categories and their folders."""
        if (self.root / "train" / GOOD).is_dir():
            homes = {self.root.name: self.root}
        else:
            homes = {folder.parents[1].name: folder.parents[1] for folder in self.root.glob(f"*/train/{GOOD}")}
        if not homes:
            raise DataError(
                f"data.root: {self.root} is not in MVTec AD's layout. For MVTec AD itself set "
                f"data.download=true. {by_hand(ARCHIVE, self.root)}"
            )
        if self.category == "all":
            return dict(sorted(homes.items()))
        wanted = [self.category] if isinstance(self.category, str) else self.category
        for name in wanted:
            if name not in homes and (self.root / name).is_dir():
                raise DataError(
                    f"data.category: {self.root / name} has no folder train/{GOOD}, the good pictures to train on."
                )
            if name not in homes:
                near = get_close_matches(name, homes, 1)
                hint = f" Did you mean {near[0]}?" if near else ""
                has = ", ".join(sorted(homes))
                raise DataError(f"data.category: {self.root} has no category {name}.{hint} It has {has}.")
        if not wanted:
            raise UserError("data.category is an empty list; give names or `all`.")
        return {name: homes[name] for name in wanted}

    def find_samples(self) -> list[Sample]:
        """Every picture of the chosen categories, by name; notes masks that have no picture."""
        samples: list[Sample] = []
        for category, home in self.homes().items():
            found = self._samples_of(category, home)
            groups = home / "groups.csv"
            if groups.is_file():
                prefix = "" if home == self.root else f"{category}/"
                found = read_groups(groups, found, prefix=prefix)
            samples += found
        return samples

    def assign(self, samples: list[Sample]) -> list[Sample]:
        """The splits of the table above; see `lit_defect.data.splits` for how validation is carved."""
        if self.setting == "few_shot":
            samples = first_third(samples)
        divided = super().assign(samples)
        trained = {sample.category for sample in divided if sample.split == "train"}
        for category, home in self.homes().items():
            if category not in trained:
                raise DataError(
                    f"{home / 'train' / GOOD} has no picture that can be used, so nothing trains {category}. "
                    "Add some, or leave it out of data.category."
                )
        return divided

    def _samples_of(self, category: str, home: Path) -> list[Sample]:
        labels = {name: label for label, name in enumerate(self.class_names)}
        has_masks = self.with_masks and (home / "ground_truth").is_dir()
        if self.with_masks and not has_masks:
            raise DataError(f"data.with_masks: {home} has no folder ground_truth. Set it to false or add masks.")
        samples = []
        for folder in _folders(home):
            kind, split = folder.name, FOLDERS[folder.parent.name]
            if kind == GOOD and self.target == "defects":
                self.unused_normal |= {path.relative_to(self.root).as_posix() for path in _pictures(folder)}
                continue
            if self.setting == "one_class" and kind != GOOD and split != "test":
                raise DataError(f"{folder} holds defects, but data.setting=one_class trains on good ones only.")
            masks = _masks(home / "ground_truth" / kind) if has_masks and kind != GOOD else {}
            pictures = _pictures(folder)
            if not pictures:
                inside = folder.relative_to(self.root).as_posix()
                self.layout_problems.append(Problem(inside, "empty class", f"{folder} has no pictures"))
            for path in pictures:
                mask = None
                if has_masks and kind != GOOD:  # a mask that is not there is reported with all other faults
                    missing = home / "ground_truth" / kind / f"{path.stem}_mask.png"
                    mask = str(masks.pop(path.stem, missing))
                samples.append(
                    Sample(
                        path=str(path),
                        name=path.relative_to(self.root).as_posix(),
                        label=int(kind != GOOD) if self.target == "binary" else labels[kind],
                        mask=mask,
                        category=category,
                        defect_type=kind,
                        split="" if self.setting == "supervised" else split,
                    )
                )
            self.layout_problems += [
                Problem(str(mask.relative_to(self.root)), "mask without image", f"no picture in {folder}")
                for mask in masks.values()
            ]
        return samples

    def _is_there(self) -> bool:
        try:
            return bool(self.homes())
        except DataError:
            return False


def first_third(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with split `train` for the first n // 3 test pictures of every kind of defect, by name.

    Parts move whole: with a defect's picture go all pictures of its group. A part is taken, in the order of
    the first file of each, while that brings the kind's number of training pictures nearer to n // 3.
    """
    kinds: defaultdict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in sorted(samples, key=lambda sample: sample.name):
        if sample.split == "test" and sample.defect_type != GOOD:
            kinds[sample.category, sample.defect_type].append(sample)
    moved: set[str] = set()
    for _, members in sorted(kinds.items()):
        wanted = len(members) // 3
        parts: defaultdict[str, int] = defaultdict(int)  # part -> pictures, by first file
        for sample in members:
            parts[sample.group or sample.name] += 1
        taken = sum(number for part, number in parts.items() if part in moved)
        for part, number in parts.items():
            if part in moved:
                continue
            if abs(taken + number - wanted) >= abs(taken - wanted):
                break
            moved.add(part)
            taken += number
    return [replace(s, split="train") if (s.group or s.name) in moved else s for s in samples]


def _folders(home: Path) -> list[Path]:
    """The folders `<train, validation or test>/<kind>` below a category."""
    return [
        folder
        for split in FOLDERS
        for folder in sorted((home / split).glob("*"))
        if folder.is_dir() and not folder.name.startswith(".")
    ]


def _pictures(folder: Path) -> list[Path]:
    return [
        path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    ]


def _masks(folder: Path) -> dict[str, Path]:
    """Mask files by the stem of their picture."""
    if not folder.is_dir():
        return {}
    return {path.stem.removesuffix("_mask"): path for path in _pictures(folder)}
