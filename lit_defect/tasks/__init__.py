"""The systems, a LightningModule each."""

from lit_defect.tasks.classification import DefectClassifier
from lit_defect.tasks.contrastive import SimCLR

__all__ = ["DefectClassifier", "SimCLR"]
