"""The sections on results: what they come to, tables and intervals of the figures, parts, and curves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lit_defect.report.arms import Arm
from lit_defect.report.blocks import Block, Cell, Column, Details, Interval, Intervals, Section, Table, Text
from lit_defect.report.comparing import Difference, p_text, seeds_only
from lit_defect.report.curves import ARMS, RUNS, charts
from lit_defect.report.figures import better, digits, label
from lit_defect.report.matter import LOGGED, PAIRED, STAGE_NAMES, Matter
from lit_defect.report.published import published_values
from lit_defect.reporting.seeds import SEED_NOTE, Spread
from lit_defect.reporting.study_verdict import LEAST_PARTS

_VERDICTS = ("better", "worse", "larger", "smaller", "no difference is shown", "no conclusion")
_ON_CHART = 30
_CHARTS = 3
_LONG = 160  # letters of names in a sentence
_BY_PART = 12
"""So many arms stand side by side in a table of classes."""


def summary(matter: Matter) -> str:
    """What it comes to, in a sentence or three; no more than the figures allow."""
    if not matter.judged:
        return f"{len(matter.runs)} runs, of which none has results yet."
    name, arms = label(matter.judged), matter.arms
    spreads = {arm.name: arm.spread(matter.stage, matter.judged) for arm in arms}
    ranked = sorted((arm for arm in arms if spreads[arm.name].seeds), key=lambda arm: -spreads[arm.name].mean)
    if better(matter.judged) == "smaller":
        ranked.reverse()
    if not ranked:
        return f"{len(matter.runs)} runs; none of them has the figure {name}."
    first = ranked[0]
    text = f"{_cap(name)} on {matter.where}: "
    if len(ranked) == 1:
        found = spreads[first.name]
        limits = f" (95 % interval {_limits(found)} over {found.seeds} seeds)" if found.seeds > 1 else ", of one seed"
        text += f"{found.text(digits=digits([found.mean]))}{limits}; there is one arm, and nothing is compared."
    else:
        shown = digits([found.mean for found in spreads.values()])
        best, last = (f"{spreads[arm.name].mean:.{shown}f} ({arm.name})" for arm in (first, ranked[-1]))
        text += f"the means of {len(ranked)} arms reach from {last} to {best}{_of_several(matter)}."
        text += f" {_verdicts(matter)}"
    if matter.grouped.mixed:
        text += " Some arms mix runs that differ in more than seeds: what a difference comes from is open."
    if matter.stage == "mirrored":
        text += " These pictures were trained on: the figures say how well a network remembers, and are no test."
    elif matter.stage == LOGGED:
        text += " No run has been evaluated; these are training logs and no results."
    return text


def _of_several(matter: Matter) -> str:
    """A word of warning where the arms are of several data sets."""
    data = {run.data for arm in matter.arms for run in arm.runs}
    return f", on {len(data)} data sets, whose figures do not compare (`--filter data=...`)" if len(data) > 1 else ""


def conclusions(matter: Matter) -> Section:
    """A sentence for each arm against the baseline, and the rule that it follows."""
    blocks: list[Block] = []
    if matter.baseline is None or not matter.others:
        few = "there are no results" if matter.baseline is None else "there is one arm only"
        blocks += [Text(summary(matter)), Text(f"Nothing is compared, since {few}.", "note")]
        return Section("What it comes to", blocks)
    said = dict(_sentences(matter))
    arms_of: dict[str, list[str]] = {}
    for arm, text in said.items():
        arms_of.setdefault(text, []).append(arm)
    order = sorted(arms_of, key=lambda text: _VERDICTS.index(_kind(text)))
    blocks.append(Text(f"Against `{matter.baseline.name}`:"))
    lines: list[Block] = [Text(f"{', '.join(arms_of[text])}: {text}") for text in order]
    blocks += lines[:12]
    if len(lines) > 12:
        blocks.append(Details(f"{len(lines) - 12} more arms", lines[12:]))
    without = [arm.name for arm in matter.arms if arm is not matter.baseline and arm.name not in said]
    if without and not matter.asked.compare:
        blocks.append(Text(f"Without {label(matter.judged)}, and not compared: {_few(without)}.", "note"))
    blocks.append(Text(_rule(matter), "note"))
    return Section("What it comes to", blocks)


def tables(matter: Matter) -> Section:
    """All arms and figures, the judged one in full, differences, pictures, and every number below a fold."""
    if not matter.figures:
        return Section("Results", [Text("No run has results yet.", "warning")])
    blocks: list[Block] = [Text(f"All figures are of {matter.where}. {SEED_NOTE}")]
    if all(arm.spread(matter.stage, matter.judged).seeds < 2 for arm in matter.arms):
        blocks.append(
            Text(
                "No arm has two seeds, so there is neither a standard deviation nor an interval nor a test: a single "
                "run does not tell what another seed would have given.",
                "warning",
            )
        )
    intervals = list(_charts(matter))
    blocks += [_overview(matter), *_judged(matter), *intervals[:_CHARTS], *_differences(matter), *_pictures(matter)]
    if intervals[_CHARTS:]:
        blocks.append(Details("Intervals of the other figures", intervals[_CHARTS:]))
    blocks.append(Details("Every figure of every arm", [_everything(matter, matter.stage, "figures")]))
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
    blocks: list[Block] = [Text(f"Mean ± standard deviation over seeds, on {matter.where}.")]
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
    blocks: list[Block] = [Text("Each line is an arm: the mean over its seeds, with a band of one standard deviation.")]
    if len(arms) > ARMS:
        blocks.append(Text(f"The first {ARMS} of {len(arms)} arms are drawn.", "note"))
    if any(len(arm.runs) > RUNS for arm in arms[:ARMS]):
        blocks.append(Text(f"Of arms with more than {RUNS} runs the first {RUNS} are drawn.", "note"))
    return Section("Curves", [*blocks, *found])


def _sentences(matter: Matter) -> Iterator[tuple[str, str]]:
    """By arm; over seeds and pictures where that can be had, else over seeds."""
    whole = {found.arm: found.said for found in matter.pictures}
    for found in matter.differences:
        if found.figure == matter.judged and matter.baseline is not None:
            yield found.arm, whole.get(found.arm) or seeds_only(found, matter.baseline.name)


def _verdicts(matter: Matter) -> str:
    """`Against A, better: B; no difference is shown: C.`"""
    if matter.baseline is None:
        return ""
    kinds: dict[str, list[str]] = {}
    for arm, text in _sentences(matter):
        kinds.setdefault(_kind(text), []).append(arm)
    found = (f"{kind}: {_few(kinds[kind])}" for kind in _VERDICTS if kind in kinds)
    return f"Against {matter.baseline.name}, {'; '.join(found)}."


def _kind(text: str) -> str:
    """Which of `_VERDICTS` a sentence comes to."""
    return next(kind for kind in reversed(_VERDICTS) if kind in text)


def _rule(matter: Matter) -> str:
    tests = sum(math.isfinite(found.p_value) for found in matter.differences)
    text = (
        f"Rule: paired over the seeds that both arms have. The {tests} p-values of this report's tests are adjusted "
        "together by Holm's procedure; with an adjusted p-value above 0.05 no difference is claimed."
    )
    if matter.pictures:
        level, count = 100 * (1 - 0.05 / len(matter.others)), len(matter.others)
        together = f", so that 95 % hold for all {count} arms together" if count > 1 else ""
        text += (
            f" Where predictions of the same pictures exist, the conclusion rests on one interval for what other seeds "
            f"and what other pictures (whole parts) would change, at {level:.4g} %{together}; "
            f"nothing is concluded from fewer than two seeds or {LEAST_PARTS} "
            "parts. A point is 0.01."
        )
    elif len(matter.others) > PAIRED:
        text += f" With more than {PAIRED} arms nothing is compared picture by picture; --compare A B does, for two."
    chosen = "by --metric" if matter.asked.metrics else "by the study's file" if matter.study else "by default"
    return f"{text} The figure that is judged by, {label(matter.judged)}, was chosen {chosen}."


def _overview(matter: Matter) -> Table:
    """Arms by figures, mean ± sd; the best mean of each figure stands out."""
    spreads = [[arm.spread(matter.stage, figure) for figure in matter.figures] for arm in matter.arms]
    shown = [digits(row[k].mean for row in spreads) for k in range(len(matter.figures))]
    strong = []
    for k, figure in enumerate(matter.figures):
        means = [(row[k].mean, i) for i, row in enumerate(spreads) if row[k].seeds]
        if better(figure) and len(means) > 1 and not _of_several(matter):
            strong.append(((max if better(figure) == "larger" else min)(means)[1], k + 2))
    rows: list[list[Cell]] = [
        [arm.name, max((s.seeds for s in row), default=0), *(s.text(digits=d) for s, d in zip(row, shown, strict=True))]
        for arm, row in zip(matter.arms, spreads, strict=True)
    ]
    columns = [Column("arm"), Column("seeds", 0), *(_column(figure) for figure in matter.figures)]
    caption = (
        f"Mean ± standard deviation over seeds, on {matter.where}. The best mean of each column stands out, which "
        "alone says nothing of a difference."
    )
    return Table("results", columns, rows, caption, strong)


def _judged(matter: Matter) -> Iterator[Block]:
    """The judged figure with its interval and, of a single run, the interval over its pictures."""
    shown = digits(arm.spread(matter.stage, matter.judged).mean for arm in matter.arms)
    heads = ("mean", "sd", "95 % from", "95 % to")
    rows: list[list[Cell]] = []
    for arm in matter.arms:
        found = arm.spread(matter.stage, matter.judged)
        seeds = ", ".join(str(seed[0]) for seed in arm.by_seed(matter.stage, matter.judged))
        rows.append([arm.name, *map(_cell, (found.mean, found.sd, found.low, found.high)), found.seeds, seeds])
    columns = [Column("arm"), *(Column(head, shown) for head in heads), Column("seeds", 0), Column("which")]
    caption = f"{_cap(label(matter.judged))}: mean over seeds, standard deviation, t interval of the mean."
    yield Table("judged", columns, rows, caption)
    single = [(arm, run) for arm in matter.arms for run in arm.runs if len(arm.runs) == 1]
    limited = [
        (arm, run.measured[matter.stage].figures[matter.judged])
        for arm, run in single
        if matter.stage in run.measured and matter.judged in run.measured[matter.stage].figures
    ]
    body: list[list[Cell]] = [
        [arm.name, *map(_cell, (f.value, f.low, f.high))] for arm, f in limited if math.isfinite(f.low)
    ]
    if body:
        columns = [Column("arm"), *(Column(head, shown) for head in ("value", "95 % from", "95 % to"))]
        caption = (
            f"{_cap(label(matter.judged))} of single runs, with the interval over their pictures: what other pictures "
            "of the same parts' kind would give; what another seed would give is not in it."
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
        if lines:
            yield Intervals(
                f"{_cap(label(figure))}: mean over seeds with its 95 % interval, and single seeds{left}",
                label(figure),
                lines,
                published=published_values(matter, figure),
            )


def _interval(name: str, spread: Spread, arm: Arm, stage: str, figure: str) -> Interval:
    points = tuple(arm.by_seed(stage, figure).values())
    low, high = (spread.mean if math.isnan(end) else end for end in (spread.low, spread.high))
    return Interval(name, spread.mean, low, high, points)


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
    caption = (
        f"Differences to {matter.baseline.name}, seed by seed, with the t interval of their mean (95 % each by "
        "itself); p-values of the paired t test, adjusted for all tests of this table by Holm."
    )
    yield Table("differences", columns, rows, caption, folded=15)
    refused = dict.fromkeys(f"{found.arm}: {found.refused}." for found in matter.differences if found.refused)
    for text in list(refused)[:10]:
        yield Text(f"Not compared: {text}", "warning")


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
    level = 100 * (1 - 0.05 / len(matter.others))
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
        f"{_cap(label(matter.judged))} against {base} on the same pictures: one interval for other seeds and other "
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
    rows: list[list[Cell]] = [[name, *(found.text(digits=shown) for found in row)] for name, row in spreads.items()]
    columns = [Column("class or type"), *(Column(arm.name, shown, better=better(figure)) for arm in arms)]
    return Table(f"parts_{figure.replace('/', '_')}", columns, rows, f"{_cap(label(figure))} by class or type.")


def _column(figure: str) -> Column:
    return Column(label(figure), better=better(figure))


def _cell(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _limits(found: Spread) -> str:
    shown = digits([found.mean])
    return f"{found.low:.{shown}f} to {found.high:.{shown}f}"


def _few(names: Sequence[str]) -> str:
    """Some names, or their number where they are many or long."""
    text = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return text if len(text) < _LONG else f"{len(names)} arms"


def _cap(text: str) -> str:
    return text[:1].upper() + text[1:]
