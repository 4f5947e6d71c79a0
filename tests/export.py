"""Tiny trained runs of each kind, and what an exported model says of a picture, found without the code that exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import timm
import torch
import yaml
from PIL import Image

from lit_defect.export import main
from tests.contrastive import SMALL_TASK
from tests.fakes import make_mvtec, save, surface
from tests.segmentation import TINY_SEGMENTER, command

SIZES = ((32, 32), (30, 44), (61, 20), (90, 71))  # of new pictures
SERVED = {"class_path": "MVTecAD", "leakage": "off", "batch_size": 8, "image_size": 32, "with_masks": True}
CLASSIFIER = {"class_path": "DefectClassifier", "backbone": "test_resnet", "weights": None, "lr": 0.003}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "binary": (
        {**CLASSIFIER, "transfer": "all", "augment": "flips", "average_views": True},
        {"setting": "supervised", "val_fraction": 0.3},
    ),
    "types": ({**CLASSIFIER, "weights": "weights.pth", "transfer": "head", "image_size": [24, 28], "monitor": None},
              {"setting": "supervised", "target": "type", "image_size": None, "val_fraction": 0.0}),
    "gaussian": ({"class_path": "SimCLR", **SMALL_TASK, "pose": "fixed"}, {"setting": "one_class"}),
    "knn": ({"class_path": "SimCLR", **SMALL_TASK, "pose": "free", "score": "knn"}, {"setting": "one_class"}),
    "segmenter": ({"class_path": "Segmenter", **TINY_SEGMENTER}, {"setting": "supervised", "image_size": [32, 36]}),
    "localizer": ({"class_path": "AnomalyLocalizer", **TINY_SEGMENTER, "select": "val", "pixel_metrics": "off"},
                  {"setting": "supervised"}),
}  # fmt: skip


def train(folder: Path, kind: str) -> Path:
    """The run folder of a tiny run that was trained and tested, beside its data and new pictures of `SIZES`."""
    make_mvtec(folder / "data", train_good=12, test_good=6, defects={"crack": 8, "hole": 8})
    model, data = ({**part} for part in KINDS[kind])
    if model.get("weights"):
        torch.manual_seed(0)
        torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), folder / "weights.pth")
        model["weights"] = str(folder / "weights.pth")
    served = {**SERVED, **data, "root": str(folder / "data")}
    config = {
        "experiment": "tiny",
        "wandb": "off",
        "test_after_fit": True,
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "num_sanity_val_steps": 0},
        "model": {"class_path": model.pop("class_path"), "init_args": model},
        "data": {"class_path": served.pop("class_path"), "init_args": served},
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    command(folder, "fit", "--config", folder / "c.yaml", "--run_id", kind)
    rng = np.random.default_rng(1)
    for number, size in enumerate(SIZES):
        grey = surface(rng, size)
        grey[: size[0] // 2, : size[1] // 3] = 240  # a defect
        coloured = np.stack([grey, 255 - grey, grey // 2], axis=-1)
        save(grey if number % 2 else coloured, folder / "new" / f"{number}.png")
    return folder / "runs" / "tiny" / kind


def predict(run: Path) -> None:
    """Let the run itself say what it thinks of the new pictures."""
    folder = run.parents[2]
    words = ("--config", folder / "c.yaml", "--run_id", run.name, "--ckpt_path", "best")
    # Pictures of one batch have one size, and a task that resizes gets them as they are.
    command(folder, "predict", *words, "--data.predict_root", folder / "new", "--data.batch_size", "1")


def export(*words: object) -> int:
    return main([str(word) for word in words])


class Onnx:
    """An ONNX file as the factory uses it."""

    def __init__(self, path: Path) -> None:
        self.session = onnxruntime.InferenceSession(path)
        self.names = [output.name for output in self.session.get_outputs()]
        self.about = {k: json.loads(v) for k, v in self.session.get_modelmeta().custom_metadata_map.items()}

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Answers to pictures (B, H, W, 3)."""
        return dict(zip(self.names, self.session.run(None, {"pictures": pixels}), strict=True))


def read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))
