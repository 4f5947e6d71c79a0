"""The denoiser: sizes, blocks of pixels, steps, attention, and options that do not go."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from lit_defect.errors import UserError
from lit_defect.nets.denoiser import Denoiser


def small(**options: object) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(**{"in_channels": 5, "out_channels": 2, "channels": (8, 16), "layers": 1, **options}).eval()


@pytest.mark.parametrize(
    ("channels", "patch", "multiple"), [((8,), 1, 1), ((8, 16), 1, 2), ((8, 16), 4, 8), ((8, 8, 12), 2, 8)]
)
def test_any_size_that_the_multiple_divides(channels, patch, multiple):
    net = small(channels=channels, patch=patch)
    assert net.multiple == multiple
    for height, width in [(multiple, 3 * multiple), (16, 24)]:
        assert net(torch.randn(2, 5, height, width), torch.tensor([3, 900])).shape == (2, 2, height, width)


@pytest.mark.parametrize("channels", [(8, 16), (3, 5), (24, 40), (48, 80)])
@pytest.mark.parametrize("attention", [False, True])
def test_levels_of_any_width(channels, attention):
    net = small(channels=channels, attention=attention)
    assert net(torch.randn(1, 5, 8, 8), torch.tensor([3])).isfinite().all()


def test_blocks_of_pixels_become_channels_and_return_to_their_places():
    net = small(out_channels=5, patch=2)
    seen = []

    class Same(nn.Module):
        def forward(self, inputs, t):
            seen.append((tuple(inputs.shape), t))
            return type("Answer", (), {"sample": inputs})

    x, t, unet = torch.randn(2, 5, 8, 12), torch.tensor([1, 2]), net.unet
    net.unet = Same()
    torch.testing.assert_close(net(x, t), x, rtol=0, atol=0)
    assert seen == [((2, 20, 4, 6), t)]
    assert (unet.config.in_channels, unet.config.out_channels) == (20, 20)


def test_patches_answer_for_each_pixel():
    """Neighbours within a block get answers of their own."""
    found = small(patch=4)(torch.randn(1, 5, 16, 16), torch.tensor([10]))
    within = found.unfold(2, 4, 4).unfold(3, 4, 4)  # (1, 2, 4, 4, 4, 4)
    assert within.flatten(-2).std(-1).min() > 1e-4


def test_each_picture_has_its_own_step():
    net, x = small(), torch.randn(1, 5, 8, 8)
    together = net(x.expand(2, -1, -1, -1), torch.tensor([10, 900]))
    assert (together[0] - together[1]).abs().max() > 1e-3
    torch.testing.assert_close(together[1:], net(x, torch.tensor([900])), atol=1e-5, rtol=1e-4)


def test_only_the_coarsest_level_attends():
    net = small(channels=(8, 8, 16))
    found = [name for name, module in net.named_modules() if isinstance(module, Attention)]
    assert {".".join(name.split(".")[1:3]) for name in found} == {
        "down_blocks.2",
        "mid_block.attentions",
        "up_blocks.0",
    }
    assert not [m for m in small(attention=False).modules() if isinstance(m, Attention)]


def test_layers_and_channels_are_those_of_the_unet():
    net = small(channels=(8, 16), layers=3)
    assert [len(block.resnets) for block in net.unet.down_blocks] == [3, 3]
    assert net.unet.config.block_out_channels == (8, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, r"model\.init_args\.layers = 0: expected at least 1"),
        ({"patch": 0}, r"model\.init_args\.patch = 0: expected at least 1"),
        ({"channels": ()}, r"model\.init_args\.channels = \[\]: expected one level or more"),
        ({"channels": (8, 0)}, r"model\.init_args\.channels = \[8, 0\]: expected one level or more, each at least 1"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        small(**options)
