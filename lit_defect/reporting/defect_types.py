"""Classifiers of kinds of defect side by side: what generated defects are worth, and the published means beside.

    python -m lit_defect.reporting.defect_types [NAME=]RUNS... [--csv FILE]

The runs are those of `DefectClassifier` on data that tell the kinds of defect apart (`data.target defects`), as in
experiments/anomaly_diffusion/classifier_*.yaml. How they become arms is told in localization.py: runs given as
NAME=RUNS are one arm, the first arm is the one that the others are held against, seed by seed. Figures are in percent,
the mean over seeds ± the standard deviation.
"""

from __future__ import annotations

import argparse
import json
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
from lit_defect.runs import RunFolder

FIGURES = {"accuracy": "accuracy", "balanced_accuracy": "mean recall"}


@dataclass(frozen=True)
class Published:
    """A published mean accuracy over the categories of MVTec AD, in percent."""

    name: str
    accuracy: float
    source: str


PUBLISHED = (
    Published("DFMGAN", 49.61, "Hu et al., AAAI 2024"),
    Published("AnomalyDiffusion", 66.09, "Hu et al., AAAI 2024"),
    Published("AnomalyDiffusion, run again", 64.9, "independent re-runs"),
    Published("MAGIC", 78.1, "2026"),
    Published("O2MAG, trained on real defects too", 82.4, "2026"),
)


def read_runs(folders: Iterable[Path | str], arm: str | None = None) -> list[Run]:
    """Read run folders; a folder that is none stands for all runs in it, or in the experiments in it.

    Args:
        folders: run folders, experiments, or the folder of all experiments.
        arm: name of the arm that these runs make; None tells them apart by their options.

    Raises:
        UserError: a folder without evaluated runs, or runs of another kind.
    """
    found = [_read(path) for path in seeds.find_runs(folders)]
    return found if arm is None else [replace(run, method=arm, options={}) for run in found]


def group(runs: Sequence[Run]) -> list[Row]:
    """The arms, in the order of their first run; see `seeds.group_runs`."""
    return seeds.group_runs(runs, Row)


def arms_table(rows: Sequence[Row], categories: Sequence[str]) -> str:
    """A line for each arm with the interval of its accuracy, then its differences to the first one.

    Args:
        rows: the arms that have runs of all these categories.
        categories: of one name, or those over which the mean is taken within each seed.
    """
    first, *others = rows
    title = categories[0] if len(categories) == 1 else f"mean of {len(categories)}"
    body = []
    for row in rows:
        right, recall = (row.spread_over(categories, key) for key in FIGURES)
        body.append([row.name, right.text(100, 1), right.limits(100, 1) or "-", recall.text(100, 1), str(right.seeds)])
    text = markdown_table((f"{title}, %", "accuracy", "95 % interval", "mean recall", "seeds"), body)
    compared = []
    for row in others:
        spreads = [paired(first, row, categories, key) for key in FIGURES]
        compared.append([row.name, *map(difference, spreads), str(spreads[0].seeds)])
    if compared:
        text += "\n" + markdown_table((f"{title}: less {first.name}, points", *FIGURES.values(), "pairs"), compared)
    return text


def kinds_table(rows: Sequence[Row], category: str) -> str:
    """Recall of each kind of defect by arm, with the number of its test pictures."""
    body = []
    for kind in _kinds(rows, category):
        counts = {run.figures.get(f"tested/{kind}", 0.0) for row in rows for run in row.runs[category]}
        number = " to ".join(f"{count:.0f}" for count in sorted({min(counts), max(counts)}))
        body.append([f"{kind} ({number})", *(row.spread(category, f"recall/{kind}").text(100, 1) for row in rows)])
    return markdown_table((f"{category}: recall by kind, %", *(row.name for row in rows)), body)


def published_table(rows: Sequence[Row]) -> str:
    """The published means over MVTec AD with ours below them, as far as there are runs on its categories."""
    body = [[p.name, f"{p.accuracy:.2f}".removesuffix("0"), p.source] for p in PUBLISHED]
    for row in rows:
        if names := [name for name in CATEGORIES if name in row.runs]:
            text = row.spread_over(names, "accuracy").text(100, 1)
            body.append([row.name, text, f"ours, {len(names)} of {len(CATEGORIES)} categories"])
    notes = [
        "Published are means over the categories of MVTec AD, by an ImageNet ResNet-34 at 256 pixels, trained on "
        "generated defects alone (data.synthetic.alone) where nothing else is said: figures of other "
        "data or networks cannot be held against them, only differences between arms.",
        "A category with one kind of defect, such as toothbrush, has nothing to tell apart.",
    ]
    table = markdown_table(("means of MVTec AD, %", "accuracy", "source"), body)
    return table + "\n" + "".join(f"- {note}\n" for note in notes)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write every figure on a line: data, configuration, figure, mean, sd, low, high, seeds, source."""
    lines: list[Line] = []
    for names, present in parts(rows):
        data = names[0] if len(names) == 1 else f"mean of {len(names)}"
        keys = [*FIGURES, *(f"recall/{kind}" for kind in _kinds(present, names[0]) if len(names) == 1)]
        lines += [Line(data, row.name, key, row.spread_over(names, key)) for row in present for key in keys]
        for row in present[1:]:
            name = f"{row.name} less {present[0].name}"
            lines += [Line(data, name, key, paired(present[0], row, names, key)) for key in keys]
    lines += [
        Line("mean of MVTec AD", p.name, "accuracy", Spread(p.accuracy / 100, seeds=1), p.source) for p in PUBLISHED
    ]
    seeds.write_lines(lines, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables in Markdown; returns the exit status, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m lit_defect.reporting.defect_types", description="Classifiers of kinds of defect side by side."
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
            for text in (split_note(present, names[0]), kinds_table(present, names[0])):
                print(text, end="\n" if text else "")
    print(f"{SEED_NOTE}\n")
    print(published_table(rows), end="")
    if options.csv:
        write_csv(rows, options.csv)
    return 0


def _kinds(rows: Sequence[Row], category: str) -> list[str]:
    """Of defects, which the runs of a category tell apart."""
    keys = {key for row in rows for run in row.runs[category] for key in run.figures}
    return sorted(key.removeprefix("recall/") for key in keys if key.startswith("recall/"))


def _read(path: Path) -> Run:
    result, config = seeds.read_metrics(path), RunFolder(path).config()
    try:
        kinds_alone = result["normal_class"] is None
        figures = _figures(result)
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path / 'test_metrics.json'} does not hold the metrics of a classifier") from None
    if not kinds_alone:
        raise UserError(
            f"{path} tells good from defective, and here kinds of defect are compared: set data.target to defects"
        )
    return Run(
        path=path,
        category=_category(config),
        method=_method(path, config),
        seeds=(result.get("training_seed"), result.get("split_seed")),
        figures=figures,
        options=seeds.learning_options(path),
    )


def _figures(result: Mapping[str, Any]) -> dict[str, float]:
    """By the keys of `FIGURES`, `recall/KIND`, `tested/KIND`, and `pictures`, tested; nan where undefined."""
    figures = {key: result[key]["value"] for key in FIGURES}
    figures |= {f"recall/{kind}": found["value"] for kind, found in result["recall"].items()}
    figures |= {f"tested/{kind}": number for kind, number in result["counts"].items()}
    figures["pictures"] = result["n"]
    return {key: math.nan if value is None else float(value) for key, value in figures.items()}


def _category(config: Mapping[str, Any]) -> str:
    """The category of a run's data set, or the folder's name where it has several or none."""
    data = (config.get("data") or {}).get("init_args") or {}
    category = data.get("category")
    if isinstance(category, list):
        return ", ".join(map(str, category))
    return str(category if category not in (None, "all") else Path(str(data.get("root") or "-")).name)


def _method(path: Path, config: Mapping[str, Any]) -> str:
    """`real + AnomalyDiffusion, resnet34 (hub weights)`."""
    learned = ["real"]
    if (path / "synthetic.json").is_file():
        learned.append(str(json.loads((path / "synthetic.json").read_text(encoding="utf-8")).get("generator")))
    model = (config.get("model") or {}).get("init_args") or {}
    return f"{' + '.join(learned)}, {model.get('backbone', 'vgg19')} ({model.get('weights') or 'random'} weights)"


if __name__ == "__main__":
    sys.exit(main())
