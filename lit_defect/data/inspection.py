"""Look at every file before the first step of training, and say everything that is wrong at once.

Each picture is decoded once, in threads. What was seen (size, grey or colour, perceptual code; for masks the
size and whether anything is marked) is remembered in the cache folder under the file's path, length and
modification time, so that the next start only asks the disk for those. Files with a problem are looked at
anew each time.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from lit_defect.data.cache import in_threads, write_whole
from lit_defect.data.images import (
    SUFFIXES,
    Array,
    Box,
    ImageError,
    MissingFileError,
    crop,
    read_mask,
    read_pixels,
)
from lit_defect.data.leakage import LOW, perceptual_code
from lit_defect.data.samples import Sample
from lit_defect.errors import DataError

CACHE_VERSION = 1  # to be raised when what is remembered on disk is computed in another way
CODED = 128  # pixels a side that a perceptual code is computed from
SHOWN = 20  # files listed for each kind of problem

REMEDIES = {
    "missing": "restore the files or take them out of the list",
    "unreadable": "replace the files; they are not pictures in a format that Pillow reads",
    "truncated": "copy or download the files again; they end too early",
    "wrong mode": "save as 8-bit grey or RGB, upright and opaque, or set data.on_wrong_mode=convert",
    "too large": "cut the pictures into parts",
    "empty class": "fill the folders or remove them",
    "box outside the picture": "correct the boxes; they are x, y, width, height in pixels of the picture",
    "duplicated": "list each picture (and box) once",
    "mask missing": "restore the masks, or set data.with_masks=false if no mask is needed",
    "mask unreadable": "replace the masks with upright 8-bit, one-channel PNG, BMP or TIFF files",
    "mask of another size": "give each mask the size of its picture",
    "mask without image": "restore the pictures or delete the masks",
    "empty mask": "mark the defect, or move the picture to the good ones",
}


class Problem(NamedTuple):
    """What is wrong with one sample: its name, the kind (a key of `REMEDIES`), and the details."""

    name: str
    kind: str
    text: str


class Seen(NamedTuple):
    """What is known about a picture or mask: full size, grey (or: something is marked), code of the crop."""

    height: int
    width: int
    flag: bool
    code: npt.NDArray[np.float32] | None


class Stamp(NamedTuple):
    """Length in bytes and modification time: a file with the same stamp has not changed."""

    length: int
    mtime_ns: int


@dataclass(frozen=True)
class CheckResult:
    """The samples that can be used, in their order, and what was seen of each.

    Attributes:
        shapes: (height, width) of each sample, after its crop.
        grey: whether the sample's picture has one channel.
        codes: (N, 144) float32 perceptual codes, not mirrored.
        stamps: of every picture and mask, by path.
        problems: of the samples that were left out.
    """

    samples: list[Sample]
    shapes: list[tuple[int, int]]
    grey: list[bool]
    codes: npt.NDArray[np.float32]
    stamps: Mapping[str, Stamp]
    problems: list[Problem]


def check(
    samples: Sequence[Sample],
    *,
    class_names: Sequence[str] = (),
    normal_class: int | None = None,
    with_masks: bool = False,
    problems: Iterable[Problem] = (),
    on_bad_file: Literal["error", "skip"] = "error",
    on_wrong_mode: Literal["error", "convert"] = "error",
    cache_dir: Path | None = None,
) -> CheckResult:
    """Looks at every picture (and mask, if `with_masks`) of the samples.

    Args:
        class_names: each of these needs a sample; empty asks for none.
        normal_class: label of the good class; with `with_masks`, any other class needs a mask that marks something.
        problems: what the layout's own reader has found, such as a mask without image.
        on_bad_file: `skip` leaves out the samples that have a problem.
        cache_dir: where to remember what was seen; None remembers nothing.

    Raises:
        DataError: there is a problem (`on_bad_file="error"`; all are listed), nothing is left, or a class has
            no samples.
    """
    convert = on_wrong_mode == "convert"
    stamps = _stamps(path for s in samples for path in (s.path, s.mask if with_masks else None) if path)
    memory = Memory.open(cache_dir, samples)
    pictures = memory.look("convert" if convert else "picture", [(s.path, s.box) for s in samples], stamps)
    masks = memory.look("mask", [(s.mask, s.box) for s in samples if s.mask and with_masks], stamps)
    memory.save()

    found = list(problems)
    kept: list[tuple[Sample, Seen]] = []
    taken: set[tuple[str, Box | None, bool]] = set()
    for sample in samples:
        picture = pictures[sample.path, sample.box]
        mask = masks[sample.mask, sample.box] if sample.mask and with_masks else None
        marked = with_masks and normal_class is not None and sample.label not in (normal_class, -1)
        fault = _fault(sample, picture, mask, marked, taken)
        taken.add((sample.path, sample.box, sample.mirror))
        if fault is not None:
            found.append(fault)
        elif isinstance(picture, Seen):
            kept.append((sample, picture))

    if found and on_bad_file == "error":
        raise DataError(report(found))
    present = Counter(sample.label for sample, _ in kept)
    empty = [name for label, name in enumerate(class_names) if not present[label]]
    if empty or not kept:
        what = f"no sample of class {', '.join(empty)}" if empty else "no samples"
        raise DataError(f"the data set has {what}." + (f"\n{report(found)}" if found else ""))
    return CheckResult(
        samples=[sample for sample, _ in kept],
        shapes=[(s.box[3], s.box[2]) if s.box else (seen.height, seen.width) for s, seen in kept],
        grey=[seen.flag for _, seen in kept],
        codes=np.array([seen.code for _, seen in kept], dtype=np.float32),
        stamps=stamps,
        problems=found,
    )


def joined(first: CheckResult, second: CheckResult) -> CheckResult:
    """What was seen of two sets of samples, one behind the other."""
    return CheckResult(
        samples=first.samples + second.samples,
        shapes=first.shapes + second.shapes,
        grey=first.grey + second.grey,
        codes=np.concatenate([first.codes, second.codes]),
        stamps={**first.stamps, **second.stamps},
        problems=first.problems + second.problems,
    )


def list_pictures(folder: Path) -> list[Sample]:
    """Every picture below `folder`, by name, with label -1 and the split `predict`.

    Raises:
        DataError: there is none, or no such folder.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; correct the path")
    paths = pictures_below(folder)
    if not paths:
        raise DataError(f"no pictures ({' '.join(sorted(SUFFIXES))}) in {folder}.")
    return [
        Sample(path=str(path), name=path.relative_to(folder).as_posix(), label=-1, split="predict") for path in paths
    ]


def pictures_below(folder: Path) -> list[Path]:
    """Every picture below `folder`, by path, but hidden ones; links to nowhere too, for inspection to report."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not path.is_dir()
    )


def summary(problems: Iterable[Problem]) -> str:
    """The kinds of problems with their numbers, on one line."""
    return ", ".join(f"{kind} {count}" for kind, count in Counter(p.kind for p in problems).most_common())


def report(problems: Sequence[Problem]) -> str:
    """One text for all problems, by kind, with the remedy; at most `SHOWN` files of a kind are named."""
    kinds: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        kinds[problem.kind].append(problem)
    lines = [f"Files that cannot be used: {len(problems)} (data.on_bad_file=skip leaves them out)."]
    for kind, some in kinds.items():
        lines.append(f"{kind}: {len(some)}. Remedy: {REMEDIES.get(kind, 'see each file')}.")
        lines += [f"  {_line(problem)}" for problem in some[:SHOWN]]
        if len(some) > SHOWN:
            lines.append(f"  ... and {len(some) - SHOWN} more")
    return "\n".join(lines)


def _line(problem: Problem) -> str:
    """The sample's name and what is wrong with it; the name once, where the text begins with the file itself."""
    place = problem.text.partition(": ")[0]
    return problem.text if place.endswith(problem.name) else f"{problem.name}: {problem.text}"


def _fault(
    sample: Sample,
    picture: Seen | ImageError,
    mask: Seen | ImageError | None,
    marked: bool,
    taken: set[tuple[str, Box | None, bool]],
) -> Problem | None:
    """The first problem of a sample, or None; `marked`: its mask must mark something."""
    if (sample.path, sample.box, sample.mirror) in taken:
        return Problem(sample.name, "duplicated", f"{sample.path} is listed more than once")
    if isinstance(picture, ImageError):
        return Problem(sample.name, picture.kind, str(picture))
    if isinstance(mask, ImageError):
        kind = "mask missing" if isinstance(mask, MissingFileError) else "mask unreadable"
        return Problem(sample.name, kind, str(mask))
    if mask is None:
        return Problem(sample.name, "mask missing", "a defect, but no mask is given") if marked else None
    if (mask.height, mask.width) != (picture.height, picture.width):
        sizes = f"{mask.width}x{mask.height}, the picture {picture.width}x{picture.height}"
        return Problem(sample.name, "mask of another size", f"{sample.mask} is {sizes}")
    if marked and not mask.flag:
        return Problem(sample.name, "empty mask", f"{sample.mask} marks nothing, but the class is a defect")
    return None


def _stamps(paths: Iterable[str]) -> dict[str, Stamp]:
    """Stamps of the files that exist."""
    stamps = {}
    for path in dict.fromkeys(paths):
        try:
            status = os.stat(path)
        except OSError:
            continue
        stamps[path] = Stamp(status.st_size, status.st_mtime_ns)
    return stamps


class Memory:
    """What earlier starts saw, one file per folder of pictures; without a file it lasts for this start.

    The file holds no names: entries are found by the BLAKE2 hash of path, stamp, box and what was asked.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.known: dict[bytes, Seen] = {}
        self.changed = False

    @classmethod
    def open(cls, cache_dir: Path | None, samples: Sequence[Sample]) -> Memory:
        """The memory for these samples; one that cannot be read is begun anew."""
        if cache_dir is None or not samples:
            return cls(None)
        folder = os.path.commonpath({os.path.dirname(sample.path) for sample in samples})
        memory = cls(cache_dir / f"inspection-{digest(folder).hex()}.npz")
        try:
            with open(str(memory.file), "rb") as stream, np.load(stream, allow_pickle=False) as stored:
                keys, sizes, flags, codes = (stored[name] for name in ("keys", "sizes", "flags", "codes"))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return memory
        if not len(keys) == len(sizes) == len(flags) == len(codes) or codes.shape[1:] != (LOW * LOW,):
            return memory
        for key, (height, width), flag, code in zip(keys, sizes.tolist(), flags.tolist(), codes, strict=True):
            memory.known[key.tobytes()] = Seen(height, width, flag, code)
        return memory

    def look(
        self, what: str, wanted: Iterable[tuple[str, Box | None]], stamps: Mapping[str, Stamp]
    ) -> dict[tuple[str, Box | None], Seen | ImageError]:
        """What is seen of each (path, box); crops of one file share its decoding."""
        result: dict[tuple[str, Box | None], Seen | ImageError] = {}
        unknown: dict[str, dict[Box | None, bytes]] = defaultdict(dict)  # path -> box -> key
        for path, box in dict.fromkeys(wanted):
            key = digest(what, path, stamps.get(path), box)
            if key in self.known:
                result[path, box] = self.known[key]
            else:
                unknown[path][box] = key

        def look_at(path: str) -> dict[Box | None, Seen | ImageError]:
            return _look_at(what, path, list(unknown[path]))

        for path, seen in zip(unknown, in_threads(look_at, unknown), strict=True):
            for box, answer in seen.items():
                result[path, box] = answer
                if isinstance(answer, Seen):
                    self.known[unknown[path][box]] = answer
                    self.changed = True
        return result

    def save(self) -> None:
        """Writes the file whole or not at all; a folder without write access is no error."""
        if self.file is None or not self.changed:
            return
        nothing = np.zeros(LOW * LOW, np.float32)
        entries = list(self.known.values())
        arrays: dict[str, Any] = {
            "keys": np.frombuffer(b"".join(self.known), np.uint8).reshape(-1, 16),
            "sizes": np.array([(seen.height, seen.width) for seen in entries], np.int32),
            "flags": np.array([seen.flag for seen in entries], bool),
            "codes": np.array([nothing if seen.code is None else seen.code for seen in entries], np.float32),
        }
        with suppress(DataError):
            write_whole(self.file, lambda stream: np.savez(stream, **arrays))


def _look_at(what: str, path: str, boxes: Sequence[Box | None]) -> dict[Box | None, Seen | ImageError]:
    """Decodes one file and looks at its crops; what goes wrong is the answer."""
    try:
        pixels = read_mask(path) if what == "mask" else read_pixels(path, convert=what == "convert")
    except ImageError as problem:
        return dict.fromkeys(boxes, problem)
    result: dict[Box | None, Seen | ImageError] = {}
    for box in boxes:
        try:
            part = crop(pixels, box, path)
        except ImageError as problem:
            result[box] = problem
            continue
        height, width = pixels.shape[:2]
        if what == "mask":
            result[box] = Seen(height, width, bool(part.any()), None)
        else:
            result[box] = Seen(height, width, pixels.ndim == 2, perceptual_code(_small(part)))
    return result


def _small(pixels: Array) -> Array:
    """(H, W) grey, at most `CODED` pixels a side; the low frequencies of the code survive.

    Pillow does this in the calling thread. On a large picture the code's matrix product would start as many
    BLAS threads again in each of ours, which was seen to take ten times as long.
    """
    picture = Image.fromarray(np.ascontiguousarray(pixels)).convert("L")
    size = min(picture.width, CODED), min(picture.height, CODED)
    return np.asarray(picture.resize(size, Image.Resampling.HAMMING))


def digest(*parts: object) -> bytes:
    """16 bytes that stand for the values and for how they are computed: BLAKE2b of their `repr`."""
    return hashlib.blake2b(repr((CACHE_VERSION, *parts)).encode("utf-8", "surrogateescape"), digest_size=16).digest()
