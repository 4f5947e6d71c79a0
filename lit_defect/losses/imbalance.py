"""Losses for classes of very different size, the opening problem of defect classification.

`make_loss` builds each from the number of training samples per class:

    plain           cross-entropy
    weighted        cross-entropy with class weights (inverse frequency, or effective number of samples)
    focal           Lin et al., Focal Loss for Dense Object Detection, ICCV 2017
    logit_adjusted  Menon et al., Long-tail Learning via Logit Adjustment, ICLR 2021

All take logits (B, C) and labels (B,) int64 and return the mean over the batch as a float32 scalar.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from lit_defect.errors import UserError

LOSSES = ("plain", "weighted", "focal", "logit_adjusted")
WEIGHTINGS = ("inverse", "effective")


def inverse_frequency_weights(counts: Sequence[int]) -> Tensor:
    """(C,) weights n / (C n_c): each class has the same total weight, and the mean over the samples is 1."""
    n = _counts(counts)
    return (n.sum() / (len(n) * n)).float()


def effective_number_weights(counts: Sequence[int], beta: float = 0.999) -> Tensor:
    """(C,) weights in proportion to (1 - beta) / (1 - beta^n_c), with sum C.

    Source: Cui et al., Class-Balanced Loss Based on Effective Number of Samples, CVPR 2019, eq. 2 and
    section 4. beta = 0 gives equal weights, beta -> 1 inverse frequency.
    """
    if not 0 <= beta < 1:
        raise UserError(f"beta = {beta}: expected 0 <= beta < 1")
    n = _counts(counts)
    weights = (1 - beta) / (1 - beta**n)
    return (weights * len(n) / weights.sum()).float()


class FocalLoss(nn.Module):
    """-(1 - p_t)^gamma log p_t of the softmax probability p_t of the true class (eq. 4).

    With gamma = 0 it is cross-entropy. Smoothed labels q give sum_c q_c (1 - p_c)^gamma (-log p_c).
    """

    def __init__(self, gamma: float = 2.0, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if gamma < 0:
            raise UserError(f"gamma = {gamma}: expected a number >= 0")
        self.gamma = gamma
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (B, C), labels (B,) -> scalar."""
        log_p = log_softmax(logits.float(), dim=1)  # (B, C)
        # 1 - p from the logarithm is exact where p is almost 1; it is kept off 0, where a power below 1
        # has an infinite gradient.
        miss = (-torch.expm1(log_p)).clamp(min=torch.finfo(torch.float32).tiny)
        loss = -(miss**self.gamma) * log_p
        true = loss.gather(1, labels[:, None])[:, 0]  # (B,)
        return torch.lerp(true, loss.mean(dim=1), self.label_smoothing).mean()


class LogitAdjustedLoss(nn.Module):
    """Cross-entropy of logits + tau log pi_c, with pi the class frequencies in training (eq. 10).

    The plain arg max of the trained model is then the Bayes rule for the balanced error (tau = 1): nothing is
    adjusted at test time.
    """

    shift: Tensor

    def __init__(self, counts: Sequence[int], tau: float = 1.0, label_smoothing: float = 0.0) -> None:
        super().__init__()
        n = _counts(counts)
        self.label_smoothing = label_smoothing
        self.register_buffer("shift", (tau * torch.log(n / n.sum())).float(), persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (B, C), labels (B,) -> scalar."""
        return cross_entropy(logits.float() + self.shift, labels, label_smoothing=self.label_smoothing)


class WeightedCrossEntropy(nn.Module):
    """Cross-entropy, each sample weighted by the weight (C,) of its class.

    torch's weighted mean divides by the weights of the batch, so that a batch of one class is not weighted
    at all. Here the mean is over the samples, and batches add up to the weighted loss of the data set.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (B, C), labels (B,) -> scalar."""
        loss = cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing, reduction="none")
        return (self.weight[labels] * loss).mean()


def make_loss(
    name: str,
    counts: Sequence[int],
    *,
    label_smoothing: float = 0.0,
    weighting: str = "inverse",
    beta: float = 0.999,
    gamma: float = 2.0,
    tau: float = 1.0,
) -> nn.Module:
    """The loss called `name` for classes with `counts` training samples each.

    Args:
        name: plain, weighted, focal or logit_adjusted.
        counts: (C,) training samples per class, each at least 1.
        label_smoothing: mass spread evenly over the classes.
        weighting: of `weighted`: inverse (frequency) or effective (number of samples).
        beta: of the effective number.
        gamma: of focal.
        tau: of logit_adjusted.

    Raises:
        UserError: unknown name or weighting, a class without training samples, a number out of range.
    """
    _known("loss", name, LOSSES)
    _known("weighting", weighting, WEIGHTINGS)
    if not 0 <= label_smoothing < 1:
        raise UserError(f"label_smoothing = {label_smoothing}: expected 0 <= label_smoothing < 1")
    if name == "plain":
        return nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    if name == "weighted":
        inverse = weighting == "inverse"
        weight = inverse_frequency_weights(counts) if inverse else effective_number_weights(counts, beta)
        return WeightedCrossEntropy(weight, label_smoothing)
    if name == "logit_adjusted":
        return LogitAdjustedLoss(counts, tau, label_smoothing)
    return FocalLoss(gamma, label_smoothing)


def _counts(counts: Sequence[int]) -> Tensor:
    n = torch.as_tensor(counts, dtype=torch.float64)
    if n.ndim != 1 or not len(n):
        raise ValueError(f"counts must be one number per class, not {counts!r}")
    if (n < 1).any():
        empty = [i for i, count in enumerate(counts) if count < 1]
        raise UserError(
            f"no training samples in class {', '.join(map(str, empty))}: a loss that weighs by class size "
            "needs at least one of each; add samples, change the split, or use the plain loss"
        )
    return n


def _known(what: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{what} {value!r} is not known: choose one of {', '.join(known)}")
