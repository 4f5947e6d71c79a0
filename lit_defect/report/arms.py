"""Arms: runs that compute the same from different seeds, told apart by as few options as will do.

The unit is the seed: where an arm has several runs of one seed, their mean counts once.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from lit_defect.errors import UserError
from lit_defect.report.collect import RunInfo
from lit_defect.report.figures import ends
from lit_defect.report.keys import computing, resolve, short
from lit_defect.reporting.seeds import Spread
from lit_defect.study_file import Study

Seeds = tuple[Any, Any]
_NAMED_BY = 3
"""Up to so many options stand in the names of arms."""
_TRIED = 20
_DIGITS = 6  # of a number in a name


@dataclass(frozen=True)
class Arm:
    """Runs that differ in seeds only, unless `--group-by` put others together.

    Attributes:
        name: unique in the report.
        runs: in the order of the command line.
        title: in words, from a study's file.
    """

    name: str
    runs: tuple[RunInfo, ...]
    title: str = ""

    def by_seed(self, stage: str, figure: str) -> dict[Seeds, float]:
        """A figure by (training seed, split seed); the mean, where a seed has several runs."""
        values: dict[Seeds, list[float]] = defaultdict(list)
        for run in self.runs:
            found = run.measured.get(stage)
            if found and figure in found.figures:
                values[run.seeds].append(found.figures[figure].value)
        return {seed: math.fsum(found) / len(found) for seed, found in values.items()}

    def spread(self, stage: str, figure: str) -> Spread:
        """Over the seeds."""
        return Spread.of(self.by_seed(stage, figure).values()).within(*ends(figure))

    def part(self, stage: str, figure: str, part: str) -> Spread:
        """Over the seeds, of a figure of a class or type."""
        values: dict[Seeds, list[float]] = defaultdict(list)
        for run in self.runs:
            value = run.measured[stage].parts.get(figure, {}).get(part) if stage in run.measured else None
            if value is not None:
                values[run.seeds].append(value)
        return Spread.of(math.fsum(found) / len(found) for found in values.values())

    @property
    def repeated(self) -> int:
        """How many runs have a seed that another run of this arm has."""
        return len(self.runs) - len({run.seeds for run in self.runs})


def spread_cell(found: Spread, factor: float = 1.0, digits: int = 3, *, sign: bool = False) -> str | None:
    """`0.943 ± 0.002` as `Spread.text` has it; None, an empty place of a table, where there is nothing."""
    return found.text(factor, digits, sign=sign) if found.seeds else None


@dataclass(frozen=True)
class Arms:
    """All arms, in order, and in what they differ.

    Attributes:
        arms: in the order of their first run.
        differ: values by arm's name, by option in which arms differ; several values of one arm stand in a row.
        prefix: what the experiments' names have in common, left out of the arms' names.
        mixed: options in which runs of one arm differ, with the arm's name.
    """

    arms: tuple[Arm, ...]
    differ: Mapping[str, Mapping[str, str]]
    prefix: str = ""
    mixed: Sequence[tuple[str, str]] = ()


def make_arms(runs: Sequence[RunInfo], group_by: Sequence[str] = (), study: Study | None = None) -> Arms:
    """Put runs into arms.

    Args:
        runs: at least one.
        group_by: options whose values make the arms; without them runs of one experiment with the same options do.
        study: its arms are taken as they are, with their titles; runs of none of them are left out.

    Raises:
        UserError: an unknown key, or no run of the study.
    """
    prefix = ""
    if study is not None:
        names = {f"{study.name}_{name}": name for name in study.arms}
        groups: dict[Any, list[RunInfo]] = {name: [] for name in study.arms}
        for run in runs:
            if run.folder.experiment in names:
                groups[names[run.folder.experiment]].append(run)
        arms = [Arm(name, tuple(same), study.arms[name].title) for name, same in groups.items() if same]
        if not arms:
            raise UserError(
                f"--study: none of these runs is of an experiment of {study.name}, such as {next(iter(names))}"
            )
    elif group_by:
        keys = {key: resolve(key, runs, "--group-by") for key in group_by}
        arms = _grouped(runs, lambda run: tuple(value(run) for value in keys.values()), list(keys))
    else:
        arms, prefix = _told_apart(runs)
    return Arms(tuple(arms), _differences(arms), prefix, _mixed(arms))


def choose_baseline(arms: Sequence[Arm], compare: Sequence[str] | None, study: Study | None) -> tuple[Arm, list[Arm]]:
    """The arm that others are held against, and these others.

    Raises:
        UserError: --compare names an arm that there is not.
    """
    by_name = {arm.name: arm for arm in arms}
    if compare:
        for name in compare:
            if name not in by_name:
                raise UserError(f"--compare {name}: no such arm; there are: {'; '.join(by_name)}")
        first, other = compare
        return by_name[first], [by_name[other]]
    first_arm = by_name.get(study.baseline, arms[0]) if study else _most_usual(arms)
    return first_arm, [arm for arm in arms if arm is not first_arm]


def _most_usual(arms: Sequence[Arm]) -> Arm:
    """The arm with the fewest departures from the values that most arms have; of several the one with most seeds.

    Of several data sets, an arm of the one that most arms are of: others cannot be held against it.
    """
    data = Counter(arm.runs[0].data for arm in arms)
    arms = [arm for arm in arms if data[arm.runs[0].data] == max(data.values())]
    differ = _differences(arms)
    usual = {key: Counter(texts.values()).most_common(1)[0] for key, texts in differ.items()}
    common = {key: value for key, (value, count) in usual.items() if count > 1}

    def rank(arm: Arm) -> tuple[int, int]:
        departures = sum(differ[key][arm.name] != value for key, value in common.items())
        return departures, -len({run.seeds for run in arm.runs})

    return min(arms, key=rank)


def _grouped(runs: Sequence[RunInfo], value: Callable[[RunInfo], tuple[str, ...]], keys: Sequence[str]) -> list[Arm]:
    groups: dict[tuple[str, ...], list[RunInfo]] = {}
    for run in runs:
        groups.setdefault(value(run), []).append(run)
    order = sorted(groups, key=lambda values: [_ordered(word) for word in values])
    return [
        Arm(", ".join(f"{key.rpartition('.')[2]}={word}" for key, word in zip(keys, values, strict=True)),
            tuple(groups[values]))
        for values in order
    ]  # fmt: skip


def _ordered(word: str) -> tuple[int, float, str]:
    """Numbers by size, then words."""
    try:
        return 0, float(word), ""
    except ValueError:
        return 1, 0.0, word


def _told_apart(runs: Sequence[RunInfo]) -> tuple[list[Arm], str]:
    """Runs of one experiment with the same options; named by the experiment and the options that tell them apart."""
    groups: dict[tuple[str, Any], list[RunInfo]] = {}
    options: dict[tuple[str, Any], dict[str, str]] = {}
    for run in runs:
        found = computing(run)
        key = (run.folder.experiment, frozenset(found.items()))
        groups.setdefault(key, []).append(run)
        options[key] = found
    experiments = list(dict.fromkeys(experiment for experiment, _ in groups))
    prefix = _common_prefix(experiments)
    arms = []
    for experiment in experiments:
        mine = [key for key in groups if key[0] == experiment]
        name = experiment.removeprefix(prefix)
        for key, words in zip(mine, _names([options[key] for key in mine]), strict=True):
            arms.append(Arm(", ".join([*([name] if len(experiments) > 1 or not words else []), *words]),
                            tuple(groups[key])))  # fmt: skip
    return arms, prefix


def _names(options: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """For each of several configurations, words that tell it apart from the others; none for a single one.

    The same few options for all where that does it, as in a grid; else each one's departures from the usual values, as
    where one thing after another was tried.
    """
    if len(options) == 1:
        return [[]]
    differing = {key for found in options for key in found if len({one.get(key) for one in options}) > 1}
    keys = sorted(differing, key=lambda key: (key.count("."), len(key), key))
    for count in range(1, _NAMED_BY + 1):
        for chosen in combinations(keys[:_TRIED], count):
            told = [[_word(key, found.get(key, "-")) for key in chosen] for found in options]
            if len(set(map(tuple, told))) == len(options):
                return _without_usual(told)
    usual = {key: Counter(found.get(key) for found in options).most_common(1)[0][0] for key in keys}
    names = []
    for found in options:
        own = [key for key in keys if found.get(key) != usual[key]]
        own = [key for key in own if not any(short(key).startswith(f"{short(other)}.") for other in own)]
        words = [_word(key, found.get(key, "-")) for key in own]
        names.append([*words[:_NAMED_BY], *(["..."] if len(words) > _NAMED_BY else [])] or ["usual options"])
    seen: Counter[str] = Counter()
    for words in names:
        seen[text := str(words)] += 1
        if seen[text] > 1:
            words.append(f"({seen[text]})")
    return names


def _without_usual(names: Sequence[Sequence[str]]) -> list[list[str]]:
    """The same names without the words that most of them have, as far as they stay distinct and none is empty."""
    kept = [list(words) for words in names]
    for word, count in Counter(word for words in names for word in words).most_common():
        shorter = [[one for one in words if one != word] for words in kept]
        if 2 * count > len(names) and all(shorter) and len(set(map(tuple, shorter))) == len(names):
            kept = shorter
    return kept


def _word(key: str, value: str) -> str:
    if len(value) > _DIGITS + 2:
        with suppress(ValueError):
            value = f"{float(value):.{_DIGITS}g}"
    return f"{short(key).rpartition('.')[2]}={value}"


def _common_prefix(names: Sequence[str]) -> str:
    """`editing_elpv_` of experiments that all begin so, unless one would have no name left."""
    if len(names) < 2:
        return ""
    first, last = min(names), max(names)
    same = (k for k, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    common = first[: next(same, min(len(first), len(last)))]
    end = max(common.rfind(mark) for mark in "_-") + 1
    return common[:end] if all(len(name) > end for name in names) else ""


def _differences(arms: Sequence[Arm]) -> dict[str, dict[str, str]]:
    """By option, values by arm, where the arms do not all have one and the same."""
    values: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for arm in arms:
        for run in arm.runs:
            for key, value in computing(run).items():
                if value not in values[key][arm.name]:
                    values[key][arm.name].append(value)
    found = {}
    for key in sorted(values):
        texts = {arm.name: ", ".join(values[key].get(arm.name, ["-"])) for arm in arms}
        if len(set(texts.values())) > 1:
            found[short(key)] = texts
    return _without_empty_parents(found)


def _without_empty_parents(differ: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """`data.synthetic: None` goes into `data.synthetic.path`, which other arms have in its place."""
    found = {key: dict(texts) for key, texts in differ.items()}
    for key, texts in differ.items():
        children = [other for other in differ if other.startswith(f"{key}.")]
        if children and set(texts.values()) <= {"None", "-"}:
            for child in children:
                found[child] = {arm: texts[arm] if text == "-" else text for arm, text in found[child].items()}
            del found[key]
    return found


def _mixed(arms: Iterable[Arm]) -> list[tuple[str, str]]:
    """Arms whose runs differ in an option that says what is computed."""
    found = []
    for arm in arms:
        options = [computing(run) for run in arm.runs]
        keys = dict.fromkeys(key for one in options for key in one)
        differing = [short(key) for key in keys if len({one.get(key) for one in options}) > 1]
        if differing:
            found.append((arm.name, ", ".join(differing)))
    return found
