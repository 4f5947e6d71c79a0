"""Modules that are fitted once to normal pictures, not trained: their state travels in the checkpoint.

The state is buffers. They are empty until `fit`, and take the shape of what is loaded, so that a module built from
the configuration alone receives the state of a checkpoint. Buffers are float32, which every device has; what
needs more digits is computed in float64 and kept in two parts (see `density.Whitening`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_defect.errors import UserError


class Fitted(nn.Module):
    """Base of what is fitted: named buffers, empty until `keep` or a loaded state fills them."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.register_buffer(name, torch.empty(0))

    @property
    def fitted(self) -> bool:
        """Whether `fit` was called or a fitted state loaded."""
        return all(buffer.numel() for buffer in self.buffers(recurse=False))

    def keep(self, **values: Tensor) -> None:
        """Set buffers by name, as float32 on the device of the module."""
        # A copy made outside of inference mode: Lightning evaluates in that mode, and DDP or a checkpoint
        # could not write into a buffer born there.
        with torch.inference_mode(False), torch.no_grad():
            for name, value in values.items():
                place = self.get_buffer(name).device
                setattr(self, name, value.detach().to(place, torch.float32, copy=True).contiguous())

    def need_fit(self) -> None:
        """Raise ValueError unless fitted."""
        if not self.fitted:
            raise ValueError(f"{type(self).__name__} is not fitted: call fit, or load a state that was")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        given = {name: state_dict[prefix + name] for name in self._buffers if prefix + name in state_dict}
        self.keep(**{name: value.new_empty(value.shape) for name, value in given.items()})
        super()._load_from_state_dict(state_dict, prefix, *rest)


def check_rows(x: Tensor, *, least: int, fitted: str) -> None:
    """Refuse training features that nothing can be fitted to.

    Args:
        x: features (n, d).
        least: the smallest n that is enough.
        fitted: what is to be fitted, for the message.
    Raises:
        ValueError: not (n, d).
        UserError: too few rows, or values that are not finite.
    """
    if x.ndim != 2 or not x.shape[1]:
        raise ValueError(f"features are {tuple(x.shape)}, expected (n, d)")
    if len(x) < least:
        raise UserError(
            f"{fitted} needs at least {least} normal training pictures and got {len(x)}: add normal pictures to the "
            "training split, or choose another score"
        )
    if not x.isfinite().all():
        raise UserError(
            f"{fitted}: features of the training pictures are not finite. The training has diverged: lower the "
            "learning rate (model.init_args.lr) or train with precision 32"
        )
