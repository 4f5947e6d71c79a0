import json
import math

import numpy as np
import pytest
from sklearn import metrics as sk

from lit_defect.errors import UserError
from lit_defect.metrics.anomaly import evaluate_scores, threshold_for_overkill
from lit_defect.metrics.intervals import auroc_delong, wilson, wilson_clustered


def scored(seed: int = 0, n: int = 150, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    defect = rng.random(n) < 0.3
    scores = 40 * rng.normal(size=n) + 60 * defect
    return (np.round(scores, -1) if ties else scores), defect


# evaluate_scores


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_figures_are_scikit_learns(seed: int, ties: bool) -> None:
    scores, defect = scored(seed, ties=ties)
    figures = evaluate_scores(scores, defect, resamples=0)
    assert figures["auroc"]["value"] == pytest.approx(sk.roc_auc_score(defect, scores))
    assert figures["average_precision"]["value"] == pytest.approx(sk.average_precision_score(defect, scores))
    by_threshold = {t: sk.f1_score(defect, scores >= t) for t in np.unique(scores)}
    assert figures["f1_max"]["value"] == pytest.approx(max(by_threshold.values()))
    assert by_threshold[figures["f1_max"]["score"]] == pytest.approx(max(by_threshold.values()))


def test_rates_at_the_threshold() -> None:
    scores, defect = [3.0, 5.0, 5.0, 7.0, 1.0, 5.0], [1, 1, 1, 1, 0, 0]
    figures = evaluate_scores(scores, defect, threshold=5.0, resamples=0)
    assert figures["escape_rate"] == wilson(1, 4).as_dict()
    assert figures["overkill_rate"] == wilson(1, 2).as_dict()
    assert (figures["threshold"], figures["counts"]) == (5.0, {"good": 2, "defective": 4})


def test_groups_count_parts() -> None:
    scores, defect = scored()
    part = np.arange(len(scores)) // 3
    plain, grouped = (evaluate_scores(scores, defect, threshold=30.0, groups=g, resamples=200) for g in (None, part))
    assert (plain["n_groups"], grouped["n_groups"]) == (None, 50)
    assert grouped["auroc"] == auroc_delong(defect, scores, groups=part).as_dict()
    assert grouped["escape_rate"] == wilson_clustered(scores[defect] < 30, part[defect]).as_dict()
    assert grouped["average_precision"] != plain["average_precision"]
    assert grouped["average_precision"]["value"] == plain["average_precision"]["value"]


def test_each_type_against_all_good_samples() -> None:
    scores, defect = scored()
    kind = np.where(defect, np.where(np.arange(len(scores)) % 2, "crack", "hole"), "good")
    part = np.arange(len(scores)) // 2
    figures = evaluate_scores(scores, defect, defect_types=kind, groups=part, resamples=0)["auroc_by_type"]
    assert figures.keys() == {"crack", "hole"}
    for name, interval in figures.items():
        chosen = ~defect | (kind == name)
        assert interval == auroc_delong(defect[chosen], scores[chosen], groups=part[chosen]).as_dict()
        assert interval["value"] == pytest.approx(sk.roc_auc_score(defect[chosen], scores[chosen]))
    assert evaluate_scores(scores, defect, resamples=0)["auroc_by_type"] == {}


def test_average_precision_has_limits_that_a_seed_repeats() -> None:
    scores, defect = scored()
    interval = evaluate_scores(scores, defect, seed=3)["average_precision"]
    assert interval["low"] < interval["value"] < interval["high"]
    assert evaluate_scores(scores, defect, seed=3)["average_precision"] == interval
    assert evaluate_scores(scores, defect, seed=4)["average_precision"]["low"] != interval["low"]


@pytest.mark.parametrize("truth", [[], [0, 0, 0], [1, 1, 1]], ids=["none", "good", "defective"])
def test_what_is_not_defined_says_why_and_is_json(truth: list[int]) -> None:
    figures = evaluate_scores([0.1, 0.2, 0.3][: len(truth)], truth, threshold=0.2)
    for name in ("auroc", "average_precision", "f1_max"):
        assert figures[name]["value"] is None
        assert figures[name]["reason"]
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


@pytest.mark.parametrize("threshold", [None, math.nan])
def test_without_threshold_there_are_no_rates(threshold: float | None) -> None:
    figures = evaluate_scores(*scored(), threshold=threshold, resamples=0)
    assert figures["threshold"] is None
    assert figures["escape_rate"] == figures["overkill_rate"]
    assert figures["escape_rate"] == {"value": None, "low": None, "high": None, "reason": "no threshold"}


def test_infinite_scores_are_ranked_and_stay_json() -> None:
    figures = evaluate_scores([math.inf, 1.0, -math.inf, 0.0], [1, 1, 0, 0], threshold=0.5)
    assert figures["auroc"]["value"] == figures["f1_max"]["value"] == 1
    assert evaluate_scores([math.inf, 0.0], [1, 0])["f1_max"] == {"value": 1.0, "score": None}
    json.dumps(figures, allow_nan=False)


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match="scores contain nan"):
        evaluate_scores([0.0, math.nan], [0, 1])
    for scores, truth in (([0.0, 1.0], [0, 1, 1]), ([[0.0, 1.0]], [[0, 1]])):
        with pytest.raises(ValueError, match=r"\(n,\)"):
            evaluate_scores(scores, truth)
    with pytest.raises(ValueError, match="defect type"):
        evaluate_scores([0.0, 1.0], [0, 1], defect_types=["a"])


# threshold_for_overkill


@pytest.mark.parametrize("single", [False, True], ids=["float64", "float32"])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("allowed", [0.0, 0.01, 0.05, 0.29, 0.5, 0.999])
def test_the_threshold_is_the_smallest_that_keeps_the_promise(allowed: float, ties: bool, single: bool) -> None:
    scores = scored(1, n=100, ties=ties)[0].astype(np.float32 if single else np.float64)
    threshold = threshold_for_overkill(scores, allowed)
    assert (scores >= threshold).mean() <= allowed
    below = np.nextafter(np.float32(threshold), np.float32(-np.inf))
    assert (scores >= below).mean() > allowed or not (scores == below).any()
    # No smaller score that occurs would do.
    assert all((scores >= s).mean() > allowed for s in scores[scores < threshold])


def test_precision_does_not_change_the_decision() -> None:
    scores = np.array([0.1, 0.7, 12.3, 12.3, 45.6])
    threshold = threshold_for_overkill(scores, 0.2)
    assert threshold == np.float32(threshold)
    for number in (np.float32, np.float64):
        assert (scores.astype(number) >= number(threshold)).tolist() == [False, False, False, False, True]


def test_shares_are_not_lost_to_rounding() -> None:
    scores = np.arange(100.0)
    assert 0.29 * 100 < 29
    assert (scores >= threshold_for_overkill(scores, 0.29)).sum() == 29


def test_no_good_sample_no_threshold() -> None:
    assert math.isnan(threshold_for_overkill([], 0.05))


def test_thresholds_that_cannot_be() -> None:
    for allowed in (-0.1, 1.0, math.nan):
        with pytest.raises(UserError, match="allowed overkill"):
            threshold_for_overkill([1.0, 2.0], allowed)
    for bad in (math.nan, math.inf):
        with pytest.raises(UserError, match="nan or infinity"):
            threshold_for_overkill([1.0, bad], 0.05)
    with pytest.raises(ValueError, match=r"\(n,\)"):
        threshold_for_overkill([[1.0, 2.0]], 0.05)
