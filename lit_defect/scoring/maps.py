"""Where a picture is not normal: Gaussians over the feature maps of a network, one score for each place.

1. Each map (B, C, h, w) is reduced to `dimensions` channels by a random orthogonal projection.
2. fit: mean and Ledoit-Wolf covariance of the normal features at each place (`aligned`, for objects that always lie
   the same way), or of all places together (`shared`, for textures and for objects that lie anywhere).
3. forward: the squared Mahalanobis distance at each place, divided by its number of dimensions, so that 1 is usual
   for every map; bilinearly enlarged to the finest map, averaged over the maps; the root of that.
4. `upsample_maps` brings the result to the size of the picture and smooths it.

Sources: Defard et al., PaDiM, ICPR Workshops 2020 (a Gaussian for each place; 0.01 I added, where we shrink); Kim et
al., Semi-orthogonal embedding for efficient unsupervised anomaly segmentation, 2021 (the projection).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv1d, interpolate

from lit_defect.errors import UserError
from lit_defect.scoring.density import Shrunk, Whitening, mahalanobis_squared, shrink, whitening
from lit_defect.scoring.fitted import Fitted

Positions = Literal["aligned", "shared"]
Maps = Sequence[Tensor]
AddUp = Callable[[Tensor], Tensor]

# Share of a map's mean variance that is added at each place: a place that never changes (a black border) has
# no variance of its own, and grain there must not outweigh a defect on the object.
RIDGE = 1e-2
_TRUNCATE = 4.0  # reach of the smoothing in sigma, as in scipy.ndimage


class LocalGaussian(nn.Module):
    """Mahalanobis distance at each place of feature maps.

    Args:
        positions: `aligned`: a Gaussian for each place; `shared`: one for all places.
        dimensions: channels to which larger maps are projected; state and time grow with its square.
        radius: with `aligned`, the statistics of a place are those of the (2 radius + 1)^2 places around it, for
            objects that shift a little; 0 is the place alone.
        seed: of the projections.
    """

    _place: Tensor

    def __init__(self, positions: Positions = "aligned", dimensions: int = 64, radius: int = 0, seed: int = 0) -> None:
        super().__init__()
        if positions not in ("aligned", "shared"):
            raise UserError(f"positions {positions!r} is not known: choose one of aligned, shared")
        if dimensions < 1:
            raise UserError(f"dimensions = {dimensions}: expected at least 1")
        if radius < 0 or (radius and positions == "shared"):
            raise UserError(f"radius = {radius}: expected 0, or a number >= 0 with positions: aligned")
        self.positions: Positions = positions
        self.dimensions, self.radius, self.seed = dimensions, radius, seed
        self.layers = nn.ModuleList()
        self.register_buffer("_place", torch.empty(0), persistent=False)  # tells the device before there are layers

    @property
    def fitted(self) -> bool:
        """Whether `fit` was called or a fitted state loaded."""
        return len(self.layers) > 0

    @torch.no_grad()
    def fit(self, maps: Maps | Iterable[Maps], *, add_up: AddUp | None = None) -> None:
        """Fit to the maps of normal training pictures; replaces an earlier fit.

        One pass, of which only sums are kept: memory does not grow with the number of pictures.

        Args:
            maps: batches, each a list with one tensor (B, C, h, w) for each map of the network; or one such list
                that holds all pictures.
            add_up: where several processes have a share of the pictures each, one picture at least: gives the sum
                over all of them of a tensor that each has. The fit is then that of all pictures, on every process.
        Raises:
            UserError: fewer than 3 samples for a Gaussian, maps that are the same everywhere, values that are not
                finite, pictures of different sizes with `aligned`.
        """
        whole = isinstance(maps, Sequence) and len(maps) > 0 and isinstance(maps[0], Tensor)
        batches = [cast(Maps, maps)] if whole else cast(Iterable[Maps], maps)
        sums: list[_Sums] = []
        for batch in batches:
            if not sums:
                sums = [_Sums(self._projection(x, i)) for i, x in enumerate(batch)]
            for each, x in zip(sums, batch, strict=True):
                each.add(_samples(x, each.projection, self.positions))
        if not sums:
            raise UserError("the anomaly maps need normal training pictures and got none")
        if add_up:
            for each in sums:
                each.add_up(add_up)
        self.layers = nn.ModuleList(each.layer(self.radius) for each in sums).to(self._place.device)

    def forward(self, maps: Maps) -> Tensor:
        """Maps (B, C, h, w) of the kind that was fitted -> scores (B, h, w) float32 at the size of the finest.

        Raises:
            UserError: with `aligned`, maps of another size than was fitted.
            ValueError: not fitted, or another number of maps.
        """
        if not self.fitted:
            raise ValueError("LocalGaussian is not fitted: call fit, or load a state that was")
        if len(maps) != len(self.layers):
            raise ValueError(f"{len(maps)} maps of each picture, expected {len(self.layers)} as fitted")
        squared = [layer(x, self.positions) for layer, x in zip(self.layers, maps, strict=True)]  # each (B, h, w)
        finest = max((s.shape[1:] for s in squared), key=lambda size: size.numel())
        fine = [_stretched(s, (finest[0], finest[1]), sigma=0.0) for s in squared]
        return torch.stack(fine).mean(dim=0).sqrt().float()

    def _projection(self, x: Tensor, layer: int) -> Tensor:
        """(C, d) with orthonormal columns, the same on every machine; the identity where C <= dimensions."""
        channels = x.shape[1]
        if channels <= self.dimensions:
            return torch.eye(channels, dtype=torch.float64, device=x.device)
        generator = torch.Generator().manual_seed(self.seed * 1000 + layer)
        drawn = torch.randn(channels, self.dimensions, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(drawn)
        # The sign of each column is the library's choice: fixed here. Rounded as it will be kept.
        return (q * r.diagonal().sign()).float().double().to(x.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        start = f"{prefix}layers."
        given = {key.removeprefix(start).split(".")[0] for key in state_dict if key.startswith(start)}
        if given:
            self.layers = nn.ModuleList(_Layer() for _ in given).to(self._place.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _Layer(Fitted):
    """The Gaussians (h, w, ...) of one map, with h = w = 1 where all places share one."""

    projection: Tensor  # (C, d)
    centre: Tensor  # (h, w, d)
    whiten: Tensor  # (h, w, d, d)
    shift: Tensor  # (h, w, d)

    def __init__(self) -> None:
        super().__init__("projection", "centre", "whiten", "shift")

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        """Map (B, C, h, w) -> squared distance / d (B, h, w) float64."""
        batch, channels, height, width = x.shape
        d = self.centre.shape[-1]
        if channels != len(self.projection):
            raise ValueError(f"a map has {channels} channels, expected {len(self.projection)} as fitted")
        if positions == "aligned" and x.shape[2:] != self.centre.shape[:2]:
            fitted = "x".join(map(str, self.centre.shape[:2]))
            raise UserError(
                f"a picture gives feature maps of {height}x{width} places, but the places were fitted on {fitted}: use "
                "the image size of the training, or positions: shared"
            )
        samples = _samples(x, self.projection.double(), positions)
        # Row by row, so that few of the covariances are in float64 at a time.
        rows = zip(samples, self.centre, self.whiten, self.shift, strict=True)
        squared = torch.stack([mahalanobis_squared(row, Whitening(*by)) for row, *by in rows]) / d
        if positions == "shared":  # (1, 1, B h w)
            return squared.view(batch, height, width)
        return squared.movedim(2, 0)  # from (h, w, B)


def _samples(x: Tensor, projection: Tensor, positions: Positions) -> Tensor:
    """Map (B, C, h, w) -> samples of each Gaussian (h, w, B, d), or (1, 1, B h w, d) where all share one; float64."""
    if positions == "shared":
        return x.permute(0, 2, 3, 1).reshape(1, 1, -1, x.shape[1]).double() @ projection
    return x.permute(2, 3, 0, 1).double() @ projection


class _Moments(NamedTuple):
    """Sums over n samples x of d dimensions, over leading dimensions: all that Ledoit and Wolf's estimate needs."""

    n: Tensor  # (...,)
    first: Tensor  # (..., d), of x
    second: Tensor  # (..., d, d), of x x^T
    third: Tensor  # (..., d), of |x|^2 x
    fourth: Tensor  # (...,), of |x|^4

    @classmethod
    def of(cls, x: Tensor) -> _Moments:
        """Sums of samples (..., n, d)."""
        squared = x.square().sum(dim=-1)  # (..., n)
        n = squared.new_full(squared.shape[:-1], x.shape[-2])
        third = (squared[..., None] * x).sum(dim=-2)
        return cls(n, x.sum(dim=-2), x.mT @ x, third, squared.square().sum(dim=-1))

    def moved(self, by: Tensor) -> _Moments:
        """Sums of the same samples, `by` (d,) or (..., d) added to each: the powers of x + by, multiplied out."""
        n, first, second, third, fourth = self
        by = by.expand_as(first)
        squared = second.diagonal(dim1=-2, dim2=-1).sum(dim=-1)  # (...,) sum of |x|^2
        along = (second @ by[..., None])[..., 0]  # (..., d) sum of (x . by) x
        length, dot = by.square().sum(-1), (first * by).sum(-1)  # |by|^2, sum of x . by
        cross = first[..., :, None] * by[..., None, :]
        moved_first = first + n[..., None] * by
        return _Moments(
            n=n,
            first=moved_first,
            second=second + cross + by[..., :, None] * moved_first[..., None, :],
            third=third + 2 * along + length[..., None] * moved_first + (squared + 2 * dot)[..., None] * by,
            fourth=fourth + 4 * ((along + third) * by).sum(-1) + length * (2 * squared + 4 * dot + n * length),
        )

    def shrunk(self) -> Shrunk:
        """Mean and shrunk covariance."""
        mean = self.first / self.n[..., None]
        central = self.moved(-mean)
        return Shrunk(mean, *shrink(central.second / self.n[..., None, None], central.fourth / self.n, self.n))


class _Sums:
    """Moments of each place in one pass and float64, about an origin amid the data.

    Of the origin little is lost when the mean is subtracted afterwards, wherever the data lie.
    """

    def __init__(self, projection: Tensor) -> None:
        self.projection = projection
        self.origin: Tensor | None = None  # (d,)
        self.moments: _Moments | None = None  # (h, w, ...)

    def add(self, x: Tensor) -> None:
        """Add samples x (h, w, n, d) of each place."""
        if not x.isfinite().all():
            raise UserError(
                "the feature maps of the training pictures are not finite. The training has diverged: lower the "
                "learning rate (model.init_args.lr) or train with precision 32"
            )
        if self.origin is None or self.moments is None:
            self.origin = x.mean(dim=(0, 1, 2))
            self.moments = _Moments.of(x - self.origin)
            return
        here, before = tuple(x.shape[:2]), tuple(self.moments.n.shape)
        if here != before:
            raise UserError(
                f"feature maps of {here} and of {before} places: positions: aligned needs pictures of one size; set an "
                "image size, or use positions: shared"
            )
        self.moments = _Moments(*map(torch.add, self.moments, _Moments.of(x - self.origin)))

    def add_up(self, add_up: AddUp) -> None:
        """Replace the sums by those of all processes."""
        assert self.origin is not None
        assert self.moments is not None
        n = self.moments.n.sum()
        origin = add_up(n * self.origin) / add_up(n)
        self.moments = _Moments(*map(add_up, self.moments.moved(self.origin - origin)))
        self.origin = origin

    def layer(self, radius: int) -> _Layer:
        """The Gaussians, each of the samples within `radius` places."""
        assert self.origin is not None
        assert self.moments is not None
        pooled = _Moments(*(_within(part, radius) for part in self.moments))
        if pooled.n.min() < 3:
            raise UserError(
                "the anomaly maps need at least 3 normal training pictures for each place and got "
                f"{int(self.moments.n.max())}: add normal pictures to the training split, or use positions: shared"
            )
        means = pooled.second.diagonal(dim1=-2, dim2=-1).mean(dim=-1) / pooled.n
        variance = (means - (pooled.first / pooled.n[..., None]).square().mean(dim=-1)).mean()
        if variance <= torch.finfo(torch.float32).eps ** 2 * self.origin.square().mean():
            raise UserError(
                "the feature maps of all normal training pictures are the same at every place. Either the network "
                "has collapsed (lower the learning rate), or the pictures are blank"
            )
        # Row by row, so that few of the covariances are in the making at a time.
        gaussians = []
        for row in zip(*pooled, strict=True):
            shrunk = _Moments(*row).shrunk()
            gaussians.append(whitening(shrunk._replace(mean=self.origin + shrunk.mean), RIDGE * variance))
        centre, whiten, shift = (torch.stack(part) for part in zip(*gaussians, strict=True))
        layer = _Layer()
        layer.keep(projection=self.projection, centre=centre, whiten=whiten, shift=shift)
        return layer


def _within(sums: Tensor, radius: int) -> Tensor:
    """Sums (h, w, ...) added up over the places within `radius` rows and columns."""
    if not radius:
        return sums
    height, width, *rest = sums.shape
    planes = sums.reshape(1, height, width, -1).permute(0, 3, 1, 2)
    pooled = avg_pool2d(planes, 2 * radius + 1, stride=1, padding=radius, divisor_override=1)
    return pooled.permute(0, 2, 3, 1).reshape(height, width, *rest)


def upsample_maps(maps: Tensor, size: tuple[int, int], sigma: float) -> Tensor:
    """Enlarge maps bilinearly to the size of the picture, then smooth them by a Gaussian.

    The result is that of `interpolate(align_corners=False)` followed by `scipy.ndimage.gaussian_filter` (mode
    reflect, truncate 4). Both are linear along rows and columns apart, so that they are two small matrix products.

    Args:
        maps: (B, h, w).
        size: (H, W) of the picture.
        sigma: of the Gaussian, in pixels of the picture; 0 smooths nothing.
    Returns:
        (B, H, W) float32.
    """
    return _stretched(maps.double(), size, sigma).float()


def _stretched(maps: Tensor, size: tuple[int, int], sigma: float) -> Tensor:
    """Maps (B, h, w) float64 -> (B, H, W) float64."""
    if torch.compiler.is_exporting():
        down, across = (_resampling_graph(n, m, sigma) for n, m in zip(maps.shape[1:], size, strict=True))
        return down @ maps @ across.T
    if sigma < 0:
        raise UserError(f"sigma = {sigma}: expected a number >= 0")
    down, across = (_resampling(n, m, sigma).to(maps.device) for n, m in zip(maps.shape[1:], size, strict=True))
    return down @ maps @ across.T


@lru_cache(maxsize=64)  # pictures of one size share it
@torch.inference_mode(False)
def _resampling(n: int, size: int, sigma: float) -> Tensor:
    """(size, n) float64: what each of n values gives to each of `size` values, enlarged and smoothed."""
    unit = torch.eye(n, dtype=torch.float64)[:, None]  # (n, 1, n)
    fine = interpolate(unit, size, mode="linear", align_corners=False)  # (n, 1, size)
    reach = int(_TRUNCATE * sigma + 0.5)
    if reach:
        steps = torch.arange(-reach, reach + 1, dtype=torch.float64)
        kernel = torch.exp(-0.5 * (steps / sigma).square())
        # Mirrored about the edge of the last pixel, over and over where the kernel reaches further than that.
        places = torch.arange(-reach, size + reach) % (2 * size)
        places = torch.where(places < size, places, 2 * size - 1 - places)
        fine = conv1d(fine[..., places], (kernel / kernel.sum())[None, None])
    return fine[:, 0].T


def _resampling_graph(n: int, size: int, sigma: float) -> Tensor:
    """`_resampling` in closed form: operations that can be exported for a size, hence a sigma, that is not known yet.

    The kernel may reach as far as the side is long: it sees the side and its mirror image on both ends.
    """
    if sigma == 0:
        return _between(torch.arange(size, dtype=torch.float64), n, size)
    line = torch.arange(3 * size, dtype=torch.float64) - size
    mirrored = torch.where(line < 0, -1 - line, torch.where(line < size, line, 2 * size - 1 - line))
    apart = line[size : 2 * size, None] - line  # (size, 3 size)
    kernel = torch.exp(-0.5 * (apart / sigma).square()) * (apart.abs() <= _TRUNCATE * sigma + 0.5)
    return kernel / kernel.sum(dim=1, keepdim=True) @ _between(mirrored, n, size)


def _between(places: Tensor, n: int, size: int) -> Tensor:
    """(m, n) what each of n values gives, bilinearly, to `places` (m,) of the `size` that they are enlarged to."""
    share = n / torch.scalar_tensor(size, dtype=torch.float64)  # a plain number would be float32 in ONNX
    at = ((places + 0.5) * share - 0.5).clamp(0, n - 1)
    return (1 - (at[:, None] - torch.arange(n, dtype=torch.float64)).abs()).clamp(min=0)
