"""Structural similarity of a picture and its edited copy, whole or around the edit only.

SSIM(x, y) = (2 mu_x mu_y + C1)(2 sigma_xy + C2) / ((mu_x^2 + mu_y^2 + C1)(sigma_x^2 + sigma_y^2 + C2))

1. Means, variances and the covariance come from a Gaussian window of 11x11 (sigma 1.5), with C1 = 0.01^2 and
   C2 = 0.03^2 for values in [0, 1] (Wang et al., IEEE TIP 2004).
2. The map has a value where the window fits into the picture; it is the mean over the channels.
3. Implementations differ in the third digit, so this one is fixed: float32 whatever autocast says, population
   covariance, no padding; `skimage.metrics.structural_similarity(gaussian_weights=True,
   use_sample_covariance=False, data_range=1)`.
4. Outside an edit the map is 1. `ssim_around` computes it where it can differ, for any number of edits of any
   size at once.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_defect.anomalies.pixels import Boxes, Pixels
from lit_defect.transfer import sent

RADIUS = 5
WINDOW = 2 * RADIUS + 1
_SIGMA = 1.5
_C1, _C2 = 0.01**2, 0.03**2
_WEIGHTS = torch.exp(-(torch.arange(-RADIUS, RADIUS + 1, dtype=torch.float64) ** 2) / (2 * _SIGMA**2))
_KERNEL: list[float] = (_WEIGHTS / _WEIGHTS.sum()).tolist()

Scope = Literal["image", "patch"]


@torch.no_grad()
def ssim_map(x: Tensor, y: Tensor) -> Tensor:
    """Two batches (B, C, H, W) float in [0, 1] -> SSIM map (B, H - 10, W - 10), the mean over the channels.

    Raises:
        ValueError: shapes that differ, or pictures smaller than the window.
    """
    if x.shape != y.shape or x.ndim != 4:
        raise ValueError(f"two batches (B, C, H, W) of one shape are compared, not {tuple(x.shape)}, {tuple(y.shape)}")
    if min(x.shape[-2:]) < WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {WINDOW}x{WINDOW}, not {x.shape[-2]}x{x.shape[-1]}")
    return _similarity(_blur(_blur(_moments(x.float(), y.float()), -1), -2)).mean(dim=1)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Two batches (B, C, H, W) float in [0, 1] -> (B,) mean of the SSIM map."""
    return ssim_map(x, y).mean(dim=(1, 2))


def ssim_around(images: Tensor, edits: Pixels, values: Tensor, scope: Scope) -> Tensor:
    """SSIM of pictures and their edited copies, from the surroundings of each edit alone.

    Args:
        images: (B, 3, H, W) float32 in [0, 1], H and W at least 11.
        edits: the N pixels of n boxes, one box for each edit; outside of it nothing changes.
        values: (3, N) what those pixels become.
        scope: `image`: mean over the whole map; `patch`: over the box, grown to at least 11 pixels.

    Returns:
        (n,) float32 on the device of the pictures.
    """
    height, width = images.shape[-2:]
    centres = edits.boxes.grown(RADIUS, RADIUS) if scope == "image" else _at_least_window(edits.boxes)
    centres = centres.clipped(height, width, margin=RADIUS)
    window = Pixels(centres.grown(RADIUS, RADIUS), edits.owner, images.shape, images.device)
    x = window.read(images)  # (3, N')
    y = x.index_copy(1, edits.within(window), values)
    across = _blur(_moments(x, y).flatten(0, 1), -1)  # (12, N' - 10), sound in all but the last 10 columns of a box
    columns, row, index = _by_columns(window, centres.width)
    down = _blur(across.index_select(1, index), -1)  # (12, N'' - 10), sound in all but the last 10 rows
    loss = pad(1 - _similarity(down.unflatten(0, (4, 3))).mean(dim=0), (0, 2 * RADIUS))  # (N'',)
    lost = columns.sums(loss.where(row < columns.spread(centres.height), 0).double())
    whole = torch.full_like(centres.top, (height - 2 * RADIUS) * (width - 2 * RADIUS))
    count = whole if scope == "image" else centres.height * centres.width
    return (1 - lost / sent(count, images.device)).float()


def _at_least_window(boxes: Boxes) -> Boxes:
    """Boxes of at least 11x11 around the same centres."""
    return boxes.grown((WINDOW + 1 - boxes.height).clamp(min=0) // 2, (WINDOW + 1 - boxes.width).clamp(min=0) // 2)


def _by_columns(window: Pixels, widths: Tensor) -> tuple[Pixels, Tensor, Tensor]:
    """A walk through the first `widths` (n,) columns of each box, column after column.

    Returns:
        the walk over N'' pixels, and (N'',) the row of each in its box and its index in the list of `window`.
    """
    zero = torch.zeros_like(widths)
    walk = Pixels(Boxes(zero, zero, widths, window.boxes.height), zero, window.shape, window.device)
    row = walk.along(zero[walk.strips.region])
    begin = (window.lengths.cumsum(0) - window.lengths)[walk.strips.region] + walk.strips.y
    return walk, row, torch.addcmul(walk.each(begin), row, walk.spread(window.boxes.width))


def _moments(x: Tensor, y: Tensor) -> Tensor:
    """x, y, x^2 + y^2 and xy, one shape each -> (4, ...); about 1/2, where float32 is twice as fine."""
    moments = x.new_empty(4, *x.shape)
    x, y = torch.sub(x, 0.5, out=moments[0]), torch.sub(y, 0.5, out=moments[1])
    torch.mul(x, x, out=moments[2]).addcmul_(y, y)
    torch.mul(x, y, out=moments[3])
    return moments


def _similarity(moments: Tensor) -> Tensor:
    """SSIM from the local means (4, ...) of the moments.

    With x = mu_x - 1/2 and y likewise, 2 mu_x mu_y = 2 x y + (x + y + 1/2) and mu_x^2 + mu_y^2 = x^2 + y^2 + the same.
    """
    x, y, squares, product = moments
    xy, xx = x * y, (x * x).addcmul_(y, y)
    shift = (x + y).add_(0.5 + _C1)
    above = torch.add(shift, xy, alpha=2).mul_((product - xy).mul_(2).add_(_C2))
    below = shift.add_(xx).mul_((squares - xx).add_(_C2))
    return above.div_(below)


def _blur(values: Tensor, dim: int) -> Tensor:
    """Gaussian means along a dimension, which becomes 10 shorter.

    Sums of shifted copies: no convolution of an accelerator then rounds to TF32 or bfloat16, and a value does
    not depend on how many others are computed with it.
    """
    length = values.shape[dim] - 2 * RADIUS
    total = values.narrow(dim, RADIUS, length) * _KERNEL[RADIUS]
    for shift in range(RADIUS):
        for start in (shift, 2 * RADIUS - shift):
            total.add_(values.narrow(dim, start, length), alpha=_KERNEL[shift])
    return total
