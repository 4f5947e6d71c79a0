"""Views for contrastive learning: seeded, in range, and with the defects still in sight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_defect.tasks import views
from lit_defect.tasks.views import contrastive_views


def test_views_keep_nine_tenths_of_the_picture_in_sight(monkeypatch):
    grids: list[Tensor] = []
    original = views.F.grid_sample

    def noting(images: Tensor, grid: Tensor, **settings: Any) -> Tensor:
        grids.append(grid)
        return original(images, grid, **settings)

    monkeypatch.setattr(views.F, "grid_sample", noting)
    torch.manual_seed(0)
    contrastive_views(torch.rand(4000, 3, 4, 6), "fixed")
    share, moved = torch.ones(4000), []
    for axis, count in ((0, 6), (1, 4)):
        along = grids[0][:, 0, :, 0] if axis == 0 else grids[0][:, :, 0, 1]  # centres of the pixels, -1 to 1
        middle, half = along.mean(1), (along[:, -1] - along[:, 0]) / 2 * count / (count - 1)
        share *= ((middle + half).clamp(max=1) - (middle - half).clamp(min=-1)) / 2
        moved.append(middle / 2)
    assert 0.9 - 1e-5 <= share.min() < 0.905
    assert share.max() > 0.99
    assert 0.035 < torch.stack(moved).abs().max() <= 0.04 + 1e-6


@pytest.mark.parametrize("pose", ["fixed", "flips", "free"])
def test_views_are_drawn_from_the_seed_and_stay_in_range(pose):
    images = torch.rand(64, 3, 24, 24)
    torch.manual_seed(3)
    first, second = (contrastive_views(images, pose) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(contrastive_views(images, pose), first)
    assert first.shape == images.shape
    assert first.min() >= 0
    assert first.max() <= 1
    black = contrastive_views(torch.zeros(2, 3, 24, 24), pose)
    assert black.abs().max() == 0
    white = contrastive_views(torch.ones(64, 3, 24, 24), pose)  # of the light a tenth
    assert 0.9 - 1e-5 <= white.min() < 0.92


@pytest.mark.parametrize(("size", "free"), [((24, 24), 8), ((24, 36), 4)])
def test_only_a_free_pose_is_flipped_and_turned(size, free):
    corner = torch.zeros(200, 3, *size)
    corner[:, :, 3:8, 3 : size[1] // 2] = 1  # a bar: no flip or turn of it looks the same
    for pose, expected in (("fixed", 1), ("flips", 4), ("free", free)):
        torch.manual_seed(0)
        seen = contrastive_views(corner, pose)[:, 0]
        wide, high = ((seen > 0.3).any(axis).sum(1) for axis in (1, 2))
        right = seen[:, :, : size[1] // 2].sum((1, 2)) > seen[:, :, size[1] // 2 :].sum((1, 2))
        below = seen[:, : size[0] // 2].sum((1, 2)) > seen[:, size[0] // 2 :].sum((1, 2))
        kinds = {(bool(r), bool(b), bool(t)) for r, b, t in zip(right, below, high > wide, strict=True)}
        assert len(kinds) == expected, pose
        assert pose != "fixed" or kinds == {(True, True, False)}
