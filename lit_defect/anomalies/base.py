"""What all pseudo-anomalies share: several candidates per picture, and a gate that keeps a visible one.

1. `candidates` edits of each picture are drawn. All randomness is a fixed number of uniforms per picture, so the
   same seed gives the same anomalies whatever the batch size (and, up to rounding, the device).
2. A subclass says what each edit makes of the pixels of a region (`edit`).
3. A pixel that changes by less than half a grey level in every channel is put back: the mask is exactly
   what differs.
4. SSIM(original, edited) >= T means that only background was moved (Honda & Yamauchi, eq. 1 and 2). The first
   candidate below T is kept; where there is none, the one of lowest SSIM, marked as not accepted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_defect.anomalies.draws import KEY
from lit_defect.anomalies.pixels import Pixels
from lit_defect.anomalies.ssim import WINDOW, ssim_around
from lit_defect.errors import UserError
from lit_defect.transfer import sent

# What parts moved background from changes of an object in benchmarks/anomalies.py: the patch scope discards 87 % of the
# former and 10 to 14 % of the latter, the image scope 73 % and a third (of small edits nearly all).
THRESHOLDS = {"image": 0.99, "patch": 0.7}
_SMALLEST = 3  # a pixel with neighbours all around
HALF_LEVEL = 0.5 / 255
_AT_ONCE = 1 << 21  # pixels of all candidates in one pass, which then fits the cache; an accelerator takes more


class PseudoAnomalies(NamedTuple):
    """Edited pictures with all that is known of them: M = kinds x B rows, the first B of them of kind 1."""

    images: Tensor  # (M, 3, H, W) float32 in [0, 1]
    masks: Tensor  # (M, 1, H, W) bool, the pixels that differ from the source in any channel
    ssim: Tensor  # (M,) float32 of the chosen candidate; nan without gate
    accepted: Tensor  # (M,) bool, whether it is an anomaly: below the threshold, and changed at all
    area: Tensor  # (M,) float32 share of the picture that the edited region covers
    kind: Tensor  # (M,) int64, 1 to kinds
    tried: Tensor  # (M, K) float32 area of each candidate
    tried_ssim: Tensor  # (M, K) float32 SSIM of each candidate; nan without gate


class Edit(NamedTuple):
    """n edits: which pixels, and what they become."""

    pixels: Pixels  # N pixels of n regions
    values: Tensor  # (3, N) float32 in [0, 1]


class PseudoAnomaly(ABC):
    """Turns normal pictures into defective ones.

    Args:
        candidates: K edits drawn for each picture, from which the gate takes the first visible one.
        ssim_scope: where SSIM is measured: over the whole `image`, over the box of the edit (`patch`), or `off`:
            the first and only candidate is taken as it is.
        ssim_threshold: T; a candidate with SSIM >= T is discarded. null takes `THRESHOLDS` of the scope.

    Raises:
        UserError: a number out of range.
    """

    kinds: int = 1

    def __init__(
        self,
        *,
        candidates: int = 4,
        ssim_scope: Literal["image", "patch", "off"] = "patch",
        ssim_threshold: float | None = None,
    ) -> None:
        if candidates < 1:
            raise UserError(f"{KEY}.candidates = {candidates}: expected at least 1")
        if ssim_scope not in (*THRESHOLDS, "off"):
            raise UserError(f"{KEY}.ssim_scope = {ssim_scope}: expected one of image, patch, off")
        if ssim_threshold is not None and not 0 < ssim_threshold <= 1:
            raise UserError(f"{KEY}.ssim_threshold = {ssim_threshold}: expected 0 < ssim_threshold <= 1")
        self.candidates = 1 if ssim_scope == "off" else candidates
        self.ssim_scope = ssim_scope
        self.ssim_threshold = THRESHOLDS.get(ssim_scope, 1.0) if ssim_threshold is None else ssim_threshold

    @property
    @abstractmethod
    def uniforms_of_picture(self) -> int:
        """Random numbers that one picture takes."""

    @abstractmethod
    def generate(self, images: Tensor, uniforms: Tensor) -> PseudoAnomalies:
        """The pseudo-anomalies that (B, `uniforms_of_picture`) random numbers stand for; nothing is checked."""

    @torch.no_grad()
    def __call__(self, images: Tensor, generator: torch.Generator) -> PseudoAnomalies:
        """(B, 3, H, W) float32 in [0, 1] -> its pseudo-anomalies, on the same device.

        Args:
            images: as they are looked at, not normalised by mean and deviation.
            generator: of the CPU; each picture takes as many numbers from it.

        Raises:
            ValueError: another type or shape, values that are nan or outside of [0, 1].
            UserError: pictures too small for the window of the gate.
        """
        self._check(images)
        uniforms = torch.rand(len(images), self.uniforms_of_picture, generator=generator, dtype=torch.float64)
        with torch.autocast(images.device.type, enabled=False):
            return self.generate(images.contiguous(), uniforms)

    def one_of_each(self, images: Tensor) -> PseudoAnomalies:
        """As many rows as pictures: of each one kind, drawn as everything here is from torch's global generator."""
        made = self(images, torch.Generator().manual_seed(int(torch.randint(2**62, ()))))
        kinds = torch.randint(self.kinds, (len(images),), device=images.device)
        rows = kinds * len(images) + torch.arange(len(images), device=images.device)
        return PseudoAnomalies(*(column[rows] for column in made))

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.float32 or not len(images):
            raise ValueError(f"expected (B, 3, H, W) float32, not {tuple(images.shape)} {images.dtype}")
        height, width = images.shape[-2:]
        if self.ssim_scope != "off" and min(height, width) < WINDOW:
            raise UserError(
                f"pictures of {height}x{width} are too small for SSIM, whose window is {WINDOW}x{WINDOW}: "
                f"set data.init_args.image_size, or {KEY}.ssim_scope to off"
            )
        if min(height, width) < _SMALLEST:
            raise UserError(f"pictures of {height}x{width} are too small to be edited: set data.init_args.image_size")
        low, high = torch.stack(images.aminmax()).tolist()  # nan where any value is
        if not (low >= 0 and high <= 1):
            raise ValueError(f"expected pictures in [0, 1], not normalised ones; they lie between {low} and {high}")


class GatedEdit(PseudoAnomaly):
    """Pseudo-anomalies of one kind; a subclass says how one candidate is made."""

    uniforms: int  # random numbers that one candidate takes

    @abstractmethod
    def edit(self, images: Tensor, owner: Tensor, uniforms: Tensor) -> Edit:
        """Draw one edit for each of n rows.

        Args:
            images: (B, 3, H, W) float32 in [0, 1].
            owner: (n,) int64 on the CPU, the picture that each edit belongs to.
            uniforms: (n, `uniforms`) float64 in [0, 1) on the CPU, all the randomness there is.
        """

    @property
    def uniforms_of_picture(self) -> int:
        return self.candidates * self.uniforms

    def generate(self, images: Tensor, uniforms: Tensor) -> PseudoAnomalies:
        canvas = _Canvas(images)
        room = _AT_ONCE if images.device.type == "cpu" else 8 * _AT_ONCE
        step = max(1, room // (self.candidates * images[0, 0].numel()))
        numbers = torch.arange(len(images))
        rows = [
            self._choose(images, some, draws, canvas)
            for some, draws in zip(numbers.split(step), uniforms.split(step), strict=True)
        ]
        similarity, accepted, area, tried, tried_ssim = (torch.cat(column) for column in zip(*rows, strict=True))
        kind = torch.ones(len(images), dtype=torch.int64, device=images.device)
        return PseudoAnomalies(canvas.images, canvas.masks, similarity, accepted, area, kind, tried, tried_ssim)

    def _choose(self, images: Tensor, numbers: Tensor, uniforms: Tensor, canvas: _Canvas) -> tuple[Tensor, ...]:
        """Edit some of the pictures, and write the candidates chosen.

        Args:
            images: (B, 3, H, W), all of them.
            numbers: (b,) which are meant.
            uniforms: (b, `uniforms_of_picture`).
            canvas: to be written to.

        Returns:
            (b,) SSIM, acceptance and area of those chosen; (b, K) area and SSIM of all.
        """
        shape, device = (len(numbers), self.candidates), images.device
        owner = numbers.repeat_interleave(self.candidates)
        pixels, values = self.edit(images, owner, uniforms.reshape(len(owner), self.uniforms))
        before = pixels.read(images)
        changed = (values - before).abs_().amax(dim=0) >= HALF_LEVEL  # (N,)
        area = sent((pixels.lengths / images[0, 0].numel()).float(), device).view(shape)
        if self.ssim_scope == "off":
            similarity = torch.full(shape, torch.nan, device=device)
            visible = pixels.sums(changed.float()).view(shape) > 0
        else:
            similarity = ssim_around(images, pixels, values.where(changed, before), self.ssim_scope).view(shape)
            visible = similarity < self.ssim_threshold
        # The first visible one; where none is, the least similar.
        chosen = torch.where(visible.any(dim=1), visible.int().argmax(dim=1), similarity.nan_to_num().argmin(dim=1))
        kept = torch.arange(self.candidates, device=device) == chosen[:, None]  # (b, K)
        canvas.write(pixels, values, changed.logical_and_(pixels.spread(kept.flatten())))
        of_chosen = (column.gather(1, chosen[:, None])[:, 0] for column in (similarity, visible, area))
        return (*of_chosen, area, similarity)


class _Canvas:
    """A copy of the pictures to be written to, and which of its pixels were.

    What is not to be written goes to a spare place behind the last pixel: an accelerator need not be asked how much
    that is.
    """

    def __init__(self, images: Tensor) -> None:
        self._shape = images.shape
        self._plane = images[0, 0].numel()
        self._colours = torch.empty(images.numel() + 1, device=images.device)
        self.images.copy_(images)
        self._written = torch.zeros(len(images) * self._plane + 1, dtype=torch.bool, device=images.device)

    @property
    def images(self) -> Tensor:
        """(B, 3, H, W)"""
        return self._colours[:-1].view(self._shape)

    @property
    def masks(self) -> Tensor:
        """(B, 1, H, W)"""
        return self._written[:-1].view(self._shape[0], 1, *self._shape[2:])

    def write(self, pixels: Pixels, values: Tensor, kept: Tensor) -> None:
        """Write the values (3, N) of the pixels that are kept (N,)."""
        for channel, colour in enumerate(values):
            plane = self._colours[channel * self._plane :]
            plane.scatter_(0, pixels.place.where(kept, len(plane) - 1), colour)
        place = pixels.along(pixels.start(pixels.strips.y, pixels.strips.left, 1))
        self._written.scatter_(0, place.where(kept, len(self._written) - 1), True)


def explain_rejection(tried_ssim: Tensor, threshold: float) -> str:
    """What to tell the user when the gate discards everything.

    Args:
        tried_ssim: SSIM of the candidates, any shape; nan where none was tried.
        threshold: T.
    """
    measured = tried_ssim[~tried_ssim.isnan()]
    if not len(measured):
        return f"{KEY}.ssim_threshold = {threshold:g}: no SSIM was measured"
    low, high = torch.stack(measured.aminmax()).tolist()
    return (
        f"{KEY}.ssim_threshold = {threshold:g} discards every pseudo-anomaly: the SSIM of {len(measured)} "
        f"candidates lies between {low:.3f} and {high:.3f}. Raise the threshold, or make the changes stronger."
    )
