"""What a report comes to: the sentences at its head, a chart of differences to the baseline, and the rule behind it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from lit_defect.report.arms import Arm
from lit_defect.report.blocks import Block, Cell, Column, Details, Interval, Intervals, Section, Table, Text
from lit_defect.report.comparing import level_of, seeds_only
from lit_defect.report.figures import better, digits, label
from lit_defect.report.matter import NO_TEST, PAIRED, Matter
from lit_defect.reporting.palette import shorten
from lit_defect.reporting.seeds import Spread
from lit_defect.reporting.study_verdict import LEAST_PARTS, of_one_generation, when_chosen

_VERDICTS = ("better", "worse", "larger", "smaller", "no difference is shown", "no conclusion")
_CLAIMS = _VERDICTS[:4]
_ON_CHART = 32
_LONG = 160  # letters of names in a sentence
_LONG_NAME = 60


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
        return f"{len(matter.runs)} runs; none of their arms has the figure {name}."
    first = ranked[0]
    text = f"{capital(name)} on {matter.where}: "
    if len(ranked) == 1:
        found = spreads[first.name]
        shown = digits([found.mean])
        low, high, doubt = _limits(matter, first, matter.judged)
        limits = "" if math.isnan(low) else f" (95 % interval for {doubt}: {low:.{shown}f} to {high:.{shown}f})"
        seeds = f"{found.seeds} seeds" if found.seeds > 1 else "one seed"
        text += f"{found.text(digits=shown)}{limits}, of {seeds}; there is one arm, and nothing is compared."
    else:
        text += f"{_range(matter, spreads, ranked)}. {_verdicts(matter)}"
    if matter.grouped.mixed:
        text += " Some arms mix runs that differ in more than seeds: what a difference comes from is open."
    return text + (f" {NO_TEST[matter.stage]}" if matter.stage in NO_TEST else "")


def _range(matter: Matter, spreads: Mapping[str, Spread], ranked: Sequence[Arm]) -> str:
    """From the worst mean to the best one; not of several data sets, nor with names that bury the figures."""
    if matter.data_sets > 1:
        names = list(dict.fromkeys(run.data for arm in ranked for run in arm.runs))
        word = f"{len(ranked)} arms on {len(names)} data sets, whose figures do not compare"
        return f"{word} (`--filter data=NAME` takes one of {few_of([f'`{name}`' for name in names])})"
    shown = digits([found.mean for found in spreads.values()])
    last, best = (
        f"{spreads[arm.name].mean:.{shown}f} ({shorten(arm.name, _LONG_NAME)}{_alone_there(spreads[arm.name])})"
        for arm in (ranked[-1], ranked[0])
    )
    return f"the means of {len(ranked)} arms reach from {last} to {best}"


def _alone_there(found: Spread) -> str:
    return "" if found.seeds > 1 else ", one seed"


def conclusions(matter: Matter) -> Section:
    """The judged figure of each arm against the baseline, claims in words, and the rule that they follow."""
    if matter.baseline is None or not matter.others:
        few = "there are no results" if matter.baseline is None else "there is one arm only"
        note = Text(f"Nothing is compared, since {few}.", "note")
        return Section("What it comes to", [*([_alone(matter)] if len(matter.arms) == 1 else []), note])
    said = dict(_sentences(matter))
    arms_of: dict[str, list[str]] = {}
    for arm, text in said.items():
        arms_of.setdefault(text, []).append(arm)
    order = sorted(arms_of, key=lambda text: _VERDICTS.index(_kind(text)))
    claims = [f"{', '.join(arms_of[text])}: {text}" for text in order if _kind(text) in _CLAIMS]
    others = [f"{', '.join(arms_of[text])}: {text}" for text in order if _kind(text) not in _CLAIMS]
    chart: list[Block] = [*_chart(matter)]
    blocks = chart[:]
    if claims:
        blocks.append(Text(f"Against `{matter.baseline.name}`:", items=claims[:12]))
    blocks += _caveats(matter, bool(claims))
    if not chart and others:
        blocks.append(Text(f"Against `{matter.baseline.name}`:", items=others[:12]))
        others = others[12:]
    if folded := [*claims[12:], *others]:
        blocks.append(Details("More comparisons in words" if claims else "In words", [Text("", items=folded)]))
    without = [arm.name for arm in matter.arms if arm is not matter.baseline and arm.name not in said]
    if without and not matter.asked.compare:
        blocks.append(Text(f"Without {label(matter.judged)}, and not compared: {few_of(without)}.", "note"))
    blocks.append(Details("The rule of these conclusions", [Text(_rule(matter))]))
    return Section("What it comes to", blocks)


def _alone(matter: Matter) -> Table:
    """The main figures of the only arm."""
    arm, doubt = matter.arms[0], "other seeds"
    rows: list[list[Cell]] = []
    for figure in matter.figures:
        low, high, doubt = _limits(matter, arm, figure)
        numbers = (arm.spread(matter.stage, figure).mean, low, high)
        rows.append([label(figure), *(number if math.isfinite(number) else None for number in numbers)])
    shown = digits(arm.spread(matter.stage, figure).mean for figure in matter.figures)
    columns = [Column("figure"), *(Column(head, shown) for head in ("value", "95 % from", "95 % to"))]
    caption = f"{capital(matter.where)}, with the interval for {doubt}."
    return Table("at_a_glance", columns, rows, caption)


def _limits(matter: Matter, arm: Arm, figure: str) -> tuple[float, float, str]:
    """Of an arm's figure: over seeds or, of a single run, what its file says over pictures."""
    found = arm.spread(matter.stage, figure)
    single = [run.measured[matter.stage].figures for run in arm.runs if matter.stage in run.measured]
    if len(single) == 1 and figure in single[0]:
        return single[0][figure].low, single[0][figure].high, "other pictures"
    return found.low, found.high, "other seeds"


def few_of(names: Sequence[str]) -> str:
    """Some names, or their number where they are long or have commas themselves."""
    text = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    apart = len(names) == 1 or not any(", " in name for name in names)
    return text if apart and len(text) < _LONG else f"{len(names)} arms"


def capital(text: str) -> str:
    """Its first letter large."""
    return text[:1].upper() + text[1:]


def _sentences(matter: Matter) -> Iterator[tuple[str, str]]:
    """By arm; over seeds and pictures where that can be had, else over seeds."""
    whole = {found.arm: found.said for found in matter.pictures}
    name, level = label(matter.judged), level_of(matter.others)
    for found in matter.differences:
        if found.figure != matter.judged or matter.baseline is None:
            continue
        if matter.stage in NO_TEST:
            yield found.arm, f"no conclusion on {name}: {NO_TEST[matter.stage][:1].lower()}{NO_TEST[matter.stage][1:]}"
        else:
            yield found.arm, whole.get(found.arm) or seeds_only(found, matter.baseline.name, level)


def _verdicts(matter: Matter) -> str:
    """`Against A, better: B; no difference is shown: C.`"""
    if matter.baseline is None:
        return ""
    kinds: dict[str, list[str]] = {}
    for arm, text in _sentences(matter):
        kinds.setdefault(_kind(text), []).append(arm)
    if list(kinds) == ["no difference is shown"] and len(matter.others) > 1:
        return f"No arm is shown to differ from {matter.baseline.name}."
    found = (f"{kind}: {few_of(kinds[kind])}" for kind in _VERDICTS if kind in kinds)
    return f"Against {matter.baseline.name}, {'; '.join(found)}."


def _kind(text: str) -> str:
    """Which of `_VERDICTS` a sentence comes to."""
    return next(kind for kind in reversed(_VERDICTS) if kind in text)


def _chart(matter: Matter) -> Iterator[Block]:
    """The intervals that the conclusions rest on; none where nothing can be compared."""
    assert matter.baseline is not None
    level, lines = level_of(matter.others), []
    whole = {found.arm: found.judged for found in matter.pictures}
    for found in matter.differences:
        if found.figure != matter.judged or not found.values:
            continue
        limits = whole.get(found.arm) or found.limits(level)
        lines.append(Interval(found.arm, limits.value, limits.low, limits.high, found.values))
    if not lines or all(math.isnan(line.low) for line in lines):
        return
    if len(lines) > _ON_CHART:
        lines.sort(key=lambda line: line.value, reverse=better(matter.judged) != "smaller")
    name, count = label(matter.judged), len(matter.others)
    left = f"; the best {_ON_CHART} of {len(lines)} arms" if len(lines) > _ON_CHART else ""
    doubt = "other seeds and other pictures" if whole else "other seeds, not for other pictures,"
    if whole and any(line.name not in whole for line in lines):
        doubt = f"other seeds and other pictures (for other seeds alone: {few_of(_without(lines, whole))})"
    together = f", so that 95 % hold for all {count} arms together" if count > 1 else ""
    good = f", {word} is better" if (word := better(matter.judged)) else ""
    yield Intervals(
        f"{capital(name)} of each arm less that of {matter.baseline.name}{good}: interval for {doubt} at "
        f"{100 * level:.4g} %{together}, and single seeds{left}",
        f"difference in {name}",
        lines[:_ON_CHART],
        reference=0.0,
    )


def _without(lines: Sequence[Interval], whole: Mapping[str, object]) -> list[str]:
    return [line.name for line in lines if line.name not in whole]


def _caveats(matter: Matter, claimed: bool) -> Iterator[Block]:
    """When the figure was chosen, and what no interval tells."""
    if matter.study:
        text = when_chosen(matter.study, [str(run.record.get("started")) for run in matter.runs])
        yield Text(text.strip("*"), "warning" if text.startswith("*") else "note")
        if notes := list(of_one_generation(matter.study)):
            yield Details("What no interval tells", [Text("", items=notes)])
        return
    how = "`--metric`" if matter.asked.metrics else "this program"
    yield Text(
        f"{capital(label(matter.judged))} was chosen by {how} after the runs: of a figure that nobody named before, a "
        "claim is weaker than it looks. A study's file (`--study`) names it before.",
        "warning" if claimed else "note",
    )


def _rule(matter: Matter) -> str:
    level, count = 100 * level_of(matter.others), len(matter.others)
    together = f", so that 95 % hold for all {count} arms together" if count > 1 else ""
    text = (
        f"Differences are taken seed by seed, over the seeds that both arms have. Each arm has one interval, at "
        f"{level:.4g} %{together}; where it holds 0, no difference is claimed. "
    )
    if matter.pictures:
        text += (
            "It is for what other seeds and what other pictures (whole parts) would change, both at once, where there "
            f"are predictions of the same pictures; nothing is concluded from fewer than two seeds or {LEAST_PARTS} "
            "parts. A point is 0.01."
        )
        return text
    text += "It is for what other seeds would change, not for what other pictures would."
    if len(matter.others) > PAIRED:
        text += f" With more than {PAIRED} arms nothing is compared picture by picture; --compare A B does, for two."
    return text
