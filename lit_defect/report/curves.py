"""Curves out of `metrics.csv`: for each arm the mean over its seeds with a band, thinned to what a screen shows."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lit_defect.report.arms import Arm
from lit_defect.report.blocks import Curve, Lines

Floats = NDArray[np.float64]
Series = tuple[Floats, Floats]
"""Steps and values."""

POINTS = 200
RUNS = 10
"""So many runs of an arm are read."""
ARMS = 32
"""So many arms have curves."""
CHARTS = 6
_FIRST = ("train/loss", "val/loss")
_NO_CURVES = ("lr-", "test/", "mirrored/", "time/", "memory/", "discarded/", "epoch", "step")


def read_series(path: Path) -> dict[str, Series]:
    """The columns of a `metrics.csv` over `step`; half-written lines and what is no number are left out.

    Returns an empty dictionary where there is no such file.
    """
    steps: dict[str, list[float]] = {}
    values: dict[str, list[float]] = {}
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            lines = csv.reader(line.replace("\0", "") for line in file)
            head = next(lines, [])
            if "step" not in head:
                return {}
            at = head.index("step")
            columns = [(k, name) for k, name in enumerate(head) if not name.startswith(("lr-", "epoch", "step"))]
            for line in lines:
                if len(line) != len(head):
                    continue
                try:
                    step = float(line[at])
                except ValueError:
                    continue
                for k, name in columns:
                    if line[k]:
                        try:
                            value = float(line[k])
                        except ValueError:
                            continue
                        steps.setdefault(name, []).append(step)
                        values.setdefault(name, []).append(value)
    except (OSError, csv.Error):
        pass
    return {name: (np.array(steps[name]), np.array(values[name])) for name in values}


def last_values(path: Path) -> dict[str, float]:
    """The last finite value of each column."""
    found = {}
    for name, (_, values) in read_series(path).items():
        finite = values[np.isfinite(values)]
        if finite.size:
            found[name] = float(finite[-1])
    return found


def thin(series: Series, points: int = POINTS) -> Series:
    """At most so many points, each the mean of its stretch of steps."""
    steps, values = series
    if len(steps) <= points:
        return series
    parts = np.array_split(np.argsort(steps, kind="stable"), points)
    return np.array([steps[part].mean() for part in parts]), np.array([values[part].mean() for part in parts])


def mean_curve(name: str, runs: Sequence[Series]) -> Curve:
    """The mean over runs and, of several, a band of one standard deviation; nan where no run has got."""
    thinned = [_in_order(thin(series)) for series in runs]
    grid = thinned[0][0]
    if any(len(steps) != len(grid) or not np.array_equal(steps, grid) for steps, _ in thinned):
        every = np.concatenate([steps for steps, _ in thinned])
        grid = np.linspace(every.min(), every.max(), min(POINTS, max(len(steps) for steps, _ in thinned)))
    rows = np.array([np.interp(grid, steps, values, left=math.nan, right=math.nan) for steps, values in thinned])
    there = np.isfinite(rows)
    count = there.sum(axis=0)
    total = np.where(there, rows, 0).sum(axis=0)
    mean = np.divide(total, count, out=np.full(len(grid), math.nan), where=count > 0)
    if len(rows) == 1:
        return Curve(name, grid.tolist(), mean.tolist())
    squares = (np.where(there, rows - mean, 0) ** 2).sum(axis=0)
    sd = np.sqrt(np.divide(squares, count - 1, out=np.zeros(len(grid)), where=count > 1))
    return Curve(name, grid.tolist(), mean.tolist(), (mean - sd).tolist(), (mean + sd).tolist())


def charts(arms: Sequence[Arm], figures: Iterable[str]) -> list[Lines]:
    """Losses first, then the validation figures that the report is about, then others.

    Args:
        arms: of which the first `ARMS` are drawn.
        figures: names of the report's figures, by whose last word columns are found.
    """
    read = {
        arm.name: [found for run in arm.runs[:RUNS] if (found := read_series(run.folder.path / "metrics.csv"))]
        for arm in arms[:ARMS]
    }
    names = dict.fromkeys(name for runs in read.values() for found in runs for name in found)
    known = [name for name in names if not name.startswith(_NO_CURVES)]
    wanted = [figure.rpartition("/")[2] for figure in figures]
    order = sorted(known, key=lambda name: _rank(name, wanted))
    drawn = []
    for name in order[:CHARTS]:
        curves = []
        for arm, runs in read.items():
            series = [one[name] for one in runs if name in one and len(one[name][0]) > 1]
            if series:
                curves.append(mean_curve(arm, series))
        if curves:
            drawn.append(Lines(f"{name} over steps", "step", name, curves))
    return drawn


def _rank(name: str, wanted: Sequence[str]) -> tuple[int, int, str]:
    if name in _FIRST:
        return 0, _FIRST.index(name), name
    last = name.rpartition("/")[2]
    place = wanted.index(last) if last in wanted else len(wanted)
    return (1 if name.startswith("val/") else 2), place, name


def _in_order(series: Series) -> Series:
    """Steps that never fall, as interpolation needs them."""
    order = np.argsort(series[0], kind="stable")
    return series[0][order], series[1][order]
