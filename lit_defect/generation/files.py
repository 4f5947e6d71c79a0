"""Pictures and masks of generated data sets as files: written whole or not at all, read as they were written."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from lit_defect.errors import DataError

Bools = NDArray[np.bool_]
Picture = NDArray[np.uint8]


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that takes its name when it is on disk; folders are made.

    Raises:
        OSError: as the disk says; an older file of that name is still there, and no part of the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def png(pixels: Picture | Bools) -> bytes:
    """A PNG file of a picture (H, W, 3) uint8, or of a mask (H, W) bool as 0 and 255."""
    values = pixels.astype(np.uint8) * 255 if pixels.dtype == np.bool_ else pixels
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(values)).save(stream, "PNG")
    return stream.getvalue()


def read_picture(path: Path) -> Picture:
    """(H, W, 3) uint8 of a picture's file.

    Raises:
        DataError: there is no such file, or it is no picture.
    """
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such picture; add it") from None
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as problem:
        raise DataError(f"{path}: not a readable picture ({problem}); replace the file") from problem


def read_mask(path: Path) -> Bools:
    """(H, W) bool, True where any channel of the file is not 0; transparency is none.

    Raises:
        DataError: there is no such file, or it is no picture.
    """
    try:
        with Image.open(path) as picture:
            values = np.asarray(picture)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such mask; add it") from None
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as problem:
        raise DataError(f"{path}: not a readable mask ({problem}); replace the file") from problem
    marked: Bools = np.asarray(values > 0)
    if marked.ndim == 3:
        marked = np.asarray(marked[..., : 1 if marked.shape[2] == 2 else 3].any(axis=2))
    return marked
