"""The systems, a LightningModule each."""

from lit_defect.tasks.classification import DefectClassifier

__all__ = ["DefectClassifier"]
