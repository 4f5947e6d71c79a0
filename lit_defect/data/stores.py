"""The pixels of one checked data set: a picture store, a mask store, and where each sample stands in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lit_defect.data.cache import MaskReader, PictureReader, PixelStore, Read, Shape, disk_store, ram_store
from lit_defect.data.images import Box
from lit_defect.data.inspection import CheckResult, digest
from lit_defect.data.samples import Sample


@dataclass(frozen=True)
class Stores:
    """Rows of `images` and `masks` belong to the same (path, box); mirrored copies share the row."""

    rows: Mapping[tuple[str, Box | None], int]
    images: PixelStore
    masks: PixelStore | None

    def rows_of(self, samples: Sequence[Sample]) -> list[int]:
        """Where the samples stand."""
        return [self.rows[sample.path, sample.box] for sample in samples]


def open_stores(
    checked: CheckResult,
    *,
    image_size: tuple[int, int] | None,
    convert: bool,
    with_masks: bool,
    cache: Literal["off", "ram", "disk"],
    cache_dir: Path,
    key: Callable[[Sample], str],
    copies: int = 1,
) -> Stores:
    """Stores over all samples of a data set; grey data sets are kept with one channel.

    Args:
        image_size: (height, width) of every row; None keeps each one's own.
        key: what decides the pixels of a sample; a file on disk is found by the keys of its rows.
        copies: processes on this machine that hold a store in memory.
    """
    first: dict[tuple[str, Box | None], int] = {}
    for i, sample in enumerate(checked.samples):
        first.setdefault((sample.path, sample.box), i)
    samples = [checked.samples[i] for i in first.values()]
    sizes: list[Shape] = [image_size or checked.shapes[i] for i in first.values()]
    channels = 1 if all(checked.grey) else 3
    keys = [key(sample) for sample in samples]

    def store(shapes: Sequence[Shape], read: Read, what: object) -> PixelStore:
        if cache == "disk":
            return disk_store(cache_dir / f"pixels-{digest(keys, what).hex()}.u8", shapes, read)
        return ram_store(shapes, read, copies=copies) if cache == "ram" else PixelStore(shapes, read)

    shapes = [(*size, channels) for size in sizes]
    images = store(shapes, PictureReader(samples, shapes, image_size is not None, convert), channels)
    masks = None
    if with_masks:
        stamps = [(sample.mask, checked.stamps.get(sample.mask or "")) for sample in samples]
        masks = store(sizes, MaskReader(samples, sizes), stamps)
    return Stores({place: row for row, place in enumerate(first)}, images, masks)
