"""The file of a sweep: W&B's format, and a block of our own that W&B never sees.

    name: elpv_lite0_lr
    method: bayes                             # grid | random | bayes (off line: Optuna's TPE)
    metric: {name: val/auroc, goal: maximize}
    command: ["${env}", "${interpreter}", -m, lit_defect, fit, --config, FILE.yaml, "${args}"]
    parameters:                               # told in space.py
      model.lr: {distribution: log_uniform_values, min: 1.0e-5, max: 1.0e-2}
    early_terminate: {type: hyperband, min_iter: 2, eta: 3}
    run_cap: 40
    lit_defect:
      seeds: [0, 1, 2]          # trainings of each trial; their mean is the objective [the experiment's own seed]
      seeded: [data.val_seed]   # options that are given each training's seed as well, here for a validation split of
                                # its own: else all seeds share one, and a search on few pictures fits itself to it
      trials: 40                # in all, by all workers [run_cap]
      value: checkpoint         # which of the logged values counts: checkpoint | best | last; see results.py
      sampler: tpe              # off line: tpe | random | grid [as `method` says]
      startup: 10               # trials that are drawn at random before TPE begins
      seed: 0                   # of the sampler
      pruner: hyperband         # off line: none | median | hyperband [as `early_terminate` says]
      warmup: 1                 # values of a curve that median lets pass
      max_failures: 3           # trials that may fail in succession before a worker gives up
      storage: URL              # off line, of Optuna, without a password [a journal in the sweep's folder]

An iteration of hyperband and of `warmup` is one value of the metric's curve, as at W&B: an epoch for what is validated
in each. Of a trial with several seeds, the first seed's curve is looked at: it alone is there for every trial, and like
is compared with like; a trial that has passed with it is trained with the other seeds to their end.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lit_defect.errors import UserError
from lit_defect.sweep.space import Parameter, combinations, read_parameters
from lit_defect.yaml_files import YamlReader, read_yaml

SEED = "seed_everything"
_KEYS = (
    "name", "description", "program", "method", "metric", "parameters", "command", "early_terminate", "run_cap",
    "project", "entity", "lit_defect",
)  # fmt: skip
_OWN_KEYS = (
    "seeds", "seeded", "trials", "value", "sampler", "startup", "seed", "pruner", "warmup", "max_failures", "storage",
)  # fmt: skip
_SAMPLERS = {"grid": "grid", "random": "random", "bayes": "tpe"}
_PRUNERS = ("none", "median", "hyperband")
_VALUES = ("checkpoint", "best", "last")
_OURS = ("run_id", "runs_dir", "resume")  # options that each trial gets from us
_DEFAULT_COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")


@dataclass(frozen=True)
class Hyperband:
    """Values of a curve after which a trial is compared for the first time, and the last; the rest by `eta`."""

    least: int = 1
    most: int | None = None
    eta: int = 3


@dataclass(frozen=True)
class Sweep:
    """What a file says; see the module's docstring. `seeds` is None for the experiment's own seed."""

    file: Path
    said: Mapping[str, Any]
    name: str
    method: str
    metric: str
    goal: Literal["maximize", "minimize"]
    parameters: tuple[Parameter, ...]
    constant: Mapping[str, Any]
    command: tuple[str, ...]
    seeds: tuple[int, ...] | None
    seeded: tuple[str, ...]
    trials: int | None
    value: Literal["checkpoint", "best", "last"]
    sampler: str
    startup: int
    seed: int
    pruner: str
    warmup: int
    hyperband: Hyperband
    max_failures: int
    storage: str | None

    @property
    def limit(self) -> int | None:
        """How many trials there are in all; None for no end."""
        if self.sampler != "grid":
            return self.trials
        count = len(combinations(self.parameters))
        return count if self.trials is None else min(count, self.trials)

    def plan(self) -> dict[str, Any]:
        """What must not change while trials of this name are there, by which two files are compared."""
        return {
            "metric": {"name": self.metric, "goal": self.goal},
            "value": self.value,
            "sampler": self.sampler,
            "command": " ".join(self.command),
            "seeds": None if self.seeds is None else list(self.seeds),
            "parameters": {parameter.name: parameter.describe() for parameter in self.parameters},
            "constant": dict(self.constant),
            **({"seeded": list(self.seeded)} if self.seeded else {}),  # older plans do not tell
        }


def read_sweep(file: Path) -> Sweep:
    """Read a sweep's file.

    Raises:
        UserError: no such file, unknown keys, values that cannot be, parameters that cannot be mapped.
    """
    return _Reader(file).sweep(read_yaml(file, "a sweep's file"))


class _Reader(YamlReader):
    def sweep(self, said: Any) -> Sweep:
        entries = self.known(said, "", _KEYS)
        for key in ("method", "metric", "parameters"):
            if not entries.get(key):
                raise self.wrong(key, "is needed")
        name = str(entries.get("name") or self.file.stem)
        if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
            raise self.wrong(
                "name", f"is {name!r}: expected letters, digits, _, - and dots, since folders are named so"
            )
        method = self.one_of(entries, "method", "", _SAMPLERS)
        metric = self.known(entries["metric"], "metric", ("name", "goal"))
        if not metric.get("name"):
            raise self.wrong("metric.name", "is needed, such as val/auroc")
        own = self.known(entries.get("lit_defect") or {}, "lit_defect", _OWN_KEYS)
        said_parameters = self.mapping(entries["parameters"], "parameters")
        parameters, constant = read_parameters(said_parameters, str(self.file))
        names = [parameter.name for parameter in parameters] + list(constant)
        for option in names:
            if names.count(option) > 1:
                raise self.wrong(f"parameters.{option}", "stands twice, nested and with dots")
            if option.lstrip("-") in _OURS:
                raise self.wrong(f"parameters.{option}", "is set by the sweep itself")
        if not parameters:
            raise self.wrong("parameters", "has nothing that varies: give one of them several `values`, or a range")
        sampler = self.one_of(own, "sampler", "lit_defect", _SAMPLERS.values(), _SAMPLERS[method])
        if (sampler == "grid") != (method == "grid"):
            raise self.wrong("lit_defect.sampler", f"is {sampler} with method {method}: a grid is one on and off line")
        seeds = self.seeds(own.get("seeds"))
        if seeds is not None and SEED in names:
            raise self.wrong("lit_defect.seeds", f"and parameters.{SEED} both set the seed: leave one of them out")
        terminate = entries.get("early_terminate")
        hyperband = self.hyperband(terminate)
        cap = self.whole(entries, "run_cap", "", None, 1)
        made = Sweep(
            file=self.file,
            said=entries,
            name=name,
            method=method,
            metric=str(metric["name"]),
            goal=self.one_of(metric, "goal", "metric", ("maximize", "minimize"), "minimize"),  # type: ignore[arg-type]
            parameters=tuple(parameters),
            constant=constant,
            command=self.command(entries),
            seeds=seeds,
            seeded=self.seeded(own.get("seeded"), seeds, names),
            trials=self.whole(own, "trials", "lit_defect", cap, 1),
            value=self.one_of(own, "value", "lit_defect", _VALUES, "checkpoint"),  # type: ignore[arg-type]
            sampler=sampler,
            startup=self.whole(own, "startup", "lit_defect", 10, 1) or 10,
            seed=self.whole(own, "seed", "lit_defect", 0, 0) or 0,
            pruner=self.one_of(own, "pruner", "lit_defect", _PRUNERS, "hyperband" if terminate else "none"),
            warmup=self.whole(own, "warmup", "lit_defect", 1, 0) or 0,
            hyperband=hyperband,
            max_failures=self.whole(own, "max_failures", "lit_defect", 3, 1) or 3,
            storage=None if own.get("storage") is None else str(own["storage"]),
        )
        if sampler == "grid":
            try:
                combinations(made.parameters)
            except UserError as error:
                raise UserError(f"{self.file}: {error}") from None
        return made

    def command(self, entries: Mapping[str, Any]) -> tuple[str, ...]:
        """Words of the command, W&B's own ones in their places."""
        said = entries.get("command", list(_DEFAULT_COMMAND))
        if not isinstance(said, list) or not said:
            raise self.wrong("command", "is no list of words")
        words = tuple(str(word) for word in said)
        if "${program}" in words and not entries.get("program"):
            raise self.wrong("command", "names ${program}, and `program` is not given")
        words = tuple(str(entries["program"]) if word == "${program}" else word for word in words)
        for word in words:
            if found := re.search(r"\$\{(args_\w+)\}", word):
                raise self.wrong("command", f"has ${{{found[1]}}}: write ${{args}}, which this command line reads")
            if (option := word.lstrip("-").partition("=")[0]) in _OURS and word.startswith("--"):
                raise self.wrong("command", f"has --{option}, which the sweep sets itself; see sweep --help")
            if (found := re.fullmatch(r"\$\{envvar:(\w+)\}", word)) and found[1] not in os.environ:
                raise self.wrong("command", f"names the environment variable {found[1]}, which is not set")
        if "${args}" not in words:
            raise self.wrong("command", "has no ${args}, where the parameters are put in as --name=value")
        return words

    def hyperband(self, said: Any) -> Hyperband:
        """Of `early_terminate`."""
        if said is None:
            return Hyperband()
        entries = self.known(said, "early_terminate", ("type", "min_iter", "max_iter", "s", "eta", "strict"))
        self.one_of(entries, "type", "early_terminate", ("hyperband",))
        eta = self.whole(entries, "eta", "early_terminate", 3, 2) or 3
        most = self.whole(entries, "max_iter", "early_terminate", None, 1)
        least = self.whole(entries, "min_iter", "early_terminate", None, 1)
        if least is None and most is None:
            raise self.wrong("early_terminate", "needs min_iter, or max_iter and s")
        if least is None:
            if "s" not in entries:
                raise self.wrong("early_terminate.s", "is needed with max_iter")
            least = max(1, (most or 1) // eta ** (self.whole(entries, "s", "early_terminate", 1, 1) or 1))
        if most is not None and most <= least:
            raise self.wrong("early_terminate.max_iter", f"is {most}: expected more than min_iter, {least}")
        return Hyperband(least, most, eta)

    def seeds(self, said: Any) -> tuple[int, ...] | None:
        if said is None:
            return None
        whole = isinstance(said, list) and bool(said) and all(type(seed) is int and seed >= 0 for seed in said)
        if not whole or len(set(said)) < len(said):
            raise self.wrong("lit_defect.seeds", f"is {said}: expected different whole numbers, such as [0, 1, 2]")
        return tuple(said)

    def seeded(self, said: Any, seeds: Any, taken: Sequence[str]) -> tuple[str, ...]:
        """Options that are given the seed, too."""
        if said is None:
            return ()
        if not isinstance(said, list) or not all(isinstance(name, str) for name in said):
            raise self.wrong("lit_defect.seeded", f"is {said}: expected names of options, such as [data.val_seed]")
        if said and seeds is None:
            raise self.wrong("lit_defect.seeded", "needs lit_defect.seeds, such as [0, 1, 2]")
        for name in said:
            if name in (*_OURS, SEED):
                raise self.wrong("lit_defect.seeded", f"names {name}, which is set by the sweep itself")
            if name in taken or said.count(name) > 1:
                raise self.wrong("lit_defect.seeded", f"names {name}, which is set twice: leave one of them out")
        return tuple(said)

    def whole(self, entries: Mapping[str, Any], key: str, where: str, otherwise: int | None, least: int) -> int | None:
        value = entries.get(key, otherwise)
        if value is not None and (type(value) is not int or value < least):
            raise self.wrong(f"{where}.{key}", f"is {value}: expected a whole number from {least} on")
        return value

    def one_of(self, entries: Mapping[str, Any], key: str, where: str, known: Any, otherwise: str | None = None) -> str:
        value = entries.get(key, otherwise)
        value = "none" if value is None and "none" in known else value
        if value not in known:
            names = [str(name) for name in known]
            raise self.wrong(f"{where}.{key}", f"is {value}: expected one of {', '.join(names)}")
        return str(value)
