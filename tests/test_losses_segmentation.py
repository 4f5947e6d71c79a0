"""Losses for masks against numbers worked by hand, torch's and smp's losses on the pixels that count."""

from __future__ import annotations

import math

import pytest
import torch
from segmentation_models_pytorch.losses import DiceLoss
from segmentation_models_pytorch.losses._functional import softmax_focal_loss_with_logits
from torch.nn.functional import cross_entropy

from lit_defect.errors import UserError
from lit_defect.losses.segmentation import MASK_LOSSES, make_mask_loss


@pytest.fixture
def batch():
    """Logits and a truth with every class and some void."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 6, 5, generator=generator) * 2
    target = torch.randint(0, 4, (2, 6, 5), generator=generator)
    target[0, :2] = 255
    target[1, 3, 3] = 255
    return logits, target


def pixels(logits, target):
    """The pixels that count as (N, C) and (N,)."""
    valid = target != 255
    return logits.permute(0, 2, 3, 1)[valid], target[valid]


def by_hand():
    """Two pixels of p = (3/4, 1/4) and (1/5, 4/5), both of class 1, and a void one."""
    p = torch.tensor([[0.75, 0.25], [0.2, 0.8], [0.9, 0.1]])
    return p.log().T.reshape(1, 2, 1, 3), torch.tensor([[[1, 1, 255]]])


# --- values ---


def test_values_worked_by_hand():
    logits, target = by_hand()
    ce = -(math.log(0.25) + math.log(0.8)) / 2
    focal = -(0.75**2 * math.log(0.25) + 0.2**2 * math.log(0.8)) / 2
    dice = 1 - 2 * (0.25 + 0.8) / ((0.25 + 0.8) + 2)  # class 1 alone: there is no other in the truth
    expected = {"ce": ce, "focal": focal, "dice": dice, "ce_dice": ce + dice, "focal_dice": focal + dice}
    for name, value in expected.items():
        assert make_mask_loss(name)(logits, target).item() == pytest.approx(value, rel=1e-6), name


def test_weights_worked_by_hand():
    p = torch.tensor([[0.75, 0.25], [0.2, 0.8]])
    logits, target = p.log().T.reshape(1, 2, 1, 2), torch.tensor([[[0, 1]]])
    ce = -(2 * math.log(0.75) + 5 * math.log(0.8)) / 2  # per pixel, not per sum of weights
    dice = (2 * (1 - 1.5 / (0.95 + 1)) + 5 * (1 - 1.6 / (1.05 + 1))) / 7
    assert make_mask_loss("ce", class_weights=[2, 5])(logits, target).item() == pytest.approx(ce, rel=1e-6)
    assert make_mask_loss("dice", class_weights=[2, 5])(logits, target).item() == pytest.approx(dice, rel=1e-6)


def test_ce_is_torchs_on_the_pixels_that_count(batch):
    assert make_mask_loss("ce")(*batch).item() == pytest.approx(cross_entropy(*pixels(*batch)).item(), rel=1e-6)


def test_focal_is_smps_softmax_form_on_the_pixels_that_count(batch):
    expected = softmax_focal_loss_with_logits(*pixels(*batch), gamma=2.0)
    assert make_mask_loss("focal")(*batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_dice_is_smps_where_the_batch_has_every_class(batch):
    expected = DiceLoss("multiclass", ignore_index=255)(*batch)
    assert make_mask_loss("dice")(*batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_dice_does_not_shrink_with_classes_that_the_batch_lacks():
    logits, target = torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)
    target[:, 2:] = 1
    more = torch.cat([logits, torch.full((1, 19, 4, 4), -1e4)], dim=1)  # 19 classes without probability
    two, many = make_mask_loss("dice")(logits, target), make_mask_loss("dice")(more, target)
    assert two.item() == pytest.approx(many.item(), rel=1e-6)
    assert two.item() == pytest.approx(0.5)


@pytest.mark.parametrize("name", MASK_LOSSES)
def test_sure_and_right_is_0_and_sure_and_wrong_is_finite(name):
    target = torch.tensor([[[0, 1], [1, 0]]])
    right = torch.stack([1 - target, target], dim=1) * 1e4
    assert make_mask_loss(name)(right.float(), target).item() == pytest.approx(0, abs=1e-6)
    wrong = (-right).float().requires_grad_()
    loss = make_mask_loss(name)(wrong, target)
    loss.backward()
    assert loss.item() > 0.9
    assert wrong.grad.isfinite().all()


# --- void ---


@pytest.mark.parametrize("name", MASK_LOSSES)
def test_void_has_no_value_and_no_gradient(name, batch):
    logits, target = batch
    loss = make_mask_loss(name, class_weights=[1, 2, 3, 4])
    void = (target == 255)[:, None].expand_as(logits)
    other = logits.where(~void, torch.tensor(50.0) * logits.sign()).requires_grad_()
    value = loss(other, target)
    assert value.item() == loss(logits, target).item()
    value.backward()
    assert (other.grad[void] == 0).all()
    assert (other.grad[~void] != 0).any()


@pytest.mark.parametrize("name", MASK_LOSSES)
def test_a_batch_that_is_all_void_gives_0_with_zero_gradient(name):
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    value = make_mask_loss(name)(logits, torch.full((2, 4, 4), 255))
    value.backward()
    assert value.item() == 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("name", MASK_LOSSES)
def test_gradients_are_those_of_finite_differences(name):
    torch.manual_seed(0)
    logits = torch.randn(1, 3, 2, 3)
    target = torch.tensor([[[0, 2, 255], [1, 2, 0]]])
    loss = make_mask_loss(name, class_weights=[1, 2, 0.5])
    leaf = logits.clone().requires_grad_()
    loss(leaf, target).backward()
    for place in [(0, 0, 0, 0), (0, 2, 0, 1), (0, 1, 1, 2), (0, 1, 0, 2)]:
        ends = []
        for sign in (1, -1):
            moved = logits.clone()
            moved[place] += sign * 1e-2
            ends.append(loss(moved, target).item())
        assert leaf.grad[place].item() == pytest.approx((ends[0] - ends[1]) / 2e-2, abs=2e-4)


# --- precision ---


@pytest.mark.parametrize("name", MASK_LOSSES)
def test_float32_inside_under_autocast(name, batch):
    logits, target = batch
    half = (logits.repeat(1, 1, 40, 40) + 0.01).bfloat16()
    truth = target.repeat(1, 40, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = make_mask_loss(name)(half, truth)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(make_mask_loss(name)(half.float(), truth).item(), rel=1e-6)


def test_weights_are_no_part_of_a_checkpoint():
    assert not make_mask_loss("ce", class_weights=[1, 2]).state_dict()


# --- wrong arguments ---


def test_unknown_name():
    with pytest.raises(UserError, match=r"model\.init_args\.loss = 'jaccard': expected one of ce, dice"):
        make_mask_loss("jaccard")


@pytest.mark.parametrize("weights", [[1, -1], [1, math.nan], [0, 0], [], [math.inf, 1]])
def test_weights_out_of_range(weights):
    with pytest.raises(UserError, match=r"model\.init_args\.class_weights"):
        make_mask_loss("ce", class_weights=weights)


def test_weights_of_another_number_of_classes():
    with pytest.raises(UserError, match="2 given, but the masks have 3 classes"):
        make_mask_loss("ce_dice", class_weights=[1, 1])(
            torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64)
        )


def test_shapes_that_do_not_match():
    with pytest.raises(ValueError, match=r"expected \(B, C, H, W\) and \(B, H, W\)"):
        make_mask_loss("dice")(torch.zeros(1, 3, 2, 2), torch.zeros(1, 1, 2, dtype=torch.int64))
