"""Contrastive losses: normal pictures together, pseudo-anomalies away from them.

Every picture is seen in two augmented views, and z holds both: (2, N, D), z[0, i] and z[1, i] being twins.
For an anchor i with the cosine similarity s(i, j) = z_i . z_j / (|z_i| |z_j|) and the temperature tau, all
three losses are means over anchors of

    -1/|P(i)|  sum over p in P(i) of  log [ exp(s(i, p) / tau) / sum over a in A(i) of exp(s(i, a) / tau) ]

and differ in who is an anchor, its positives P(i) and whom the sum A(i) runs over (P(i) is always within it):

    ntxent       anchors: all views; P: the twin; A: all other views of other sources, and the twin
                 (Chen et al., SimCLR, ICML 2020, eq. 1)
    ntxent_hard  anchors: normal views; P: the twin; A: as ntxent, and beta times all pseudo-anomalies
                 (Honda & Yamauchi, SimCLR with local pseudo-anomalies, as far as the paper tells)
    one_class    normal anchors: P: all other normal views; pseudo-anomalies: P: the twin; A: everything else
                 (the form L_out of Khosla et al., Supervised Contrastive Learning, NeurIPS 2020, eq. 2)

Views need not have length 1. A pseudo-anomaly that the SSIM gate rejected is masked (`valid`), never dropped:
it is neither anchor nor in any sum, its gradient is zero, and shapes are the same on every process. On several
processes, gather all views with gradient and let each process compute the whole loss: the gradients, averaged
by DDP, are those of one process with the global batch. Logits are float32 also under autocast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lit_defect.errors import UserError

TEMPERATURE = 0.2


def ntxent(z: Tensor, *, temperature: float = TEMPERATURE, source: Tensor | None = None) -> Tensor:
    """Plain NT-Xent.

    Args:
        z: (2, N, D) projections of the two views.
        temperature: tau, > 0.
        source: (N,) integers, equal where two samples stem from the same picture: these are never negatives of
            each other. Without it every sample is a picture of its own.
    Returns:
        Float32 scalar; 0 where no anchor has a negative, as with N = 1.
    Raises:
        UserError: temperature <= 0.
        ValueError: shapes that do not fit.
    """
    return ntxent_hard(z, z[:, :0], temperature=temperature, source=source)


def ntxent_hard(
    normal: Tensor,
    anomaly: Tensor,
    *,
    valid: Tensor | None = None,
    beta: float = 1.0,
    temperature: float = TEMPERATURE,
    source: Tensor | None = None,
) -> Tensor:
    """NT-Xent of the normal views, with all pseudo-anomalies as negatives, the anchor's own included.

    Args:
        normal: (2, N, D) projections of the two views of normal pictures: the anchors.
        anomaly: (2, M, D) of the pseudo-anomalies; M may be 0.
        valid: (M,) bool, False for those to leave out; None: all are valid.
        beta: weight >= 0 of each pseudo-anomaly in the denominator; 0 gives plain NT-Xent.
        temperature: tau, > 0.
        source: (N,) integers as in `ntxent`. A pseudo-anomaly is a negative whatever picture it was made from.
    Returns:
        Float32 scalar.
    Raises:
        UserError: temperature <= 0 or beta < 0.
        ValueError: shapes that do not fit.
    """
    if not 0 <= beta < math.inf:
        raise UserError(f"beta = {beta}: expected a number >= 0")
    _check_views(normal, anomaly, temperature)
    n, m = normal.shape[1], anomaly.shape[1]
    valid = _check_rows("valid", valid, m, torch.ones(m, dtype=torch.bool, device=anomaly.device))
    source = _check_rows("source", source, n, torch.arange(n, device=normal.device))
    with torch.autocast(normal.device.type, enabled=False):
        anchors, others = _unit_rows(normal), _unit_rows(anomaly, valid)  # (2N, D), (2M, D)
        among = anchors @ anchors.T / temperature  # (2N, 2N)
        twin = _twins(n, normal.device)  # (2N,)
        positive = among.gather(1, twin[:, None])  # (2N, 1)
        # The anchor itself has its own source, and so has the twin, which is added again as the positive.
        related = (source[:, None] == source).repeat(2, 2)  # (2N, 2N)
        negative = among.masked_fill(related, -torch.inf)
        weight = torch.where(valid, beta, 0.0).to(among.dtype).log().repeat(2)  # (2M,), log 0 = -inf
        against = anchors @ others.T / temperature + weight  # (2N, 2M)
        logits = torch.cat([positive, negative, against], dim=1)
        return (logits.logsumexp(dim=1) - positive[:, 0]).mean()


def one_class(
    normal: Tensor, anomaly: Tensor, *, valid: Tensor | None = None, temperature: float = TEMPERATURE
) -> Tensor:
    """All normal views attract each other; a pseudo-anomaly attracts its twin only; all else repels.

    Plain NT-Xent drives pictures of one and the same object apart, which is not wanted where "normal" is one
    class. Whether two normal views come from the same picture makes no difference here.

    Args:
        normal: (2, N, D) projections of the two views of normal pictures.
        anomaly: (2, M, D) of the pseudo-anomalies; M may be 0.
        valid: (M,) bool, False for those to leave out; None: all are valid.
        temperature: tau, > 0.
    Returns:
        Float32 scalar: the mean over all normal and all valid pseudo-anomalous anchors.
    Raises:
        UserError: temperature <= 0.
        ValueError: shapes that do not fit.
    """
    _check_views(normal, anomaly, temperature)
    n, m = normal.shape[1], anomaly.shape[1]
    valid = _check_rows("valid", valid, m, torch.ones(m, dtype=torch.bool, device=anomaly.device))
    with torch.autocast(normal.device.type, enabled=False):
        rows = torch.cat([_unit_rows(normal), _unit_rows(anomaly, valid)])  # (R, D), R = 2N + 2M
        logits = rows @ rows.T / temperature  # (R, R)
        itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        counted = torch.cat([valid.new_ones(2 * n), valid.repeat(2)])  # (R,)
        positive = torch.zeros_like(itself)
        positive[: 2 * n, : 2 * n] = True
        positive[torch.arange(2 * n, len(rows), device=rows.device), 2 * n + _twins(m, rows.device)] = True
        positive &= ~itself
        # The twin stays in the sum of a masked anchor, so that no row is empty; the mean leaves it out below.
        denominator = logits.masked_fill(itself | ~(counted | positive), -torch.inf).logsumexp(dim=1)  # (R,)
        attraction = (logits * positive).sum(dim=1) / positive.sum(dim=1)  # (R,)
        return torch.where(counted, denominator - attraction, 0.0).sum() / counted.sum()


def _unit_rows(views: Tensor, valid: Tensor | None = None) -> Tensor:
    """(2, N, D) -> (2N, D) of length 1, first all first views; at least float32; zero where not valid."""
    rows = views.to(torch.promote_types(views.dtype, torch.float32)).flatten(0, 1)
    if valid is not None:  # a zero row has a zero gradient, even where the network gave infinities
        rows = torch.where(valid.repeat(2)[:, None], rows, 0.0)
    return normalize(rows, dim=1)


def _twins(n: int, device: torch.device) -> Tensor:
    """(2N,) position of each view's twin."""
    return torch.arange(2 * n, device=device).roll(n)


def _check_views(normal: Tensor, anomaly: Tensor, temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise UserError(f"temperature = {temperature}: expected a number > 0")
    if normal.ndim != 3 or len(normal) != 2 or not normal.shape[1]:
        raise ValueError(f"normal views are {tuple(normal.shape)}, expected (2, N, D) with N > 0")
    if anomaly.ndim != 3 or len(anomaly) != 2 or anomaly.shape[2] != normal.shape[2]:
        raise ValueError(f"pseudo-anomalous views are {tuple(anomaly.shape)}, expected (2, M, {normal.shape[2]})")


def _check_rows(name: str, given: Tensor | None, n: int, default: Tensor) -> Tensor:
    if given is None:
        return default
    if given.shape != (n,):
        raise ValueError(f"{name} is {tuple(given.shape)}, expected ({n},)")
    return given.to(default.device)
