"""Images per second of the loader against torchvision's ImageFolder with PIL transforms in a DataLoader.

    python benchmarks/loader.py [--repeats 3]

The 1,574 training pictures of ELPV (grey PNGs of 300x300) in shuffled batches of 64, as they are and scaled to
224x224. Every contestant ends with float32 batches (64, 3, H, W) in [0, 1]; nothing is done with them. Each
has made one pass before it is timed ("first pass": decoding into memory, writing the file, starting workers).
Tensors are worked on by one thread, as in a worker. The contestants take turns; medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from lit_defect.data import ELPV
from lit_defect.tasks.views import unit_range

BATCH = 64


def ours(cache_dir: Path, image_size: int | None, cache: str, workers: int = 0) -> Iterable[dict[str, Tensor]]:
    data = ELPV(
        batch_size=BATCH,
        image_size=image_size,
        cache=cache,  # type: ignore[arg-type]
        num_workers=workers,
        cache_dir=str(cache_dir),
        leakage="off",
    )
    data.prepare_data()
    data.setup("fit")
    return data.train_dataloader()


def image_folder(root: Path, image_size: int | None, workers: int) -> Iterable[list[Tensor]]:
    steps = [transforms.Resize((image_size, image_size))] if image_size else []
    return DataLoader(
        ImageFolder(str(root), transforms.Compose([*steps, transforms.ToTensor()])),
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def one_pass(loader: Iterable[dict[str, Tensor] | list[Tensor]]) -> float:
    """Images per second."""
    begun, count = time.perf_counter(), 0
    for batch in loader:
        images = unit_range(batch["image"]) if isinstance(batch, dict) else batch[0]
        count += len(images)
    return count / (time.perf_counter() - begun)


def link_pictures(cache_dir: Path, root: Path) -> None:
    """The same training pictures as a folder per class."""
    data = ELPV(cache_dir=str(cache_dir), leakage="off")
    data.prepare_data()
    data.setup("fit")
    for sample in data.samples["train"]:
        folder = root / data.class_names[sample.label]
        folder.mkdir(parents=True, exist_ok=True)
        os.symlink(sample.path, folder / Path(sample.path).name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    print("| pictures | loader | first pass, images/s | images/s | times ImageFolder, 2 workers |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        cache, root = Path(name) / "cache", Path(name) / "pictures"
        link_pictures(cache, root)
        for size in (None, 224):
            compare(cache, root, size, repeats)


def compare(cache: Path, root: Path, size: int | None, repeats: int) -> None:
    reference = "ImageFolder, 2 workers"
    contestants: dict[str, Callable[[], Iterable]] = {
        "ImageFolder, 0 workers": lambda: image_folder(root, size, 0),
        reference: lambda: image_folder(root, size, 2),
        "ours, cache off, 0 workers (threads)": lambda: ours(cache, size, "off"),
        "ours, cache off, 2 workers": lambda: ours(cache, size, "off", 2),
        "ours, cache ram": lambda: ours(cache, size, "ram"),
        "ours, cache disk": lambda: ours(cache, size, "disk"),
    }
    loaders, first = {}, {}
    for title, make in contestants.items():
        begun = time.perf_counter()
        loaders[title] = make()
        made = time.perf_counter() - begun
        count = len(loaders[title]) * BATCH  # type: ignore[arg-type]
        first[title] = count / (made + count / one_pass(loaders[title]))
    speeds: dict[str, list[float]] = {title: [] for title in contestants}
    for _ in range(repeats):
        for title, loader in loaders.items():
            speeds[title].append(one_pass(loader))
    medians = {title: statistics.median(values) for title, values in speeds.items()}
    for title, speed in medians.items():
        ratio = speed / medians[reference]
        print(f"| {size or 'native'} | {title} | {first[title]:.0f} | {speed:.0f} | {ratio:.1f} |", flush=True)


if __name__ == "__main__":
    main()
