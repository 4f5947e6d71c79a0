"""What an evaluation of a classifier found, sample by sample, and the figures that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_defect.metrics.classification import evaluate

_WATCHED = (
    "accuracy",
    "balanced_accuracy",
    "auroc",
    "average_precision",
    "f1",
    "ece",
    "escape_rate",
    "overkill_rate",
)


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

    def figures(self, threshold: float) -> dict[str, Any]:
        """All figures with their intervals; where parts were photographed more than once, parts are counted."""
        groups = [sample.group or sample.name for sample in self.samples]
        clustered = len(set(groups)) < len(groups)
        return self._evaluate(threshold, groups=groups if clustered else None)

    def watched(self, stage: str, threshold: float) -> dict[str, float]:
        """The figures to log, `<stage>/<name>`, where they are defined; quick, without intervals."""
        return to_log(stage, self._evaluate(threshold, resamples=0))

    def without(self, names: set[str]) -> Evaluation:
        """The same without the samples of these names."""
        kept = [row for row, sample in enumerate(self.samples) if sample.name not in names]
        return replace(
            self,
            samples=[self.samples[row] for row in kept],
            positions=[self.positions[row] for row in kept],
            probabilities=self.probabilities[kept],
            labels=self.labels[kept],
        )

    def _evaluate(self, threshold: float, **settings: Any) -> dict[str, Any]:
        names, normal = self.class_names, self.normal_class
        return evaluate(self.probabilities, self.labels, names, normal_class=normal, threshold=threshold, **settings)


def to_log(stage: str, result: dict[str, Any]) -> dict[str, float]:
    """The figures of `evaluate` that are watched during training, where they are defined."""
    values = {name: result[name]["value"] for name in _WATCHED if name in result}
    values["loss"] = result["nll"]["value"]
    return {f"{stage}/{name}": value for name, value in values.items() if value is not None}


def can_be_watched(labels: npt.NDArray[np.int64], class_names: list[str], normal_class: int | None) -> list[str]:
    """Names of the figures that a validation split with these labels can give."""
    guess = np.full((len(labels), len(class_names)), 1 / len(class_names))
    result = evaluate(guess, labels, class_names, normal_class=normal_class, threshold=0.5, resamples=0)
    return list(to_log("val", result))
