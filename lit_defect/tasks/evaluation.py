"""What an evaluation of a classifier found, sample by sample, and the figures that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_defect.errors import UserError
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

    def result(self, threshold: float, leaked: set[str]) -> dict[str, Any]:
        """All figures, and those without the samples of these names, which other splits have nearly the same of."""
        figures, fresh = self.figures(threshold), self.without(leaked)
        if leaked and fresh.samples:
            figures["without_near_duplicates"] = fresh.figures(threshold)
        return figures

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


def check_watched(key: str, labels: npt.NDArray[np.int64], class_names: list[str], normal_class: int | None) -> None:
    """Refuse to watch a figure that a validation split cannot give, before the first epoch and not after it.

    Args:
        key: what is watched, such as `val/auroc`.
        labels: (n,) of the split.
        class_names, normal_class: as in `Evaluation`.

    Raises:
        UserError: with the figures that can be had.
    """
    if not key.startswith("val/"):
        return
    guess = np.full((len(labels), len(class_names)), 1 / len(class_names))
    result = evaluate(guess, labels, class_names, normal_class=normal_class, threshold=0.5, resamples=0)
    defined = to_log("val", result)
    if key not in defined:
        found = ", ".join(class_names[label] for label in np.unique(labels))
        raise UserError(
            f"model.init_args.monitor = {key}: not to be had from a validation split with the classes "
            f"{found}; choose one of {', '.join(defined)}, or change data.val_fraction"
        )
