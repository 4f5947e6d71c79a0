"""A report's sections in the order in which they are read: what was asked, what it comes to, how, and the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from lit_defect import __version__
from lit_defect.report import answer, appendix, costs, protocol, published, results, sweeps
from lit_defect.report.blocks import Block, Details, Report, Section, Table
from lit_defect.report.matter import Matter


def build(matter: Matter) -> Report:
    """The whole report of what was gathered."""
    found: list[Section | None] = [protocol.question(matter)] if matter.asked_of_runs else []
    found += [sweeps.section(sweep) for sweep in matter.sweeps]
    if matter.runs:
        found += [
            answer.conclusions(matter) if matter.asked_of_runs else None,
            protocol.protocol(matter),
            protocol.leakage(matter),
            results.tables(matter),
            published.section(matter),
            results.curves(matter),
            results.parts(matter),
            appendix.examples(matter),
        ]
        found += [
            costs.cost(matter),
            appendix.run_table(matter),
            appendix.repeat(matter),
            appendix.tracking(matter),
        ]
    summary = sweeps.summary(matter.sweeps)
    if matter.asked_of_runs:
        summary = f"{summary} {answer.summary(matter)}".strip()
    made = [
        f"runs: {len(matter.runs)}, arms: {len(matter.grouped.arms)}",
        f"made {datetime.now():%Y-%m-%d %H:%M} by lit_defect {__version__}",
        *([matter.asked.command] if matter.asked.command else []),
    ]
    sections = [Section(section.title, _tidy(section.blocks)) for section in found if section is not None]
    return Report(_title(matter), summary, sections, made)


def _tidy(blocks: Sequence[Block]) -> list[Block]:
    """The same without columns in which no row has anything."""
    tidied: list[Block] = []
    for block in blocks:
        if isinstance(block, Details):
            block = replace(block, blocks=_tidy(block.blocks))
        elif isinstance(block, Table) and block.rows:
            kept = [k for k in range(len(block.columns)) if any(row[k] not in (None, "") for row in block.rows)]
            block = replace(
                block,
                columns=[block.columns[k] for k in kept],
                rows=[[row[k] for k in kept] for row in block.rows],
                strong=[(i, kept.index(k)) for i, k in block.strong if k in kept],
            )
        tidied.append(block)
    return tidied


def _title(matter: Matter) -> str:
    if matter.asked.title:
        return matter.asked.title
    if matter.study:
        return matter.study.name
    if not matter.asked_of_runs:
        return ", ".join(sweep.name for sweep in matter.sweeps)
    experiments = list(dict.fromkeys(run.folder.experiment for run in matter.runs))
    if len(experiments) == 1:
        return experiments[0]
    return matter.grouped.prefix.rstrip("_-") or f"{len(experiments)} experiments"
