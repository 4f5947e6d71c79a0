"""Tiny data sets in every layout that `lit_defect.data` reads, written to a temporary folder.

A good part is a grey, grainy surface. A defect is a patch much brighter or much darker than it (one
shade per kind of defect), so a small network learns the classes in a few steps. No two parts look
alike, and the same arguments always give the same bytes.

    make_mvtec(tmp_path, defects={"crack": 6, "hole": 6})
    make_voc(tmp_path, images={"train": 4, "val": 2})
    make_crops_folder(tmp_path, classes={"good": 8, "broken": 8})
    make_crops_csv(tmp_path, photographs=4)
    make_elpv(tmp_path, cells=24); monkeypatch.syspath_prepend(tmp_path)
"""

from __future__ import annotations

import base64
import csv
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SHADES = (250, 10, 190, 60, 225, 35)  # brightness of the first, second, ... kind of defect

Box = tuple[int, int, int, int]  # x, y, width, height


def surface(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A flawless part: soft random waves and grain around middle grey. (H, W) uint8."""
    height, width = size
    y, x = np.mgrid[:height, :width] / max(size)
    waves = np.zeros(size)
    for _ in range(3):
        fy, fx, phase = rng.uniform(1, 4), rng.uniform(1, 4), rng.uniform(0, 2 * np.pi)
        waves += np.sin(2 * np.pi * (fy * y + fx * x) + phase)
    grain = rng.normal(0, 4, size)
    return np.clip(120 + 8 * waves + grain, 0, 255).astype(np.uint8)


def damage(rng: np.random.Generator, part: np.ndarray, kind: int) -> tuple[np.ndarray, np.ndarray]:
    """`part` with one rectangular defect of a kind, and its mask (0, 255). Both (H, W) uint8."""
    height, width = part.shape
    h, w = max(2, height // 3), max(2, width // 3)
    top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
    mask = np.zeros_like(part)
    mask[top : top + h, left : left + w] = 255
    return np.where(mask > 0, np.uint8(SHADES[kind % len(SHADES)]), part), mask


def save(array: np.ndarray, path: Path) -> None:
    """Writes the array as a picture, in the format that the file's name asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, quality=95)  # PNG and BMP take no notice of the quality


def make_mvtec(
    root: Path,
    *,
    categories: Sequence[str] = ("tile",),
    train_good: int = 12,
    test_good: int = 6,
    defects: Mapping[str, int] | None = None,
    size: tuple[int, int] = (32, 40),
    suffix: str = ".png",
    shots_per_part: int = 0,
    itself: bool = False,
    seed: int = 0,
) -> Path:
    """MVTec AD's layout under `root/<category>`, or in `root` itself with `itself=True` (one category).

    `size` is (height, width). With `shots_per_part` every so many consecutive pictures of a folder show
    the same part at another brightness, and `groups.csv` says so. Default defects: 6 crack, 6 hole.
    Returns `root`.
    """
    defects = {"crack": 6, "hole": 6} if defects is None else defects
    folders = [("train", "good", train_good), ("test", "good", test_good)]
    folders += [("test", kind, count) for kind, count in defects.items()]
    for number, category in enumerate(categories):
        home = root if itself else root / category
        rng = np.random.default_rng([seed, number])
        groups: list[tuple[str, str]] = []
        for split, kind, count in folders:
            picture, mask = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
            for i in range(count):
                shot = i % shots_per_part if shots_per_part else 0
                if shot == 0:  # a new part in front of the camera
                    picture = surface(rng, size)
                    if kind != "good":
                        picture, mask = damage(rng, picture, list(defects).index(kind))
                exposed = (picture * (1 - 0.15 * shot)).astype(np.uint8)
                save(exposed, home / split / kind / f"{i:03d}{suffix}")
                if kind != "good":
                    save(mask, home / "ground_truth" / kind / f"{i:03d}_mask.png")
                if shots_per_part:
                    part = f"{split}-{kind}-{i // shots_per_part}"
                    groups.append((f"{split}/{kind}/{i:03d}{suffix}", part))
        if groups:
            write_rows(home / "groups.csv", ("path", "group"), groups)
    return root


def make_voc(
    root: Path,
    *,
    year: str = "2012",
    images: Mapping[str, int] | None = None,
    classes: Sequence[int] = (3, 8),
    size: tuple[int, int] = (32, 48),
    seed: int = 0,
) -> Path:
    """`root/VOCdevkit/VOC<year>`: each picture holds one object of one of the class ids, in turn.

    Objects lie inside the centre square and have a one-pixel border of void (255), as VOC's have. Masks are
    palette PNGs. `images` maps image sets to counts (default 8 train, 4 val). Returns `root`.
    """
    images = {"train": 8, "val": 4} if images is None else images
    rng = np.random.default_rng(seed)
    home = root / "VOCdevkit" / f"VOC{year}"
    side, height, width = min(size), *size
    palette = [value for i in range(256) for value in (i, 255 - i, (i * 37) % 256)]
    number = 0
    for image_set, count in images.items():
        names = []
        for _ in range(count):
            kind = number % len(classes)
            x0, y0 = (width - side) // 2, (height - side) // 2
            part = surface(rng, size)
            _, inside = damage(rng, part[y0 : y0 + side, x0 : x0 + side], kind)
            grown = np.zeros(size, bool)
            grown[y0 : y0 + side, x0 : x0 + side] = inside > 0
            core = grown.copy()
            for axis in (0, 1):  # erode by one pixel: the rim becomes void
                core &= np.roll(grown, 1, axis) & np.roll(grown, -1, axis)
            picture = np.stack([np.where(grown, SHADES[kind % len(SHADES)], part)] * 3, axis=-1)
            mask = np.where(core, classes[kind], np.where(grown, 255, 0)).astype(np.uint8)
            name = f"{year}_{number:06d}"
            save(picture.astype(np.uint8), home / "JPEGImages" / f"{name}.jpg")
            indexed = Image.fromarray(mask)
            indexed.putpalette(palette)
            (home / "SegmentationClass").mkdir(parents=True, exist_ok=True)
            indexed.save(home / "SegmentationClass" / f"{name}.png")
            names.append(name)
            number += 1
        lists = home / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{image_set}.txt").write_text("\n".join(names) + "\n")
    return root


def make_crops_folder(
    root: Path,
    *,
    classes: Mapping[str, int] | None = None,
    splits: Sequence[str] = (),
    size: tuple[int, int] = (32, 32),
    suffix: str = ".png",
    seed: int = 0,
) -> Path:
    """A folder per class under `root`, or under `root/<split>` for each of `splits`. Returns `root`.

    Default: 12 good and 12 defective pictures (in each split). Classes named good or ok are flawless.
    """
    classes = {"good": 12, "defective": 12} if classes is None else classes
    rng = np.random.default_rng(seed)
    for split in splits or ("",):
        kind = 0
        for name, count in classes.items():
            flawless = name.lower() in {"good", "ok"}
            for i in range(count):
                picture = surface(rng, size)
                if not flawless:
                    picture, _ = damage(rng, picture, kind)
                save(np.stack([picture] * 3, -1), root / split / name / f"{i:03d}{suffix}")
            kind += not flawless
    return root


def make_crops_csv(
    root: Path,
    *,
    photographs: int = 8,
    size: tuple[int, int] = (64, 96),
    crop: tuple[int, int] = (24, 24),
    masks: bool = False,
    seed: int = 0,
) -> Path:
    """Large photographs in `root/photos` and `root/crops.csv` with two crops of each: good and defective.

    `size` and `crop` are (height, width); the good crop lies left, the defective one right.
    With `masks`, `root/masks` holds a mask of each whole photograph. Returns the CSV's path.
    """
    rng = np.random.default_rng(seed)
    rows: list[tuple[object, ...]] = []
    (height, width), (h, w) = size, crop
    for i in range(photographs):
        photo, mask = surface(rng, size), np.zeros(size, np.uint8)
        left = [int(rng.integers(0, width // 2 - w + 1)), int(rng.integers(width // 2, width - w + 1))]
        top = [int(rng.integers(0, height - h + 1)) for _ in range(2)]
        bad = (slice(top[1], top[1] + h), slice(left[1], left[1] + w))
        photo[bad], mask[bad] = damage(rng, photo[bad], 0)
        save(photo, root / "photos" / f"{i:03d}.png")
        if masks:
            save(mask, root / "masks" / f"{i:03d}.png")
        for label, x, y in zip(("good", "defective"), left, top, strict=True):
            row = (f"photos/{i:03d}.png", x, y, w, h, label)
            rows.append((*row, f"masks/{i:03d}.png" if label == "defective" else "") if masks else row)
    header = ("path", "x", "y", "width", "height", "label", *(("mask",) if masks else ()))
    return write_rows(root / "crops.csv", header, rows)


def make_elpv(site: Path, *, cells: int = 32, size: tuple[int, int] = (32, 32), seed: int = 0) -> Path:
    """The pip package `elpv-dataset` (installed files and metadata) in `site`, with `cells` tiny pictures.

    Grades 0, 1/3, 2/3, 1 and types mono, poly take turns; the higher the grade, the brighter the patch.
    Put `site` first on `sys.path` (`monkeypatch.syspath_prepend(site)`) to hide the real package.
    The package's code raises when it is imported: the data module is to read its files only. Returns `site`.
    """
    rng = np.random.default_rng(seed)
    package, lines = site / "elpv_dataset", []
    for i in range(cells):
        grade, kind = i % 4, ("mono", "poly")[i // 4 % 2]
        part = surface(rng, size)
        worn, mask = damage(rng, part, 0)
        mixed = part + (worn.astype(float) - part) * (mask > 0) * grade / 3
        save(mixed.astype(np.uint8), package / "data" / "images" / f"cell{i + 1:04d}.png")
        probability = ("0.0", "0.3333333333333333", "0.6666666666666666", "1.0")[grade]
        lines.append(f"images/cell{i + 1:04d}.png  {probability:<18}  {kind}")
    (package / "data" / "labels.csv").write_text("\n".join(lines) + "\n")
    (package / "__init__.py").write_text("raise ImportError('the data module must not import this code')\n")

    info = site / "elpv_dataset-1.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elpv-dataset\nVersion: 1.0.0\n")
    record = [f"{info.name}/METADATA,,", f"{info.name}/RECORD,,"]
    for file in sorted(package.rglob("*.*")):
        content = file.read_bytes()
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record.append(f"{file.relative_to(site).as_posix()},sha256={digest},{len(content)}")
    (info / "RECORD").write_text("\n".join(record) + "\n")
    return site


def write_rows(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    """Writes a CSV file and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def without_times(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows of a `metrics.csv` without how long a step took, which no two runs have in common."""
    kept = [{key: value for key, value in row.items() if not key.startswith(("time/", "memory/"))} for row in rows]
    return [row for row in kept if any(value for key, value in row.items() if key not in ("epoch", "step"))]
