"""Where the object is in a picture, so that no defect is drawn beside it.

1. The frame of the picture, 2 % of its shorter side wide, shows the background if its pixels are alike: nine tenths of
   them within `UNIFORM` grey levels of their median colour. If they are not, the object fills the picture.
2. Every pixel's distance from that colour, smoothed a little, is cut in two by Otsu's threshold (IEEE Trans. SMC 1979).
   If what is far is not clearly farther than the frame's own noise, there is nothing but one even texture: that is the
   object, and it fills the picture.
3. Specks go: parts smaller than a twentieth of the largest. Holes are filled.

The estimate suits photographs before an even background, and textures. An object that shows its background's colour, or
lies across the frame, needs masks from outside: `Foreground` reads them from a folder.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from lit_defect.errors import DataError, UserError
from lit_defect.generation.files import Bools, Picture, mask_file, read_mask

UNIFORM = 12.0  # grey levels, root mean square over the channels, as all distances here
STANDS_OUT = 3.0  # times the frame's own distances, and `UNIFORM` at least
FRAME = 0.02  # of the shorter side
SPECK = 0.05  # of the largest part
LEAST = 0.01  # of the picture; what is smaller is dust, no object


def foreground(picture: Picture) -> Bools:
    """(H, W, 3) uint8 -> (H, W) bool, True on the object; all True where it fills the picture."""
    everywhere = np.ones(picture.shape[:2], dtype=np.bool_)
    width = max(1, round(FRAME * min(picture.shape[:2])))
    inner = np.zeros_like(everywhere)
    inner[width:-width, width:-width] = True
    colour = np.median(picture[~inner], axis=0)
    distance = np.sqrt(np.square(picture - colour).mean(axis=2))
    noise = float(np.quantile(distance[~inner], 0.9))
    if noise > UNIFORM:
        return everywhere
    smooth = ndimage.gaussian_filter(distance, 1.0)
    far = smooth > otsu(smooth)
    if not far.any() or distance[far].mean() < max(STANDS_OUT * noise, UNIFORM):
        return everywhere
    found = ndimage.binary_fill_holes(_without_specks(far))
    return found if found.mean() >= LEAST else everywhere


def otsu(values: NDArray[np.float64], bins: int = 256) -> float:
    """The threshold between two classes that are farthest apart: centre of a bin of the values' histogram."""
    counts, edges = np.histogram(values, bins)
    centres = (edges[:-1] + edges[1:]) / 2
    below, total = np.cumsum(counts)[:-1], values.size  # the last bin is never below
    sums = np.cumsum(counts * centres)
    with np.errstate(invalid="ignore", divide="ignore"):
        apart = sums[:-1] / below - (sums[-1] - sums[:-1]) / (total - below)
    return float(centres[np.nan_to_num(below * (total - below) * np.square(apart)).argmax()])


class Foreground:
    """Object masks of pictures: estimated, given, or none.

    Args:
        source: `auto` (estimated by `foreground`), `all` (the object fills every picture), or a folder of masks:
            PNG files, not 0 on the object, named as the pictures are in their data set
            (`train/good/000.jpg` -> `train/good/000.png`; a crop's window stays in its name).
        key: the option that names it, for messages.

    Raises:
        UserError: neither of the words and no folder.
    """

    def __init__(self, source: str, key: str = "foreground") -> None:
        self.source = source
        self._found: dict[str, tuple[tuple[int, int], bytes]] = {}  # size and packed mask by name
        self._folder = None if source in ("auto", "all") else Path(source).expanduser()
        if self._folder is not None and not self._folder.is_dir():
            raise UserError(
                f"{key} = {source}: expected auto, all, or a folder of object masks; there is no such folder"
            )

    def of(self, name: str, picture: Picture) -> Bools:
        """(H, W) bool of a picture (H, W, 3).

        Args:
            name: of the picture in its data set; an estimate is kept by it.
            picture: its pixels.

        Raises:
            DataError: its mask is not there, unreadable, empty or of another size.
        """
        if self.source == "auto":
            return self._estimated(name, picture)
        if self._folder is None:
            return np.ones(picture.shape[:2], dtype=np.bool_)
        path = mask_file(self._folder, name)
        mask = read_mask(path)
        if mask.shape != picture.shape[:2]:
            sizes = f"{mask.shape[1]}x{mask.shape[0]}, its picture {picture.shape[1]}x{picture.shape[0]}"
            raise DataError(f"{path} is {sizes}; give each object mask the size of its picture")
        if not mask.any():
            raise DataError(f"{path} is empty: no defect has a place on that picture; mark the object")
        return mask

    def _estimated(self, name: str, picture: Picture) -> Bools:
        """Looked for once: many defects are put onto each normal picture, and it takes as long as to make one."""
        if name not in self._found:
            self._found[name] = picture.shape[:2], zlib.compress(np.packbits(foreground(picture)).tobytes(), 1)
        size, packed = self._found[name]
        bits = np.frombuffer(zlib.decompress(packed), np.uint8)
        return np.unpackbits(bits, count=size[0] * size[1]).reshape(size).astype(np.bool_)


def _without_specks(mask: Bools) -> Bools:
    """The parts of a mask (neighbours by edge or corner) that are not far smaller than its largest."""
    parts, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    kept: Bools = sizes >= SPECK * sizes.max()
    kept[0] = False
    return np.asarray(kept[parts])
