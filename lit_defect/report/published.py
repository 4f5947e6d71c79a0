"""What the papers have published, beside ours: the rows that the tables of each system already have."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lit_defect.report.arms import Arm, spread_cell
from lit_defect.report.blocks import Block, Cell, Column, Details, Section, Table, Text
from lit_defect.report.matter import Matter
from lit_defect.reporting import contrastive, localization, refinement, zheng_nagata
from lit_defect.reporting.seeds import CATEGORIES, Spread

_LOCALIZED = {
    "pixel/auroc": "pixel_auroc", "pixel/average_precision": "pixel_ap", "pixel/f1_max": "pixel_f1",
    "pixel/aupro": "pro", "image/auroc": "image_auroc", "image/average_precision": "image_ap",
    "image/f1_max": "image_f1",
}  # fmt: skip
"""Our figures by the names of the published ones."""


def section(matter: Matter) -> Section | None:
    """None where nothing was published on such runs."""
    tasks = {run.task for arm in matter.arms for run in arm.runs}
    blocks: list[Block] = []
    if matter.study is not None and matter.study.paper == "zheng_nagata":
        blocks += _zheng_nagata(matter)
    if "SimCLR" in tasks:
        blocks += _beside(matter, _contrastive(matter), bool(_of(matter, contrastive.OBJECTS)))
    if any("Refiner" in task for task in tasks):
        blocks += _beside(matter, _refinement(matter), bool(_animals(matter)))
    if "AnomalyLocalizer" in tasks:
        blocks += _beside(matter, _localization(matter), bool(_of(matter, CATEGORIES)))
    return Section("The paper's figures beside ours", blocks) if blocks else None


def published_values(matter: Matter, figure: str) -> tuple[tuple[str, float], ...]:
    """Published values of a figure on the one category that all arms have; none where they cannot be held together."""
    categories = {run.options.get("data.init_args.category") for arm in matter.arms for run in arm.runs}
    tasks = {run.task for arm in matter.arms for run in arm.runs}
    only = next(iter(categories)) if len(categories) == 1 else None
    if figure == "image/auroc" and tasks == {"SimCLR"} and only in contrastive.OBJECTS:
        place = contrastive.OBJECTS.index(str(only))
        return tuple((row.name, row.auroc[place] / 100) for row in contrastive.PUBLISHED)
    return ()


def _beside(matter: Matter, blocks: Iterator[Block], same_data: bool) -> list[Block]:
    """Shown where ours are of the same data, else folded, with a word on why."""
    found = list(blocks)
    if same_data:
        return found
    note = "The published figures are of other data than these runs', and none of ours can be held against them."
    return [Text(note, "note"), Details("Published figures", found)]


def _of(matter: Matter, categories: tuple[str, ...]) -> list[tuple[Arm, str]]:
    """Arms with the category that all of their runs have, as far as it is one of these."""
    found = []
    for arm in matter.arms:
        names = {run.options.get("data.init_args.category") for run in arm.runs}
        if len(names) == 1 and (name := next(iter(names))) in categories:
            found.append((arm, str(name)))
    return found


def _zheng_nagata(matter: Matter) -> Iterator[Block]:
    stages = [s for s in ("mirrored", "test") if any(s in run.measured for arm in matter.arms for run in arm.runs)]
    columns: dict[str, list[float]] = {f"published {name}": list(x) for name, x in zheng_nagata.ACCURACY.items()}
    for stage in stages:
        for arm in matter.arms:
            values = [100 * value for value in arm.by_seed(stage, "accuracy").values()]
            if values:
                columns[f"ours, {arm.name}, {'mirrored' if stage == 'mirrored' else 'hold-out'}"] = values
    spreads = [Spread.of(values) for values in columns.values()]
    most = max(map(len, columns.values()))
    rows: list[list[Cell]] = [
        [str(k + 1), *(values[k] if k < len(values) else None for values in columns.values())] for k in range(most)
    ]
    rows.append(["mean ± sd", *(spread_cell(found, digits=2) for found in spreads)])
    heads = [Column("trial, or seed in order"), *(Column(name, 2) for name in columns)]
    yield Table("zheng_nagata", heads, rows, "Accuracy in percent, Zheng & Nagata's table 1 beside ours.")
    yield Text(f"Published, B less A: {zheng_nagata.published_difference()} points.")
    for note in zheng_nagata.NOTES:
        yield Text(note, "note")
    if "mirrored" not in stages:
        yield Text("Ours have no mirrored pictures: none of them compares with these figures.", "warning")


def _contrastive(matter: Matter) -> Iterator[Block]:
    columns = [Column("image AUROC, %"), *(Column(name, 1) for name in contrastive.OBJECTS), Column("mean", 1)]
    rows: list[list[Cell]] = [[row.name, *map(float, row.auroc), row.mean] for row in contrastive.PUBLISHED]
    for arm, category in _of(matter, contrastive.OBJECTS):
        text = spread_cell(arm.spread(matter.stage, "image/auroc"), 100, 1)
        rows.append([f"ours, {arm.name}", *(text if name == category else None for name in contrastive.OBJECTS), None])
    yield Table("published_contrastive", columns, rows, "Published image AUROC on MVTec AD beside ours.")
    for row in contrastive.PUBLISHED:
        yield Text(f"{row.name}: {row.source}.", "note")


def _refinement(matter: Matter) -> Iterator[Block]:
    before, after = refinement.PUBLISHED
    columns = [
        Column("IoU, %"), Column("stage 1, published", 1), Column("refined, published", 1),
        Column("gain, published", 1), Column("stage 1, ours"), Column("refined, ours"), Column("gain, ours"),
    ]  # fmt: skip
    rows: list[list[Cell]] = [
        [name, *_published(before.iou[k], after.iou[k]), None, None, None] for k, name in enumerate(refinement.ANIMALS)
    ]
    rows.append(["all images", *_published(before.total, after.total), None, None, None])
    for arm, name in _animals(matter):
        cells = [
            spread_cell(arm.spread(matter.stage, figure), 100, 1, sign="gain" in figure)
            for figure in ("stage1/iou", "refined/iou", "gain/refined/iou")
        ]
        rows.append([f"{name}: {arm.name}", None, None, None, *cells])
    yield Table("published_refinement", columns, rows, f"{refinement.SOURCE} beside ours.")
    yield Text("The paper does not name its test pictures: ours can be held against its gains rather than its IoU.")


def _published(before: float, after: float) -> tuple[float, float, float]:
    return before, after, after - before


def _animals(matter: Matter) -> list[tuple[Arm, str]]:
    """Arms of one of the paper's classes against background."""
    found = []
    for arm in matter.arms:
        runs = [run.measured[matter.stage] for run in arm.runs if matter.stage in run.measured]
        names = {tuple(measured.about.get("foreground") or ()) for measured in runs}
        only = next(iter(names)) if len(names) == 1 else ()
        if len(only) == 1 and only[0] in refinement.ANIMALS:
            found.append((arm, str(only[0])))
    return found


def _localization(matter: Matter) -> Iterator[Block]:
    columns = [Column("%"), *(Column(name, 1) for name in localization.FIGURES.values()), Column("source")]
    rows: list[list[Cell]] = [
        [row.name, *(None if math.isnan(value) else value for value in row.values), row.source]
        for row in localization.PUBLISHED
    ]
    by_published = {theirs: ours for ours, theirs in _LOCALIZED.items()}
    for arm, category in _of(matter, CATEGORIES):
        cells = [spread_cell(arm.spread(matter.stage, by_published[name]), 100, 1) for name in localization.FIGURES]
        rows.append([f"ours, {arm.name}", *cells, f"ours, {category} alone"])
    yield Table("published_localization", columns, rows, "Published means over MVTec AD beside ours.")
    yield Text(
        "Published are means over the 15 categories of MVTec AD; a single category of ours is no such mean. "
        "`python -m lit_defect.reporting.localization` takes the mean over categories within each seed.",
        "note",
    )
