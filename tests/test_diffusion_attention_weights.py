"""The weights of adaptive attention re-weighting, pixel by pixel, against numpy and scipy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax

from lit_defect.diffusion.attention import official_weights, paper_weights


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1)


# --- weights of the paper ---


def pictures(scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mask = (torch.rand(3, 1, 6, 5) < 0.5).float()
    return scale * torch.randn(3, 4, 6, 5), scale * torch.randn(3, 4, 6, 5), mask


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_paper_weights_are_a_softmax_of_one_over_the_distance(scale):
    x0, normal, mask = pictures(scale)
    normal[0, :, 2, 3] = x0[0, :, 2, 3]
    mask[0, 0, 2, 3] = 1  # inside, but nothing differs: -inf as outside
    found = paper_weights(x0, normal, mask)
    assert found.shape == (3, 1, 6, 5)
    for w, a, y, m in zip(
        found.numpy()[:, 0], x0.double().numpy(), normal.double().numpy(), mask.double().numpy()[:, 0], strict=True
    ):
        d = ((m * y - m * a) ** 2).sum(axis=0)
        with np.errstate(divide="ignore"):
            f = np.where(d == 0, -np.inf, 1 / d)
        np.testing.assert_allclose(w, m.sum() * softmax(f), rtol=1e-4, atol=1e-6)
        assert w.sum() == pytest.approx(m.sum(), rel=1e-5)
        assert (w[m == 0] == 0).all()
        assert w[m == 1].std() > 0
    assert found[0, 0, 2, 3] == 0


def test_paper_weights_are_the_mask_where_nothing_differs_and_zero_without_a_mask():
    x0, normal, mask = pictures()
    normal[0] = x0[0]
    mask[1] = 0
    mask[2] = 1
    found = paper_weights(x0, normal, mask)
    np.testing.assert_array_equal(found[0].numpy(), mask[0].numpy())
    assert (found[1] == 0).all()
    assert found[2].sum() == pytest.approx(30, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_paper_weights_do_not_overflow_where_pictures_almost_agree(dtype):
    x0, normal, mask = (x.to(dtype) for x in pictures())
    mask[:] = 1
    normal[:] = x0
    if dtype == torch.float32:
        x0[:, :, 0, 0] = normal[:, :, 0, 0] = 0
        x0[:, 0, 0, 0] = 1e-21  # d = 1e-42, so that 1 / d is no number of float32
    x0[:, 0, 3, 3] += 0.5
    found = paper_weights(x0, normal, mask)
    assert found.dtype == torch.float32
    assert torch.isfinite(found).all()
    np.testing.assert_allclose(found.sum(dim=(1, 2, 3)), 30, rtol=1e-5)
    assert (found.flatten(1).argmax(dim=1) == (0 if dtype == torch.float32 else 18)).all()


# --- weights of the authors' code ---


def test_official_weights_are_shares_of_one_over_the_distance_within_bounds():
    noisy, normal, mask = pictures()
    found = official_weights(noisy, normal, mask).numpy()[:, 0]
    seen = set()
    for w, x, y, m in zip(found, noisy.numpy(), normal.numpy(), mask.numpy()[:, 0].astype(bool), strict=True):
        near = {(i, j): 1 / float(((x[:, i, j] - y[:, i, j]) ** 2).sum()) for i, j in zip(*np.nonzero(m), strict=True)}
        for i, j in np.ndindex(w.shape):
            raw = m.sum() * near[i, j] / sum(near.values()) if (i, j) in near else 1.0
            assert w[i, j] == pytest.approx(np.clip(raw, 1, 1.5), rel=1e-4)
            seen.add("low" if raw < 1 else "high" if raw > 1.5 else "outside" if raw == 1 else "between")
    assert seen == {"low", "high", "between", "outside"}


def test_official_weights_of_extremes_are_finite():
    noisy, normal, mask = pictures()
    mask[0] = 0
    noisy[1] = normal[1]
    mask[2] = 1
    noisy[2, :, 1, 1] = normal[2, :, 1, 1]
    found = official_weights(noisy, normal, mask)
    assert (found[:2] == 1).all()
    assert found[2, 0, 1, 1] == 1.5
    assert ((found >= 1) & (found <= 1.5)).all()
