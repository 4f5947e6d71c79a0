"""Defective pictures made of normal ones."""

from lit_defect.anomalies.base import PseudoAnomalies, PseudoAnomaly, explain_rejection
from lit_defect.anomalies.cutpaste import CutPaste, CutPaste3Way, CutPasteScar
from lit_defect.anomalies.local import LocalPseudoAnomaly
from lit_defect.anomalies.mixed import MixedAnomaly
from lit_defect.anomalies.perlin import PerlinAnomaly
from lit_defect.anomalies.poisson import PoissonPatch
from lit_defect.anomalies.ssim import ssim, ssim_map

__all__ = [
    "CutPaste",
    "CutPaste3Way",
    "CutPasteScar",
    "LocalPseudoAnomaly",
    "MixedAnomaly",
    "PerlinAnomaly",
    "PoissonPatch",
    "PseudoAnomalies",
    "PseudoAnomaly",
    "explain_rejection",
    "ssim",
    "ssim_map",
]
