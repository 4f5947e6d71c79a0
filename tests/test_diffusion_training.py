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
    example = made.example(truth, images, None)
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


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("scheduler", ["ddpm", "ddim"])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_with_a_first_stage_states_lie_between_its_map_and_the_truth(conditioning, scheduler, start):
    torch.manual_seed(1)
    made = make("cosine", scheduler, conditioning=conditioning, start=start, label_input="soft", space=PixelSpace(2))
    truth, images, probabilities = many()
    example = made.example(truth, images, probabilities)
    at_first = (example.t == 499).numpy()
    assert abs(at_first.mean() - 0.501) < 4 * 0.5 / math.sqrt(4000)  # half, and a 500th of the rest
    assert stats.chisquare(np.bincount(example.t.numpy()[~at_first] // 50, minlength=10)[:9]).pvalue > 1e-3
    state, x0, t = example.state.double().numpy(), example.x0.double().numpy(), example.t.numpy()
    product = reference.alpha_bar("cosine")
    left = (2 * probabilities - 1).numpy()
    if conditioning != "concat":
        left = np.concatenate([left, images.numpy()], axis=1)
    if conditioning == "replace":
        a = product[t][:, None, None, None]
        noise = (state - np.sqrt(a) * x0)[:, 2:] / np.sqrt(1 - a)
        assert stats.kstest(noise.flatten(), "norm").pvalue > 1e-4
        state, x0, left = state[:, :2], x0[:, :2], left[:, :2]
    first = product[499]
    if scheduler == "ddim":  # undo the one jump of DDIM to see where it came from
        b = product[t][:, None, None, None]
        origin = np.sqrt(first) * x0 + np.sqrt((1 - first) / (1 - b)) * (state - np.sqrt(b) * x0)
        sure = t > 20  # below, rounding comes back enlarged
        if start == "clean":
            return np.testing.assert_allclose(origin[sure], left[sure], atol=1e-4)
        noise = (origin - np.sqrt(first) * left)[sure] / np.sqrt(1 - first)
    else:
        if start == "clean":
            np.testing.assert_allclose(state[at_first], left[at_first], atol=1e-5)
            alpha, spread = np.sqrt(first), 0.0
        else:  # left is noised first, so its mean and variance are
            alpha, spread = np.sqrt(first), np.sqrt(1 - first)
            left = alpha * left
        below = ~at_first
        b = product[t[below]][:, None, None, None]
        mean, variance = reference.posterior(left[below], x0[below], first, b)
        onward, _ = reference.posterior(spread, 0.0, first, b)  # how far the start's own spread comes
        noise = (state[below] - mean) / np.sqrt(variance + onward**2)
    for channel in range(noise.shape[1]):
        assert stats.kstest(noise[:, channel].flatten(), "norm").pvalue > 1e-4


def test_training_draws_the_first_stages_map_as_refining_does():
    torch.manual_seed(0)
    truth, images, probabilities = many()
    for how, values in (("sample", [-1, 1]), ("argmax", [-1, 1]), ("soft", None)):
        made = make(label_input=how, space=PixelSpace(2))
        example = made.example(truth, images, probabilities)
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
        found.append(made.example(truth, images, probabilities))
    assert all(torch.equal(one, other) for one, other in zip(found[0], found[1], strict=True))
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
    for maps in (probabilities, None):
        example = made.example(truth, images, maps)
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
    found = refinement("sample").loss(output.half(), example, labels)
    assert found.dtype == torch.float32
