"""A running mean of a network's weights, which evaluates better than the last ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lit_defect.errors import UserError


def running_mean(network: nn.Module, decay: float) -> AveragedModel:
    """The exponential mean of `network`'s parameters; `update_parameters(network)` after each step.

    The decay rises with the number of steps n as (1 + n) / (10 + n) until it is `decay`, so that the first steps, far
    from the last ones, are forgotten sooner.

    Raises:
        UserError: a decay out of range.
    """
    if not 0 <= decay < 1:
        raise UserError(f"model.init_args.ema_decay = {decay}: expected 0 <= decay < 1")

    @torch.no_grad()
    def move(means: Any, current: Any, number: Any) -> None:
        share = min(decay, (1 + float(number)) / (10 + float(number)))
        torch._foreach_lerp_(means, current, 1 - share)

    mean = AveragedModel(network, multi_avg_fn=move)
    mean.requires_grad_(False)
    return mean
