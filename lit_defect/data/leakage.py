"""Near-duplicate pictures on both sides of a split: the leak that makes a test result too good.

1. `perceptual_code`: each picture becomes the 12 x 12 lowest DCT coefficients of its 32 x 32 area average,
   as in a perceptual hash. Its seven flips and quarter turns follow from the coefficients by changes of sign
   and a transpose, without decoding again.
2. Whitening: what all pictures of the data set share (the frame of the part, the lamp) is no sign of a
   duplicate. The cube roots of the coefficients are whitened by their covariance over the data set.
3. Two pictures are near-duplicates when the cosine between their whitened codes, in the best of the eight
   orientations, is high: distance = 1 - cosine <= 0.4. `benchmarks/leakage.py` shows how that was chosen.

`find_leaks` lists such pairs across splits, `propose_groups` joins them into groups that a split can respect,
`leak_picture` shows them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import combinations

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from threadpoolctl import threadpool_limits

from lit_defect.data.samples import SPLITS
from lit_defect.errors import DataError

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.intp]

SIDE = 32  # the picture is averaged down to SIDE x SIDE
LOW = 12  # and its LOW x LOW lowest frequencies are kept
GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601 luma
FLAT = 0.5  # grey levels; a picture whose low frequencies vary less matches none
MAX_DISTANCE = 0.4
MAX_PAIRS = 100_000  # so many of the closest pairs are kept
BLOCK = 256  # 256 x 256 cosines are computed at once: they stay in the cache
# Products so small are not worth sharing: on a busy machine BLAS threads would mostly wait for each other.
one_thread = threadpool_limits.wrap(limits=1, user_api="blas")


@dataclass(frozen=True, slots=True)
class Leak:
    """A picture `b` that shows what picture `a` of another split shows.

    Attributes:
        name_a, split_a, group_a: the picture of the earlier split (train before val before test).
        name_b, split_b, group_b: its near-duplicate.
        distance: 0 for the same picture, about 1 for unrelated ones.
        orientation: what turns `a` into `b`, one of `ORIENTATIONS`.
    """

    name_a: str
    split_a: str
    group_a: str
    name_b: str
    split_b: str
    group_b: str
    distance: float
    orientation: str


def _orientations() -> dict[str, tuple[IntArray, FloatArray]]:
    """For each orientation the (144,) index and sign that turn a code: turned = code[:, index] * sign.

    Mirroring (n -> 31 - n) negates the odd frequencies: cos(pi k (2 (31 - n) + 1) / 64) is
    (-1)^k cos(pi k (2 n + 1) / 64).
    """
    straight = np.arange(LOW * LOW).reshape(LOW, LOW)
    plain = np.ones((LOW, LOW), dtype=np.float32)
    left_right = plain * np.where(np.arange(LOW) % 2, -1, 1)
    up_down = left_right.T
    turns = {
        "same": (straight, plain),
        "mirrored": (straight, left_right),
        "upside down": (straight, up_down),
        "rotated 180": (straight, left_right * up_down),
        "transposed": (straight.T, plain),
        "rotated right": (straight.T, left_right),
        "rotated left": (straight.T, up_down),
        "anti-transposed": (straight.T, left_right * up_down),
    }
    return {name: (index.ravel(), sign.ravel().astype(np.float32)) for name, (index, sign) in turns.items()}


ORIENTATIONS = _orientations()


def perceptual_code(image: npt.NDArray[np.uint8]) -> FloatArray:
    """Low frequencies of a picture: its area average on 32 x 32, then the 2-D DCT-II, 12 x 12 of it.

    Averaging and DCT are linear, so both are one small matrix per side: C = B_H X B_W^T.

    Args:
        image: (H, W) or (H, W, 3) uint8.

    Returns:
        (144,) float32, orthonormal coefficients in grey levels, row by row; the first is the mean.

    Raises:
        DataError: if the array has another shape or type.
    """
    grey_or_colour = image.ndim in (2, 3) and image.shape[2:] in ((), (3,))
    if image.dtype != np.uint8 or not grey_or_colour or not image.size:
        raise DataError(f"a picture must be (H, W) or (H, W, 3) uint8, not {image.shape} {image.dtype}")
    height, width = image.shape[:2]
    rows = _basis(height) @ image.reshape(height, -1).astype(np.float32)  # (12, W) or (12, W * 3)
    if image.ndim == 3:
        rows = rows.reshape(LOW, width, 3) @ GREY
    return (rows @ _basis(width).T).ravel()


@lru_cache(maxsize=256)
def _basis(length: int) -> FloatArray:
    """(12, length): area average of `length` pixels onto 32 cells, then the low rows of the DCT-II."""
    edges = np.arange(SIDE + 1) * length / SIDE
    pixels = np.arange(length)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    average = np.clip(overlap, 0, None) * SIDE / length  # (32, length), every row sums to one
    k, n = np.arange(LOW)[:, None], np.arange(SIDE)
    dct = np.cos(np.pi * k * (2 * n + 1) / (2 * SIDE)) * np.sqrt(np.where(k == 0, 1, 2) / SIDE)
    return (dct @ average).astype(np.float32)


@one_thread
def find_leaks(
    codes: FloatArray,
    names: Sequence[str],
    splits: Sequence[str],
    groups: Sequence[str],
    *,
    max_distance: float = MAX_DISTANCE,
) -> list[Leak]:
    """Near-duplicates whose two pictures stand in different splits, the closest first.

    Args:
        codes: (N, 144) from `perceptual_code`; they also give the statistics for the whitening.
        names, splits, groups: N of each; the groups are only handed on, to see what a group file missed.
        max_distance: 1 - cosine of the whitened codes, from 0 (same) to 1 (unrelated).

    Returns:
        At most `MAX_PAIRS` leaks, each pair once, in its best orientation.

    Raises:
        DataError: if the arguments disagree in length.
    """
    white = _whitened(_checked(codes, names, splits, groups))
    parts = [np.flatnonzero(np.array(splits) == split) for split in dict.fromkeys([*SPLITS, *splits])]
    found: list[tuple[float, int, int, int]] = []
    for rows, columns in combinations(parts, 2):
        for a, b, distance, turn in _near_pairs(white, rows, columns, max_distance):
            found += zip(distance.tolist(), a.tolist(), b.tolist(), turn.tolist(), strict=True)
            if len(found) > 2 * MAX_PAIRS:
                found = sorted(found)[:MAX_PAIRS]
    turns = list(ORIENTATIONS)
    return [
        Leak(names[a], splits[a], groups[a], names[b], splits[b], groups[b], round(distance, 4), turns[turn])
        for distance, a, b, turn in sorted(found)[:MAX_PAIRS]
    ]


@one_thread
def propose_groups(
    codes: FloatArray, names: Sequence[str], groups: Sequence[str], *, max_distance: float = MAX_DISTANCE
) -> list[str]:
    """A group for every picture, such that no near-duplicate and no known group is divided.

    Groups are the connected components of all near-duplicates: `find_leaks` finds nothing between splits that
    respect them. A chain of pictures, each like the next (the slices of a volume), is therefore one group.

    Args:
        codes: (N, 144) from `perceptual_code`.
        names: N names; a group is called after the first of its names.
        groups: N known groups, empty where none is known.
        max_distance: as for `find_leaks`.

    Raises:
        DataError: if the arguments disagree in length.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    white = _whitened(_checked(codes, names, groups))
    count, everyone = len(names), np.arange(len(names))
    first = {group: i for i, group in reversed(list(enumerate(groups))) if group}
    part = np.array([first.get(group, i) for i, group in enumerate(groups)], dtype=np.intp)
    for start in range(0, count, BLOCK):
        near = list(_near_pairs(white, everyone[start : start + BLOCK], everyone[start:], max_distance))
        a = np.concatenate([everyone, *(pairs[0] for pairs in near)])
        b = np.concatenate([part, *(pairs[1] for pairs in near)])
        graph = coo_matrix((np.ones(len(a), dtype=bool), (a, b)), (count, count))
        label = connected_components(graph, directed=False)[1]
        part = np.unique(label, return_index=True)[1][label]  # a part is known by its first picture
    name_of = {part[i]: names[i] for i in sorted(range(count), key=lambda i: names[i], reverse=True)}
    return [name_of[p] for p in part]


def _checked(codes: FloatArray, *columns: Sequence[str]) -> FloatArray:
    if codes.shape != (len(columns[0]), LOW * LOW) or any(len(column) != len(codes) for column in columns):
        lengths = ", ".join(str(len(column)) for column in columns)
        raise DataError(f"the leak guard needs (N, 144) codes and N names; got {codes.shape} and {lengths}")
    return codes


def _whitened(codes: FloatArray) -> FloatArray:
    """(N, 144) unit vectors; zero for flat pictures, whose cosine with any other is then zero.

    The statistics are those of the data set together with its flips and turns, so that the whitened code of a
    turned picture is the turned whitened code. A prior of 144 white pictures keeps small data sets sound.
    """
    features = np.cbrt(codes)  # the lowest frequencies must not outshout the rest
    features[:, 0] = 0  # the mean is exposure
    flat = np.linalg.norm(codes[:, 1:], axis=1) < FLAT * SIDE
    features[flat] = 0
    features[~flat] /= np.linalg.norm(features[~flat], axis=1, keepdims=True)

    turns = ORIENTATIONS.values()
    mean = features.sum(axis=0, dtype=np.float64) / (len(codes) + LOW * LOW)
    features -= np.mean([mean[index] * sign for index, sign in turns], axis=0)
    scatter = (features.T @ features).astype(np.float64)
    scatter = np.mean([scatter[np.ix_(index, index)] * np.outer(sign, sign) for index, sign in turns], axis=0)
    values, vectors = np.linalg.eigh(scatter + np.eye(LOW * LOW))  # 144 pictures of variance 1 / 144
    white = features @ ((vectors / np.sqrt(values)) @ vectors.T).astype(np.float32)
    white[flat] = 0
    white[~flat] /= np.linalg.norm(white[~flat], axis=1, keepdims=True)
    return white


def _near_pairs(
    white: FloatArray, rows: IntArray, columns: IntArray, max_distance: float
) -> Iterator[tuple[IntArray, IntArray, FloatArray, IntArray]]:
    """The near pairs, block by block: a in `rows`, b in `columns`, distance, position in `ORIENTATIONS`.

    The four flips differ by the signs of the odd frequencies only, so four products, one for each parity of
    (row, column), give the cosines of all of them; the same again for the transposed picture.
    """
    odd = np.arange(LOW) % 2
    parity = (2 * odd[:, None] + odd).ravel()
    transposed = ORIENTATIONS["transposed"][0]
    for i in range(0, len(rows), BLOCK):
        block = white[rows[i : i + BLOCK]]
        for j in range(0, len(columns), BLOCK):
            others = white[columns[j : j + BLOCK]]
            halves = []  # (p, r), (q, s): the cosines of the flips are p + r, q - s, q + s, p - r
            for turned in (block, block[:, transposed]):
                ee, eo, oe, oo = (turned[:, parity == k] @ others[:, parity == k].T for k in range(4))
                halves += [(ee + oo, eo + oe), (ee - oo, eo - oe)]
            best = reduce(np.maximum, (half + np.abs(other) for half, other in halves))
            a, b = np.nonzero(best >= 1 - max_distance)
            if len(a):
                (p, r), (q, s), (pt, rt), (qt, st) = ((half[a, b], other[a, b]) for half, other in halves)
                cosines = np.stack([p + r, q - s, q + s, p - r, pt + rt, qt - st, qt + st, pt - rt])
                turn = cosines.round(4).argmax(axis=0)  # a symmetric picture is "same", not "mirrored"
                yield rows[i + a], columns[j + b], np.clip(1 - cosines.max(axis=0), 0, None), turn


def leak_picture(leaks: Sequence[Leak], read: Callable[[str], npt.NDArray[np.uint8]], *, most: int = 12) -> Image.Image:
    """The closest leaks side by side, no picture twice.

    Args:
        leaks: from `find_leaks`; at least one.
        read: gives the (H, W) or (H, W, 3) uint8 picture of a name.
        most: how many pairs at most.
    """
    shown: list[Leak] = []
    for leak in leaks:
        seen = {name for other in shown for name in (other.name_a, other.name_b)}
        if len(shown) < most and not seen & {leak.name_a, leak.name_b}:
            shown.append(leak)
    side, gap, line = 240, 12, 18
    columns = 2 if len(shown) > 1 else 1
    width, height = 2 * side + 3 * gap, side + 3 * line + 2 * gap
    sheet = Image.new("RGB", (columns * width, -(-len(shown) // columns) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for k, leak in enumerate(shown):
        left, top = k % columns * width + gap, k // columns * height + gap
        draw.text((left, top), f"distance {leak.distance:.2f}, {leak.orientation}", "black", font)
        right = left + side + gap
        for x, name, split in ((left, leak.name_a, leak.split_a), (right, leak.name_b, leak.split_b)):
            draw.text((x, top + line), split, "firebrick", font)
            draw.text((x, top + 2 * line), _shortened(name, side, font), "black", font)
            picture = Image.fromarray(read(name)).convert("RGB")
            picture.thumbnail((side, side))
            sheet.paste(picture, (x, top + 3 * line))
    return sheet


def _shortened(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """The text with its middle left out until it is at most `width` pixels wide."""
    kept = len(text)
    short = text
    while font.getlength(short) > width:
        kept -= 1
        short = f"{text[: kept // 3]}...{text[-(kept - kept // 3) :]}"
    return short
