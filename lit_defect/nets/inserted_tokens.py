"""What AnomalyDiffusion learns (Hu et al., AAAI 2024): vectors that stand in a prompt where words would.

    e_a = AnomalyTokens(pairs, count=8, width=768)(rows)     # (B, k, d): how a defect of this type looks
    e_s = SpatialEncoder(count=4, width=768, scale=0.4)(m)   # (B, n, d): where it is, from the mask m (B, 1, H, W)

Together, (B, k + n, d), they take the place of "*" (`diffusion.prompts`); nothing else of the base model is trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_defect.errors import UserError

_SPREAD = 0.02  # standard deviation of the numbers of a token embedding before CLIP and BERT are trained
_SUMMARY = 8  # channels of a place of the last grid, from which the tokens are made
_HIDDEN = 128


class AnomalyTokens(nn.Module):
    """e_a: k vectors for each (category, defect type), found by textual inversion.

    Args:
        pairs: (category, defect type), each once; a row of the table for each, in this order.
        count: k; 8 in the paper.
        width: d, of the text encoder's token embeddings.
        start: (d,) the embedding that every vector starts from, in the paper that of the word "anomaly"; None for
            small random numbers.

    Attributes:
        weight: (P, k, d).

    Raises:
        UserError: no pair, one that is there twice, or no token.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]], count: int, width: int, start: Tensor | None = None) -> None:
        super().__init__()
        if count < 1:
            raise UserError(f"model.init_args.anomaly_tokens = {count}: expected at least 1")
        self.pairs = [(category, kind) for category, kind in pairs]
        self._rows = {pair: row for row, pair in enumerate(self.pairs)}
        if not self.pairs:
            raise UserError("no pair of a category and a defect type to learn: the training split has no defect")
        if len(self._rows) < len(self.pairs):
            twice = sorted({f"{c}/{kind}" for c, kind in self.pairs if self.pairs.count((c, kind)) > 1})
            raise UserError(f"pairs of category and defect type that are there twice: {', '.join(twice)}")
        size = (len(self.pairs), count, width)
        if start is not None and start.shape != (width,):
            raise ValueError(f"start of shape {tuple(start.shape)}: expected ({width},)")
        first = _SPREAD * torch.randn(size) if start is None else start.detach().float().expand(size).clone()
        self.weight = nn.Parameter(first)

    def forward(self, rows: Tensor) -> Tensor:
        """(B,) int64 rows of the table -> (B, k, d)."""
        return self.weight[rows]

    def row_of(self, category: str, defect_type: str) -> int:
        """The row of a pair.

        Raises:
            UserError: a pair that was not learnt; names those of the category, or else all.
        """
        row = self._rows.get((category, defect_type))
        if row is None:
            known = [pair for pair in self.pairs if pair[0] == category] or self.pairs
            raise UserError(
                f"defect type {defect_type!r} of category {category!r} was not learnt; there are "
                f"{', '.join('/'.join(pair) for pair in known)}"
            )
        return row


class SpatialEncoder(nn.Module):
    """e_s = E(m): n vectors that say where a defect is, from its mask; shared by all types.

    The mask is brought to side x side, two channels with the coordinates (-1 to 1) of its places stand beside it, and
    convolutions halve the grid once a level. Every place of the last grid keeps its own numbers, which an average
    over places would lose. What all masks have in common is kept small (no coordinates outside the mask, no bias
    after the convolutions): vectors of different masks would else differ by a tenth of their length at the start.
    Half a million parameters for d = 768, n = 4; the paper's have 325 million.

    Args:
        count: n; 4 in the paper.
        width: d, of the text encoder's token embeddings.
        scale: length (Euclidean) of the vectors before training: that of the text encoder's own token embeddings.
        side: of the grid that masks of any size are brought to.
        channels: of each level.

    Raises:
        UserError: no token.
        ValueError: a side that cannot be halved once a level.
    """

    places: Tensor

    def __init__(
        self, count: int, width: int, scale: float, side: int = 64, channels: Sequence[int] = (32, 64, 128)
    ) -> None:
        super().__init__()
        if count < 1:
            raise UserError(f"model.init_args.spatial_tokens = {count}: expected at least 1")
        last, rest = divmod(side, 2 ** len(channels))
        if rest or not last:
            raise ValueError(f"a grid of {side} places a side cannot be halved {len(channels)} times")
        self.count, self.side = count, side
        levels = [layer for before, after in pairwise((3, *channels)) for layer in _level(before, after)]
        self.grid = nn.Sequential(*levels, nn.Conv2d(channels[-1], _SUMMARY, 1, bias=False), nn.SiLU())
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(_SUMMARY * last**2, _HIDDEN, bias=False),
            nn.SiLU(),
            nn.Linear(_HIDDEN, count * width, bias=False),
        )
        self.norm = nn.LayerNorm(width)
        nn.init.constant_(self.norm.weight, scale / width**0.5)  # LayerNorm gives vectors of length sqrt(d)
        line = (torch.arange(side) + 0.5) / side * 2 - 1
        self.register_buffer("places", torch.stack(torch.meshgrid(line, line, indexing="ij"))[None], persistent=False)

    def forward(self, masks: Tensor) -> Tensor:
        """Masks (B, 1, H, W) float in {0, 1}, of any size -> (B, n, d)."""
        mask = _to_side(masks, self.side)
        seen = torch.cat([mask, mask * self.places], dim=1)  # (B, 3, side, side)
        tokens = self.head(self.grid(seen)).unflatten(1, (self.count, -1))  # (B, n, d)
        found: Tensor = self.norm(tokens)
        return found


def _level(before: int, after: int) -> list[nn.Module]:
    """A convolution that halves the grid, and what makes it one of a network."""
    return [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(math.gcd(after, 8), after), nn.SiLU()]


def _to_side(masks: Tensor, side: int) -> Tensor:
    """Masks (B, 1, H, W) -> (B, 1, side, side): the maximum where places merge, so that a single pixel is not lost."""
    height, width = (min(size, side) for size in masks.shape[2:])
    return F.interpolate(F.adaptive_max_pool2d(masks, (height, width)), (side, side), mode="nearest")
