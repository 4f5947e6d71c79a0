"""Samplers by the web interface's names against the equations, and how often they ask the network."""

from __future__ import annotations

import importlib.util
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from lit_defect.editing.samplers import (
    SAMPLERS,
    evaluations,
    make_scheduler,
    start,
    told_strength,
    warn_of_content,
)
from lit_defect.errors import UserError
from tests.latent import BETAS, sd_alpha_bar, tiny_pipeline

SD = {
    "_class_name": "PNDMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": BETAS[0],
    "beta_end": BETAS[1],
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "skip_prk_steps": True,
    "steps_offset": 1,
}
SIGMAS = np.sqrt(1 / sd_alpha_bar() - 1)
NEEDS_TORCHSDE = pytest.mark.skipif(importlib.util.find_spec("torchsde") is None, reason="torchsde is not installed")
MARKED = [pytest.param(name, marks=NEEDS_TORCHSDE if name.startswith("DPM++ SDE") else ()) for name in SAMPLERS]


def sampled_by_oracle(scheduler: Any, told: float, steps: int = 40) -> tuple[float, int]:
    """Mean error of a network that knows x_0, and how often it was asked; started as diffusers' pipelines do."""
    scheduler.set_timesteps(steps)
    first = (steps - int(steps * told)) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    timesteps = scheduler.timesteps[first:]
    made = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64, generator=made)
    x = scheduler.add_noise(x0, noise, timesteps[:1])
    for t in timesteps:
        kept = 1 / (1 + np.interp(float(t), np.arange(1000), SIGMAS) ** 2)
        seen = (scheduler.scale_model_input(x, t) - math.sqrt(kept) * x0) / math.sqrt(1 - kept)
        x = scheduler.step(seen, t, x).prev_sample
    return float((x - x0).abs().mean()), len(timesteps)


@pytest.mark.parametrize("name", MARKED)
@pytest.mark.parametrize("told", [0.225, 0.425])
def test_every_sampler_started_in_the_middle_ends_at_what_the_network_knows(name: str, told: float) -> None:
    error, asked = sampled_by_oracle(make_scheduler(name, SD), told)
    left = SIGMAS[0] if name in ("DDIM", "UniPC") else 0  # that much noise stays; the web interface's do so, too
    assert error == pytest.approx(left * math.sqrt(2 / math.pi), abs=2e-3 if left else 3e-6)
    count = round(40 * told)
    assert asked == (2 * count - 1 if name.startswith(("Heun", "DPM2", "DPM++ SDE")) else count)


@pytest.mark.parametrize(
    "left_out",
    [
        diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1, beta_schedule="scaled_linear"),
        diffusers.LMSDiscreteScheduler(beta_start=BETAS[0], beta_end=BETAS[1], beta_schedule="scaled_linear"),
    ],
    ids=["PLMS", "LMS"],
)
def test_the_samplers_left_out_still_leave_noise_in_diffusers(left_out: Any) -> None:
    """Else they could be offered."""
    if isinstance(left_out, diffusers.PNDMScheduler):
        left_out = diffusers.PNDMScheduler.from_config(left_out.config, beta_start=BETAS[0], beta_end=BETAS[1])
    assert sampled_by_oracle(left_out, 0.225)[0] > 0.01
    with pytest.raises(UserError, match=r"sampler = default: .* leaves noise .* DDIM"):
        start(left_out, 0.225, 40)
    start(left_out, 1.0, 40)


def bent(x: np.ndarray, sigma: float) -> np.ndarray:
    """A network that sees x_0 = tanh(x / sqrt(1 + sigma^2)): every order of a sampler gives another result."""
    return np.tanh(x / math.sqrt(1 + sigma**2))


def dpmpp_2m(x: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """Lu et al. (2022), algorithm 2, for x = x_0 + sigma noise: lambda = -log sigma."""
    before, h_before = None, 0.0
    for sigma, following in pairwise(sigmas):
        x0 = bent(x, sigma)
        if following == 0:
            return x0
        h = math.log(sigma / following)
        direction = x0 if before is None else x0 + h / h_before / 2 * (x0 - before)
        x = following / sigma * x + (1 - math.exp(-h)) * direction
        before, h_before = x0, h
    raise AssertionError


def euler(x: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    for sigma, following in pairwise(sigmas):
        x = x + (following - sigma) * (x - bent(x, sigma)) / sigma
    return x


def heun(x: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """Karras et al. (2022), algorithm 1."""
    for sigma, following in pairwise(sigmas):
        slope = (x - bent(x, sigma)) / sigma
        ahead = x + (following - sigma) * slope
        if following > 0:
            slope = (slope + (ahead - bent(ahead, following)) / following) / 2
        x = x + (following - sigma) * slope
    return x


def karras(steps: int) -> np.ndarray:
    """Karras et al. (2022), eq. 5, rho = 7, between Stable Diffusion's least and largest noise."""
    ramp = np.linspace(0, 1, steps)
    largest, least = SIGMAS[-1] ** (1 / 7), SIGMAS[0] ** (1 / 7)
    return np.append((largest + ramp * (least - largest)) ** 7, 0)


@pytest.mark.parametrize(
    ("name", "equation", "sigmas"),
    [
        ("DPM++ 2M Karras", dpmpp_2m, karras(20)),
        ("Euler Karras", euler, karras(20)),
        ("Heun Karras", heun, karras(20)),
        ("Euler", euler, np.append(np.interp(np.linspace(999, 0, 20), np.arange(1000), SIGMAS), 0)),
    ],
)
@pytest.mark.parametrize("count", [20, 9])
def test_samplers_follow_their_papers_equation(name: str, equation: Any, sigmas: np.ndarray, count: int) -> None:
    scheduler = make_scheduler(name, SD)
    scheduler.set_timesteps(20)
    first = (20 - count) * scheduler.order
    scheduler.set_begin_index(first)
    x = np.random.default_rng(0).normal(size=(1, 4, 5, 5)) * sigmas[20 - count]
    # DPM-Solver++ keeps pictures at unit variance, the others keep the noise beside the picture.
    scale = math.sqrt(1 + sigmas[20 - count] ** 2) if name.startswith("DPM++") else 1.0
    state = torch.from_numpy(x / scale)
    for index, t in enumerate(scheduler.timesteps[first:], first):
        sigma = float(scheduler.sigmas[index])
        now = state.numpy() * (math.sqrt(1 + sigma**2) if name.startswith("DPM++") else 1.0)
        scheduler.scale_model_input(state, t)
        state = scheduler.step(torch.from_numpy((now - bent(now, sigma)) / sigma), t, state).prev_sample
    np.testing.assert_allclose(state.numpy(), equation(x, sigmas[20 - count :]), atol=1e-5)


@pytest.mark.parametrize(
    ("strength", "webui", "diffusers_own"),
    [(0.2, 9, 8), (0.4, 17, 16), (0.75, 31, 30), (1.0, 40, 40), (0.999, 40, 39), (0.01, 1, None)],
)
def test_a_strength_leaves_as_many_steps_as_the_program_it_is_from(
    strength: float, webui: int, diffusers_own: int | None
) -> None:
    assert evaluations(40, strength, "webui") == webui
    if diffusers_own is None:
        with pytest.raises(UserError, match=r"strength = 0.01 leaves none of 40 steps; .* set .*steps to 100 or more"):
            evaluations(40, strength, "diffusers")
    else:
        assert evaluations(40, strength, "diffusers") == diffusers_own


def test_the_papers_strengths_are_told_as_a_ninth_and_a_seventeenth_step() -> None:
    assert told_strength(40, 0.2, "webui") == 0.225
    assert told_strength(40, 0.4, "webui") == 0.425
    assert told_strength(40, 0.2, "diffusers") == 0.2


def test_what_is_told_gives_just_so_many_steps_for_every_number_of_them() -> None:
    for steps in range(1, 1001):
        for count in {1, steps // 2, steps - 1, steps, *range(7, steps, 11)} - {0}:
            strength = min(1.0, (count + 0.5) / steps)
            down = told_strength(steps, strength, "diffusers")
            up = told_strength(steps, strength, "diffusers", rounds_up=True)
            assert 0 < down <= 1
            assert min(int(steps * down), steps) == count  # as Stable Diffusion's pipelines count
            assert steps - int(max(steps - min(steps * up, steps), 0)) == count  # as those of SD3 and Flux do


@pytest.mark.parametrize(("strength", "timestep"), [(0.2, 32), (0.4, 266)])
def test_dpmpp_2m_karras_starts_where_karras_formula_says(strength: float, timestep: int) -> None:
    begin = start(make_scheduler("DPM++ 2M Karras", SD), told_strength(40, strength, "webui"), 40)
    assert begin.timestep == timestep
    assert begin.sigma == pytest.approx(karras(40)[40 - evaluations(40, strength, "webui")], rel=1e-5)


def test_ddim_starts_at_the_step_of_the_web_interface() -> None:
    begin = start(make_scheduler("DDIM", SD), told_strength(40, 0.2, "webui"), 40)
    assert begin == (201, pytest.approx(SIGMAS[201], rel=1e-5))


@pytest.fixture(scope="module")
def img2img(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny_pipeline(tmp_path_factory.mktemp("tiny") / "pipeline")
    pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(Path(folder), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("name", "strength", "convention", "calls"),
    [
        ("DPM++ 2M Karras", 0.2, "webui", 9),
        ("DPM++ 2M Karras", 0.2, "diffusers", 8),
        ("DPM++ 2M Karras", 0.4, "webui", 17),
        ("DPM++ 2M Karras", 0.4, "diffusers", 16),
        ("euler A", 0.75, "webui", 31),
        ("ddim", 0.75, "diffusers", 30),
        ("Heun Karras", 0.2, "webui", 17),
        ("default", 0.2, "webui", 9),
    ],
)
def test_a_pipeline_asks_its_network_so_often(
    img2img: Any, monkeypatch: pytest.MonkeyPatch, name: str, strength: float, convention: Any, calls: int
) -> None:
    asked: list[float] = []
    forward = img2img.unet.forward
    monkeypatch.setattr(img2img.unet, "forward", lambda x, t, **told: asked.append(float(t)) or forward(x, t, **told))
    config = img2img.scheduler.config
    monkeypatch.setattr(img2img, "scheduler", make_scheduler(name, config))
    told = told_strength(40, strength, convention)
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    img2img("a tile", image=picture, strength=told, num_inference_steps=40, guidance_scale=1, output_type="latent")
    assert len(asked) == calls
    assert asked[0] == start(make_scheduler(name, config), told, 40).timestep


def test_the_networks_own_schedule_is_kept_and_settings_of_another_sampler_are_not() -> None:
    own = diffusers.DPMSolverMultistepScheduler(
        beta_start=0.001,
        beta_end=0.03,
        beta_schedule="linear",
        num_train_timesteps=500,
        prediction_type="v_prediction",
        algorithm_type="sde-dpmsolver++",
        use_karras_sigmas=True,
        timestep_spacing="trailing",
    )
    made = make_scheduler("dpm++ 2m", own.config)
    assert torch.equal(made.alphas_cumprod, own.alphas_cumprod)
    assert made.config.prediction_type == "v_prediction"
    assert (made.config.algorithm_type, made.config.use_karras_sigmas) == ("dpmsolver++", False)
    assert make_scheduler("Euler", own.config).config.timestep_spacing == "linspace"


def test_clipping_is_off_whatever_the_class_does_by_itself() -> None:
    assert not make_scheduler("DDIM", SD).config.clip_sample
    assert not make_scheduler("DDPM", SD).config.clip_sample


def test_default_is_the_pipelines_own(img2img: Any) -> None:
    made = make_scheduler("Default", img2img.scheduler.config)
    assert type(made) is type(img2img.scheduler)
    assert made is not img2img.scheduler
    assert dict(made.config) == dict(img2img.scheduler.config)


def test_a_flow_matching_network_keeps_its_own() -> None:
    config = {**diffusers.FlowMatchEulerDiscreteScheduler().config, "_class_name": "FlowMatchEulerDiscreteScheduler"}
    with pytest.raises(
        UserError, match=r"sampler = Euler a: .* own FlowMatchEulerDiscreteScheduler; set it to default"
    ):
        make_scheduler("Euler a", config)
    assert isinstance(make_scheduler("default", config), diffusers.FlowMatchEulerDiscreteScheduler)
    flow = {**diffusers.UniPCMultistepScheduler(use_flow_sigmas=True).config, "_class_name": "UniPCMultistepScheduler"}
    with pytest.raises(UserError, match="set it to default"):
        make_scheduler("UniPC", flow)


def test_pure_noise_at_the_end_is_kept_or_refused() -> None:
    assert make_scheduler("Euler", {**SD, "rescale_betas_zero_snr": True}).config.rescale_betas_zero_snr
    with pytest.raises(UserError, match="Heun cannot start from pure noise"):
        make_scheduler("Heun", {**SD, "rescale_betas_zero_snr": True})


@pytest.mark.parametrize("name", ["default", "LCM"])
def test_a_start_from_nothing_but_noise(name: str) -> None:
    zero = {**SD, "_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert start(make_scheduler(name, zero), 1.0, 20) == (999, math.inf)
    assert start(make_scheduler(name, zero), 0.5, 20).sigma < 2


@pytest.mark.parametrize(("name", "near"), [("DPM++2M Karras", "DPM++ 2M Karras"), ("euler_a", "Euler a")])
def test_a_misspelt_sampler_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UserError) as problem:
        make_scheduler(name, SD)
    assert f"model.init_args.edit.sampler = {name}: no such sampler; did you mean {near}" in str(problem.value)


def test_an_unknown_sampler_lists_all() -> None:
    with pytest.raises(UserError, match=r"there is: DPM\+\+ 2M, .*, LCM, default"):
        make_scheduler("zzzzzz", SD)


def test_dpmpp_sde_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"DPM\+\+ SDE Karras needs torchsde: pip install torchsde"):
        make_scheduler("DPM++ SDE Karras", SD)


def test_too_many_steps_for_lcm_are_named() -> None:
    with pytest.raises(UserError, match=r"steps = 60: LCMScheduler cannot"):
        start(make_scheduler("LCM", SD), 0.5, 60)


def test_noise_and_nothing_are_warned_of_where_they_would_be_seen() -> None:
    assert "noise will be seen" in (warn_of_content("latent_noise", 0.4) or "")
    assert "grey will be seen" in (warn_of_content("latent_nothing", 0.74) or "")
    for content, strength in (("latent_noise", 0.75), ("latent_nothing", 1.0), ("fill", 0.1), ("original", 0.1)):
        assert warn_of_content(content, strength) is None  # type: ignore[arg-type]
