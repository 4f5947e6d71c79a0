"""The sections on results: tables and intervals of the figures, parts, and curves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lit_defect.report.answer import capital
from lit_defect.report.arms import Arm, spread_cell
from lit_defect.report.axes import fixed
from lit_defect.report.blocks import Block, Cell, Column, Details, Interval, Intervals, Section, Table, Text
from lit_defect.report.comparing import Difference, level_of, p_text
from lit_defect.report.curves import ARMS, RUNS, charts
from lit_defect.report.figures import better, digits, label, meaning
from lit_defect.report.matter import STAGE_NAMES, Matter
from lit_defect.report.published import published_values
from lit_defect.reporting.seeds import SEED_NOTE, Spread

_ON_CHART = 32
_BY_PART = 12
"""So many arms stand side by side in a table of classes."""


def tables(matter: Matter) -> Section:
    """All arms and figures, the judged one in full, differences, pictures, and every number below a fold."""
    if not matter.figures:
        return Section("Results", [Text("No run has results yet.", "warning")])
    repeated = any(arm.spread(matter.stage, matter.judged).seeds > 1 for arm in matter.arms)
    blocks: list[Block] = [Text(f"All figures are of {matter.where}.{f' {SEED_NOTE}' if repeated else ''}")]
    if not repeated:
        blocks.append(
            Text(
                "No arm has two seeds, so there is neither a standard deviation nor an interval nor a test: a single "
                "run does not tell what another seed would have given.",
                "warning",
            )
        )
    intervals = list(_charts(matter))
    blocks += [_overview(matter), *intervals[:1], *_single_runs(matter), *_differences(matter)]
    if intervals[1:]:
        blocks.append(Details("Intervals of the other figures", intervals[1:]))
    blocks += [Details("Picture by picture", [table]) for table in _pictures(matter)]
    every = _everything(matter, matter.stage, "figures")
    blocks.append(Details("Every figure of every arm", [_judged(matter), every]))
    others = [s for s in STAGE_NAMES if s != matter.stage and any(s in r.measured for a in matter.arms for r in a.runs)]
    for stage in others:
        note = " (trained on, and no test)" if stage == "mirrored" else ""
        every = _everything(matter, stage, f"figures_{stage}")
        blocks.append(Details(f"Figures of the {STAGE_NAMES[stage]}{note}", [every]))
    return Section("Results", blocks)


def parts(matter: Matter) -> Section | None:
    """By class or type of defect, a table for each figure that has them."""
    names: dict[str, dict[str, None]] = {}
    for run in (run for arm in matter.arms for run in arm.runs if matter.stage in run.measured):
        for figure, by_part in run.measured[matter.stage].parts.items():
            names.setdefault(figure, {}).update(dict.fromkeys(by_part))
    order = sorted(names, key=lambda name: (name not in matter.figures, name.count("/")))
    found = [_by_part(matter, figure, list(names[figure])) for figure in order]
    if not found:
        return None
    left = len(matter.arms) - _BY_PART
    blocks: list[Block] = [Text(f"{_over_seeds(matter)}.")]
    if left > 0:
        blocks.append(Text(f"{left} arms are left out here; the first {_BY_PART} are shown.", "note"))
    blocks += found[:4]
    if found[4:]:
        blocks.append(Details(f"{len(found) - 4} more figures", found[4:]))
    return Section("By class and type of defect", blocks)


def curves(matter: Matter) -> Section | None:
    """Losses and validation figures over steps."""
    arms = matter.grouped.arms
    found = charts(arms, matter.figures)
    if not found:
        return None
    band = any(len(arm.runs) > 1 for arm in arms)
    blocks: list[Block] = [
        Text(
            "Each line is an arm: the mean over its runs, with a band of one standard deviation."
            if band
            else f"Each line is {'a single run' if len(arms) > 1 else 'the run'} of an arm."
        )
    ]
    if len(arms) > ARMS:
        blocks.append(Text(f"The first {ARMS} of {len(arms)} arms are drawn.", "note"))
    if any(len(arm.runs) > RUNS for arm in arms[:ARMS]):
        blocks.append(Text(f"Of arms with more than {RUNS} runs the first {RUNS} are drawn.", "note"))
    return Section("Curves", [*blocks, *found])


def _overview(matter: Matter) -> Table:
    """Arms by figures, mean ± sd; the best mean of each figure stands out."""
    spreads = {arm.name: [arm.spread(matter.stage, figure) for figure in matter.figures] for arm in matter.arms}
    spreads = {arm: row for arm, row in spreads.items() if any(found.seeds for found in row)}
    all_rows = list(spreads.values())
    shown = [digits(row[k].mean for row in all_rows) for k in range(len(matter.figures))]
    apart = {found.figure for found in matter.differences if found.refused} if matter.data_sets < 2 else matter.figures
    strong = []
    for k, figure in enumerate(matter.figures):
        means = [(row[k].mean, i) for i, row in enumerate(all_rows) if row[k].seeds]
        if better(figure) and len(means) > 1 and figure not in apart:
            best = (max if better(figure) == "larger" else min)(mean for mean, _ in means)
            strong += [(i, k + 2) for mean, i in means if fixed(mean, shown[k]) == fixed(best, shown[k])]
    rows: list[list[Cell]] = [
        [
            arm,
            max(s.seeds for s in row),
            *(spread_cell(s, digits=d) for s, d in zip(row, shown, strict=True)),
        ]
        for arm, row in spreads.items()
    ]
    columns = [Column("arm"), Column("seeds", 0), *(_column(figure) for figure in matter.figures)]
    caption = f"{_over_seeds(matter)}." + (
        " The best mean of each column stands out, which alone says nothing of a difference." if strong else ""
    )
    return Table("results", columns, rows, caption, strong)


def _judged(matter: Matter) -> Table:
    """The judged figure with its interval."""
    shown = digits(arm.spread(matter.stage, matter.judged).mean for arm in matter.arms)
    heads = ("mean", "sd", "95 % from", "95 % to")
    rows: list[list[Cell]] = []
    for arm in matter.arms:
        found = arm.spread(matter.stage, matter.judged)
        seeds = ", ".join(str(seed[0]) for seed in arm.by_seed(matter.stage, matter.judged))
        rows.append([arm.name, *map(_cell, (found.mean, found.sd, found.low, found.high)), found.seeds, seeds])
    columns = [Column("arm"), *(Column(head, shown) for head in heads), Column("seeds", 0), Column("which")]
    caption = f"{capital(label(matter.judged))}: mean over seeds, standard deviation, t interval of the mean."
    return Table("judged", columns, rows, caption)


def _single_runs(matter: Matter) -> Iterator[Block]:
    """The judged figure of arms of one run, with the interval over its pictures."""
    single = [(arm, run) for arm in matter.arms for run in arm.runs if len(arm.runs) == 1]
    limited = [
        (arm, run.measured[matter.stage].figures[matter.judged])
        for arm, run in single
        if matter.stage in run.measured and matter.judged in run.measured[matter.stage].figures
    ]
    body: list[list[Cell]] = [
        [arm.name, *map(_cell, (f.value, f.low, f.high))] for arm, f in limited if math.isfinite(f.low)
    ]
    if body and len(matter.arms) > 1:  # a lone arm has all of its figures so at the head
        shown = digits(figure.value for _, figure in limited)
        columns = [Column("arm"), *(Column(head, shown) for head in ("value", "95 % from", "95 % to"))]
        caption = (
            f"{capital(label(matter.judged))} of single runs, with the interval for other pictures (whole parts); what "
            "another seed would give is not in it."
        )
        yield Table("single_runs", columns, body, caption)


def _charts(matter: Matter) -> Iterator[Block]:
    """Intervals of each main figure, the best first where the arms are many."""
    for figure in matter.figures:
        found = [(arm.name, arm.spread(matter.stage, figure), arm) for arm in matter.arms]
        found = [one for one in found if one[1].seeds]
        if len(found) > _ON_CHART:
            found.sort(key=lambda one: one[1].mean, reverse=better(figure) != "smaller")
        if len(found) == 1 and found[0][1].seeds == 1:
            continue
        lines = [_interval(name, spread, arm, matter.stage, figure) for name, spread, arm in found[:_ON_CHART]]
        left = f", the best {_ON_CHART} of {len(found)} arms" if len(found) > _ON_CHART else ""
        repeated = any(spread.seeds > 1 for _, spread, _ in found)
        shown = ": mean over seeds with its 95 % interval, and single seeds" if repeated else " of single runs"
        if lines:
            yield Intervals(
                f"{capital(label(figure))}{shown}{left}",
                label(figure),
                lines,
                published=published_values(matter, figure),
            )


def _interval(name: str, spread: Spread, arm: Arm, stage: str, figure: str) -> Interval:
    points = tuple(arm.by_seed(stage, figure).values())
    return Interval(name, spread.mean, spread.low, spread.high, points)


def _differences(matter: Matter) -> Iterator[Block]:
    if matter.baseline is None or not matter.differences:
        return
    shown = digits(found.spread.mean for found in matter.differences)
    names = ("difference", "95 % from", "95 % to")
    columns = [
        Column("arm"),
        Column("figure"),
        *(Column(name, max(shown, 3)) for name in names),
        Column("seeds", 0, "that both arms have"),
        Column("p", 4, "of the paired t test"),
        Column("p, Holm", 4, "adjusted for all tests of this table"),
        Column("note"),
    ]
    rows: list[list[Cell]] = [_difference_row(found) for found in matter.differences]
    caption = f"Differences to {matter.baseline.name}, seed by seed"
    if any(math.isfinite(found.p_value) for found in matter.differences):
        caption += (
            ", with the t interval of their mean (95 % each by itself); p-values of the paired t test, adjusted for "
            "all tests of this table by Holm. These hold for other seeds on these very pictures; conclusions are drawn "
            "from one interval for each arm, not from this table"
        )
    yield Table("differences", columns, rows, f"{caption}.", folded=15)
    refused = dict.fromkeys(f"{found.arm}: {found.refused}." for found in matter.differences if found.refused)
    if refused:
        more = [f"... and {len(refused) - 10} more."] if len(refused) > 10 else []
        yield Text("Not compared:", "warning", [*list(refused)[:10], *more])


def _difference_row(found: Difference) -> list[Cell]:
    spread = found.spread
    numbers = map(_cell, (spread.mean, spread.low, spread.high))
    note = found.refused or ("" if math.isfinite(found.p_value) else "no test of one seed" if spread.seeds < 2 else "")
    return [
        found.arm, label(found.figure), *numbers, spread.seeds, _cell(found.p_value), _cell(found.adjusted), note
    ]  # fmt: skip


def _pictures(matter: Matter) -> Iterator[Block]:
    if matter.baseline is None or not matter.pictures:
        return
    level = 100 * level_of(matter.others)
    base = matter.baseline.name
    columns = [
        Column("arm"),
        Column("difference", 4),
        Column(f"{level:.4g} % from", 4),
        Column(f"{level:.4g} % to", 4),
        Column("pictures", 0),
        Column("parts", 0, "physical parts that the pictures show"),
        Column(f"only {base} right", 0, "pictures, once for each seed"),
        Column("only arm right", 0, "pictures, once for each seed"),
        Column("McNemar p by seed"),
    ]
    rows: list[list[Cell]] = []
    for found in matter.pictures:
        judged = found.judged
        numbers = map(_cell, (judged.value, judged.low, judged.high))
        p_values = ", ".join(map(p_text, found.p_values))
        rows.append([found.arm, *numbers, judged.pictures, judged.parts, found.only_baseline, found.only_arm, p_values])
    if not any(found.p_values for found in matter.pictures):
        columns, rows = columns[:6], [row[:6] for row in rows]
    caption = (
        f"{capital(label(matter.judged))} against {base} on the same pictures: one interval for other seeds and other "
        "parts, on which the conclusions rest. McNemar's p-values are exact, each by itself, and take pictures as "
        "independent."
    )
    yield Table("pictures", columns, rows, caption)


def _everything(matter: Matter, stage: str, name: str) -> Table:
    """A line for each arm and figure, all numbers apart: for the CSV above all."""
    rows: list[list[Cell]] = []
    for arm in matter.arms:
        names = dict.fromkeys(key for run in arm.runs if stage in run.measured for key in run.measured[stage].figures)
        for figure in names:
            found = arm.spread(stage, figure)
            numbers = map(_cell, (found.mean, found.sd, found.low, found.high))
            rows.append([arm.name, figure, *numbers, found.seeds])
    heads = ("mean", "sd", "low", "high")
    columns = [Column("arm"), Column("figure"), *(Column(head, 4) for head in heads), Column("seeds", 0)]
    return Table(name, columns, rows, f"Every figure of the {STAGE_NAMES[stage]}; low and high at 95 %.", folded=20)


def _by_part(matter: Matter, figure: str, names: Sequence[str]) -> Table:
    arms = matter.arms[:_BY_PART]
    spreads = {name: [arm.part(matter.stage, figure, name) for arm in arms] for name in names}
    shown = digits(found.mean for row in spreads.values() for found in row)
    rows: list[list[Cell]] = [
        [name, *(spread_cell(found, digits=shown) for found in row)] for name, row in spreads.items()
    ]
    columns = [Column("class or type"), *(Column(arm.name, shown, better=better(figure)) for arm in arms)]
    return Table(f"parts_{figure.replace('/', '_')}", columns, rows, f"{capital(label(figure))} by class or type.")


def _over_seeds(matter: Matter) -> str:
    """What stands in cells, as a caption has it."""
    repeated = any(found.seeds > 1 for arm in matter.arms for found in [arm.spread(matter.stage, matter.judged)])
    return f"{'Mean ± standard deviation over seeds' if repeated else 'Values of single runs'}, on {matter.where}"


def _column(figure: str) -> Column:
    return Column(label(figure), help=meaning(figure), better=better(figure))


def _cell(value: float) -> float | None:
    return value if math.isfinite(value) else None
