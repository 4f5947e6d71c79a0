"""ELPV: 2,624 electroluminescence photographs of solar cells, 300 x 300 grey, each with a defect probability.

From the pip package `elpv-dataset`; the pictures are licensed CC BY-NC-SA 4.0 (not for commercial use).
Sources: Buerhop-Lutz et al., "A Benchmark for Visual Identification of Defective Solar Cells in
Electroluminescence Imagery", EU PVSEC 2018; Deitsch et al., "Automatic classification of defective
photovoltaic module cells in electroluminescence images", Solar Energy 2019.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from lit_defect.data.module import DefectDataModule
from lit_defect.data.samples import Sample
from lit_defect.errors import DataError

GRADES = ("good", "defective 1/3", "defective 2/3", "defective")  # probability 0, 1/3, 2/3, 1


class ELPV(DefectDataModule):
    """Solar cells, 75 % for training and 25 % for the test, stratified by grade and cell type.

    Args:
        grades: `binary` calls a cell defective from probability 0.5 on; `extremes` leaves out the cells between, so
            that good is 0 and defective is 1; `four` keeps the four grades.
        cells: use monocrystalline cells, polycrystalline cells, or both.
        setting: `one_class` trains and validates on good cells only. The defective cells that `supervised` trains or
            validates on are then not used, as some show what others in the test show; the test split is the same.
    """

    def __init__(
        self,
        *,
        grades: Literal["binary", "four", "extremes"] = "binary",
        cells: Literal["both", "mono", "poly"] = "both",
        setting: Literal["supervised", "one_class"] = "supervised",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.grades = grades
        self.cells = cells
        self.setting = setting

    @property
    def class_names(self) -> list[str]:
        """Good first."""
        return list(GRADES) if self.grades == "four" else ["good", "defective"]

    @property
    def normal_class(self) -> int:
        """Good cells: probability 0 (with `binary`, also 1/3)."""
        return 0

    @property
    def good_only(self) -> bool:
        """Whether the setting is `one_class`."""
        return self.setting == "one_class"

    def label_of(self, defect_type: str) -> int | None:
        """Of a grade; with `binary`, "defective 1/3" is good."""
        return self._label(GRADES.index(defect_type)) if defect_type in GRADES else None

    def _label(self, grade: int) -> int | None:
        """Label of grade 0 to 3; None if it is left out."""
        if self.grades == "extremes" and grade in (1, 2):
            return None
        return grade if self.grades == "four" else int(grade >= 2)

    def find_samples(self) -> list[Sample]:
        """`category` is the cell type, `defect_type` the grade.

        Raises:
            DataError: the package is not installed, or its list of labels is damaged.
        """
        folder = package_folder()
        samples = []
        for number, line in enumerate((folder / "labels.csv").read_text().splitlines(), start=1):
            fields = line.split()
            try:
                name, probability, cell = fields
                grade = round(3 * float(probability))
                if not 0 <= grade <= 3 or cell not in ("mono", "poly"):
                    raise ValueError(line)
            except ValueError:
                raise DataError(
                    f"{folder / 'labels.csv'}:{number}: expected path, probability and mono or poly, "
                    f"got {line!r}. Install the package again: pip install --force-reinstall elpv-dataset"
                ) from None
            label = self._label(grade)
            if self.cells in ("both", cell) and label is not None:
                path, kind = str(folder / name), GRADES[grade]
                samples.append(Sample(path=path, name=name, label=label, category=cell, defect_type=kind))
        return samples


def package_folder() -> Path:
    """The folder of labels.csv and images/; the package's code is not imported."""
    spec = find_spec("elpv_dataset")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(place) / "data"
        if (folder / "labels.csv").is_file():
            return folder
    raise DataError("the ELPV photographs are not here. Install them (90 MB): pip install elpv-dataset")
