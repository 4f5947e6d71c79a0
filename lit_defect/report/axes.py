"""Axes of charts: where a value stands between two ends, round ticks, and how numbers are written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MINUS, DASH = "\u2212", "\u2013"
_MOST_TICKS = 12
_MARGIN = 0.04  # of the axis, free at each end


@dataclass(frozen=True)
class Tick:
    """A round value of an axis and how it is written."""

    value: float
    label: str


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high`, linear or logarithmic."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def around(cls, values: Iterable[float], *, log: bool = False, margin: float = _MARGIN) -> Scale | None:
        """The axis that holds all values which it can show; None where there is none.

        Args:
            values: those that are not finite, or not positive on a logarithmic axis, are passed over.
            log: whether it is logarithmic.
            margin: share of the span that is added at each end; a single value stands in the middle.
        """
        shown = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
        if not shown:
            return None
        low, high = min(shown), max(shown)
        if log:
            spare = (high / low) ** margin if high > low else 2.0
            return cls(low / spare, high * spare, log=True)
        spare = (high - low) * margin if high > low else abs(low) * 0.1 or 0.5
        return cls(low - spare, high + spare)

    def share(self, value: float) -> float:
        """Where the value stands: 0 at the low end, 1 at the high end."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def shows(self, value: float) -> bool:
        """Whether the value has a place on the axis."""
        return math.isfinite(value) and (value > 0 or not self.log)

    def ticks(self, count: int = 5) -> list[Tick]:
        """About `count` round values."""
        if self.log:
            values = self._decades(count)
            if len(values) >= 2:
                return [Tick(value, short(value)) for value in values]
        step = self._step(count)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        values = [i * step for i in range(first, min(last, first + _MOST_TICKS) + 1)]
        values = [value for value in values if self.shows(value)]
        return [Tick(value, label) for value, label in zip(values, alike(values, step), strict=True)]

    def digits(self) -> int:
        """Behind the point, so that a value is told to about a hundredth of the axis."""
        return min(max(0, 1 - math.floor(math.log10(self._step(5)))), 9)

    def _step(self, count: int) -> float:
        raw = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(raw))
        return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.7)

    def _decades(self, count: int) -> list[float]:
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        wide = last - first > 3
        stride = max(1, (last - first) // count)
        factors = (1,) if wide else (1, 2, 5)
        values = [factor * 10.0**power for power in range(first, last + 1, stride) for factor in factors]
        return [value for value in values if self.low <= value <= self.high]


def alike(values: Sequence[float], step: float) -> list[str]:
    """Ticks `step` apart, written with the same digits: thousands as k, millions as M, tiny ones as 2e-5."""
    largest = max(map(abs, values), default=0.0)
    if largest >= 1e9 or step < 1e-4:
        return [short(value) for value in values]
    unit, letter = next((pair for pair in ((1e6, "M"), (1e3, "k")) if largest >= 10 * pair[0]), (1.0, ""))
    digits = max(0, -math.floor(math.log10(step / unit) + 1e-9))
    return [fixed(value / unit + 0.0, digits) + (letter if value else "") for value in values]


def fixed(value: float, digits: int) -> str:
    """A number with `digits` behind the point and a true minus; a dash for one that is not finite."""
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", MINUS) if math.isfinite(value) else DASH


def short(value: float) -> str:
    """A number in four digits at most, such as 0.25 or 2e-5."""
    text = f"{value:.4g}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.3e}"
    mantissa, _, power = text.partition("e")
    if not power:
        return text
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"


def cell_text(cell: str | float | None, digits: int) -> str:
    """A cell of a table in plain text: `-` for an empty place, 1.2e-5 for what its digits would round to zero."""
    if cell is None or (isinstance(cell, float) and not math.isfinite(cell)):
        return "-"
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:z.{digits}f}" if round(cell, digits) or not cell else short(float(f"{cell:.1e}"))


def full(value: float) -> str:
    """A number as a tooltip tells it: ten digits."""
    return f"{value:.10g}"


def percent(share: float) -> str:
    """A share of the width, as SVG writes it."""
    return f"{place(100 * share)}%"


def place(value: float) -> str:
    """A coordinate, to a hundredth of a pixel."""
    return f"{round(value, 2) + 0.0:.2f}".rstrip("0").rstrip(".")
