"""How far a feature vector lies from its nearest normal ones.

The score is the mean cosine distance 1 - cos to the k nearest training features, in float64. Unlike a Gaussian it
does not mind several kinds of normal picture; unlike a kernel density it looks at k of them and no more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lit_defect.errors import UserError
from lit_defect.scoring.fitted import Fitted, check_rows

_CHUNK = 2**22  # distances that are in memory at a time: 32 MiB of float64


class NearestNeighbours(Fitted):
    """Mean cosine distance to the k nearest of the normal training features.

    Args:
        k: neighbours; at most as many as there are training pictures.
    """

    bank: Tensor  # (n, d) of length 1

    def __init__(self, k: int = 5) -> None:
        super().__init__("bank")
        if k < 1:
            raise UserError(f"k = {k}: expected at least 1 nearest neighbour")
        self.k = k

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Keep the features (n, d) of normal training pictures, n >= k; replaces an earlier fit.

        Raises:
            UserError: fewer than k rows, values that are not finite.
        """
        check_rows(x, least=1, fitted="the nearest neighbour score")
        self._check_k(len(x))
        self.keep(bank=normalize(x.double(), dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, d) -> mean cosine distance (B,) float32.

        Raises:
            UserError: k is larger than the number of pictures that were fitted.
        """
        self.need_fit()
        self._check_k(len(self.bank))
        bank = normalize(self.bank.double(), dim=1)

        def score(rows: Tensor) -> Tensor:
            return squared_distances(rows, bank).topk(self.k, largest=False, sorted=False).values.mean(dim=1) / 2

        return in_chunks(score, normalize(x.double(), dim=1), len(bank)).float()

    def _check_k(self, n: int) -> None:
        if self.k > n:
            raise UserError(
                f"k = {self.k} nearest neighbours are asked for, but there are only {n} normal training pictures: "
                f"set k to {n} or less, or add normal pictures"
            )


def squared_distances(x: Tensor, bank: Tensor) -> Tensor:
    """|x_i - b_j|^2 = 2 (1 - cos) of rows of length 1: (B, d), (n, d) -> (B, n)."""
    return 2 - 2 * (x @ bank.T)


def in_chunks(score: Callable[[Tensor], Tensor], x: Tensor, n: int) -> Tensor:
    """Apply `score` (b, d) -> (b,), which holds b times n numbers, to as many rows of x at a time as fit."""
    if torch.compiler.is_exporting():  # into a graph for batches of any size, which has no loop over their parts
        return score(x)
    return torch.cat([score(rows) for rows in x.split(max(1, _CHUNK // n))])
