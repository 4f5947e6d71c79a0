"""The figures of an anomaly detector for the terminal: every score of it, and its maps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

_COLUMNS = (  # narrow enough for a terminal of 80 characters; the JSON has all figures
    ("auroc", "AUROC", False, True),
    ("average_precision", "AP", False, False),
    ("escape_rate", "escapes", True, True),
    ("overkill_rate", "overkill", True, True),
)
"""Name in the result, name for people, whether it is shown in percent, and with its interval."""
_PIXEL = (
    ("pixel_auroc", "pixel AUROC"),
    ("aupro", "AUPRO"),
    ("pixel_average_precision", "pixel average precision"),
    ("pixel_f1_max", "pixel best F1"),
)
_HARDEST = 6  # kinds of defect that are listed


def anomaly_table(result: Mapping[str, Any], title: str) -> Table:
    """A rich table of `<stage>_metrics.json`: a line for each score, the deciding one first."""
    main = result["score"]
    names = [main, *(name for name in result["image"] if name != main)]
    table = Table(title=title, title_justify="left", caption=_caption(result), caption_justify="left")
    table.add_column("score")
    for _, label, _, _ in _COLUMNS:
        table.add_column(label, justify="right", no_wrap=True)
    for name in names:
        table.add_row(name, *_cells(result["image"][name]), style="bold" if name == main else None)
    return table


def _cells(figures: Mapping[str, Any]) -> list[str]:
    return [_cell(figures[key], percent, limits) for key, _, percent, limits in _COLUMNS]


def _cell(entry: Mapping[str, Any], percent: bool, limits: bool) -> str:
    """Value and interval, as `0.912 (.88 to .94)` or `50 % (39 to 61)`."""
    value = entry["value"]
    if value is None or math.isnan(value):
        return "-"
    shown = f"{100 * value:.0f} %" if percent else f"{value:.3f}"
    low, high = entry.get("low"), entry.get("high")
    if not limits or low is None or high is None:
        return shown
    if percent:
        return f"{shown} ({100 * low:.0f} to {100 * high:.0f})"
    return f"{shown} ({_short(low)} to {_short(high)})"


def _short(share: float) -> str:
    """.88, or 1."""
    return f"{share:.2f}".removeprefix("0").removesuffix(".00")


def _caption(result: Mapping[str, Any]) -> str:
    """Counts, pixel figures, the hardest kinds of defect, time."""
    first = result["image"][result["score"]]
    counts = first["counts"]
    lines = [f"{counts['good']} good, {counts['defective']} defective; 95 % intervals in brackets"]
    if first["n_groups"]:
        lines[0] += f", counted by {first['n_groups']} parts"
    pixel = [f"{label} {result['pixel'][key]:.3f}" for key, label in _PIXEL if result["pixel"].get(key) is not None]
    lines += [", ".join(pixel)] if pixel else []
    kinds = [(kind, entry["value"]) for kind, entry in first["auroc_by_type"].items() if entry["value"] is not None]
    if len(kinds) > 1:
        hardest = sorted(kinds, key=lambda kind: kind[1])[:_HARDEST]
        shown = ", ".join(f"{escape(kind)} {value:.3f}" for kind, value in hardest)
        more = f" and {len(kinds) - _HARDEST} more" if len(kinds) > _HARDEST else ""
        lines.append(f"AUROC by kind of defect: {shown}{more}")
    if first["threshold"] is None:
        lines.append("no threshold, as there are no validation pictures: set data.val_fraction")
    if fresh := result.get("without_near_duplicates"):
        auroc = _cell(fresh["image"][result["score"]]["auroc"], percent=False, limits=True)
        lines.append(f"AUROC without the pictures that have a near-duplicate elsewhere: {auroc}, {fresh['n']} pictures")
    if latency := result.get("latency_ms"):
        lines.append(f"{latency['median']:g} ms a picture, one at a time (95 % within {latency['p95']:g} ms)")
    return "\n".join(lines)
