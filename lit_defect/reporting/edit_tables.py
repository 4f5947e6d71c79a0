"""The numbers of edited data sets: what each function changes, how much of it is accepted, and why the rest is not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lit_defect.reporting.style import GOOD, GREY, INK, PALETTE, new_figure, styled
from lit_defect.reporting.tables import markdown_table

Line = Mapping[str, Any]  # of a manifest; columns that are not there are not told

TAKEN, SPARE = "taken", "as good, not the best"
_REASONS = tuple(colour for colour in PALETTE if colour != GOOD)


_MASKS = "mask drawn again"  # of masks, not of candidates


def outcomes(rows: Iterable[Line]) -> dict[str, int]:
    """Candidates by what became of them: `TAKEN`, `SPARE`, and the reasons that spoke against them, frequent first."""
    taken, spare = 0, 0
    reasons: dict[str, int] = {}
    for row in rows:
        counted: dict[str, int] = row.get("rejected") or {}
        rejected = {reason: times for reason, times in counted.items() if not reason.startswith(_MASKS)}
        taken += bool(row["accepted"])
        spare += max(0, int(row["candidates"]) - sum(rejected.values()) - bool(row["accepted"]))
        for reason, times in rejected.items():
            reasons[reason] = reasons.get(reason, 0) + times
    return {TAKEN: taken, SPARE: spare, **dict(sorted(reasons.items(), key=lambda item: -item[1]))}


def numbers_table(sets: Mapping[str, Sequence[Line]]) -> str:
    """A line of Markdown for each function, and for each type below it where there are several.

    Args:
        sets: the lines of the manifests by function.
    """
    body = []
    for name, rows in sets.items():
        kinds = sorted({row["defect_type"] for row in rows})
        body.append([name, *_numbers(rows)])
        parts = {kind: [row for row in rows if row["defect_type"] == kind] for kind in kinds}
        body += [[f"{name}: {kind}", *_numbers(part)] for kind, part in parts.items() if len(kinds) > 1]
    head = (
        "function", "accepted", "asked", "candidates", "change inside", "outside before the paste", "at most",
        "outside in the result, at most", "pixels changed, %", "seam", "again in float32",
    )  # fmt: skip
    notes = "Accepted pictures, mean ± standard deviation; grey levels of 255, inside and outside of what was edited."
    return markdown_table(head, body) + f"\n{notes}\n"


def reasons_table(sets: Mapping[str, Sequence[Line]]) -> str:
    """How many candidates of each function were taken, and what spoke against the others."""
    counts = {name: outcomes(rows) for name, rows in sets.items()}
    reasons = dict.fromkeys(reason for found in counts.values() for reason in found)
    body = [[reason, *(str(found.get(reason, 0)) for found in counts.values())] for reason in reasons]
    return markdown_table(("candidates", *counts), body)


@styled
def candidates_figure(sets: Mapping[str, Sequence[Line]]) -> Figure:
    """A bar for each function: its candidates by what became of them."""
    counts = {name: outcomes(rows) for name, rows in sets.items()}
    kinds = [kind for kind in dict.fromkeys(k for found in counts.values() for k in found) if _any(counts, kind)]
    reasons = [kind for kind in kinds if kind not in (TAKEN, SPARE)]
    colours = {TAKEN: GOOD, SPARE: GREY} | {kind: _REASONS[i % len(_REASONS)] for i, kind in enumerate(reasons)}
    figure, axes = new_figure(7.2, 1.3 + 0.45 * len(counts) + 0.2 * len(kinds))
    names = list(counts)[::-1]
    left = np.zeros(len(names))
    for kind in kinds:
        values = np.array([counts[name].get(kind, 0) for name in names])
        axes.barh(names, values, left=left, height=0.62, color=colours[kind], edgecolor="white", label=kind)
        for y, (start, value) in enumerate(zip(left, values, strict=True)):
            if value >= 0.04 * max(sum(found.values()) for found in counts.values()):
                ink = INK if kind == SPARE else "white"
                axes.text(start + value / 2, y, str(value), ha="center", va="center", color=ink, fontsize=8)
        left += values
    axes.set_xlabel("candidates")
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower left", ncols=2)
    axes.set_title("What became of the candidates")
    return figure


def _any(counts: Mapping[str, Mapping[str, int]], kind: str) -> bool:
    return any(found.get(kind) for found in counts.values())


def _numbers(rows: Sequence[Line]) -> list[str]:
    taken = [row for row in rows if row["accepted"]]
    return [
        str(len(taken)),
        str(len(rows)),
        str(sum(int(row["candidates"]) for row in rows)),
        _spread(taken, "change_inside"),
        _spread(taken, "change_outside"),
        _most(taken, "most_outside"),
        _most(taken, "most_after"),
        _spread(taken, "share_changed", 100),
        _spread(taken, "seam"),
        str(sum(int(row.get("retried", 0)) for row in rows)),
    ]


def _values(rows: Iterable[Line], key: str) -> NDArray[np.float64]:
    values = np.array([float(row.get(key, np.nan)) for row in rows])
    return values[np.isfinite(values)]


def _spread(rows: Iterable[Line], key: str, scale: float = 1.0) -> str:
    values = scale * _values(rows, key)
    if not len(values):
        return "-"
    return f"{values.mean():.2f}" + (f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else "")


def _most(rows: Iterable[Line], key: str) -> str:
    values = _values(rows, key)
    return f"{values.max():.0f}" if len(values) else "-"
