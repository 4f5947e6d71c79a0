"""Which pictures trained and which were tested, from `splits.csv`; read once for runs that share it."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from lit_defect.report.collect import RunInfo
from lit_defect.reporting.study_runs import REAL


@dataclass(frozen=True)
class Splits:
    """What a `splits.csv` says.

    Attributes:
        counts: pictures by (split, label, source), where a source other than `real` has generated them.
        names: of the pictures, by split.
        groups: the part that a picture shows, by name.
    """

    counts: Mapping[tuple[str, str, str], int]
    names: Mapping[str, frozenset[str]]
    groups: Mapping[str, str]

    def count(self, split: str) -> int:
        """Real pictures of a split."""
        return sum(count for (of, _, source), count in self.counts.items() if of == split and source == REAL)

    def parts(self, split: str) -> int:
        """Parts that these pictures show."""
        return len({self.groups[name] for name in self.names.get(split, ())})


def read_splits(run: RunInfo) -> Splits | None:
    """What a run's `splits.csv` says; None where it is missing or broken."""
    try:
        return _parse((run.folder.path / "splits.csv").read_bytes())
    except (OSError, ValueError, KeyError, csv.Error):
        return None


def tested_names(run: RunInfo, stage: str) -> frozenset[str]:
    """Names of the pictures of a stage; empty where they are not known."""
    splits = read_splits(run)
    return splits.names.get("train" if stage == "mirrored" else stage, frozenset()) if splits else frozenset()


@lru_cache(maxsize=256)
def _parse(content: bytes) -> Splits:
    counts: Counter[tuple[str, str, str]] = Counter()
    names: dict[str, list[str]] = {}
    groups = {}
    for row in csv.DictReader(io.StringIO(content.decode("utf-8"), newline="")):
        name, split = row["name"], row["split"]
        if name is None or split is None:
            raise ValueError("half a line")
        counts[split, row.get("label") or "", row.get("source") or REAL] += 1
        names.setdefault(split, []).append(name)
        groups[name] = row.get("group") or name
    return Splits(counts, {split: frozenset(found) for split, found in names.items()}, groups)
