"""Label maps by hand, random streams that depend on the picture alone, and drawing by the probabilities (chi-square)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from lit_defect.diffusion.labels import (
    VOID,
    decode,
    draw_normal,
    encode,
    generators,
    one_hot,
    sample_labels,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def constant(shares: list[float], side: int = 200) -> torch.Tensor:
    """(1, n, side, side) probabilities, the same everywhere."""
    return torch.tensor(shares).view(1, -1, 1, 1).expand(1, len(shares), side, side)


# --- random streams ---


def test_streams_of_seed_picture_and_sample_are_all_different():
    seeds = [
        stream.initial_seed()
        for seed, sample in itertools.product(range(6), range(6))
        for stream in generators(seed, list(range(6)), sample)
    ]
    assert len(set(seeds)) == 6**3  # (0, 1, 2) is not (0, 2, 1) nor (1, 0, 2)


def test_a_stream_does_not_depend_on_the_other_pictures_of_its_batch():
    together = draw_normal((2, 3), generators(5, [3, 7, 11]), torch.zeros(1))
    assert together.shape == (3, 2, 3)
    for row, index in zip(together[[2, 0]], [11, 3], strict=True):
        torch.testing.assert_close(draw_normal((2, 3), generators(5, [index]), torch.zeros(1))[0], row, rtol=0, atol=0)


def test_noise_is_standard_normal_between_places_and_pictures():
    noise = draw_normal((1, 50, 50), generators(0, list(range(8))), torch.zeros(1)).flatten(1).numpy()
    assert stats.kstest(noise.flatten(), "norm").pvalue > 1e-3
    between = np.corrcoef(noise)[np.triu_indices(8, 1)]
    assert np.abs(between).max() < 4.5 / 50  # 4.5 standard errors, of 28 pairs


def test_noise_is_of_the_kind_of_the_state():
    assert draw_normal((2,), generators(0, [1]), torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


# --- label maps ---


def test_one_hot_by_hand():
    found = one_hot(torch.tensor([[[0, 2], [VOID, 1]]]), 3)
    assert found.dtype == torch.float32
    assert found[0, :, 0, 0].tolist() == [1, -1, -1]
    assert found[0, :, 0, 1].tolist() == [-1, -1, 1]
    assert found[0, :, 1, 0].tolist() == [0, 0, 0]
    assert found[0, :, 1, 1].tolist() == [-1, 1, -1]


def test_decode_by_hand():
    state = torch.tensor([[1, -1, -1], [0.5, -0.5, -1], [0, 0, 0], [-1, -3, -1.5], [3, -2, 0], [0.2, 0.2, 1]])
    expected = [
        [1, 0, 0],
        [0.75, 0.25, 0],
        [1 / 3] * 3,
        [1 / 3] * 3,
        [2 / 3, 0, 1 / 3],
        [0.6 / 2.2, 0.6 / 2.2, 1 / 2.2],
    ]
    np.testing.assert_allclose(decode(state.view(6, 3, 1, 1)).view(6, 3), expected, atol=1e-6)


def test_decode_undoes_encode():
    labels = torch.randint(0, 4, (2, 5, 6))
    assert torch.equal(decode(one_hot(labels, 4)).argmax(1), labels)
    soft = torch.rand(2, 4, 5, 6).softmax(1)
    torch.testing.assert_close(decode(encode(soft, "soft")), soft)


def test_decode_takes_half_precision():
    found = decode(torch.tensor([1.0, -1.0], dtype=torch.float16).view(1, 2, 1, 1))
    assert found.flatten().tolist() == [1, 0]


def test_the_most_probable_class_or_all_of_them():
    probabilities = torch.tensor([0.2, 0.5, 0.3]).view(1, 3, 1, 1)
    assert encode(probabilities, "argmax").flatten().tolist() == [-1, 1, -1]
    np.testing.assert_allclose(encode(probabilities, "soft").flatten(), [-0.6, 0, -0.4], atol=1e-6)


# --- drawing labels ---


@pytest.mark.parametrize("shares", [[0.93, 0.07], [0.5, 0.5], [0.1, 0.2, 0.3, 0.4], [0.05] * 20])
@pytest.mark.parametrize("own_streams", [True, False])
def test_labels_are_drawn_by_their_probabilities(shares, own_streams):
    torch.manual_seed(0)
    drawn = sample_labels(constant(shares), generators(0, [4]) if own_streams else None)
    assert drawn.shape == (1, 200, 200)
    assert drawn.dtype == torch.int64
    counts = np.bincount(drawn.flatten().numpy(), minlength=len(shares))
    assert len(counts) == len(shares)
    assert stats.chisquare(counts, np.array(shares) * 40_000).pvalue > 1e-3


def test_each_pixel_has_its_own_probabilities():
    level = torch.linspace(0, 1, 10).repeat_interleave(20)  # ten stripes
    probabilities = torch.stack([1 - level, level])[None, :, None, :].expand(1, 2, 500, 200)
    shares = sample_labels(probabilities, generators(0, [0]))[0].float().mean(0).view(10, 20).mean(1)
    error = (level[::20] * (1 - level[::20]) / 10_000).sqrt()
    assert ((shares - level[::20]).abs() <= 4 * error).all()  # 0 and 1 exactly


def test_pixels_are_drawn_independently_of_each_other():
    drawn = sample_labels(constant([0.4, 0.6]), generators(0, [9]))[0].numpy()
    for one, other in [(drawn[:, 1:], drawn[:, :-1]), (drawn[1:], drawn[:-1])]:
        table = stats.contingency.crosstab(one.flatten(), other.flatten()).count
        assert stats.chi2_contingency(table).pvalue > 1e-3


def test_pictures_are_drawn_independently_of_each_other():
    one, other = sample_labels(constant([0.4, 0.6]).expand(2, -1, -1, -1), generators(0, [0, 1]))
    table = stats.contingency.crosstab(one.flatten().numpy(), other.flatten().numpy()).count
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_a_map_does_not_depend_on_its_batch_but_on_seed_and_sample():
    probabilities = torch.rand(3, 4, 20, 20).softmax(1)
    together = sample_labels(probabilities, generators(0, [3, 7, 11]))
    alone = sample_labels(probabilities[1:2], generators(0, [7]))
    assert torch.equal(together[1:2], alone)
    for streams in (generators(1, [7]), generators(0, [8]), generators(0, [7], sample=1)):
        assert not torch.equal(sample_labels(probabilities[1:2], streams), alone)


def test_drawing_from_streams_leaves_torchs_own_numbers_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    encode(constant([0.4, 0.6], 20), "sample", generators(0, [7]))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_class_without_probability_is_never_drawn():
    assert set(sample_labels(constant([0.0, 0.5, 0.0, 0.5]), generators(0, [1])).flatten().tolist()) == {1, 3}


def test_probabilities_that_sum_to_a_little_less_give_no_class_beyond_the_last():
    drawn = sample_labels(constant([0.3, 0.3, 0.3]), generators(0, [1]))
    counts = np.bincount(drawn.flatten().numpy(), minlength=3)
    assert stats.chisquare(counts, np.array([0.3, 0.3, 0.4]) * 40_000).pvalue > 1e-3


def test_sampling_encodes_what_was_drawn():
    probabilities = torch.rand(2, 3, 6, 6).softmax(1)
    drawn = sample_labels(probabilities, generators(2, [0, 1]))
    torch.testing.assert_close(encode(probabilities, "sample", generators(2, [0, 1])), one_hot(drawn, 3))
