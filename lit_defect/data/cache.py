"""Decoded pictures, kept as uint8 so that each is decoded once and not once an epoch.

`off` decodes whenever a picture is asked for. `ram` keeps what has been decoded in this process. `disk`
decodes everything once into one flat file that later runs and other processes map into memory; the file
appears under its name only when it is complete, so an interrupted build is simply done again. Of processes
that need it at the same moment one decodes and the others wait.

Rows may differ in size: they lie one behind the other, and only rows of one size can share a batch.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import numpy.typing as npt
from torch.utils.data import get_worker_info

from lit_defect.claims import Claims
from lit_defect.console import say
from lit_defect.data.images import Array, read_mask, read_pixels, resize_image, resize_mask
from lit_defect.data.samples import Sample
from lit_defect.errors import DataError
from lit_defect.files import whole_file

_POLL = 0.2  # seconds between looks at what another process decodes
Shape = tuple[int, ...]
Read = Callable[[int], Array]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class PictureReader:
    """Decodes, crops and scales pictures, but does not mirror them.

    Args:
        shapes: (height, width, channels) to deliver, for each sample.
        resize: scale to that size; otherwise the picture must have it already.
        convert: as for `read_image`.
    """

    samples: Sequence[Sample]
    shapes: Sequence[Shape]
    resize: bool
    convert: bool

    def __call__(self, row: int) -> Array:
        """The picture of sample `row`, (H, W, C) uint8."""
        sample, shape = self.samples[row], self.shapes[row]
        pixels = read_pixels(sample.path, box=sample.box, convert=self.convert)
        if self.resize:
            pixels = resize_image(pixels, (shape[0], shape[1]))
        pixels = pixels if pixels.ndim == 3 else np.broadcast_to(pixels[..., None], (*pixels.shape, shape[2]))
        if pixels.shape != shape:
            raise DataError(f"{sample.path} has changed since the data set was checked. Start the run again.")
        return pixels


@dataclass(frozen=True)
class MaskReader:
    """Decodes, crops and scales masks, but does not mirror them.

    Args:
        shapes: (height, width) to deliver, for each sample.
    """

    samples: Sequence[Sample]
    shapes: Sequence[Shape]

    def __call__(self, row: int) -> Array:
        """The stored mask values of sample `row`, (H, W) uint8; zeros where it has no mask."""
        sample, shape = self.samples[row], self.shapes[row]
        if sample.mask is None:
            return np.zeros(shape, np.uint8)
        return resize_mask(read_mask(sample.mask, box=sample.box), (shape[0], shape[1]))


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """[function(item) ...] on all cores; Pillow lets other threads run while it decodes."""
    items = list(items)
    if len(items) < 2 or get_worker_info() is not None:  # a loader's worker is one of many already
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(len(items), core_count())) as pool:
        return list(pool.map(function, items))


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class PixelStore:
    """Rows of uint8 pixels, decoded whenever they are asked for (`off`).

    Args:
        shapes: shape of each row, (H, W, C) for pictures and (H, W) for masks.
        read: gives the pixels of a row, of that shape.
    """

    def __init__(self, shapes: Sequence[Shape], read: Read) -> None:
        self.shapes = list(shapes)
        self.decode = read

    def take(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> Array:
        """(B, *shape) uint8, an array of its own.

        Raises:
            DataError: the rows differ in shape, or a file has changed since it was checked.
        """
        self._check_one_shape(rows)
        return np.stack(in_threads(self.decode, rows))

    def _check_one_shape(self, rows: Iterable[int]) -> None:
        sizes = {self.shapes[row][:2] for row in rows}
        if len(sizes) > 1:
            some = ", ".join(f"{width}x{height}" for height, width in sorted(sizes)[:3])
            raise DataError(
                f"pictures of different sizes ({some} ...) cannot share a batch. "
                "Set data.image_size, or data.batch_size and data.eval_batch_size to 1."
            )


class BufferedStore(PixelStore):
    """Rows kept in `buffer`, a flat array in memory or mapped from a file.

    Args:
        ready: whether the buffer is filled already; otherwise rows are decoded into it when first asked for.
    """

    def __init__(self, shapes: Sequence[Shape], read: Read, buffer: Array, ready: bool) -> None:
        super().__init__(shapes, read)
        self.buffer = buffer
        self.ready = np.full(len(shapes), ready)
        self.offsets = [0, *accumulate(prod(shape) for shape in shapes)]
        self._even = buffer.reshape(-1, *shapes[0]) if len(set(shapes)) == 1 else None  # (N, *shape)

    def take(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> Array:
        """As of `PixelStore`; rows of one data-set-wide shape in a single copy."""
        rows = np.asarray(rows)
        self.fill(row for row in np.unique(rows).tolist() if not self.ready[row])
        if self._even is not None:
            return self._even[rows]
        self._check_one_shape(rows)
        return np.stack([self._slot(row) for row in rows])

    def fill(self, rows: Iterable[int]) -> None:
        """Decodes these rows into the buffer."""

        def keep(row: int) -> None:
            self._slot(row)[...] = self.decode(row)
            self.ready[row] = True

        in_threads(keep, rows)

    def _slot(self, row: int) -> Array:
        return self.buffer[self.offsets[row] : self.offsets[row + 1]].reshape(self.shapes[row])


def ram_store(shapes: Sequence[Shape], read: Read, *, copies: int = 1) -> PixelStore:
    """A store in memory, filled as rows are asked for; `copies` is the number of processes that hold one.

    Raises:
        DataError: it would not fit.
    """
    needed, free = sum(map(prod, shapes)), available_memory()
    if free is not None and needed * copies > free:
        raise DataError(
            f"data.cache=ram needs {_size(needed)} per process, {_size(needed * copies)} in all, and "
            f"{_size(free)} are free. Use data.cache=disk (shared by all processes and later runs), "
            "a smaller data.image_size, or data.cache=off."
        )
    return BufferedStore(shapes, read, np.empty(needed, np.uint8), ready=False)


def disk_store(path: Path, shapes: Sequence[Shape], read: Read) -> PixelStore:
    """The store in the file `path`, which is decoded and written first if it is not there.

    Raises:
        DataError: the disk has no room for it, or the folder cannot be written.
    """
    needed = sum(map(prod, shapes))
    try:
        _build_once(path, shapes, read, needed)
        return BufferedStore(shapes, read, np.asarray(np.memmap(path, np.uint8, mode="r")), ready=True)
    except OSError as problem:
        raise DataError(f"{path}: no access to this cache ({problem}). Set data.cache_dir.") from problem


def _build_once(path: Path, shapes: Sequence[Shape], read: Read, needed: int) -> None:
    """See that the file is there: make it, or wait for the process that does."""
    claims, told = Claims(path.parent / "claims"), False

    def is_there() -> bool:
        return path.exists() and path.stat().st_size == needed

    while not is_there():
        before = claims.newest(path.stem).get(path.stem)
        if before is not None and not before.released and not claims.is_dead(before):
            if not told:
                say(f"waits for {before.worker}, which decodes the same pictures into {path}")
            told = True
            time.sleep(_POLL)
        elif held := claims.take(path.stem, before):
            with held:
                try:
                    if not is_there():  # made since the last look
                        _build(path, shapes, read, needed)
                except FileNotFoundError:
                    if held.is_mine():
                        raise  # else it has slept, and another process has taken over and its file away
                finally:
                    with suppress(OSError):  # the disk may be full
                        held.release()


def _build(path: Path, shapes: Sequence[Shape], read: Read, needed: int) -> None:
    for unfinished in path.parent.glob(f".{path.name}.*"):  # of processes that were killed: nobody else builds
        unfinished.unlink(missing_ok=True)
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise DataError(
            f"data.cache=disk needs {_size(needed)} in {path.parent} and {_size(free)} are free. "
            "Set data.cache_dir to a larger disk, or a smaller data.image_size."
        )
    with whole_file(path) as file:
        if hasattr(os, "posix_fallocate"):  # on a full disk a write to a mapped file would end the process (SIGBUS)
            os.posix_fallocate(file.fileno(), 0, needed)
        buffer = np.memmap(file, np.uint8, mode="w+", shape=(needed,))
        BufferedStore(shapes, read, buffer, ready=False).fill(range(len(shapes)))
        buffer.flush()


def write_whole(file: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """`whole_file` for what is kept in `data.cache_dir`.

    Raises:
        DataError: the folder cannot be written.
    """
    try:
        with whole_file(file) as stream:
            write(stream)
    except OSError as problem:
        raise DataError(f"data.cache_dir: {file} cannot be written ({problem}).") from problem


def available_memory() -> int | None:
    """Bytes that may still be used here, by the machine and by the container's limit; None if unknown."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    except OSError:
        pass
    group = Path("/sys/fs/cgroup")  # version 2; "anon" leaves out the file cache, which gives way
    try:
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["anon"]
        found.append(int((group / "memory.max").read_text()) - int(used))
    except (OSError, ValueError, KeyError):  # no such group, or the limit is "max"
        pass
    return max(0, min(found)) if found else None


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
