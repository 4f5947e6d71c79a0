"""Arms held against a baseline: what their differences are, and what these allow to say.

1. The unit is the seed: differences are taken seed by seed, over the seeds that both arms have.
2. A pair is refused whose runs were tested on different pictures or other data.
3. What is concluded rests on one figure and one interval for each arm, at 1 - 0.05 / k for k arms, by the rule of
   studies (study_verdict). Where predictions of the same pictures exist it holds both sources of doubt, seeds and
   pictures; elsewhere seeds only, and the conclusion says so.
4. A table of all figures has paired t tests, their p-values adjusted together by Holm's procedure (1979).
5. Training logs and mirrored training pictures conclude nothing.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import stats

from lit_defect.errors import UserError
from lit_defect.metrics.intervals import Interval, t_interval
from lit_defect.report.arms import Arm, Seeds
from lit_defect.report.collect import RunInfo
from lit_defect.report.figures import better, ends_of_difference, label
from lit_defect.report.splits import read_splits, tested_names
from lit_defect.reporting.seeds import Spread
from lit_defect.reporting.study_runs import Judged, StudyRun, Tested, compare, judge, read_run
from lit_defect.reporting.study_verdict import verdict

_JUDGED = {"accuracy": "accuracy", "balanced_accuracy": "balanced_accuracy", "auroc": "auroc", "defect_auroc": "auroc"}
"""Figures of a classifier that have an interval over pictures, by the names of study_runs."""
_DETECTED = "image/auroc"
_UNREADABLE = (UserError, OSError, KeyError, ValueError)
"""Predictions or splits that are missing, or of another kind."""


@dataclass(frozen=True)
class Difference:
    """`arm` less the baseline in one figure.

    Attributes:
        spread: of the differences seed by seed.
        p_value: of the paired t test; nan for fewer than two seeds, or differences that are all the same.
        adjusted: the same by Holm, over all tests of the table.
        refused: why there is none, if so.
        values: seed by seed.
    """

    arm: str
    figure: str
    spread: Spread = field(default_factory=Spread)
    p_value: float = math.nan
    adjusted: float = math.nan
    refused: str = ""
    values: Sequence[float] = ()

    def limits(self, level: float) -> Interval:
        """The t interval of the mean at a level; without limits where all seeds say the same, which tells no spread."""
        found = t_interval(self.values, level)
        within = Spread(found.value, low=found.low, high=found.high).within(*ends_of_difference(self.figure))
        return replace(found, low=within.low, high=within.high)


@dataclass(frozen=True)
class OverPictures:
    """An arm against the baseline picture by picture: what is judged, and pictures that only one has right.

    Attributes:
        said: the conclusion in words.
        judged: difference with one interval for seeds and pictures.
        only_baseline, only_arm: pictures that only the one has right, counted once for each seed; None of a detector.
        p_values: of the exact McNemar test, by seed.
    """

    arm: str
    said: str
    judged: Judged
    only_baseline: int | None = None
    only_arm: int | None = None
    p_values: Sequence[float] = ()


def paired_t(first: Mapping[Seeds, float], other: Mapping[Seeds, float]) -> tuple[Spread, float]:
    """Mean of `other` less `first` over the seeds of both with its t interval, and the p-value of the paired t test."""
    differences = _by_seed(first, other)
    spread = Spread.of(differences)
    if math.isnan(spread.low):
        return spread, math.nan
    return spread, float(2 * stats.t.sf(abs(spread.mean) / (spread.sd / math.sqrt(spread.seeds)), spread.seeds - 1))


def _by_seed(first: Mapping[Seeds, float], other: Mapping[Seeds, float]) -> list[float]:
    return [other[seed] - first[seed] for seed in first if seed in other]


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given; nan stays nan and does not count."""
    order = sorted((k for k, p in enumerate(p_values) if math.isfinite(p)), key=lambda k: p_values[k])
    adjusted, running = [math.nan] * len(p_values), 0.0
    for rank, k in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p_values[k]))
        adjusted[k] = running
    return adjusted


def differences(baseline: Arm, others: Sequence[Arm], stage: str, figures: Sequence[str]) -> list[Difference]:
    """All arms and figures, with p-values adjusted together."""
    found = []
    for arm in others:
        refused = unlike_pictures(baseline, arm, stage)
        for figure in figures:
            first, other = baseline.by_seed(stage, figure), arm.by_seed(stage, figure)
            if not first or not other:
                continue
            if refused:
                found.append(Difference(arm.name, figure, refused=refused))
            elif not first.keys() & other.keys():
                found.append(Difference(arm.name, figure, refused="no seed that both have"))
            else:
                spread, p_value = paired_t(first, other)
                spread = spread.within(*ends_of_difference(figure))
                found.append(Difference(arm.name, figure, spread, p_value, values=_by_seed(first, other)))
    adjusted = holm([one.p_value for one in found])
    return [replace(one, adjusted=p) for one, p in zip(found, adjusted, strict=True)]


def unlike_pictures(baseline: Arm, arm: Arm, stage: str) -> str:
    """Why runs of the same seed cannot be paired: other data or other test pictures; empty where they can be."""
    mine = {run.seeds: run for run in baseline.runs if stage in run.measured}
    for run in arm.runs:
        if stage not in run.measured or run.seeds not in mine:
            continue
        if mine[run.seeds].data != run.data:
            return f"of other data: {mine[run.seeds].data} and {run.data}"
        first, other = (tested_names(one, stage) for one in (mine[run.seeds], run))
        if first and other and first != other:
            shared = len(first & other)
            return (
                f"tested on different pictures: {len(first)} and {len(other)} of seed {run.seeds[0]}, {shared} shared"
            )
        sizes = [one.measured[stage].about.get("n") for one in (mine[run.seeds], run)]
        if None not in sizes and sizes[0] != sizes[1]:
            return f"tested on different pictures: {sizes[0]} and {sizes[1]} of seed {run.seeds[0]}"
    return ""


def over_pictures(baseline: Arm, others: Sequence[Arm], stage: str, figure: str) -> list[OverPictures]:
    """The judged figure picture by picture; empty where predictions do not tell."""
    key = "auroc" if figure == _DETECTED else _JUDGED.get(figure)
    of_defects = any("defect_auroc" in run.measured[stage].about for run in baseline.runs if stage in run.measured)
    if key is None or baseline.repeated or (figure == "auroc" and of_defects):
        return []  # study_runs takes the AUROC of good against defects where there is one
    try:
        first = _tested(baseline, stage, figure)
    except _UNREADABLE:
        return []
    found = (_over_pictures(first, arm, stage, figure, key, level_of(others)) for arm in others
             if not arm.repeated and not unlike_pictures(baseline, arm, stage))  # fmt: skip
    return [one for one in found if one is not None]


def _over_pictures(
    first: Mapping[Seeds, StudyRun], arm: Arm, stage: str, figure: str, key: str, level: float
) -> OverPictures | None:
    """One arm; None where its predictions do not tell, so that its seeds remain."""
    try:
        other = _tested(arm, stage, figure)
        judged = judge(first, other, stage, key, level)
        if judged is None:
            return None
        said = verdict(judged, label(figure), level)
        both = compare(first, other, stage) if figure != _DETECTED else None
    except _UNREADABLE:
        return None
    if both is None:
        return OverPictures(arm.name, said, judged)
    p_values = tuple(test.p_value for test in both.discordant.values())
    return OverPictures(arm.name, said, judged, both.summed.only_a, both.summed.only_b, p_values)


def level_of(others: Sequence[Arm]) -> float:
    """Of each arm's interval, so that 95 % hold for all of them together (Bonferroni)."""
    return 1 - 0.05 / max(1, len(others))


def seeds_only(found: Difference, baseline: str, level: float) -> str:
    """What a difference over seeds alone allows to say."""
    name, spread, n = label(found.figure), found.spread, found.spread.seeds
    if found.refused:
        return f"no conclusion on {name}: {found.refused}."
    if n < 2:
        return f"no conclusion on {name}: {n} seed that both have; a difference over seeds needs two at the very least."
    if not math.isfinite(found.p_value):
        return f"no conclusion on {name}: its difference to {baseline} is {spread.mean:+z.4g} for each of {n} seeds."
    limits = found.limits(level)
    text = f"{name} {spread.mean:+z.3g} ({limits.low:+z.3g} to {limits.high:+z.3g} at {100 * level:.4g} %, {n} seeds): "
    if limits.low <= 0 <= limits.high:
        return text + "no difference is shown; none is excluded within these limits either."
    good = better(found.figure)
    word = "larger" if spread.mean > 0 else "smaller"
    said = word if good is None else "better" if word == good else "worse"
    return text + f"{said} on these pictures, over seeds; what other pictures would change is not in it."


def p_text(p_value: float) -> str:
    """`0.034`, `< 0.001`; empty for nan."""
    return "" if math.isnan(p_value) else "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def _tested(arm: Arm, stage: str, figure: str) -> dict[Seeds, StudyRun]:
    """Predictions by seed."""
    runs = [run for run in arm.runs if stage in run.measured]
    if figure != _DETECTED:
        return {run.seeds: read_run(run.folder, [stage]) for run in runs}
    return {run.seeds: StudyRun(run.folder, {stage: _detected(run, stage)}, {}, {}, "") for run in runs}


def _detected(run: RunInfo, stage: str) -> Tested:
    """Scores of a detector or localiser; it calls no names, so nothing is right or wrong."""
    with (run.folder.path / f"{stage}_predictions.csv").open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    splits = read_splits(run)
    names = [row["name"] for row in rows]
    defective = np.array([row["label"] != "good" for row in rows])
    return Tested(
        figures={"auroc": run.measured[stage].figures[_DETECTED].value},
        result=run.measured[stage].about,
        names=names,
        labels=defective.astype(np.int64),
        right=np.zeros(len(rows), bool),
        score=np.array([float(row["score"]) for row in rows]),
        defective=defective,
        groups=[splits.groups.get(name, name) for name in names] if splits else names,
    )
