"""The section on what the runs have cost: time, throughput and memory."""

from __future__ import annotations

import math

from lit_defect.report.arms import Arm
from lit_defect.report.blocks import Cell, Column, Section, Table
from lit_defect.report.curves import read_series
from lit_defect.report.figures import label
from lit_defect.report.matter import Matter

_TIMED = {
    "time/pictures_per_second": "pictures a second",
    "time/step_seconds": "seconds a step",
    "time/data_share": "share of waiting for data",
    "memory/gpu_gib": "GPU memory, GiB",
}
_TIMED_ARMS = 30


def cost(matter: Matter) -> Section | None:
    """Time, throughput and memory of each arm."""
    rows: list[list[Cell]] = []
    names: dict[str, None] = {}
    costs = [
        {**_times(arm), **_logged_times(arm, k < _TIMED_ARMS)} for k, arm in enumerate(matter.grouped.arms)
    ]  # fmt: skip
    for found in costs:
        names.update(dict.fromkeys(found))
    for arm, found in zip(matter.grouped.arms, costs, strict=True):
        rows.append([arm.name, *(found.get(name) for name in names)])
    if not names:
        return None
    columns = [Column("arm"), *(Column(name, 2) for name in names)]
    logged = ", ".join(name for name in _TIMED.values() if name in names)
    caption = f"Means over the runs of each arm{f'; {logged}: of its first run, as logged' if logged else ''}."
    return Section("Time and memory", [Table("cost", columns, rows, caption)])


def _times(arm: Arm) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for run in arm.runs:
        seconds = run.record.get("seconds")
        if isinstance(seconds, list) and seconds:
            found.setdefault("minutes of training", []).append(sum(map(float, seconds)) / 60)
        for measured in run.measured.values():
            for name, value in measured.costs.items():
                if name != "training_minutes":
                    found.setdefault(label(name), []).append(value)
    return {name: math.fsum(values) / len(values) for name, values in found.items()}


def _logged_times(arm: Arm, read: bool) -> dict[str, float]:
    """Of the first run, where its log has them."""
    series = read_series(arm.runs[0].folder.path / "metrics.csv") if read else {}
    return {word: float(series[name][1].mean()) for name, word in _TIMED.items() if name in series}
