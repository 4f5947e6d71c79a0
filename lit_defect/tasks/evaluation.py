"""What an evaluation of a classifier found, sample by sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Evaluation:
    """Predictions of a whole split, in the order of its samples.

    Attributes:
        samples: n samples of the data module.
        positions: n positions in the split.
        probabilities: (n, C).
        labels: (n,), -1 where unknown.
        class_names: C names.
        normal_class: index of the good class, or None.
    """

    samples: list[Any]
    positions: list[int]
    probabilities: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]
    class_names: list[str]
    normal_class: int | None
