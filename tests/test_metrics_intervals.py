import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, balanced_accuracy_score, f1_score, roc_auc_score

from lit_defect.metrics import weighted
from lit_defect.metrics.bootstrap import (
    basic_limits,
    bootstrap,
    bootstrap_all,
    logit_limits,
    paired_bootstrap,
    percentile_limits,
    resamples,
)
from lit_defect.metrics.intervals import (
    Interval,
    auroc_delong,
    mcnemar,
    mean_of_independent,
    t_interval,
    wilson,
    wilson_clustered,
)


def scores_of(seed: int, n: int = 60, decimals: int = 8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = np.arange(n) % 3 == 0
    return truth, np.round(rng.normal(size=n) + truth, decimals)


# Wilson


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (577, 656)])
def test_wilson_is_scipys(k: int, n: int) -> None:
    expected = stats.binomtest(k, n).proportion_ci(method="wilson")
    ours = wilson(k, n)
    assert (ours.low, ours.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert (ours.value, ours.k, ours.n) == (k / n, k, n)


def test_wilson_without_samples_says_so() -> None:
    assert math.isnan(wilson(0, 0).value)
    assert wilson(0, 0).as_dict() == {
        "value": None, "low": None, "high": None, "k": 0, "n": 0, "reason": "no samples",
    }  # fmt: skip


def test_wilson_refuses_more_hits_than_trials() -> None:
    with pytest.raises(ValueError, match="k=5, n=4"):
        wilson(5, 4)


def test_clustered_wilson_by_hand() -> None:
    # Groups of 2 with 2, 1, 1, 0 hits: p = 1/2, residuals 1, 0, 0, -1, var = 4/3 * 2 / 64 = 1/24,
    # effective n = (1/4) / (1/24) = 6, t on 3 degrees of freedom.
    hits, groups = [1, 1, 1, 0, 0, 1, 0, 0], list("aabbccdd")
    t = stats.t.ppf(0.975, 3)
    half = t * math.sqrt(0.25 / 6 + t * t / 144) / (1 + t * t / 6)
    ours = wilson_clustered(hits, groups)
    assert (ours.low, ours.high) == pytest.approx((0.5 - half, 0.5 + half))
    assert (ours.k, ours.n) == (4, 8)


def test_copies_of_a_picture_do_not_narrow_the_clustered_interval() -> None:
    hits = np.arange(40) < 30
    once = wilson_clustered(hits, np.arange(40))
    copied = wilson_clustered(np.repeat(hits, 6), np.repeat(np.arange(40), 6))
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high))
    assert once.high - once.low > wilson(30, 40).high - wilson(30, 40).low  # Student's t, not the normal
    assert wilson(180, 240).high < copied.high


def test_clustered_interval_has_a_width_when_all_are_right() -> None:
    perfect = wilson_clustered(np.ones(60, dtype=bool), np.repeat(np.arange(10), 6))
    t2 = stats.t.ppf(0.975, 9) ** 2
    assert (perfect.low, perfect.high) == pytest.approx((1 / (1 + t2 / 10), 1.0))  # Wilson of 10 in 10


def test_one_group_has_no_spread() -> None:
    alone = wilson_clustered([True, False], ["a", "a"])
    assert (alone.value, alone.reason) == (0.5, "one group only")
    assert math.isnan(alone.low)


# AUROC


def delong_variance_by_pairs(truth: np.ndarray, score: np.ndarray) -> float:
    """DeLong et al. 1988 as written: kernel matrix psi(X_i, Y_j), its row and column means."""
    x, y = score[truth], score[~truth]
    psi = (x[:, None] > y) + 0.5 * (x[:, None] == y)
    return float(psi.mean(1).var(ddof=1) / len(x) + psi.mean(0).var(ddof=1) / len(y))


@pytest.mark.parametrize("decimals", [8, 0])  # 0: many ties
def test_delong_from_its_kernel(decimals: int) -> None:
    truth, score = scores_of(0, decimals=decimals)
    area = roc_auc_score(truth, score)
    half = stats.norm.ppf(0.975) * math.sqrt(delong_variance_by_pairs(truth, score)) / (area * (1 - area))
    ours = auroc_delong(truth, score)
    logits = [math.log(v / (1 - v)) for v in (ours.value, ours.low, ours.high)]
    centre = math.log(area / (1 - area))
    assert logits == pytest.approx([centre, centre - half, centre + half])


def test_grouped_delong_is_delong_when_each_sample_is_its_own_group() -> None:
    truth, score = scores_of(1, n=2000)
    alone, grouped = auroc_delong(truth, score), auroc_delong(truth, score, groups=np.arange(2000))
    assert (grouped.low, grouped.high) == pytest.approx((alone.low, alone.high), abs=1e-4)


def test_grouped_delong_is_not_fooled_by_copies() -> None:
    truth, score = scores_of(2, n=120)
    once = auroc_delong(truth, score, groups=np.arange(120))
    copied = auroc_delong(np.repeat(truth, 6), np.repeat(score, 6), groups=np.repeat(np.arange(120), 6))
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high))
    narrow = auroc_delong(np.repeat(truth, 6), np.repeat(score, 6))
    assert narrow.high - narrow.low < 0.5 * (once.high - once.low)


def test_perfect_separation_keeps_a_width() -> None:
    perfect = auroc_delong([1] * 8 + [0] * 30, [2.0] * 8 + [1.0] * 30)
    assert perfect.value == perfect.high == 1
    assert perfect.low == pytest.approx(wilson(8, 8).low)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(3)
    true_area = stats.norm.cdf(1.5 / math.sqrt(2))
    covered = 0
    for _ in range(400):
        truth = np.arange(80) < 25
        interval = auroc_delong(truth, rng.normal(size=80) + 1.5 * truth)
        covered += interval.low <= true_area <= interval.high
    assert 0.92 <= covered / 400 <= 0.98  # 0.95 with 3 standard errors


def test_grouped_intervals_cover_the_truth_where_the_plain_ones_do_not() -> None:
    # 40 parts, each photographed 6 times; what the part adds is shared by its photographs.
    rng = np.random.default_rng(11)
    part = np.repeat(np.arange(40), 6)
    truth = part % 2 == 0
    true_rate, true_area = 0.8, stats.norm.cdf(1.5 / math.sqrt(2 * 1.5))
    covered = dict.fromkeys(("rate", "plain rate", "area", "plain area"), 0)
    for _ in range(300):
        hits = rng.random(240) < rng.beta(1.6, 0.4, 40)[part]  # correlation 1 / 3 within a part
        score = 1.5 * truth + rng.normal(size=40)[part] + rng.normal(size=240) * math.sqrt(0.5)
        for name, interval, true in (
            ("rate", wilson_clustered(hits, part), true_rate),
            ("plain rate", wilson(int(hits.sum()), 240), true_rate),
            ("area", auroc_delong(truth, score, groups=part), true_area),
            ("plain area", auroc_delong(truth, score), true_area),
        ):
            covered[name] += interval.low <= true <= interval.high
    assert 0.91 <= covered["rate"] / 300 <= 0.985
    assert 0.91 <= covered["area"] / 300 <= 0.985
    assert covered["plain rate"] / 300 < 0.85
    assert covered["plain area"] / 300 < 0.85


@pytest.mark.parametrize(
    ("truth", "reason"),
    [([1, 1, 1], "one class only"), ([], "no samples"), ([1, 0, 0], "one sample only in a class")],
)
def test_undefined_auroc_says_why(truth: list[int], reason: str) -> None:
    interval = auroc_delong(truth, np.arange(len(truth)))
    assert interval.reason == reason
    assert math.isnan(interval.low)


# Bootstrap


def repeat_by(weights: np.ndarray, *arrays: np.ndarray) -> list[np.ndarray]:
    return [np.repeat(array, weights.astype(int)) for array in arrays]


@pytest.mark.parametrize("decimals", [8, 0])
def test_weighted_curves_are_those_of_the_resample(decimals: int) -> None:
    truth, score = scores_of(4, decimals=decimals)
    weights = next(resamples(60, n=20))
    areas = weighted.auroc(weights, truth, score)
    precisions = weighted.average_precision(weights, truth, score)
    for row, area, precision in zip(weights, areas, precisions, strict=True):
        drawn = repeat_by(row, truth, score)
        assert area == pytest.approx(roc_auc_score(*drawn))
        assert precision == pytest.approx(average_precision_score(*drawn))


def test_weighted_class_metrics_are_those_of_the_resample() -> None:
    rng = np.random.default_rng(5)
    truth, predicted = rng.integers(0, 4, 30), rng.integers(0, 4, 30)
    weights = next(resamples(30, n=20))
    f1 = weighted.macro_f1(weights, truth, predicted, 4)
    balanced = weighted.balanced_accuracy(weights, truth, predicted, 4)
    for row, ours, recall in zip(weights, f1, balanced, strict=True):
        drawn = repeat_by(row, truth, predicted)
        assert ours == pytest.approx(f1_score(*drawn, average="macro"))
        if set(drawn[1]) <= set(drawn[0]):
            assert recall == pytest.approx(balanced_accuracy_score(*drawn))


def test_weighted_curves_are_nan_without_one_class() -> None:
    weights = np.array([[1.0, 0, 1], [0, 1, 0]])
    truth, score = np.array([True, False, True]), np.array([0.3, 0.2, 0.1])
    assert np.isnan(weighted.auroc(weights, truth, score)).all()
    assert np.isnan(weighted.average_precision(weights, truth, score)).all()


def test_bootstrap_of_the_mean_is_the_normal_interval() -> None:
    x = np.random.default_rng(6).normal(size=400)
    ours = bootstrap(weighted.mean, [x], n=8000)
    half = 1.96 * x.std() / 20
    assert ours.value == pytest.approx(x.mean())
    assert (ours.low, ours.high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.06 * half)


def test_bootstrap_draws_whole_groups() -> None:
    groups = np.repeat(np.arange(5), [1, 2, 3, 4, 5])
    for row in next(resamples(15, groups=groups, n=50)):
        per_group = [set(row[groups == g]) for g in range(5)]
        assert all(len(values) == 1 for values in per_group)
        assert sum(values.pop() for values in per_group) == 5


def test_bootstrap_keeps_strata() -> None:
    strata = np.array(["good"] * 7 + ["bad"] * 3)
    weights = next(resamples(10, strata=strata, n=50))
    assert (weights[:, :7].sum(1) == 7).all()
    assert (weights[:, 7:].sum(1) == 3).all()


def test_strata_that_cut_a_group_are_refused() -> None:
    with pytest.raises(ValueError, match="several strata"):
        next(resamples(4, groups=[0, 0, 1, 1], strata=[0, 1, 0, 1]))


def test_bootstrap_repeats_with_its_seed_and_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(7).normal(size=50)
    first = bootstrap(weighted.mean, [x], n=300, seed=1)
    assert bootstrap(weighted.mean, [x], n=300, seed=1) == first
    assert bootstrap(weighted.mean, [x], n=300, seed=2) != first
    monkeypatch.setattr("lit_defect.metrics.bootstrap._BLOCK", 50 * 7)
    assert sum(len(block) for block in resamples(50, n=300)) == 300


def test_logit_limits_agree_with_delong_on_the_auroc() -> None:
    truth, score = scores_of(9, n=300)
    delong = auroc_delong(truth, score)
    ours = bootstrap(weighted.auroc, [truth, score], limits=logit_limits)
    assert (ours.low, ours.high) == pytest.approx((delong.low, delong.high), abs=0.004)


def test_limits_of_average_precision_cover_it() -> None:
    rng = np.random.default_rng(10)
    big_truth = rng.random(200_000) < 0.2
    true_value = average_precision_score(big_truth, rng.normal(size=200_000) + 2.2 * big_truth)
    covered = {logit_limits: 0, percentile_limits: 0}
    for i in range(200):
        truth = rng.random(60) < 0.2
        score = rng.normal(size=60) + 2.2 * truth
        for limits in covered:
            interval = bootstrap(weighted.average_precision, [truth, score], limits=limits, n=200, seed=i)
            covered[limits] += interval.low <= true_value <= interval.high
    assert covered[logit_limits] >= 0.9 * 200
    assert covered[logit_limits] > covered[percentile_limits]


def test_basic_limits_reflect_and_hold_the_value() -> None:
    drawn = np.linspace(0.2, 0.3, 1001)
    low, high = basic_limits(0.2, drawn, 0.9)
    assert low == pytest.approx(0.4 - 0.295)
    assert high == 0.2  # the reflected 0.195 lies below the value
    assert basic_limits(0.1, drawn, 0.9)[0] == 0


def test_undefined_bootstraps_say_why() -> None:
    def undefined(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
        return np.full(len(weights), np.nan)

    statistics = {"nan": (undefined, percentile_limits), "mean": (weighted.mean, percentile_limits)}
    figures = bootstrap_all(statistics, [np.ones(4)], n=20)
    assert figures["nan"].reason == "not defined on these samples"
    assert (figures["mean"].value, figures["mean"].reason) == (1.0, "the same on every resample")
    assert bootstrap(weighted.mean, [np.empty(0)]).reason == "no samples"
    assert bootstrap(weighted.mean, [np.arange(3.0)], n=0).reason == "not resampled"


def test_paired_bootstrap_cancels_what_is_shared() -> None:
    rng = np.random.default_rng(8)
    hard = rng.normal(size=200)
    a, b = hard + 0.05 * rng.normal(size=200), hard + 0.05 + 0.05 * rng.normal(size=200)
    difference = paired_bootstrap(weighted.mean, [a], [b])
    assert difference.value == pytest.approx((b - a).mean())
    assert difference.low > 0  # found, although each mean alone is known only to +- 0.14
    swapped = paired_bootstrap(weighted.mean, [b], [a])
    assert (swapped.low, swapped.high) == pytest.approx((-difference.high, -difference.low))


def test_arrays_must_have_one_length() -> None:
    with pytest.raises(ValueError, match="differ in length"):
        bootstrap(weighted.mean, [np.ones(3), np.ones(4)])


# Tests and means


def test_mcnemar_is_the_binomial_test() -> None:
    a = np.array([1] * 50 + [1] * 3 + [0] * 12 + [0] * 5)
    b = np.array([1] * 50 + [0] * 3 + [1] * 12 + [0] * 5)
    ours = mcnemar(a, b)
    assert (ours.only_a, ours.only_b) == (3, 12)
    assert ours.p_value == pytest.approx(stats.binomtest(3, 15).pvalue)
    assert mcnemar(a, a).p_value == 1


def test_t_interval_is_scipys() -> None:
    x = [0.91, 0.89, 0.93, 0.90, 0.92]
    expected = stats.ttest_1samp(x, 0).confidence_interval()
    ours = t_interval(x)
    assert (ours.low, ours.high) == pytest.approx((expected.low, expected.high))
    assert t_interval([0.9]).reason == "one run only"
    for same in ([0.9, 0.9, 0.9], [0.0, 0.0], [0.75 - 0.7, 0.8 - 0.75]):  # the last but for rounding
        assert t_interval(same).reason == "the same in every run"
        assert math.isnan(t_interval(same).low + t_interval(same).high)
    assert math.isnan(t_interval([]).value)


def test_mean_of_independent_by_hand() -> None:
    mean = mean_of_independent([Interval(0.8, 0.7, 0.85), Interval(0.6, 0.5, 0.72)])
    assert mean.value == pytest.approx(0.7)
    assert mean.low == pytest.approx(0.7 - math.hypot(0.1, 0.1) / 2)
    assert mean.high == pytest.approx(0.7 + math.hypot(0.05, 0.12) / 2)
