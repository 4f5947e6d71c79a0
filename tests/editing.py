"""Editings with tiny pipelines, as the tests of the task use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import seed_everything

from lit_defect.editing.options import Edit, Network
from lit_defect.tasks import StableDiffusionEditor
from tests.anomaly_diffusion import lines
from tests.contrastive import make_trainer

# A random base makes noise of a picture: quick, and all accepted while the whole mask is the label.
QUICK = {"sampler": "DDIM", "steps": 4, "strength": 0.5, "guidance": 2.0, "least_change": 0.0, "repair": False,
         "foreground": "all", "mask_blur": 0.0, "least_contrast": 0.0, "batch": 3, "prompt": "a photo of a {category} with a {type}"}  # fmt: skip


def editor(base: Path, mode: str = "inpaint", network: dict[str, Any] | None = None, **edit: Any) -> Any:
    masks = {"masks": "augmented"} if mode == "inpaint" else {}
    return StableDiffusionEditor(str(base), mode, Edit(**{**QUICK, **masks, **edit}), Network(**(network or {})))  # type: ignore[arg-type]


def edited(task: Any, data: Any, root: Path, seed: int = 0, **trainer: Any) -> list[dict[str, str]]:
    """Predict from Python into `root`; gives the lines of the manifest."""
    seed_everything(seed, verbose=False)
    task.edit = Edit(**{**vars(task.edit), "output": str(root)})
    make_trainer(default_root_dir=root.parent, **trainer).predict(task, datamodule=data, return_predictions=False)
    return lines(root / "manifest.csv")


def write_config(
    path: Path,
    base: Path,
    data: dict[str, Any],
    mode: str = "inpaint",
    network: dict[str, Any] | None = None,
    **edit: Any,
) -> Path:
    """A configuration of the same for the command line; gives its path."""
    masks = {"masks": "augmented"} if mode == "inpaint" else {}
    content = {
        "experiment": "tiny",
        "wandb": "off",
        "trainer": {"accelerator": "cpu"},
        "model": {
            "class_path": "StableDiffusionEditor",
            "init_args": {
                "base": str(base),
                "mode": mode,
                "edit": {**QUICK, **masks, **edit},
                "network": network or {},
            },
        },
        "data": data,
    }
    path.write_text(yaml.safe_dump(content))
    return path
