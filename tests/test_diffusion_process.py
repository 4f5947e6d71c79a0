"""The forward process against numpy in float64, its bridge against Bayes' rule and a simulation of single steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from lit_defect.diffusion.process import ForwardProcess, uniform_steps
from lit_defect.errors import UserError
from tests import diffusion as reference

SCHEDULES = ("linear", "scaled_linear", "cosine")
PREDICTIONS = ("epsilon", "sample", "v_prediction", "logits")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def column(*values: float) -> torch.Tensor:
    """(B, 1, 1, 1), one number a picture."""
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1)


def steps(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def tolerance(a: float) -> float:
    """Of states near alpha_bar = a, of which float32 keeps 1 - a to 6e-8 only."""
    return 2e-5 + 2e-7 / (1 - a)


# --- noise levels ---


def test_half_of_the_steps_is_another_noise_level_under_each_schedule():
    assert float(ForwardProcess(1000, "linear").alpha_bar[499]) == pytest.approx(0.079, abs=5e-4)
    assert float(ForwardProcess(1000, "cosine").alpha_bar[499]) == pytest.approx(0.494, abs=5e-4)


@pytest.mark.parametrize("total", [10, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_alpha_bar_is_the_product_of_the_papers_steps(schedule, total):
    process = ForwardProcess(total, schedule)
    assert process.alpha_bar.shape == (total,)
    np.testing.assert_allclose(process.alpha_bar.numpy(), reference.alpha_bar(schedule, total), rtol=3e-5)


def test_a_state_is_signal_and_noise_by_the_step_of_its_own_picture():
    process = ForwardProcess(1000, "cosine")
    x0, noise, t = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5), steps(0, 499, 999)
    a = reference.alpha_bar("cosine")[t.numpy()][:, None, None, None]
    expected = np.sqrt(a) * x0.numpy() + np.sqrt(1 - a) * noise.numpy()
    np.testing.assert_allclose(process.add_noise(x0, noise, t).numpy(), expected, atol=1e-5)


def test_fewer_than_two_steps_are_refused():
    with pytest.raises(UserError, match=r"model\.init_args\.train_steps = 1: expected at least 2"):
        ForwardProcess(1)


# --- what a network should answer ---


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_answer_that_is_asked_for_is_the_papers(prediction):
    process = ForwardProcess(1000, "linear")
    x0, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), steps(20, 499, 900)
    a = reference.alpha_bar("linear")[t.numpy()][:, None, None, None]
    expected = {
        "epsilon": noise.numpy(),
        "v_prediction": np.sqrt(a) * noise.numpy() - np.sqrt(1 - a) * x0.numpy(),
    }.get(prediction, x0.numpy())
    target = process.target(process.add_noise(x0, noise, t), x0, t, prediction)
    np.testing.assert_allclose(target.numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_reading_the_answer_undoes_asking_for_it(schedule, prediction):
    process = ForwardProcess(1000, schedule)
    # Any state will do, also one that no noise at this step would make likely.
    x0, state, t = torch.randn(4, 2, 4, 4), 3 * torch.randn(4, 2, 4, 4), steps(0, 20, 499, 900)
    target = process.target(state, x0, t, prediction)
    torch.testing.assert_close(process.x0_of(target, state, t, prediction), x0, atol=2e-5, rtol=1e-5)
    answer = torch.randn_like(x0)
    a = reference.alpha_bar(schedule)[t.numpy()][:, None, None, None]
    expected = reference.x0_of(answer.numpy(), state.numpy(), a, prediction)
    np.testing.assert_allclose(process.x0_of(answer, state, t, prediction).numpy(), expected, rtol=2e-4, atol=2e-4)


# --- the bridge ---


def bayes(start: float, x0: float, a_start: float, a: float) -> tuple[float, float]:
    """Mean and deviation of q(x_t | x_start, x0): the product of the two normal densities that it is made of.

    q(x_t | x0) has mean sqrt(a) x0 and variance 1 - a; q(x_start | x_t) has mean c x_t and variance 1 - c^2.
    """
    c = np.sqrt(a_start / a)
    precision = 1 / (1 - a) + c**2 / (1 - c**2)
    mean = (np.sqrt(a) * x0 / (1 - a) + c * start / (1 - c**2)) / precision
    return mean, precision**-0.5


@pytest.mark.parametrize(("first", "t"), [(499, 498), (499, 250), (499, 0), (999, 300), (7, 6), (1, 0)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bridge_of_eta_1_is_bayes_rule(schedule, first, t):
    product = reference.alpha_bar(schedule)
    start, x0 = 0.7, -1.0
    mean, deviation = bayes(start, x0, product[first], product[t])
    process = ForwardProcess(1000, schedule)
    found = process.bridge(
        column(start, start, start), column(x0, x0, x0), steps(first, first, first), steps(t, t, t),
        column(0.0, 1.0, -2.0), 1.0,
    )  # fmt: skip
    np.testing.assert_allclose(found.flatten(), mean + deviation * np.array([0, 1, -2]), atol=tolerance(product[t]))


def test_one_step_of_the_bridge_is_ddpms_posterior():
    product, process = reference.alpha_bar("linear"), ForwardProcess(1000, "linear")
    mean, variance = reference.posterior(np.float64(-0.4), np.float64(1), product[300], product[299])
    two = process.bridge(
        column(-0.4, -0.4), column(1, 1), steps(300, 300), steps(299, 299), column(0, 1), 1.0
    ).flatten()
    assert float(two[0]) == pytest.approx(mean, abs=1e-5)
    assert float(two[1] - two[0]) == pytest.approx(variance**0.5, rel=1e-3)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_bridge_of_eta_1_is_what_a_simulation_of_single_steps_gives(schedule):
    total, t, first, x0, count = 40, 12, 30, 0.8, 200_000
    rng, product = np.random.default_rng(0), reference.alpha_bar(schedule, total)
    betas = 1 - product / np.concatenate([[1], product[:-1]])
    x, kept = np.full(count, x0), np.empty(0)
    for k in range(first + 1):  # x_k of q(x_k | x_{k-1}), Ho et al., eq. 2
        x = np.sqrt(1 - betas[k]) * x + np.sqrt(betas[k]) * rng.standard_normal(count)
        kept = x.copy() if k == t else kept
    # Of normal numbers the conditional mean is the regression line, the conditional variance that of the rest.
    line = stats.linregress(x, kept)
    rest = np.std(kept - line.intercept - line.slope * x)
    process, starts = ForwardProcess(total, schedule), np.array([-1.5, 0.3, 2.0])
    many = [torch.full((3,), s) for s in (first, t)]
    arguments = column(*starts), torch.full((3, 1, 1, 1), x0), *many
    mean = process.bridge(*arguments, torch.zeros(3, 1, 1, 1), 1.0).flatten().numpy()
    above = process.bridge(*arguments, torch.ones(3, 1, 1, 1), 1.0).flatten().numpy()
    np.testing.assert_allclose(mean, line.intercept + line.slope * starts, atol=0.01)
    np.testing.assert_allclose(above - mean, rest, rtol=0.01)


@pytest.mark.parametrize(("first", "t"), [(499, 498), (499, 100), (999, 0), (5, 2)])
def test_bridge_of_eta_0_is_one_jump_of_ddim_and_takes_no_noise(first, t):
    product, process = reference.alpha_bar("cosine"), ForwardProcess(1000, "cosine")
    start, x0 = torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3)
    expected = reference.ddim(start.double().numpy(), x0.double().numpy(), product[first], product[t])
    for noise in (torch.zeros_like(start), 9 * torch.ones_like(start)):
        found = process.bridge(start, x0, steps(first), steps(t), noise, 0.0)
        np.testing.assert_allclose(found.numpy(), expected, atol=tolerance(product[t]))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bridge_begins_at_the_start(schedule, eta):
    first = steps(3, 499, 999)
    start, x0 = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    found = ForwardProcess(1000, schedule).bridge(start, x0, first, first, torch.randn_like(start), eta)
    torch.testing.assert_close(found, start, atol=1e-4, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_bridge_from_a_noised_truth_is_a_noised_truth(eta):
    """Song et al., lemma 1: whatever eta, the state at t keeps the distribution q(x_t | x0)."""
    torch.manual_seed(0)
    process, count = ForwardProcess(1000, "cosine"), 100_000
    x0 = torch.full((1, 1, 1, count), 0.6)
    start = process.add_noise(x0, torch.randn_like(x0), steps(700))
    found = process.bridge(start, x0, steps(700), steps(300), torch.randn_like(x0), eta).flatten().numpy()
    a = reference.alpha_bar("cosine")[300]
    assert stats.kstest(found, "norm", (np.sqrt(a) * 0.6, np.sqrt(1 - a))).pvalue > 1e-3


def test_each_picture_of_a_batch_has_its_own_bridge():
    process, first, t = ForwardProcess(1000, "linear"), steps(499, 900, 30), steps(499, 20, 10)
    start, x0, noise = (torch.randn(3, 2, 4, 4) for _ in range(3))
    together = process.bridge(start, x0, first, t, noise, 1.0)
    for i in range(3):
        one = slice(i, i + 1)
        alone = process.bridge(start[one], x0[one], first[one], t[one], noise[one], 1.0)
        torch.testing.assert_close(together[one], alone, rtol=0, atol=0)


# --- drawing steps ---


def test_steps_are_drawn_evenly_from_all_below():
    torch.manual_seed(0)
    drawn = uniform_steps(20_000, 8, torch.device("cpu"))
    assert drawn.shape == (20_000,)
    counts = np.bincount(drawn.numpy(), minlength=8)
    assert len(counts) == 8
    assert stats.chisquare(counts).pvalue > 1e-3
