"""How far a feature vector lies from the normal ones: one Gaussian, or a kernel density.

1. Features are scaled to length 1 (`normalise`).
2. GaussianDensity: mean and covariance of the training features. With n < d pictures the covariance is singular, so
   it is shrunk towards a multiple of the identity by the share that Ledoit and Wolf estimate from the data
   themselves; nothing is to be tuned. The score is the Mahalanobis distance.
3. KernelDensity: the mean of Gaussian bumps on the training features. The score is minus its logarithm.

Higher means less normal. All is computed in float64, whatever the type of the features and of autocast.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lit_defect.errors import UserError
from lit_defect.scoring.fitted import Fitted, check_rows
from lit_defect.scoring.neighbours import in_chunks, squared_distances

# The least share of the identity in a covariance that is inverted. Ledoit and Wolf's own share is far above it
# unless the data are degenerate, such as the same two pictures over and over.
LEAST_SHRINKAGE = 1e-6


class Shrunk(NamedTuple):
    """Moments of `n` samples in `d` dimensions, over any leading dimensions."""

    mean: Tensor  # (..., d)
    covariance: Tensor  # (..., d, d)
    shrinkage: Tensor  # (...,) share of the identity, in [0, 1]


def ledoit_wolf(x: Tensor) -> Shrunk:
    """Mean and shrunk covariance (1 - rho) S + rho mu I, with S the covariance (1/n) and mu = tr(S) / d.

    rho estimates the share with the least expected squared error. Source: Ledoit & Wolf, A well-conditioned
    estimator for large-dimensional covariance matrices, Journal of Multivariate Analysis 88, 2004, section 3.2.

    Args:
        x: samples (..., n, d); leading dimensions are separate data sets.
    Returns:
        float64. Equal samples give covariance 0 and shrinkage 0, and so does n = 1. With n = 2 the shrinkage is
        0: two samples tell nothing of the spread in other directions.
    Raises:
        ValueError: no samples or no dimensions.
    """
    if x.ndim < 2 or not x.shape[-1] or not x.shape[-2]:
        raise ValueError(f"samples are {tuple(x.shape)}, expected (..., n, d)")
    x = x.double()
    n = x.shape[-2]
    mean = x.mean(dim=-2)
    centred = x - mean[..., None, :]  # (..., n, d)
    scatter = centred.mT @ centred / n  # (..., d, d)
    fourth = centred.square().sum(dim=-1).square().mean(dim=-1)  # (...,) mean of |x|^4
    return Shrunk(mean, *shrink(scatter, fourth, n))


def shrink(scatter: Tensor, fourth: Tensor, n: int | Tensor) -> tuple[Tensor, Tensor]:
    """Ledoit and Wolf's shrunk covariance and the shrinkage, from moments about the mean.

    Args:
        scatter: S = mean of x x^T, (..., d, d) float64.
        fourth: mean of |x|^4, (...,).
        n: samples, one number or one for each leading dimension (...,).
    """
    mu = _mean_variance(scatter)  # (...,) m in the paper
    identity = torch.eye(scatter.shape[-1], dtype=scatter.dtype, device=scatter.device)
    excess = (scatter - mu[..., None, None] * identity).square().sum(dim=(-2, -1))  # d delta^2
    # Mean over the samples of |x x^T - S|^2, by n: the error of S as an estimate. b^2 <= delta^2.
    error = (fourth - scatter.square().sum(dim=(-2, -1))).clamp(min=0) / n
    shrinkage = torch.where(excess > 0, (error / excess).clamp(max=1), 0.0)
    kept, spread = (1 - shrinkage)[..., None, None], (shrinkage * mu)[..., None, None]
    return kept * scatter + spread * identity, shrinkage


def _mean_variance(covariance: Tensor) -> Tensor:
    """(..., d, d) -> tr / d (...,)."""
    return covariance.diagonal(dim1=-2, dim2=-1).mean(dim=-1)


class Whitening(NamedTuple):
    """x -> whiten (x - centre) - shift, whose squared length is the squared Mahalanobis distance.

    `centre` is the mean rounded to float32 and `shift` what the rounding left out: so float32 buffers keep the mean
    to float64, which matters where features are large beside their spread.
    """

    centre: Tensor  # (..., d)
    whiten: Tensor  # (..., d, d) lower triangular: the inverse of the covariance's Cholesky factor
    shift: Tensor  # (..., d)


def whitening(moments: Shrunk, ridge: float | Tensor = 0.0) -> Whitening:
    """The whitening of each Gaussian; `ridge` (...,) is a variance added in every direction, beside LEAST_SHRINKAGE.

    The covariance must not be zero where the ridge is.
    """
    mean, covariance, shrinkage = moments
    added = ridge + (LEAST_SHRINKAGE - shrinkage).clamp(min=0) * _mean_variance(covariance)  # (...,)
    identity = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
    factor = torch.linalg.cholesky(covariance + added[..., None, None] * identity)
    whiten = torch.linalg.solve_triangular(factor, identity, upper=False).float()
    centre = mean.float()
    shift = whiten.double() @ (mean - centre.double())[..., None]
    return Whitening(centre, whiten, shift.squeeze(-1))


def mahalanobis_squared(x: Tensor, by: Whitening) -> Tensor:
    """Squared distances (..., n) of samples (..., n, d) under Gaussians (..., d), in float64."""
    centred = x.double() - by.centre.double()[..., None, :]
    white = centred @ by.whiten.double().mT - by.shift.double()[..., None, :]
    return white.square().sum(dim=-1)


class GaussianDensity(Fitted):
    """Mahalanobis distance to a Gaussian with Ledoit-Wolf covariance.

    Args:
        normalise: scale features to length 1 first.
    """

    centre: Tensor  # (d,), buffers as in Whitening
    whiten: Tensor  # (d, d)
    shift: Tensor  # (d,)

    def __init__(self, normalise: bool = True) -> None:
        super().__init__("centre", "whiten", "shift")
        self.normalise = normalise

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Fit to the features (n, d) of normal training pictures, n >= 3, n < d allowed; replaces an earlier fit.

        Raises:
            UserError: fewer than 3 rows, rows that are all equal, values that are not finite.
        """
        check_rows(x, least=3, fitted="the Gaussian score")
        x = _prepared(x, self.normalise)
        check_spread(x)
        self.keep(**whitening(ledoit_wolf(x))._asdict())

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, d) -> Mahalanobis distance (B,) float32."""
        self.need_fit()
        by = Whitening(self.centre, self.whiten, self.shift)
        return mahalanobis_squared(_prepared(x, self.normalise), by).sqrt().float()


class KernelDensity(Fitted):
    """Minus the logarithm of a Gaussian kernel density over features of length 1.

    The score is -log (1/n) sum_i exp(-|x - x_i|^2 / (2 h^2)): the density's constant factor is left out.

    The bandwidth is h^2 = tr(S) / 20, with S the covariance of the training features, so that two pictures at
    their usual squared distance 2 tr(S) share exp(-20) of a bump: few near neighbours decide. It is the rule
    gamma = 10 / (d Var(f)) of Sohn et al., Learning and evaluating representations for deep one-class
    classification, ICLR 2021, with variances taken about the mean of each feature instead of that of all
    features together: an offset that all pictures share does not widen the bumps.
    """

    bank: Tensor  # (n, d)
    bandwidth: Tensor  # ()

    def __init__(self) -> None:
        super().__init__("bank", "bandwidth")

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Keep the features (n, d) of normal training pictures, n >= 2; replaces an earlier fit.

        Raises:
            UserError: one row, rows that are all equal, values that are not finite.
        """
        check_rows(x, least=2, fitted="the kernel density score")
        x = _prepared(x, normalise=True)
        check_spread(x)
        variance = x.var(dim=0, correction=0).sum()  # tr(S)
        self.keep(bank=x, bandwidth=(variance / 20).sqrt())

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, d) -> minus log density (B,) float32."""
        self.need_fit()
        bank = _prepared(self.bank, normalise=True)
        half_precision = 0.5 / self.bandwidth.double().square()

        def score(rows: Tensor) -> Tensor:
            exponents = -squared_distances(rows, bank) * half_precision  # (b, n)
            return math.log(len(bank)) - exponents.logsumexp(dim=1)

        return in_chunks(score, _prepared(x, normalise=True), len(bank)).float()


def check_spread(x: Tensor) -> None:
    """Refuse features (n, d) float64 that are all equal: no spread can be estimated.

    Raises:
        UserError: the rows differ by rounding of float32 at most.
    """
    largest = x.abs().amax()
    if ((x - x[0]).abs().amax() <= torch.finfo(torch.float32).eps * largest).item():
        raise UserError(
            f"all {len(x)} normal training pictures have the same features. Either the network has collapsed (lower "
            "the learning rate, or use a loss that keeps pictures apart), or the pictures are all alike"
        )


def _prepared(x: Tensor, normalise: bool) -> Tensor:
    x = x.double()
    return normalize(x, dim=-1) if normalise else x
