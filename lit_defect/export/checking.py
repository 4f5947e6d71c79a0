"""An exported model against the task in PyTorch, and against what its run has said, picture by picture.

The task sees a picture as in `predict`: decoded and scaled by the functions of the data modules, then its own
`for_factory`. The exported model sees the decoded bytes alone.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lit_defect.data.images import SUFFIXES, Box, read_image, read_mask, resize_image
from lit_defect.errors import DataError, UserError
from lit_defect.export.factory import Batch
from lit_defect.export.files import Pixels, Run
from lit_defect.export.intake import Size
from lit_defect.export.opening import Opened
from lit_defect.tasks.mask_files import MASKS

Arrays = dict[str, npt.NDArray[Any]]

_PIXELS = 0.999  # share of a mask's pixels that must be equal: two classes may be as probable but for rounding


class Picture(NamedTuple):
    """A picture to check with, and what the run has said of it."""

    name: str
    pixels: Pixels  # (H, W, 3)
    said: Mapping[str, str] | None = None  # its line in the run's predictions


# --- pictures ---


def pictures_for(opened: Opened, wanted: str, size: Size | None) -> tuple[str, list[Picture]]:
    """What is checked on: where the pictures come from, and the pictures.

    Args:
        opened: the run.
        wanted: how many of the run's own test pictures (else of generated ones), or a folder of pictures.
        size: that the exported model takes; pictures of other sizes are scaled to it, and the run has said
            nothing of those.

    Raises:
        UserError: neither a number nor a folder with pictures.
    """
    if wanted.isdigit() and (count := int(wanted)):
        origin, found = "test pictures of the run", list(_of_run(opened, count))
        if not found:
            origin, found = "generated pictures, since none of the run's can be reached", list(_drawn(count, size))
    else:
        folder = Path(wanted).expanduser()
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES) if folder.is_dir() else []
        if not files:
            raise UserError(f"--check {wanted}: expected a number of pictures, at least 1, or a folder of pictures")
        said = {line["path"]: line for line in _lines(opened)}
        origin = f"pictures in {folder.name}"
        found = [Picture(str(file), _read(opened, file), said.get(str(file.resolve()))) for file in files]
    return origin, [_fitted(picture, size) for picture in found]


def _of_run(opened: Opened, count: int) -> Iterator[Picture]:
    """Pictures of the run's own predictions that are still there, spread evenly over them."""
    lines = [line for line in _lines(opened) if Path(line["path"]).is_file() and not line["name"].endswith("#mirrored")]
    for place in np.unique(np.linspace(0, len(lines) - 1, min(count, len(lines))).round().astype(int)):
        line = lines[place]
        try:
            yield Picture(line["name"], _read(opened, Path(line["path"]), _box(line["name"])), line)
        except DataError:  # the file has changed since
            continue


def _lines(opened: Opened) -> list[dict[str, str]]:
    """The run's predictions, of its test or else of its last `predict`."""
    for stage in ("test", "predict"):
        file = opened.run.path / f"{stage}_predictions.csv"
        if file.is_file():
            with file.open(newline="", encoding="utf-8") as lines:
                return list(csv.DictReader(lines))
    return []


def _box(name: str) -> Box | None:
    """The window of a crop, which is in its name."""
    _, _, window = name.partition("#")
    numbers = [int(word) for word in window.split("#")[0].split(",") if word.isdigit()]
    return (numbers[0], numbers[1], numbers[2], numbers[3]) if len(numbers) == 4 else None


def _read(opened: Opened, file: Path, box: Box | None = None) -> Pixels:
    return read_image(file, box=box, convert=opened.converts)


def _drawn(count: int, size: Size | None) -> Iterator[Picture]:
    """Noise on soft shades, of odd sizes, the same at each call."""
    rng = np.random.default_rng(0)
    for number in range(count):
        height, width = size or rng.integers(40, 400, 2).tolist()
        shades = resize_image(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8), (height, width))
        pixels = np.clip(shades + rng.normal(0, 12, shades.shape), 0, 255).astype(np.uint8)
        yield Picture(f"generated {number}", pixels)


def _fitted(picture: Picture, size: Size | None) -> Picture:
    if size is None or picture.pixels.shape[:2] == size:
        return picture
    return Picture(picture.name, resize_image(picture.pixels, size))


# --- comparison ---


@dataclass
class Comparison:
    """What was found so far.

    Attributes:
        tolerance: difference that is allowed, as a share of 1 or of an answer's largest value where that is more.
        threshold: of the score; None where it is unknown.
        difference: the largest so far of each answer that is a number.
        equal, compared: decisions (one for each pixel of a mask), by answer.
        wrong: pictures that differ by more than is allowed, with the reason.
        seconds: spent on the pictures one by one.
    """

    tolerance: float
    threshold: float | None
    difference: dict[str, float] = field(default_factory=dict)
    equal: dict[str, int] = field(default_factory=dict)
    compared: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, name: str, expected: Arrays, found: Arrays) -> None:
        """Compare the answers to one picture, each (1, ...)."""
        for key, value in expected.items():
            got = found[key]
            if got.shape != value.shape:
                self.wrong.append(f"{name}: {key} has the shape {got.shape}, expected {value.shape}")
            elif value.dtype.kind == "f":
                self._add_number(name, key, value, got)
            else:
                self._add_decision(name, key, value, got, expected.get("score"))

    def _add_number(self, name: str, key: str, value: npt.NDArray[Any], got: npt.NDArray[Any]) -> None:
        off = float(np.abs(value.astype(np.float64) - got).max())
        self.difference[key] = max(self.difference.get(key, 0.0), off)
        if not off <= self.tolerance * max(1.0, float(np.abs(value).max())):  # nan, too, is wrong
            self.wrong.append(f"{name}: {key} differs by {off:.3g}")

    def _add_decision(
        self, name: str, key: str, value: npt.NDArray[Any], got: npt.NDArray[Any], score: npt.NDArray[Any] | None
    ) -> None:
        equal = int((value == got).sum())
        self.equal[key] = self.equal.get(key, 0) + equal
        self.compared[key] = self.compared.get(key, 0) + value.size
        if key == "defective" and score is not None and self.threshold is not None:
            reach = self.tolerance * max(1.0, abs(self.threshold))
            if abs(float(score[0]) - self.threshold) <= reach:
                return  # either decision is right
        if equal < (_PIXELS if value.ndim > 1 else 1) * value.size:
            self.wrong.append(f"{name}: {key} is decided otherwise")

    def equal_decisions(self) -> float | None:
        """Share of all decisions; None where there are none."""
        return sum(self.equal.values()) / sum(self.compared.values()) if self.compared else None

    def as_dict(self) -> dict[str, Any]:
        """For `model.json`; the same each time, so without the times."""
        return {"largest_difference": self.difference, "equal_decisions": self.equal_decisions()}


@torch.no_grad()
def by_task(opened: Opened, pixels: Pixels, outputs: tuple[str, ...]) -> Arrays:
    """What the task itself answers to a picture (H, W, 3), each (1, ...)."""
    height, width = pixels.shape[:2]
    scaled = pixels if opened.data_size is None else resize_image(pixels, opened.data_size)
    images = torch.from_numpy(scaled.copy()).permute(2, 0, 1)[None].contiguous()
    said = opened.task.for_factory(images, (height, width))
    return {name: said[name].numpy() for name in outputs}


def compare(
    opened: Opened, run: Run, pictures: list[Picture], outputs: tuple[str, ...], batch: Batch, tolerance: float
) -> tuple[Comparison, Comparison]:
    """An exported model, picture by picture: against the task, and against what the run has said.

    Where it takes any number of pictures, the last one goes through once more in a batch with its mirror images.
    """
    threshold = opened.task.factory_facts().get("threshold")
    by_now, by_then = Comparison(tolerance, threshold), Comparison(tolerance, threshold)
    count = 1 if batch == "dynamic" else batch
    for picture in pictures:
        since = time.perf_counter()
        found = run(np.repeat(picture.pixels[None], count, axis=0))
        by_now.seconds += (time.perf_counter() - since) / count
        by_now.add(picture.name, by_task(opened, picture.pixels, outputs), _row(found, count - 1))
        if picture.said is not None:
            said = _said(opened, picture, found)
            by_then.add(picture.name, said, {key: found[key][:1] for key in said})
    if batch == "dynamic":
        pixels = pictures[-1].pixels
        images = np.stack([pixels, pixels[::-1], pixels[:, ::-1]])
        found = run(images)
        for number, image in enumerate(images):
            by_now.add(f"{pictures[-1].name} in a batch", by_task(opened, image, outputs), _row(found, number))
    return by_now, by_then


def _row(found: Arrays, number: int) -> Arrays:
    return {name: value[number : number + 1] for name, value in found.items()}


def _said(opened: Opened, picture: Picture, found: Arrays) -> Arrays:
    """What the run's files say of a picture, as far as the exported model says it, too; each (1, ...)."""
    line, classes = picture.said or {}, opened.task.factory_facts()["class_names"]
    said: Arrays = {}
    if all(f"p({name})" in line for name in classes):
        said["probabilities"] = np.array([[float(line[f"p({name})"]) for name in classes]], np.float32)
    elif "score" in found and line.get("score"):
        said["score"] = np.array([float(line["score"])], np.float32)
    decision = "predicted" if "predicted" in found else "defective"
    if decision in found and line.get("prediction") in classes:
        said[decision] = np.array([classes.index(line["prediction"])]).astype(found[decision].dtype)
    mask = opened.run.path / MASKS / f"{line.get('name')}.png"
    if "mask" in found and mask.is_file():
        said["mask"] = read_mask(mask)[None]
    return said
