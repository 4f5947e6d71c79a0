"""Padding against numpy, tiles against brute force, blending against a loop over tiles in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate

from lit_defect.errors import UserError
from lit_defect.nets.canvas import Canvas


class Spy:
    """A pointwise network that keeps the shapes it was called with."""

    def __init__(self):
        self.shapes = []

    def __call__(self, x):
        self.shapes.append(tuple(x.shape))
        return torch.cat([x.sin(), x * x], dim=1)


# --- padding ---


@pytest.mark.parametrize(("height", "width"), [(21, 33), (32, 40), (17, 16), (20, 3), (8, 9)])
def test_padding_is_numpys(height, width):
    x = torch.randn(2, 3, height, width)
    sizes = [(-height) % 16, (-width) % 16]
    expected = x.numpy()
    for axis, (side, more) in enumerate(zip((height, width), sizes, strict=True)):
        mode = "reflect" if more < side else "edge"
        expected = np.pad(expected, [(0, more if i == 2 + axis else 0) for i in range(4)], mode=mode)
    np.testing.assert_array_equal(Canvas(16).pad(x).numpy(), expected)


def test_network_sees_multiples_and_the_output_is_cut_back():
    spy, x = Spy(), torch.randn(2, 3, 21, 33)
    out = Canvas(16)(spy, x)
    assert spy.shapes == [(2, 3, 32, 48)]
    torch.testing.assert_close(out, torch.cat([x.sin(), x * x], dim=1), rtol=0, atol=0)


def test_masks_of_integers_can_be_padded():
    x = torch.arange(5).view(1, 1, 1, 5)
    assert Canvas(8).pad(x)[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 3, 2, 1]
    assert Canvas(8).pad(x)[0, 0, :, 0].tolist() == [0] * 8


def test_a_network_that_changes_the_size_is_named():
    with pytest.raises(ValueError, match=r"\(32, 32\) into \(16, 16\)"):
        Canvas(16)(lambda x: x[..., ::2, ::2], torch.zeros(1, 1, 20, 20))


# --- where tiles lie ---


def least_number_of_tiles(side: int, tile: int, multiple: int, overlap: float) -> int:
    """The smallest n for which some n starts among the multiples cover the side with enough overlap."""
    reach = {0}  # starts that n tiles can end with
    for n in itertools.count(1):
        if side - tile in reach:
            return n
        reach = {
            b for a in reach for b in range(a + multiple, side - tile + 1, multiple) if a + tile - b >= overlap * tile
        }


@pytest.mark.parametrize(
    ("multiple", "tile", "overlap"),
    [(1, 10, 0.25), (1, 7, 0.0), (4, 16, 0.3), (8, 64, 0.5), (1, 10, 0.9), (2, 10, 0.3)],
)
def test_tiles_cover_with_the_overlap_and_are_as_few_as_can_be(multiple, tile, overlap):
    canvas = Canvas(multiple, tile, overlap)
    for side in range(tile + multiple, 5 * tile, multiple):
        starts = canvas.starts(side)
        steps = np.diff(starts)
        assert starts[0] == 0
        assert starts[-1] + tile == side
        assert all(start % multiple == 0 for start in starts)
        assert (tile - steps >= overlap * tile - 1e-9).all()
        assert steps.max() - steps.min() <= multiple  # spread evenly
        assert len(starts) == least_number_of_tiles(side, tile, multiple, overlap)


def test_images_up_to_a_tile_are_not_cut():
    spy = Spy()
    Canvas(8, tile=30)(spy, torch.zeros(2, 1, 32, 17))  # 30 becomes 32
    assert spy.shapes == [(2, 1, 32, 24)]


def test_one_long_side_is_cut_and_the_other_is_not():
    spy = Spy()
    Canvas(8, tile=32, overlap=0.25)(spy, torch.zeros(1, 1, 20, 80))
    assert spy.shapes == [(1, 1, 24, 32)] * 3


# --- blending ---


def test_a_pointwise_network_gives_the_same_with_tiles():
    x = torch.randn(2, 2, 75, 53)
    for multiple, tile, overlap in [(1, 16, 0.25), (4, 20, 0.5), (8, 32, 0.0)]:
        out = Canvas(multiple, tile, overlap)(Spy(), x)
        torch.testing.assert_close(out, Spy()(x), rtol=1e-6, atol=1e-6)


def test_a_network_with_strides_keeps_its_grid_with_tiles():
    def blocks(x):
        return interpolate(avg_pool2d(x, 4), scale_factor=4, mode="nearest")

    x = torch.randn(1, 2, 60, 90)
    plain = Canvas(4)(blocks, x)
    torch.testing.assert_close(Canvas(4, 24, 0.3)(blocks, x), plain, rtol=1e-5, atol=1e-6)


def test_blending_is_the_windowed_mean_of_the_tiles():
    canvas, x = Canvas(2, 12, 0.4), torch.randn(2, 1, 26, 30, dtype=torch.float64)

    def network(tile):  # what it says of a pixel depends on the tile
        return tile + 10 * tile.mean(dim=(2, 3), keepdim=True)

    window = np.sin(np.pi * (np.arange(12) + 0.5) / 12) ** 2
    sums, weights = np.zeros((2, 1, 26, 30)), np.zeros((26, 30))
    for top in canvas.starts(26):
        for left in canvas.starts(30):
            out = network(x[..., top : top + 12, left : left + 12]).numpy()
            for i, j in itertools.product(range(12), range(12)):
                sums[..., top + i, left + j] += window[i] * window[j] * out[..., i, j]
                weights[top + i, left + j] += window[i] * window[j]
    np.testing.assert_allclose(canvas(network, x).numpy(), sums / weights, rtol=1e-6, atol=1e-6)


def test_the_border_of_a_tile_hardly_counts_where_another_tile_sees_more():
    def wrong_at_its_border(x):
        out = torch.zeros_like(x)
        out[..., 0, :] = out[..., -1, :] = out[..., :, 0] = out[..., :, -1] = 1
        return out

    out = Canvas(1, 16, 0.25)(wrong_at_its_border, torch.zeros(1, 1, 64, 64))
    assert out[..., 1:-1, 1:-1].max() < 0.06
    assert out[0, 0, 0, 20] == pytest.approx(1)  # the image's own border is nobody else's


def test_several_tiles_at_once_give_the_same_in_fewer_calls():
    x = torch.randn(2, 1, 40, 40)
    one, four = Spy(), Spy()
    torch.testing.assert_close(Canvas(1, 16)(one, x), Canvas(1, 16, tiles_at_once=4)(four, x), rtol=0, atol=0)
    assert (len(one.shapes), one.shapes[0]) == (9, (2, 1, 16, 16))
    assert [shape[0] for shape in four.shapes] == [8, 8, 2]


def test_half_precision_is_blended_in_full():
    x = torch.rand(1, 1, 50, 50).bfloat16()
    out = Canvas(1, 16, 0.5)(lambda x: x, x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, x, rtol=0, atol=0)


def test_gradients_pass_the_padding_and_the_tiles():
    x = torch.randn(1, 1, 21, 26, requires_grad=True, dtype=torch.float64)
    for canvas in (Canvas(8), Canvas(1, 10, 0.3)):
        (gradient,) = torch.autograd.grad(canvas(lambda x: x * x, x).sum(), x)
        torch.testing.assert_close(gradient, 2 * x, rtol=1e-6, atol=1e-6)


# --- arguments ---


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"tile": 0}, r"model\.init_args\.tile = 0"),
        ({"tile": 16, "overlap": 1.0}, r"model\.init_args\.overlap = 1\.0"),
        ({"tile": 16, "overlap": -0.1}, r"overlap = -0\.1"),
        ({"tile": 16, "overlap": math.nan}, "overlap = nan"),
        ({"multiple": 32, "tile": 32, "overlap": 0.25}, "use 64 or more"),
    ],
)
def test_wrong_arguments_are_named(arguments, said):
    with pytest.raises(UserError, match=said):
        Canvas(**arguments)


@pytest.mark.parametrize("overlap", [0.25, 0.5, 0.7, 0.9])
def test_the_least_tile_of_the_message_works_and_none_below(overlap):
    with pytest.raises(UserError) as error:
        Canvas(32, 16, overlap)
    least = int(str(error.value).split("use ")[1].split()[0])
    Canvas(32, least, overlap)
    with pytest.raises(UserError):
        Canvas(32, least - 32, overlap)
