"""Features of a frozen network, computed once per image and kept on disk.

    <cache_dir>/features/<hash of the key>/<random name>.safetensors

Each file is one part: the digests of its image keys and one row of features for each. A part is
written under another name and then renamed, so that it is there whole or not at all, however many
processes write and whenever one is killed. A part that is damaged all the same is dropped, and its
images count as missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_VERSION = 1  # to be raised when pictures are turned into features in another way
_DIGEST = 16  # bytes per image key: 128 bits, so that no two images ever meet
_STALE = 3600.0  # seconds after which an unfinished file belongs to a process that is gone


class FeatureStore:
    """Rows of features by image key, shared by runs, seeds, splits and processes.

    Args:
        cache_dir: folder for all stores.
        key: everything that the features depend on beside the image: the network's fingerprint, the
            transform, the image size, the precision of the computation.
        num_features: D.
        dtype: how the rows are kept; float16 halves the disk space for about 3 digits.
    """

    def __init__(
        self, cache_dir: str | Path, key: str, *, num_features: int, dtype: torch.dtype = torch.float32
    ) -> None:
        name = hashlib.sha256(f"{_VERSION}\n{key}\n{num_features}\n{dtype}".encode()).hexdigest()[:32]
        self.folder = Path(cache_dir).expanduser() / "features" / name
        self.num_features = num_features
        self.dtype = dtype
        self._seen: set[Path] = set()
        self._blocks: list[Tensor] = []  # features (n, D) of each part
        self._place: dict[bytes, tuple[int, int]] = {}  # digest -> part, row

    def get(self, keys: Sequence[str], *, view: int = 0) -> tuple[Tensor, Tensor]:
        """What is known about the images.

        Args:
            keys: identity of each image (N), such as a data module's `sample_key`.
            view: number of the augmented view; 0 is the plain image.
        Returns:
            Features (N, D), zero where missing, and the positions of the missing images (M,) int64.
        """
        self._read_new_parts()
        nowhere = (-1, 0)
        places = [self._place.get(digest, nowhere) for digest in _digests(keys, view)]
        part, row = torch.tensor(places, dtype=torch.int64).view(-1, 2).unbind(1)  # (N,), (N,)
        features = torch.zeros(len(keys), self.num_features, dtype=self.dtype)
        for i in part.unique().tolist():
            if i >= 0:
                here = (part == i).nonzero().squeeze(1)
                features[here] = self._blocks[i][row[here]]
        return features, (part < 0).nonzero().squeeze(1)

    def put(self, keys: Sequence[str], features: Tensor, *, view: int = 0) -> None:
        """Keep the features (N, D) of N images as one part.

        Raises:
            ValueError: the shape is not (N, D), or a value does not fit the type of the store.
            OSError: the folder cannot be written, or the disk is full.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if features.shape != (len(keys), self.num_features):
            expected = (len(keys), self.num_features)
            raise ValueError(f"features are {tuple(features.shape)}, expected {expected}")
        if not keys:
            return
        values = features.detach().to("cpu", self.dtype).contiguous()
        if not values.isfinite().all():
            raise ValueError(f"features hold values that are not finite in {self.dtype}")
        digests = torch.frombuffer(bytearray(b"".join(_digests(keys, view))), dtype=torch.uint8)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        part = self.folder / f"{uuid.uuid4().hex}.safetensors"
        unfinished = part.with_suffix(".unfinished")
        digests = digests.view(-1, _DIGEST)
        try:
            save_file(
                {"digests": digests, "features": values},
                unfinished,
                metadata={"checksum": _checksum(digests, values)},
            )
        except SafetensorError as error:
            raise OSError(str(error)) from error
        os.replace(unfinished, part)

    def _read_new_parts(self) -> None:
        """Index the parts that came since the last look; each is checked once."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path in self._seen:
                continue
            try:
                digests, features = self._read(path)
            except OSError:  # another process has just dropped it, or it cannot be opened for now
                continue
            except Exception as error:  # a damaged file fails in as many ways as there are bytes
                log.warning("Dropping a damaged feature file, %s: %s", path, error)
                with contextlib.suppress(OSError):  # a folder that may only be read
                    path.unlink()
                continue
            packed = digests.numpy().tobytes()
            part = len(self._blocks)
            self._place.update({packed[i * _DIGEST : (i + 1) * _DIGEST]: (part, i) for i in range(len(digests))})
            self._blocks.append(features)
            self._seen.add(path)

    def _read(self, path: Path) -> tuple[Tensor, Tensor]:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            digests, features = file.get_tensor("digests"), file.get_tensor("features")
            checksum = file.metadata()["checksum"]
        shapes = digests.shape == (len(features), _DIGEST) and features.shape[1:] == (self.num_features,)
        if not shapes or features.dtype != self.dtype or checksum != _checksum(digests, features):
            raise ValueError("its content does not match its checksum")
        return digests, features

    def _sweep(self) -> None:
        """Remove what killed processes left half written."""
        for path in self.folder.glob("*.unfinished"):
            try:
                if time.time() - path.stat().st_mtime > _STALE:
                    path.unlink()
            except OSError:  # gone, or another user's
                continue


def _digests(keys: Sequence[str], view: int) -> list[bytes]:
    return [hashlib.blake2b(f"{view}\n{key}".encode(), digest_size=_DIGEST).digest() for key in keys]


def _checksum(digests: Tensor, features: Tensor) -> str:
    rows = features.view(torch.uint8).numpy().data
    return f"{zlib.crc32(rows, zlib.crc32(digests.numpy().data)):08x}"
