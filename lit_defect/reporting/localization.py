"""Localisers side by side: what generated defects are worth, as the arms of one comparison and beside published means.

    python -m lit_defect.reporting.localization [NAME=]RUNS... [--csv FILE]

Runs given as NAME=RUNS make one arm of that name, whatever their options; how others become arms is told in seeds.py,
with a generated data set known by the experiment that made it. The first arm is the one that the others are held
against, seed by seed: a difference counts only where both arms have a run of the same seeds. Figures are in percent,
the mean over seeds ± the standard deviation.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lit_defect.errors import UserError
from lit_defect.reporting import seeds
from lit_defect.reporting.seeds import (
    CATEGORIES,
    SEED_NOTE,
    Line,
    Row,
    Run,
    Spread,
    difference,
    paired,
    parts,
    split_note,
)
from lit_defect.reporting.tables import markdown_table

FIGURES = {
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "pixel_f1": "pixel F1-max",
    "pro": "PRO",
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1": "image F1-max",
}


@dataclass(frozen=True)
class Published:
    """A published row, in percent, in the order of `FIGURES`; nan where nothing was published."""

    name: str
    source: str
    values: tuple[float, ...]


_NONE = math.nan
HU = "Hu et al., AAAI 2024"
PUBLISHED = (
    Published("DRAEM", HU, (92.2, 54.1, 53.1, _NONE, 94.6, 97.0, 94.4)),
    Published("PRN", HU, (96.9, 66.2, 64.7, _NONE, 91.6, 96.6, 92.4)),
    Published("DFMGAN", HU, (90.0, 62.7, 62.1, _NONE, 87.2, 94.8, 94.7)),
    Published("AnomalyDiffusion", HU, (99.1, 81.4, 76.3, 94.0, 99.2, 99.7, 98.7)),
    Published("AnomalyDiffusion, run again", "independent re-runs", (98.39, 74.02, 70.14, 92.57, *[_NONE] * 3)),
    Published("SeaS, run again", "ICCV 2025", (98.3, 78.3, *[_NONE] * 5)),
    Published("DualAnoDiff", "CVPR 2025", (99.1, 84.5, *[_NONE] * 5)),
    Published("MAGIC", "2026", (99.15, 81.99, 77.33, 96.2, *[_NONE] * 3)),
    Published("O2MAG, trained on real defects too", "2026", (99.2, 86.3, 80.8, *[_NONE] * 4)),
)
ABLATION = (
    Published("neither part", HU, (81.3, 31.1, 46.5)),
    Published("spatial encoder", HU, (90.3, 51.2, 60.7)),
    Published("spatial encoder, masked loss", HU, (95.0, 64.9, 68.8)),
    Published("masked loss, re-weighting, no spatial encoder", HU, (95.5, 67.5, 68.9)),
    Published("all", HU, (99.1, 81.4, 76.3)),
)

_INCIDENTAL = (*seeds.INCIDENTAL, "model.init_args.maps", "model.init_args.overlays")


def read_runs(folders: Iterable[Path | str], arm: str | None = None) -> list[Run]:
    """Read run folders; a folder that is none stands for all runs in it, or in the experiments in it.

    Args:
        folders: run folders, experiments, or the folder of all experiments.
        arm: name of the arm that these runs make; None tells them apart by their options.

    Raises:
        UserError: a folder without evaluated runs, or a file of another kind.
    """
    found = [_read(path) for path in seeds.find_runs(folders)]
    return found if arm is None else [replace(run, method=arm, options={}) for run in found]


def group(runs: Sequence[Run]) -> list[Row]:
    """The arms, in the order of their first run; see `seeds.group_runs`."""
    return seeds.group_runs(runs, Row)


def arms_table(rows: Sequence[Row], categories: Sequence[str]) -> str:
    """A line for each arm, then its differences to the first one.

    Args:
        rows: the arms that have runs of all these categories.
        categories: of one name, or those over which the mean is taken within each seed.
    """
    first, *others = rows
    title = categories[0] if len(categories) == 1 else f"mean of {len(categories)}"
    body = []
    for row in rows:
        spreads = [row.spread_over(categories, key) for key in FIGURES]
        body.append([row.name, *(spread.text(100, 1) for spread in spreads), str(max(s.seeds for s in spreads))])
    text = markdown_table((f"{title}, %", *FIGURES.values(), "seeds"), body)
    compared = []
    for row in others:
        spreads = [paired(first, row, categories, key) for key in FIGURES]
        compared.append([row.name, *map(difference, spreads), str(max(spread.seeds for spread in spreads))])
    if compared:
        text += "\n" + markdown_table((f"{title}: less {first.name}, points", *FIGURES.values(), "pairs"), compared)
    return text


def types_table(rows: Sequence[Row], category: str) -> str:
    """Pixel AP of each kind of defect by arm; empty where there are fewer than two kinds."""
    keys = dict.fromkeys(key for row in rows for run in row.runs[category] for key in run.figures if "/" in key)
    body = [
        [key.rpartition("/")[2], *(row.spread(category, key).text(100, 1) for row in rows)]
        for key in sorted(keys)
        if key.startswith("pixel_ap/")
    ]
    if len(body) < 2:
        return ""
    return markdown_table((f"{category}: pixel AP by kind, %", *(row.name for row in rows)), body)


def published_table(rows: Sequence[Row]) -> str:
    """The published means over MVTec AD with ours below them, as far as there are runs on its categories."""
    body = [[p.name, *map(_percent, p.values), p.source] for p in PUBLISHED]
    for row in rows:
        if names := [name for name in CATEGORIES if name in row.runs]:
            cells = [row.spread_over(names, key).text(100, 1) for key in FIGURES]
            body.append([row.name, *cells, f"ours, {len(names)} of {len(CATEGORIES)} categories"])
    notes = [
        "Published are means over the categories of MVTec AD at 256 pixels: figures of other data cannot be held "
        "against them, only differences between arms.",
        "The published localisers are networks of their own (the one of DRAEM), trained on good pictures and on 1,000 "
        "generated ones of each kind, no real defects (data.synthetic.alone).",
        "The paper's localiser is taken at the epoch that is best on the test pictures; ours never is.",
    ]
    table = markdown_table(("means of MVTec AD, %", *FIGURES.values(), "source"), body)
    return table + "\n" + "".join(f"- {note}\n" for note in notes)


def ablation_table() -> str:
    """What the parts of AnomalyDiffusion bring, as published."""
    head = ("AnomalyDiffusion with, published, %", *list(FIGURES.values())[:3])
    return markdown_table(head, [[p.name, *map(_percent, p.values)] for p in ABLATION])


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write every figure on a line: data, configuration, figure, mean, sd, low, high, seeds, source."""
    lines: list[Line] = []
    for names, present in parts(rows):
        data = names[0] if len(names) == 1 else f"mean of {len(names)}"
        keys = [*FIGURES, *_kinds(present, names[0])] if len(names) == 1 else list(FIGURES)
        lines += [Line(data, row.name, key, row.spread_over(names, key)) for row in present for key in keys]
        for row in present[1:]:
            name = f"{row.name} less {present[0].name}"
            lines += [Line(data, name, key, paired(present[0], row, names, key)) for key in FIGURES]
    for data, table in (("mean of MVTec AD", PUBLISHED), ("ablation on MVTec AD", ABLATION)):
        for p in table:
            values = [(key, value) for key, value in zip(FIGURES, p.values, strict=False) if not math.isnan(value)]
            lines += [Line(data, p.name, key, Spread(value / 100, seeds=1), p.source) for key, value in values]
    seeds.write_lines(lines, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables in Markdown; returns the exit status, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m lit_defect.reporting.localization", description="Localisers of defects side by side."
    )
    parser.add_argument("runs", nargs="+", help="run folders, or folders of runs; NAME=RUNS makes them one arm")
    parser.add_argument("--csv", type=Path, help="also write every figure to this file")
    options = parser.parse_args(arguments)
    try:
        rows = group([run for given in options.runs for run in seeds.named_runs(given, read_runs)])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for names, present in parts(rows):
        print(arms_table(present, names))
        if len(names) == 1:
            for text in (split_note(present, names[0]), types_table(present, names[0])):
                print(text, end="\n" if text else "")
    print(f"{SEED_NOTE}\n")
    print(published_table(rows))
    print(ablation_table(), end="")
    if options.csv:
        write_csv(rows, options.csv)
    return 0


def _kinds(rows: Sequence[Row], category: str) -> list[str]:
    """Names of the figures by kind of defect."""
    return sorted({key for row in rows for run in row.runs[category] for key in run.figures if "/" in key})


def _percent(value: float) -> str:
    """As it was published, with one decimal or two."""
    return "-" if math.isnan(value) else f"{value:.2f}".removesuffix("0")


def _read(path: Path) -> Run:
    result = seeds.read_metrics(path)
    try:
        figures, method = _figures(result), _method(result)
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path / 'test_metrics.json'} does not hold the metrics of a localiser") from None
    return Run(
        path=path,
        category=str(result.get("category") or "-"),
        method=method,
        seeds=(result.get("training_seed"), result.get("split_seed")),
        figures=figures,
        options=seeds.learning_options(path, _INCIDENTAL),
    )


def _figures(result: Mapping[str, Any]) -> dict[str, float]:
    """By the keys of `FIGURES`, `pixel_ap/KIND`, `image_auroc/KIND`, and `pictures`, tested; nan where undefined."""
    image, pixel = result["image"][result["score"]], result["pixel"]
    figures = {
        "pixel_auroc": pixel.get("pixel_auroc"),
        "pixel_ap": pixel.get("pixel_average_precision"),
        "pixel_f1": pixel.get("pixel_f1_max"),
        "pro": pixel.get("aupro"),
        "image_auroc": image["auroc"]["value"],
        "image_ap": image["average_precision"]["value"],
        "image_f1": image["f1_max"]["value"],
    }
    by_kind = (result.get("pixel_by_type") or {}).items()
    figures |= {f"pixel_ap/{kind}": found["pixel_average_precision"] for kind, found in by_kind}
    figures |= {"pictures": result["n"]}
    figures |= {f"image_auroc/{kind}": found["value"] for kind, found in image["auroc_by_type"].items()}
    return {key: math.nan if value is None else float(value) for key, value in figures.items()}


def _method(result: Mapping[str, Any]) -> str:
    """`real + CutPaste + AnomalyDiffusion, unet on resnet34 (random weights)`."""
    counts = result["training_pictures"]
    learned = ["real"] if counts.get("defective") else []
    learned += [str(result["anomaly"])] if result.get("anomaly") else []
    learned += sorted(name for name in counts if name not in ("good", "defective"))
    network = f"{result['architecture']} on {result['encoder']} ({result.get('weights') or 'random'} weights)"
    return f"{' + '.join(learned)}, {network}"


if __name__ == "__main__":
    sys.exit(main())
