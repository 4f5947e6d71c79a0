"""The file of a study and what it says.

    study: elpv_few_defects                  # its name; the experiments are called study_arm and study_step
    question: Do edited pictures help where defects are few?
    seeds: [0, 1, 2, 3, 4]                   # of every arm
    runs_dir: runs
    steps:                                   # what arms build upon, made once each
      autoencoder: {config: experiments/editing/autoencoder_elpv.yaml}
      base: {config: experiments/editing/base_elpv.yaml, options: {model.autoencoder: "{autoencoder}"}}
      edits: {verb: predict, config: experiments/editing/elpv_new.yaml, options: {model.base: "{base}"}}
    config: experiments/studies/classifier_elpv.yaml        # of every arm
    options: {trainer.max_epochs: 20}                       # of every arm
    arms:
      A: {title: originals}
      B: {title: originals and edits, options: {data.synthetic.path: "{edits}/edited"}}
    baseline: A                              # the arm that the others are held against; the first one if not given
    judged_by: accuracy                      # the figure that the conclusion rests on; written down with the first run
    paper: zheng_nagata                      # whose published figures the report prints beside ours
    mirrored: true                           # test on the mirrored training pictures, too

`{base}` in an option is the run folder of that step, which is then made first, and `{seed}` the job's seed; other words
in braces stay as they are, such as `{category}`, `{type}` and `{caption}` in prompts, of which no step has the name.
A step takes, beside `verb` (fit or predict), `config` and `options`:
`of: STEP` (predict with that fit's best state, in that run's folder), `each_seed: true` (a run for each seed, for the
arms' runs of the same seed), `seed` (of a single run; 0), `needs` (steps that no option names) and `experiment` (a name
of its own, by which several studies share the step). An arm takes `title`, `config`, `options` and `needs`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_defect import runs
from lit_defect.yaml_files import YamlReader, near_word, read_yaml

PAPERS = ("zheng_nagata",)
JUDGES = ("accuracy", "balanced_accuracy", "auroc")
_STUDY_KEYS = (
    "study", "question", "seeds", "runs_dir", "steps", "config", "options", "arms", "baseline", "judged_by",
    "paper", "mirrored",
)  # fmt: skip
_STEP_KEYS = ("verb", "config", "options", "needs", "of", "each_seed", "seed", "experiment")
_ARM_KEYS = ("title", "config", "options", "needs")
_OURS = ("config", "experiment", "run_id", "runs_dir", "resume", "ckpt_path", "seed_everything", "test_after_fit")
_TAKEN = ("seed", "category", "type", "caption", "arms")  # words in braces that mean something else; a figure's name
PLACE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Step:
    """Runs that arms build upon; the attributes are told in the module's docstring."""

    name: str
    config: str
    verb: str = "fit"
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    of: str | None = None
    each_seed: bool = False
    seed: int = 0
    experiment: str = ""


@dataclass(frozen=True)
class Arm:
    """Runs that are compared, one for each seed: what they are called, and what they are told."""

    name: str
    title: str
    config: str
    options: Mapping[str, Any]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """What the file says; `steps` and `arms` by name."""

    name: str
    question: str
    seeds: tuple[int, ...]
    runs_dir: Path
    steps: Mapping[str, Step]
    arms: Mapping[str, Arm]
    baseline: str
    judged_by: str
    paper: str | None
    mirrored: bool

    @property
    def folder(self) -> Path:
        """Of the logs and the report."""
        return self.runs_dir / self.name

    @property
    def plan_file(self) -> Path:
        """Says by which figure the study was to be judged when its first run began, and when that was."""
        return self.folder / "judged_by.json"

    def run(self, arm: str, seed: int) -> runs.RunFolder:
        """The run of an arm with a seed."""
        return runs.RunFolder(self.runs_dir / f"{self.name}_{arm}" / f"s{seed}")


def read_study(file: Path, runs_dir: Path | None = None) -> Study:
    """Read a study's file; paths in it are relative to the current folder, as on the command line.

    Args:
        file: YAML, as in the module's docstring.
        runs_dir: in place of the one that the file names.

    Raises:
        UserError: no such file, unknown keys or names, or needs that go round in a circle.
    """
    return _Reader(file).study(read_yaml(file, "a study's file"), runs_dir)


def _named_steps(options: Mapping[str, Any], steps: Iterable[str]) -> list[str]:
    """Steps whose folders the options name, in the order of the steps."""
    text = json.dumps(list(options.values()))
    named = set(PLACE.findall(text))
    return [name for name in steps if name in named]


class _Reader(YamlReader):
    def study(self, said: Any, runs_dir: Path | None) -> Study:
        """All of it."""
        entries = self.known(said, "", _STUDY_KEYS)
        for key in ("study", "seeds", "arms"):
            if not entries.get(key):
                raise self.wrong(key, "is needed")
        name = str(entries["study"])
        runs.check_name(f"{self.file}: study", name)
        steps = self.steps(entries.get("steps") or {})
        arms = self.arms(entries, steps)
        baseline = str(entries.get("baseline", next(iter(arms))))
        if baseline not in arms:
            raise self.wrong("baseline", f"is {baseline}, which is no arm{near_word(baseline, arms)}")
        judged_by = str(entries.get("judged_by", JUDGES[0]))
        if judged_by not in JUDGES:
            raise self.wrong("judged_by", f"is {judged_by}: expected one of {', '.join(JUDGES)}")
        paper = entries.get("paper")
        if paper is not None and paper not in PAPERS:
            raise self.wrong("paper", f"is {paper}; known are {', '.join(PAPERS)}")
        return Study(
            name=name,
            question=str(entries.get("question") or ""),
            seeds=self.seeds(entries["seeds"]),
            runs_dir=runs_dir or Path(str(entries.get("runs_dir", "runs"))),
            steps=steps,
            arms=arms,
            baseline=baseline,
            judged_by=judged_by,
            paper=paper,
            mirrored=self.flag(entries, "mirrored"),
        )

    def seeds(self, said: Any) -> tuple[int, ...]:
        """Distinct whole numbers."""
        if not isinstance(said, list) or not all(map(_is_seed, said)) or len(set(said)) < len(said):
            raise self.wrong("seeds", f"is {said}: expected a list of different whole numbers, such as [0, 1, 2]")
        return tuple(said)

    def steps(self, said: Any) -> dict[str, Step]:
        """By name, with the steps that their options name among their needs."""
        found: dict[str, Step] = {}
        given = {str(name): entries for name, entries in self.mapping(said, "steps").items()}
        for name, entries in given.items():
            where = f"steps.{name}"
            self.plain_name(name, where)
            entries = self.known(entries, where, _STEP_KEYS)
            verb = str(entries.get("verb", "fit"))
            if verb not in ("fit", "predict"):
                raise self.wrong(f"{where}.verb", f"is {verb}: expected fit or predict")
            options = self.options(entries.get("options"), where, given)
            of = entries.get("of")
            fits = self.known(given.get(str(of)) or {}, f"steps.{of}", _STEP_KEYS).get("verb", "fit") == "fit"
            if of is not None and (verb != "predict" or not fits):
                raise self.wrong(f"{where}.of", "is for a predict with the state of a step that fits")
            needs = [*([str(of)] if of is not None else []), *self.needs(entries, where, given)]
            if not _is_seed(seed := entries.get("seed", 0)):
                raise self.wrong(f"{where}.seed", f"is {seed}: expected a whole number")
            experiment = entries.get("experiment")
            if experiment is not None:
                runs.check_name(f"{self.file}: {where}.experiment", str(experiment))
            found[name] = Step(
                name=name,
                config=self.config(entries.get("config"), where),
                verb=verb,
                options=options,
                needs=tuple(dict.fromkeys([*needs, *_named_steps(options, given)])),
                of=None if of is None else str(of),
                each_seed=self.flag(entries, "each_seed", where),
                seed=seed,
                experiment=str(experiment or ""),
            )
        for step in found.values():
            self.not_in_circle(step, found, ())
            if step.of is not None and found[step.of].each_seed != step.each_seed:
                raise self.wrong(
                    f"steps.{step.name}.each_seed", f"must be as that of {step.of}, whose folder it writes"
                )
            for name in step.needs:
                if found[name].each_seed and not step.each_seed:
                    raise self.wrong(
                        f"steps.{step.name}", f"needs {name}, which has a run for each seed: set each_seed here, too"
                    )
        return found

    def arms(self, study: Mapping[str, Any], steps: Mapping[str, Step]) -> dict[str, Arm]:
        """By name; an arm's options come after those of all arms and overrule them."""
        shared = self.options(study.get("options"), "", steps)
        found = {}
        for name, entries in self.mapping(study["arms"], "arms").items():
            name, where = str(name), f"arms.{name}"
            self.plain_name(name, where)
            if name in steps:
                raise self.wrong(where, "has the name of a step; each job needs a name of its own")
            entries = self.known(entries or {}, where, _ARM_KEYS)
            options = {**shared, **self.options(entries.get("options"), where, steps)}
            needs = [*self.needs(entries, where, steps), *_named_steps(options, steps)]
            found[name] = Arm(
                name=name,
                title=str(entries.get("title") or name),
                config=self.config(entries.get("config", study.get("config")), where),
                options=options,
                needs=tuple(dict.fromkeys(needs)),
            )
        return found

    def options(self, said: Any, where: str, steps: Iterable[str]) -> dict[str, Any]:
        """Options of the command line by their dotted keys."""
        options = {str(key): value for key, value in self.mapping(said or {}, f"{where}.options").items()}
        for key, value in options.items():
            at = f"{where}.options.{key}"
            if key.lstrip("-") in _OURS:
                raise self.wrong(at, "is set by the study itself")
            if key.startswith("-"):
                raise self.wrong(at, "is written without the leading dashes")
            try:
                json.dumps(value)
            except (TypeError, ValueError):  # a date, or something that holds itself
                raise self.wrong(at, f"is {value}, which no command line can say; put it into quotes") from None
            begins = re.match(r"\{(\w+)\}/", value) if isinstance(value, str) else None
            if begins and begins[1] not in {*steps, "seed"}:
                raise self.wrong(at, f"names {begins[0]}, which is no step{near_word(begins[1], steps)}")
        return options

    def needs(self, entries: Mapping[str, Any], where: str, steps: Iterable[str]) -> list[str]:
        """Names of steps."""
        said = entries.get("needs") or []
        if not isinstance(said, str | list):
            raise self.wrong(f"{where}.needs", f"is {said}: expected names of steps, such as [base]")
        names = [said] if isinstance(said, str) else [str(name) for name in said]
        for name in [*names, *([str(entries["of"])] if entries.get("of") is not None else [])]:
            if name not in steps:
                raise self.wrong(where, f"needs {name}, which is no step{near_word(name, steps)}")
        return names

    def config(self, said: Any, where: str) -> str:
        """A file that is there."""
        if said is None:
            raise self.wrong(
                f"{where}.config", "is needed" + ("" if "steps" in where else ", or a `config` of all arms")
            )
        if not Path(str(said)).is_file():
            raise self.wrong(f"{where}.config", f"is {said}: no such file, seen from {Path.cwd()}")
        return str(said)

    def not_in_circle(self, step: Step, steps: Mapping[str, Step], above: Sequence[str]) -> None:
        """Refuse a step that needs itself."""
        if step.name in above:
            circle = " -> ".join([*above[above.index(step.name) :], step.name])
            raise self.wrong(f"steps.{step.name}.needs", f"go round in a circle: {circle}")
        for name in step.needs:
            self.not_in_circle(steps[name], steps, [*above, step.name])

    def flag(self, entries: Mapping[str, Any], key: str, where: str = "") -> bool:
        value = entries.get(key, False)
        if not isinstance(value, bool):
            raise self.wrong(f"{where}.{key}", f"is {value}: expected true or false")
        return value

    def plain_name(self, name: str, where: str) -> None:
        if not re.fullmatch(r"\w+", name) or name in _TAKEN:
            raise self.wrong(where, f"needs a name of letters, digits and _ (and none of {', '.join(_TAKEN)})")


def _is_seed(said: Any) -> bool:
    return type(said) is int and said >= 0
