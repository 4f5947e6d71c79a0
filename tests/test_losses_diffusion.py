"""The losses of AnomalyDiffusion against numpy, worked out cell by cell, and their gradients where they must be zero."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lit_defect.errors import UserError
from lit_defect.losses.diffusion import alignment_loss, latent_mask, masked_mse, min_snr_weights, offset_noise


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def masks_of(batch: int, height: int, width: int, share: float = 0.1) -> torch.Tensor:
    return (torch.rand(batch, 1, height, width) < share).float()


# --- masks at the resolution of latents ---


@pytest.mark.parametrize(("full", "size"), [((32, 24), (4, 3)), ((19, 10), (5, 3)), ((8, 8), (8, 8))])
def test_a_cell_counts_if_any_of_its_pixels_does(full, size):
    masks = masks_of(3, *full, share=0.05)
    expected = np.zeros((3, 1, *size))
    for i in range(size[0]):
        for j in range(size[1]):
            rows = slice(i * full[0] // size[0], -(-(i + 1) * full[0] // size[0]))
            columns = slice(j * full[1] // size[1], -(-(j + 1) * full[1] // size[1]))
            expected[:, :, i, j] = masks.numpy()[:, :, rows, columns].max(axis=(2, 3))
    np.testing.assert_array_equal(latent_mask(masks, size, "max").numpy(), expected)


def test_the_original_mask_is_the_mean_of_four_pixels_cut_at_one_half():
    masks = masks_of(3, 32, 48, share=0.5)
    # Every eighth pixel of an interpolation lies between the fourth and the fifth of eight.
    m = masks.numpy()
    mean = (m[..., 3::8, 3::8] + m[..., 4::8, 3::8] + m[..., 3::8, 4::8] + m[..., 4::8, 4::8]) / 4
    np.testing.assert_array_equal(latent_mask(masks, (4, 6), "bilinear").numpy(), mean >= 0.5)


def test_a_defect_smaller_than_a_cell_is_lost_by_the_original_only():
    masks = torch.zeros(1, 1, 64, 64)
    masks[..., 17, 42] = 1
    assert latent_mask(masks, (8, 8), "bilinear").sum() == 0
    kept = latent_mask(masks, (8, 8), "max")
    assert kept.sum() == 1
    assert kept[0, 0, 2, 5] == 1


def test_another_way_to_shrink_a_mask_is_refused():
    with pytest.raises(UserError, match=r"latent_mask = 'area': expected max or bilinear"):
        latent_mask(masks_of(1, 8, 8), (4, 4), "area")  # type: ignore[arg-type]


# --- masked error ---


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mask = masks_of(3, 6, 5, share=0.4)
    mask[1] = 0
    mask[1, 0, 2, 3] = 1
    return torch.randn(3, 4, 6, 5), torch.randn(3, 4, 6, 5), mask


def test_normalised_error_is_the_mean_over_each_pictures_own_mask():
    output, target, mask = batch()
    each = []
    for o, t, m in zip(output.numpy(), target.numpy(), mask.numpy()[:, 0].astype(bool), strict=True):
        each.append(np.mean((o - t)[:, m] ** 2))
    assert float(masked_mse(output, target, mask)) == pytest.approx(np.mean(each), rel=1e-5)
    weights = torch.tensor([0.5, 2.0, 0.0])
    weighted = float(masked_mse(output, target, mask, weights=weights))
    assert weighted == pytest.approx((0.5 * each[0] + 2 * each[1]) / 3, rel=1e-5)


def test_original_error_is_the_mean_over_everything():
    output, target, mask = batch()
    e = mask.numpy() * (output.numpy() - target.numpy())
    assert float(masked_mse(output, target, mask, normalised=False)) == pytest.approx(np.mean(e**2), rel=1e-5)
    plain = np.mean((output.numpy() - target.numpy()) ** 2)
    for normalised in (True, False):
        assert float(masked_mse(output, target, None, normalised)) == pytest.approx(plain, rel=1e-5)


def test_only_the_normalised_error_is_the_same_for_small_and_large_defects():
    small, large = torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16)
    small[..., 3, 4] = 1
    large[..., 2:10, 2:14] = 1
    output, target = torch.full((1, 4, 16, 16), 3.0), torch.zeros(1, 4, 16, 16)
    assert float(masked_mse(output, target, small)) == pytest.approx(9)
    assert float(masked_mse(output, target, large)) == pytest.approx(9)
    ratio = masked_mse(output, target, large, False) / masked_mse(output, target, small, False)
    assert float(ratio) == pytest.approx(96)


@pytest.mark.parametrize("normalised", [True, False])
def test_outside_the_mask_there_is_no_gradient(normalised):
    output, target, mask = batch()
    output.requires_grad_(True)
    masked_mse(output, target, mask, normalised).backward()
    assert output.grad is not None
    np.testing.assert_array_equal(output.grad.numpy() != 0, np.broadcast_to(mask.numpy() > 0, output.shape))


def test_an_empty_mask_is_no_error_and_no_gradient():
    output, target, _ = batch()
    output.requires_grad_(True)
    loss = masked_mse(output, target, torch.zeros(3, 1, 6, 5))
    loss.backward()
    assert loss == 0
    assert output.grad is not None
    assert output.grad.abs().sum() == 0


def test_error_in_half_precision_is_summed_in_single():
    output, target, mask = torch.full((1, 4, 64, 64), 300.0), torch.zeros(1, 4, 64, 64), torch.ones(1, 1, 64, 64)
    loss = masked_mse(output.half(), target.half(), mask)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(9e4)


def test_shapes_that_do_not_match_are_refused():
    output, target, mask = batch()
    for wrong in ((output, target[:, :3], mask), (output, target, mask[:, 0]), (output, target, masks_of(3, 5, 5))):
        with pytest.raises(ValueError, match=r"expected \(B, C, h, w\) twice and \(B, 1, h, w\)"):
            masked_mse(*wrong)


# --- weights of steps ---


def test_weights_of_every_answer_are_the_same_loss_on_x0():
    """An error of x_0 is one of sqrt(SNR) in the noise and of sqrt(SNR + 1) in v."""
    a = np.linspace(0.005, 0.995, 50)
    snr = a / (1 - a)
    on_x0 = np.minimum(snr, 5)
    alpha_bar = torch.tensor(a, dtype=torch.float32)
    np.testing.assert_allclose(min_snr_weights(alpha_bar, 5, "sample"), on_x0, rtol=1e-4)
    np.testing.assert_allclose(min_snr_weights(alpha_bar, 5, "epsilon") * snr, on_x0, rtol=1e-4)
    np.testing.assert_allclose(min_snr_weights(alpha_bar, 5, "v_prediction") * (snr + 1), on_x0, rtol=1e-4)


def test_weights_agree_with_the_signal_to_noise_ratio_of_diffusers():
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    steps = torch.tensor([0, 10, 400, 999])
    snr = compute_snr(scheduler, steps)
    found = min_snr_weights(scheduler.alphas_cumprod[steps], 5.0, "epsilon")
    torch.testing.assert_close(found, torch.stack([snr, torch.full_like(snr, 5)]).amin(dim=0) / snr)


@pytest.mark.parametrize(("prediction", "ends"), [("epsilon", [1, 0]), ("v_prediction", [0, 0]), ("sample", [0, 5])])
def test_weights_are_finite_without_signal_and_without_noise(prediction, ends):
    assert min_snr_weights(torch.tensor([0.0, 1.0]), 5, prediction).tolist() == ends


def test_weights_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match=r"min_snr_gamma = 0: expected more than 0"):
        min_snr_weights(torch.tensor([0.5]), 0)
    with pytest.raises(UserError, match=r"predicts 'flow'"):
        min_snr_weights(torch.tensor([0.5]), 5, "flow")


# --- offset noise ---


def test_offset_is_one_number_for_each_channel_of_each_picture():
    noise = torch.randn(500, 4, 3, 5)
    shift = (offset_noise(noise, 0.1) - noise).numpy()
    np.testing.assert_allclose(shift, np.broadcast_to(shift[:, :, :1, :1], shift.shape), atol=1e-6)
    assert shift[:, :, 0, 0].std() == pytest.approx(0.1, rel=0.05)
    assert abs(np.corrcoef(shift[:, :, 0, 0].T) - np.eye(4)).max() < 0.2


def test_offset_follows_its_generator_and_none_draws_nothing():
    noise = torch.randn(2, 4, 3, 5)
    first, again = (offset_noise(noise, 0.1, torch.Generator().manual_seed(7)) for _ in range(2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    before = torch.get_rng_state()
    assert offset_noise(noise, 0.0) is noise
    assert torch.equal(torch.get_rng_state(), before)


# --- alignment of attention ---


def test_alignment_is_the_share_of_attention_that_falls_outside():
    maps = [torch.rand(2, 8, 6), torch.rand(2, 4, 3)]
    masks = torch.zeros(2, 1, 16, 12)
    masks[0, :, 1, 2] = 1
    masks[1, :, 8:16, 6:12] = 1
    a, b = (m.numpy() for m in maps)
    shares = [
        a[0, 0, 1] / a[0].sum(), a[1, 4:, 3:].sum() / a[1].sum(),
        b[0, 0, 0] / b[0].sum(), b[1, 2:, 2:].sum() / b[1].sum() + b[1, 2:, 1].sum() / b[1].sum(),
    ]  # fmt: skip
    assert float(alignment_loss(maps, masks)) == pytest.approx(1 - np.mean(shares), rel=1e-5)


def test_alignment_of_attention_all_inside_all_outside_and_everywhere():
    masks = torch.zeros(1, 1, 8, 8)
    masks[..., :2, :4] = 1
    inside = masks[:, 0].clone()
    assert float(alignment_loss([inside], masks)) == pytest.approx(0)
    assert float(alignment_loss([1 - inside], masks)) == pytest.approx(1)
    assert float(alignment_loss([torch.ones(1, 8, 8)], masks)) == pytest.approx(1 - 8 / 64)


def test_less_alignment_loss_is_more_attention_inside():
    logits = torch.zeros(1, 4, 4, requires_grad=True)
    masks = torch.zeros(1, 1, 4, 4)
    masks[..., 1, 2] = 1
    alignment_loss([logits.sigmoid()], masks).backward()
    assert logits.grad is not None
    inside = masks[:, 0].bool()
    assert (logits.grad[inside] < 0).all()
    assert (logits.grad[~inside] > 0).all()


def test_alignment_of_empty_masks_and_of_no_attention_is_finite():
    attention = torch.rand(2, 4, 4, requires_grad=True)
    loss = alignment_loss([attention, torch.zeros(2, 4, 4)], torch.zeros(2, 1, 8, 8))
    loss.backward()
    assert loss.item() == 1
    assert attention.grad is not None
    assert torch.isfinite(attention.grad).all()
    with pytest.raises(ValueError, match="no attention was recorded"):
        alignment_loss([], torch.zeros(2, 1, 8, 8))
