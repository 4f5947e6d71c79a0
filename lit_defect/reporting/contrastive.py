"""Runs of anomaly detection side by side: Table 1 of the paper beside our own rows, and a table for any data set.

    python -m lit_defect.reporting.contrastive RUNS... [--score NAME] [--csv FILE]

How runs become rows is told in seeds.py. A cell is the mean over seeds ± the standard deviation. The mean over
categories is taken within each seed first, so that its t interval tells how the whole row would move with other seeds.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lit_defect.errors import UserError
from lit_defect.reporting import seeds
from lit_defect.reporting.seeds import Line, Run, Spread
from lit_defect.reporting.tables import markdown_table
from lit_defect.runs import RunFolder

OBJECTS = (
    "bottle", "cable", "capsule", "hazelnut", "metal_nut", "pill", "screw", "toothbrush", "transistor", "zipper"
)  # fmt: skip
"""The ten object categories of MVTec AD, on which the paper reports."""


@dataclass(frozen=True)
class Published:
    """A published row: image AUROC of `OBJECTS` in percent, and their mean as it was printed."""

    name: str
    source: str
    auroc: tuple[float, ...]
    mean: float


PUBLISHED = (
    Published(
        "CutPaste, as the paper ran it",
        "Honda & Yamauchi, Table 1",
        (100, 94.0, 93.6, 98.7, 98.0, 95.4, 63.5, 99.2, 95.3, 99.7),
        93.7,
    ),
    Published(
        "the paper",
        "Honda & Yamauchi, Table 1",
        (100, 83.1, 97.5, 99.6, 99.5, 83.3, 90.2, 100, 88.4, 100),
        94.2,
    ),
    Published(
        "CutPaste 3-way, as published",
        "Li et al., CVPR 2021 (arXiv 2104.04015), mean of 5 seeds",
        (98.3, 80.6, 96.2, 97.3, 99.3, 92.4, 86.3, 98.3, 95.5, 99.4),
        94.3,
    ),
)

# Figure in a run, and what it is called; "minutes" are those of the training.
FIGURES = {
    "auroc": "image AUROC",
    "fresh_auroc": "without near-duplicates",
    "average_precision": "image AP",
    "pixel_auroc": "pixel AUROC",
    "aupro": "AUPRO",
    "minutes": "minutes",
}

_INCIDENTAL = (*seeds.INCIDENTAL, "model.init_args.score", "model.init_args.maps", "model.init_args.overlays")


@dataclass(frozen=True)
class Row(seeds.Row):
    """Runs of one configuration, by category."""

    def objects(self) -> list[str]:
        """Those of `OBJECTS` for which this row has a figure."""
        return [name for name in OBJECTS if self.spread(name, "auroc").seeds]

    def mean_of_objects(self) -> Spread:
        """Over the seeds, of the mean image AUROC over `objects()`; see `seeds.Row.spread_over`."""
        return self.spread_over(self.objects(), "auroc")


def read_runs(folders: Iterable[Path | str], score: str | None = None) -> list[Run]:
    """Read run folders; a folder that is none stands for all runs in it, or in the experiments in it.

    Args:
        folders: run folders, experiments, or the folder of all experiments.
        score: name of the image score, such as `gaussian`; None takes each run's main one.

    Raises:
        UserError: a folder without evaluated runs, a file of another kind, or a score that a run does not have.
    """
    return [_read(path, score) for path in seeds.find_runs(folders)]


def group(runs: Sequence[Run]) -> list[Row]:
    """Rows of runs that compute the same; see `seeds.group_runs`."""
    return seeds.group_runs(runs, Row)


def object_table(rows: Sequence[Row]) -> str:
    """Table 1 of the paper, image AUROC in percent, with our rows below it, and what there is to say about them."""
    ours = [row for row in rows if row.objects()]
    head = ("image AUROC, %", *OBJECTS, "mean", "95 % interval", "seeds")
    body = [[p.name, *(f"{value:.1f}" for value in p.auroc), f"{p.mean:.1f}", "", ""] for p in PUBLISHED]
    for row in ours:
        mean, cells = row.mean_of_objects(), [row.spread(name, "auroc") for name in OBJECTS]
        whole = len(row.objects()) == len(OBJECTS)
        counts = sorted({cell.seeds for cell in cells if cell.seeds})
        body.append(
            [
                row.name,
                *(cell.text(100, 1) for cell in cells),
                mean.text(100, 1) + ("" if whole else f" ({len(row.objects())} of {len(OBJECTS)})"),
                mean.limits(100, 1),
                str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}",
            ]
        )
    notes = [f"{p.name}: {p.source}." for p in PUBLISHED] + [_verdict(row) for row in ours]
    notes.append("An interval tells how a mean would move with other seeds, not with other test pictures.")
    return markdown_table(head, body) + "\n" + "".join(f"- {note}\n" for note in notes)


def comparison_table(rows: Sequence[Row]) -> str:
    """Any data set: a line for each category and configuration, mean ± standard deviation over seeds.

    The interval is that of the image AUROC's mean.
    """
    lines = sorted((category, i, row) for i, row in enumerate(rows) for category in row.runs)
    keys = [key for key in FIGURES if any(row.spread(category, key).seeds for category, _, row in lines)]
    head = ["data", "configuration", "seeds", "image AUROC, 95 % interval", *(FIGURES[key] for key in keys)]
    body = []
    for category, _, row in lines:
        limits = row.spread(category, "auroc").limits()
        cells = [row.spread(category, key).text(digits=1 if key == "minutes" else 3) for key in keys]
        body.append([category, row.name, str(len(row.runs[category])), limits, *cells])
    return markdown_table(head, body)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write every cell on a line: data, configuration, figure, mean, sd, low, high, seeds, source."""
    lines: list[Line] = []
    for row in rows:
        for category in sorted(row.runs):
            lines += [Line(category, row.name, key, row.spread(category, key)) for key in FIGURES]
        if names := row.objects():
            lines.append(Line(f"mean of {len(names)} objects", row.name, "auroc", row.mean_of_objects()))
    for p in PUBLISHED:
        values = [*zip(OBJECTS, p.auroc, strict=True), (f"mean of {len(OBJECTS)} objects", p.mean)]
        lines += [Line(name, p.name, "auroc", Spread(value / 100, seeds=1), p.source) for name, value in values]
    seeds.write_lines(lines, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables in Markdown; returns the exit status, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m lit_defect.reporting.contrastive", description="Runs of anomaly detection side by side."
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders of runs")
    parser.add_argument("--score", help="image score to compare, such as gaussian or knn; each run's main one if unset")
    parser.add_argument("--csv", type=Path, help="also write every cell to this file")
    options = parser.parse_args(arguments)
    try:
        rows = group(read_runs(options.runs, options.score))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if any(row.objects() for row in rows):
        print(object_table(rows))
    print(comparison_table(rows), end="")
    if options.csv:
        write_csv(rows, options.csv)
    return 0


def _read(path: Path, score: str | None) -> Run:
    file, result, config = path / "test_metrics.json", seeds.read_metrics(path), RunFolder(path).config()
    try:
        name = score or result["score"]
        known = list(result["image"])
        figures = _figures(result, name) if name in known else {}
        if figures and "without_near_duplicates" not in result and seeds.near_duplicates(path, config) == 0:
            figures["fresh_auroc"] = figures["auroc"]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{file} does not hold the metrics of anomaly detection") from None
    if not figures:
        raise UserError(f"{file} has no image score {name!r}, but {', '.join(known)}; choose by --score")
    return Run(
        path=path,
        category=str(result.get("category") or "-"),
        method=f"{_method(result)}, {name}",
        seeds=(result.get("training_seed"), result.get("split_seed")),
        figures=figures,
        options=seeds.read_options(path, _INCIDENTAL),
    )


def _figures(result: Mapping[str, Any], score: str) -> dict[str, float]:
    """By the keys of `FIGURES`; nan where undefined or not measured."""
    image, pixel = result["image"][score], result.get("pixel") or {}
    fresh = (result.get("without_near_duplicates") or {}).get("image", {}).get(score, {})
    figures = {
        "auroc": image["auroc"]["value"],
        "fresh_auroc": fresh.get("auroc", {}).get("value"),
        "average_precision": image["average_precision"]["value"],
        "pixel_auroc": pixel.get("pixel_auroc"),
        "aupro": pixel.get("aupro"),
        "minutes": result.get("training_minutes"),
    }
    return {key: math.nan if value is None else float(value) for key, value in figures.items()}


def _method(result: Mapping[str, Any]) -> str:
    """`ntxent_hard, LocalPseudoAnomaly, resnet18 (imagenet)`."""
    loss, anomaly = result.get("loss") or "none", result.get("anomaly")
    if isinstance(anomaly, Mapping):
        anomaly = anomaly.get("class_path")
    network = f"{result.get('backbone') or 'unnamed network'} ({result.get('weights') or 'from scratch'})"
    return ", ".join(
        ["not trained" if loss == "none" else loss, *([str(anomaly).rpartition(".")[2]] if anomaly else []), network]
    )


def _verdict(row: Row) -> str:
    """How the row's mean stands to the published ones, over the categories that it has."""
    names, mean = row.objects(), row.mean_of_objects()
    missing = [name for name in OBJECTS if name not in names]
    text = f"{row.name}: mean {mean.text(100, 1)}"
    if missing:
        text += f" over {len(names)} of {len(OBJECTS)} categories (without {', '.join(missing)})"
    beside = [(p.name, p.mean if not missing else _mean_over(p, names)) for p in PUBLISHED]
    if math.isnan(mean.low):
        values = ", ".join(f"{name} {value:.1f}" for name, value in beside)
        return f"{text}, without an interval, for which two seeds must have all and differ; beside it {values}."
    words = (
        f"{'above' if 100 * mean.low > value else 'below' if 100 * mean.high < value else 'not told apart from'} "
        f"{name} ({value:.1f})"
        for name, value in beside
    )
    return f"{text}, interval {mean.limits(100, 1)}: {', '.join(words)}."


def _mean_over(published: Published, names: Sequence[str]) -> float:
    return float(np.mean([published.auroc[OBJECTS.index(name)] for name in names]))


if __name__ == "__main__":
    sys.exit(main())
