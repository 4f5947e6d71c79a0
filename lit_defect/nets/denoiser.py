"""The network of a refiner: a U-Net of diffusers that sees a state and a step, for pictures of any size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lit_defect.errors import UserError


class Denoiser(nn.Module):
    """UNet2DModel (diffusers), optionally on blocks of pixels.

    Args:
        in_channels: of what it sees.
        out_channels: of what it answers.
        channels: of each level, from the finest; each level halves the sides.
        layers: residual blocks of a level.
        attention: whether places of the coarsest level attend to each other.
        patch: blocks of patch x patch pixels become channels first and pixels again in the end, which makes a call
            cheaper by nearly the square of it.

    Attributes:
        multiple: what height and width must be divisible by.

    Raises:
        UserError: an option out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int] = (64, 128, 256, 256),
        layers: int = 2,
        attention: bool = True,
        patch: int = 1,
    ) -> None:
        super().__init__()
        for key, number in (("layers", layers), ("patch", patch)):
            if number < 1:
                raise UserError(f"model.init_args.{key} = {number}: expected at least 1")
        if min(channels, default=0) < 1:
            raise UserError(f"model.init_args.channels = {list(channels)}: expected one level or more, each at least 1")
        import diffusers

        levels = len(channels)
        self.patch = patch
        self.multiple = patch * 2 ** (levels - 1)
        plain = ["DownBlock2D"] * levels, ["UpBlock2D"] * levels
        if attention:
            plain[0][-1], plain[1][0] = "AttnDownBlock2D", "AttnUpBlock2D"
        model: Any = diffusers.UNet2DModel
        self.unet = model(
            in_channels=in_channels * patch**2,
            out_channels=out_channels * patch**2,
            block_out_channels=tuple(channels),
            layers_per_block=layers,
            down_block_types=tuple(plain[0]),
            up_block_types=tuple(plain[1]),
            add_attention=attention,
            attention_head_dim=min(32, channels[-1]),
            norm_num_groups=math.gcd(32, *channels),
        )

    def forward(self, inputs: Tensor, t: Tensor) -> Tensor:
        """(B, in_channels, H, W), steps (B,) -> (B, out_channels, H, W)."""
        answer = self.unet(F.pixel_unshuffle(inputs, self.patch), t).sample
        return F.pixel_shuffle(answer, self.patch)
