"""Figures out of a `<stage>_metrics.json`, of whatever task: named, told apart by what they are, and put into words.

1. Every number in the file is a leaf of a tree: either plain or `{value, low, high}`; its name is its path, such as
   `image/auroc`, `refined/iou`, `gain/refined/iou`.
2. Leaves below `..._by_class`, `..._by_type` and, of a classifier, below recall and precision, are figures of parts.
3. Leaves below `without_near_duplicates` are the same figures on what is left without those pictures.
4. Times and counts are no results: times are costs, counts are left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

_COUNTS = (
    "n", "n_groups", "n_defined", "level", "seed", "threshold", "k", "score", "better", "worse", "equal", "undefined",
    "training_seed", "split_seed", "required_recall", "wilcoxon_p", "found", "normal_class",
)  # fmt: skip
_NO_RESULTS = frozenset(("counts", "parameters", "settings", "training_pictures"))
_COSTS = ("training_minutes", "images_per_second", "latency_ms", "ms_per_image", "network_calls")
_BY_PART = re.compile(r"(?:(.*)_)?by_(?:class|type)$")

_WORDS = {
    "auroc": "AUROC", "ap": "AP", "average_precision": "average precision", "f1": "F1", "f1_max": "F1-max",
    "iou": "IoU", "pooled_iou": "pooled IoU", "boundary_iou": "boundary IoU", "hd95": "HD95", "dice": "Dice",
    "aupro": "AUPRO", "ece": "calibration error (ECE)", "brier": "Brier score", "nll": "negative log-likelihood",
    "psnr": "PSNR", "ssim": "SSIM", "ause": "AUSE", "stage1": "stage 1", "fid": "FID", "kid": "KID", "lpips": "LPIPS",
}  # fmt: skip
_SMALLER = re.compile(
    r"(loss|escape_rate|overkill_rate|ece|brier|nll|hd95|ause|fid|kid|lpips|kl|error|rejected|false_alarms|_ms|minutes|"
    r"median|p95)$|^(latency_ms|ms_per_image|network_calls|training_minutes)"
)
_LARGER = re.compile(
    r"(auroc|ap|average_precision|f1|f1_max|accuracy|recall|precision|iou|dice|aupro|psnr\w*|ssim|images_per_second|"
    r"pictures_per_second)$"
)
_SHARE = re.compile(
    r"(auroc|ap|average_precision|f1|f1_max|accuracy|recall|precision|iou|dice|aupro|escape_rate|overkill_rate|"
    r"false_alarms|ece)$"
)
_AVERAGE_PRECISION = "area below precision over recall as the threshold moves: 1 is perfect"
_MEANINGS = {
    "auroc": "chance that a defective one scores higher than a good one: 1 is perfect, 0.5 is guessing",
    "ap": _AVERAGE_PRECISION,
    "average_precision": _AVERAGE_PRECISION,
    "f1": "harmonic mean of precision and recall, from 0 to 1",
    "f1_max": "harmonic mean of precision and recall at the threshold that is best on these very pictures",
    "accuracy": "share that is called right",
    "balanced_accuracy": "mean of the shares of each class that are called right, so that rare classes count as much",
    "recall": "share of a class that is found",
    "precision": "share of what is called so that is so",
    "escape_rate": "share of the defective ones that pass as good",
    "overkill_rate": "share of the good ones that are rejected",
    "iou": "overlap of found and true area: what both have by what either has, from 0 to 1",
    "boundary_iou": "overlap of found and true area close to their outlines, from 0 to 1",
    "dice": "overlap of found and true area: twice what both have by the sum of the two, from 0 to 1",
    "aupro": "share of each defect's area that is found, over thresholds with few false alarms: 1 is perfect",
    "hd95": "distance between found and true outlines that 95 % of their pixels keep, in pixels",
    "ece": "how far told probabilities are from the shares that come true, from 0 to 1",
    "brier": "mean squared error of told probabilities: 0 is perfect",
    "nll": "mean negative logarithm of the probability told for the truth: 0 is perfect",
    "ssim": "likeness of two pictures: 1 is the same",
    "psnr": "likeness of two pictures, in decibel",
}
_PREFERRED = (
    "defect_auroc", "auroc", "balanced_accuracy", "accuracy", "average_precision", "f1",
    "image/auroc", "pixel/average_precision", "pixel/aupro", "image/average_precision", "pixel/auroc",
    "refined/iou", "gain/refined/iou", "segmenter/iou", "stage1/iou", "refined/boundary_iou", "segmenter/boundary_iou",
    "escape_rate", "overkill_rate", "image/escape_rate", "image/overkill_rate",
)  # fmt: skip
_SHOWN = 6


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure of one evaluation with the limits that its file gives over its pictures; nan where undefined."""

    value: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Measured:
    """What one evaluation says.

    Attributes:
        figures: by name.
        parts: by figure, then by class or type of defect.
        fresh: figures without the near-duplicates of training pictures.
        costs: times and rates.
        about: the whole file.
    """

    figures: Mapping[str, Figure]
    parts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    fresh: Mapping[str, Figure] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)


def read_measured(result: Mapping[str, Any]) -> Measured:
    """Put the numbers of a metrics file where they belong."""
    figures: dict[str, Figure] = {}
    parts: dict[str, dict[str, float]] = {}
    fresh: dict[str, Figure] = {}
    costs: dict[str, float] = {}
    score = str(result.get("score"))
    for path, figure in _leaves(result):
        if path[-1] in _COUNTS or _NO_RESULTS.intersection(path[:-1]) or not math.isfinite(figure.value):
            continue
        if path[0] in _COSTS:
            costs["/".join(path)] = figure.value
        elif path[0] == "without_near_duplicates":
            name, part = _place(path[1:], score)
            if not part:
                fresh[name] = figure
        else:
            name, part = _place(path, score)
            if part:
                parts.setdefault(name, {})[part] = figure.value
            else:
                figures[name] = figure
    return Measured(figures, parts, fresh, costs, result)


def label(name: str) -> str:
    """`refined/boundary_iou` -> `refined boundary IoU`."""
    words = (_WORDS.get(word, word.replace("_", " ")) for word in name.split("/"))
    return " ".join(words)


def meaning(name: str) -> str:
    """What a figure says, for who has not met it; empty where its name says it."""
    *places, last = name.split("/")
    said = _MEANINGS.get(last.removeprefix("defect_").removeprefix("pooled_"), "")
    whose = "of single pixels" if said and "pixel" in places and last != "aupro" else ""
    gained = "what refinement adds to stage 1" if "gain" in places else ""
    return "; ".join(filter(None, (gained, said, whose)))


def better(name: str) -> Literal["larger", "smaller"] | None:
    """Which of a figure's values are good ones, where its name tells."""
    last = name.rpartition("/")[2]
    if _SMALLER.search(name):
        return "larger" if name.startswith("gain/") else "smaller"
    return "larger" if name.startswith("gain/") or _LARGER.search(last) else None


def ends(name: str) -> tuple[float, float]:
    """The least and the largest value of a figure that is a share by its name; infinite of another."""
    if not _SHARE.search(name.rpartition("/")[2]):
        return -math.inf, math.inf
    return (-1.0, 1.0) if name.startswith("gain/") else (0.0, 1.0)


def ends_of_difference(name: str) -> tuple[float, float]:
    """The same of the difference of two such values."""
    low, high = ends(name)
    return low - high, high - low


def digits(values: Iterable[float]) -> int:
    """Behind the point, for values of this size."""
    size = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return 3 if size < 2 else 2 if size < 100 else 1


def choose(names: Sequence[str]) -> list[str]:
    """The figures that a reader wants first, the one that is judged by in front: one that no threshold decides.

    Args:
        names: of all figures that there are, in their order in the files.
    """
    known = [name for name in _PREFERRED if name in names]
    rest = [name for name in names if better(name) and name.count("/") < 2 and name not in known]
    return (known or rest or list(names))[:_SHOWN]


def _leaves(node: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Figure]]:
    for key, value in node.items():
        here = (*path, str(key))
        if isinstance(value, Mapping):
            if "value" in value and not isinstance(value["value"], Mapping):
                yield here, Figure(*(_number(value.get(name)) for name in ("value", "low", "high")))
            else:
                yield from _leaves(value, here)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield here, Figure(float(value))


def _place(path: tuple[str, ...], score: str) -> tuple[str, str]:
    """Name of the figure and of the part that it is of; the latter is empty for the whole."""
    if path[0] in ("methods", "figures") and len(path) > 1:
        path = path[1:]
    elif path[0] == "image" and len(path) > 2 and path[1] == score:
        path = ("image", *path[2:])
    elif path[0] == "pixel":
        path = ("pixel", *(word.removeprefix("pixel_") for word in path[1:]))
    if path[0] == "pixel_by_type" and len(path) == 3:
        return f"pixel/{path[2].removeprefix('pixel_')}", path[1]
    if path[0] in ("recall", "precision") and len(path) == 2:
        return path[0], path[1]
    for place, word in enumerate(path[:-1]):
        if found := _BY_PART.match(word):
            name = (*path[:place], *([found.group(1)] if found.group(1) else []))
            return "/".join(name), " ".join(path[place + 1 :])
    return "/".join(path), ""


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
