"""Who trains, who validates, who tests: seeded splits in which no physical part stands on both sides.

1. Samples that share a `group` are one *unit* and move together; a sample without a group is a unit.
2. What the data set's layout prescribes is kept. Where it prescribes no test split, `test_fraction` of the
   units without a prescription is drawn (or fold `fold` of `folds`); where it prescribes no validation
   split, `val_fraction` of the training units is drawn. The rest trains.
3. Generated pictures only train: none is drawn, and one whose part was drawn for validation or test is not used.
4. Every draw is stratified. Single samples: each stratum gives its share, rounded up or down, and the total
   is exact (largest remainder). Groups: greedy over many random orders, the best balance is kept. No draw
   takes the last unit of a stratum away from training.

The result depends on the set of samples and the seed, not on the order in which a disk lists them.
"""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_defect.data.drawing import draw, draw_fold
from lit_defect.data.samples import REAL, Sample
from lit_defect.errors import DataError, UserError

UNUSED = ""  # split of a sample that no split takes; written as "unused"
PRIORITY = ("test", "val", "train")  # a group that a layout spreads over splits stays in the first of these
TEST_DRAW, VAL_DRAW, SHOTS_DRAW = range(3)  # every draw has its own random stream


def assign_splits(
    samples: Sequence[Sample],
    *,
    seed: int,
    val_seed: int | None = None,
    val_fraction: float = 0.2,
    test_fraction: float = 0.25,
    folds: int | None = None,
    fold: int = 0,
    shots: int | None = None,
) -> list[Sample]:
    """Copies of the samples, in their order, with `split` set to train, val, test or `UNUSED`.

    Args:
        samples: with different names; a `split` that is set is kept.
        seed: decides every draw; not negative.
        val_seed: decides the draw of the validation split in place of `seed`; the test split is the same for all.
        val_fraction: share of the samples left after the test split; 0 draws no validation split.
        test_fraction: share of the samples without a prescribed split; 0 draws no test split.
        folds: cut the samples without a prescribed split into this many parts.
        fold: the part that is the test, from 0 on.
        shots: at most so many samples of each kind (category, label and defect type together) stay in train, from as
            many groups as possible; the others are `UNUSED`. Test and validation do not depend on it, and 5 shots
            contain the 1 shot.

    A group that the layout itself spreads over splits stays in the test (or else the validation) split:
    its training samples are `UNUSED`, with a warning.

    Raises:
        UserError: a fraction, fold or number of shots is out of range.
        DataError: names repeat, a split cannot be drawn, or a class would have no training samples.
    """
    val_seed = seed if val_seed is None else val_seed
    _check_settings(seed, val_seed, val_fraction, test_fraction, folds, fold, shots)
    _check_names(samples)
    ordered = sorted(samples, key=lambda sample: sample.name)
    levels = {kind: i for i, kind in enumerate(sorted({_kind(s) for s in ordered}, key=repr))}
    stratum = [levels[_kind(s)] for s in ordered]
    classes = np.unique([label for _, label, _ in levels], return_inverse=True)[1]

    units: defaultdict[tuple[bool, str], list[int]] = defaultdict(list)  # unit -> positions in `ordered`
    for i, sample in enumerate(ordered):
        units[bool(sample.group), sample.group or sample.name].append(i)
    members = list(units.values())
    counts = np.zeros((len(members), len(levels)), np.int64)  # (units, strata)
    for u, unit in enumerate(members):
        np.add.at(counts[u], [stratum[i] for i in unit], 1)

    prescribed = [_prescribed({ordered[i].split for i in unit}) for unit in members]
    split = np.array([name or "train" for name in prescribed], dtype=object)
    real = np.array([any(ordered[i].source == REAL for i in unit) for unit in members], bool)
    free = np.array([not name for name in prescribed], bool) & real
    if folds is not None:
        if "test" in prescribed or not free.any():
            raise UserError(
                "data.folds: this data set prescribes its test split, so there is nothing to cut into folds. "
                "Leave data.folds out."
            )
        positions = np.flatnonzero(free)
        drawn = draw_fold(counts[positions], classes, folds, fold, np.random.default_rng([seed, TEST_DRAW]))
        if not drawn.any():
            raise DataError(f"data.folds: {folds} folds of {len(positions)} groups leave fold {fold} empty.")
        split[positions[drawn]] = "test"
    elif "test" not in prescribed and free.any() and test_fraction > 0:
        rng = np.random.default_rng([seed, TEST_DRAW])
        split[_among(free, counts, classes, test_fraction, rng, "data.test_fraction")] = "test"
    training = (split == "train") & real
    if "val" not in prescribed and training.any() and val_fraction > 0:
        rng = np.random.default_rng([val_seed, VAL_DRAW])
        split[_among(training, counts, classes, val_fraction, rng, "data.val_fraction")] = "val"

    result = [UNUSED] * len(ordered)
    spread = set()
    for unit, own, name in zip(members, prescribed, split, strict=True):
        for i in unit:
            if ordered[i].source != REAL and ordered[i].split in ("", "train") and name != "train":
                continue  # made after a part that is evaluated
            if ordered[i].split in ("", own):
                result[i] = name
            else:
                spread.add(ordered[i].group)
    if spread:
        rank_zero_warn(
            f"{len(spread)} groups stand in several of the data set's own splits ({some(spread)}). "
            "They stay in the test (or else the validation) split; their other samples are not used."
        )
    if shots is not None:
        _keep_shots(ordered, stratum, result, shots, np.random.default_rng([seed, SHOTS_DRAW]))
    _check_training_classes(ordered, result)
    by_name = {sample.name: name for sample, name in zip(ordered, result, strict=True)}
    return [replace(sample, split=by_name[sample.name]) for sample in samples]


def without_defects(samples: Sequence[Sample], normal_class: int | None) -> list[Sample]:
    """The samples; defective ones of the training and validation split are `UNUSED`."""
    return [replace(s, split=UNUSED) if s.split in ("train", "val") and s.label != normal_class else s for s in samples]


def write_split(path: Path, samples: Sequence[Sample]) -> None:
    """Writes `name,split,label,group,source`, one sample a row, so that `read_split` can repeat the split."""
    rows = [(s.name, s.split or "unused", s.label, s.group, s.source) for s in sorted(samples, key=lambda s: s.name)]
    _write(path, ("name", "split", "label", "group", "source"), rows)


def read_split(path: Path, samples: Sequence[Sample]) -> list[Sample]:
    """The samples with the splits of a file by `write_split`; its other columns are for the reader only.

    Raises:
        DataError: the file is no such file, lacks a sample or names one that is not there, or puts one group
            into two splits.
    """
    _check_names(samples)
    splits: dict[str, str] = {}
    for line, row in _read(path, ("name", "split")):
        if row["split"] not in (*PRIORITY, "unused"):
            raise DataError(f"{path}:{line}: split '{row['split']}'; expected train, val, test or unused.")
        if row["name"] in splits:
            raise DataError(f"{path}:{line}: '{row['name']}' stands in the file twice.")
        splits[row["name"]] = row["split"]
    names = {sample.name for sample in samples}
    problems = [
        f"{len(odd)} samples {text} ({some(odd)})"
        for odd, text in (
            (names - splits.keys(), "of the data set are not in the file"),
            (splits.keys() - names, "of the file are not in the data set"),
        )
        if odd
    ]
    if problems:
        raise DataError(f"{path} is a split of other data: {'; '.join(problems)}.")
    result = [replace(s, split=splits[s.name] if splits[s.name] != "unused" else UNUSED) for s in samples]
    places: defaultdict[str, set[str]] = defaultdict(set)
    for sample in result:
        if sample.group and sample.split:
            places[sample.group].add(sample.split)
    torn = {group for group, where in places.items() if len(where) > 1}
    if torn:
        raise DataError(
            f"{path} puts {len(torn)} groups into several splits ({some(torn)}): the same part would be "
            "trained on and tested. Write a new split, or leave the group file out."
        )
    return result


def write_groups(path: Path, names: Sequence[str], groups: Sequence[str]) -> None:
    """Writes `path,group`, one sample a row, for `read_groups`; `names` are those of the samples."""
    _write(path, ("path", "group"), list(zip(names, groups, strict=True)))


def read_groups(path: Path, samples: Sequence[Sample], *, prefix: str = "") -> list[Sample]:
    """The samples with the groups of a CSV file `path,group`; an empty group means "a part of its own".

    `path` is a sample's name, or, for crops, that of the whole photograph. With `prefix` (a folder, such as
    `hazelnut/`) the file speaks of the samples under that folder only, by names relative to it, and its
    groups are kept apart from those of other folders. Rows without a sample are ignored.

    Raises:
        DataError: the file is no such file, names a path twice, or lacks one of the samples.
    """
    groups: dict[str, str] = {}
    for line, row in _read(path, ("path", "group")):
        if row["path"] in groups:
            raise DataError(f"{path}:{line}: '{row['path']}' stands in the file twice.")
        groups[row["path"]] = row["group"].strip()
    result, missing = [], []
    for sample in samples:
        if not sample.name.startswith(prefix):
            result.append(sample)
            continue
        name = sample.name.removeprefix(prefix)
        group = groups.get(name, groups.get(name.partition("#")[0]))
        if group is None:
            missing.append(sample.name)
        else:
            result.append(replace(sample, group=prefix + group if group else ""))
    if missing:
        raise DataError(
            f"{path} has no row for {len(missing)} samples ({some(missing)}). Add a row for each; "
            "leave its group empty if the part was photographed only once."
        )
    return result


def _kind(sample: Sample) -> tuple[str, int, str]:
    return sample.category, sample.label, sample.defect_type


def _prescribed(splits: set[str]) -> str:
    return next((name for name in PRIORITY if name in splits), "")


def _among(
    pool: np.ndarray, counts: np.ndarray, classes: np.ndarray, fraction: float, rng: np.random.Generator, key: str
) -> np.ndarray:
    """Positions of the units drawn out of `pool` (a mask); `key` names the setting if that fails."""
    positions = np.flatnonzero(pool)
    chosen = positions[draw(counts[positions], classes, fraction, rng)]
    if not chosen.size:
        raise DataError(
            f"{key}: {fraction:g} of {counts[positions].sum()} samples in {positions.size} groups cannot be "
            "drawn without taking the last group of a kind away from training. Add samples or set it to 0."
        )
    return chosen


def _keep_shots(
    samples: Sequence[Sample], stratum: Sequence[int], split: list[str], shots: int, rng: np.random.Generator
) -> None:
    """Leaves at most `shots` training samples of each stratum in `split`, taking the groups in turn."""
    lots = rng.permutation(len(samples))
    seen: Counter[tuple[int, str]] = Counter()  # samples of a group so far, by stratum
    ranked: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for i in lots:
        if split[i] == "train":
            unit = (stratum[i], samples[i].group or samples[i].name)
            ranked[stratum[i]].append((seen[unit], i))
            seen[unit] += 1
    for entries in ranked.values():
        entries.sort(key=lambda entry: entry[0])  # stable: the lot decides between groups
        for _, i in entries[shots:]:
            split[i] = UNUSED


def _check_settings(
    seed: int,
    val_seed: int,
    val_fraction: float,
    test_fraction: float,
    folds: int | None,
    fold: int,
    shots: int | None,
) -> None:
    if seed < 0:
        raise UserError(f"data.seed is {seed}; expected 0 or more.")
    if val_seed < 0:
        raise UserError(f"data.val_seed is {val_seed}; expected 0 or more.")
    for key, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 <= value < 1:
            raise UserError(f"data.{key} is {value:g}; expected at least 0 and less than 1.")
    if folds is not None and folds < 2:
        raise UserError(f"data.folds is {folds}; expected 2 or more.")
    if not 0 <= fold < (folds or 1):
        raise UserError(f"data.fold is {fold}; expected 0 to data.folds - 1 (data.folds: {folds}).")
    if shots is not None and shots < 1:
        raise UserError(f"data.shots is {shots}; expected 1 or more.")


def _check_names(samples: Sequence[Sample]) -> None:
    repeated = [name for name, times in Counter(s.name for s in samples).items() if times > 1]
    if repeated:
        raise DataError(f"{len(repeated)} samples are listed more than once ({some(repeated)}).")


def _check_training_classes(before: Sequence[Sample], split: Sequence[str]) -> None:
    """Every class that had samples to train on still has some."""
    offered = {sample.label for sample in before if sample.split in ("", "train")}
    lost = sorted(offered - {s.label for s, name in zip(before, split, strict=True) if name == "train"})
    if lost:
        raise DataError(
            f"no training samples are left of the classes with the labels {lost}: their groups all stand in "
            "other splits. Add samples of other parts, or change the splits that the data set prescribes."
        )


def some(names: Iterable[str]) -> str:
    """The first five names by alphabet, for a message."""
    ordered = sorted(names)
    return ", ".join(ordered[:5]) + (", ..." if len(ordered) > 5 else "")


def _write(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _read(path: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Line numbers and rows of a CSV file that must have these columns."""
    expected = ",".join(columns)
    path = path.expanduser()
    if not path.is_file():
        raise DataError(f"{path} is not there; expected a CSV file with the columns {expected}.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if not set(columns) <= set(reader.fieldnames or ()):
                header = ",".join(reader.fieldnames or ())
                raise DataError(f"{path}: the header is '{header}'; expected {expected}, separated by commas.")
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise DataError(f"{path} cannot be read ({problem}); expected a CSV file in UTF-8.") from problem
    for line, row in rows:
        if None in row or None in row.values():
            raise DataError(f"{path}:{line}: the row has not as many cells as the header; quote names with commas.")
    return rows
