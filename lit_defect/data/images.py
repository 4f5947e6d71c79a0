"""Pictures and masks from disk as uint8 arrays, upright and of known depth, or a clear refusal.

Read as they are: grey (`L`), colour (`RGB`), bilevel (`1`) and opaque palette (`P`) pictures. Every other
mode would need a decision, so it is refused unless `convert=True`, which decides:

| the file | becomes |
|---|---|
| 16 bits per channel | the full range 0 to 65535 on 0 to 255: v / 257 rounded (colour: the high byte) |
| 32-bit integers in the 16-bit range | the same; other ranges have no known white and stay refused |
| floating point within [0, 1] | v * 255 rounded; other ranges stay refused |
| transparency (`RGBA`, `LA`, `PA`, palette) | laid over black |
| `CMYK`, `YCbCr`, `LAB`, `HSV` | RGB, by Pillow's formulas without a colour profile |
| EXIF orientation other than upright | turned upright |
"""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from lit_defect.errors import DataError

Array = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
ORIENTATION = 0x0112  # the EXIF tag
SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N")
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
# Pillow warns of every picture from half of its limit on; photographs of a line camera are that large.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageError(DataError):
    """One picture or mask that cannot be used; `kind` is the name of the problem in a report."""

    kind = "unreadable"


class MissingFileError(ImageError):
    """There is no such file."""

    kind = "missing"


class TruncatedError(ImageError):
    """The file ends before the picture does."""

    kind = "truncated"


class TooLargeError(ImageError):
    """The picture has more pixels than Pillow opens."""

    kind = "too large"


class WrongModeError(ImageError):
    """The file is sound, but its depth, transparency, colour space or orientation asks for a decision."""

    kind = "wrong mode"


class BoxError(ImageError):
    """The crop window is empty or reaches over the picture's edge."""

    kind = "box outside the picture"


def read_image(path: str | Path, *, box: Box | None = None, mirror: bool = False, convert: bool = False) -> Array:
    """(H, W, 3) uint8, RGB. Grey pictures have three equal channels.

    Args:
        box: crop window (x, y, width, height) in pixels of the upright picture.
        mirror: flip left-right, after the crop.
        convert: accept every mode, by the table above.

    Raises:
        ImageError: missing, unreadable, truncated, of a refused mode, or `box` is not inside.
    """
    pixels = read_pixels(path, box=box, convert=convert)
    if mirror:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2))


def read_pixels(path: str | Path, *, box: Box | None = None, convert: bool = False) -> Array:
    """(H, W) uint8 for a grey picture, (H, W, 3) for a coloured one; otherwise as `read_image`."""
    with _open(path) as picture:
        stored = str(getattr(picture, "tile", ""))  # how the file packs its pixels; gone after decoding
        _load(picture, path)
        reason = _refusal(picture, stored)
        if reason and not convert:
            raise WrongModeError(f"{path}: {reason}")
        upright = ImageOps.exif_transpose(picture) if reason else picture
        pixels = _to_uint8(upright, path)
    return crop(pixels, box, path)


def read_mask(path: str | Path, *, box: Box | None = None, mirror: bool = False) -> Array:
    """(H, W) uint8 with the values as stored: palette indices, grey levels, or 0 and 1 of a bilevel file.

    Raises:
        ImageError: as `read_image`; also when the channels of a colour file differ, a value exceeds 255, the file
            is stored turned, or as JPEG, which blurs the values.
    """
    with _open(path) as picture:
        _load(picture, path)
        values = np.asarray(picture)
        turned = _turned(picture)
        if turned or picture.format == "JPEG":
            raise WrongModeError(f"{path}: {turned or 'JPEG blurs the values of a mask'}")
    if values.ndim == 3:
        if (values[..., :1] != values[..., :3]).any():
            raise WrongModeError(f"{path}: a mask has one channel; those of this {picture.mode} file differ")
        values = values[..., 0]
    if values.dtype.kind not in "bui" or values.min() < 0 or values.max() > 255:
        raise WrongModeError(f"{path}: a mask holds whole numbers from 0 to 255; this is {picture.mode}")
    values = crop(values.astype(np.uint8), box, path)
    return np.ascontiguousarray(values[:, ::-1] if mirror else values)


def crop(pixels: Array, box: Box | None, path: str | Path) -> Array:
    """The window `box` of (H, W[, 3]) pixels; `path` is named when the window is not inside."""
    if box is None:
        return pixels
    x, y, width, height = box
    if min(x, y) < 0 or min(width, height) < 1 or x + width > pixels.shape[1] or y + height > pixels.shape[0]:
        size = f"{pixels.shape[1]}x{pixels.shape[0]}"
        raise BoxError(f"{path}: the box x={x}, y={y}, {width}x{height} is not inside the picture of {size}")
    return pixels[y : y + height, x : x + width]


def resize_image(pixels: Array, size: tuple[int, int]) -> Array:
    """(H, W[, 3]) uint8 scaled to `size` (height, width): bilinear, antialiased when it shrinks."""
    return _resize(pixels, size, Image.Resampling.BILINEAR)


def resize_mask(values: Array, size: tuple[int, int]) -> Array:
    """(H, W) uint8 scaled to `size` (height, width) by nearest neighbour, so that no new value appears."""
    return _resize(values, size, Image.Resampling.NEAREST)


def _resize(pixels: Array, size: tuple[int, int], method: Image.Resampling) -> Array:
    if pixels.shape[:2] == size:
        return pixels
    height, width = size
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize((width, height), method))


def _open(path: str | Path) -> Image.Image:
    try:
        return Image.open(path)
    except FileNotFoundError:
        raise MissingFileError(f"{path}: there is no such file") from None
    except Image.DecompressionBombError as problem:
        raise TooLargeError(f"{path}: {_first_line(problem)}") from problem
    except Image.UnidentifiedImageError as problem:
        if not os.stat(path).st_size:
            raise TruncatedError(f"{path}: the file is empty") from problem
        raise ImageError(f"{path}: not a readable picture") from problem
    except BROKEN as problem:
        raise ImageError(f"{path}: not a readable picture ({_first_line(problem)})") from problem


def _load(picture: Image.Image, path: str | Path) -> None:
    try:
        picture.load()
    except BROKEN as problem:
        text = _first_line(problem)
        cut = "truncated" in text or "EOF" in text or isinstance(problem, EOFError)
        raise (TruncatedError if cut else ImageError)(f"{path}: cannot be decoded ({text})") from problem


def _first_line(problem: BaseException) -> str:
    return (str(problem) or type(problem).__name__).splitlines()[0]


def _refusal(picture: Image.Image, stored: str) -> str:
    """Why the picture needs `convert`; empty when it does not."""
    if turned := _turned(picture):
        return turned
    if picture.mode in SIXTEEN_BIT or ";16" in stored:
        return f"16 bits per channel (mode {picture.mode})"
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        return f"transparency (mode {picture.mode})"
    if picture.mode not in ("L", "RGB", "1", "P"):
        return f"mode {picture.mode}"
    return ""


def _turned(picture: Image.Image) -> str:
    """Why the picture is not upright; empty when it is."""
    orientation = picture.getexif().get(ORIENTATION, 1)
    if orientation in (0, 1):  # 0 is written by some cameras for "unknown"
        return ""
    return f"EXIF orientation {orientation}: the picture is stored turned or mirrored"


def _to_uint8(picture: Image.Image, path: str | Path) -> Array:
    mode = picture.mode
    if mode in (*SIXTEEN_BIT, "I", "F"):
        values = np.asarray(picture).astype(np.float64)
        white = 1.0 if mode == "F" else 65535.0
        if not (values.min() >= 0 and values.max() <= white):
            raise WrongModeError(f"{path}: mode {mode} with values outside 0 to {white:g}: white is unknown")
        return np.rint(values * (255 / white)).astype(np.uint8)
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        straight = picture.convert("RGBA")
        over = Image.alpha_composite(Image.new("RGBA", picture.size, (0, 0, 0, 255)), straight).convert("RGB")
        return np.asarray(over.convert("L") if mode in ("LA", "La", "L") else over)
    if mode in ("L", "1"):
        return np.asarray(picture.convert("L"))
    return np.asarray(picture.convert("RGB"))
