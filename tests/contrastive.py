"""A small SimCLR with small data and a quiet trainer, as the tests of the task use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule, Trainer, seed_everything

from lit_defect.data import MVTecAD
from lit_defect.tasks import SimCLR
from tests.fakes import make_mvtec

PIXEL = {"aupro", "pixel_auroc", "pixel_average_precision", "pixel_f1_max"}
SMALL_TASK = {"backbone": "test_resnet", "neighbours": 3, "map_dimensions": 8, "projection": (16, 8), "lr": 0.01}
SMALL_DATA = {"image_size": 32, "batch_size": 4, "leakage": "off", "with_masks": True}


def make_tile(root: Path) -> Path:
    """15 good pictures to train on, 5 good and 8 defective ones to test with."""
    return make_mvtec(root, train_good=15, test_good=5, defects={"crack": 4, "hole": 4})


def make_data(root: Path, **settings: Any) -> MVTecAD:
    return MVTecAD(str(root), **{**SMALL_DATA, **settings})


def make_task(kind: type[SimCLR] = SimCLR, **settings: Any) -> SimCLR:
    return kind(**{**SMALL_TASK, **settings})


def make_trainer(epochs: int = 1, **settings: Any) -> Trainer:
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler"),
        False,
    )
    return Trainer(accelerator="cpu", max_epochs=epochs, num_sanity_val_steps=0, **quiet, **settings)


def fit(task: SimCLR, data: LightningDataModule, **settings: Any) -> Trainer:
    seed_everything(0, verbose=False)
    trainer = make_trainer(**settings)
    trainer.fit(task, datamodule=data)
    return trainer


def scores_of(task: SimCLR) -> dict[str, np.ndarray]:
    return task._evaluation.scores
