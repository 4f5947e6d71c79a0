"""The jobs that follow from a study's file: their commands, run folders and order."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_defect import runs
from lit_defect.errors import UserError
from lit_defect.study_file import PLACE, Arm, Step, Study


@dataclass(frozen=True)
class Job:
    """One run of a study.

    Attributes:
        name: `STEP`, `STEP/s1` or `ARM/s1`.
        verb: fit or predict.
        run: the folder that it writes.
        words: what follows the verb on the command line.
        needs: names of jobs that must be finished before.
        arm: name of the arm that it belongs to, if any.
        seed: of its arm; of a step for each seed; else None.
        stage: 0 for jobs that need none, else one more than the latest that is needed.
        mirrored: whether the finished fit is tested on its mirrored training pictures as well.
        of: of a predict, name of the fit whose best state it takes and in whose folder it writes, if any.
    """

    name: str
    verb: str
    run: runs.RunFolder
    words: tuple[str, ...]
    needs: tuple[str, ...] = ()
    arm: str | None = None
    seed: int | None = None
    stage: int = 0
    mirrored: bool = False
    of: str | None = None

    @property
    def command(self) -> list[str]:
        """Of the run itself."""
        return self.line(self.verb, *self.words)

    @property
    def mark(self) -> Path:
        """Written when a predict is through, with its words and options: its folder alone does not say so."""
        return self.run.path / f"study_{self.name.partition('/')[0]}.json"

    def test_commands(self) -> list[list[str]]:
        """Commands of the evaluations of an arm's finished fit that are still missing."""
        if self.arm is None:
            return []
        of_this = ("--config", str(self.run.path / "config.yaml"), *_placed(self.run), "--ckpt_path", "best")
        config = self.run.config()
        own = runs.test_name(config)
        commands = [] if has_results(self.run, own) else [self.line("test", *of_this)]
        if self.mirrored and own != runs.MIRRORED and not has_results(self.run, runs.MIRRORED):
            strict = ((config.get("data") or {}).get("init_args") or {}).get("leakage") == "error"
            leaking = ("--data.leakage", "warn") if strict else ()  # by design
            split = ["--data.split_file", str(self.run.path / "splits.csv")]  # else what is held out would train there
            drawn = ((config.get("data") or {}).get("init_args") or {}).keys() & {"folds", "shots"}
            split += [word for key in sorted(drawn) for word in (f"--data.{key}", "null")]  # which exclude a file
            commands.append(self.line("test", *of_this, "--data.test", runs.MIRRORED_TRAIN, *split, *leaking))
        return commands

    @staticmethod
    def line(verb: str, *words: str) -> list[str]:
        """A command of this Python."""
        return [sys.executable, "-m", "lit_defect", verb, *words]


def has_results(run: runs.RunFolder, stage: str) -> bool:
    """Whether an evaluation has written its figures into the run's folder."""
    return (run.path / f"{stage}_metrics.json").is_file()


def plan(study: Study) -> list[Job]:
    """All jobs, in the order in which they can run: by stage, and within a stage seed by seed.

    Raises:
        UserError: two jobs would write the same run folder.
    """
    made: list[Job] = []
    for step in sorted(study.steps.values(), key=lambda step: step.of is not None):
        seeds = study.seeds if step.each_seed else (None,)
        made += [_of_step(study, step, seed) for seed in seeds]
    made += [_of_arm(study, arm, seed) for seed in study.seeds for arm in study.arms.values()]
    _refuse_shared_folders(made)
    return sorted(made, key=lambda job: job.stage)


def _refuse_shared_folders(made: Iterable[Job]) -> None:
    """A folder is of one fit or one predict, or of a fit and one predict with its state."""
    writers: dict[Path, list[Job]] = {}
    for job in made:
        others = writers.setdefault(job.run.path.resolve(), [])
        if others and not (len(others) == 1 and job.of == others[0].name):
            raise UserError(
                f"{others[-1].name} and {job.name} would both write {job.run.path}, and one would be taken for the "
                "other: give a step another name, `experiment` or `seed`"
            )
        others.append(job)


def step_run(study: Study, name: str, seed: int | None) -> runs.RunFolder:
    """The run folder of a step; `seed` is the one of the job that asks."""
    step = study.steps[name]
    if step.of is not None:
        return step_run(study, step.of, seed)
    number = seed if step.each_seed else step.seed
    return runs.RunFolder(study.runs_dir / (step.experiment or f"{study.name}_{name}") / f"s{number}")


def _of_step(study: Study, step: Step, seed: int | None) -> Job:
    run = step_run(study, step.name, seed)
    number = step.seed if seed is None else seed
    how = ["--ckpt_path", "best"] if step.of else [] if step.verb == "predict" else ["--resume"]
    return Job(
        name=_job_name(study, step.name, seed),
        verb=step.verb,
        run=run,
        words=(*_told(step.config, number, run), *how, *_options(study, step.options, number, seed)),
        needs=tuple(_job_name(study, name, seed) for name in step.needs),
        seed=seed,
        stage=_stage(study, step.needs),
        of=None if step.of is None else _job_name(study, step.of, seed),
    )


def _of_arm(study: Study, arm: Arm, seed: int) -> Job:
    run = study.run(arm.name, seed)
    how = ("--resume", "--test_after_fit", "true")
    return Job(
        name=f"{arm.name}/s{seed}",
        verb="fit",
        run=run,
        words=(*_told(arm.config, seed, run), *how, *_options(study, arm.options, seed, seed)),
        needs=tuple(_job_name(study, name, seed) for name in arm.needs),
        arm=arm.name,
        seed=seed,
        stage=_stage(study, arm.needs),
        mirrored=study.mirrored,
    )


def _told(config: str, seed: int, run: runs.RunFolder) -> list[str]:
    """Configuration, seed and place of a run."""
    return ["--config", config, "--seed_everything", str(seed), *_placed(run)]


def _placed(run: runs.RunFolder) -> list[str]:
    return ["--runs_dir", str(run.path.parent.parent), "--experiment", run.experiment, "--run_id", run.run_id]


def _job_name(study: Study, step: str, seed: int | None) -> str:
    return f"{step}/s{seed}" if study.steps[step].each_seed else step


def _stage(study: Study, needs: Iterable[str]) -> int:
    return max((1 + _stage(study, study.steps[name].needs) for name in needs), default=0)


def _options(study: Study, options: Mapping[str, Any], number: int, seed: int | None) -> list[str]:
    """Words of the command line, with the folders of steps put in."""

    def put_in(found: re.Match[str]) -> str:
        name = found[1]
        if name == "seed":
            return str(number)
        return str(step_run(study, name, seed).path) if name in study.steps else found[0]

    words = []
    for key, value in options.items():
        plain = isinstance(value, str)
        words += [f"--{key}", PLACE.sub(put_in, value if plain else json.dumps(value, ensure_ascii=False))]
    return words
