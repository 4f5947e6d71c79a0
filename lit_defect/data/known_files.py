"""Files that a task is told to follow: whether they are pictures or masks of the data set itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from lit_defect.data.inspection import pictures_below
from lit_defect.data.samples import Sample
from lit_defect.data.splits import some
from lit_defect.errors import DataError


class KnownFiles:
    """What a data module knows of files that are named elsewhere."""

    _divided: list[Sample]

    @property
    def divided(self) -> list[Sample]:
        """After `setup`, the data set's own samples with their splits; those that no split takes, too."""
        return self._divided

    def samples_of(self, files: Iterable[Path]) -> list[Sample]:
        """The samples, whatever their split, whose picture or mask is one of these files.

        Args:
            files: as the user has named them; a copy elsewhere is not known again.
        """
        samples: defaultdict[Path, list[Sample]] = defaultdict(list)
        for sample in self.divided:
            for file in filter(None, (sample.path, sample.mask)):
                samples[Path(file).resolve()].append(sample)
        return [sample for file in files for sample in samples.get(file.resolve(), ())]

    def learnt_from(self, folder: Path, key: str, files: Iterable[Path] | None = None) -> set[tuple[str, str]]:
        """Name and group of every picture of the data set of which a folder holds the file or the mask.

        Args:
            folder: of pictures or masks.
            key: the option that names it.
            files: those of them that are used; None for all below the folder.

        Raises:
            DataError: one of them validates or tests.
        """
        found = self.samples_of(pictures_below(folder) if files is None else files)
        if evaluated := [f"{sample.name} ({sample.split})" for sample in found if sample.split in ("val", "test")]:
            raise DataError(
                f"{key} = {folder}: {len(evaluated)} pictures or masks there are of this data set and evaluated "
                f"({some(evaluated)}): following them would tell of the test. Name a type that trains, or other files"
            )
        return {(sample.name, sample.group) for sample in found}
