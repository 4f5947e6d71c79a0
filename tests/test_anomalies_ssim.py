import numpy as np
import pytest
import torch
from skimage import data
from skimage.metrics import structural_similarity

from lit_defect.anomalies import ssim, ssim_map
from lit_defect.anomalies.pixels import Boxes, Pixels, Strips
from lit_defect.anomalies.ssim import ssim_around


def picture(name: str, height: int, width: int) -> torch.Tensor:
    """(1, 3, height, width) the upper left corner of a photograph."""
    pixels = np.asarray(getattr(data, name)())
    pixels = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
    return torch.from_numpy(pixels[:height, :width].copy()).permute(2, 0, 1)[None].float() / 255


def of_skimage(x: torch.Tensor, y: torch.Tensor) -> tuple[float, np.ndarray]:
    mean, full = structural_similarity(
        x[0].permute(1, 2, 0).double().numpy(),
        y[0].permute(1, 2, 0).double().numpy(),
        channel_axis=2,
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    return mean, full.mean(axis=2)[5:-5, 5:-5]


@pytest.mark.parametrize(("name", "height", "width"), [("brick", 128, 128), ("coffee", 90, 140), ("grass", 11, 40)])
def test_equals_scikit_image(name: str, height: int, width: int) -> None:
    x = picture(name, height, width)
    y = (x + 0.1 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    mean, full = of_skimage(x, y)
    assert ssim(x, y).item() == pytest.approx(mean, abs=1e-5)
    assert np.abs(ssim_map(x, y)[0].numpy() - full).max() < 1e-4  # of one pixel, where a dark ground has no variance


def test_flat_bright_pictures_are_precise() -> None:
    # x^2 is near 1 and the variance near 1e-6: what float32 loses there must not show against C2 = 9e-4
    generator = torch.Generator().manual_seed(0)
    x = 0.97 + 0.002 * torch.rand(1, 3, 64, 64, generator=generator)
    y = 0.97 + 0.002 * torch.rand(1, 3, 64, 64, generator=generator)
    assert ssim(x, y).item() == pytest.approx(of_skimage(x, y)[0], abs=1e-5)


def test_identical_is_exactly_one() -> None:
    x = torch.stack((torch.full((3, 20, 30), 0.3), torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))))
    assert ssim(x, x).tolist() == [1.0, 1.0]


def test_is_float32_under_autocast() -> None:
    x, y = picture("brick", 64, 64), picture("gravel", 64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = ssim(x, y)
    assert torch.equal(under, ssim(x, y))


def test_refuses_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="one shape"):
        ssim(torch.zeros(1, 3, 20, 20), torch.zeros(1, 3, 20, 21))
    with pytest.raises(ValueError, match="at least 11x11, not 10x20"):
        ssim(torch.zeros(1, 3, 10, 20), torch.zeros(1, 3, 10, 20))


BOXES = [(0, 0, 1, 1), (39, 59, 40, 60), (0, 0, 40, 60), (3, 50, 23, 60), (17, 20, 19, 57), (10, 10, 30, 31)]


@pytest.mark.parametrize("scope", ["image", "patch"])
def test_around_the_edit_equals_the_whole_map(scope: str) -> None:
    """Corners, one pixel, the whole picture, long thin: all in one list against one map each."""
    generator = torch.Generator().manual_seed(0)
    height, width = 40, 60
    images = torch.cat((picture("coffee", height, width), picture("brick", height, width)))
    owner = torch.tensor([0, 1, 0, 1, 0, 1])
    edits = Pixels(Boxes(*torch.tensor(BOXES).T), owner, images.shape, images.device)
    values = torch.rand(3, edits.total, generator=generator)
    found = ssim_around(images, edits, values, scope)  # type: ignore[arg-type]
    begin = 0
    for number, (top, left, bottom, right) in enumerate(BOXES):
        before = images[owner[number]][None]
        after, count = before.clone(), (bottom - top) * (right - left)
        after[0, :, top:bottom, left:right] = values[:, begin : begin + count].view(3, bottom - top, right - left)
        begin += count
        full = np.full((height, width), np.nan)
        full[5:-5, 5:-5] = of_skimage(before, after)[1]
        if scope == "patch":  # at least 11 pixels around the same middle
            more_y, more_x = max(0, -(-(11 - (bottom - top)) // 2)), max(0, -(-(11 - (right - left)) // 2))
            full = full[max(0, top - more_y) : bottom + more_y, max(0, left - more_x) : right + more_x]
        assert found[number].item() == pytest.approx(np.nanmean(full), abs=1e-5)


def test_pixels_walk_through_strips() -> None:
    strips = Strips(*torch.tensor([[0, 2, 1, 3], [0, 3, 0, 0], [1, 0, 4, 2]]).T)
    pixels = Pixels(
        Boxes(*torch.tensor([[2, 0, 4, 4], [0, 4, 1, 6]]).T),
        torch.tensor([1, 0]),
        torch.Size((2, 3, 5, 7)),
        torch.device("cpu"),
        strips,
    )
    images = torch.arange(2 * 3 * 5 * 7).view(2, 3, 5, 7).float()
    expected = torch.cat((images[1, :, 2, 1:4], images[0, :, 0, 4:6]), dim=1)
    assert torch.equal(pixels.read(images), expected)
    assert pixels.sums(torch.ones(pixels.total)).tolist() == [3, 2]
    assert pixels.spread(torch.tensor([10.0, 20.0])).tolist() == [10, 10, 10, 20, 20]
