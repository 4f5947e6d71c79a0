"""Time and memory of the pixel metrics against anomalib's, on a test set of MVTec AD's size, and how they agree.

    python benchmarks/aupro.py [--repeats 5] [--pictures 167] [--size 256] [--threads 1]

The pictures are drawn: 141 of 167 are defective, as in MVTec AD's `pill`, with one to four regions each, from a few
pixels to a tenth of the picture; the maps are smooth noise in [0, 1] with a response on most of the defects. Batches
of 32 are taken in and the figures computed, in a process of its own for each contestant: medians of the time, of the
processor's time, which other programs disturb less, and of how much the process grew above the data (Linux). The
contestants take turns.

anomalib is no dependency of this project, and asks for other versions of some. In a copy of the environment:

    pip install --no-deps anomalib omegaconf opencv-python-headless pandas
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from lit_defect.metrics.localization import AUPRO, BinnedPixelMetrics, PixelMetrics

BATCH = 32
REFERENCE = "anomalib AUPRO"


def ours_aupro() -> list:
    return [AUPRO()]


def ours_exact() -> list:
    return [PixelMetrics()]


def ours_binned() -> list:
    return [BinnedPixelMetrics()]


def anomalib_aupro() -> list:
    from anomalib.metrics.aupro import _AUPRO

    return [_AUPRO()]


def anomalib_all() -> list:
    from anomalib.metrics.aupr import _AUPR
    from anomalib.metrics.auroc import _AUROC
    from anomalib.metrics.f1_score import _F1Max

    return [*anomalib_aupro(), _AUROC(), _AUPR(), _F1Max()]


CONTESTANTS: dict[str, Callable[[], list]] = {
    REFERENCE: anomalib_aupro,
    "ours, AUPRO": ours_aupro,
    "anomalib AUPRO, AUROC, AUPR, F1Max": anomalib_all,
    "ours, PixelMetrics (all four)": ours_exact,
    "ours, BinnedPixelMetrics (all four)": ours_binned,
}


def drawn(pictures: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, H, W) float32 maps in [0, 1] and bool masks."""
    rng = np.random.default_rng(0)
    maps = np.empty((pictures, size, size), dtype=np.float32)
    masks = np.zeros(maps.shape, dtype=bool)
    rows, columns = np.mgrid[:size, :size]
    for scores, mask in zip(maps, masks, strict=True):
        signal = ndimage.gaussian_filter(rng.normal(size=(size, size)), size / 40) * size / 12
        for _ in range(rng.integers(1, 5) if rng.random() < 141 / 167 else 0):
            radius = size * np.exp(rng.uniform(np.log(0.008), np.log(0.18)))
            y, x = rng.uniform(0, size, 2)
            region = (rows - y) ** 2 + ((columns - x) * rng.uniform(0.5, 2)) ** 2 <= max(radius, 1.5) ** 2
            mask |= region
            signal += ndimage.gaussian_filter(region * rng.gamma(2, 2), size / 60)
        scores[:] = 1 / (1 + np.exp(-signal / 2))
    return maps, masks


def measured(name: str, folder: Path, threads: int) -> dict[str, object]:
    """In this process: seconds, growth in MB and values of one contestant."""
    torch.set_num_threads(threads)
    maps = torch.from_numpy(np.load(folder / "maps.npy"))
    masks = torch.from_numpy(np.load(folder / "masks.npy"))
    run(CONTESTANTS[name](), maps[:BATCH], masks[:BATCH])  # what the first call imports and compiles
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak_mb()
    begun, worked = time.perf_counter(), time.process_time()
    values = run(CONTESTANTS[name](), maps, masks)
    seconds, processor = time.perf_counter() - begun, time.process_time() - worked
    return {"seconds": seconds, "processor": processor, "mb": peak_mb() - before, "values": values}


def run(metrics: list, maps: Tensor, masks: Tensor) -> list[float]:
    for start in range(0, len(maps), BATCH):
        for metric in metrics:
            metric.update(maps[start : start + BATCH], masks[start : start + BATCH])
    results = [metric.compute() for metric in metrics]
    flat = [list(result.values()) if isinstance(result, dict) else [result] for result in results]
    return [float(value) for values in flat for value in values]


def peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=167)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        print(json.dumps(measured(options.contestant, options.folder, options.threads)))
        return
    if importlib.util.find_spec("anomalib") is None:
        sys.exit("anomalib is not installed here; `python benchmarks/aupro.py --help` says how")
    with TemporaryDirectory() as name:
        maps, masks = drawn(options.pictures, options.size)
        regions = sum(ndimage.label(mask, np.ones((3, 3)))[1] for mask in masks)
        print(f"{len(maps)} maps of {options.size}x{options.size}, {regions} regions, {masks.mean():.1%} defective\n")
        np.save(Path(name) / "maps.npy", maps)
        np.save(Path(name) / "masks.npy", masks)
        compare(Path(name), options.repeats, options.threads)


def compare(folder: Path, repeats: int, threads: int) -> None:
    results: dict[str, list[dict]] = {name: [] for name in CONTESTANTS}
    for _ in range(repeats):
        for name, runs in results.items():
            command = [sys.executable, __file__, "--contestant", name, "--folder", folder, "--threads", threads]
            runs.append(json.loads(subprocess.check_output([str(word) for word in command]).splitlines()[-1]))
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in ("seconds", "processor", "mb")}
        for name, runs in results.items()
    }
    print("| metric | s | processor, s | times anomalib's AUPRO | memory, MB | AUPRO | AUROC, AP, best F1 |")
    print("|---|---|---|---|---|---|---|")
    for name, median in medians.items():
        aupro, *others = (f"{value:.7f}" for value in results[name][0]["values"])
        speed = medians[REFERENCE]["seconds"] / median["seconds"]
        times = f"{median['seconds']:.2f} | {median['processor']:.2f} | {speed:.1f}"
        print(f"| {name} | {times} | {median['mb']:.0f} | {aupro} | {', '.join(others)} |")


if __name__ == "__main__":
    main()
