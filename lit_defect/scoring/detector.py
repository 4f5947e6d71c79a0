"""All anomaly scores of one network, fitted together to the normal training pictures.

    features (B, D) --> gaussian, knn, kde      one number for a picture
    maps            --> grid (B, h, w)          one number for a place; smoothed, its maximum is `map_max`
    gaussian, map_max --> combined              the picture as a whole and its strangest place, together

`combined` is the mean of the two scores' logarithms, each less its mean over good pictures that were not fitted to,
and divided by its standard deviation there. Which score is reported first is the caller's choice; all cost next to
nothing beside the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lit_defect.scoring.density import GaussianDensity, KernelDensity
from lit_defect.scoring.maps import LocalGaussian, Maps, Positions, upsample_maps
from lit_defect.scoring.neighbours import NearestNeighbours

SCORES = ("gaussian", "knn", "kde", "map_max", "combined")


class Detector(nn.Module):
    """Gaussian, nearest-neighbour and kernel scores of the features, and a score for every place.

    Args:
        neighbours: k of the nearest-neighbour score.
        positions: one Gaussian for each place of the map (`aligned`) or one for all (`shared`).
        dimensions: at most so many of each map's channels, by random projection.
        smoothing: standard deviation of the map's smoothing, as a share of the picture's longer side.
    """

    usual: Tensor  # (2,) mean of the logarithms of gaussian and map_max over good pictures
    spread: Tensor  # (2,) their standard deviation

    def __init__(
        self,
        neighbours: int = 5,
        positions: Positions = "aligned",
        dimensions: int = 64,
        smoothing: float = 4 / 256,
    ) -> None:
        super().__init__()
        self.gaussian = GaussianDensity()
        self.knn = NearestNeighbours(neighbours)
        self.kde = KernelDensity()
        self.local = LocalGaussian(positions, dimensions)
        self.smoothing = smoothing
        self.register_buffer("usual", torch.zeros(2))
        self.register_buffer("spread", torch.ones(2))

    @property
    def fitted(self) -> bool:
        """Whether `fit` was called or a fitted state loaded."""
        return all(part.fitted for part in (self.gaussian, self.knn, self.kde, self.local))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if not any(key.startswith(f"{prefix}local.layers.") for key in state_dict):
            self.local.layers = nn.ModuleList()  # an unfitted state replaces a fitted one, too
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def fit(
        self,
        batches: Iterable[tuple[Tensor, Maps]],
        *,
        gather: Callable[[Tensor], Tensor] | None = None,
        add_up: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Fit to normal pictures in one pass; replaces an earlier fit.

        Args:
            batches: features (B, D) and maps of the same pictures.
            gather: of several processes, (n, D) of this one -> (N, D) of all, in one order everywhere.
            add_up: of several processes, the sum over all of a tensor that each has.
        """
        kept: list[Tensor] = []

        def keep() -> Iterator[Maps]:
            for features, maps in batches:
                kept.append(features.float())
                yield maps

        self.local.fit(keep(), add_up=add_up)
        features = torch.cat(kept)
        features = gather(features) if gather else features
        for score in (self.gaussian, self.knn, self.kde):
            score.fit(features)

    def forward(self, features: Tensor, maps: Maps, size: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
        """Scores of pictures, and of their places.

        Args:
            features: (B, D).
            maps: (B, C, h, w) each.
            size: (H, W) at which the smoothed map's maximum is taken: that of the network's input, whatever
                the photograph's own.

        Returns:
            (B,) for each of `SCORES`, and the grid (B, h, w).
        """
        grid = self.local(maps)
        highest = self.enlarge(grid, size).amax((1, 2))
        scores = {"gaussian": self.gaussian(features), "knn": self.knn(features), "kde": self.kde(features)}
        return scores | {"map_max": highest, "combined": self.combine(scores["gaussian"], highest)}, grid

    def combine(self, gaussian: Tensor, map_max: Tensor) -> Tensor:
        """The two scores (B,) -> their combination (B,)."""
        return ((_logarithms(gaussian, map_max) - self.usual) / self.spread).mean(dim=1)

    @torch.no_grad()
    def calibrate(self, gaussian: Tensor, map_max: Tensor) -> None:
        """Give both scores equal weight in `combined`; without this their logarithms count as they are.

        Args:
            gaussian: (n,) of good pictures that were not fitted to; fewer than three change nothing.
            map_max: (n,) likewise.
        """
        if len(gaussian) < 3:
            return
        logs = _logarithms(gaussian, map_max)
        spread = logs.std(dim=0)
        self.usual.copy_(logs.mean(dim=0))
        self.spread.copy_(torch.where(spread > 0, spread, 1.0))

    def enlarge(self, grid: Tensor, size: tuple[int, int]) -> Tensor:
        """Grid (B, h, w) -> smoothed map (B, H, W)."""
        longer: int = torch.sym_max(*size)  # type: ignore[assignment]
        return upsample_maps(grid, size, self.smoothing * longer)


def _logarithms(gaussian: Tensor, map_max: Tensor) -> Tensor:
    """(B,), (B,) -> (B, 2); distances of 0, as blank pictures have, stay finite."""
    return torch.stack([gaussian, map_max], dim=1).clamp_min(1e-6).log()
