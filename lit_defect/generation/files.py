"""Pictures and masks of generated data sets as files: written whole or not at all, read as they were written."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from lit_defect.errors import DataError
from lit_defect.files import whole_file

Bools = NDArray[np.bool_]
Picture = NDArray[np.uint8]


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that takes its name when it is on disk; folders are made.

    Raises:
        OSError: as the disk says; an older file of that name is still there, and no part of the new one.
    """
    with whole_file(path) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


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


def mask_file(folder: Path, name: str) -> Path:
    """Where a folder has the mask of a picture, by the picture's name in its data set.

    `train/good/000.jpg` -> `train/good/000.png`; a crop's window stays: `a.jpg#0,8,32,32` -> `a#0,8,32,32.png`.
    """
    file, hash_, window = name.partition("#")
    stem = Path(file).with_suffix("")
    return folder / stem.with_name(f"{stem.name}{hash_}{window}.png")


def read_mask(path: Path) -> Bools:
    """(H, W) bool, True where any channel of the file is not 0; transparency is none.

    Raises:
        DataError: there is no such file, or it is no picture.
    """
    return np.asarray(read_grey(path) > 0)


def read_grey(path: Path) -> NDArray[Any]:
    """(H, W) values of a mask's file, of each pixel the largest of its channels; transparency is none.

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
    if values.ndim == 3:
        values = values[..., : 1 if values.shape[2] == 2 else 3].max(axis=2)
    return values * np.uint8(255) if values.dtype == np.bool_ else values


def contents(path: Path) -> str:
    """Hash of a file, or of all files in a folder with their names; hidden ones do not count."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        name = file.relative_to(path).as_posix()
        if not any(part.startswith(".") for part in Path(name).parts):
            with file.open("rb") as stream:
                digest.update(f"{name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]
