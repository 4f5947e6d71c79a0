"""What the runs of a study have found: figures of each run, and arms compared seed by seed and picture by picture.

A paired difference has two sources of doubt, and each has an interval of its own: over the seeds (Student's t of the
differences seed by seed, the test pictures given) and over the test pictures (bootstrap of the mean over the seeds,
the trained networks given; photographs of one part are drawn together). What is concluded rests on both at once.
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_defect.errors import UserError
from lit_defect.metrics import weighted
from lit_defect.metrics.bootstrap import Floats, paired_bootstrap
from lit_defect.metrics.intervals import Interval, McNemar, mcnemar, t_interval
from lit_defect.reporting.seeds import Spread
from lit_defect.runs import MIRRORED, RunFolder
from lit_defect.study_file import Study
from lit_defect.study_plan import has_results

REAL = "real"  # what splits.csv calls pictures that nothing has generated
FIGURES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "auroc": "AUROC",
    "recall": "defects found",
    "false_alarms": "false alarms",
}
"""The last two: share of the defective pictures that are called by any defect's name, and of the good ones."""
OVER_PICTURES = ("accuracy", "balanced_accuracy", "auroc")
"""Figures that have an interval over test pictures."""
HOLD_OUT = "test"
STAGES = {HOLD_OUT: "hold-out", MIRRORED: "mirrored training pictures"}


@dataclass(frozen=True)
class Tested:
    """One run on one test set.

    Attributes:
        figures: by the keys of `FIGURES`; nan where undefined.
        result: all that the metrics' file says.
        names, right, score: of n pictures: name, whether the class is right, and the score of being defective.
        defective: (n,) or None where the classes have no normal one.
        labels: (n,) indices of the classes.
        groups: (n,) the part that each picture shows.
    """

    figures: Mapping[str, float]
    result: Mapping[str, Any]
    names: list[str]
    labels: NDArray[np.int64]
    right: NDArray[np.bool_]
    score: Floats
    defective: NDArray[np.bool_] | None
    groups: list[str]


@dataclass(frozen=True)
class StudyRun:
    """A finished run of an arm.

    Attributes:
        folder: of the run.
        tested: results by `test` and, where there are, `mirrored`.
        real: real training pictures by class.
        generated: generated ones by class or kind of defect.
        generator: what made them; empty where there are none.
    """

    folder: RunFolder
    tested: Mapping[str, Tested]
    real: Mapping[str, int]
    generated: Mapping[str, int]
    generator: str


@dataclass(frozen=True)
class Judged:
    """Difference of one figure between an arm and the baseline, with both sources of doubt in one interval.

    Attributes:
        value: mean of the differences seed by seed.
        low, high: `value` less, and plus, the root of the summed squares of the two intervals' arms on that side: seeds
            and pictures move it independently. Within [-1, 1]; nan where either interval has no limits.
        seeds, pictures, parts: that it rests on.
        reason: why there are no limits, if so.
    """

    value: float
    low: float
    high: float
    seeds: int
    pictures: int
    parts: int
    reason: str = ""


@dataclass(frozen=True)
class Compared:
    """An arm against the baseline on one test set.

    Attributes:
        by_seed: by the keys of `FIGURES`: differences seed by seed, their mean and t interval.
        over_pictures: accuracy, balanced accuracy and AUROC: bootstrap of the mean difference over the seeds.
        discordant: by seed, pictures that only the one or the other has right, with the exact p-value.
        summed: the same of all seeds together, in which each picture counts once for each seed.
        pictures: that all these seeds tested.
        parts: that these pictures show.
    """

    by_seed: Mapping[str, Spread]
    over_pictures: Mapping[str, Interval]
    discordant: Mapping[Any, McNemar]
    summed: McNemar
    pictures: int
    parts: int


Results = Mapping[str, Mapping[int, StudyRun]]
"""Runs by arm and seed."""


def read_results(study: Study) -> dict[str, dict[int, StudyRun]]:
    """The tested runs of a study.

    Raises:
        UserError: none at all, results of something else than a classifier, or files that are missing.
    """
    found: dict[str, dict[int, StudyRun]] = {}
    for arm in study.arms:
        for seed in study.seeds:
            run = study.run(arm, seed)
            stages = [stage for stage in (HOLD_OUT, MIRRORED) if has_results(run, stage)]
            if stages:
                found.setdefault(arm, {})[seed] = read_run(run, stages)
    if not found:
        raise UserError(f"{study.runs_dir}: the study {study.name} has no tested run here yet")
    return found


def has_stage(results: Results, stage: str) -> bool:
    """Whether any run has been tested so."""
    return any(stage in run.tested for runs in results.values() for run in runs.values())


def spread(runs: Mapping[int, StudyRun], stage: str, figure: str) -> Spread:
    """Of a figure over the seeds of an arm."""
    values = (run.tested[stage].figures[figure] for run in runs.values() if stage in run.tested)
    return Spread.of(values).within(0, 1)


def compare(first: Mapping[Any, StudyRun], other: Mapping[Any, StudyRun], stage: str) -> Compared | None:
    """`other` less `first`, over the seeds that both have tested on the same pictures; None where there are none."""
    if not (pairs := _pairs(first, other, stage)):
        return None
    by_seed = {key: Spread.of(_differences(pairs, key)).within(-1, 1) for key in FIGURES}
    tests = {seed: mcnemar(*_right(a, b)) for seed, (a, b) in pairs.items()}
    everything = [np.concatenate(part) for part in zip(*(_right(a, b) for a, b in pairs.values()), strict=True)]
    shared = _SharedPictures(list(pairs.values()))
    intervals = {key: found for key in OVER_PICTURES if (found := shared.interval(key)) is not None}
    return Compared(by_seed, intervals, tests, mcnemar(*everything), len(shared.names), shared.parts)


def judge(
    first: Mapping[Any, StudyRun], other: Mapping[Any, StudyRun], stage: str, key: str, level: float
) -> Judged | None:
    """`other` less `first` in one of `OVER_PICTURES`, with one interval of a level; None as in `compare`."""
    if not (pairs := _pairs(first, other, stage)):
        return None
    differences = [value for value in _differences(pairs, key) if math.isfinite(value)]
    shared = _SharedPictures(list(pairs.values()))
    seeds = t_interval(differences, level)
    pictures = shared.interval(key, level) or Interval(math.nan, reason="not defined on these pictures")
    low = seeds.value - math.hypot(seeds.value - seeds.low, pictures.value - pictures.low)
    high = seeds.value + math.hypot(seeds.high - seeds.value, pictures.high - pictures.value)
    reason = seeds.reason or pictures.reason
    if math.isfinite(low + high):  # shares differ by no more, whatever t says of two seeds
        low, high = max(-1.0, low), min(1.0, high)
    return Judged(seeds.value, low, high, len(differences), len(shared.names), shared.parts, reason)


def _pairs(
    first: Mapping[Any, StudyRun], other: Mapping[Any, StudyRun], stage: str
) -> dict[Any, tuple[Tested, Tested]]:
    """By the seeds that both have tested, on the same pictures: of others a difference says nothing of the arms."""
    both = {
        seed: (first[seed].tested[stage], other[seed].tested[stage])
        for seed in first
        if seed in other and stage in first[seed].tested and stage in other[seed].tested
    }
    return {seed: (a, b) for seed, (a, b) in both.items() if set(a.names) == set(b.names)}


def _differences(pairs: Mapping[int, tuple[Tested, Tested]], key: str) -> list[float]:
    return [b.figures[key] - a.figures[key] for a, b in pairs.values()]


class _SharedPictures:
    """The pictures that all of these pairs tested, `names`, and how many `parts` they show."""

    def __init__(self, pairs: Sequence[tuple[Tested, Tested]]) -> None:
        self.pairs = pairs
        self.names = sorted(set.intersection(*(set(tested.names) for pair in pairs for tested in pair)))
        self._rows = [tuple(_rows(tested, self.names) for tested in pair) for pair in pairs]
        one, place = pairs[0][0], self._rows[0][0]
        self.labels = one.labels[place]
        self.defective = None if one.defective is None else one.defective[place]
        self.groups = [one.groups[row] for row in place]
        self.parts = len(set(self.groups))

    def interval(self, key: str, level: float = 0.95) -> Interval | None:
        """Bootstrap of the mean difference over the seeds, whole parts drawn; None where it is undefined."""
        if not self.names or (key == "auroc" and self.defective is None):
            return None
        statistics = {"accuracy": self._accuracy, "balanced_accuracy": self._balanced, "auroc": self._area}
        name = "score" if key == "auroc" else "right"
        arms = [self._stacked(side, name) for side in (0, 1)]
        return paired_bootstrap(statistics[key], [arms[0]], [arms[1]], groups=self.groups, level=level)

    def _stacked(self, side: int, name: str) -> Floats:
        """(n, seeds) of one arm."""
        found = [getattr(pair[side], name)[row[side]] for pair, row in zip(self.pairs, self._rows, strict=True)]
        return np.stack(found, axis=1).astype(np.float64)

    def _accuracy(self, weights: Floats, right: Floats) -> Floats:
        return weighted.mean(weights, right.mean(axis=1))

    def _balanced(self, weights: Floats, right: Floats) -> Floats:
        share, recalls = right.mean(axis=1), []
        for label in np.unique(self.labels):
            with np.errstate(invalid="ignore", divide="ignore"):
                recalls.append(weights @ (share * (self.labels == label)) / (weights @ (self.labels == label)))
        return np.mean(recalls, axis=0)

    def _area(self, weights: Floats, score: Floats) -> Floats:
        assert self.defective is not None
        areas = [weighted.auroc(weights, self.defective, score[:, k]) for k in range(score.shape[1])]
        return np.mean(areas, axis=0)


def _rows(tested: Tested, names: Sequence[str]) -> NDArray[np.int64]:
    place = {name: row for row, name in enumerate(tested.names)}
    return np.array([place[name] for name in names])


def _right(a: Tested, b: Tested) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """What both arms made of their pictures, in one order."""
    names = sorted(a.names)
    return a.right[_rows(a, names)], b.right[_rows(b, names)]


def read_run(run: RunFolder, stages: Sequence[str]) -> StudyRun:
    """One tested run of a classifier.

    Raises:
        UserError: files that are missing, or results of something else.
    """
    if not (parts := _csv(run.path / "splits.csv")):
        raise UserError(
            f"{run.path / 'splits.csv'} is missing, which says what trained and which photographs show one part: put "
            "it back, or remove that folder and run the study again"
        )
    group_of = {row["name"]: row.get("group") or row["name"] for row in parts}
    tested = {stage: _read_tested(run, stage, group_of) for stage in stages}
    names = next(iter(tested.values())).result["class_names"]
    real, generated, generators = Counter(dict.fromkeys(names, 0)), Counter[str](), set()
    for row in parts:
        if row["split"] == "train":
            source = row.get("source") or REAL
            (real if source == REAL else generated)[_class_name(row["label"], names)] += 1
            generators |= {source} - {REAL}
    generated.update(row["defect_type"] for row in _csv(run.path / "synthetic.csv") if row["split"] == "train")
    told = run.path / "synthetic.json"
    if told.is_file():
        generators.add(str(json.loads(told.read_text(encoding="utf-8")).get("generator")))
    return StudyRun(run, tested, real, generated, ", ".join(sorted(generators)))


def _read_tested(run: RunFolder, stage: str, group_of: Mapping[str, str]) -> Tested:
    file = run.path / f"{stage}_metrics.json"
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        names, normal, confusion = result["class_names"], result["normal_class"], np.array(result["confusion"])
        figures = {key: result[key]["value"] for key in ("accuracy", "balanced_accuracy")}
        figures["auroc"] = (result.get("defect_auroc") or result["auroc"])["value"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} does not hold the metrics of a classifier, which a study compares") from None
    lines = _csv(run.path / f"{stage}_predictions.csv")
    if len(lines) != result["n"]:
        raise UserError(
            f"{run.path / f'{stage}_predictions.csv'} has {len(lines)} pictures, {file} {result['n']}: remove both, "
            "and the study tests that run again"
        )
    labels = np.array([names.index(line["label"]) for line in lines])
    figures |= _errors(confusion, normal)
    return Tested(
        figures={key: math.nan if value is None else float(value) for key, value in figures.items()},
        result=result,
        names=[line["name"] for line in lines],
        labels=labels,
        right=np.array([line["label"] == line["prediction"] for line in lines]),
        score=np.array([float(line["score"]) for line in lines]),
        defective=None if normal is None else labels != normal,
        groups=[group_of.get(name := line["name"].removesuffix("#mirrored"), name) for line in lines],
    )


def _errors(confusion: NDArray[np.int64], normal: int | None) -> dict[str, float]:
    """Share of the defective pictures, and of the good ones, that were given a defect's name."""
    if normal is None:
        return {"recall": math.nan, "false_alarms": math.nan}
    called = np.delete(confusion, normal, axis=1).sum(axis=1)
    bad, good = np.delete(confusion, normal, axis=0).sum(), confusion[normal].sum()
    return {
        "recall": float(np.delete(called, normal).sum() / bad) if bad else math.nan,
        "false_alarms": float(called[normal] / good) if good else math.nan,
    }


def _class_name(label: str, names: Sequence[str]) -> str:
    return names[int(label)] if label.isdigit() and int(label) < len(names) else label


def _csv(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))
