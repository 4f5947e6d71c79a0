"""How good generated pictures are: figures of features, of distances between pictures, and of pixels.

| figure | of | better | source |
|---|---|---|---|
| `inception_score` | class logits of the generated pictures | higher | Salimans et al., NeurIPS 2016 |
| `kid` | features of real and generated pictures | lower | Binkowski et al., ICLR 2018 |
| `fid` | the same | lower | Heusel et al., NeurIPS 2017 |
| `ic_lpips` | perceptual distances between generated pictures | higher | Ojha et al., CVPR 2021 |
| `background_psnr` | pixels outside the mask, against the source picture | higher | |
| `mask_agreement` | change against the source picture, beside the mask | higher | |

IC-LPIPS rewards whatever differs, a corrupted background too: read it beside the distance of the background and KID.
Which network gave features, logits and rows is told by the `Origin` of nets/perception.py; `Figure` carries it along.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_softmax, logsumexp
from torch import Tensor

from lit_defect.metrics import weighted

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Pixels = NDArray[np.uint8]
Bools = NDArray[np.bool_]

CHANGED = 10.0
"""Grey levels, mean over the channels, from which a pixel counts as changed."""


@dataclass(frozen=True)
class Figure:
    """A figure with what it was computed with.

    Attributes:
        value: nan where it is not defined.
        sd: standard deviation over splits, subsets or pictures; nan where there is none.
        network, weights, sha256: as in `lit_defect.nets.perception.Origin`; empty where no network is needed.
        published: whether published figures were computed with the same network and weights.
        note: why the value is undefined, or what to mind.
    """

    value: float
    sd: float = math.nan
    network: str = ""
    weights: str = ""
    sha256: str = ""
    published: bool = False
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what is not finite becomes None, what is empty stays out."""
        numbers = {key: x if math.isfinite(x) else None for key, x in (("value", self.value), ("sd", self.sd))}
        words = {key: getattr(self, key) for key in ("network", "weights", "sha256", "note") if getattr(self, key)}
        return numbers | words | ({"published": self.published} if self.network else {})


class Estimate(NamedTuple):
    """A value with the standard deviation over the parts it is the mean of; nan for one part."""

    value: float
    sd: float


class ClusterSpread(NamedTuple):
    """IC-LPIPS, the number of clusters it is the mean over, and the pairs that were compared."""

    value: float
    clusters: int
    pairs: int


class Agreement(NamedTuple):
    """How well the change of a picture tells its mask; nan where the mask is empty or full."""

    auroc: float
    average_precision: float
    iou: float


def inception_score(logits: ArrayLike, *, splits: int = 1, seed: int = 0) -> Estimate:
    """exp of the mean KL divergence between a picture's classes and those of all pictures.

    Args:
        logits: (N, C); the classes are those of the network.
        splits: the score is taken in each of so many random parts and averaged; 10 is usual from thousands on. It
            is at most the number of pictures in a part, so that small parts hold it down.
        seed: of the parts.

    Raises:
        ValueError: other shapes, or fewer pictures than parts.
    """
    values = _matrix(logits)
    if not 1 <= splits <= len(values):
        raise ValueError(f"{splits} splits of {len(values)} pictures")
    order = np.random.default_rng(seed).permutation(len(values)) if splits > 1 else np.arange(len(values))
    scores = []
    for part in np.array_split(order, splits):
        log_p = log_softmax(values[part], axis=1)
        log_mean = logsumexp(log_p, axis=0) - math.log(len(part))
        scores.append(math.exp((np.exp(log_p) * (log_p - log_mean)).sum(axis=1).mean()))
    return _estimate(scores)


def mmd2(real: ArrayLike, generated: ArrayLike) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3 (Binkowski et al., eq. 4).

    Zero in the mean where both sets, (N, D) and (M, D), come from one distribution; so it can be negative.

    Raises:
        ValueError: other shapes, or fewer than 2 pictures in a set.
    """
    x, y = _matrix(real), _matrix(generated)
    if min(len(x), len(y)) < 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"expected two or more rows of one width, not {x.shape} and {y.shape}")
    within = [_kernel(z, z) for z in (x, y)]
    same = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in within)
    return float(same - 2 * _kernel(x, y).mean())


def kid(
    real: ArrayLike, generated: ArrayLike, *, subset_size: int = 1000, subsets: int = 100, seed: int = 0
) -> Estimate:
    """Kernel Inception distance: the mean of `mmd2` over random subsets.

    Where both sets have at most `subset_size` pictures they are compared whole: the same expectation, the least
    variance. Else subsets have that size, or that of the smaller set.
    """
    x, y = _matrix(real), _matrix(generated)
    if max(len(x), len(y)) <= subset_size:
        return Estimate(mmd2(x, y), math.nan)
    size, rng = min(subset_size, len(x), len(y)), np.random.default_rng(seed)
    draws = ((rng.choice(len(x), size, replace=False), rng.choice(len(y), size, replace=False)) for _ in range(subsets))
    return _estimate([mmd2(x[i], y[j]) for i, j in draws])


def fid(real: ArrayLike, generated: ArrayLike) -> float:
    """Frechet distance of two normal distributions: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    With S = X'X of the centred, scaled features X, the eigenvalues of S1 S2 are the squared singular values of
    X1 X2', so that the last trace is their sum: no root of a matrix, exact and real also where there are fewer
    pictures than features and S is singular. The estimate is biased upwards then all the same; KID is not.

    Args:
        real, generated: (N, D) and (M, D).

    Raises:
        ValueError: other shapes, or fewer than 2 pictures in a set.
    """
    x, y = _matrix(real), _matrix(generated)
    if min(len(x), len(y)) < 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"expected two or more rows of one width, not {x.shape} and {y.shape}")
    a, b = (_factor(z) for z in (x, y))
    shared = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    distance = np.square(x.mean(axis=0) - y.mean(axis=0)).sum() + np.square(a).sum() + np.square(b).sum() - 2 * shared
    return max(0.0, float(distance))


def nearest(rows: Tensor, centres: Tensor) -> Tensor:
    """(N,) number of the nearest of the centres (K, M) to each row (N, M); of several the first."""
    return torch.stack([(centres - row).square_().sum(1) for row in rows]).argmin(1)


def ic_lpips(
    clusters: ArrayLike, rows_of: Callable[[Ints], Tensor], *, pairs: int = 1225, seed: int = 0
) -> ClusterSpread:
    """Intra-cluster LPIPS: how much pictures differ that come nearest to the same training picture.

    1. Every generated picture belongs to its nearest training picture (`nearest`).
    2. Within a cluster, the mean distance over its pairs of pictures.
    3. The mean over the clusters that have a pair; one with none or a single picture says nothing.

    Args:
        clusters: (N,) number of the cluster of each generated picture.
        rows_of: pictures' numbers (n,) -> rows (n, M) whose squared distances are perceptual; called once a cluster,
            since all rows together may not fit into memory.
        pairs: of a cluster with more pairs, as many pictures are drawn as have no more (1225: 50 pictures).
        seed: of the draw.

    Raises:
        ValueError: `pairs` below 1.
    """
    if pairs < 1:
        raise ValueError(f"{pairs} pairs")
    most = (1 + math.isqrt(1 + 8 * pairs)) // 2
    means, compared = [], 0
    for members in _members(np.asarray(clusters, dtype=np.int64), most, np.random.default_rng(seed)):
        rows = rows_of(members)
        between = torch.cat([(rows[i + 1 :] - rows[i]).square_().sum(1) for i in range(len(rows) - 1)])
        means.append(float(between.double().mean()))
        compared += len(between)
    return ClusterSpread(float(np.mean(means)) if means else math.nan, len(means), compared)


def background_psnr(generated: Pixels, source: Pixels, mask: Bools) -> float:
    """Peak signal-to-noise ratio in dB outside the mask: 10 log10(255^2 / mean squared difference).

    Args:
        generated, source: (H, W, 3) uint8.
        mask: (H, W), true inside the defect.

    Returns:
        Infinite where nothing differs, nan where the mask is full.

    Raises:
        ValueError: shapes that do not fit.
    """
    difference = _difference(generated, source, mask)[~mask]
    if not difference.size:
        return math.nan
    error = np.square(difference).mean()
    return 10 * math.log10(255**2 / error) if error else math.inf


def mask_agreement(generated: Pixels, source: Pixels, mask: Bools) -> Agreement:
    """Whether the mask lies where the picture differs from its source.

    The score of a pixel is the mean over the channels of |generated - source|. AUROC and average precision rank the
    pixels by it; the IoU is that of the pixels with a score of `CHANGED` or more with the mask.

    Args and errors as in `background_psnr`.
    """
    score = np.abs(_difference(generated, source, mask)).mean(axis=2)
    changed = score >= CHANGED
    union = int((changed | mask).sum())
    iou = (changed & mask).sum() / union if union else math.nan
    if mask.all() or not mask.any():
        return Agreement(math.nan, math.nan, float(iou))
    one = np.ones((1, mask.size))
    auroc, precision = (f(one, mask.ravel(), score.ravel())[0] for f in (weighted.auroc, weighted.average_precision))
    return Agreement(float(auroc), float(precision), float(iou))


def _matrix(values: ArrayLike) -> Floats:
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or not np.isfinite(matrix).all():
        raise ValueError(f"expected finite values of shape (N, D), not {matrix.shape}")
    return matrix


def _estimate(parts: Sequence[float]) -> Estimate:
    return Estimate(float(np.mean(parts)), float(np.std(parts, ddof=1)) if len(parts) > 1 else math.nan)


def _kernel(x: Floats, y: Floats) -> Floats:
    return np.asarray((x @ y.T / x.shape[1] + 1) ** 3)


def _factor(rows: Floats) -> Floats:
    """X (at most D, D) with X'X the covariance (ddof 1) of the rows (N, D)."""
    centred = (rows - rows.mean(axis=0)) / math.sqrt(len(rows) - 1)
    return centred if len(rows) <= rows.shape[1] else np.asarray(np.linalg.qr(centred, mode="r"))


def _members(clusters: Ints, most: int, rng: np.random.Generator) -> Iterator[Ints]:
    """Members of each cluster that has two or more, `most` of them drawn from a larger one."""
    for cluster in np.unique(clusters):
        members = np.flatnonzero(clusters == cluster)
        if len(members) > most:
            members = np.sort(rng.choice(members, most, replace=False))
        if len(members) > 1:
            yield members


def _difference(generated: Pixels, source: Pixels, mask: Bools) -> Floats:
    if generated.shape != source.shape or generated.shape[:2] != mask.shape or generated.ndim != 3:
        raise ValueError(f"shapes do not fit: {generated.shape}, {source.shape}, mask {mask.shape}")
    return generated.astype(np.float64) - source
