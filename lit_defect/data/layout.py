"""What a data set says of itself: its samples, its classes, what its masks mean; all else is the same for every one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_defect.data.images import Array
from lit_defect.data.samples import Sample


class Layout(ABC):
    """The questions that a data module answers for its layout on disk."""

    @abstractmethod
    def find_samples(self) -> list[Sample]:
        """All samples of the data set; `split` is set where the layout prescribes one."""

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """Names of the labels 0, 1, ...; known after `setup` at the latest."""

    @property
    def normal_class(self) -> int | None:
        """Label of the good class, or None if there is none."""
        return None

    @property
    def needed_classes(self) -> list[str]:
        """Classes without which the data set is refused."""
        return self.class_names

    @property
    def good_only(self) -> bool:
        """Whether only good samples train and validate; a defective one that does not test is not used."""
        return False

    def label_of(self, defect_type: str) -> int | None:
        """Label of pictures with this kind of defect, as generated pictures name it; None if there is no such class."""
        names = self.class_names
        return names.index(defect_type) if defect_type in names else None

    def prepare_mask(self, values: Array, sample: Sample) -> npt.NDArray[Any]:
        """The mask in the batch, made of the stored values (H, W): here (1, H, W) uint8, 1 where not 0."""
        return (values > 0)[None].astype(np.uint8)
