"""Milliseconds an image of the refiner, and its gain, against DenseCRF and CascadePSP on the same probability maps.

    python benchmarks/refinement.py [--sizes 64 128] [--repeats 3] [--full] [--threads 1]
    python benchmarks/refinement.py --run RUN [RUN ...] --root ROOT [--stage1 STAGE1]

Without a run: scikit-image's photographs with maps of two classes, and networks with random weights, which take the
same time as trained ones; the network of `experiments/refinement/`, or with --full the task's default. With the run
folders of trained refiners that have the same data and first stage: the run's networks on the test pictures below
ROOT, and after the times the mean IoU of an image before and after.

Every contestant gets the same pictures and probability maps and ends with class ids, (H, W) each. The refiner takes
pictures in batches of --batch, the others one by one, as their interfaces want it. The contestants take turns;
medians. A slow one is timed on as few pictures as fit into --seconds, and one whose first picture does not, on that.

DenseCRF (Krähenbühl & Koltun, NeurIPS 2011, their own code) runs with the parameters of its wrapper's README, and with
those that are best on at most 100 defective validation pictures, in a grid after Chen et al. (DeepLab, ICLR 2015).
CascadePSP (Cheng et al., CVPR 2020) has two classes; its package fetches the weights from a GitHub release: give the
file by --cascade, else weights are random and only its time is told.

Neither is a dependency of this project; those that are missing are left out:

    pip install --no-deps --target FOLDER pydensecrf2 segmentation-refinement   # and PYTHONPATH=FOLDER
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from skimage import data as photographs
from skimage import filters, transform
from torch import Tensor

from lit_defect.diffusion.presets import PRESETS
from lit_defect.errors import UserError
from lit_defect.metrics.masks import MaskCounts, confusion_of, count_masks
from lit_defect.metrics.segmentation import class_iou, compare_masks, evaluate_masks, foreground_of
from lit_defect.runs import RunFolder
from lit_defect.tasks.pixels import targets
from lit_defect.tasks.refinement import DDPMRefiner
from lit_defect.tasks.stages import first_stage
from lit_defect.tasks.views import unit_range

SMALL = {"channels": (16, 32, 64), "layers": 1, "attention": False}
PHOTOGRAPHS = ("astronaut", "brick", "coffee", "chelsea", "grass", "gravel", "camera", "rocket")
CALLS = (1, 5, 10, 25, 50, 500)
GRID_PICTURES = 100
Refine = Callable[["Pictures"], Tensor]
"""Pictures -> class ids (N, H, W)."""


@dataclass(frozen=True)
class Pictures:
    """Pictures (N, 3, H, W) in [0, 1], probabilities (N, C, H, W), true class ids (N, H, W) and what the data say."""

    images: Tensor
    maps: Tensor
    truth: Tensor
    indices: list[int]
    groups: list[str] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def first(self, count: int) -> Pictures:
        groups = None if self.groups is None else self.groups[:count]
        return Pictures(self.images[:count], self.maps[:count], self.truth[:count], self.indices[:count], groups)

    def spread(self, count: int, foreground: list[int]) -> Pictures:
        """At most `count` of those that show something to be found, evenly over all of them."""
        shows = torch.isin(self.truth, torch.tensor(foreground)).flatten(1).any(1).nonzero()[:, 0]
        rows = shows[torch.linspace(0, len(shows) - 1, min(count, len(shows))).round().long()]
        indices = [self.indices[row] for row in rows.tolist()]
        return Pictures(self.images[rows], self.maps[rows], self.truth[rows], indices)

    def bytes(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Picture (H, W, 3) uint8 and probabilities (C, H, W) float32."""
        for image, probabilities in zip(self.images, self.maps, strict=True):
            yield (255 * image).round().byte().permute(1, 2, 0).contiguous().numpy(), probabilities.numpy()


# --- the refiner ---


def refiner(model: DDPMRefiner, data: Any, batch: int) -> Refine:
    from lightning.pytorch import Trainer

    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    model.trainer = trainer  # where the task looks for the data's seed
    trainer.datamodule = data  # type: ignore[attr-defined]
    model.eval()

    @torch.inference_mode()
    def run(pictures: Pictures) -> Tensor:
        found = []
        for start in range(0, len(pictures), batch):
            part = slice(start, start + batch)
            found.append(model.refine(pictures.images[part], pictures.maps[part], pictures.indices[part]).refined)
        return torch.cat(found).argmax(1)

    return run


def steps_of(calls: int, strength: float, train_steps: int) -> int | None:
    """The steps of a whole chain of which `strength` leaves so many calls; None if there are none."""
    fitting = (n for n in range(1, train_steps + 1) if train_steps % n == 0 and int(n * strength + 1e-9) == calls)
    return next(fitting, None)


def random_refiners(calls: list[int], options: dict[str, Any], batch: int) -> dict[str, tuple[int, Refine]]:
    found = {}
    presets: tuple[Literal["paper", "fast"], ...] = ("paper", "fast")
    for preset in presets:
        for number in calls:
            steps = steps_of(number, PRESETS[preset]["strength"], 1000)
            if steps is not None:
                torch.manual_seed(0)
                model = DDPMRefiner("maps", preset, steps=steps, class_names=["background", "defect"], **options)
                model.configure_model()
                found[f"refiner, {preset}, {number} call{'s' * (number > 1)}"] = number, refiner(model, None, batch)
    print(f"Network of the refiner: {size_of(model)} parameters, random weights\n")
    return found


def trained_refiners(runs: list[RunFolder], calls: list[int], data: Any, batch: int) -> dict[str, tuple[int, Refine]]:
    found = {}
    for run in runs:
        checkpoint = run.best if run.best.is_file() else run.last
        own = DDPMRefiner.load_from_checkpoint(checkpoint, map_location="cpu")
        title = f"refiner {run.run_id}"
        print(f"{title}: {size_of(own)} parameters, {own.title}\n")
        each = own.sampler.calls * own.num_samples
        found[f"{title}, as trained, {each} call{'s' * (each > 1)}"] = each, refiner(own, data, batch)
        for number in calls:
            steps = steps_of(number, own.settings["strength"], own.process.train_steps)
            if steps is not None and (steps, 1) != (own.settings["steps"], own.num_samples):
                other = DDPMRefiner.load_from_checkpoint(checkpoint, map_location="cpu", steps=steps, num_samples=1)
                found[f"{title}, {number} call{'s' * (number > 1)}"] = number, refiner(other, data, batch)
    return found


def size_of(model: DDPMRefiner) -> str:
    assert model.denoiser is not None
    return f"{sum(parameter.numel() for parameter in model.denoiser.parameters()):,}"


# --- DenseCRF ---


@dataclass(frozen=True)
class CRF:
    """Weights and widths of the two kernels; those of the README of pydensecrf by default."""

    smooth: float = 3.0
    smooth_xy: float = 3.0
    appearance: float = 10.0
    xy: float = 80.0
    rgb: float = 13.0
    iterations: int = 5

    def __call__(self, pictures: Pictures) -> Tensor:
        return torch.stack([self.one(*pair) for pair in pictures.bytes()])

    def one(self, picture: np.ndarray, probabilities: np.ndarray) -> Tensor:
        densecrf = importlib.import_module("pydensecrf.densecrf")
        classes, height, width = probabilities.shape
        crf = densecrf.DenseCRF2D(width, height, classes)
        energy = -np.log(probabilities.clip(1e-5, 1))  # as unary_from_softmax
        crf.setUnaryEnergy(np.ascontiguousarray(energy.reshape(classes, -1), dtype=np.float32))
        if self.smooth > 0:
            crf.addPairwiseGaussian(sxy=self.smooth_xy, compat=self.smooth)
        crf.addPairwiseBilateral(sxy=self.xy, srgb=self.rgb, rgbim=picture, compat=self.appearance)
        labels = np.array(crf.inference(self.iterations)).argmax(0)
        return torch.from_numpy(labels.reshape(height, width))

    def __str__(self) -> str:
        smooth = f"{self.smooth:g} at {self.smooth_xy:g} px" if self.smooth else "none"
        return f"smoothness {smooth}, appearance {self.appearance:g} at {self.xy:g} px and {self.rgb:g} grey levels"


def best_crf(pictures: Pictures, class_names: list[str]) -> CRF:
    """The best of a grid by the mean IoU of an image."""
    begun, foreground = time.perf_counter(), foreground_of(class_names)

    def mean_iou(labels: Tensor) -> float:
        confusion = confusion_of(labels.numpy(), pictures.truth.numpy(), len(class_names))
        return float(np.nanmean(class_iou(confusion)[:, foreground]))

    smooth, appearance = ((0.0, 1.0), (3.0, 1.0), (3.0, 3.0)), (1.0, 3.0, 10.0)
    places, colours = (5.0, 20.0, 80.0), (3.0, 8.0, 20.0)
    tried = {CRF(): mean_iou(CRF()(pictures))}
    for (weight, width), strength, xy, rgb in product(smooth, appearance, places, colours):
        crf = CRF(weight, width, strength, xy, rgb)
        tried[crf] = mean_iou(crf(pictures))
    best = max(tried, key=lambda crf: tried[crf])
    print(
        f"DenseCRF, best of {len(tried)} on {len(pictures)} validation pictures, {time.perf_counter() - begun:.0f} s: "
        f"{best}; IoU there {mean_iou(pictures.maps.argmax(1)):.4f} before, {tried[CRF()]:.4f} with the usual "
        f"parameters, {tried[best]:.4f} with these\n",
        flush=True,
    )
    return best


# --- CascadePSP ---


def cascades(weights: Path | None, size: int) -> dict[str, Refine]:
    package = importlib.import_module("segmentation_refinement.main")
    with TemporaryDirectory() as name:
        folder = Path(name)
        if weights is None:
            torch.manual_seed(0)
            state = {f"module.{key}": value for key, value in package.RefinementModule().state_dict().items()}
            torch.save(state, folder / "model")
        else:
            (folder / "model").write_bytes(weights.read_bytes())
        net = package.Refiner(device="cpu", model_folder=str(folder), download_and_check_model=False)
    known = "" if weights else ", random weights"

    def run(fast: bool, longest: int) -> Refine:
        def each(pictures: Pictures) -> Tensor:
            found = []
            for picture, probabilities in pictures.bytes():
                mask = (255 * (probabilities[1] > probabilities[0])).astype(np.uint8)
                found.append(torch.from_numpy((net.refine(picture, mask, fast=fast, L=longest) > 127).astype(np.int64)))
            return torch.stack(found)

        return each

    # With random weights the local step, which looks at uncertain places, would find what it finds: left out.
    usual = {f"CascadePSP, global and local step, 900 px{known}": run(False, 900)} if weights else {}
    return {
        **usual,
        f"CascadePSP, global step, 900 px{known}": run(True, 900),
        f"CascadePSP, global step, 224 px{known}": run(True, 224),
        f"CascadePSP, global step, {size} px{known}": run(True, size),
    }


# --- pictures ---


def drawn(size: int, count: int) -> Pictures:
    """Photographs with a map that finds what is brighter than its surroundings."""
    images, maps = [], []
    for number in range(count):
        picture = np.atleast_3d(getattr(photographs, PHOTOGRAPHS[number % len(PHOTOGRAPHS)])())[..., :3]
        side = min(picture.shape[:2])
        square = transform.resize(picture[:side, :side], (size, size), anti_aliasing=True)
        grey = square.mean(2)
        margin = filters.gaussian(grey, size / 64) - filters.gaussian(grey, size / 4)
        defect = 1 / (1 + np.exp(-margin / margin.std()))
        images.append(np.broadcast_to(square, (size, size, 3)).transpose(2, 0, 1))
        maps.append(np.stack([1 - defect, defect]))
    stacked, probabilities = (torch.from_numpy(np.stack(part)).float() for part in (images, maps))
    return Pictures(stacked, probabilities, probabilities.argmax(1), list(range(count)))


def opened(run: RunFolder, root: Path, stage1: str | None) -> tuple[Any, Any]:
    """The run's data below another root, in the run's own split, and its first stage."""
    config = run.config()
    if not config:
        sys.exit(f"{run.path} holds no config.yaml: name the run folder of a refiner")
    module, _, name = config["data"]["class_path"].rpartition(".")
    given = {"root": str(root), "split_file": str(run.path / "splits.csv"), "leakage": "off", "num_workers": 0}
    data = getattr(importlib.import_module(module), name)(**{**config["data"]["init_args"], **given})
    data.prepare_data()
    data.setup("validate")
    data.setup("test")
    model = DDPMRefiner.load_from_checkpoint(run.best if run.best.is_file() else run.last, map_location="cpu")
    source = stage1 or model.stage1_source
    if source is None:
        sys.exit(f"{run.path} was trained without a first stage: name one by --stage1")
    stage = first_stage(source, model.names)
    stage.check(data, ("val", "test"))
    return data, stage


@torch.inference_mode()
def asked(data: Any, stage: Any, split: str, classes: int) -> tuple[Pictures, float]:
    """The pictures of a split with the first stage's maps, and the seconds these took."""
    parts: dict[str, list] = {"images": [], "maps": [], "truth": [], "indices": []}
    seconds = 0.0
    for batch in data.loader(split):
        images = unit_range(batch["image"])
        begun = time.perf_counter()
        maps = stage.stored(batch)
        maps = stage(images) if maps is None else maps
        seconds += time.perf_counter() - begun
        parts["images"].append(images)
        parts["maps"].append(maps)
        parts["truth"].append(targets(batch, classes))
        parts["indices"] += batch["index"].tolist()
    samples = [data.samples[split][index] for index in parts["indices"]]
    names = [sample.group or sample.name for sample in samples]
    groups = names if len(set(names)) < len(names) else None
    tensors = {key: torch.cat(parts[key]) for key in ("images", "maps", "truth")}
    return Pictures(**tensors, indices=parts["indices"], groups=groups), seconds


# --- tables ---


def compare_times(contestants: dict[str, tuple[int | None, Refine]], pictures: Pictures, options: Any) -> None:
    """Medians; the contestants take turns."""
    counts: dict[str, int] = {}
    wall: dict[str, list[float]] = {name: [] for name in contestants}
    processor: dict[str, list[float]] = {name: [] for name in contestants}
    slow = set()
    for name, (_, run) in contestants.items():
        spent, used = timed(run, pictures.first(1))
        if spent > 1000 * options.seconds:  # what a first call prepares is little beside that
            slow.add(name)
            counts[name], wall[name], processor[name] = 1, [spent], [used]
        else:
            spent, _ = timed(run, pictures.first(1))
            counts[name] = min(len(pictures), max(1, int(1000 * options.seconds / spent)))
    for _ in range(options.repeats):
        for name, (_, run) in contestants.items():
            if name not in slow:
                spent, used = timed(run, pictures.first(counts[name]))
                wall[name].append(spent)
                processor[name].append(used)
    middle = {name: statistics.median(values) for name, values in wall.items()}
    reference = middle.get("DenseCRF")
    print("| method | pictures | ms an image | processor, ms an image | ms a call | times DenseCRF's time |")
    print("|---|---|---|---|---|---|")
    for name, each in middle.items():
        calls = contestants[name][0]
        a_call = f"{each / calls:.2f}" if calls else ""
        times = f"{each / reference:.2f}" if reference else ""
        print(
            f"| {name} | {counts[name]} | {each:.1f} | {statistics.median(processor[name]):.1f} | {a_call} | {times} |"
        )
    print(flush=True)


def timed(run: Refine, pictures: Pictures) -> tuple[float, float]:
    """Milliseconds a picture, and the processor's."""
    begun, used = time.perf_counter(), time.process_time()
    run(pictures)
    spent, worked = time.perf_counter() - begun, time.process_time() - used
    return 1000 * spent / len(pictures), 1000 * worked / len(pictures)


def compare_figures(contestants: dict[str, tuple[int | None, Refine]], pictures: Pictures, names: list[str]) -> None:
    """Figures of the test pictures before and after."""
    before = counted(pictures.maps.argmax(1), pictures, names)
    first = evaluate_masks(before, names, groups=pictures.groups)
    alarms = "false_alarms" in first
    columns = ["method", "mean IoU of an image", "gain", "better / worse", "p (Wilcoxon)", "pooled IoU", "boundary IoU"]
    print(f"| {' | '.join(columns + ['false alarms'] * alarms)} |")
    print("|" + "---|" * (len(columns) + alarms))
    for name in ("first stage", *contestants):
        figures, middle = first, " |  | "
        if name != "first stage":
            after = counted(contestants[name][1](pictures), pictures, names)
            figures = evaluate_masks(after, names, groups=pictures.groups)
            gain = compare_masks(before, after, names, groups=pictures.groups)
            value, low, high = (number(gain["iou"][key], "+.4f") for key in ("value", "low", "high"))
            middle = (
                f"{value} [{low}, {high}] | {gain['better']} / {gain['worse']} | {number(gain['wilcoxon_p'], '.2g')}"
            )
        iou, pooled, boundary = (number(figures[key]["value"]) for key in ("iou", "pooled_iou", "boundary_iou"))
        last = f" {number(figures['false_alarms']['value'], '.3f')} |" if alarms else ""
        print(f"| {name} | {iou} | {middle} | {pooled} | {boundary} |{last}", flush=True)
    print(f"\n{first['n_defined']} of {first['n']} test pictures show something to be found.\n", flush=True)


def number(value: float | None, form: str = ".4f") -> str:
    """Nothing where a figure is undefined."""
    return "" if value is None else format(value, form)


def counted(labels: Tensor, pictures: Pictures, class_names: list[str]) -> MaskCounts:
    return count_masks(labels.numpy(), pictures.truth.numpy(), len(class_names))


def others(classes: int, size: int, weights: Path | None) -> dict[str, tuple[int | None, Refine]]:
    found: dict[str, tuple[int | None, Refine]] = {}
    if importlib.util.find_spec("pydensecrf"):
        found["DenseCRF"] = None, CRF()
    if importlib.util.find_spec("segmentation_refinement") and classes == 2:
        found |= {name: (None, run) for name, run in cascades(weights, size).items()}
    if len(found) < 2:
        print("Not all contestants are installed; `python benchmarks/refinement.py --help` says how.\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, nargs="+", help="run folders of trained refiners")
    parser.add_argument("--root", type=Path, help="folder of the data set of the runs")
    parser.add_argument("--stage1", help="first stage in place of the runs' own, if that has moved")
    parser.add_argument("--cascade", type=Path, help="weights of CascadePSP")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128], help="sides of the photographs")
    parser.add_argument("--calls", type=int, nargs="+", default=list(CALLS), help="network calls of the refiner")
    parser.add_argument("--full", action="store_true", help="the task's default network, without a run")
    parser.add_argument("--pictures", type=int, default=8, help="timed at most")
    parser.add_argument("--seconds", type=float, default=20, help="for one contestant's turn")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if (options.run is None) != (options.root is None):
        parser.error("--run and --root go together")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_num_threads(options.threads)
    if options.run is not None:
        with_runs(options)
        return
    for size in options.sizes:
        print(f"{size}x{size}\n")
        pictures = drawn(size, options.pictures)
        ours = random_refiners(options.calls, {} if options.full else SMALL, options.batch)
        compare_times({**others(2, size, options.cascade), **ours}, pictures, options)


def with_runs(options: Any) -> None:
    runs = [RunFolder(path) for path in options.run]
    tested = [{name for name, split in run.splits().items() if split == "test"} for run in runs]
    if any(names != tested[0] for names in tested):
        sys.exit("the runs were tested on different pictures: compare those of one split")
    data, stage = opened(runs[0], options.root, options.stage1)
    names = list(getattr(data, "mask_names", ["background", "defect"]))
    test, seconds = asked(data, stage, "test", len(names))
    side = max(test.images.shape[-2:])
    print(f"{len(test)} test pictures; the first stage takes {1000 * seconds / len(test):.1f} ms an image\n")
    rivals = others(len(names), side, options.cascade)
    if "DenseCRF" in rivals:
        validation, _ = asked(data, stage, "val", len(names))
        chosen = best_crf(validation.spread(GRID_PICTURES, foreground_of(names)), names)
        rivals = {"DenseCRF": rivals["DenseCRF"], "DenseCRF, parameters chosen": (None, chosen), **rivals}
    contestants = {**rivals, **trained_refiners(runs, options.calls, data, options.batch)}
    compare_times(contestants, test.first(options.pictures), options)
    compare_figures({name: run for name, run in contestants.items() if "random" not in name}, test, names)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
