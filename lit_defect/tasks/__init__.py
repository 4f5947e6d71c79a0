"""The systems, a LightningModule each."""

from lit_defect.tasks.anomaly_diffusion import AnomalyDiffusion
from lit_defect.tasks.classification import DefectClassifier
from lit_defect.tasks.contrastive import SimCLR
from lit_defect.tasks.diffusion_lora import StableDiffusionLoRA
from lit_defect.tasks.editing import StableDiffusionEditor
from lit_defect.tasks.image_autoencoder import ImageAutoencoder
from lit_defect.tasks.label_autoencoder import MaskAutoencoder
from lit_defect.tasks.latent_diffusion import LatentDiffusion
from lit_defect.tasks.localization import AnomalyLocalizer
from lit_defect.tasks.mask_diffusion import MaskDiffusion
from lit_defect.tasks.refinement import DDPMRefiner
from lit_defect.tasks.segmentation import Segmenter

__all__ = [
    "AnomalyDiffusion",
    "AnomalyLocalizer",
    "DDPMRefiner",
    "DefectClassifier",
    "ImageAutoencoder",
    "LatentDiffusion",
    "MaskAutoencoder",
    "MaskDiffusion",
    "Segmenter",
    "SimCLR",
    "StableDiffusionEditor",
    "StableDiffusionLoRA",
]
