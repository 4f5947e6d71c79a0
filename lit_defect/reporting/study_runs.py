"""What the runs of a study have found: figures of each run, and arms compared seed by seed and picture by picture.

A paired difference has two sources of doubt, and each has an interval of its own: over the seeds (Student's t of the
differences seed by seed, the test pictures given) and over the test pictures (bootstrap of the mean over the seeds,
the trained networks given; photographs of one part are drawn together).
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
from lit_defect.metrics.intervals import Interval, McNemar, mcnemar
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
HOLD_OUT = "test"


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
class Compared:
    """An arm against the baseline on one test set.

    Attributes:
        by_seed: by the keys of `FIGURES`: differences seed by seed, their mean and t interval.
        over_pictures: accuracy, balanced accuracy and AUROC: bootstrap of the mean difference over the seeds.
        discordant: by seed, pictures that only the one or the other has right, with the exact p-value.
        summed: the same of all seeds together, in which each picture counts once for each seed.
        pictures: that all these seeds tested.
    """

    by_seed: Mapping[str, Spread]
    over_pictures: Mapping[str, Interval]
    discordant: Mapping[int, McNemar]
    summed: McNemar
    pictures: int


Results = Mapping[str, Mapping[int, StudyRun]]
"""Runs by arm and seed."""


def read_results(study: Study) -> dict[str, dict[int, StudyRun]]:
    """The tested runs of a study.

    Raises:
        UserError: none at all, or results of something else than a classifier.
    """
    found: dict[str, dict[int, StudyRun]] = {}
    for arm in study.arms:
        for seed in study.seeds:
            run = study.run(arm, seed)
            stages = [stage for stage in (HOLD_OUT, MIRRORED) if has_results(run, stage)]
            if stages:
                found.setdefault(arm, {})[seed] = _read_run(run, stages)
    if not found:
        raise UserError(f"{study.runs_dir}: the study {study.name} has no tested run here yet")
    return found


def spread(runs: Mapping[int, StudyRun], stage: str, figure: str) -> Spread:
    """Of a figure over the seeds of an arm."""
    return Spread.of(run.tested[stage].figures[figure] for run in runs.values() if stage in run.tested)


def compare(first: Mapping[int, StudyRun], other: Mapping[int, StudyRun], stage: str) -> Compared | None:
    """`other` less `first`, over the seeds that both have; None where there are none."""
    pairs = {
        seed: (first[seed].tested[stage], other[seed].tested[stage])
        for seed in first
        if seed in other and stage in first[seed].tested and stage in other[seed].tested
    }
    if not pairs:
        return None
    by_seed = {key: Spread.of(b.figures[key] - a.figures[key] for a, b in pairs.values()) for key in FIGURES}
    tests = {seed: _mcnemar(a, b) for seed, (a, b) in pairs.items()}
    everything = [np.concatenate(part) for part in zip(*(_right(a, b) for a, b in pairs.values()), strict=True)]
    interval, pictures = _over_pictures(list(pairs.values()))
    return Compared(by_seed, interval, tests, mcnemar(*everything), pictures)


def _over_pictures(pairs: Sequence[tuple[Tested, Tested]]) -> tuple[dict[str, Interval], int]:
    """Bootstrap intervals of the mean over seeds, on the pictures that all of them tested; and how many these are."""
    shared = sorted(set.intersection(*(set(tested.names) for pair in pairs for tested in pair)))
    if not shared:
        return {}, 0
    rows = [tuple(_rows(tested, shared) for tested in pair) for pair in pairs]
    one, place = pairs[0][0], rows[0][0]
    labels, classes = one.labels[place], len(one.result["class_names"])
    groups = [one.groups[row] for row in place]

    def stacked(side: int, name: str) -> NDArray[Any]:
        """(n, seeds) of one arm."""
        return np.stack([getattr(pair[side], name)[row[side]] for pair, row in zip(pairs, rows, strict=True)], axis=1)

    def accuracy(weights: Floats, right: NDArray[Any]) -> Floats:
        return weighted.mean(weights, right.mean(axis=1))

    def balanced(weights: Floats, right: NDArray[Any]) -> Floats:
        share, recalls = right.mean(axis=1), []
        for label in range(classes):
            with np.errstate(invalid="ignore", divide="ignore"):
                recalls.append(weights @ (share * (labels == label)) / (weights @ (labels == label)))
        present = [recall for label, recall in enumerate(recalls) if (labels == label).any()]
        return np.mean(present, axis=0)

    def area(weights: Floats, score: NDArray[Any]) -> Floats:
        assert one.defective is not None
        truth = one.defective[place]
        return np.mean([weighted.auroc(weights, truth, score[:, k]) for k in range(score.shape[1])], axis=0)

    right = [stacked(side, "right").astype(np.float64) for side in (0, 1)]
    found = {
        "accuracy": paired_bootstrap(accuracy, [right[0]], [right[1]], groups=groups),
        "balanced_accuracy": paired_bootstrap(balanced, [right[0]], [right[1]], groups=groups),
    }
    if one.defective is not None:
        scores = [stacked(side, "score") for side in (0, 1)]
        found["auroc"] = paired_bootstrap(area, [scores[0]], [scores[1]], groups=groups)
    return found, len(shared)


def _rows(tested: Tested, names: Sequence[str]) -> NDArray[np.int64]:
    place = {name: row for row, name in enumerate(tested.names)}
    return np.array([place[name] for name in names])


def _right(a: Tested, b: Tested) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """What both arms made of the pictures that both have."""
    shared = sorted(set(a.names) & set(b.names))
    return a.right[_rows(a, shared)], b.right[_rows(b, shared)]


def _mcnemar(a: Tested, b: Tested) -> McNemar:
    return mcnemar(*_right(a, b))


def _read_run(run: RunFolder, stages: Sequence[str]) -> StudyRun:
    parts = _csv(run.path / "splits.csv")
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
