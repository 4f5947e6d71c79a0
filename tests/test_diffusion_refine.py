"""Chains with a network that knows the truth, whole chains by hand in numpy, and how the picture comes in."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch.nn import functional as F

from lit_defect.diffusion.labels import encode, generators, one_hot
from lit_defect.diffusion.spaces import LatentSpace, PixelSpace
from tests import diffusion as reference
from tests.diffusion import (
    CLASSES,
    CONDITIONINGS,
    PREDICTIONS,
    PROCESSES,
    SCHEDULERS,
    SIZE,
    STARTS,
    Blocks,
    Oracle,
    make,
    pictures,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# --- a network that knows the truth ---


@pytest.mark.parametrize("schedule", PROCESSES)
@pytest.mark.parametrize(
    ("conditioning", "start", "prediction", "scheduler"),
    itertools.product(CONDITIONINGS, STARTS, PREDICTIONS, SCHEDULERS),
)
def test_a_perfect_network_finds_the_truth(conditioning, start, prediction, scheduler, schedule):
    made = make(schedule, scheduler, conditioning=conditioning, start=start, prediction=prediction)
    truth, images, probabilities = pictures()
    oracle = Oracle(made, schedule, truth, images)
    found = made.refine(oracle, probabilities, images, generators(0, [0, 1]))
    assert oracle.steps == [[499] * 2, [399] * 2, [299] * 2, [199] * 2, [99] * 2]
    for labels in found:
        np.testing.assert_allclose(labels, one_hot(truth, CLASSES), atol=1e-4)
    assert torch.equal(made.space.decode(found.final).argmax(1), truth)


@pytest.mark.parametrize(
    ("conditioning", "prediction", "scheduler"), itertools.product(CONDITIONINGS, PREDICTIONS[:3], SCHEDULERS)
)
def test_a_perfect_network_finds_the_truth_in_latents(conditioning, prediction, scheduler):
    space = LatentSpace(Blocks())
    made = make("cosine", scheduler, conditioning=conditioning, prediction=prediction, space=space)
    truth, images, probabilities = pictures(classes=2)
    oracle = Oracle(made, "cosine", truth, images)
    found = made.refine(oracle, probabilities, images, generators(0, [0, 1]))
    assert oracle.inputs[0].shape == (2, 8 + 12, 3, 4)
    np.testing.assert_allclose(found.final, Blocks().encode(one_hot(truth, 2)), atol=1e-4)
    assert torch.equal(space.decode(found.final).argmax(1), truth)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_perfect_network_finds_the_truth_in_pure_noise(scheduler, conditioning):
    made = make("linear", scheduler, conditioning=conditioning, strength=1.0)
    truth, images, _ = pictures()
    oracle = Oracle(made, "linear", truth, images)
    found = made.refine(oracle, None, images, generators(0, [0, 1]))
    assert oracle.steps[0] == [999, 999]
    assert torch.equal(found.final.argmax(1), truth)
    large, images, _ = pictures(1, (40, 40))
    oracle = Oracle(made, "linear", large, images)
    made.refine(oracle, None, images, generators(0, [0]))
    channels = oracle.states[0].shape[1] if conditioning == "joint" else CLASSES
    assert stats.kstest(oracle.states[0][:, :channels].flatten(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("scheduler", SCHEDULERS[1:])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_chain_that_is_right_visits_the_states_of_the_bridge(conditioning, start, scheduler):
    """So what `example` trains on is what is met; without noise these are points, also of the solvers of order 2."""
    made = make("linear", scheduler, conditioning=conditioning, start=start)
    truth, images, probabilities = pictures()
    oracle = Oracle(made, "linear", truth, images)
    made.refine(oracle, probabilities, images, generators(0, [0, 1]))
    shown = slice(None) if conditioning != "replace" else slice(CLASSES)  # the picture's channels are put in anew
    first, x0 = torch.from_numpy(oracle.states[0]).float(), oracle.x0
    for state, steps in zip(oracle.states, oracle.steps, strict=True):
        leap = reference.ddim(
            first.double().numpy(), x0.double().numpy(), oracle.product[499], oracle.product[steps[0]]
        )
        np.testing.assert_allclose(state[:, shown], leap[:, shown], atol=2e-5)
        start_step, t = torch.tensor([499, 499]), torch.tensor(steps)
        bridge = made.process.bridge(first, x0, start_step, t, torch.randn_like(first), made.sampler.eta)
        np.testing.assert_allclose(state[:, shown], bridge[:, shown], atol=2e-5)


@pytest.mark.parametrize("steps", [1000, 10])
def test_a_ddpm_chain_that_is_right_has_the_bridges_distribution(steps):
    """Its mean and variance at every step it comes to, over places that share start and truth."""
    made = make("cosine", "ddpm", steps=steps, label_input="argmax", space=PixelSpace(2))
    truth, images = torch.zeros(1, 96, 96, dtype=torch.int64), torch.zeros(1, 3, 96, 96)
    wrong = torch.tensor([0.1, 0.9]).view(1, 2, 1, 1).expand(1, 2, 96, 96)
    oracle = Oracle(made, "cosine", truth, images)
    made.refine(oracle, wrong, images, generators(0, [0]))
    np.testing.assert_array_equal(oracle.states[0][0, 0], -1)
    checked = range(1, len(oracle.states), max(1, steps // 20))
    for k in checked:
        t = oracle.steps[k][0]
        # One jump from the start: the steps between make no difference where x0 stays the same.
        mean, variance = reference.posterior(np.float64(-1), np.float64(1), oracle.product[499], oracle.product[t])
        deviation, x0 = math.sqrt(variance), torch.ones(1, 1, 1, 1)
        jump = [torch.tensor([499]), torch.tensor([t])]
        bridge = [float(made.process.bridge(-x0, x0, *jump, noise * x0, made.sampler.eta)) for noise in (0, 1)]
        assert bridge == pytest.approx([mean, mean + deviation], abs=1e-4)
        places = oracle.states[k][0, 0].flatten()
        assert abs(places.mean() - mean) < 4.5 * deviation / math.sqrt(places.size), f"step {t}"
        assert abs(places.var() / deviation**2 - 1) < 4.5 * math.sqrt(2 / places.size), f"step {t}"


# --- a whole chain by hand ---


def answers(state: np.ndarray, t: int) -> np.ndarray:
    """Of a toy network."""
    return 0.6 * state + 0.3 * np.tanh(state[:, ::-1]) - t / 2000


def by_hand(refinement, schedule, labels, picture, noise):
    """Labels at the end and after one call; `noise(channels)` gives the next normal numbers (1, channels, H, W)."""
    levels = reference.levels_of(schedule, 1000, refinement.sampler.steps)
    joint, n = refinement.conditioning != "concat", labels.shape[1]
    state = np.concatenate([labels, picture], axis=1) if joint else labels
    width, first, start = state.shape[1], None, refinement.sampler.timesteps[0]
    if refinement.start == "noised":
        state = np.sqrt(levels[start][0]) * state + np.sqrt(1 - levels[start][0]) * noise(width)
    for t in refinement.sampler.timesteps:
        a, b = levels[t]
        if refinement.conditioning == "replace":
            state = np.concatenate([state[:, :n], np.sqrt(a) * picture + np.sqrt(1 - a) * noise(3)], axis=1)
        answer = answers(state if joint else np.concatenate([state, picture], axis=1), t)[:, :width]
        if refinement.prediction == "logits":
            answer = np.concatenate([2 * special.softmax(answer[:, :n], axis=1) - 1, answer[:, n:]], axis=1)
        x0 = reference.x0_of(answer, state, a, refinement.prediction).clip(-1, 1)
        first = x0[:, :n] if first is None else first
        if refinement.sampler.name == "ddpm":
            mean, variance = reference.posterior(state, x0, a, b)
            state = mean + np.sqrt(variance) * noise(width)
        else:
            state = reference.ddim(state, x0, a, b)
    return state[:, :n], first


@pytest.mark.parametrize("schedule", PROCESSES)
@pytest.mark.parametrize(
    ("conditioning", "start", "prediction", "scheduler"),
    itertools.product(CONDITIONINGS, STARTS, PREDICTIONS, SCHEDULERS[:2]),
)
def test_a_chain_is_the_one_worked_out_by_hand(conditioning, start, prediction, scheduler, schedule):
    made = make(schedule, scheduler, conditioning=conditioning, start=start, prediction=prediction)
    _, images, probabilities = pictures(1)
    own = generators(3, [5])

    def noise(channels):
        return torch.randn(1, channels, *SIZE, generator=own[0]).double().numpy()

    def network(inputs, t):
        answer = torch.from_numpy(answers(inputs.double().numpy(), int(t[0]))).float()
        return answer[:, : made.out_channels]

    labels = encode(probabilities, "sample", own).double().numpy()  # the streams' first numbers
    final, first = by_hand(made, schedule, labels, images.double().numpy(), noise)
    found = made.refine(network, probabilities, images, generators(3, [5]))
    np.testing.assert_allclose(found.final, final, atol=1e-4)
    np.testing.assert_allclose(found.first, first, atol=1e-4)


def test_the_picture_in_a_joint_state_is_kept_within_pixels_beside_latents():
    made = make(space=LatentSpace(Blocks()), conditioning="joint")
    _, images, probabilities = pictures(1, classes=2)
    seen = []

    def too_far(inputs, t):
        seen.append((inputs, t))
        return torch.full_like(inputs, 9.0)

    made.refine(too_far, probabilities, images, generators(0, [0]))
    (start, first), (state, second) = seen[:2]
    x0 = torch.full_like(start, 1.0)
    x0[:, : made.space.channels] = made.space.limit
    expected = made.process.bridge(start, x0, first, second, torch.zeros_like(start), eta=0)
    torch.testing.assert_close(state, expected)


@pytest.mark.parametrize("limit", ["pixels", "latents"])
def test_x0_is_kept_within_the_limits_of_the_space(limit):
    space = PixelSpace(2) if limit == "pixels" else LatentSpace(Blocks())
    _, images, probabilities = pictures(1, classes=2)
    made = make(space=space, conditioning="joint")
    found = made.refine(lambda inputs, t: 100 * torch.ones_like(inputs), probabilities, images, generators(0, [0]))
    assert found.first.unique().tolist() == [space.limit]
    np.testing.assert_allclose(found.final, space.limit, atol=1e-5)
    assert space.limit == 1 if limit == "pixels" else space.limit > 1.7


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("first", [True, False])
def test_a_picture_is_refined_alike_in_any_batch(conditioning, first):
    made = make("linear", "ddpm", conditioning=conditioning, start="noised")
    _, images, probabilities = pictures(3)
    maps = probabilities if first else None

    def network(inputs, t):
        return (inputs.sin() + t.view(-1, 1, 1, 1) / 1000)[:, : made.out_channels]

    together = made.refine(network, maps, images, generators(0, [4, 8, 15]))
    part = [2, 0]
    apart = made.refine(network, None if maps is None else maps[part], images[part], generators(0, [15, 4]))
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one[part], other, rtol=0, atol=0)


# --- strength 0 ---


@pytest.mark.parametrize(("conditioning", "start", "scheduler"), itertools.product(CONDITIONINGS, STARTS, SCHEDULERS))
def test_strength_0_gives_the_first_stages_map_and_calls_no_network(conditioning, start, scheduler):
    made = make("cosine", scheduler, strength=0, conditioning=conditioning, start=start, label_input="soft")
    _, images, probabilities = pictures()

    def never(inputs, t):
        raise AssertionError("called")

    found = made.refine(never, probabilities, images, generators(0, [0, 1]))
    for labels in found:
        torch.testing.assert_close(made.space.decode(labels), probabilities)


def test_strength_0_cannot_be_trained_for_from_a_first_stage():
    truth, images, probabilities = pictures()
    made = make(strength=0)
    with pytest.raises(ValueError, match="strength of 0"):
        made.example(truth, images, probabilities, lambda inputs, t: inputs[:, :CLASSES])
    assert made.example(truth, images).t.max() > 0  # on truth alone it can


# --- how the picture comes in ---


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_channels(conditioning):
    made = make(conditioning=conditioning)
    assert (made.in_channels, made.out_channels) == (6, 3 if conditioning == "concat" else 6)
    latent = make(conditioning=conditioning, space=LatentSpace(Blocks()))
    assert (latent.in_channels, latent.out_channels) == (20, 8 if conditioning == "concat" else 20)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("start", STARTS)
def test_concat_shows_the_clean_picture_at_each_call(start, scheduler):
    made = make("linear", scheduler, conditioning="concat", start=start)
    truth, images, probabilities = pictures()
    oracle = Oracle(made, "linear", truth, images)
    made.refine(oracle, probabilities, images, generators(0, [0, 1]))
    assert len(oracle.inputs) == 5
    for inputs in oracle.inputs:
        assert torch.equal(inputs[:, CLASSES:], images)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_replace_shows_the_picture_noised_anew_to_the_level_of_each_call(scheduler):
    made = make("linear", scheduler, conditioning="replace", steps=20, space=PixelSpace(2))
    truth, images, probabilities = pictures(1, (60, 60), classes=2)
    oracle = Oracle(made, "linear", truth, images)
    made.refine(oracle, probabilities, images, generators(0, [0]))
    noise = []
    for state, steps in zip(oracle.states, oracle.steps, strict=True):
        a = oracle.product[steps[0]]
        noise.append(((state[:, 2:] - np.sqrt(a) * images.double().numpy()) / np.sqrt(1 - a)).flatten())
        assert stats.kstest(noise[-1], "norm").pvalue > 1e-4, f"step {steps[0]}"
    between = np.corrcoef(noise)[np.triu_indices(10, 1)]
    assert np.abs(between).max() < 4.5 / math.sqrt(noise[0].size)


@pytest.mark.parametrize("conditioning", ["joint", "replace"])
def test_the_paper_starts_from_the_label_map_and_the_picture_as_they_are(conditioning):
    made = make("linear", "ddpm", conditioning=conditioning)
    truth, images, probabilities = pictures()
    oracle = Oracle(made, "linear", truth, images)
    made.refine(oracle, probabilities, images, generators(0, [0, 1]))
    labels = encode(probabilities, "sample", generators(0, [0, 1]))
    assert torch.equal(oracle.inputs[0][:, :CLASSES], labels)
    assert torch.equal(oracle.inputs[0][:, CLASSES:], images) == (conditioning == "joint")


# --- spaces ---


def test_pictures_lose_nothing_on_their_way_into_latents():
    space = LatentSpace(Blocks())
    images = torch.randn(2, 3, 6, 8)
    assert space.image(images).shape == (2, space.image_channels, 3, 4)
    assert torch.equal(F.pixel_shuffle(space.image(images), 2), images)


@pytest.mark.parametrize("space", [PixelSpace(2), LatentSpace(Blocks())])
def test_label_maps_come_back_from_a_space(space):
    truth, _, _ = pictures(classes=2)
    state = space.encode(one_hot(truth, 2))
    assert state.shape[1] == space.channels
    assert state.shape[-1] * space.factor == truth.shape[-1]
    probabilities = space.decode(state)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(probabilities, (one_hot(truth, 2) + 1) / 2, atol=1e-6)
