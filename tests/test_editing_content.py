"""What stands in a mask at first: blurs against Pillow's, latents cell by cell, masks that must not vanish."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy import ndimage
from torch.nn import functional as F

from lit_defect.editing.content import blurred, fill, latent_cells, started

LEVELS = [(256, 1), (64, 1), (16, 2), (4, 4), (2, 2)]


def scene(side: int = 96) -> np.ndarray:
    """A smooth picture with a little grain."""
    rows, columns = np.mgrid[:side, :side] / side
    smooth = np.stack([60 + 120 * rows, 200 - 90 * columns, 90 + 60 * rows * columns], axis=2)
    return np.rint(smooth + np.random.default_rng(0).normal(0, 3, smooth.shape)).clip(0, 255).astype(np.uint8)


def square(side: int = 96, first: int = 30, last: int = 66) -> np.ndarray:
    mask = np.zeros((side, side), dtype=bool)
    mask[first:last, first:last] = True
    return mask


def painted_by_pillow(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The definition layer by layer, the lowest first, with Pillow's blur and compositing in 8 bits."""
    opacity = np.where(mask, 0, 255).astype(np.uint8)
    kept = Image.fromarray(np.dstack([picture, opacity]), "RGBA").convert("RGBa")
    result = Image.new("RGBA", kept.size)
    for radius, repeats in LEVELS:
        layer = kept.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(repeats):
            result = Image.alpha_composite(result, layer)
    return np.asarray(result)[..., :3]


def painted_plainly(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The same in floats, over the whole picture: three means stand for a Gaussian, as in Pillow."""
    kept = np.dstack([picture * ~mask[..., None], ~mask]).astype(float)
    below = np.zeros_like(kept)
    for radius, repeats in LEVELS:
        layer = kept
        for _ in range(3):
            layer = ndimage.uniform_filter(layer, (2 * radius + 1, 2 * radius + 1, 0), mode="nearest")
        for _ in range(repeats):
            below = layer + (1 - layer[..., 3:]) * below
    return below[..., :3] / below[..., 3:]


@pytest.mark.parametrize("mask", [square(), square(96, 0, 40), square(96, 50, 53)])
def test_fill_lays_blurs_over_one_another(mask: np.ndarray) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (12, 12, 3)).repeat(8, axis=0).repeat(8, axis=1)
    filled = fill(picture.astype(np.uint8), mask)[mask]
    np.testing.assert_allclose(filled, painted_plainly(picture, mask)[mask], atol=1)


def test_fill_is_the_surroundings_blurred_as_the_web_interface_does() -> None:
    mask = square()
    filled, expected = fill(scene(), mask)[mask].astype(float), painted_by_pillow(scene(), mask)[mask]
    assert np.abs(filled - expected).mean() < 1.5
    assert np.abs(filled - expected).max() < 8
    assert np.abs(scene()[mask] - expected).mean() > 3  # which the picture itself does not pass


def test_fill_leaves_the_outside_and_forgets_the_inside() -> None:
    mask, picture = square(), scene()
    other = picture.copy()
    other[mask] = 255 - other[mask]
    filled = fill(picture, mask)
    assert np.array_equal(filled[~mask], picture[~mask])
    assert np.array_equal(filled, fill(other, mask))


def test_fill_of_a_plain_picture_is_plain() -> None:
    picture = np.full((64, 80, 3), (10, 100, 250), dtype=np.uint8)
    mask = np.zeros((64, 80), dtype=bool)
    mask[5:60, 3:79] = True
    mask[20, 20] = False
    assert np.array_equal(fill(picture, mask), picture)


def test_fill_takes_the_colour_that_is_near() -> None:
    picture = np.zeros((80, 80, 3), dtype=np.uint8)
    picture[:, 40:] = 200
    mask = np.zeros((80, 80), dtype=bool)
    mask[:, 30:50] = True
    row = fill(picture, mask)[40, 30:50, 0].astype(int)
    assert row[0] < 20
    assert row[-1] > 180
    assert (np.diff(row) >= 0).all()


def test_fill_reaches_into_a_mask_wider_than_all_blurs() -> None:
    picture = np.full((16, 1800, 3), 77, dtype=np.uint8)
    mask = np.ones((16, 1800), dtype=bool)
    mask[:, 0] = False
    assert np.array_equal(fill(picture, mask), picture)


def test_fill_of_an_empty_or_a_full_mask() -> None:
    picture = scene(20)
    unchanged = fill(picture, np.zeros((20, 20), dtype=bool))
    assert np.array_equal(unchanged, picture)
    assert unchanged is not picture
    full = fill(picture, np.ones((20, 20), dtype=bool))
    assert np.array_equal(full, np.broadcast_to(np.rint(picture.mean(axis=(0, 1))), full.shape))


@pytest.mark.parametrize("content", ["original", "fill", "latent_noise", "latent_nothing"])
def test_latents_start_as_the_content_says(content: str) -> None:
    made = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 4, 3, 5, generator=made)
    mask = (torch.rand(2, 1, 3, 5, generator=made) > 0.5).float()
    begun = started(latents, mask, content, noise)  # type: ignore[arg-type]
    inside = {"latent_noise": noise, "latent_nothing": torch.zeros_like(latents)}.get(content, latents)
    for one in range(2):
        for row in range(3):
            for column in range(5):
                expected = (inside if mask[one, 0, row, column] else latents)[one, :, row, column]
                assert torch.equal(begun[one, :, row, column], expected)


def test_noise_and_nothing_do_not_let_through_what_is_not_finite() -> None:
    """A product with the mask would."""
    latents = torch.full((1, 4, 2, 2), torch.nan)
    mask = torch.ones(1, 1, 2, 2)
    assert started(latents, mask, "latent_nothing", latents).eq(0).all()


def test_a_masks_blur_is_a_gaussian_cut_at_two_and_a_half_deviations() -> None:
    mask = np.zeros((41, 41), dtype=bool)
    mask[:, 20:] = True
    row = blurred(mask, 4)[20]
    reach = np.arange(-10, 11)
    weights = np.exp(-(reach**2) / 32) / np.exp(-(reach**2) / 32).sum()
    assert row[20] == pytest.approx(weights[reach <= 0].sum(), abs=1e-6)
    assert row[12] == pytest.approx(weights[reach >= 8].sum(), abs=1e-6)
    assert row[9] == 0
    assert row[10] > 0
    assert blurred(mask, 4).dtype == np.float32


def test_no_blur_is_the_mask() -> None:
    mask = square(20, 3, 9)
    assert np.array_equal(blurred(mask, 0), mask.astype(np.float32))


def test_masks_blur_stays_between_0_and_1_at_the_frame() -> None:
    mask = np.ones((9, 9), dtype=bool)
    assert np.allclose(blurred(mask, 6), 1)
    assert blurred(mask, 6).max() <= 1


def cells_of(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    cells = latent_cells(torch.from_numpy(mask.astype(np.float32))[None, None], size)
    assert cells.shape == (1, 1, *size)
    return cells[0, 0].numpy()


def test_cells_are_those_that_a_mask_covers_by_half() -> None:
    mask = np.zeros((32, 32), dtype=bool)
    mask[4:20, 5:16] = True  # rows: half of cell 0, 1, half of 2; columns: 3/8 of cell 0, 1
    expected = np.zeros((4, 4))
    expected[0:3, 1] = 1
    assert np.array_equal(cells_of(mask, (4, 4)), expected)


def test_a_soft_mask_is_rounded_at_a_half() -> None:
    soft = np.repeat(np.array([0.2, 0.49, 0.51, 0.9]), 8)[None].repeat(8, axis=0)
    assert np.array_equal(cells_of(soft, (1, 4)), [[0, 0, 1, 1]])


def test_a_mask_smaller_than_half_a_cell_stays() -> None:
    mask = np.zeros((64, 64), dtype=bool)
    mask[33:35, 42:44] = True
    cells = cells_of(mask, (8, 8))
    assert cells.sum() == 1
    assert cells[4, 5] == 1


def test_a_speck_beside_a_large_part_stays_and_a_blurred_scratch_too() -> None:
    mask = np.zeros((64, 64), dtype=bool)
    mask[:32, :32] = True
    mask[60, 60] = True
    cells = cells_of(mask, (8, 8))
    assert cells.sum() == 17
    assert cells[7, 7] == 1
    scratch = np.zeros((64, 64), dtype=bool)
    scratch[20, 8:56] = True
    cells = cells_of(blurred(scratch, 4), (8, 8))  # at most a tenth anywhere
    assert cells[2].tolist() == [0, 1, 1, 1, 1, 1, 1, 0]
    assert cells.sum() == 6


def test_specks_are_looked_at_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    resize = F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda x, *a, **k: (seen.append(x.numel()), resize(x, *a, **k))[1])
    mask = np.zeros((256, 512), dtype=bool)
    mask[3::16, 5::16] = True
    mask[100:103, 20:300] = True  # a scratch through some of them
    expected = np.zeros((32, 64))
    expected[::2, ::2] = 1
    expected[12, 2:37] = 1
    assert np.array_equal(cells_of(mask, (32, 64)), expected)
    assert sum(seen) < 3 * mask.size, "a thousand specks of a photograph are not a thousand photographs"


def test_cells_of_an_empty_a_full_and_several_masks() -> None:
    masks = torch.zeros(3, 1, 16, 16, dtype=torch.float16)
    masks[1] = 1
    masks[2, :, :8] = 1
    cells = latent_cells(masks, (2, 2))
    assert cells.dtype == torch.float16
    assert cells.flatten(1).tolist() == [[0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
