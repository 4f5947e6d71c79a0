"""Data modules: one for each layout on disk, all with the same batches, checks, splits and loaders."""

from lit_defect.data.elpv import ELPV
from lit_defect.data.module import DefectDataModule

__all__ = ["ELPV", "DefectDataModule"]
