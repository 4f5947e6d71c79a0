"""Pictures inside of a page: read whole, made small enough, and counted against what the page may weigh."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

LARGEST = (1600, 4000)  # width and height in pixels: sheets are tall, and their words have to be read
BUDGET = 24 * 2**20  # bytes of all pictures of a page
_QUALITY = 88  # of the JPEG that a larger picture or a sheet of photographs becomes
_HEAVY = 64 * 2**10  # bytes from which on a JPEG is tried


@dataclass(frozen=True)
class Embedded:
    """A picture as the page holds it; `width` and `height` in pixels."""

    url: str
    width: int
    height: int


@dataclass
class Album:
    """The pictures of one page.

    Attributes:
        base: relative paths lie below it, and the page names files relative to it.
        budget: bytes that all pictures together may take.
        left_out: names and reasons of pictures that the page lacks.
    """

    base: Path | None = None
    budget: int = BUDGET
    left_out: list[str] = field(default_factory=list)
    _spent: int = 0
    _read: dict[Path, tuple[str, bytes, int, int] | str] = field(default_factory=dict)

    def name(self, path: Path) -> str:
        """How the page names a picture's file."""
        if self.base is not None and path.is_absolute() and path.is_relative_to(self.base):
            path = path.relative_to(self.base)
        return path.as_posix()

    def embed(self, path: Path) -> Embedded | str:
        """The picture, or in words why the page lacks it; never an error of the file's."""
        file = path if self.base is None else self.base / path
        if file not in self._read:
            self._read[file] = _read(file)
        read = self._read[file]
        if isinstance(read, str):
            return self._leave_out(path, read)
        kind, data, width, height = read
        weight = (len(data) + 2) // 3 * 4  # as base64
        if self._spent + weight > self.budget:
            return self._leave_out(path, f"the page's {self.budget / 2**20:.0f} MiB of pictures are full")
        self._spent += weight
        return Embedded(f"data:image/{kind};base64,{base64.b64encode(data).decode()}", width, height)

    def _leave_out(self, path: Path, reason: str) -> str:
        self.left_out.append(f"{self.name(path)}: {reason}")
        return reason


def _read(file: Path) -> tuple[str, bytes, int, int] | str:
    """Kind, bytes, width and height; a PNG or JPEG of a fitting size stays as it is, another becomes one.

    A PNG of which a JPEG saves a quarter shows photographs, and becomes a JPEG.
    """
    from PIL import Image, ImageOps

    try:
        data = file.read_bytes()
        with Image.open(io.BytesIO(data)) as opened:
            kind, turned = opened.format, opened.getexif().get(0x0112, 1) != 1
            fits = _fits(opened) and kind in ("PNG", "JPEG") and not turned
            opened.load()  # half a file is found out here
            stays = fits and opened.mode in ("1", "L", "LA", "P", "RGB", "RGBA")
            if stays and (kind == "JPEG" or len(data) < _HEAVY):
                return str(kind).lower(), data, *opened.size
            picture = _eight_bits(ImageOps.exif_transpose(opened))
    except FileNotFoundError:
        return "the file is missing"
    # Pillow's plug-ins raise what they like on damaged files; a report of 200 runs does not end for one of them.
    except Exception as error:
        return f"the file cannot be read as a picture ({type(error).__name__})"
    if not _fits(picture):
        picture.thumbnail(LARGEST, Image.Resampling.LANCZOS)
        return "jpeg", _jpeg(picture), *picture.size
    if not stays:
        encoded = io.BytesIO()
        picture.save(encoded, "PNG")
        data = encoded.getvalue()
    if len(data) >= _HEAVY and len(photograph := _jpeg(picture)) <= 0.75 * len(data):
        return "jpeg", photograph, *picture.size
    return "png", data, *picture.size


def _fits(picture: Image.Image) -> bool:
    return picture.width <= LARGEST[0] and picture.height <= LARGEST[1]


def _jpeg(picture: Image.Image) -> bytes:
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=_QUALITY, subsampling=0)  # full colour resolution: figures have red letters
    return encoded.getvalue()


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Grey or RGB of eight bits a channel, on white where it is transparent."""
    from PIL import Image

    if picture.mode.startswith(("I", "F")):  # 16 bits or floats: darkest to brightest
        picture = picture.convert("F")
        low, high = (float(limit) for limit in picture.getextrema())  # type: ignore[arg-type]
        scale = 255 / ((high - low) or 1)
        return picture.point(lambda value: value * scale - low * scale).convert("L")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(ground, picture).convert("RGB")
    return picture.convert("L" if picture.mode in ("1", "L") else "RGB")
