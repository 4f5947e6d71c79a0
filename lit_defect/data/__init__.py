"""Data modules: one for each layout on disk, all with the same batches, checks, splits and loaders."""

from lit_defect.data.crops import CustomCrops
from lit_defect.data.elpv import ELPV
from lit_defect.data.module import DefectDataModule
from lit_defect.data.mvtec import MVTecAD
from lit_defect.data.voc import PascalVOC

__all__ = ["ELPV", "CustomCrops", "DefectDataModule", "MVTecAD", "PascalVOC"]
