"""Training steps per second with and without cached latents, and peak memory; see `anomaly_diffusion.py`."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from generator.subject import DEVICE, Subject, clock, jobs_of, trainer_of
from lit_defect.tasks import AnomalyDiffusion, LatentDiffusion
from lit_defect.tasks.views import unit_range, view

WARM = 3  # steps before the clock starts
VARIANTS = 2  # of the bank; how many they are changes nothing in a step
PAPERS = {"lora": 0, "prompt_noise": 0.0, "min_snr_gamma": None, "mask": "bilinear", "normalised": False}


class Stopwatch(Callback):
    """When the fit begins, when its first step does, and when each ends."""

    def __init__(self) -> None:
        self.begun = self.first = 0.0
        self.ends: list[float] = []

    def on_fit_start(self, *_: Any) -> None:
        self.begun = clock()

    def on_train_start(self, *_: Any) -> None:
        self.first = clock()

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(clock())

    @property
    def rate(self) -> float:
        """Steps per second."""
        return (len(self.ends) - WARM) / (self.ends[-1] - self.ends[WARM - 1])


class Fewer(Callback):
    """Leaves only so many training pictures: enough for a few steps."""

    def __init__(self, count: int) -> None:
        self.count = count

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        trainer.datamodule.samples["train"] = trainer.datamodule.samples["train"][: self.count]


class EncodedAnew(AnomalyDiffusion):
    """The autoencoder sees every picture in every step; pictures in memory as they come from the cache."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        shots, self.data.serve_images = self._shots["train"], True
        order = sorted(shots.row_of, key=lambda index: shots.row_of[index])
        self.pictures = self.data.loader("train").batch(order)["image"]  # (n, 3, H, W) uint8
        self.data.serve_images = False

    def _loss(self, *args: Any) -> Tensor:
        shots, rows, views = args
        seen = unit_range(self.pictures[rows].to(self.device))
        seen = torch.stack([view(image[None], v)[0] for image, v in zip(seen, views.tolist(), strict=True)])
        with torch.no_grad():
            moments = self.network.moments(2 * seen - 1)
        masks, pairs = shots.masks[rows, views][:, None], shots.pairs[rows]
        fresh = shots._replace(moments=moments[:, None].cpu(), masks=masks, pairs=pairs)
        return super()._loss(fresh, torch.arange(len(rows)), torch.zeros_like(rows))


def fitted(task: Any, data: Any, steps: int, *callbacks: Callback) -> Stopwatch:
    """Train so many steps, leaving nothing behind."""
    watch = Stopwatch()
    with TemporaryDirectory() as folder:
        trainer = trainer_of(
            callbacks=[*callbacks, watch], fast_dev_run=steps, gradient_clip_val=1.0, default_root_dir=folder
        )
        trainer.fit(task, datamodule=data)
    return watch


def compare_training(subject: Subject, folder: Path, options: Any) -> None:
    steps = WARM + options.steps
    served = {"batches_per_epoch": steps, "val_fraction": 0.0}
    learnt = subject.task()
    learnt.configure_model()
    unet, vae = learnt.network.unet.config, folder / "vae"
    learnt.network.vae.save_pretrained(vae)
    heads = unet.attention_head_dim if isinstance(unet.attention_head_dim, int) else unet.attention_head_dim[0]
    sizes = {"channels": tuple(unet.block_out_channels), "layers": unet.layers_per_block,
             "text_width": unet.cross_attention_dim, "heads": heads}  # fmt: skip
    few = max(64, 2 * subject.data["batch_size"])

    def shots(kind: type[AnomalyDiffusion], **changes: Any) -> Stopwatch:
        return fitted(subject.task(kind, **changes), subject.parts(**served), steps)

    def whole(variants: int | None) -> Stopwatch:
        task = LatentDiffusion(autoencoder=str(vae), variants=variants, **sizes)
        return fitted(task, subject.parts(**served, setting="one_class"), steps, Fewer(few))

    contestants: dict[str, tuple[Callable[[], Stopwatch], Callable[[], Stopwatch]]] = {
        "AnomalyDiffusion": (lambda: shots(AnomalyDiffusion), lambda: shots(EncodedAnew)),
        "AnomalyDiffusion, the paper's options": (
            lambda: shots(AnomalyDiffusion, **PAPERS),
            lambda: shots(EncodedAnew, **PAPERS),
        ),
        "LatentDiffusion, bank or variants null": (lambda: whole(VARIANTS), lambda: whole(None)),
    }
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    prepared: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(options.rounds):
        for name, (once, always) in contestants.items():
            first, second = once(), always()
            rates[name].append((first.rate, second.rate))
            prepared[name].append(first.first - first.begun)
    print(f"{options.steps} steps a turn, {options.rounds} turns, batches of {subject.data['batch_size']}\n")
    print("| training | steps/s, encoded once | steps/s, encoding in each step | times | lowest, highest | before, s |")
    print("|---|---|---|---|---|---|")
    for name, turns in rates.items():
        once, always = (statistics.median(column) for column in zip(*turns, strict=True))
        ratios = [first / second for first, second in turns]
        print(f"| {name} | {once:.2f} | {always:.2f} | {statistics.median(ratios):.2f} "
              f"| {min(ratios):.2f}, {max(ratios):.2f} | {statistics.median(prepared[name]):.1f} |")  # fmt: skip
    print(f"\nThe bank is that of {few} pictures in {VARIANTS} variants.\n", flush=True)


# --- memory ---


def forget_peak() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew


def memory() -> dict[str, float]:
    """MB now and at the peak, of the process and of the GPU (0 without one)."""
    status = Path("/proc/self/status").read_text()
    now, peak = (int(status.split(key)[1].split()[0]) / 1024 for key in ("VmRSS:", "VmHWM:"))
    gpu = torch.cuda.max_memory_allocated() / 2**20 if DEVICE.type == "cuda" else 0.0
    return {"now": now, "peak": peak, "gpu": gpu}


def training_case(kind: type[AnomalyDiffusion], **changes: Any) -> Callable[[Subject, Path, Any], dict[str, float]]:
    def run(subject: Subject, folder: Path, options: Any) -> dict[str, float]:
        before = {}

        class Look(Callback):
            def on_train_start(self, *_: Any) -> None:
                forget_peak()
                before.update(memory())

        fitted(subject.task(kind, **changes), subject.parts(batches_per_epoch=WARM), WARM, Look())
        after = memory()
        return {"before": before["now"], "peak": after["peak"], "gpu": after["gpu"]}

    return run


def generating_case(**arm: Any) -> Callable[[Subject, Path, Any], dict[str, float]]:
    def run(subject: Subject, folder: Path, options: Any) -> dict[str, float]:
        task = subject.ready()
        (group,) = jobs_of(task, options.batch, options.batch)
        maker = subject.maker(task, folder, arm)
        forget_peak()
        before = memory()["now"]
        maker.make(group)
        after = memory()
        return {"before": before, "peak": after["peak"], "gpu": after["gpu"]}

    return run


# Memory does not depend on how many steps there are.
CASES = {
    "training step": training_case(AnomalyDiffusion),
    "training step, encoding in it": training_case(EncodedAnew),
    "training step, the paper's options": training_case(AnomalyDiffusion, **PAPERS),
    "generating, fast": generating_case(),
    "generating, fast, no re-weighting": generating_case(reweight="off"),
    "generating, paper": generating_case(preset="paper", steps=8),
    "generating, paper, no re-weighting": generating_case(preset="paper", steps=8, reweight="off"),
}


def compare_memory(subject: Subject, folder: Path, options: Any) -> None:
    print(f"Batches of {subject.data['batch_size']} to train, groups of {options.batch} pictures to generate\n")
    gpu = DEVICE.type == "cuda"
    print(f"| what | before, MB | peak, MB | growth, MB |{' GPU, MB |' * gpu}\n|---|---|---|---|{'---|' * gpu}")
    for name in CASES:
        command = [sys.executable, sys.argv[0], *sys.argv[1:], "--case", name]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        cells = [found["before"], found["peak"], found["peak"] - found["before"], *([found["gpu"]] if gpu else [])]
        print(f"| {name} | {' | '.join(f'{cell:.0f}' for cell in cells)} |", flush=True)
    print()
