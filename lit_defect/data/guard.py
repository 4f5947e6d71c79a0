"""Honest splits: no generated picture in an evaluation, near-duplicates across splits named and shown."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, fields, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_defect.data.cache import write_whole
from lit_defect.data.images import read_image
from lit_defect.data.inspection import CheckResult, digest
from lit_defect.data.leakage import (
    MAX_DISTANCE,
    ORIENTATIONS,
    FloatArray,
    Leak,
    find_leaks,
    leak_picture,
    propose_groups,
)
from lit_defect.data.samples import REAL, Sample
from lit_defect.errors import DataError


def refuse_generated(samples: Mapping[str, Sequence[Sample]]) -> None:
    """Raises DataError if the validation or the test split holds a picture that is not real."""
    for split in ("val", "test"):
        made = [sample.name for sample in samples[split] if sample.source != REAL]
        if made:
            raise DataError(
                f"{len(made)} generated pictures are in the {split} split, such as {made[0]}. "
                "Generated pictures may only train; give their split as train."
            )


def mirrored(samples: Sequence[Sample]) -> list[Sample]:
    """The originals among the samples turned left-right, as a test split: set C of Zheng & Nagata, a leak by design.

    It says so in a warning.
    """
    rank_zero_warn(
        "data.test=mirrored_train: the test pictures are the mirrored training pictures. The result says how well the "
        "model remembers, not how well it judges new parts."
    )
    originals = [sample for sample in samples if sample.source == REAL]
    return [replace(s, mirror=not s.mirror, name=f"{s.name}#mirrored", split="test") for s in originals]


def leaks_between(samples: Sequence[Sample], checked: CheckResult, cache_dir: Path | None = None) -> list[Leak]:
    """Near-duplicates among `samples` whose splits differ, the closest first; remembered in `cache_dir`."""
    row = {(sample.path, sample.box): i for i, sample in enumerate(checked.samples)}
    codes = checked.codes[[row[sample.path, sample.box] for sample in samples]]
    index, sign = ORIENTATIONS["mirrored"]
    mirror = np.array([sample.mirror for sample in samples], dtype=bool)
    codes[mirror] = codes[mirror][:, index] * sign
    names, splits, groups = [s.name for s in samples], [s.split for s in samples], [s.group for s in samples]
    rows = remembered(
        cache_dir,
        ("leaks", MAX_DISTANCE, _hash(codes), names, splits, groups),
        lambda: [astuple(leak) for leak in find_leaks(codes, names, splits, groups)],
    )
    return [Leak(*row) for row in rows]


def warning(leaks: Sequence[Leak], samples: Sequence[Sample]) -> str:
    """How many pictures of each split show what an earlier split shows, with the closest pair as example."""
    total = Counter(sample.split for sample in samples)
    known = {(leak.name_b, leak.split_b, leak.split_a) for leak in leaks}
    counts = Counter((later, earlier) for _, later, earlier in known)
    shares = [
        f"{counts[later, earlier]} of {total[later]} {later} pictures have a near-duplicate in {earlier}"
        for earlier, later in combinations(("train", "val", "test"), 2)
        if counts[later, earlier]
    ]
    first = leaks[0]
    return (
        f"{'; '.join(shares)}, such as {first.name_a} ({first.split_a}) and {first.name_b} ({first.split_b}), "
        f"{first.orientation}. A figure is too good when the model has seen what it is tested on."
    )


def judge(leaks: Sequence[Leak], samples: Sequence[Sample], *, refuse: bool, by_design: bool) -> None:
    """Warns of the leaks between these samples, or raises DataError with `refuse`; says nothing where there are none.

    Args:
        by_design: the test pictures are the training pictures; no group file could keep them apart.
    """
    if not leaks:
        return
    if refuse:
        raise DataError(
            f"{warning(leaks, samples)} Set data.group_file to auto, or run once with data.leakage=warn and give the "
            "groups.csv of that run, mended by hand; pictures of one group stay in one split."
        )
    remedy = "" if by_design else "; data.group_file auto (or this run's groups.csv) keeps them together"
    rank_zero_warn(f"{warning(leaks, samples)} See leakage.csv and leakage.png of this run{remedy}.")


def write_leaks(folder: Path, leaks: Sequence[Leak], samples: Iterable[Sample], convert: bool) -> None:
    """Writes leakage.csv with all pairs and leakage.png with the closest."""
    write_csv(folder / "leakage.csv", [field.name for field in fields(Leak)], map(astuple, leaks))
    by_name = {sample.name: sample for sample in samples}

    def read(name: str) -> Any:
        sample = by_name[name]
        return read_image(sample.path, box=sample.box, mirror=sample.mirror, convert=convert)

    leak_picture(leaks, read).save(folder / "leakage.png")


def proposed_groups(checked: CheckResult, groups: Sequence[str], cache_dir: Path | None = None) -> list[str]:
    """A group for each checked sample that joins all near-duplicates, and keeps the known groups."""
    names = [sample.name for sample in checked.samples]
    return remembered(
        cache_dir,
        ("groups", MAX_DISTANCE, _hash(checked.codes), names, groups),
        lambda: propose_groups(checked.codes, names, groups),
    )


def remembered(cache_dir: Path | None, question: tuple[Any, ...], answer: Callable[[], list[Any]]) -> list[Any]:
    """What `answer` gives, from a file in `cache_dir` if the same question was answered before.

    Comparing 100,000 pictures with each other takes a minute or two, which not every start should pay. The question
    holds everything that the answer depends on; the file is JSON under its hash.
    """
    if cache_dir is None:
        return answer()
    file = cache_dir / f"guard-{digest(*question).hex()}.json"
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(known, list):
            return known
    except (OSError, ValueError):
        pass
    result = answer()
    with suppress(DataError):  # without write access to the folder it is answered anew each time
        write_whole(file, lambda stream: stream.write(json.dumps(result).encode()))
    return result


def _hash(codes: FloatArray) -> str:
    return hashlib.blake2b(codes.tobytes(), digest_size=16).hexdigest()


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table with a header line."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])
