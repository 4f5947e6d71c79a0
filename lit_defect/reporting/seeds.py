"""Runs that differ in nothing but their seeds: read, put into rows, averaged, written as a table.

1. Each run folder (or every one below a folder) gives its `test_metrics.json` and `config.yaml`.
2. Runs that differ in nothing but seeds and category make one row. Where runs on the same category differ in an
   option, that option's value becomes part of the row's name; options that only go with the category do not.
3. A cell is the mean over seeds, with standard deviation and t interval.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from lit_defect.errors import UserError
from lit_defect.files import whole_file
from lit_defect.metrics.intervals import t_interval
from lit_defect.runs import MIRRORED, RunFolder, flatten

# Options that say where, how fast or from which seed, not what is computed.
INCIDENTAL = (
    "config", "run_id", "resume", "runs_dir", "wandb", "wandb_checkpoints", "ckpt_path", "weights_only",
    "test_after_fit", "experiment", "seed_everything", "data.init_args.seed", "data.init_args.category",
    "data.init_args.val_seed", "data.init_args.root",
    "data.init_args.num_workers", "data.init_args.cache", "data.init_args.eval_batch_size", "data.init_args.download",
    "model.init_args.channels_last", "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy",
    "trainer.logger", "trainer.callbacks", "trainer.enable_", "trainer.log_every_n_steps", "trainer.default_root_dir",
)  # fmt: skip

_SYNTHETIC = "data.init_args.synthetic"

CATEGORIES = (
    "bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut", "pill", "screw", "tile",
    "toothbrush", "transistor", "wood", "zipper",
)  # fmt: skip
"""Of MVTec AD, over which published means are taken."""
SEED_NOTE = "An interval tells how a mean would move with other seeds, not with other test pictures."


@dataclass(frozen=True)
class Run:
    """What one run folder says.

    Attributes:
        path: the folder.
        category: of the data set, or the data set's name.
        method: what was run, in words.
        seeds: of training and of the split.
        figures: by name; nan where undefined.
        options: the configuration, flat, without what is incidental.
    """

    path: Path
    category: str
    method: str
    seeds: tuple[Any, Any]
    figures: Mapping[str, float]
    options: Mapping[str, str]


@dataclass(frozen=True)
class Spread:
    """Mean over seeds with standard deviation and 95 % t interval; `seeds` says over how many.

    nan are both of one seed, and the limits where all seeds say the same.
    """

    mean: float = math.nan
    sd: float = math.nan
    low: float = math.nan
    high: float = math.nan
    seeds: int = 0

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of the finite ones of these values."""
        finite = [value for value in values if math.isfinite(value)]
        if not finite:
            return cls()
        mean = t_interval(finite)
        sd = float(np.std(finite, ddof=1)) if len(finite) > 1 else math.nan
        return cls(mean.value, sd, mean.low, mean.high, len(finite))

    def within(self, least: float, most: float) -> Spread:
        """The same with limits between these ends, of which t knows nothing; as it is where the mean lies outside."""
        if math.isnan(self.low) or not least <= self.mean <= most:
            return self
        return replace(self, low=max(least, self.low), high=min(most, self.high))

    def text(self, factor: float = 1.0, digits: int = 3, *, sign: bool = False) -> str:
        """`0.943 ± 0.002`, `0.943` for one seed, `-` for none; `sign` writes `+` as well."""
        if not self.seeds:
            return "-"
        mean = f"{factor * self.mean:{'+' if sign else ''}z.{digits}f}"
        return mean if math.isnan(self.sd) else f"{mean} ± {factor * self.sd:.{digits}f}"

    def limits(self, factor: float = 1.0, digits: int = 3, *, sign: bool = False) -> str:
        """`0.938 to 0.948`, within [0, 1], or with `sign` `-0.012 to +0.020`, within [-1, 1]; empty without limits."""
        if math.isnan(self.low):
            return ""
        found = self.within(-1.0 if sign else 0.0, 1.0)
        low, high = factor * found.low, factor * found.high
        plus = "+" if sign else ""
        return f"{low:{plus}z.{digits}f} to {high:{plus}z.{digits}f}"


@dataclass(frozen=True)
class Row:
    """Runs of one configuration, by category."""

    name: str
    runs: dict[str, list[Run]] = field(default_factory=dict)

    def values(self, category: str, figure: str) -> list[float]:
        """A figure of the runs of a category, nan where undefined."""
        return [run.figures.get(figure, math.nan) for run in self.runs.get(category, [])]

    def spread(self, category: str, figure: str) -> Spread:
        """Of a figure over the seeds of a category."""
        return Spread.of(self.values(category, figure))

    def spread_over(
        self, categories: Sequence[str], figure: str, mean: Callable[[Sequence[Run]], float] | None = None
    ) -> Spread:
        """Over the seeds, of a figure's mean over categories.

        Only seeds that have them all count; where there is none, the mean of the categories' means, without spread.

        Args:
            categories: over which the mean is taken within each seed.
            figure: name of the figure.
            mean: of one seed's runs, one for each category; without it, all count the same.
        """
        if not categories:
            return Spread()
        by_seed = [
            {run.seeds: run for run in self.runs[name] if math.isfinite(run.figures.get(figure, math.nan))}
            for name in categories
        ]
        shared = sorted(set.intersection(*(set(runs) for runs in by_seed)), key=str)
        if not shared:
            means = [self.spread(name, figure).mean for name in categories]
            return Spread() if np.isnan(means).any() else Spread(float(np.mean(means)), seeds=1)
        of_seed = mean or (lambda runs: float(np.mean([run.figures[figure] for run in runs])))
        return Spread.of(of_seed([runs[seeds] for runs in by_seed]) for seeds in shared)


AnyRow = TypeVar("AnyRow", bound=Row)


class Line(NamedTuple):
    """A line of the CSV; with a `source` it is a published figure, of unknown seeds."""

    category: str
    name: str
    figure: str
    spread: Spread
    source: str = ""


def find_runs(folders: Iterable[Path | str]) -> list[Path]:
    """Run folders with test metrics; a folder that is none stands for all runs in it, or in the experiments in it.

    Raises:
        UserError: a folder without evaluated runs.
    """
    found: dict[Path, None] = {}
    for folder in map(Path, folders):
        files = [file for pattern in ("", "*/", "*/*/") for file in folder.glob(f"{pattern}test_metrics.json")]
        if not files:
            mirrored = any(next(folder.glob(f"{pattern}mirrored_metrics.json"), None) for pattern in ("", "*/", "*/*/"))
            seen = "; mirrored_metrics.json is of the training pictures, and no test" if mirrored else ""
            raise UserError(
                f"{folder}: no test_metrics.json here or below{seen}; evaluate the run first, by the verb `test`"
            )
        found |= dict.fromkeys(file.parent.resolve() for file in sorted(files))
    return list(found)


def read_metrics(path: Path) -> Any:
    """What the `test_metrics.json` of a run folder says.

    Raises:
        UserError: it is no JSON.
    """
    file = path / "test_metrics.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is no JSON: {error}") from None


def read_options(path: Path, incidental: tuple[str, ...] = INCIDENTAL) -> dict[str, str]:
    """The configuration of a run folder, flat, without the options that begin with one of `incidental`."""
    options = flatten(RunFolder(path).config())
    return {key: str(value) for key, value in options.items() if not key.startswith(incidental)}


def learning_options(path: Path, incidental: tuple[str, ...] = INCIDENTAL) -> dict[str, str]:
    """As `read_options`; all of `data.synthetic` is one option, the same for all seeds of one experiment."""
    options = read_options(path, incidental)
    kept = {key: value for key, value in options.items() if not key.startswith(_SYNTHETIC)}
    given = {key.rpartition(".")[2]: value for key, value in sorted(options.items() - kept.items())}
    folder = given.pop("path", given.pop("synthetic", "None"))  # the folder alone, or one of several options
    words = [f"{name} {value}" for name, value in given.items() if value not in ("None", "0", "0.0")]
    return kept | {_SYNTHETIC: ", ".join([folder if folder == "None" else experiment_of(Path(folder)), *words])}


def near_duplicates(path: Path, config: Mapping[str, Any], stage: str = "test") -> int | None:
    """Pairs of near-duplicates between the training and the tested pictures of a run folder, as its data found them.

    A run that has looked for them and found none, in any of its splits, has no `leakage.csv`.

    Returns:
        None where they were not looked for, or files are missing that would tell.
    """
    try:
        with (path / "leakage.csv").open(newline="", encoding="utf-8") as lines:
            pairs = [{row.get("split_a"), row.get("split_b")} for row in csv.DictReader(lines)]
    except FileNotFoundError:
        told = ((config.get("data") or {}).get("init_args") or {}).get("leakage")
        looked = told in ("warn", "error") and (path / "splits.csv").is_file()
        return 0 if looked and stage != MIRRORED else None
    except (OSError, ValueError, csv.Error):
        return None
    return sum(pair == {"train", "test" if stage == MIRRORED else stage} for pair in pairs)


def group_runs(runs: Sequence[Run], row: type[AnyRow]) -> list[AnyRow]:
    """Rows of runs that compute the same, in the order of their first run.

    Raises:
        UserError: two runs of one row and category have the same seeds; counted twice, they would feign precision.
    """
    by_method: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_method[run.method].append(run)
    rows: dict[str, AnyRow] = {}
    for method, same in by_method.items():
        varied = _varied_options(same)
        for run in same:
            values = [f"{key.rpartition('.')[2]}={run.options.get(key, '-')}" for key in varied]
            name = ", ".join([method, *values])
            others = rows.setdefault(name, row(name)).runs.setdefault(run.category, [])
            for other in others:
                if other.seeds == run.seeds:
                    raise UserError(
                        f"{other.path} and {run.path} are the same experiment with the same seeds, "
                        f"{run.seeds[0]} for training and {run.seeds[1]} for the split: give one of them only"
                    )
            others.append(run)
    return list(rows.values())


@cache
def experiment_of(made: Path) -> str:
    """The experiment of the run in whose folder something lies, such as a generated data set; else its path."""
    for folder in (made, *made.parents):
        if RunFolder(folder).record():
            return folder.resolve().parent.name
    return str(made)


def paired(first: Row, other: Row, categories: Sequence[str], figure: str) -> Spread:
    """Over the seeds that both arms have for all categories: the difference of a share's means over categories."""
    one, two = (_by_seed(row, categories, figure) for row in (first, other))
    return Spread.of(two[seed] - one[seed] for seed in one if seed in two).within(-1, 1)


def difference(spread: Spread) -> str:
    """Of shares, in points: `+3.1 ± 0.8 (+1.1 to +5.1)`."""
    limits = spread.limits(100, 1, sign=True)
    return spread.text(100, 1, sign=True) + (f" ({limits})" if limits else "")


def parts(rows: Sequence[AnyRow]) -> list[tuple[list[str], list[AnyRow]]]:
    """Each category with the arms that have it; and all together, where every arm has them."""
    categories = sorted({category for row in rows for category in row.runs})
    found = [([name], [row for row in rows if name in row.runs]) for name in categories]
    if len(categories) > 1 and (whole := [row for row in rows if len(row.runs) == len(categories)]):
        found.append((categories, whole))
    return found


def split_note(rows: Sequence[Row], category: str) -> str:
    """A warning where the runs were not tested on as many `pictures`, a figure of theirs; else empty."""
    counts = sorted({run.figures["pictures"] for row in rows for run in row.runs[category]})
    if len(counts) < 2:
        return ""
    return (
        f"- Tested on {counts[0]:.0f} to {counts[-1]:.0f} pictures of {category}: the runs have not one test split.\n"
    )


def named_runs(word: str, read: Callable[[Sequence[str], str | None], list[Run]]) -> list[Run]:
    """The runs behind RUNS, or behind NAME=RUNS, which is one arm of that name whatever the options.

    Args:
        word: of a command line.
        read: (folders, name of the arm or None) -> runs.
    """
    name, sign, folder = word.partition("=")
    return read([folder], name) if sign and name and not Path(word).exists() else read([word], None)


def write_lines(lines: Iterable[Line], path: Path) -> None:
    """Write a CSV: data, configuration, figure, mean, sd, low, high, seeds, source; without lines of no seeds."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("data", "configuration", "figure", "mean", "sd", "low", "high", "seeds", "source"))
    for category, name, figure, spread, source in lines:
        if spread.seeds:
            numbers = (spread.mean, spread.sd, spread.low, spread.high)
            cells = ("" if math.isnan(x) else f"{x:.6g}" for x in numbers)
            writer.writerow((category, name, figure, *cells, "" if source else spread.seeds, source))
    with whole_file(path) as file:
        file.write(text.getvalue().encode())


def _by_seed(row: Row, categories: Sequence[str], figure: str) -> dict[tuple[Any, Any], float]:
    """Mean over the categories, by the seeds that have a figure for all of them."""
    found = [{run.seeds: run.figures.get(figure, math.nan) for run in row.runs[name]} for name in categories]
    means = {seed: float(np.mean([part.get(seed, math.nan) for part in found])) for seed in found[0]}
    return {seed: mean for seed, mean in means.items() if math.isfinite(mean)}


def _varied_options(runs: Sequence[Run]) -> list[str]:
    """Options in which runs on the same category differ: they tell experiments apart."""
    by_category: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_category[run.category].append(run)
    keys = {key for run in runs for key in run.options}
    return sorted(
        key for key in keys
        if any(len({run.options.get(key) for run in same if run.options}) > 1 for same in by_category.values())
    )  # fmt: skip
