"""What several processes cost and bring: weak scaling from 1 to 2, and Lightning's and our overhead over a plain loop.

    python benchmarks/scaling.py [--repeats 3] [--steps 60] [--network tf_efficientnet_lite0 --size 128 --batch 8]
    python benchmarks/scaling.py --paper      # the cost model of experiments/SCALING.md, for 8, 64 and 512 GPUs

Contestants train the same network by AdamW: a loop of 20 lines around DistributedDataParallel and a bare
LightningModule in a Trainer on random pictures in memory, our command line on ELPV from its cache. Each process has one
thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
FIRST = 10  # steps that are not counted
CONTESTANTS = {"plain": "plain loop", "lightning": "bare Trainer", "ours": "command line"}


# ---- contestants: each prints its seconds per step, as seen by rank 0 --------------------------------------------


def images(options: argparse.Namespace):
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (256, 3, options.size, options.size), dtype=torch.uint8, generator=generator)


def network(options: argparse.Namespace):
    import timm

    return timm.create_model(options.network, num_classes=2)


def plain(options: argparse.Namespace) -> None:
    import torch
    import torch.distributed as distributed
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    model, pictures = network(options).to(memory_format=torch.channels_last), images(options)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        distributed.init_process_group("gloo")
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    labels, stamps = torch.arange(options.batch) % 2, []
    for step in range(FIRST + options.steps + 1):
        stamps.append(time.perf_counter())
        rows = torch.arange(step * options.batch, (step + 1) * options.batch) % len(pictures)
        batch = (pictures[rows].float() / 255).contiguous(memory_format=torch.channels_last)
        loss = torch.nn.functional.cross_entropy(model(batch), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    tell(stamps)
    if distributed.is_initialized():
        distributed.destroy_process_group()


def lightning(options: argparse.Namespace) -> None:
    import torch
    from lightning.pytorch import LightningModule, Trainer
    from torch.utils.data import DataLoader, TensorDataset

    torch.set_num_threads(1)

    class Bare(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network(options).to(memory_format=torch.channels_last)

        def training_step(self, batch, _):
            pictures, labels = batch
            pictures = (pictures.float() / 255).contiguous(memory_format=torch.channels_last)
            return torch.nn.functional.cross_entropy(self.network(pictures), labels)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    count = int(os.environ.get("WORLD_SIZE", 1))
    pictures = images(options).repeat(1 + (FIRST + options.steps) * options.batch * count // 256, 1, 1, 1)
    data = TensorDataset(pictures, torch.arange(len(pictures)) % 2)
    stamps = stamping()
    trainer = Trainer(
        accelerator="cpu", devices=count, strategy="ddp" if count > 1 else "auto", max_steps=FIRST + options.steps + 1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[stamps],
    )  # fmt: skip
    trainer.fit(Bare(), DataLoader(data, batch_size=options.batch))
    tell(stamps.times)


def ours(options: argparse.Namespace) -> None:
    import torch

    from lit_defect.cli import main

    torch.set_num_threads(1)
    count = int(os.environ.get("WORLD_SIZE", 1))
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = [
            "lit_defect", "fit", "--model", "DefectClassifier", "--model.backbone", options.network,
            "--model.weights", "null", "--model.transfer", "all", "--model.augment", "none", "--data", "ELPV",
            "--data.cache", "disk",
            "--data.image_size", str(options.size), "--data.batch_size", str(options.batch), "--data.leakage", "off",
            "--trainer.accelerator", "cpu", "--trainer.devices", str(count),
            "--trainer.strategy", "ddp" if count > 1 else "auto", "--trainer.max_epochs", "1", "--wandb", "off",
            "--trainer.limit_val_batches", "0", "--trainer.limit_train_batches", str(FIRST + options.steps + 1),
            "--trainer.callbacks+=scaling.Stamps", "--runs_dir", folder, "--run_id", f"torchrun{os.getppid()}",
        ]  # fmt: skip
        main()
    tell(STAMPS)


def reduce(options: argparse.Namespace) -> None:
    """Seconds to sum gradients of 1, 10 and 100 MB over the processes."""
    import torch
    import torch.distributed as distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    found = {}
    for megabytes in (1, 10, 100):
        gradients, times = torch.ones(megabytes * 250_000), []
        for _ in range(FIRST + 10):
            distributed.barrier()
            began = time.perf_counter()
            distributed.all_reduce(gradients)
            times.append(time.perf_counter() - began)
        found[megabytes] = statistics.median(times[FIRST:])
    if int(os.environ["RANK"]) == 0:
        print("STEP " + json.dumps(found), flush=True)
    distributed.destroy_process_group()


STAMPS: list[float] = []


def stamping():
    from lightning.pytorch import Callback

    class Times(Callback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_train_batch_start(self, *_):
            self.times.append(time.perf_counter())

    return Times()


def tell(stamps: list[float]) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        steps = [later - before for before, later in zip(stamps[FIRST:-1], stamps[FIRST + 1 :], strict=True)]
        print("STEP " + json.dumps(statistics.median(steps)), flush=True)


# ---- the measurement --------------------------------------------------------------------------------------------


def measure(contestant: str, processes: int, options: argparse.Namespace) -> Any:
    """Median seconds of a step; of `reduce`, by megabytes."""
    words = [str(HERE), "--contestant", contestant, "--steps", str(options.steps), "--network", options.network]
    words += ["--size", str(options.size), "--batch", str(options.batch)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}:{HERE.parent.parent}"}
    found = subprocess.run([*launch, *words], env=environment, capture_output=True, text=True)
    lines = [line for line in found.stdout.splitlines() if line.startswith("STEP ")]
    if not lines:
        raise SystemExit(found.stdout[-2000:] + found.stderr[-3000:])
    return json.loads(lines[-1].removeprefix("STEP "))


def main() -> None:
    options = arguments()
    if options.paper:
        paper()
        return
    if options.contestant:
        {"plain": plain, "lightning": lightning, "ours": ours, "reduce": reduce}[options.contestant](options)
        return
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(options.repeats):
        for processes in (1, 2):
            for contestant in CONTESTANTS:
                times.setdefault((contestant, processes), []).append(measure(contestant, processes, options))
    best = {key: min(values) for key, values in times.items()}
    print(f"\n{options.network} at {options.size} pixels, {options.batch} pictures a process and step\n")
    print("| contestant | 1 process, ms a step | times plain | 2 processes | times plain | pictures/s of 2 / of 1 |")
    print("|---|---|---|---|---|---|")
    for contestant, name in CONTESTANTS.items():
        one, two = best[contestant, 1], best[contestant, 2]
        shown = (
            f"{1000 * one:.1f}",
            f"{one / best['plain', 1]:.2f}",
            f"{1000 * two:.1f}",
            f"{two / best['plain', 2]:.2f}",
        )
        print(f"| {name} | {' | '.join(shown)} | {2 * one / two:.2f} |")
    print("\nA sum over 2 processes (gloo, one machine):")
    for megabytes, seconds in measure("reduce", 2, options).items():
        print(f"- {megabytes} MB: {1000 * seconds:.1f} ms, {int(megabytes) / 1000 / seconds:.2f} GB/s")


# ---- on paper ---------------------------------------------------------------------------------------------------


SYSTEMS = {  # trained parameters in millions, forward and backward of a picture in GFLOP, pictures a GPU and step
    "VGG19, all of it, 224": (139.6, 3 * 39.3, 32),
    "lite0, all of it, 224": (3.4, 3 * 0.77, 64),
    "SimCLR, ResNet-18, 256": (11.6, 2 * 3 * 4.7, 32),
    "AnomalyDiffusion on SD 1.5": (1.0, 2 * 680.0, 4),
    "LoRA on SD 1.5": (3.2, 3 * 680.0, 4),
}
RATE, INSIDE, ACROSS, LATENCY = 150e12, 150e9, 20e9, 15e-6  # assumed: FLOP/s, bytes/s in a node and between, seconds
HOST, FEED = 5e-3, 5900  # seconds that launching a step takes (assumed); pictures/s of a process's cache (measured)


def paper() -> None:
    """Seconds of a step on N GPUs: computing, feeding, and what of the all-reduce the backward pass does not hide."""
    print("| system | GPUs | computes, ms | fed in, ms | all-reduces, ms | step, ms | pictures/s | efficiency |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (millions, work, batch) in SYSTEMS.items():
        computes, fed = max(HOST, batch * work * 1e9 / RATE), batch / FEED
        for gpus in (1, 8, 64, 512):
            sends = 0.0
            if gpus > 1:
                width = INSIDE if gpus <= 8 else ACROSS
                sends = 2 * (gpus - 1) / gpus * 4e6 * millions / width + 2 * LATENCY * gpus.bit_length()
            step = max(computes + max(0.0, sends - 0.5 * computes), fed)
            shown = " | ".join(f"{1000 * value:.1f}" for value in (computes, fed, sends, step))
            print(f"| {name} | {gpus} | {shown} | {gpus * batch / step:,.0f} | {max(computes, fed) / step:.0%} |")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="the best of so many counts")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--network", default="tf_efficientnet_lite0")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8, help="pictures a process and step")
    parser.add_argument("--paper", action="store_true", help="print the cost model")
    parser.add_argument("--contestant", choices=[*CONTESTANTS, "reduce"], help=argparse.SUPPRESS)
    return parser.parse_args()


def __getattr__(name: str):
    """`Stamps`, a Callback for the command line: Lightning is not imported before it is needed."""
    if name != "Stamps":
        raise AttributeError(name)
    from lightning.pytorch import Callback

    class Stamps(Callback):
        def on_train_batch_start(self, *_):
            sys.modules["__main__"].STAMPS.append(time.perf_counter())

    Stamps.__module__, Stamps.__qualname__ = "scaling", "Stamps"
    globals()["Stamps"] = Stamps
    return Stamps


if __name__ == "__main__":
    main()
