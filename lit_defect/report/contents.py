"""A report's sections in the order in which they are read: what was asked, what it comes to, how, and the rest."""

from __future__ import annotations

from datetime import datetime

from lit_defect import __version__
from lit_defect.report import appendix, protocol, published, results, sweeps
from lit_defect.report.blocks import Report, Section
from lit_defect.report.matter import LOGGED, Matter


def build(matter: Matter) -> Report:
    """The whole report of what was gathered.

    Of the trials of a sweep, which are not tested, the sweep's own section says what they come to: tests between trials
    that were drawn at random answer nobody's question.
    """
    found: list[Section | None] = [protocol.question(matter)]
    of_sweeps = [sweeps.section(sweep) for sweep in matter.sweeps]
    searched = bool(of_sweeps) and matter.stage == LOGGED
    if searched:
        found += of_sweeps
    if matter.runs:
        found += [
            None if searched else results.conclusions(matter),
            protocol.protocol(matter),
            protocol.leakage(matter),
            results.tables(matter),
            published.section(matter),
            results.curves(matter),
            results.parts(matter),
            appendix.examples(matter),
        ]
    if not searched:
        found += of_sweeps
    if matter.runs:
        found += [
            protocol.cost(matter),
            appendix.run_table(matter),
            appendix.repeat(matter),
            appendix.tracking(matter),
        ]
    summary = sweeps.summary(matter.sweeps) if searched else results.summary(matter)
    made = [
        f"{len(matter.runs)} runs, {len(matter.grouped.arms)} arms",
        f"made {datetime.now():%Y-%m-%d %H:%M} by lit_defect {__version__}",
        *([matter.asked.command] if matter.asked.command else []),
    ]
    return Report(_title(matter), summary, [section for section in found if section is not None], made)


def _title(matter: Matter) -> str:
    if matter.asked.title:
        return matter.asked.title
    if matter.study:
        return matter.study.name
    experiments = list(dict.fromkeys(run.folder.experiment for run in matter.runs))
    if not experiments:
        return ", ".join(sweep.name for sweep in matter.sweeps)
    if len(experiments) == 1:
        return experiments[0]
    return matter.grouped.prefix.rstrip("_-") or f"{len(experiments)} experiments"
