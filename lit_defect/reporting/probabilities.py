"""Probability maps on disk: what a segmentation network, of this framework or of any other program, says of pictures.

A folder holds one file per picture and a header that says what the channels are:

    probabilities.json            {"format": "lit_defect probability maps", "version": 1,
                                   "class_names": ["background", "crack"]}
    test/crack/000.png.npy        the picture's name in the data set, with its folders and suffix, and .npy
    test/crack/001.png.npz        or .npz with one array in it

An array is (C, H, W): channel c is the probability of class c at each pixel of the picture, as the data set crops and
scales it.

    float16, float32, float64     probabilities that add up to 1 over the channels
    uint8, uint16                 probability = value / 255 or value / 65535

Where there are two classes, (H, W) will do: the probability of the second one. Sums may be off by 0.01, and by half a
level per channel in integers; `read` takes that out.
"""

from __future__ import annotations

import json
import threading
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lit_defect.errors import UserError
from lit_defect.files import whole_file

Probabilities = NDArray[np.float32]
Size = tuple[int, int]

HEADER = "probabilities.json"
FORMAT = "lit_defect probability maps"
VERSION = 1
TOLERANCE = 0.01  # of a sum
_ROUNDING = 0.001  # how far below 0 a program may round a probability
_NAMED = 5  # pictures of each problem that a message names
# numpy parses a header as Python does, which fails in threads at times before 3.11.8 (python/cpython#106905).
_PARSER = threading.Lock()
_UNREADABLE = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile)


class _MapError(Exception):
    """What is wrong with one file: the kind of problem, and what was found."""

    def __init__(self, kind: str, found: str = "") -> None:
        self.kind, self.found = kind, found


def write_header(folder: Path, class_names: Sequence[str]) -> Path:
    """Say in `folder` what the channels of its maps are; gives the file."""
    header = {"format": FORMAT, "version": VERSION, "class_names": list(class_names)}
    path = Path(folder) / HEADER
    with whole_file(path) as file:
        file.write((json.dumps(header, indent=2, ensure_ascii=False) + "\n").encode())
    return path


def write_probabilities(folder: Path, name: str, probabilities: ArrayLike) -> Path:
    """Write the map of one picture as float16, so that a reader sees the whole file or none.

    Args:
        folder: of the maps; `write_header` completes it.
        name: of the picture in the data set, with its folders and suffix.
        probabilities: (C, H, W), adding up to 1 over C.

    Returns:
        The file. float16 keeps probabilities to a relative error of 2^-11, tiny ones to 3e-8.

    Raises:
        UserError: not probabilities, as of a training that diverged; or a name that leads out of the folder.
        ValueError: not (C, H, W).
    """
    values = np.asarray(probabilities)
    if values.ndim != 3 or len(values) < 2 or not values.size:
        raise ValueError(f"expected probabilities of shape (C, H, W) with C > 1, not {values.shape}")
    path = _file(Path(folder), name, ".npy")
    try:
        _check_values(values)
    except _MapError as misfit:
        raise UserError(f"{path}: {misfit.kind} {misfit.found}".rstrip()) from None
    with whole_file(path) as file:
        np.save(file, values.astype(np.float16), allow_pickle=False)
    return path


class ProbabilityMaps:
    """The maps of a folder, for pictures by their names.

    Args:
        folder: with the header and the maps; see the module's docstring.
        class_names: what the classes 0, 1, ... of the data set are called.

    Raises:
        UserError: no folder or header, or a header of other classes.
    """

    def __init__(self, folder: Path | str, class_names: Sequence[str]) -> None:
        self.folder = Path(folder).expanduser()
        self.class_names = list(class_names)
        self._check_header()

    def read(self, name: str) -> Probabilities:
        """The map of a picture: (C, H, W) float32 that add up to 1.

        Raises:
            UserError: there is no such map, or it is none.
        """
        try:
            return self._read(name)
        except _MapError as misfit:
            raise UserError(f"{self.folder}: the probability map of {name}: {misfit.kind} {misfit.found}") from None

    def check(self, names: Sequence[str], sizes: Sequence[Size] | None = None) -> None:
        """Read every map once, before anything is computed with them.

        Args:
            names: of the pictures.
            sizes: (H, W) that each map must have; any when not given.

        Raises:
            UserError: all that is wrong with the maps, by kind, in one message.
        """

        def problem(position: int) -> _MapError | None:
            try:
                found = self._read(names[position]).shape[1:]
            except _MapError as misfit:
                return misfit
            expected = None if sizes is None else tuple(sizes[position])
            if expected in (None, found):
                return None
            return _MapError("another size than the picture", f"({_by(found)}; expected {_by(expected)} as HxW)")

        with ThreadPoolExecutor() as pool:
            problems = list(pool.map(problem, range(len(names))))
        kinds: defaultdict[str, list[str]] = defaultdict(list)
        for name, misfit in zip(names, problems, strict=True):
            if misfit is not None:
                kinds[misfit.kind].append(f"{name} {misfit.found}".rstrip())
        if kinds:
            lines = [f"  {kind}: {_listed(found, len(names))}" for kind, found in kinds.items()]
            raise UserError(
                "\n".join([f"{self.folder} does not hold a probability map for every picture:", *lines, _format_hint()])
            )

    def _read(self, name: str) -> Probabilities:
        values = self._load(name)
        classes = len(self.class_names)
        shape = " x ".join(map(str, values.shape))
        full = values.ndim == 3 and len(values) == classes
        if not (full or (values.ndim == 2 and classes == 2)):
            raise _MapError(f"not of {classes} classes", f"({shape} instead of {classes} x height x width)")
        if not values.size:
            raise _MapError("empty", f"({shape})")
        _check_values(values)
        scaled = values.astype(np.float32) / _full_scale(values)
        scaled = np.clip(scaled if full else np.stack([1 - scaled, scaled]), 0, None)
        return scaled / scaled.sum(axis=0, keepdims=True)

    def _load(self, name: str) -> NDArray[Any]:
        """The array of a picture's file, as it is stored."""
        files = [_file(self.folder, name, suffix) for suffix in (".npy", ".npz")]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise _MapError("no file", f"({name}.npy or .npz)")
        try:
            with _PARSER:
                stored = np.load(file, allow_pickle=False)
                if isinstance(stored, np.ndarray):
                    return stored
                with stored:
                    if len(stored.files) != 1:
                        raise _MapError("not one array in the .npz", f"(it has {', '.join(stored.files) or 'none'})")
                    return stored[stored.files[0]]
        except _UNREADABLE as error:
            raise _MapError("unreadable", f"({error})") from None

    def _check_header(self) -> None:
        path = self.folder / HEADER
        if not path.is_file():
            what = f"no {HEADER} in it" if self.folder.is_dir() else "no such folder"
            raise UserError(
                f"{self.folder}: there is {what}, which says what the maps' channels are.\n{_format_hint()}"
            )
        try:
            header = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}).\n{_format_hint()}") from None
        if not isinstance(header, dict) or header.get("format") != FORMAT or header.get("version") != VERSION:
            raise UserError(f"{path} is not the header of such maps.\n{_format_hint()}")
        stored = header.get("class_names")
        if stored != self.class_names:
            names = ", ".join(map(str, stored)) if isinstance(stored, list) else repr(stored)
            raise UserError(
                f"{path}: the maps are of the classes {names}; the data set has {', '.join(self.class_names)}, in this "
                "order. Choose the same classes in data, or write the maps for these."
            )


def _check_values(values: NDArray[Any]) -> None:
    """Raises `_MapError` if an array (C, H, W), or (H, W) of the second class, holds no probabilities."""
    full_scale = _full_scale(values)
    if not np.isfinite(values).all():
        raise _MapError("nan or infinity")
    low, high = values.min() / full_scale, values.max() / full_scale
    if low < -_ROUNDING or high > 1 + TOLERANCE:
        raise _MapError("values that are no probabilities", f"(from {low:.4g} to {high:.4g})")
    if values.ndim == 3:
        sums = values.sum(axis=0, dtype=np.float64) / full_scale
        worst = float(sums.flat[np.abs(sums - 1).argmax()])
        if abs(worst - 1) > TOLERANCE + (0.5 * len(values) / full_scale if full_scale > 1 else 0):
            raise _MapError("classes that do not add up to 1", f"(to {worst:.4g} at the worst pixel)")


def _full_scale(values: NDArray[Any]) -> float:
    """The value that stands for the probability 1."""
    if values.dtype in (np.uint8, np.uint16):
        return float(np.iinfo(values.dtype).max)
    if values.dtype.kind == "f" and values.dtype.itemsize <= 8:
        return 1.0
    raise _MapError("another type than float16, float32, float64, uint8 or uint16", f"({values.dtype})")


def _file(folder: Path, name: str, suffix: str) -> Path:
    parts = PurePosixPath(name).parts
    if not parts or parts[0] == "/" or ".." in parts:
        raise UserError(f"the picture's name {name!r} leads out of the folder {folder}")
    return folder.joinpath(*parts[:-1], parts[-1] + suffix)


def _by(size: Sequence[int] | None) -> str:
    return "x".join(map(str, size or ()))


def _listed(found: list[str], total: int) -> str:
    shown = ", ".join(found[:_NAMED])
    return f"{len(found)} of {total}: {shown}" + (f" and {len(found) - _NAMED} more" if len(found) > _NAMED else "")


def _format_hint() -> str:
    return (
        f'Expected are a file {HEADER}, {{"format": "{FORMAT}", "version": {VERSION}, "class_names": [...]}}, and for '
        "each picture PICTURE.npy, named with its folders and suffix as in a run's splits.csv, of shape "
        "(classes, height, width): float that adds up to 1, or uint8 or uint16 whose largest value is probability 1."
    )
