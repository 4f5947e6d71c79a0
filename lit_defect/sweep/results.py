"""What a training came to: values of the metric in the run folder's `metrics.csv`.

Which of the logged values is the result (`value` in the file's block `lit_defect`):

- `checkpoint` (default): the one of the epoch that the run's `best.ckpt` is of, which is the epoch in which the task's
  `monitor` was best. It is what the run delivers: with the last value, a setting would be blamed for epochs whose state
  nobody uses. The last value where the task monitors nothing, and for `train/...` and `test/...`: the test follows the
  training, is logged once, and is of that checkpoint.
- `last`: the last value that was logged, as in W&B's summary.
- `best`: the best of all; of a curve that is noisy it flatters whoever has tried most often.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lit_defect import runs
from lit_defect.runs import RunFolder, better, whole_rows


class NoValueError(Exception):
    """A training ended and gave no number; the text says why."""


class NotLoggedError(NoValueError):
    """The metric is not among what was logged."""


@dataclass(frozen=True)
class Logged:
    """One value of a curve and the step that it was logged at."""

    step: int
    value: float


def curve(table: Iterable[Mapping[str, str]], metric: str) -> list[Logged]:
    """Every value of a metric, in the order in which they were logged."""
    return [Logged(int(row["step"]), float(row[metric])) for row in table if row.get(metric)]


def logged_names(file: Path) -> list[str]:
    """Names of all that was logged, without learning rates and counters."""
    table = whole_rows(file)
    names = table[0].keys() if table else ()
    return [name for name in names if name not in ("epoch", "step") and not name.startswith("lr-")]


def value_of(run: RunFolder, metric: str, goal: str, which: str) -> float:
    """The result of a finished training.

    Raises:
        NotLoggedError: there is no such metric.
        NoValueError: it is not a number.
    """
    file = run.path / "metrics.csv"
    table = whole_rows(file)
    values = curve(table, metric)
    if not values:
        raise NotLoggedError(f"{metric} was not logged; {file} has {', '.join(logged_names(file)) or 'nothing'}")
    if which == "best":
        chosen = _best(values, goal)
    elif which == "last" or (monitor := _monitor(run, metric)) is None:
        chosen = values[-1]
    elif monitor == metric:
        chosen = _best(values, "minimize" if better(metric) == "min" else "maximize")
    else:
        step = _best(curve(table, monitor) or values, "minimize" if better(monitor) == "min" else "maximize").step
        chosen = next((one for one in values if one.step == step), values[-1])
    if not math.isfinite(chosen.value):
        raise NoValueError(f"{metric} is {chosen.value} at step {chosen.step}")
    return chosen.value


def _best(values: list[Logged], goal: str) -> Logged:
    """The first of the best; of numbers only, if there are any."""
    finite = [one for one in values if math.isfinite(one.value)] or values
    choose = max if goal == "maximize" else min
    return choose(finite, key=lambda one: one.value)


def _monitor(run: RunFolder, metric: str) -> str | None:
    """What chose the run's best checkpoint, if there is one; the metric itself for a task with no such option."""
    if metric.startswith(("train/", "test/", f"{runs.MIRRORED}/")) or not run.best.is_file():
        return None
    return runs.flatten(run.config()).get("model.init_args.monitor", metric)
