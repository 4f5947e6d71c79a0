"""What a refiner is trained on: states of the forward process or of the bridge, and the loss by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from lit_defect.diffusion.labels import VOID, one_hot
from lit_defect.diffusion.process import ForwardProcess
from lit_defect.diffusion.refine import Example, Refinement
from lit_defect.diffusion.samplers import Sampler
from lit_defect.diffusion.spaces import LatentSpace, PixelSpace
from tests import diffusion as reference
from tests.diffusion import CONDITIONINGS, PREDICTIONS, STARTS, Blocks, Oracle, make, pictures


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# --- what is trained on ---


def many(count=4000):
    """Pictures of 1 x 2 pixels, the second void, of two classes."""
    truth, images, probabilities = pictures(count, (1, 2), classes=2)
    truth[:, :, 1] = VOID
    return truth, images, probabilities


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_without_a_first_stage_states_are_the_noised_truth_at_any_step(conditioning):
    torch.manual_seed(0)
    made = make("cosine", conditioning=conditioning, space=PixelSpace(2))
    truth, images, _ = many()
    example = made.example(truth, images)
    clean = one_hot(truth, 2)
    x0 = clean if conditioning == "concat" else torch.cat([clean, images], dim=1)
    assert torch.equal(example.x0, x0)
    assert (example.x0[:, :2, :, 1] == 0).all()  # void is neither class
    assert torch.equal(example.inputs[:, : x0.shape[1]], example.state)
    if conditioning == "concat":
        assert torch.equal(example.inputs[:, 2:], images)
    else:
        assert example.inputs.shape[1] == 5
    counts = np.bincount(example.t.numpy() // 50, minlength=20)
    assert stats.chisquare(counts).pvalue > 1e-3  # over all of the process, whatever the strength
    a = reference.alpha_bar("cosine")[example.t.numpy()][:, None, None, None]
    noise = (example.state.numpy() - np.sqrt(a) * x0.numpy()) / np.sqrt(1 - a)
    for channel in range(noise.shape[1]):
        assert stats.kstest(noise[:, channel].flatten(), "norm").pvalue > 1e-4
    between = np.corrcoef(noise.swapaxes(0, 1).reshape(noise.shape[1], -1))[np.triu_indices(noise.shape[1], 1)]
    assert np.abs(between).max() < 4.5 / math.sqrt(8000)  # also that of the picture from that of the labels


class Guesser:
    """Answers x_0 always the same, whatever the truth, and keeps what it was asked."""

    def __init__(self, channels: int, count: int = 2000) -> None:
        self.guess = 2 * torch.rand(count, channels, 1, 2) - 1
        self.weight = torch.ones((), requires_grad=True)
        self.inputs, self.steps = torch.empty(0), torch.empty(0)

    def __call__(self, inputs, t):
        self.inputs, self.steps = inputs, t
        return self.guess * self.weight


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("scheduler", ["ddpm", "ddim"])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_with_a_first_stage_states_are_its_maps_and_where_the_networks_own_answer_leads(conditioning, scheduler, start):
    torch.manual_seed(1)
    made = make("cosine", scheduler, conditioning=conditioning, start=start, label_input="soft", space=PixelSpace(2))
    truth, images, probabilities = many()
    network = Guesser(made.out_channels)
    example = made.example(truth, images, probabilities, network)
    assert not example.inputs.requires_grad
    x0 = one_hot(truth, 2) if conditioning == "concat" else torch.cat([one_hot(truth, 2), images], dim=1)
    assert torch.equal(example.x0, x0)  # what is asked for is the truth all the same
    at_first, below = slice(2000), slice(2000, None)
    assert (example.t[at_first] == 499).all()
    assert (network.steps == 499).all()
    assert stats.chisquare(np.bincount(example.t[below].numpy(), minlength=499)).pvalue > 1e-3
    left = 2 * probabilities - 1
    if conditioning != "concat":
        left = torch.cat([left, images], dim=1)
    product, left = reference.alpha_bar("cosine"), left.double().numpy()
    first, state = product[499], example.state.double().numpy()
    asked = network.inputs.double().numpy()[:, : left.shape[1]]
    starts = np.concatenate([state[at_first], asked])
    if conditioning == "replace":  # the picture of either kind is noised to its own level
        levels = np.concatenate([np.full(2000, first), product[example.t.numpy()]])
        shown = np.concatenate([asked, state])[:, 2:], np.concatenate([images[below], images])
        a = levels[:, None, None, None]
        noise = (shown[0] - np.sqrt(a) * shown[1]) / np.sqrt(1 - a)
        assert stats.kstest(noise.flatten(), "norm").pvalue > 1e-4
        starts, state, left = starts[:, :2], state[:, :2], left[:, :2]
    if conditioning == "concat":
        for seen, shown in ((network.inputs, images[below]), (example.inputs, images)):
            assert torch.equal(seen[:, 2:], shown)
    if start == "clean":
        np.testing.assert_allclose(starts, left, atol=1e-6)
    else:
        noise = (starts - np.sqrt(first) * left) / np.sqrt(1 - first)
        assert stats.kstest(noise.flatten(), "norm").pvalue > 1e-4
    guess, b = (
        network.guess.double().numpy()[:, : left.shape[1]],
        product[example.t[below].numpy()][:, None, None, None],
    )
    if scheduler == "ddim":
        leap = reference.ddim(starts[below], guess, first, b)
        np.testing.assert_allclose(state[below], leap, atol=5e-5)
    else:
        mean, variance = reference.posterior(starts[below], guess, first, b)
        noise = (state[below] - mean) / np.sqrt(variance)
        for channel in range(noise.shape[1]):
            assert stats.kstest(noise[:, channel].flatten(), "norm").pvalue > 1e-4


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_an_answer_is_read_in_training_as_it_is_in_a_chain(prediction):
    """A network that is right leads to where a chain gets with it."""
    made = make("cosine", "ddim", prediction=prediction)
    truth, images, probabilities = pictures(6)
    oracle = Oracle(made, "cosine", truth[3:], images[3:])
    example = made.example(truth, images, probabilities, oracle)
    b = oracle.product[example.t[3:].numpy()][:, None, None, None]
    leap = reference.ddim(oracle.states[0], example.x0[3:].double().numpy(), oracle.product[499], b)
    np.testing.assert_allclose(example.state[3:], leap, atol=1e-4)


def test_a_guess_is_clipped_in_training_as_it_is_in_a_chain():
    made = make("cosine", "ddim")
    truth, images, probabilities = pictures(6)
    found = []
    for size in (9.0, 1.0):
        torch.manual_seed(0)
        found.append(
            made.example(truth, images, probabilities, lambda inputs, t, size=size: size * inputs[:, :3].sign())
        )
    torch.testing.assert_close(found[0].state, found[1].state)


@pytest.mark.parametrize(("count", "steps", "firsts"), [(5, 10, 3), (4, 2, 4)])
def test_half_of_a_batch_and_all_of_it_where_there_is_one_call_is_at_the_first_step(count, steps, firsts):
    made = make("cosine", "ddim", steps=steps)
    truth, images, probabilities = pictures(count)
    example = made.example(truth, images, probabilities, lambda inputs, t: inputs[:, :3])
    assert ((example.t == 499).tolist()) == [True] * firsts + [False] * (count - firsts)


def test_a_batch_of_one_comes_to_the_first_step_and_to_later_ones():
    made = make("cosine", "ddim", steps=10)
    truth, images, probabilities = pictures(1)
    torch.manual_seed(0)
    steps = [int(made.example(truth, images, probabilities, lambda inputs, t: inputs[:, :3]).t) for _ in range(40)]
    assert 8 <= steps.count(499) <= 32
    assert min(steps) < 250


def test_training_draws_the_first_stages_map_as_refining_does():
    torch.manual_seed(0)
    truth, images, probabilities = many()
    for how, values in (("sample", [-1, 1]), ("argmax", [-1, 1]), ("soft", None)):
        made = make(label_input=how, space=PixelSpace(2))
        example = made.example(truth, images, probabilities, lambda inputs, t: inputs[:, :2])
        starts = example.state[example.t == 499]
        maps = probabilities[example.t == 499]
        if values is None:
            torch.testing.assert_close(starts, 2 * maps - 1, atol=1e-5, rtol=0)
            continue
        np.testing.assert_allclose(starts.abs(), 1, atol=1e-5)
        drawn = (starts[:, 1] > 0).float()
        if how == "argmax":
            torch.testing.assert_close(drawn, (maps[:, 1] > 0.5).float())
        else:  # a sum of independent coins, one for each pixel
            error = (drawn - maps[:, 1]).sum() / (maps[:, 0] * maps[:, 1]).sum().sqrt()
            assert abs(error) < 4
            assert not torch.equal(drawn, (maps[:, 1] > 0.5).float())


def test_examples_follow_torchs_seed():
    truth, images, probabilities = many(5)
    made = make("cosine", "ddpm", conditioning="replace", start="noised", space=PixelSpace(2))
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(made.example(truth, images, probabilities, lambda inputs, t: inputs.sin()))
    assert all(torch.equal(one, other) for one, other in zip(found[0][:4], found[1][:4], strict=True))
    assert not torch.equal(found[0].inputs, found[2].inputs)


# --- the loss ---


def toy_example(conditioning="concat"):
    """One picture of 1 x 3 pixels: class 0, class 1, void; at the last of two steps of Ho et al.'s betas."""
    process = ForwardProcess(2, "linear")
    labels = torch.tensor([[[0, 1, VOID]]])
    x0 = [[1, -1, 0], [-1, 1, 0]] + ([[0.5, 0, -0.5]] * 3 if conditioning != "concat" else [])
    torch.manual_seed(0)
    x0 = torch.tensor(x0, dtype=torch.float32).view(1, -1, 1, 3)
    state, output = torch.randn_like(x0), torch.randn_like(x0)

    def refinement(prediction):
        sampler = Sampler("ddim", process, steps=2, strength=1.0)
        return Refinement(process, sampler, PixelSpace(2), conditioning, "clean", prediction, "sample")

    return refinement, Example(state, torch.tensor([1]), state, x0), output, labels


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_loss_by_hand(conditioning, prediction):
    refinement, example, output, labels = toy_example(conditioning)
    a = (1 - 1e-4) * (1 - 0.02)
    x0, state, out = (x.double().numpy()[0, :, 0] for x in (example.x0, example.state, output))  # (channels, 3)
    target = reference.answer_for(x0, state, a, prediction)
    if prediction == "logits":
        terms = [math.log(1 + math.exp(out[1, 0] - out[0, 0])), math.log(1 + math.exp(out[0, 1] - out[1, 1]))]
    else:
        terms = [(out[c, i] - target[c, i]) ** 2 for c in (0, 1) for i in (0, 1)]  # two channels, two pixels that count
    if conditioning != "concat":
        terms += [
            (out[c, i] - target[c, i]) ** 2 for c in (2, 3, 4) for i in (0, 1, 2)
        ]  # the picture is known everywhere
    found = refinement(prediction).loss(output, example, labels)
    assert float(found) == pytest.approx(np.mean(terms), rel=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_void_has_no_part_in_value_and_gradient(conditioning, prediction):
    refinement, example, output, labels = toy_example(conditioning)
    output.requires_grad_()
    made = refinement(prediction)
    loss = made.loss(output, example, labels)
    loss.backward()
    assert (output.grad[:, :2, :, 2] == 0).all()
    assert (output.grad[:, :2, :, :2] != 0).all()
    moved = output.detach().clone()
    moved[:, :2, :, 2] += 100
    assert torch.equal(made.loss(moved, example, labels), loss)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_batch_of_nothing_but_void_has_loss_0(prediction):
    refinement, example, output, labels = toy_example()
    output.requires_grad_()
    loss = refinement(prediction).loss(output, example, torch.full_like(labels, VOID))
    loss.backward()
    assert loss.item() == 0
    assert (output.grad == 0).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_the_right_answer_has_loss_0(conditioning, prediction):
    torch.manual_seed(0)
    made = make("cosine", "ddpm", conditioning=conditioning, prediction=prediction)
    truth, images, probabilities = pictures(4)
    for first in ((probabilities, lambda inputs, t: inputs[:, : made.out_channels]), ()):
        example = made.example(truth, images, *first)
        alone = [(slice(i, i + 1), Oracle(made, "cosine", truth[i : i + 1], images[i : i + 1])) for i in range(4)]
        answer = torch.cat([oracle(example.inputs[one], example.t[one]) for one, oracle in alone])
        assert answer.shape[1] == made.out_channels
        assert float(made.loss(answer, example, truth)) < 1e-5
        assert float(made.loss(-answer, example, truth)) > 0.1


def test_a_place_of_a_latent_counts_by_its_share_of_pixels_that_are_not_void():
    made = make(space=LatentSpace(Blocks()))
    truth = torch.tensor([[[0, 1, 0, 0], [VOID, 1, VOID, VOID]]])  # 3 of 4 and 2 of 4 pixels count
    truth = torch.cat([truth, torch.full_like(truth, VOID)], dim=1)  # and a row of places that do not
    x0 = Blocks().encode(one_hot(truth, 2))  # (1, 8, 2, 2)
    output = x0 + torch.tensor([[1.0, 2.0], [5.0, 7.0]])
    found = made.loss(output, Example(x0, torch.tensor([1]), x0, x0), truth)
    assert float(found) == pytest.approx((0.75 * 1 + 0.5 * 4) / 1.25, rel=1e-5)


def test_loss_is_computed_in_single_precision():
    refinement, example, output, labels = toy_example()
    half = output.half()
    found = refinement("logits").loss(half, example, labels)
    torch.testing.assert_close(found, refinement("logits").loss(half.float(), example, labels), atol=0, rtol=1e-7)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_error_of_recycled_states_is_that_of_x0(prediction):
    """The noise that would lead to such a state has no bound at low steps; the x_0 it means has."""
    made = make("cosine", "ddim", conditioning="concat", prediction=prediction)
    truth, images, _ = pictures(2)
    x0 = one_hot(truth, made.space.classes)
    state = -x0  # as far from the truth as can be, at a step with hardly any noise
    t = torch.tensor([1, 700])
    example = Example(torch.cat([state, images], 1), t, state, x0, recycled=True)
    output = torch.zeros_like(x0)
    meant = made.process.x0_of(output, state, t, prediction)
    share = made.process.alpha_bar[t].double()
    error = (meant - x0).double().square().mean((1, 2, 3))
    if prediction == "epsilon":  # of the noise itself where there is more of it than of the signal
        error = torch.where(share < 0.5, error * share / (1 - share), error)
    assert float(made.loss(output, example, truth)) == pytest.approx(float(error.mean()), rel=1e-4)
    assert float(made.loss(output, example._replace(recycled=False), truth)) > 10
