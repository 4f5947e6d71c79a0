"""What a report is about: the runs, their arms, the stage and the figures that are told of, and what was asked."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

from lit_defect.errors import UserError
from lit_defect.report.arms import Arm, Arms, choose_baseline, make_arms
from lit_defect.report.collect import STAGES, RunInfo, find_runs, read_runs, without_runs
from lit_defect.report.comparing import Difference, OverPictures, differences, over_pictures
from lit_defect.report.curves import last_values
from lit_defect.report.figures import Figure, Measured, choose
from lit_defect.report.keys import filtered
from lit_defect.report.sweeps import Sweep, find_sweeps, read_sweep
from lit_defect.study_file import Study, read_study

LOGGED = "logged"
"""Stage of runs that were never evaluated: the last values in `metrics.csv`."""
STAGE_NAMES = {
    "test": "test pictures",
    "val": "validation pictures",
    "mirrored": "mirrored training pictures",
    LOGGED: "values logged last",
}
NO_TEST = {
    "mirrored": "These pictures were trained on: the figures say how well a network remembers, and are no test.",
    LOGGED: "No run has been evaluated; these are training logs and no results.",
}
"""Stages of which nothing is concluded, and why."""
PAIRED = 10
"""So many arms are held against the baseline picture by picture, which takes a second or so each."""


@dataclass(frozen=True)
class Asked:
    """What the command line asks for; see `python -m lit_defect report --help`."""

    runs: Sequence[Path] = ()
    group_by: Sequence[str] = ()
    compare: Sequence[str] | None = None
    filters: Sequence[str] = ()
    metrics: Sequence[str] = ()
    stage: str | None = None
    title: str = ""
    question: str = ""
    study: Path | None = None
    runs_dir: Path | None = None
    sweep: Path | None = None
    pictures: bool = True
    command: str = ""


@dataclass(frozen=True)
class Matter:
    """Everything that the sections are made of.

    Attributes:
        asked: what the command line asks for.
        runs: all that pass the filters.
        grouped: the arms of the runs whose configuration can be read.
        stage: of the results.
        figures: that the report is about; the first one is judged by.
        baseline, others: of the arms that have the judged figure; None and empty where none has.
        problems: what could not be read.
        study, sweeps: where they were given or found.
    """

    asked: Asked
    runs: Sequence[RunInfo]
    grouped: Arms
    stage: str
    figures: Sequence[str]
    baseline: Arm | None
    others: Sequence[Arm]
    problems: Sequence[str] = ()
    study: Study | None = None
    sweeps: Sequence[Sweep] = ()

    @cached_property
    def arms(self) -> list[Arm]:
        """Arms that have results, in order."""
        return [arm for arm in self.grouped.arms if any(self.stage in run.measured for run in arm.runs)]

    @cached_property
    def asked_of_runs(self) -> bool:
        """Whether the report is about runs: not where they are the trials of its sweeps and nothing else."""
        return not self.sweeps or not all(any(sweep.made(run) for sweep in self.sweeps) for run in self.runs)

    @property
    def data_sets(self) -> int:
        """How many data sets and categories the arms with results are of."""
        return len({run.data for arm in self.arms for run in arm.runs})

    @property
    def where(self) -> str:
        """The stage in words."""
        return STAGE_NAMES[self.stage]

    @property
    def judged(self) -> str:
        """The figure that conclusions rest on; empty where there is none."""
        return self.figures[0] if self.figures else ""

    @cached_property
    def differences(self) -> list[Difference]:
        """Of all arms and figures, to the baseline."""
        return differences(self.baseline, self.others, self.stage, self.figures) if self.baseline else []

    @cached_property
    def pictures(self) -> list[OverPictures]:
        """The judged figure picture by picture, of as many arms as can be had."""
        if self.baseline is None or len(self.others) > PAIRED or self.stage in NO_TEST:
            return []
        return over_pictures(self.baseline, self.others, self.stage, self.judged)


def gather(asked: Asked) -> Matter:
    """Read everything.

    Raises:
        UserError: no runs, unknown keys or names, nothing left by the filters.
    """
    study = read_study(asked.study, asked.runs_dir) if asked.study else None
    sweeps = [read_sweep(asked.sweep)] if asked.sweep else find_sweeps(asked.runs)
    paths = _paths(asked.runs, study, sweeps)
    if not paths and not sweeps:
        raise UserError("report: no runs; give run folders, or folders of runs, or --study FILE, or --sweep FOLDER")
    found = read_runs(paths)
    runs = _logged(filtered(found.runs, asked.filters))
    stage = _stage(runs, asked.stage)
    readable = [run for run in runs if run.config] or runs
    arms = make_arms(readable, asked.group_by, study) if readable else Arms((), {})
    figures = _figures(asked, readable, stage, study.judged_by if study else "", [sweep.metric for sweep in sweeps])
    judged = figures[0] if figures else ""
    with_results = [arm for arm in arms.arms if arm.by_seed(stage, judged)]
    baseline, others = choose_baseline(with_results, asked.compare, study) if with_results else (None, [])
    kept = {run.name for run in runs}
    problems = [text for text in found.problems if text.split(":")[0] in kept]
    swept = {sweep.folder.resolve() for sweep in sweeps}
    problems += [f"{path}: no run here" for path in without_runs(asked.runs) if path.resolve() not in swept]
    return Matter(asked, runs, arms, stage, figures, baseline, others, problems, study, sweeps)


def _paths(given: Sequence[Path], study: Study | None, sweeps: Sequence[Sweep]) -> list[Path]:
    """Run folders that were asked for; where none was, those of the study, or of the sweeps."""
    if study and not given:
        arms = (study.run(arm, 0).path.parent for arm in study.arms)
        return find_runs([folder for folder in arms if folder.is_dir()])
    of_sweeps = {sweep.folder.resolve(): sweep.run_folders() for sweep in sweeps}
    paths = [path for found in of_sweeps.values() for path in found]
    try:
        paths += find_runs(given)
    except UserError:
        if not of_sweeps or not all(folder.is_dir() for folder in given):
            raise  # the folder of a sweep may hold no runs itself
    return list(dict.fromkeys(paths))


def common_folder(runs: Sequence[RunInfo]) -> str:
    """What the paths of these runs begin with."""
    return os.path.commonpath([str(run.folder.path.parent) for run in runs]) if runs else ""


def _stage(runs: Sequence[RunInfo], asked: str | None) -> str:
    there = [stage for stage in (*STAGES, LOGGED) if any(stage in run.measured for run in runs)]
    if asked and asked not in there:
        raise UserError(f"--stage {asked}: no run has {asked}_metrics.json; there is: {', '.join(there) or 'none'}")
    return asked or (there[0] if there else LOGGED)


def _logged(runs: Sequence[RunInfo]) -> list[RunInfo]:
    """Where no run was evaluated, what they have logged last stands for results."""
    if any(run.measured for run in runs):
        return list(runs)
    found = []
    for run in runs:
        values = last_values(run.folder.path / "metrics.csv")
        figures = {name: Figure(value) for name, value in values.items() if name.startswith(("val/", "train/"))}
        found.append(replace(run, measured={LOGGED: Measured(figures)}) if figures else run)
    return found


def _figures(asked: Asked, runs: Sequence[RunInfo], stage: str, judged: str, swept: Sequence[str]) -> list[str]:
    """The figures of the report; the first one is asked for, or the study's, or what a sweep looked at, or usual."""
    measured = [run.measured[stage] for run in runs if stage in run.measured]
    counts = Counter(name for found in measured for name in found.figures)
    names = list(counts)
    if not asked.metrics:
        common = [name for name, count in counts.items() if 2 * count >= len(measured)]
        validated = [name.removeprefix("val/") for name in common if name.startswith("val/")]
        chosen = [f"val/{name}" for name in choose(validated)] if stage == LOGGED else choose(common or names)
        chosen = chosen or choose(common or names)
        judged = judged or next((name for name in swept if name in names), "")
        judged = "defect_auroc" if judged == "auroc" and "defect_auroc" in names else judged
        return [judged, *(name for name in chosen if name != judged)] if judged in names else chosen
    for name in asked.metrics:
        if name not in names:
            near = get_close_matches(name, names, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"--metric {name}: no run has it{hint} There are: {', '.join(names) or 'none'}")
    return list(asked.metrics)
