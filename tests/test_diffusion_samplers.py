"""Each sampler, step for step, against its paper's equation in numpy and against diffusers told the noise instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from scipy import integrate

from lit_defect.diffusion.process import ForwardProcess
from lit_defect.diffusion.samplers import Sampler
from lit_defect.errors import UserError
from tests import diffusion as reference

NAMES = ("ddpm", "ddim", "dpmsolver", "unipc")
Toy = Callable[[np.ndarray, float], np.ndarray]
"""(state, alpha_bar) -> the noise that a toy network sees in it."""


def prior(x: np.ndarray, a: float) -> np.ndarray:
    """The right answer if x_0 were normal numbers of deviation 0.15: never as far out as the limits."""
    return np.sqrt(1 - a) * x / (0.15**2 * a + 1 - a)


def bent(x: np.ndarray, a: float) -> np.ndarray:
    """Sees x_0 = 0.9 tanh(2 x), which changes a lot from step to step, so that every order matters."""
    return (x - np.sqrt(a) * 0.9 * np.tanh(2 * x)) / np.sqrt(1 - a)


def quiet(x: np.ndarray, a: float) -> np.ndarray:
    """Sees no noise, so that x_0 = x / sqrt(alpha_bar) is far out and has to be clipped."""
    return np.zeros_like(x)


class Chain(NamedTuple):
    """States (K + 1, B, C, H, W) and x_0 (K, ...) of a chain of K steps in float64, and (a, b) of each step."""

    states: np.ndarray
    x0: np.ndarray
    levels: list[tuple[float, float]]


def start(seed: int = 0) -> torch.Tensor:
    """Two label maps of +1 and -1 beside noise."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 4, 5, generator=made)
    x[:, :2] = x[:, :2].sign()
    return x


def run(sampler: Sampler, schedule: str, toy: Toy, x: torch.Tensor, streams: list[torch.Generator]) -> Chain:
    """The chain of a toy network whose x_0 is clipped to -1 ... 1."""
    levels = reference.levels_of(schedule, sampler.process.train_steps, sampler.steps)
    scheduler = sampler.begin()
    states, answers = [x.double().numpy()], []
    for t in sampler.timesteps:
        now = states[-1]
        x0 = reference.x0_of(toy(now, levels[t][0]), now, levels[t][0], "epsilon").clip(-1, 1)
        x = sampler.step(scheduler, torch.from_numpy(x0).float(), t, torch.from_numpy(now).float(), streams)
        states.append(x.double().numpy())
        answers.append(x0)
    return Chain(np.stack(states), np.stack(answers), [levels[t] for t in sampler.timesteps])


def streams(count: int = 2) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + i) for i in range(count)]


def sampler(name: str, schedule: str, *, total: int = 1000, steps: int, strength: float = 0.5) -> Sampler:
    return Sampler(name, ForwardProcess(total, schedule), steps=steps, strength=strength)


def tolerance(a: float) -> float:
    """Of states, where float32 keeps 1 - alpha_bar to 6e-8 only."""
    return 2e-5 + 2e-7 / (1 - a)


# --- which steps ---


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("total", "steps", "strength", "expected"),
    [
        (1000, 10, 0.5, [499, 399, 299, 199, 99]),
        (1000, 10, 1.0, [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]),
        (1000, 1, 1.0, [999]),
        (1000, 4, 0.5, [499, 249]),
        (1000, 10, 0.29, [199, 99]),  # no step beyond the strength
        (1000, 100, 0.29, [10 * k - 1 for k in range(29, 0, -1)]),  # 100 * 0.29 is below 29 in floating point
        (20, 20, 0.25, [4, 3, 2, 1, 0]),
    ],
)
def test_a_strength_leaves_the_last_steps(name, total, steps, strength, expected):
    made = sampler(name, "linear", total=total, steps=steps, strength=strength)
    assert made.timesteps == expected
    assert made.calls == len(expected)
    made.begin()


@pytest.mark.parametrize("steps", [1000, 500, 250, 200, 125, 100, 50, 40, 25, 20, 10, 8, 5, 4, 2])
def test_the_first_step_does_not_depend_on_their_number_and_diffusers_agrees(steps):
    for name in NAMES:
        made = sampler(name, "cosine", steps=steps)
        if steps * 0.5 == made.calls:
            assert made.timesteps[0] == 499
        made.begin()  # would raise if diffusers went through other steps


@pytest.mark.parametrize("name", NAMES)
def test_strength_0_does_nothing(name):
    made = sampler(name, "linear", steps=10, strength=0)
    assert made.timesteps == []
    assert made.calls == 0


@pytest.mark.parametrize("name", NAMES)
def test_only_ddpm_adds_noise(name):
    made = sampler(name, "linear", steps=10)
    scheduler, x = made.begin(), start()
    one, other = (made.step(scheduler, 0 * x, 499, x, streams()) for scheduler in (made.begin(), scheduler))
    torch.testing.assert_close(one, other, rtol=0, atol=0)  # the same streams, the same step
    fresh = made.step(made.begin(), 0 * x, 499, x, [torch.Generator().manual_seed(7) for _ in x])
    assert torch.equal(one, fresh) == (name != "ddpm")
    assert made.eta == (1.0 if name == "ddpm" else 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_x0_is_clipped_by_the_caller_alone(name):
    """Latents reach further than -1 ... 1."""
    made = sampler(name, "linear", steps=2)  # 499 is the only step: its end is x0
    x = start()
    torch.testing.assert_close(made.step(made.begin(), 3 * x, 499, x, streams()), 3 * x, atol=1e-5, rtol=1e-5)


# --- DDPM ---


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [1000, 50, 10])
@pytest.mark.parametrize("toy", [prior, quiet])
def test_ddpm_is_hos_posterior_with_the_streams_own_noise(toy, steps, schedule):
    """Mean of eq. 7, variance of eq. 6 and 7, of each step from the state that the step before gave."""
    made = sampler("ddpm", schedule, steps=steps)
    chain, noise = run(made, schedule, toy, start(), streams()), streams()
    assert len(chain.states) == steps // 2 + 1
    assert (np.abs(chain.x0).max() == 1) == (toy is quiet)  # clipped or not
    for k, (a, b) in enumerate(chain.levels):
        mean, variance = reference.posterior(chain.states[k], chain.x0[k], a, b)
        if made.timesteps[k] > 0:  # the last of 1000 steps draws no noise, and the last of fewer needs none
            drawn = np.stack([torch.randn(3, 4, 5, generator=stream).numpy() for stream in noise])
            mean = mean + np.sqrt(variance) * drawn
        np.testing.assert_allclose(chain.states[k + 1], mean, atol=tolerance(a), err_msg=f"step {k}")
    np.testing.assert_allclose(chain.states[-1], chain.x0[-1], atol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddpms_mean_is_eq_11_of_the_noise_that_the_network_sees(schedule):
    made = sampler("ddpm", schedule, steps=1000)
    chain, noise, betas = run(made, schedule, prior, start(), streams()), streams(), []
    assert np.abs(chain.x0).max() < 1  # eq. 11 knows no clipping
    for k, (a, b) in enumerate(chain.levels[:-1]):
        alpha, beta, x = a / b, 1 - a / b, chain.states[k]
        mean = (x - beta / np.sqrt(1 - a) * prior(x, a)) / np.sqrt(alpha)
        drawn = np.stack([torch.randn(3, 4, 5, generator=stream).numpy() for stream in noise])
        sigma = np.sqrt((1 - b) / (1 - a) * beta)  # the second of the two choices below eq. 6
        np.testing.assert_allclose(chain.states[k + 1], mean + sigma * drawn, atol=tolerance(a), err_msg=f"step {k}")
        betas.append(beta)
    if schedule == "linear":
        assert betas[0] == pytest.approx(1e-4 + 499 / 999 * (0.02 - 1e-4), rel=1e-9)  # of step 499, section 4


@pytest.mark.parametrize(("steps", "t"), [(1000, 499), (1000, 30), (10, 499), (10, 199)])
def test_ddpms_noise_has_the_posteriors_mean_and_variance(steps, t):
    """Without knowing how the noise is drawn: 4 standard errors of 60 000 places."""
    made, places = sampler("ddpm", "linear", steps=steps), 60_000
    a, b = reference.levels_of("linear", 1000, steps)[t]
    x, x0 = torch.full((1, 1, 1, places), 0.4), torch.full((1, 1, 1, places), -0.9)
    found = made.step(made.begin(), x0, t, x, streams(1)).double().numpy()
    mean, variance = reference.posterior(np.float64(0.4), np.float64(-0.9), a, b)
    assert abs(found.mean() - mean) < 4 * np.sqrt(variance / places)
    assert abs(found.var() / variance - 1) < 4 * np.sqrt(2 / places)


# --- DDIM ---


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [1000, 50, 10])
def test_ddim_is_songs_eq_12(steps, schedule):
    made = sampler("ddim", schedule, steps=steps)
    chain = run(made, schedule, prior, start(), streams())
    assert np.abs(chain.x0).max() < 1
    for k, (a, b) in enumerate(chain.levels):
        x, epsilon = chain.states[k], prior(chain.states[k], a)
        expected = np.sqrt(b) * (x - np.sqrt(1 - a) * epsilon) / np.sqrt(a) + np.sqrt(1 - b) * epsilon
        np.testing.assert_allclose(chain.states[k + 1], expected, atol=tolerance(a), err_msg=f"step {k}")


def test_ddims_noise_agrees_with_a_clipped_x0():
    made = sampler("ddim", "linear", steps=10)
    chain = run(made, "linear", quiet, start(), streams())
    assert np.abs(chain.x0).max() == 1
    for k, (a, b) in enumerate(chain.levels):
        expected = reference.ddim(chain.states[k], chain.x0[k], a, b)
        np.testing.assert_allclose(chain.states[k + 1], expected, atol=2e-5)


# --- solvers of order 2 ---


def test_dpm_solver_is_the_second_order_multistep_of_its_paper():
    """Lu et al., DPM-Solver++, algorithm 2; the first and the last step are of order 1."""
    for schedule in ("linear", "cosine"):
        chain = run(sampler("dpmsolver", schedule, steps=20), schedule, bent, start(), streams())
        for k, (a, b) in enumerate(chain.levels):
            direction = chain.x0[k]
            if b == 1:
                expected = direction  # no noise is left: e^-h = 0
            else:
                h = reference.half_log_snr(b) - reference.half_log_snr(a)
                if k > 0:
                    r = (reference.half_log_snr(a) - reference.half_log_snr(chain.levels[k - 1][0])) / h
                    direction = (1 + 1 / (2 * r)) * chain.x0[k] - 1 / (2 * r) * chain.x0[k - 1]
                expected = np.sqrt((1 - b) / (1 - a)) * chain.states[k] - np.sqrt(b) * np.expm1(-h) * direction
            np.testing.assert_allclose(chain.states[k + 1], expected, atol=2e-5, err_msg=f"{schedule}, step {k}")


def lagrange(points: list[float], values: list[np.ndarray], at: float) -> np.ndarray:
    """The polynomial through the points."""
    total = np.zeros_like(values[0])
    for i, value in enumerate(values):
        others = [p for j, p in enumerate(points) if j != i]
        total = total + value * np.prod([(at - p) / (points[i] - p) for p in others])
    return total


def test_unipc_corrects_by_the_integral_of_the_polynomial_through_three_predictions():
    """Zhao et al.: the solution is sigma_t / sigma_s x_s + sigma_t times the integral of e^lambda x_0(lambda), eq. 4.

    UniC-2 (theorem 3.1) is exact for the parabola through x_0 at two steps before and at this one, which is integrated
    numerically here. UniC-1 takes the mean of two predictions, and UniP-2 is DPM-Solver++'s second order (section 3.4).
    """
    chain = run(sampler("unipc", "cosine", steps=20), "cosine", bent, start(), streams())
    lambdas = [reference.half_log_snr(a) for a, _ in chain.levels]
    corrected = chain.states[0]
    for k, (a, b) in enumerate(chain.levels):
        if k > 0:
            before, h = chain.levels[k - 1][0], lambdas[k] - lambdas[k - 1]
            shrink = np.sqrt((1 - a) / (1 - before))
            if k == 1:
                mean = (chain.x0[0] + chain.x0[1]) / 2
                corrected = shrink * corrected - np.sqrt(a) * np.expm1(-h) * mean
            else:
                points, values = lambdas[k - 2 : k + 1], list(chain.x0[k - 2 : k + 1])

                def integrand(u: float, points: list = points, values: list = values) -> np.ndarray:
                    return np.exp(u) * lagrange(points, values, u)

                area, _ = integrate.quad_vec(integrand, lambdas[k - 1], lambdas[k], epsabs=1e-10)
                corrected = shrink * corrected + np.sqrt(1 - a) * area
        if b == 1:
            expected = chain.x0[k]
        else:
            h, direction = reference.half_log_snr(b) - lambdas[k], chain.x0[k]
            if k > 0:
                r = (lambdas[k] - lambdas[k - 1]) / h
                direction = (1 + 1 / (2 * r)) * chain.x0[k] - 1 / (2 * r) * chain.x0[k - 1]
            expected = np.sqrt((1 - b) / (1 - a)) * corrected - np.sqrt(b) * np.expm1(-h) * direction
        np.testing.assert_allclose(chain.states[k + 1], expected, atol=2e-5, err_msg=f"step {k}")


# --- against diffusers as its pipelines use it ---


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_a_chain_is_that_of_diffusers_told_the_noise(name, strength):
    """Where nothing is clipped, x_0 or the noise handed over are the same thing."""
    made = sampler(name, "linear", steps=20, strength=strength)
    chain = run(made, "linear", prior, start(), streams())
    assert np.abs(chain.x0).max() < 1
    kind = {
        "ddpm": diffusers.DDPMScheduler,
        "ddim": diffusers.DDIMScheduler,
        "dpmsolver": diffusers.DPMSolverMultistepScheduler,
        "unipc": diffusers.UniPCMultistepScheduler,
    }[name]
    options = {"clip_sample": False} if name in ("ddpm", "ddim") else {"final_sigmas_type": "zero"}
    scheduler = kind(1000, beta_schedule="linear", prediction_type="epsilon", timestep_spacing="trailing", **options)
    scheduler.set_timesteps(20)
    product, x, noise = reference.alpha_bar("linear"), start(), streams()
    extra = {"generator": noise} if name == "ddpm" else {}
    for t in scheduler.timesteps[20 - made.calls :]:
        epsilon = torch.from_numpy(prior(x.double().numpy(), product[t])).float()
        x = scheduler.step(epsilon, t, x, **extra).prev_sample
    np.testing.assert_allclose(chain.states[-1], x.numpy(), atol=1e-4)


def test_two_chains_of_one_sampler_do_not_meet():
    made, alone = sampler("unipc", "cosine", steps=10), sampler("unipc", "cosine", steps=10)
    expected = run(alone, "cosine", prior, start(1), streams()).states
    made_first = made.begin()
    x = start(0)
    for t in made.timesteps[:3]:
        x = made.step(made_first, x.clamp(-1, 1), t, x, streams())
    np.testing.assert_array_equal(run(made, "cosine", prior, start(1), streams()).states, expected)


# --- bad arguments ---


@pytest.mark.parametrize(
    ("steps", "strength", "message"),
    [
        (10, -0.1, r"model\.init_args\.strength = -0\.1: expected a share of the steps, 0 to 1"),
        (10, 1.5, r"model\.init_args\.strength = 1\.5"),
        (10, float("nan"), r"model\.init_args\.strength = nan"),
        (0, 0.5, r"model\.init_args\.steps = 0: must divide the 1000 steps .* such as 1, 2, 4, 5"),
        (30, 0.5, r"model\.init_args\.steps = 30: must divide .* such as 10, 20, 25, 40"),
        (2000, 0.5, r"such as 200, 250, 500, 1000"),
        (2, 0.3, r"steps = 2 and strength = 0\.3 leave no step to do: set steps to at least 4, or strength to 0"),
        (1, 0.5, r"set steps to at least 2,"),
    ],
)
def test_steps_and_strength_that_do_not_go(steps, strength, message):
    with pytest.raises(UserError, match=message):
        sampler("ddim", "linear", steps=steps, strength=strength)


def test_another_version_of_diffusers_that_goes_through_other_steps_is_found_out():
    made = sampler("ddim", "linear", steps=10)
    made.timesteps[0] = 498
    with pytest.raises(RuntimeError, match=r"DDIMScheduler goes through \[499, .*, expected \[498"):
        made.begin()
