"""Latents by the reverse process: whole pictures as diffusers makes them, regions as the equations say, the rest untouched to the last bit."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional as F

from lit_defect.diffusion.labels import generators
from lit_defect.diffusion.latent_sampling import Region, guided, sample
from lit_defect.diffusion.process import ForwardProcess
from lit_defect.diffusion.samplers import Sampler
from lit_defect.errors import UserError
from tests.diffusion import alpha_bar, ddim, x0_of
from tests.latent import OracleDenoiser, sd_alpha_bar, sd_process

SHAPE = (4, 6, 5)
SAMPLERS = [("ddim", None), ("ddim", 0.5), ("ddim", 1.0), ("ddpm", None), ("dpmsolver", None), ("unipc", None)]
PREDICTIONS = ("epsilon", "v_prediction", "sample")
PROCESS = sd_process()


def draw(seed, count=2, shape=SHAPE):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def region(seed=1, count=2) -> Region:
    """A different mask in each picture: an edge, a corner, a single place."""
    mask = torch.zeros(count, 1, *SHAPE[1:])
    mask[0, :, :2] = 1
    mask[-1, :, 3, 4] = 1
    return Region(draw(seed, count), mask)


def streams(count=2, seed=0):
    return generators(seed, range(count))


def run(denoise, *, sampler="ddim", eta=None, steps=10, strength=1.0, prediction="epsilon", count=2, **options):
    chosen = Sampler(sampler, PROCESS, steps=steps, strength=strength, eta=eta)
    like = torch.zeros(1)
    found = sample(denoise, chosen, prediction, SHAPE, options.pop("generators", streams(count)), like, **options)
    assert found.shape == (count, *SHAPE)
    assert found.dtype == torch.float32
    return found


class Curved:
    """A network that no step of a chain leaves alone: it depends on state and step, each place on its own."""

    def __init__(self, scale=0.3):
        self.scale = scale
        self.states, self.steps = [], []

    def __call__(self, state, t):
        self.states.append(state.clone())
        self.steps.append(int(t[0]))
        return torch.sin(2 * state) * self.scale + state * (0.2 + t.view(-1, 1, 1, 1) / 3000)


# --- a region of a given picture ---


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("sampler", "eta"), SAMPLERS)
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_a_perfect_network_leaves_the_rest_and_finds_the_target(sampler, eta, prediction, strength):
    kept, target = region(), draw(2)
    oracle = OracleDenoiser(target, prediction)
    found = run(oracle, sampler=sampler, eta=eta, strength=strength, prediction=prediction, region=kept)
    inside = kept.mask.expand_as(found) > 0
    assert torch.equal(found[~inside], kept.normal[~inside])
    np.testing.assert_allclose(found[inside].numpy(), target[inside].numpy(), atol=2e-3)
    assert oracle.steps == [round(1000 * strength) - 1 - 100 * k for k in range(round(10 * strength))]


@pytest.mark.parametrize(("sampler", "eta"), SAMPLERS)
def test_the_network_sees_the_given_picture_noised_to_each_step(sampler, eta):
    kept, network = region(), Curved()
    run(network, sampler=sampler, eta=eta, region=kept)
    outside = kept.mask.expand(2, *SHAPE) == 0
    noises = []
    for state, step in zip(network.states, network.steps, strict=True):
        level = sd_alpha_bar()[step]
        noises.append((state - np.sqrt(level) * kept.normal)[outside].double().numpy() / np.sqrt(1 - level))
    for noise in noises:
        assert abs(noise.mean()) < 0.3
        assert 0.8 < noise.std() < 1.2
    same = [np.allclose(noises[0], noise, atol=2e-3) for noise in noises[1:]]
    random = sampler == "ddpm" or bool(eta)
    assert same == [not random] * len(same), "a sampler that forgets its noise takes fresh one, another keeps it"


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_deterministic_chain_is_that_of_the_equations(prediction):
    """Avrahami et al.'s loop by hand, in float64."""
    kept, network = region(), Curved()
    found = run(network, strength=0.5, prediction=prediction, region=kept)
    product = sd_alpha_bar()
    noise = np.stack([torch.randn(*SHAPE, generator=stream).double().numpy() for stream in streams()])
    normal, mask = kept.normal.double().numpy(), kept.mask.numpy()
    x = np.sqrt(product[499]) * normal + np.sqrt(1 - product[499]) * noise
    for t in (499, 399, 299, 199, 99):
        a, b = product[t], product[t - 100] if t > 99 else 1.0
        x = mask * x + (1 - mask) * (np.sqrt(a) * normal + np.sqrt(1 - a) * noise)
        answer = Curved()(torch.from_numpy(x), torch.tensor([t, t])).numpy()
        x = ddim(x, x0_of(answer, x, a, prediction), a, b)
    np.testing.assert_allclose(found.numpy(), mask * x + (1 - mask) * normal, atol=1e-4)


def test_a_network_that_goes_astray_outside_harms_nothing():
    kept, target = region(), draw(2)
    oracle, outside = OracleDenoiser(target), (kept.mask == 0).expand(2, *SHAPE)
    found = run(lambda state, t: oracle(state, t).masked_fill(outside, float("nan")), region=kept)
    assert torch.equal(found[outside], kept.normal[outside])
    np.testing.assert_allclose(found[~outside].numpy(), target[~outside].numpy(), atol=2e-3)


def test_an_empty_mask_gives_the_picture_back_and_a_full_one_the_target():
    normal, target = draw(1), draw(2)
    mask = torch.zeros(2, 1, *SHAPE[1:])
    mask[1] = 1
    found = run(OracleDenoiser(target), eta=1.0, region=Region(normal, mask))
    assert torch.equal(found[0], normal[0])
    np.testing.assert_allclose(found[1].numpy(), target[1].numpy(), atol=2e-3)


def test_no_strength_leaves_the_picture_as_it_is():
    kept = region()
    network = Curved()
    assert torch.equal(run(network, strength=0.0, region=kept), kept.normal)
    assert network.steps == []


@pytest.mark.parametrize(("sampler", "eta"), SAMPLERS)
def test_a_weaker_chain_starts_from_the_noised_picture(sampler, eta):
    kept, network = region(), Curved()
    run(network, sampler=sampler, eta=eta, strength=0.2, region=kept)
    assert network.steps == [199, 99]
    level, inside = sd_alpha_bar()[199], kept.mask.expand(2, *SHAPE) > 0
    noise = torch.stack([torch.randn(*SHAPE, generator=stream) for stream in streams()])
    expected = np.sqrt(level) * kept.normal + np.sqrt(1 - level) * noise
    torch.testing.assert_close(network.states[0][inside], expected[inside].float(), rtol=1e-4, atol=1e-4)


def test_what_is_given_stays_as_it_was():
    kept = region()
    normal, mask = kept.normal.clone(), kept.mask.clone()
    run(Curved(), eta=1.0, region=kept._replace(grow=0.5))
    assert torch.equal(kept.normal, normal)
    assert torch.equal(kept.mask, mask)


# --- what is drawn ---


@pytest.mark.parametrize(("sampler", "eta"), SAMPLERS)
@pytest.mark.parametrize("blended", [True, False])
def test_a_picture_does_not_depend_on_its_batch(sampler, eta, blended):
    kept = Region(draw(1, 3), (draw(2, 3)[:, :1] > 0).float())
    options = {"sampler": sampler, "eta": eta, "strength": 0.5 if blended else 1.0}
    together = run(Curved(), count=3, **options, region=kept if blended else None)
    for row in range(3):
        own = Region(kept.normal[row : row + 1], kept.mask[row : row + 1]) if blended else None
        alone = run(Curved(), count=1, **options, region=own, generators=generators(0, [row]))
        assert torch.equal(alone[0], together[row])


def test_nothing_is_drawn_from_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for eta in (0.0, 1.0):
        run(Curved(), eta=eta, region=region())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver", "unipc"])
def test_other_streams_give_other_pictures(sampler):
    one, other = (run(Curved(), sampler=sampler, generators=streams(seed=seed)) for seed in (0, 1))
    assert (one - other).abs().min(dim=0).values.max() > 0.05
    assert (one[0] - one[1]).abs().max() > 0.05


# --- whole pictures ---


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_whole_pictures_are_those_of_diffusers_ddim(prediction, eta):
    """Their scheduler, told the network's own answer."""
    theirs = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction,
        clip_sample=False, timestep_spacing="trailing",
    )  # fmt: skip
    theirs.set_timesteps(20)
    own, network = streams(), Curved()
    state = torch.stack([torch.randn(*SHAPE, generator=stream) for stream in own])
    for t in theirs.timesteps:
        answer = network(state, t.repeat(2))
        state = theirs.step(answer, t, state, eta=eta, generator=own if eta else None).prev_sample
    found = run(Curved(), eta=eta, steps=20, prediction=prediction)
    torch.testing.assert_close(found, state, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("sampler", "theirs"), [("dpmsolver", "DPMSolverMultistepScheduler"), ("unipc", "UniPCMultistepScheduler")])  # fmt: skip
def test_whole_pictures_are_those_of_diffusers_fast_solvers(sampler, theirs):
    scheduler = getattr(diffusers, theirs)(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="epsilon",
        timestep_spacing="trailing", final_sigmas_type="zero",
    )  # fmt: skip
    scheduler.set_timesteps(10)
    network, state = Curved(), torch.stack([torch.randn(*SHAPE, generator=stream) for stream in streams()])
    for t in scheduler.timesteps:
        state = scheduler.step(network(state, t.repeat(2)), t, state).prev_sample
    torch.testing.assert_close(run(Curved(), sampler=sampler), state, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("sampler", "eta"), SAMPLERS)
def test_before_each_call_it_is_told_what_the_network_will_see_and_what_it_thought_last(sampler, eta):
    kept, target, told = region()._replace(grow=0.5), draw(2), []
    oracle = OracleDenoiser(target)
    run(oracle, sampler=sampler, eta=eta, region=kept,
        before=lambda seen: told.append((len(oracle.states), seen)))  # fmt: skip
    assert [calls for calls, _ in told] == list(range(10))
    assert told[0][1].x0 is None
    for (_, seen), asked, step in zip(told, oracle.states, oracle.steps, strict=True):
        assert torch.equal(seen.state, asked)
        assert torch.equal(seen.mask, kept.at(step, 1000))
        if seen.x0 is not None:
            np.testing.assert_allclose(seen.x0.numpy(), target.numpy(), atol=5e-3)


def test_a_whole_picture_is_replaced_everywhere():
    told = []
    run(Curved(), before=told.append)
    assert all((seen.mask == 1).all() and seen.mask.shape == (2, 1, *SHAPE[1:]) for seen in told)


# --- a region that is wider at first ---


@pytest.mark.parametrize("step", [999, 899, 500, 99, 24, 0])
def test_a_grown_region_is_that_of_the_authors(step):
    """(t + 100) * 8 // 1000 places of 32, in a square around each; of other sizes as large a share."""
    mask = torch.zeros(2, 1, 32, 32)
    mask[0, 0, 5, 7] = mask[0, 0, 30, 30] = mask[1, 0, 12:15, 10] = 1
    cells = (step + 100) * 8 // 1000
    expected = ndimage.binary_dilation(mask.numpy(), np.ones((1, 1, 2 * cells + 1, 2 * cells + 1)))
    np.testing.assert_array_equal(Region(mask, mask, 0.25).at(step, 1000).numpy() > 0, expected)
    wide = Region(draw(0), F.interpolate(mask, (64, 96)), 0.25)
    assert wide.at(999, 1000).sum() > wide.at(step, 1000).sum() or step > 890
    assert torch.equal(Region(mask, mask).at(step, 1000), mask)


def test_what_a_grown_region_takes_it_gives_back():
    """Beside the mask the network goes on with its own at first, with the given picture at the end."""
    mask = torch.zeros(2, 1, *SHAPE[1:])
    mask[:, :, 2, 2] = 1
    kept, target = Region(draw(1), mask, grow=0.5), draw(2)
    oracle = OracleDenoiser(target)
    found = run(oracle, region=kept)
    inside = kept.mask.expand_as(found) > 0
    assert torch.equal(found[~inside], kept.normal[~inside])
    np.testing.assert_allclose(found[inside].numpy(), target[inside].numpy(), atol=2e-3)
    plain = OracleDenoiser(target)
    run(plain, region=kept._replace(grow=0.0))
    beside = (kept.at(899, 1000) > kept.mask).expand_as(found)
    assert beside.any()
    assert not torch.allclose(oracle.states[1][beside], plain.states[1][beside], atol=1e-3)
    np.testing.assert_allclose(oracle.states[-1][beside], plain.states[-1][beside], atol=1e-5)


@pytest.mark.parametrize(("sampler", "eta"), SAMPLERS)
def test_a_whole_chain_begins_with_nothing_of_the_picture(sampler, eta):
    """As of the authors: the last step of Stable Diffusion's forward process still carries a 15th of its contrast."""
    kept, network = region(), Curved()
    run(network, sampler=sampler, eta=eta, region=kept)
    noise = torch.stack([torch.randn(*SHAPE, generator=stream) for stream in streams()])
    inside = kept.mask.expand(2, *SHAPE) > 0
    assert torch.equal(network.states[0][inside], noise[inside])


def test_an_answer_in_half_precision_is_taken_in_full():
    network = Curved()
    found = run(lambda state, t: network(state, t).bfloat16(), region=region())
    torch.testing.assert_close(found, run(Curved(), region=region()), atol=0.1, rtol=0.1)


# --- guidance ---


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0, 7.5])
def test_guidance_is_the_formula(scale):
    """By one call, of twice the pictures where there is guidance."""
    told, untold, state = draw(3), draw(4), draw(5)
    sizes: list[int] = []

    def unet(x, t, states):
        sizes.append(len(x))
        return SimpleNamespace(sample=states * x + t.view(-1, 1, 1, 1))

    found = guided(unet, told, untold, scale)(state, torch.tensor([7, 9]))
    steps = torch.tensor([7.0, 9.0]).view(-1, 1, 1, 1)
    conditional, plain = told * state + steps, untold * state + steps
    torch.testing.assert_close(found, (1 - scale) * plain + scale * conditional, rtol=1e-5, atol=1e-4)
    assert sizes == [2 if scale == 1 else 4]


# --- the process of a scheduler of diffusers ---

KINDS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "LMSDiscreteScheduler")  # fmt: skip
SETTINGS = [
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195, "num_train_timesteps": 500},
    {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 200},
    {},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_process_is_the_one_a_scheduler_means(kind, settings):
    theirs = getattr(diffusers, kind)(**settings)
    process = ForwardProcess.of_scheduler(theirs.config)
    assert process.train_steps == theirs.config.num_train_timesteps
    torch.testing.assert_close(process.alpha_bar, theirs.alphas_cumprod.float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("settings", SETTINGS[:4])
def test_states_and_velocities_are_those_of_the_scheduler(settings):
    theirs = diffusers.DDPMScheduler(**settings)
    process = ForwardProcess.of_scheduler(dict(theirs.config))
    x0, noise, t = draw(1, 3), draw(2, 3), torch.tensor([0, 77, theirs.config.num_train_timesteps - 1])
    state = process.add_noise(x0, noise, t)
    torch.testing.assert_close(state, theirs.add_noise(x0, noise, t))
    torch.testing.assert_close(process.target(state, x0, t, "v_prediction"), theirs.get_velocity(x0, noise, t), rtol=2e-3, atol=2e-3)  # fmt: skip


def test_names_of_schedules_mean_what_their_papers_say():
    for theirs, ours in (("linear", "linear"), ("squaredcos_cap_v2", "cosine")):
        found = ForwardProcess.of_scheduler({"beta_schedule": theirs}).alpha_bar
        np.testing.assert_allclose(found.numpy(), alpha_bar(ours), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("change", [{"beta_schedule": "sigmoid"}, {"trained_betas": [0.1, 0.2]}, {"rescale_betas_zero_snr": True}])  # fmt: skip
def test_a_process_without_a_name_is_refused(change):
    with pytest.raises(UserError, match=r"model\.init_args\.base"):
        ForwardProcess.of_scheduler({"beta_schedule": "linear", **change})
