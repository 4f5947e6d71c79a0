"""What `anomaly_diffusion.py` measures: a trained run, or an untrained base of the same size; and its clock."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from PIL import Image
from scipy import ndimage
from torch import Tensor

from lit_defect import data as data_modules
from lit_defect.diffusion.base_model import save_pipeline
from lit_defect.diffusion.captions import make_tokenizer, vocabulary
from lit_defect.diffusion.process import ForwardProcess
from lit_defect.generation.options import Generation
from lit_defect.runs import RunFolder
from lit_defect.tasks import AnomalyDiffusion
from lit_defect.tasks.anomaly_diffusion import SOURCES
from lit_defect.tasks.defect_generation import DefectGeneration
from lit_defect.tasks.generation_plan import Job, plan
from lit_defect.tasks.latent_diffusion import make_text_encoder, make_unet

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Options of a generation that the settings to be compared decide themselves.
SAMPLING = ("count", "preset", "sampler", "steps", "eta", "strength", "guidance", "reweight", "candidates", "output")
CHANNELS, TEXT_WIDTH, SIDE = (48, 96, 144), 64, 96  # experiments/anomaly_diffusion


@dataclass(frozen=True)
class Subject:
    """What is measured: options of AnomalyDiffusion, of its data, and what it has learnt, if it has."""

    model: dict[str, Any]
    data: dict[str, Any]
    module: str = "MVTecAD"
    generation: dict[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None

    @classmethod
    def of_run(cls, folder: Path, root: str | None) -> Subject:
        config = RunFolder(folder).config()
        if not str(config.get("model", {}).get("class_path")).endswith("AnomalyDiffusion"):
            sys.exit(f"{folder} is no run of an AnomalyDiffusion: its config.yaml does not say so")
        model = dict(config["model"]["init_args"])
        generation = {k: v for k, v in (model.pop("generation", None) or {}).items() if k not in SAMPLING}
        data = {**config["data"]["init_args"], **({"root": root} if root else {}), "leakage": "off", "num_workers": 0}
        module = config["data"]["class_path"].rpartition(".")[2]
        return cls(model, data, module, generation, RunFolder(folder).last)

    def parts(self, **changes: Any) -> Any:
        return getattr(data_modules, self.module)(**{**self.data, **changes})

    def task(self, kind: type[AnomalyDiffusion] = AnomalyDiffusion, **changes: Any) -> AnomalyDiffusion:
        return kind(**{**self.model, **changes})

    def ready(self) -> AnomalyDiffusion:
        """As `predict` has it before its first group."""
        data, task = self.parts(), self.task()
        task.trainer = trainer_of()
        task.trainer.datamodule = data  # type: ignore[attr-defined]
        data.prepare_data()
        data.setup("predict")
        task.setup("predict")
        task.configure_model()
        if self.checkpoint:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            task.on_load_checkpoint(state)
            task.load_state_dict(state["state_dict"])
        return task.to(DEVICE).eval()

    def maker(self, task: AnomalyDiffusion, root: Path, options: dict[str, Any]) -> DefectGeneration:
        return DefectGeneration(task, Generation(**{**self.generation, **options}), 0, root, SOURCES, 0)


def trainer_of(**options: Any) -> Trainer:
    accelerator = "gpu" if DEVICE.type == "cuda" else "cpu"
    return Trainer(
        accelerator=accelerator, devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip


def jobs_of(task: AnomalyDiffusion, count: int, batch: int) -> list[list[Job]]:
    """Groups of `count` jobs; the types take turns."""
    assert task.pairs is not None
    categories = [sample.category for sample in task.data.samples[SOURCES]]
    jobs = plan(task.pairs, task.pairs, categories, math.ceil(count / len(task.pairs)), 0)
    return [jobs[start : min(count, start + batch)] for start in range(0, count, batch)]


def normal_of(task: AnomalyDiffusion, job: Job) -> Any:
    """(H, W, 3) uint8 at its own size."""
    return task.data.original(SOURCES, job.source)[0]


def middle(task: AnomalyDiffusion) -> Tensor:
    """A mask (1, 1, H, W) about the middle."""
    height, width = task.data.image_size
    mask = torch.zeros(1, 1, height, width, device=task.device)
    mask[..., height // 3 : height // 2, width // 3 : width // 2] = 1
    return mask


def clock() -> float:
    """Seconds: the processor's on one thread of a CPU, which other programs disturb least, else the wall's."""
    settle()
    return time.process_time() if DEVICE.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def settle() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def counted(network: Any) -> Iterator[list[int]]:
    """Yields a list that gets the number of pictures in each call of the U-Net."""
    calls: list[int] = []
    hook = network.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    try:
        yield calls
    finally:
        hook.remove()


def untrained(folder: Path) -> Subject:
    """Drawn tiles, and a base of the size of `experiments/anomaly_diffusion/` with random weights."""
    from diffusers import AutoencoderKL

    rng = np.random.default_rng(0)
    for part, count, marks in (
        ("train/good", 64, ""),
        ("test/good", 4, ""),
        ("test/spot", 24, "spot"),
        ("test/hole", 24, "hole"),
    ):
        for number in range(count):
            picture = 130 + 25 * ndimage.gaussian_filter(rng.normal(size=(120, 120)), 1.5)
            path = folder / "data" / "tile" / part / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            if marks:
                y, x = rng.uniform(30, 90, 2)
                rows, columns = np.mgrid[:120, :120]
                mask = (rows - y) ** 2 + (columns - x) ** 2 <= rng.uniform(8, 16) ** 2
                picture[mask] += 60 if marks == "spot" else -60
                truth = folder / "data" / "tile" / "ground_truth" / marks / f"{number:03}_mask.png"
                truth.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).save(truth)
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).convert("RGB").save(path)
    torch.manual_seed(0)
    tokenizer = make_tokenizer([*vocabulary(["tile"]), "anomaly spot hole"], 32)
    levels = 3
    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(32, 64, 64), layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=SIDE,
        mid_block_add_attention=False,
    )  # fmt: skip
    save_pipeline(
        folder / "base", vae=vae, unet=make_unet(4, SIDE // 4, TEXT_WIDTH, CHANNELS, layers=1, heads=4),
        text_encoder=make_text_encoder(tokenizer, TEXT_WIDTH, layers=2, heads=4), tokenizer=tokenizer,
        process=ForwardProcess(1000, "scaled_linear", (0.00085, 0.012)), prediction="epsilon",
    )  # fmt: skip
    model = {"base": str(folder / "base"), "lora": 8, "prompt_noise": 0.1, "min_snr_gamma": 5.0,
             "pairs": [("tile", "hole"), ("tile", "spot")]}  # fmt: skip
    data = {"root": str(folder / "data"), "setting": "few_shot", "with_masks": True, "image_size": SIDE,
            "val_fraction": 0.0, "batch_size": 16, "leakage": "off"}  # fmt: skip
    return Subject(model, data, generation={"foreground": "all"})
