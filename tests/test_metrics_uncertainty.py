import math
from itertools import pairwise, permutations

import numpy as np
import pytest
from scipy.integrate import trapezoid
from sklearn.metrics import roc_auc_score

from lit_defect.errors import UserError
from lit_defect.metrics.uncertainty import Sparsification, error_agreement, sparsification


def picture(seed: int, levels: int = 0, size: tuple[int, int] = (20, 25)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Uncertainty that knows something of the errors; with `levels`, ties."""
    rng = np.random.default_rng(seed)
    wrong = rng.random(size) < 0.2
    values = rng.normal(size=size) + wrong
    if levels:
        values = np.round(values * levels) / levels
    return values, wrong, rng.random(size) < 0.8


def found_in_all_orders(values: np.ndarray, wrong: np.ndarray, count: int) -> float:
    """Mean number of wrong pixels among the first `count`, over all orders that put larger values first."""
    tallies = [
        sum(wrong[pixel] for pixel in order[:count])
        for order in permutations(range(len(values)))
        if all(values[a] >= values[b] for a, b in pairwise(order))
    ]
    return float(np.mean(tallies))


@pytest.mark.parametrize("levels", [0, 1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_auroc_is_scikit_learns(seed: int, levels: int) -> None:
    values, wrong, valid = picture(seed, levels)
    agreement = error_agreement(values, wrong, valid)
    assert agreement.auroc == pytest.approx(roc_auc_score(wrong[valid], values[valid]), abs=1e-12)
    assert 0.6 < agreement.auroc < 0.9


@pytest.mark.parametrize("share", [0.1, 0.25, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_found_by_sorting(seed: int, share: float) -> None:
    values, wrong, _ = picture(seed)
    looked_at = np.argsort(-values, axis=None)[: int(share * values.size)]
    expected = wrong.ravel()[looked_at].sum() / wrong.sum()
    agreement = error_agreement(values, wrong, np.ones_like(wrong), share=share)
    assert agreement.found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_ties_are_shared_in_expectation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values, wrong = rng.integers(0, 3, 7), rng.permutation([True, True, True, False, False, False, False])
    curve = sparsification(values[None], wrong[None], np.ones((1, 7)), steps=7)
    for count in range(7):
        expected = found_in_all_orders(values, wrong, count)
        found = error_agreement(values[None], wrong[None], np.ones((1, 7)), share=count / 7).found
        assert found == pytest.approx(expected / 3, abs=1e-12)
        assert curve.error[count] == pytest.approx((3 - expected) / (7 - count), abs=1e-12)


def test_no_information_finds_what_it_looks_at() -> None:
    _, wrong, valid = picture(0)
    agreement = error_agreement(np.zeros(wrong.shape), wrong, valid)
    assert agreement.auroc == 0.5
    assert agreement.found == pytest.approx(0.1)
    curve = sparsification(np.zeros(wrong.shape), wrong, valid)
    assert curve.error == pytest.approx([curve.random] * 100)


def test_perfect_and_worst_uncertainty() -> None:
    wrong = np.zeros((10, 10), dtype=bool)
    wrong[0, :4] = True
    everywhere = np.ones_like(wrong)
    perfect, worst = error_agreement(wrong, wrong, everywhere), error_agreement(~wrong, wrong, everywhere)
    assert (perfect.auroc, perfect.found, worst.auroc, worst.found) == (1, 1, 0, 0)
    curve = sparsification(wrong, wrong, everywhere)
    assert curve.ause == 0
    assert curve.error[:6] == pytest.approx([4 / 100, 3 / 99, 2 / 98, 1 / 97, 0, 0])
    assert sparsification(~wrong, wrong, everywhere).error[-4:] == pytest.approx([1, 1, 1, 1])


@pytest.mark.parametrize("seed", range(3))
def test_sparsification_pixel_by_pixel(seed: int) -> None:
    values, wrong, valid = picture(seed, size=(20, 20))
    curve = sparsification(values, wrong, valid, steps=20)
    pixels = sorted(zip(-values[valid], wrong[valid], strict=True))
    count = len(pixels)
    assert curve.share.tolist() == [step / 20 for step in range(20)]
    for step in range(20):
        whole = step * count // 20
        part = step * count / 20 - whole  # a part of the next pixel is left out as well
        remaining = [error for _, error in pixels[whole:]]
        assert curve.error[step] == pytest.approx((sum(remaining) - part * remaining[0]) / (len(remaining) - part))
        left = wrong[valid].sum() - step * count / 20
        assert curve.oracle[step] == pytest.approx(max(left, 0) / (count - step * count / 20))
    assert curve.random == pytest.approx(wrong[valid].mean())
    assert curve.ause == pytest.approx(trapezoid(curve.error, curve.share) - trapezoid(curve.oracle, curve.share))
    assert curve.ause > 0


def test_what_is_not_valid_changes_nothing() -> None:
    values, wrong, valid = picture(1)
    otherwise = np.where(valid, values, math.nan)
    assert error_agreement(values, wrong, valid) == error_agreement(otherwise, wrong ^ ~valid, valid)
    assert (sparsification(values, wrong, valid).error == sparsification(otherwise, wrong ^ ~valid, valid).error).all()


def test_undefined() -> None:
    values, wrong, valid = picture(0)
    for failed, counted in ((wrong & False, valid), (wrong | True, valid), (wrong, valid & False)):
        agreement = error_agreement(values, failed, counted)
        assert math.isnan(agreement.auroc)
        assert math.isnan(agreement.found)
    assert (sparsification(values, wrong & False, valid).error == 0).all()
    assert np.isnan(sparsification(values, wrong, valid & False).error).all()


def test_mean_curve_counts_each_image_once() -> None:
    curves = [sparsification(*picture(seed, size=(8 + seed, 9))) for seed in range(4)]
    values, wrong, valid = picture(0)
    mean = Sparsification.mean([*curves, sparsification(values, wrong, valid & False)])
    assert mean.error == pytest.approx(np.mean([curve.error for curve in curves], axis=0))
    assert mean.oracle == pytest.approx(np.mean([curve.oracle for curve in curves], axis=0))
    assert mean.ause == pytest.approx(np.mean([curve.ause for curve in curves]))
    with pytest.raises(ValueError, match="no image"):
        Sparsification.mean([])


def test_arguments_that_do_not_fit() -> None:
    values, wrong, valid = picture(0)
    with pytest.raises(ValueError, match="alike in shape"):
        error_agreement(values[1:], wrong, valid)
    with pytest.raises(ValueError, match=r"\(H, W\)"):
        sparsification(values.ravel(), wrong.ravel(), valid.ravel())
    with pytest.raises(UserError, match="nan"):
        error_agreement(np.where(wrong, math.nan, values), wrong, valid)
