"""Names of options as people write them, `model.lr` for `model.init_args.lr`; and filters by their values."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

from lit_defect.errors import UserError
from lit_defect.report.collect import RunInfo
from lit_defect.reporting.seeds import INCIDENTAL, experiment_of

_OWN: dict[str, Callable[[RunInfo], Any]] = {
    "experiment": lambda run: run.folder.experiment,
    "run_id": lambda run: run.folder.run_id,
    "seed": lambda run: run.seeds[0],
    "state": lambda run: run.state,
    "task": lambda run: run.task,
    "data": lambda run: run.data,
    "host": lambda run: run.record.get("host"),
    "commit": lambda run: run.record.get("commit"),
}
"""Keys beside the options."""
_LEFT_OUT = (
    *(key for key in INCIDENTAL if key != "data.init_args.category"),
    "model.init_args.maps", "model.init_args.overlays",
)  # fmt: skip
_MADE_BY = ("path", "base", "maps", "autoencoder", "stage1", "ckpt", "lora", "synthetic", "embeddings", "init")


def short(key: str) -> str:
    """`model.init_args.lr` -> `model.lr`."""
    return key.replace("init_args.", "").removesuffix(".class_path") or key


def resolve(key: str, runs: Sequence[RunInfo], option: str) -> Callable[[RunInfo], str]:
    """What a key stands for, as a function of a run.

    Args:
        key: one of experiment, seed, state, task, data, ...; or an option, shortened or its last word alone.
        runs: that have options.
        option: of the command line, for the message.

    Raises:
        UserError: no run has such an option, or several options end so.
    """
    if key in _OWN:
        return lambda run: str(_OWN[key](run))
    full = dict.fromkeys(name for run in runs for name in run.options)
    by_short: dict[str, list[str]] = {}
    for name in full:
        for alias in {name, short(name)}:
            by_short.setdefault(alias, []).append(name)
    found = by_short.get(key) or [
        name for name in full if f".{key}" in (name[-len(key) - 1 :], short(name)[-len(key) - 1 :])
    ]
    if not found:
        near = get_close_matches(key, [*by_short, *_OWN], n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{option} {key}: no run has such an option{hint} Others: {', '.join(_OWN)}")
    if len(found) > 1:
        raise UserError(f"{option} {key}: several options end so: {', '.join(map(short, found))}; name one of them")
    return lambda run: value_text(found[0], run.options.get(found[0]))


def filtered(runs: Sequence[RunInfo], filters: Iterable[str]) -> list[RunInfo]:
    """The runs that pass all filters, `KEY=VALUE[,VALUE...]`; a VALUE may have `*` and `?`, and numbers are compared.

    Raises:
        UserError: a filter without `=`, an unknown key, or no run that passes.
    """
    kept = list(runs)
    for text in filters:
        key, sign, wanted = text.partition("=")
        if not sign or not key:
            raise UserError(f"--filter {text}: KEY=VALUE is needed, such as state=finished or model.lr=0.0003")
        value_of = resolve(key, runs, "--filter")
        there = dict.fromkeys(value_of(run) for run in kept)
        kept = [run for run in kept if any(_same(value_of(run), value) for value in wanted.split(","))]
        if not kept:
            values = ", ".join(list(there)[:10]) + (", ..." if len(there) > 10 else "")
            raise UserError(f"--filter {text}: no run is left; {key} is one of {values}")
    return kept


@lru_cache(maxsize=4096)
def computing(run: RunInfo) -> dict[str, str]:
    """Options that say what is computed, without seeds, folders and devices.

    What other runs have made, such as a generated set, goes by their experiment, and `{seed}` stands for the run's own
    seed in it: each seed may have its own.
    """
    own = re.compile(rf"(?<=[_-]s){run.seeds[0]}$|(?<=[_-]seed){run.seeds[0]}$")
    return {
        key: own.sub("{seed}", value_text(key, value))
        for key, value in run.options.items()
        if not key.startswith(_LEFT_OUT)
    }


def value_text(key: str, value: Any) -> str:
    """A value as it is compared and shown: a class by its name, what a run has made by that run's experiment."""
    if isinstance(value, (list, tuple)) and any(isinstance(item, str) and "/" in item for item in value):
        return "[" + ", ".join(value_text(key, item) for item in value) + "]"
    if not isinstance(value, str):
        return str(value)
    if key.endswith("class_path"):
        return value.rpartition(".")[2]
    if key.endswith("_file"):  # of another checkout or none: which pictures they stand for is compared by names
        return Path(value).name
    if "/" in value and any(word in key.rpartition(".")[2] for word in _MADE_BY):
        return experiment_of(Path(value))
    return value


def _same(value: str, wanted: str) -> bool:
    if fnmatchcase(value, wanted):
        return True
    try:
        return math.isclose(float(value), float(wanted), rel_tol=1e-9)
    except ValueError:
        return False
