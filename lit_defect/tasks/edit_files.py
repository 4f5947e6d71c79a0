"""Files that an editing is told to use: what they hold, and whether they are pictures of the data set itself."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lit_defect.data.inspection import pictures_below
from lit_defect.data.samples import Sample
from lit_defect.data.splits import some
from lit_defect.errors import DataError


def of_data_set(data: Any, files: Iterable[Path]) -> list[Sample]:
    """The samples of a data set, whatever their split, whose picture or mask is one of these files.

    Args:
        data: a data module after `setup`.
        files: as the user has named them; a copy elsewhere is not known again.
    """
    samples: defaultdict[Path, list[Sample]] = defaultdict(list)
    for sample in data.divided:
        for file in filter(None, (sample.path, sample.mask)):
            samples[Path(file).resolve()].append(sample)
    return [sample for file in files for sample in samples.get(file.resolve(), ())]


def learnt_from(data: Any, folder: Path, key: str) -> set[tuple[str, str]]:
    """Name and group of every picture of the data set of which a folder holds the file or the mask.

    Raises:
        DataError: one of them validates or tests.
    """
    found = of_data_set(data, pictures_below(folder))
    if evaluated := [f"{sample.name} ({sample.split})" for sample in found if sample.split in ("val", "test")]:
        raise DataError(
            f"{key} = {folder}: {len(evaluated)} pictures or masks there are of this data set and evaluated "
            f"({some(evaluated)}): what follows them would tell of the test. Name a type that trains, or other files"
        )
    return {(sample.name, sample.group) for sample in found}


def contents(path: Path) -> str:
    """Hash of a file, or of all files in a folder with their names; hidden ones do not count."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        name = file.relative_to(path).as_posix()
        if not any(part.startswith(".") for part in Path(name).parts):
            with file.open("rb") as stream:
                digest.update(f"{name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]
