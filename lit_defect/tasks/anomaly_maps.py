"""What `predict` leaves of a picture beside its scores: its map at the picture's own size, and an overlay."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from lit_defect.reporting.maps import Map, Scale, overlay, write_map

_TIFF_RANGE = 16  # white, in multiples of the map's threshold


class MapWriter:
    """Writes `NAME.npy` or `NAME.tiff`, and `NAME.overlay.png`, of each picture.

    Args:
        folder: where to.
        kind: of the maps' files.
        overlays: whether to write overlays, too.
        limit: a picture is rejected where a place of its map reaches this; None where that is unknown.
        scale: the maps' range, for colours and greys; without it, one that suits the limit.

    Attributes:
        full_scale: the white of a TIFF.
        saturated: pixels so far that lie above the white of a TIFF.
    """

    def __init__(
        self,
        folder: Path,
        kind: Literal["npy", "tiff"],
        overlays: bool,
        limit: float | None,
        scale: Scale | None = None,
    ) -> None:
        self.folder = folder
        self.kind = kind
        self.overlays = overlays
        self.limit = limit
        self.scale = scale or ((0.5 * limit, 2 * limit) if limit else None)
        # far above what is normal, the same for all pictures of one checkpoint
        self.full_scale = scale[1] if scale else _TIFF_RANGE * (limit or 1.0)
        self.saturated = 0

    def write(self, name: str, picture: npt.NDArray[np.uint8], scores: Map) -> None:
        """Write the files of one picture.

        Args:
            name: of the picture, with the folders that it lies in.
            picture: (H, W, 3).
            scores: its map (H, W).
        """
        place = self.folder / name
        file = place.with_name(f"{place.name}.{self.kind}")
        self.saturated += write_map(file, scores, full_scale=self.full_scale)
        if self.overlays:
            laid = overlay(picture, scores, scale=self.scale, threshold=self.limit)
            Image.fromarray(laid).save(place.with_name(f"{place.name}.overlay.png"))
