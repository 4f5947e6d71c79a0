"""Results as tables: one evaluation for the terminal, Markdown or CSV, and several runs as mean and spread.

The input is what `evaluate` returns, or the `<stage>_metrics.json` of a run folder, which holds the same.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from lit_defect.errors import UserError
from lit_defect.files import whole_file
from lit_defect.metrics.intervals import t_interval

# Name in the result, name for people, whether it is shown in percent.
_FIGURES = (
    ("accuracy", "accuracy", True),
    ("balanced_accuracy", "balanced accuracy", True),
    ("auroc", "AUROC", False),
    ("average_precision", "average precision", False),
    ("f1", "F1", False),
    ("defect_auroc", "AUROC, good against defects", False),
    ("defect_average_precision", "average precision, good against defects", False),
    ("escape_rate", "escape rate (defects that pass)", True),
    ("overkill_rate", "overkill rate (good parts rejected)", True),
    ("ece", "calibration error (ECE)", False),
    ("brier", "Brier score", False),
    ("nll", "negative log-likelihood", False),
)
_WITHOUT_END = ("brier", "nll")  # figures that may lie above 1
_LISTED_CLASSES = 10  # in the terminal


@dataclass(frozen=True)
class Row:
    """A figure of one evaluation; `value`, `low` and `high` are nan where undefined."""

    key: str
    label: str
    in_percent: bool
    value: float
    low: float
    high: float
    count: str
    reason: str

    def number(self, x: float) -> str:
        """The number as it is shown: 92.4 % or 0.951."""
        return _number(x, self.in_percent)

    @property
    def interval(self) -> str:
        """The limits as they are shown, or why there are none."""
        if not math.isfinite(self.low):
            return self.reason
        unit = " %" if self.in_percent else ""
        low, high = (self.number(x).removesuffix(" %") for x in (self.low, self.high))
        return f"{low} to {high}{unit}"


@dataclass(frozen=True)
class Summary:
    """A figure over several runs: mean, standard deviation (nan for one run) and t interval of the mean."""

    key: str
    label: str
    in_percent: bool
    mean: float
    sd: float
    low: float
    high: float
    runs: int


def rows(result: dict[str, Any]) -> list[Row]:
    """All figures of an evaluation in the order of reading; recall and precision by class come last."""
    named = [(key, label, percent, result[key]) for key, label, percent in _FIGURES if key in result]
    for key in ("recall", "precision"):
        named += [(f"{key}/{name}", f"{key}: {name}", True, entry) for name, entry in result.get(key, {}).items()]
    return [
        Row(
            key=key,
            label=label,
            in_percent=percent,
            value=_nan(entry["value"]),
            low=_nan(entry["low"]),
            high=_nan(entry["high"]),
            count=f"{entry['k']}/{entry['n']}" if "n" in entry else "",
            reason=entry.get("reason", ""),
        )
        for key, label, percent, entry in named
    ]


def metrics_table(result: dict[str, Any], title: str) -> Table:
    """A rich table of an evaluation, for the terminal; of many classes only the worst are listed."""
    table = Table(title=title, title_justify="left", caption=_caption(result), caption_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right", style="bold")
    table.add_column(f"{100 * result['level']:g} % interval", justify="right")
    table.add_column("count", justify="right", style="dim")
    section = ""
    for row in _worth_listing(rows(result)):
        kind = row.key.partition("/")[0] if "/" in row.key else ""
        if kind != section:
            table.add_section()
            section = kind
        table.add_row(escape(row.label), row.number(row.value), row.interval, row.count)
    return table


def markdown(result: dict[str, Any]) -> str:
    """A Markdown table of an evaluation."""
    head = ("figure", "value", f"{100 * result['level']:g} % interval", "count")
    body = [(row.label, row.number(row.value), row.interval, row.count) for row in rows(result)]
    return markdown_table(head, body)


def write_csv(result: dict[str, Any], path: Path) -> None:
    """Write an evaluation as CSV: figure, value, low, high, count, reason."""
    with whole_file(path) as file, io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
        writer = csv.writer(text)
        writer.writerow(("figure", "value", "low", "high", "count", "reason"))
        for row in rows(result):
            numbers = ("" if math.isnan(x) else repr(x) for x in (row.value, row.low, row.high))
            writer.writerow((row.key, *numbers, row.count, row.reason))


def collect(run_folders: Iterable[Path | str], stage: str = "test") -> list[Summary]:
    """Mean, spread and t interval of each figure over runs that differ in their seed.

    The interval is about the mean over seeds on these test data; it does not tell how the figure would
    change with other data.

    Args:
        run_folders: folders that hold a `<stage>_metrics.json`.
        stage: test or val.

    Raises:
        UserError: no folders, a file that is missing or no JSON, or runs with different classes.
    """
    paths = [Path(folder) / f"{stage}_metrics.json" for folder in run_folders]
    results = [_read(path) for path in paths]
    if not results:
        raise UserError("no run folders were given")
    for path, result in zip(paths, results, strict=True):
        if result["class_names"] != results[0]["class_names"]:
            raise UserError(
                f"{path} has the classes {result['class_names']}, but {paths[0]} has "
                f"{results[0]['class_names']}: only runs that tell the same classes apart can be averaged"
            )
    by_key: dict[str, list[Row]] = {}
    for result in results:
        for row in rows(result):
            by_key.setdefault(row.key, []).append(row)
    return [_summary(same) for same in by_key.values()]


def summary_table(summaries: Sequence[Summary], title: str) -> Table:
    """A rich table of figures over several runs."""
    table = Table(title=title, title_justify="left")
    for name in ("figure", "mean ± sd", "95 % interval of the mean", "runs"):
        table.add_column(name, justify="left" if name == "figure" else "right")
    for summary in summaries:
        table.add_row(*(escape(cell) for cell in _summary_cells(summary)))
    return table


def summary_markdown(summaries: Sequence[Summary]) -> str:
    """A Markdown table of figures over several runs."""
    head = ("figure", "mean ± sd", "95 % interval of the mean", "runs")
    return markdown_table(head, [_summary_cells(summary) for summary in summaries])


def _worth_listing(all_rows: list[Row]) -> list[Row]:
    """All rows, but of recall and of precision at most `_LISTED_CLASSES`, the lowest first."""
    listed = [row for row in all_rows if "/" not in row.key]
    for kind in ("recall", "precision"):
        by_class = [row for row in all_rows if row.key.startswith(f"{kind}/")]
        if len(by_class) > _LISTED_CLASSES:
            by_class = sorted(by_class, key=lambda row: math.inf if math.isnan(row.value) else row.value)
        listed += by_class[:_LISTED_CLASSES]
    return listed


def _summary(same: list[Row]) -> Summary:
    first = same[0]
    values = [row.value for row in same if math.isfinite(row.value)]
    mean = t_interval(values)
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    low, high = mean.low, mean.high
    if math.isfinite(low):  # t knows nothing of the ends of the scale
        low, high = max(0.0, low), high if first.key in _WITHOUT_END else min(1.0, high)
    return Summary(first.key, first.label, first.in_percent, mean.value, sd, low, high, len(values))


def _summary_cells(summary: Summary) -> tuple[str, str, str, str]:
    mean, sd, low, high = (
        _number(x, summary.in_percent).removesuffix(" %") for x in (summary.mean, summary.sd, summary.low, summary.high)
    )
    unit = " %" if summary.in_percent else ""
    spread = f"{mean} ± {sd}{unit}" if math.isfinite(summary.sd) else _number(summary.mean, summary.in_percent)
    limits = f"{low} to {high}{unit}" if math.isfinite(summary.low) else ""
    return summary.label, spread, limits, str(summary.runs)


def _number(x: float, in_percent: bool) -> str:
    if math.isnan(x):
        return "-"
    return f"{100 * x:.1f} %" if in_percent else f"{x:.3f}"


def _caption(result: dict[str, Any]) -> str:
    parts = [f"{result['n']} samples"]
    if result["n_groups"] is not None:
        parts.append(f"{result['n_groups']} groups (the intervals count groups)")
    if result["threshold"] is not None:
        parts.append(f"threshold {result['threshold']:.3g} on the defect score for escapes and overkill")
        parts.append("the likeliest class for all else")
    if len(result["class_names"]) > _LISTED_CLASSES:
        parts.append(f"the {_LISTED_CLASSES} lowest of {len(result['class_names'])} classes")
    return ", ".join(parts)


def markdown_table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Any table in Markdown; all columns but the first are flush right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def _nan(number: float | None) -> float:
    return math.nan if number is None else float(number)


def _read(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; evaluate the run first, `test --ckpt_path best`") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from None
    if not isinstance(result, dict) or "class_names" not in result:
        raise UserError(f"{path} does not hold the metrics of a classifier")
    return result
