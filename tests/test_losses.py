import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from torchvision.ops import sigmoid_focal_loss

from lit_defect.errors import UserError
from lit_defect.losses.imbalance import (
    FocalLoss,
    LogitAdjustedLoss,
    WeightedCrossEntropy,
    effective_number_weights,
    inverse_frequency_weights,
    make_loss,
)

COUNTS = [6, 3, 1]


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 3, generator=generator) * 3, torch.randint(0, 3, (12,), generator=generator)


def test_inverse_frequency_by_hand() -> None:
    # n / (C n_c) with n = 10, C = 3
    assert inverse_frequency_weights(COUNTS).tolist() == pytest.approx([10 / 18, 10 / 9, 10 / 3])


def test_effective_number_by_hand() -> None:
    # beta = 1/2: E = (1 - 2^-n) / (1 - 1/2) = 1.96875, 1.75, 1; weights 1 / E, scaled to sum 3
    raw = [1 / 1.96875, 1 / 1.75, 1.0]
    expected = [3 * w / sum(raw) for w in raw]
    assert effective_number_weights(COUNTS, beta=0.5).tolist() == pytest.approx(expected)


def test_effective_number_reaches_both_ends() -> None:
    assert effective_number_weights(COUNTS, beta=0.0).tolist() == pytest.approx([1, 1, 1])
    near_one = effective_number_weights(COUNTS, beta=1 - 1e-9)
    inverse = inverse_frequency_weights(COUNTS)
    assert near_one.tolist() == pytest.approx((inverse * 3 / inverse.sum()).tolist(), rel=1e-5)


def test_weighted_loss_by_hand() -> None:
    # p_true = 0.5 and 0.8; -log p weighted by 1 and 4, mean over two samples
    logits = torch.log(torch.tensor([[0.5, 0.5], [0.2, 0.8]]))
    loss = WeightedCrossEntropy(torch.tensor([1.0, 4.0]))(logits, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx((-math.log(0.5) - 4 * math.log(0.8)) / 2)


def test_weighted_batch_of_one_class_keeps_its_weight() -> None:
    logits, labels = torch.zeros(4, 2), torch.ones(4, dtype=torch.int64)
    loss = WeightedCrossEntropy(torch.tensor([1.0, 4.0]))(logits, labels)
    assert loss.item() == pytest.approx(4 * math.log(2))


def test_focal_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    expected = (-(0.5**2) * math.log(0.5) - 0.9**2 * math.log(0.1)) / 2
    assert FocalLoss(gamma=2)(logits, torch.tensor([0, 1])).item() == pytest.approx(expected)


def test_focal_of_two_classes_is_the_sigmoid_focal_loss() -> None:
    generator = torch.Generator().manual_seed(1)
    z, y = torch.randn(20, generator=generator) * 4, torch.randint(0, 2, (20,), generator=generator)
    expected = sigmoid_focal_loss(z, y.float(), alpha=-1, gamma=1.5, reduction="mean")
    ours = FocalLoss(gamma=1.5)(torch.stack([torch.zeros(20), z], dim=1), y)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_focal_without_focus_is_cross_entropy(batch: tuple[torch.Tensor, torch.Tensor], smoothing: float) -> None:
    expected = cross_entropy(*batch, label_smoothing=smoothing)
    torch.testing.assert_close(FocalLoss(gamma=0, label_smoothing=smoothing)(*batch), expected)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_gradient_is_finite_for_a_certain_sample(gamma: float) -> None:
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    FocalLoss(gamma)(logits, torch.tensor([0])).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_logit_adjustment_by_hand() -> None:
    # zero logits: softmax(tau log pi) = pi^tau / sum pi^tau, with pi = 0.6, 0.3, 0.1
    loss = LogitAdjustedLoss(COUNTS, tau=2)(torch.zeros(1, 3), torch.tensor([2]))
    assert loss.item() == pytest.approx(-math.log(0.01 / (0.36 + 0.09 + 0.01)))


def test_logit_adjusted_optimum_ignores_the_prior() -> None:
    # One feature value, class shares as in COUNTS: plain logits learn log pi, adjusted ones learn nothing.
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    for name, expected in (("plain", [0.6, 0.3, 0.1]), ("logit_adjusted", [1 / 3] * 3)):
        logits = torch.zeros(3, requires_grad=True)
        loss = make_loss(name, COUNTS)
        optimiser = torch.optim.LBFGS([logits], max_iter=100, line_search_fn="strong_wolfe")

        def closure(loss=loss, logits=logits, optimiser=optimiser) -> float:
            optimiser.zero_grad()
            value = loss(logits.expand(10, 3), labels)
            value.backward()
            return value.item()

        optimiser.step(closure)
        assert logits.softmax(0).tolist() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("name", ["plain", "weighted", "focal", "logit_adjusted"])
def test_make_loss_agrees_with_cross_entropy_for_equal_classes(
    batch: tuple[torch.Tensor, torch.Tensor], name: str
) -> None:
    loss = make_loss(name, [5, 5, 5], label_smoothing=0.1, gamma=0)
    torch.testing.assert_close(loss(*batch), cross_entropy(*batch, label_smoothing=0.1))


def test_losses_of_half_precision_logits_are_float32(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = batch
    for name in ("weighted", "focal", "logit_adjusted"):
        assert make_loss(name, COUNTS)(logits.bfloat16(), labels).dtype == torch.float32


def test_loss_state_does_not_enter_checkpoints() -> None:
    assert not make_loss("weighted", COUNTS).state_dict()
    assert not make_loss("logit_adjusted", COUNTS).state_dict()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "focall"}, "choose one of plain, weighted, focal, logit_adjusted"),
        ({"name": "weighted", "weighting": "sqrt"}, "inverse, effective"),
        ({"name": "weighted", "counts": [5, 0, 2]}, "no training samples in class 1"),
        ({"name": "weighted", "weighting": "effective", "beta": 1.0}, "beta"),
        ({"name": "focal", "gamma": -1.0}, "gamma"),
        ({"name": "plain", "label_smoothing": 1.0}, "label_smoothing"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_loss(**({"counts": COUNTS} | arguments))  # type: ignore[arg-type]
