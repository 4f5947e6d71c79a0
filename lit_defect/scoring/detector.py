"""All anomaly scores of one network, fitted together to the normal training pictures.

    features (B, D) --> gaussian, knn, kde      one number for a picture
    maps            --> grid (B, h, w)          one number for a place; smoothed, its maximum is `map_max`

Which of the four is reported first is the caller's choice; all cost next to nothing beside the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lit_defect.scoring.density import GaussianDensity, KernelDensity
from lit_defect.scoring.maps import LocalGaussian, Maps, Positions, upsample_maps
from lit_defect.scoring.neighbours import NearestNeighbours

SCORES = ("gaussian", "knn", "kde", "map_max")


class Detector(nn.Module):
    """Gaussian, nearest-neighbour and kernel scores of the features, and a score for every place.

    Args:
        neighbours: k of the nearest-neighbour score.
        positions: one Gaussian for each place of the map (`aligned`) or one for all (`shared`).
        dimensions: at most so many of each map's channels, by random projection.
        smoothing: standard deviation of the map's smoothing, as a share of the picture's longer side.
    """

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
        return scores | {"map_max": highest}, grid

    def enlarge(self, grid: Tensor, size: tuple[int, int]) -> Tensor:
        """Grid (B, h, w) -> smoothed map (B, H, W)."""
        return upsample_maps(grid, size, self.smoothing * max(size))
