"""Runs of anomaly detection side by side: Table 1 of the paper beside our own rows, and a table for any data set.

    python -m lit_defect.reporting.contrastive RUNS... [--score NAME] [--csv FILE]

1. Each run folder (or every one below a folder) gives its `test_metrics.json` and `config.yaml`.
2. Runs that differ in nothing but seeds and category make one row. Where runs on the same category differ in an
   option, that option's value becomes part of the row's name; options that only go with the category do not.
3. A cell is the mean over seeds ± the standard deviation. The mean over categories is taken within each seed
   first, so that its t interval tells how the whole row would move with other seeds.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lit_defect.errors import UserError
from lit_defect.metrics.intervals import t_interval
from lit_defect.reporting.tables import markdown_table
from lit_defect.runs import RunFolder, flatten

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

# Options that say where, how fast or from which seed, not what is computed.
_INCIDENTAL = (
    "config", "run_id", "resume", "runs_dir", "wandb", "ckpt_path", "weights_only", "test_after_fit", "experiment",
    "seed_everything", "data.init_args.seed", "data.init_args.category", "data.init_args.root",
    "data.init_args.num_workers", "data.init_args.cache", "data.init_args.eval_batch_size", "data.init_args.download",
    "model.init_args.score", "model.init_args.maps", "model.init_args.overlays", "model.init_args.channels_last",
    "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.logger",
    "trainer.callbacks", "trainer.enable_", "trainer.log_every_n_steps", "trainer.default_root_dir",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What one run folder says.

    Attributes:
        path: the folder.
        category: of the data set, or the data set's name.
        method: loss, pseudo-anomaly, network and image score.
        seeds: of training and of the split.
        figures: by the keys of `FIGURES`; nan where undefined.
        options: the configuration, flat, without what is incidental.
    """

    path: Path
    category: str
    method: str
    seeds: tuple[Any, Any]
    figures: dict[str, float]
    options: dict[str, str]


@dataclass(frozen=True)
class Spread:
    """Mean over seeds with standard deviation and 95 % t interval (nan for one); `seeds` says over how many."""

    mean: float = math.nan
    sd: float = math.nan
    low: float = math.nan
    high: float = math.nan
    seeds: int = 0

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of the finite ones of these values."""
        finite = [value for value in values if math.isfinite(value)]
        if not finite:
            return cls()
        mean = t_interval(finite)
        sd = float(np.std(finite, ddof=1)) if len(finite) > 1 else math.nan
        return cls(mean.value, sd, mean.low, mean.high, len(finite))

    def text(self, factor: float = 1.0, digits: int = 3) -> str:
        """`0.943 ± 0.002`, `0.943` for one seed, `-` for none."""
        if not self.seeds:
            return "-"
        mean = f"{factor * self.mean:.{digits}f}"
        return mean if math.isnan(self.sd) else f"{mean} ± {factor * self.sd:.{digits}f}"

    def limits(self, factor: float = 1.0, digits: int = 3) -> str:
        """`0.938 to 0.948`, within [0, 1]; empty for one seed."""
        if math.isnan(self.low):
            return ""
        low, high = (factor * min(1.0, max(0.0, end)) for end in (self.low, self.high))
        return f"{low:.{digits}f} to {high:.{digits}f}"


@dataclass(frozen=True)
class Row:
    """Runs of one configuration, by category."""

    name: str
    runs: dict[str, list[Run]] = field(default_factory=dict)

    def spread(self, category: str, figure: str) -> Spread:
        """Of a figure over the seeds of a category."""
        return Spread.of(run.figures[figure] for run in self.runs.get(category, []))

    def objects(self) -> list[str]:
        """Those of `OBJECTS` for which this row has a figure."""
        return [name for name in OBJECTS if self.spread(name, "auroc").seeds]

    def mean_of_objects(self) -> Spread:
        """Over the seeds, of the mean image AUROC over `objects()`.

        Only seeds that have them all count; where there is none, the mean of the categories' means, without spread.
        """
        names = self.objects()
        if not names:
            return Spread()
        by_seed = [
            {run.seeds: run.figures["auroc"] for run in self.runs[name] if math.isfinite(run.figures["auroc"])}
            for name in names
        ]
        shared = set.intersection(*(set(values) for values in by_seed))
        if not shared:
            return Spread(float(np.mean([self.spread(name, "auroc").mean for name in names])), seeds=1)
        return Spread.of(float(np.mean([values[seeds] for values in by_seed])) for seeds in sorted(shared, key=str))


def read_runs(folders: Iterable[Path | str], score: str | None = None) -> list[Run]:
    """Read run folders; a folder that is none stands for all runs in it, or in the experiments in it.

    Args:
        folders: run folders, experiments, or the folder of all experiments.
        score: name of the image score, such as `gaussian`; None takes each run's main one.

    Raises:
        UserError: a folder without evaluated runs, a file of another kind, or a score that a run does not have.
    """
    found: dict[Path, None] = {}
    for folder in map(Path, folders):
        files = [file for pattern in ("", "*/", "*/*/") for file in folder.glob(f"{pattern}test_metrics.json")]
        if not files:
            raise UserError(f"{folder}: no test_metrics.json here or below; evaluate the run first, by the verb `test`")
        found |= dict.fromkeys(file.parent.resolve() for file in sorted(files))
    return [_read(path, score) for path in found]


def group(runs: Sequence[Run]) -> list[Row]:
    """Rows of runs that compute the same, in the order of their first run.

    Raises:
        UserError: two runs of one row and category have the same seeds; counted twice, they would feign precision.
    """
    by_method: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_method[run.method].append(run)
    rows: dict[str, Row] = {}
    for method, same in by_method.items():
        varied = _varied_options(same)
        for run in same:
            values = [f"{key.rpartition('.')[2]}={run.options.get(key, '-')}" for key in varied]
            name = ", ".join([method, *values])
            others = rows.setdefault(name, Row(name)).runs.setdefault(run.category, [])
            for other in others:
                if other.seeds == run.seeds:
                    raise UserError(
                        f"{other.path} and {run.path} are the same experiment with the same seeds, "
                        f"{run.seeds[0]} for training and {run.seeds[1]} for the split: give one of them only"
                    )
            others.append(run)
    return list(rows.values())


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
    lines: list[tuple[str, str, str, Spread, str]] = []
    for row in rows:
        for category in sorted(row.runs):
            lines += [(category, row.name, key, row.spread(category, key), "") for key in FIGURES]
        if names := row.objects():
            lines.append((f"mean of {len(names)} objects", row.name, "auroc", row.mean_of_objects(), ""))
    for p in PUBLISHED:
        values = [*zip(OBJECTS, p.auroc, strict=True), (f"mean of {len(OBJECTS)} objects", p.mean)]
        lines += [(name, p.name, "auroc", Spread(value / 100, seeds=1), p.source) for name, value in values]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("data", "configuration", "figure", "mean", "sd", "low", "high", "seeds", "source"))
        for category, name, key, spread, source in lines:
            if spread.seeds:
                numbers = (spread.mean, spread.sd, spread.low, spread.high)
                cells = ("" if math.isnan(x) else f"{x:.6g}" for x in numbers)
                writer.writerow((category, name, key, *cells, "" if source else spread.seeds, source))
    temporary.replace(path)


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
    file = path / "test_metrics.json"
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is no JSON: {error}") from None
    try:
        name = score or result["score"]
        known = list(result["image"])
        figures = _figures(result, name) if name in known else {}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{file} does not hold the metrics of anomaly detection") from None
    if not figures:
        raise UserError(f"{file} has no image score {name!r}, but {', '.join(known)}; choose by --score")
    options = flatten(RunFolder(path).config())
    return Run(
        path=path,
        category=str(result.get("category") or "-"),
        method=f"{_method(result)}, {name}",
        seeds=(result.get("training_seed"), result.get("split_seed")),
        figures=figures,
        options={key: str(value) for key, value in options.items() if not key.startswith(_INCIDENTAL)},
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


def _varied_options(runs: Sequence[Run]) -> list[str]:
    """Options in which runs on the same category differ: they tell experiments apart."""
    by_category: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_category[run.category].append(run)
    keys = {key for run in runs for key in run.options}
    return sorted(
        key for key in keys
        if any(len({run.options.get(key) for run in same if run.options}) > 1 for same in by_category.values())
    )  # fmt: skip


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
        return f"{text}, without an interval, for which two seeds must have all of them; beside it {values}."
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
