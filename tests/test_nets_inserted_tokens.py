"""The table of learnt tokens row by row, and what the spatial encoder's tokens say of a mask, by numpy and regression."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lit_defect.errors import UserError
from lit_defect.nets.inserted_tokens import AnomalyTokens, SpatialEncoder

PAIRS = [("tile", "crack"), ("tile", "hole"), ("grid", "bent")]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def spot(height: int, width: int, row: int, column: int, radius: int) -> torch.Tensor:
    """(1, 1, H, W), a square around a place."""
    mask = torch.zeros(1, 1, height, width)
    mask[..., max(0, row - radius) : row + radius + 1, max(0, column - radius) : column + radius + 1] = 1
    return mask


# --- anomaly tokens ---


def test_each_pair_has_its_own_row_in_the_order_given():
    tokens = AnomalyTokens(PAIRS, count=3, width=5)
    rows = torch.tensor([tokens.row_of("grid", "bent"), tokens.row_of("tile", "crack")])
    assert rows.tolist() == [2, 0]
    found = tokens(rows)
    assert found.shape == (2, 3, 5)
    for picture, row in enumerate(rows.tolist()):
        np.testing.assert_array_equal(found[picture].detach(), tokens.weight[row].detach())
    assert [name for name, _ in tokens.named_parameters()] == ["weight"]


def test_tokens_start_from_one_word_without_sharing_it():
    word = torch.arange(4.0)
    tokens = AnomalyTokens(PAIRS, count=2, width=4, start=word)
    np.testing.assert_array_equal(tokens.weight.detach(), np.broadcast_to(np.arange(4.0), (3, 2, 4)))
    with torch.no_grad():
        tokens.weight[0, 0] += 1
    assert word.tolist() == [0, 1, 2, 3]
    assert tokens.weight[0, 1].tolist() == [0, 1, 2, 3]
    assert tokens.weight[1, 0].tolist() == [0, 1, 2, 3]


def test_tokens_without_a_word_start_small_and_all_different():
    weight = AnomalyTokens(PAIRS, count=8, width=500).weight.detach().numpy()
    assert weight.std() == pytest.approx(0.02, rel=0.05)
    assert abs(weight.mean()) < 1e-3
    assert len(np.unique(weight[..., 0])) == 24


def test_only_the_rows_of_the_batch_receive_gradient():
    tokens = AnomalyTokens(PAIRS, count=2, width=4)
    tokens(torch.tensor([1, 1])).sum().backward()
    assert tokens.weight.grad is not None
    np.testing.assert_array_equal(tokens.weight.grad.sum(dim=(1, 2)), [0, 16, 0])


def test_an_unknown_type_is_answered_with_those_of_its_category():
    tokens = AnomalyTokens(PAIRS, count=2, width=4)
    with pytest.raises(
        UserError, match=r"'scratch' of category 'tile' was not learnt; there are tile/crack, tile/hole$"
    ):
        tokens.row_of("tile", "scratch")
    with pytest.raises(UserError, match=r"of category 'wood' .* tile/crack, tile/hole, grid/bent$"):
        tokens.row_of("wood", "hole")


def test_a_table_that_makes_no_sense_is_refused():
    with pytest.raises(UserError, match=r"anomaly_tokens = 0: expected at least 1"):
        AnomalyTokens(PAIRS, count=0, width=4)
    with pytest.raises(UserError, match=r"training split has no defect"):
        AnomalyTokens([], count=2, width=4)
    with pytest.raises(UserError, match=r"there twice: tile/hole$"):
        AnomalyTokens([*PAIRS, ("tile", "hole")], count=2, width=4)
    with pytest.raises(ValueError, match=r"start of shape \(5,\): expected \(4,\)"):
        AnomalyTokens(PAIRS, count=2, width=4, start=torch.zeros(5))


# --- spatial encoder ---


def test_encoder_of_the_papers_size_is_light_and_as_long_as_a_word():
    encoder = SpatialEncoder(count=4, width=768, scale=0.4)
    assert sum(p.numel() for p in encoder.parameters()) < 1_000_000
    with torch.no_grad():
        tokens = encoder(torch.cat([spot(64, 64, 10, 50, 3), spot(64, 64, 40, 8, 9)]))
    assert tokens.shape == (2, 4, 768)
    np.testing.assert_allclose(np.linalg.norm(tokens.numpy(), axis=-1), 0.4, rtol=0.05)


@pytest.mark.parametrize("size", [(64, 64), (17, 300), (1, 1), (96, 40), (512, 513)])
def test_masks_of_any_size_are_taken(size):
    tokens = SpatialEncoder(count=2, width=6, scale=1.0, channels=(8, 8))((torch.rand(3, 1, *size) > 0.5).float())
    assert tokens.shape == (3, 2, 6)
    assert torch.isfinite(tokens).all()


def test_a_larger_mask_is_seen_by_the_maximum_of_its_blocks():
    encoder = SpatialEncoder(count=2, width=6, scale=1.0, side=16, channels=(8, 8))
    small = (torch.rand(2, 1, 16, 16) > 0.8).float()
    sparse = torch.zeros(2, 1, 64, 48)
    sparse[..., 3::4, 1::3] = small  # one pixel of each block of 4 x 3
    solid = torch.from_numpy(np.kron(small.numpy(), np.ones((4, 3), np.float32)))
    for large in (sparse, solid):
        torch.testing.assert_close(encoder(large), encoder(small), rtol=0, atol=0)


def test_a_smaller_mask_is_repeated_and_one_that_is_both_is_pooled_along_one_side():
    encoder = SpatialEncoder(count=2, width=6, scale=1.0, side=16, channels=(8, 8))
    small = (torch.rand(1, 1, 4, 8) > 0.5).float().numpy()
    full = np.kron(small, np.ones((4, 2), np.float32))
    torch.testing.assert_close(encoder(torch.from_numpy(small)), encoder(torch.from_numpy(full)), rtol=0, atol=0)
    tall = (torch.rand(1, 1, 32, 8) > 0.8).float().numpy()
    seen = np.kron(tall.reshape(16, 2, 8).max(axis=1), np.ones((1, 2), np.float32))[None, None]
    torch.testing.assert_close(encoder(torch.from_numpy(tall)), encoder(torch.from_numpy(seen)), rtol=0, atol=0)


def test_one_pixel_of_a_large_picture_is_not_lost():
    encoder = SpatialEncoder(count=4, width=32, scale=1.0)
    with torch.no_grad():
        nothing, here, there = (
            encoder(m) for m in (torch.zeros(1, 1, 900, 700), spot(900, 700, 100, 600, 0), spot(900, 700, 700, 80, 0))
        )
    assert (here - nothing).norm(dim=-1).min() > 0.1
    assert (here - there).norm(dim=-1).min() > 0.1


def test_even_untrained_tokens_tell_where_and_how_large_a_defect_is():
    """By a linear regression on masks it has not seen: the information is there, and not as a small rest."""
    encoder = SpatialEncoder(count=4, width=32, scale=1.0)
    rng = np.random.default_rng(0)
    places = rng.integers(2, 62, size=(1200, 2))
    radii = rng.integers(0, 9, size=1200)
    masks = torch.cat([spot(64, 64, *place, radius) for place, radius in zip(places, radii, strict=True)])
    with torch.no_grad():
        tokens = encoder(masks).flatten(1).double().numpy()  # 4 vectors of length 1 each
    assert tokens.var(axis=0).sum() > 0.4 * 4
    wanted = np.column_stack([places, radii])
    x = np.column_stack([tokens, np.ones(1200)])
    fitted = np.linalg.lstsq(x[:900], wanted[:900], rcond=1e-4)[0]
    rest = ((x[900:] @ fitted - wanted[900:]) ** 2).mean(axis=0) / wanted[900:].var(axis=0)
    assert (1 - rest > 0.5).all(), 1 - rest


def test_every_weight_of_the_encoder_learns():
    encoder = SpatialEncoder(count=2, width=6, scale=1.0, side=16, channels=(8, 8))
    tokens = encoder((torch.rand(4, 1, 16, 16) > 0.5).float())
    (tokens * torch.randn_like(tokens)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


def test_encoder_runs_in_half_precision_and_its_state_holds_weights_only():
    encoder = SpatialEncoder(count=2, width=6, scale=1.0)
    mask = spot(64, 64, 30, 30, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = encoder(mask)
    torch.testing.assert_close(half.float(), encoder(mask), atol=0.05, rtol=0.05)
    assert set(encoder.state_dict()) == {name for name, _ in encoder.named_parameters()}


def test_an_encoder_that_makes_no_sense_is_refused():
    with pytest.raises(UserError, match=r"spatial_tokens = 0: expected at least 1"):
        SpatialEncoder(count=0, width=6, scale=1.0)
    for side in (4, 20):
        with pytest.raises(ValueError, match=r"cannot be halved 3 times"):
            SpatialEncoder(count=1, width=6, scale=1.0, side=side)
