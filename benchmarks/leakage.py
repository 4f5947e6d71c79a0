"""Precision and recall of the leak guard on real photographs, and its speed.

    python benchmarks/leakage.py [--tiles ../shared/data/magnetic_tile] [--count 100000]

Tables, as markdown:
1. Magnetic tiles (Huang et al.): pairs against `groups.csv`, which names the part behind each photograph.
   That file parts some tiles into several groups: "looked at" joins those that the eye finds to be one tile
   (`SAME_TILE`; every two groups that the guard joins at its default were looked at). "same view": of the
   true pairs, only those whose sizes differ by at most 12 %, since a group also holds other sides of its
   part, which look different. "warned": of the pictures with a mate across a random 75/25 split, those that
   the guard names. B3 is the B-cubed precision and recall of the proposed groups (Amigo et al. 2009), looked
   at. Limits below 1 are the guard's; the others are the plain hash (143 bits: larger than the median
   coefficient) and its Hamming distance in the best of the eight orientations.
2. ELPV: the number of pairs; no truth is known. A pair of a mono- and a polycrystalline cell is surely false.
3. A mirrored copy of every picture, as JPEG of quality 75 and half the size: how many are found.
4. Time and memory for synthetic codes with planted duplicates, three quarters of them in train.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import resource
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from lit_defect.data.leakage import (
    ORIENTATIONS,
    _near_pairs,
    _whitened,
    find_leaks,
    perceptual_code,
    propose_groups,
)

DISTANCES = (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55)
BITS = (20, 24, 28, 32, 36, 40)
SAME_TILE = (
    "006 016", "010 011 013 014", "021 022", "031 032 033", "043 049", "046 047", "054 055", "057 058 059",
    "075 076", "084 085", "114 115", "118 119", "124 125", "153 154", "170 173", "204 205", "211 213",
)  # fmt: skip


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--tiles", type=Path, default=Path("../shared/data/magnetic_tile"))
    parser.add_argument("--count", type=int, default=100_000)
    arguments = parser.parse_args()
    if arguments.tiles.exists():
        tiles(arguments.tiles)
    spec = importlib.util.find_spec("elpv_dataset")
    if spec and spec.submodule_search_locations:
        elpv(Path(spec.submodule_search_locations[0]) / "data")
    speed(arguments.count)


def tiles(root: Path) -> None:
    with open(root / "groups.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    pictures = [Image.open(root / row["path"]).convert("L") for row in rows]
    codes, group = coded(pictures), np.array([row["group"] for row in rows])
    seen = group.copy()
    for line in SAME_TILE:
        seen[np.isin(group, line.split())] = line
    size = np.log([picture.size for picture in pictures])
    view = np.abs(size[:, None] - size).max(axis=2) < 0.12
    true, eye = group[:, None] == group, seen[:, None] == seen
    rng = np.random.default_rng(0)
    in_test = [rng.random(len(rows)) < 0.25 for _ in range(20)]

    def row(limit: float, near: np.ndarray) -> str:
        upper = np.triu(near, 1)
        pairs = upper.sum()
        warned = [near[t][:, ~t][true[t][:, ~t].any(axis=1)].any(axis=1).mean() for t in in_test]
        figures = [
            (upper & true).sum() / pairs,
            (upper & eye).sum() / pairs,
            (upper & true).sum() / np.triu(true, 1).sum(),
            (upper & eye & view).sum() / np.triu(eye & view, 1).sum(),
            np.mean(warned),
            *b_cubed(components(near), seen),
        ]
        return f"| {limit} | {pairs} | " + " | ".join(f"{figure:.3f}" for figure in figures) + " |"

    print(f"\n{len(rows)} magnetic tiles, {len(set(group))} groups, {np.triu(true, 1).sum()} true pairs")
    print("| limit | pairs | precision | looked at | recall | same view | warned | B3 prec. | B3 recall |")
    print("|---" * 9 + "|")
    distance = distances(codes)[0]
    for limit in DISTANCES:
        print(row(limit, distance <= limit))
    bits = hamming(codes)
    for limit in BITS:
        print(row(limit, bits <= limit))
    mirrored_copies("magnetic tiles", pictures, codes)


def elpv(root: Path) -> None:
    lines = [line.split() for line in (root / "labels.csv").read_text().splitlines()]
    pictures = [Image.open(root / line[0]).convert("L") for line in lines]
    codes, kind = coded(pictures), np.array([line[2] for line in lines])
    mixed = kind[:, None] != kind
    distance, turn = distances(codes)
    bits = hamming(codes)
    print(f"\n{len(lines)} ELPV cells")
    print("| limit | pairs | of them turned | mono with poly | pictures in a pair |\n|---|---|---|---|---|")
    for limit, near in [*((d, distance <= d) for d in DISTANCES), *((b, bits <= b) for b in BITS)]:
        upper = np.triu(near, 1)
        turned = "" if limit >= 1 else (upper & (turn > 0)).sum()
        np.fill_diagonal(near, False)
        print(f"| {limit} | {upper.sum()} | {turned} | {(upper & mixed).sum()} | {near.any(axis=1).sum()} |")
    mirrored_copies("ELPV", pictures, codes)


def mirrored_copies(title: str, pictures: list[Image.Image], codes: np.ndarray) -> None:
    count = len(pictures)
    names = [str(i) for i in range(count)] * 2
    both = np.concatenate([codes, coded(map(mirrored_jpeg, pictures))])
    leaks = find_leaks(both, names, ["train"] * count + ["test"] * count, [""] * 2 * count)
    found = {leak.name_a: leak for leak in leaks if leak.name_a == leak.name_b}
    right = sum(leak.orientation == "mirrored" for leak in found.values())
    print(f"{title}: {len(found)} of {count} mirrored copies found, {right} of them called mirrored")


def mirrored_jpeg(picture: Image.Image) -> Image.Image:
    file = io.BytesIO()
    half = picture.resize((picture.width // 2, picture.height // 2))
    half.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(file, "JPEG", quality=75)
    return Image.open(file)


def speed(count: int) -> None:
    rng = np.random.default_rng(0)
    codes = 100 * rng.normal(size=(count, 144)).astype(np.float32)
    planted, train = count // 100, count * 3 // 4
    index, sign = ORIENTATIONS["mirrored"]
    codes[train : train + planted] = codes[:planted][:, index] * sign
    names = [str(i) for i in range(count)]
    start = time.perf_counter()
    leaks = find_leaks(codes, names, ["train"] * train + ["test"] * (count - train), [""] * count)
    seconds = time.perf_counter() - start
    found = {(leak.name_a, leak.name_b) for leak in leaks}
    right = len(found & {(str(i), str(train + i)) for i in range(planted)})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\nfind_leaks, {count} pictures: {seconds:.0f} s, {right} of {planted} planted found, "
          f"{len(found) - right} others, peak memory of the process {peak:.2f} GiB")  # fmt: skip
    part = count // 5
    start = time.perf_counter()
    propose_groups(codes[:part], names[:part], [""] * part)
    print(f"propose_groups, {part} pictures: {time.perf_counter() - start:.0f} s, all pairs")


def coded(pictures: Iterable[Image.Image]) -> np.ndarray:
    return np.stack([perceptual_code(np.asarray(picture)) for picture in pictures])


def distances(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, N) distance in the best orientation, and which that is; 2 beyond the largest limit."""
    everyone = np.arange(len(codes))
    distance, turn = np.full((len(codes), len(codes)), 2.0), np.zeros((len(codes), len(codes)), dtype=int)
    for a, b, d, t in _near_pairs(_whitened(codes), everyone, everyone, max(DISTANCES)):
        distance[a, b], turn[a, b] = d, t
    return distance, turn


def hamming(codes: np.ndarray) -> np.ndarray:
    """(N, N) bits in which the plain hashes differ, in the best orientation."""
    first = hashed(codes)
    return np.min([(143 - first @ hashed(codes[:, i] * s).T) / 2 for i, s in ORIENTATIONS.values()], axis=0)


def hashed(codes: np.ndarray) -> np.ndarray:
    low = codes[:, 1:]
    return np.where(low > np.median(low, axis=1, keepdims=True), 1, -1).astype(np.float32)


def components(near: np.ndarray) -> np.ndarray:
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    return connected_components(coo_matrix(near), directed=False)[1]


def b_cubed(found: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    a, b = found[:, None] == found, true[:, None] == true
    both = (a & b).sum(axis=1)
    return float((both / a.sum(axis=1)).mean()), float((both / b.sum(axis=1)).mean())


if __name__ == "__main__":
    main()
