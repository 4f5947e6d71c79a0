"""Runs of segmentation and refinement side by side: Table 1 of the paper beside ours, and a line for every method.

    python -m lit_defect.reporting.refinement RUNS... [--csv FILE]

How runs become rows is told in seeds.py; a stage 1 that was trained anew for each seed counts as one option as long
as its runs are of one experiment. Figures are the mean over seeds ± the standard deviation. A run of two classes, a
class against background, stands under the name of that class, so that five of them make the paper's table.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lit_defect.errors import UserError
from lit_defect.reporting import seeds
from lit_defect.reporting.seeds import Line, Row, Run, Spread
from lit_defect.reporting.segmentation_figures import METHODS
from lit_defect.reporting.tables import markdown_table
from lit_defect.runs import RunFolder

ANIMALS = ("bird", "cat", "dog", "horse", "sheep")
"""The classes of PASCAL VOC 2012 on which the paper reports, each against background."""


@dataclass(frozen=True)
class Published:
    """A published column: IoU of `ANIMALS` in percent, each averaged over images, and over all images as printed."""

    name: str
    method: str
    iou: tuple[float, ...]
    total: float


SOURCE = "Ando, Table 1"
PUBLISHED = (
    Published("U-Net, published", "stage1", (41.4, 60.2, 53.6, 51.7, 51.4), 52.1),
    Published("+ refiner, published", "refined", (48.3, 64.8, 58.8, 53.6, 55.2), 56.8),
)

# Figure of a method, what it is called, the factor and the digits it is shown with.
FIGURES = {
    "iou": ("IoU per image, %", 100, 1),
    "pooled_iou": ("pooled IoU, %", 100, 1),
    "boundary_iou": ("boundary IoU, %", 100, 1),
    "hd95": ("HD95, pixels", 1, 1),
}

_INCIDENTAL = (*seeds.INCIDENTAL, "model.init_args.maps")
_PATH_OF_RUN = re.compile(r"(?:.*/)?([^/]+)/[^/]+/(?:checkpoints/([^/]+\.ckpt)|(autoencoder|probabilities)/?)")
_MODEL = "model.init_args."
_PRESET = (  # options of a refiner that its preset settles
    "conditioning", "start", "train_on", "label_input", "num_samples", "scheduler", "steps", "strength", "prediction",
    "beta_schedule",
)  # fmt: skip
_NAMELESS = ("defect", "foreground")  # classes that do not tell what they are of


def read_runs(folders: Iterable[Path | str]) -> list[Run]:
    """Read run folders; a folder that is none stands for all runs in it, or in the experiments in it.

    Raises:
        UserError: a folder without evaluated runs, or a file of another kind.
    """
    return [_read(path) for path in seeds.find_runs(folders)]


def group(runs: Sequence[Run]) -> list[Row]:
    """Rows of runs that compute the same; see `seeds.group_runs`."""
    return seeds.group_runs(runs, Row)


def class_tables(rows: Sequence[Row]) -> str:
    """For each configuration with a refiner, class by class or kind by kind: stage 1, refined, and the gain.

    Two-class runs on the paper's classes make one table with the published figures beside ours.
    """
    parts: list[str] = []
    for row in rows:
        animals = _animals(row)
        if animals:
            parts.append(_paper_table(row, animals))
        parts += [_own_table(row, name) for name in sorted(row.runs) if name not in animals and _refined(row, name)]
    return "\n".join([*parts, f"{_INTERVAL_NOTE}\n"]) if parts else ""


def method_table(rows: Sequence[Row]) -> str:
    """A line for each data set, configuration and method; a stage 1 that several configurations share stands once."""
    labels = [label for label, _, _ in FIGURES.values()]
    head = ["data", "configuration", "method", "seeds", labels[0], "95 % interval", *labels[1:],
            "gain in IoU, points", "95 % interval of the gain", "runs above 0", "network calls",
            "ms an image"]  # fmt: skip
    body: list[list[str]] = []
    seen: set[tuple[str, ...]] = set()
    lines = sorted((category, i) for i, row in enumerate(rows) for category in row.runs)
    for category, row in ((category, rows[i]) for category, i in lines):
        for method in _methods(row, category):
            cells = _method_cells(row, category, method)
            shared = (category, *cells[:-1])  # all but the time
            if method != "stage1" or shared not in seen:
                body.append([category, row.name, METHODS.get(method, method), *cells])
            seen.add(shared)
    used = [i for i in range(len(head)) if i < 4 or any(line[i] not in ("", "-") for line in body)]
    return markdown_table([head[i] for i in used], [[line[i] for i in used] for line in body])


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write every figure on a line: data, configuration, figure, mean, sd, low, high, seeds, source."""
    lines: list[Line] = []
    for row in rows:
        for category, runs in sorted(row.runs.items()):
            found = dict.fromkeys(name for run in runs for name in run.figures)
            lines += [Line(category, row.name, name, row.spread(category, name)) for name in found]
        if animals := _animals(row):
            names = ("stage1/iou", "refined/iou", "refined/gain")
            totals = zip(names, _over_images(row, animals), strict=True)
            lines += [Line(f"all images of {len(animals)} classes", row.name, name, total) for name, total in totals]
    for p in PUBLISHED:
        values = [*zip(ANIMALS, p.iou, strict=True), ("all images of 5 classes", p.total)]
        lines += [Line(name, p.name, f"{p.method}/iou", Spread(value / 100, seeds=1), SOURCE) for name, value in values]
    seeds.write_lines(lines, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables in Markdown; returns the exit status, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m lit_defect.reporting.refinement",
        description="Runs of segmentation and refinement side by side.",
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders of runs")
    parser.add_argument("--csv", type=Path, help="also write every figure to this file")
    options = parser.parse_args(arguments)
    try:
        rows = group(read_runs(options.runs))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if tables := class_tables(rows):
        print(tables)
    print(method_table(rows), end="")
    if options.csv:
        write_csv(rows, options.csv)
    return 0


def _paper_table(row: Row, animals: Sequence[str]) -> str:
    """The paper's Table 1 beside ours; its total counts images, and so does ours."""
    whole = len(animals) == len(ANIMALS)
    before, after = PUBLISHED
    places = [ANIMALS.index(name) for name in animals]
    totals = (before.total, after.total) if whole else (math.nan, math.nan)
    body = [
        [name, *_published_cells(before.iou[i], after.iou[i]), *_own_cells(row.spread(name, "n"), _spreads(row, name))]
        for name, i in zip(animals, places, strict=True)
    ]
    images = Spread(sum(row.spread(name, "n").mean for name in animals))
    body.append(["all images", *_published_cells(*totals), *_own_cells(images, _over_images(row, animals))])
    head = ("IoU, %", before.name, after.name, "gain, published", *_OWN_HEAD)
    plain = [float(np.mean([p.iou[i] for i in places])) for p in PUBLISHED]
    gain = row.spread_over(animals, "refined/gain")
    notes = [
        f"{SOURCE}. It does not name its test pictures; ours can be held against its gains rather than its IoU.",
        f"Plain mean over the {len(animals)} classes: published {plain[0]:.1f} and {plain[1]:.1f}, gain "
        f"{plain[1] - plain[0]:+.1f}; ours {gain.text(100, 1, sign=True)}"
        + (f" ({limits})." if (limits := gain.limits(100, 1, sign=True)) else "."),
    ]
    return f"**{row.name}**\n\n{markdown_table(head, body)}\n" + "".join(f"- {note}\n" for note in notes)


def _own_table(row: Row, category: str) -> str:
    """Classes of a data set of several, or else kinds of defect, and all images."""

    def names_of(part: str) -> list[str]:
        keys = {key for run in row.runs[category] for key in run.figures if key.startswith(f"refined/{part}/")}
        return sorted(key.removeprefix(f"refined/{part}/") for key in keys)

    part, label, names = "class", "class", names_of("class")
    if len(names) < 2:
        part, label, names = "type", "kind", names_of("type")
    body = [
        [name, *_own_cells(row.spread(category, f"n/{part}/{name}"), _spreads(row, category, f"{part}/{name}"))]
        for name in names
    ]
    body.append(["all images", *_own_cells(row.spread(category, "n"), _spreads(row, category))])
    table = markdown_table((f"{label}: IoU, %", *_OWN_HEAD), body)
    return f"**{category}: {row.name}**\n\n{table}"


Spreads = tuple[Spread, Spread, Spread]
"""Of stage 1, refined, and the gain."""
_OWN_HEAD = ("images", "stage 1", "refined", "gain", "95 % interval", "seeds")
_INTERVAL_NOTE = "An interval tells how a mean would move with other seeds, not with other test pictures."


def _spreads(row: Row, category: str, part: str = "") -> Spreads:
    """Stage 1, refined and gain of a category, or of a part of it, `class/NAME` or `type/NAME`."""
    names = (f"stage1/{part or 'iou'}", f"refined/{part or 'iou'}", f"refined/gain{'/' if part else ''}{part}")
    stage1, refined, gain = (row.spread(category, name) for name in names)
    return stage1, refined, gain


def _own_cells(images: Spread, spreads: Spreads) -> list[str]:
    stage1, refined, gain = spreads
    return [
        f"{images.mean:.0f}",
        stage1.text(100, 1),
        refined.text(100, 1),
        gain.text(100, 1, sign=True),
        gain.limits(100, 1, sign=True),
        str(refined.seeds),
    ]


def _published_cells(before: float, after: float) -> list[str]:
    return ["-"] * 3 if math.isnan(before) else [f"{before:.1f}", f"{after:.1f}", f"{after - before:+.1f}"]


def _over_images(row: Row, categories: Sequence[str]) -> Spreads:
    """Stage 1, refined and gain over the images of several categories."""

    def spread(figure: str) -> Spread:
        def mean(runs: Sequence[Run]) -> float:
            return float(np.average([run.figures[figure] for run in runs], weights=[run.figures["n"] for run in runs]))

        return row.spread_over(categories, figure, mean)

    return spread("stage1/iou"), spread("refined/iou"), spread("refined/gain")


def _animals(row: Row) -> list[str]:
    """Those of `ANIMALS` that this row has refined, each against background."""
    return [name for name in ANIMALS if _refined(row, name)]


def _refined(row: Row, category: str) -> bool:
    return bool(row.spread(category, "refined/iou").seeds)


def _methods(row: Row, category: str) -> list[str]:
    """Those that have an IoU, in the order of `METHODS`, others last."""
    keys = [key for run in row.runs[category] for key in run.figures]
    names = dict.fromkeys([*METHODS, *(key.removesuffix("/iou") for key in keys if key.endswith("/iou"))])
    return [name for name in names if row.spread(category, f"{name}/iou").seeds]


def _method_cells(row: Row, category: str, method: str) -> list[str]:
    """Seeds, figures, gain, and last the time."""
    figures = [row.spread(category, f"{method}/{key}").text(*shown) for key, (_, *shown) in FIGURES.items()]
    iou, gain, calls = (row.spread(category, f"{method}/{name}") for name in ("iou", "gain", "calls"))
    lows = [low for low in row.values(category, f"{method}/gain_low") if math.isfinite(low)]
    return [
        str(iou.seeds),
        figures[0],
        iou.limits(100, 1),
        *figures[1:],
        gain.text(100, 1, sign=True) if gain.seeds else "",
        gain.limits(100, 1, sign=True),
        f"{sum(low > 0 for low in lows)} of {len(lows)}" if lows else "",
        f"{calls.mean:.0f}" if calls.seeds else "",
        row.spread(category, f"{method}/ms").text(digits=1),
    ]


def _read(path: Path) -> Run:
    result = seeds.read_metrics(path)
    try:
        options = seeds.read_options(path, _INCIDENTAL)
        figures, words = _figures(result), _method(result, options)
        category = _category(result, RunFolder(path).config())
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path / 'test_metrics.json'} does not hold the metrics of segmentation") from None
    in_words = tuple(f"{_MODEL}{name}" for name in ("preset", *_PRESET))
    return Run(
        path=path,
        category=category,
        method=words,
        seeds=(result.get("training_seed"), result.get("split_seed")),
        figures=figures,
        options={key: _experiment_of(value) for key, value in options.items() if key not in in_words},
    )


def _figures(result: Mapping[str, Any]) -> dict[str, float]:
    """By name, nan where undefined: `refined/iou`, `refined/class/bird`, `refined/gain`, `refined/gain/class/bird` ...

    `n` counts the images whose IoU is defined, `n/class/bird` those of a class.
    """
    figures: dict[str, float] = {}
    times = result.get("ms_per_image") or {}
    for method, entry in result["methods"].items():
        figures |= {f"{method}/{key}": _value(entry[key]) for key in FIGURES}
        figures |= {"n": float(entry["n_defined"]), f"{method}/ms": _value({"value": times.get(method)})}
        for part in ("class", "type"):
            for name, cell in (entry.get(f"iou_by_{part}") or {}).items():
                figures |= {f"{method}/{part}/{name}": _value(cell), f"n/{part}/{name}": float(cell["n"])}
        if method in ("refined", "segmenter"):
            figures[f"{method}/calls"] = _value({"value": result.get("network_calls")})
    for method, entry in (result.get("gain") or {}).items():
        figures |= {f"{method}/gain": _value(entry["iou"]), f"{method}/gain_low": _value(entry["iou"], "low")}
        for part in ("class", "type"):
            cells = entry.get(f"by_{part}") or {}
            figures |= {f"{method}/gain/{part}/{name}": _value(cell) for name, cell in cells.items()}
    return figures


def _value(entry: Mapping[str, Any], key: str = "value") -> float:
    return math.nan if entry.get(key) is None else float(entry[key])


def _method(result: Mapping[str, Any], options: Mapping[str, str]) -> str:
    """`Segmenter, unet, resnet34 (hub weights)`, `DDPMRefiner, paper`, `DDPMRefiner, paper, strength=0.25`."""
    words = [str(result["task"])]
    if "architecture" in result:
        words += [str(result["architecture"]), f"{result['encoder']} ({result.get('weights') or 'random'} weights)"]
    if preset := result.get("preset") or options.get(f"{_MODEL}preset"):
        words.append(preset)
    if not result.get("preset"):  # not the preset as it is
        given = {name: options.get(f"{_MODEL}{name}", "None") for name in _PRESET}
        words += [f"{name}={value}" for name, value in given.items() if value != "None"]
    return ", ".join(words)


def _category(result: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The class of a run that tells one class from background; else the category, or the folder, of its data set."""
    names = result["class_names"]
    if result.get("category"):
        return str(result["category"])
    if len(names) == 2 and names[1] not in _NAMELESS:
        return str(names[1])
    data = (config.get("data") or {}).get("init_args") or {}
    category = data.get("category")
    if isinstance(category, list):
        category = ", ".join(map(str, category))
    return str(category or Path(str(data.get("root") or "-")).name)


def _experiment_of(value: str) -> str:
    """`runs/stage1/20250101-120000-abcd/checkpoints/best.ckpt` -> `stage1/best.ckpt`; else the value."""
    if RunFolder(Path(value)).record():  # the folder of a run itself
        return Path(value).parent.name
    match = _PATH_OF_RUN.fullmatch(value)
    return f"{match[1]}/{match[2] or match[3]}" if match else value


if __name__ == "__main__":
    sys.exit(main())
