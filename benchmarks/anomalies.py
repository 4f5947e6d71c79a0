"""Pairs of normal picture and pseudo-anomaly per second against PIL, and what SSIM threshold the gate needs.

    python benchmarks/anomalies.py [--repeats 5] [--pictures FOLDER]

Speed: batches of 32 at 256x256 (crops of scikit-image's photographs, or of the pictures of FOLDER, held in memory as
bytes). Every contestant ends with two float32 batches (32, 3, 256, 256) in [0, 1]. The PIL one is what CutPaste
reimplementations do for each picture: crop, ColorJitter on the patch, turn, paste, ToTensor of both; collated by a
DataLoader without workers (one core) or with two. Ours works on batches, with one thread or two. With a gate, PIL draws
again until scikit-image's SSIM is below the threshold, at most four times; ours tries its four at once. The contestants
take turns; medians.

Threshold: a textured disc on a plain ground with a camera's noise; the same geometry on a map of the disc says which
edits only moved ground (nothing of the disc comes or goes) and which changed the disc (in half of their area).
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data as photographs
from skimage.metrics import structural_similarity
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import functional as tv

from lit_defect.anomalies import CutPaste, CutPasteScar, LocalPseudoAnomaly, PerlinAnomaly, PoissonPatch, PseudoAnomaly
from lit_defect.anomalies.base import THRESHOLDS

BATCH, BATCHES, SIZE = 32, 4, 256


def pictures(folder: str | None, count: int, size: int) -> Tensor:
    """(count, 3, size, size) uint8."""
    if folder is None:
        names = ("astronaut", "brick", "coffee", "chelsea", "grass", "gravel", "camera", "rocket")
        sources = [Image.fromarray(getattr(photographs, name)()) for name in names]
    else:
        files = sorted(file for file in Path(folder).rglob("*") if file.suffix in (".png", ".jpg", ".bmp"))
        sources = [Image.open(files[number * len(files) // count]) for number in range(count)]
    draw, found = random.Random(0), []
    for number in range(count):
        source = sources[number % len(sources)].convert("RGB")
        side = min(source.size)
        left, top = draw.randint(0, source.width - side), draw.randint(0, source.height - side)
        cropped = source.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BOX)
        found.append(torch.from_numpy(np.array(cropped)).permute(2, 0, 1))
    return torch.stack(found)


def pil_cutpaste(picture: Image.Image) -> Image.Image:
    """A patch of 2 to 15 % pasted elsewhere."""
    width, height = picture.size
    area = random.uniform(0.02, 0.15) * width * height
    aspect = random.choice((random.uniform(0.3, 1), 1 / random.uniform(0.3, 1)))
    across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    left, top = random.randint(0, width - across), random.randint(0, height - down)
    patch = JITTER(picture.crop((left, top, left + across, top + down)))
    edited = picture.copy()
    edited.paste(patch, (random.randint(0, width - across), random.randint(0, height - down)))
    return edited


def pil_local(picture: Image.Image) -> Image.Image:
    """A patch of 0.5 to 15 %, turned, and pasted nearby through its mask."""
    width, height = picture.size
    area = math.exp(random.uniform(math.log(0.005), math.log(0.15))) * width * height
    aspect = math.exp(random.uniform(math.log(0.3), math.log(3.3)))
    across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    left, top = random.randint(0, width - across), random.randint(0, height - down)
    patch = JITTER(picture.crop((left, top, left + across, top + down))).convert("RGBA")
    patch = patch.rotate(random.uniform(-15, 15), expand=True, resample=Image.Resampling.BILINEAR)
    edited = picture.copy()
    place = left + random.randint(-width // 20, width // 20), top + random.randint(-height // 20, height // 20)
    edited.paste(patch, place, patch.split()[-1])
    return edited


JITTER = transforms.ColorJitter(0.1, 0.1, 0.1, 0.1)


class Pairs(Dataset):
    """PIL pictures as pairs of tensors."""

    def __init__(self, images: Tensor, edit: Callable[[Image.Image], Image.Image], threshold: float | None) -> None:
        self.pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        self.edit, self.threshold = edit, threshold

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        picture = self.pictures[number]
        edited = self.edit(picture)
        for _ in range(3):
            if self.threshold is None or similarity(picture, edited) < self.threshold:
                break
            edited = self.edit(picture)
        return tv.to_tensor(picture), tv.to_tensor(edited)


def similarity(x: Image.Image, y: Image.Image) -> float:
    unit = (np.asarray(x, dtype=np.float32) / 255, np.asarray(y, dtype=np.float32) / 255)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(*unit, channel_axis=2, data_range=1.0, **settings))


def ours(images: Tensor, make: PseudoAnomaly, threads: int) -> Callable[[], int]:
    generator = torch.Generator().manual_seed(0)

    def run() -> int:
        torch.set_num_threads(threads)
        for batch in images.split(BATCH):
            make(batch.float().div_(255), generator)
        return len(images)

    return run


def theirs(pairs: Pairs, workers: int) -> Callable[[], int]:
    loader = DataLoader(pairs, BATCH, num_workers=workers, persistent_workers=workers > 0)

    def run() -> int:
        torch.set_num_threads(1)
        return sum(len(normal) for normal, _ in loader)

    return run


def compare(title: str, contestants: dict[str, Callable[[], int]], reference: str, repeats: int) -> None:
    wall: dict[str, list[float]] = {name: [] for name in contestants}
    processor: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        run()  # starts workers, fills caches
    for _ in range(repeats):
        for name, run in contestants.items():
            begun, used = time.perf_counter(), time.process_time()
            count = run()
            wall[name].append((time.perf_counter() - begun) / count)
            processor[name].append((time.process_time() - used) / count)
    middle = {name: statistics.median(values) for name, values in wall.items()}
    for name, each in middle.items():
        # what workers use is not this process's
        used = "" if "workers" in name else f"{statistics.median(processor[name]) * 1e3:.2f}"
        print(
            f"| {title} | {name} | {used} | {each * 1e3:.2f} | {1 / each:,.0f} | {middle[reference] / each:.1f} |",
            flush=True,
        )


def speed(images: Tensor, repeats: int) -> None:
    print("| pseudo-anomaly | pipeline | processor, ms a pair | wall, ms a pair | pairs/s | times PIL, 1 core |")
    print("|---|---|---|---|---|---|")
    for title, kind, edit in (("CutPaste", CutPaste, pil_cutpaste), ("Local", LocalPseudoAnomaly, pil_local)):
        for gate, threshold in (("", None), (", gate", THRESHOLDS["image"])):
            # scikit-image is slow: a quarter of the pictures is enough for it
            pairs = Pairs(images if threshold is None else images[:BATCH], edit, threshold)
            name = "PIL" if threshold is None else "PIL and scikit-image"
            contestants = {f"{name}, 1 core": theirs(pairs, 0), f"{name}, 2 workers": theirs(pairs, 2)}
            for scope in ("off",) if threshold is None else ("image", "patch"):
                for threads in (1, 2):
                    what = f"ours, scope {scope}, {threads} thread{'s' * (threads - 1)}"
                    contestants[what] = ours(images, kind(ssim_scope=scope), threads)
            compare(f"{title}{gate}", contestants, f"{name}, 1 core", repeats)
    others = (CutPasteScar, PoissonPatch, PerlinAnomaly)
    contestants = {f"{kind.__name__}, 1 thread": ours(images, kind(ssim_scope="off"), 1) for kind in others}
    compare("others, no gate", contestants, "CutPasteScar, 1 thread", repeats)


def scenes(textures: Tensor, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Textured discs on a plain ground (B, 3, H, W) in [0, 1], and where the disc is (B, 1, H, W) bool."""
    generator = torch.Generator().manual_seed(seed)
    count, _, size, _ = textures.shape
    side = (torch.arange(size) + 0.5) / size - 0.5
    radius = 0.2 + 0.15 * torch.rand(count, 1, 1, 1, generator=generator)
    disc = side[:, None] ** 2 + side**2 < radius**2
    level = torch.tensor([0.1, 0.5, 0.9])[torch.arange(count) % 3, None, None, None]
    light = 0.05 * side * torch.rand(count, 1, 1, 1, generator=generator)  # a gentle gradient
    ground = level + light + noise / 255 * torch.randn(count, 1, size, size, generator=generator)
    scene = torch.where(disc, textures.float() / 255, ground).clamp(0, 1)
    return scene.mul(255).round().div(255), disc


def still(kind: type[PseudoAnomaly]) -> PseudoAnomaly:
    """The same geometry without a change of colour."""
    if kind is LocalPseudoAnomaly:
        return LocalPseudoAnomaly(candidates=1, ssim_scope="off", brightness=0, contrast=0, saturation=0, hue=0)
    return kind(candidates=1, ssim_scope="off", jitter=0.0)


def thresholds(folder: str | None, passes: int = 6) -> None:
    columns = ("scope", "pseudo-anomaly", "side", "noise", "ground: SSIM 5 %, median", "disc: median, 95 %", "best T")
    print("| " + " | ".join(columns) + " | default T discards |")
    print("|---|---|---|---|---|---|---|---|")
    for scope, tried in (("patch", (0.65, 0.7, 0.75, 0.8)), ("image", (0.98, 0.985, 0.99, 0.995))):
        found: dict[float, list[tuple[float, float]]] = {t: [] for t in tried}
        for kind in (LocalPseudoAnomaly, CutPaste, CutPasteScar):
            for size in (96, 256):
                textures = pictures(folder, 48, size)
                for noise in (1.0, 3.0):
                    ground, disc = measure(kind, textures, noise, scope, passes)
                    row(f"{scope} | {kind.__name__} | {size} | {noise:g}", ground, disc, THRESHOLDS[scope])
                    for t in tried:
                        found[t].append((share_above(ground, t), share_above(disc, t)))
        for t, shares in found.items():
            ground_mean, disc_mean = (statistics.mean(column) for column in zip(*shares, strict=True))
            print(
                f"| {scope} | mean at T = {t:g} | | | | | | ground {ground_mean:.0%}, disc {disc_mean:.0%} |",
                flush=True,
            )


def measure(
    kind: type[PseudoAnomaly], textures: Tensor, noise: float, scope: str, passes: int
) -> tuple[Tensor, Tensor]:
    """SSIM of the edits that only moved ground, and of those that changed the disc."""
    ground, changed = [], []
    for number in range(passes):
        images, disc = scenes(textures, noise, number)
        made = kind(candidates=1, ssim_scope=scope)(images, torch.Generator().manual_seed(number))
        # The same places on a map: what comes from the disc is white there, what comes from the ground black.
        labels = disc.expand(-1, 3, -1, -1).float()
        moved = still(kind)(labels, torch.Generator().manual_seed(number))
        covered = (made.masks & (disc | moved.masks)).flatten(1).sum(1)
        share = covered / made.masks.flatten(1).sum(1).clamp(min=1)
        ground.append(made.ssim[share == 0])
        changed.append(made.ssim[share >= 0.5])
    return torch.cat(ground), torch.cat(changed)


def share_above(values: Tensor, threshold: float) -> float:
    return (values >= threshold).float().mean().item()


def row(title: str, ground: Tensor, disc: Tensor, threshold: float) -> None:
    candidates = torch.cat((ground, disc)).tolist()
    best = max(candidates, key=lambda t: share_above(ground, t) - share_above(disc, t))
    low, middle = (ground.quantile(q).item() for q in (0.05, 0.5))
    of_disc, high = (disc.quantile(q).item() for q in (0.5, 0.95))
    discards = f"ground {share_above(ground, threshold):.0%}, disc {share_above(disc, threshold):.0%}"
    print(f"| {title} | {low:.3f}, {middle:.3f} | {of_disc:.3f}, {high:.3f} | {best:.3f} | {discards} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pictures", help="folder of pictures in place of scikit-image's")
    arguments = parser.parse_args()
    speed(pictures(arguments.pictures, BATCH * BATCHES, SIZE), arguments.repeats)
    print()
    thresholds(arguments.pictures)


if __name__ == "__main__":
    main()
