"""What `predict` leaves of a picture: its mask and an overlay at the picture's own size, and maps at the network's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lit_defect.reporting.maps import write_map
from lit_defect.reporting.probabilities import write_header, write_probabilities
from lit_defect.reporting.segmentation_panels import overlay_mask, write_mask_png
from lit_defect.runs import keep_previous

MASKS, MAPS, UNCERTAINTY = "predict_masks", "probabilities", "predict_uncertainty"


@dataclass(frozen=True)
class MaskWriter:
    """Writes the files of one prediction.

    Attributes:
        folder: the run's.
        class_names: what the class ids mean.
        maps: whether to write probability maps, too.
        overlays: whether to write each picture with its mask laid over.
    """

    folder: Path
    class_names: list[str]
    maps: bool
    overlays: bool

    def begin(self) -> None:
        """Keep the files of an earlier prediction under a number."""
        for name in (MASKS, MAPS, UNCERTAINTY):
            keep_previous(self.folder / name)
        if self.maps:
            write_header(self.folder / MAPS, self.class_names)

    def write(
        self, name: str, picture: npt.NDArray[np.uint8], probabilities: Tensor, uncertainty: Tensor | None
    ) -> None:
        """Write `NAME.png`, `NAME.overlay.png`, and the maps `NAME.npy` of one picture.

        Args:
            name: of the picture, with the folders that it lies in.
            picture: (H, W, 3), at its own size.
            probabilities: (C, h, w), as the network gave them; enlarged for the mask.
            uncertainty: (h, w) or None.
        """
        mask = enlarged(probabilities[None], picture.shape[:2])[0].argmax(0).byte().cpu().numpy()
        place = self.folder / MASKS / name
        write_mask_png(place.with_name(f"{place.name}.png"), mask)
        if self.overlays:
            laid = overlay_mask(picture, mask, len(self.class_names))
            Image.fromarray(laid).save(place.with_name(f"{place.name}.overlay.png"))
        if self.maps:
            write_probabilities(self.folder / MAPS, name, probabilities.float().cpu().numpy())
            if uncertainty is not None:
                write_map(self.folder / UNCERTAINTY / f"{name}.npy", uncertainty.float().cpu().numpy())


def enlarged(probabilities: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, h, w) -> (B, C, H, W) float32, at the pictures' own size."""
    return F.interpolate(probabilities.float(), size=list(size), mode="bilinear", align_corners=False)
