import json
import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torchmetrics.functional.classification import multiclass_calibration_error

from lit_defect.errors import UserError
from lit_defect.metrics.bootstrap import resamples
from lit_defect.metrics.calibration import fit_temperature, reliability, weighted_ece
from lit_defect.metrics.classification import defect_score, evaluate, threshold_for_recall
from lit_defect.metrics.intervals import wilson

NAMES = ["good", "crack", "fray", "uneven"]
INTERVALS = (
    "accuracy", "balanced_accuracy", "auroc", "average_precision", "f1", "escape_rate", "overkill_rate",
    "ece", "brier", "nll",
)  # fmt: skip


def predictions(classes: int, n: int = 120, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, n, p=[0.5] + [0.5 / (classes - 1)] * (classes - 1))
    logits = rng.normal(size=(n, classes))
    logits[np.arange(n), labels] += 1.2
    probs = np.exp(logits)
    return probs / probs.sum(1, keepdims=True), labels


# evaluate, against scikit-learn


@pytest.mark.parametrize("normal", [0, 1])
def test_binary_figures_are_scikit_learns(normal: int) -> None:
    p, y = predictions(2)
    defective, score, claimed = y != normal, p[:, 1 - normal], p.argmax(1) != normal
    expected = {
        "accuracy": sk.accuracy_score(y, p.argmax(1)),
        "balanced_accuracy": sk.balanced_accuracy_score(y, p.argmax(1)),
        "auroc": sk.roc_auc_score(defective, score),
        "average_precision": sk.average_precision_score(defective, score),
        "f1": sk.f1_score(defective, claimed),
        "brier": sk.brier_score_loss(defective, score),
        "nll": sk.log_loss(y, p),
    }
    figures = evaluate(p, y, NAMES[:2], normal_class=normal)
    assert {name: figures[name]["value"] for name in expected} == pytest.approx(expected)


def test_multi_class_figures_are_scikit_learns() -> None:
    p, y = predictions(4)
    one_hot = np.eye(4)[y]
    expected = {
        "accuracy": sk.accuracy_score(y, p.argmax(1)),
        "balanced_accuracy": sk.balanced_accuracy_score(y, p.argmax(1)),
        "auroc": sk.roc_auc_score(y, p, multi_class="ovr"),
        "average_precision": sk.average_precision_score(one_hot, p, average="macro"),
        "f1": sk.f1_score(y, p.argmax(1), average="macro"),
        "brier": np.square(p - one_hot).sum(1).mean(),
        "nll": sk.log_loss(y, p),
        "defect_auroc": sk.roc_auc_score(y != 0, 1 - p[:, 0]),
        "defect_average_precision": sk.average_precision_score(y != 0, 1 - p[:, 0]),
    }
    figures = evaluate(p, y, NAMES, normal_class=0)
    assert {name: figures[name]["value"] for name in expected} == pytest.approx(expected)


def test_figures_per_class_are_scikit_learns() -> None:
    p, y = predictions(4)
    figures = evaluate(p, y, NAMES)
    recall, precision = (f(y, p.argmax(1), average=None) for f in (sk.recall_score, sk.precision_score))
    assert [figures["recall"][name]["value"] for name in NAMES] == pytest.approx(list(recall))
    assert [figures["precision"][name]["value"] for name in NAMES] == pytest.approx(list(precision))
    assert figures["confusion"] == sk.confusion_matrix(y, p.argmax(1)).tolist()
    assert figures["counts"] == dict(zip(NAMES, np.bincount(y).tolist(), strict=True))


def test_every_figure_lies_in_its_interval_and_in_json() -> None:
    p, y = predictions(4, n=300)
    figures = json.loads(json.dumps(evaluate(p, y, NAMES, normal_class=0, threshold=0.4), allow_nan=False))
    for name in (*INTERVALS, "defect_auroc", "defect_average_precision"):
        assert figures[name]["low"] < figures[name]["value"] < figures[name]["high"], name
    recall = figures["recall"]["crack"]
    assert recall == wilson(recall["k"], recall["n"]).as_dict()


def test_factory_rates_by_hand() -> None:
    score = np.array([0.1, 0.4, 0.6, 0.4, 0.3, 0.9])
    truth = np.array([0, 0, 0, 1, 1, 1])
    figures = evaluate(np.stack([1 - score, score], 1), truth, NAMES[:2], normal_class=0, threshold=0.4)
    # a part at the threshold is rejected: of the defects 0.3 passes, of the good 0.4 and 0.6 go
    assert (figures["escape_rate"]["k"], figures["escape_rate"]["n"]) == (1, 3)
    assert (figures["overkill_rate"]["k"], figures["overkill_rate"]["n"]) == (2, 3)


@pytest.mark.parametrize("threshold", [None, math.nan])
def test_without_a_threshold_the_rates_say_so(threshold: float | None) -> None:
    p, y = predictions(2)
    figures = evaluate(p, y, NAMES[:2], normal_class=0, threshold=threshold)
    assert figures["escape_rate"] == {"value": None, "low": None, "high": None, "reason": "no threshold"}
    assert figures["threshold"] is None


def test_groups_widen_the_intervals() -> None:
    p, y = predictions(2, n=100)
    p6, y6, part = np.repeat(p, 6, axis=0), np.repeat(y, 6), np.repeat(np.arange(100), 6)
    naive = evaluate(p6, y6, NAMES[:2], normal_class=0, threshold=0.5)
    honest = evaluate(p6, y6, NAMES[:2], normal_class=0, threshold=0.5, groups=part)
    assert honest["n_groups"] == 100
    for name in INTERVALS:
        assert honest[name]["value"] == naive[name]["value"]
        widths = [figures[name]["high"] - figures[name]["low"] for figures in (naive, honest)]
        assert widths[1] > 1.3 * widths[0], name  # sqrt(6) = 2.4 but for the ECE, whose limit is cut at 0


def test_f1_interval_agrees_with_the_bootstrap() -> None:
    p, y = predictions(2, n=400)
    ours = evaluate(p, y, NAMES[:2], normal_class=0)["f1"]
    drawn = []
    for row in next(resamples(400, n=2000)).astype(int):
        truth, claimed = np.repeat(y, row), np.repeat(p.argmax(1), row)
        drawn.append(2 * (truth & claimed).sum() / (truth.sum() + claimed.sum()))
    assert [ours["low"], ours["high"]] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.01)


def test_same_seed_same_intervals() -> None:
    p, y = predictions(2)
    first = evaluate(p, y, NAMES[:2], seed=3)
    assert evaluate(p, y, NAMES[:2], seed=3) == first
    assert evaluate(p, y, NAMES[:2], seed=4)["nll"] != first["nll"]


def test_without_resamples_the_values_stay() -> None:
    p, y = predictions(4)
    quick, full = evaluate(p, y, NAMES, resamples=0), evaluate(p, y, NAMES)
    assert [quick[name]["value"] for name in INTERVALS] == [full[name]["value"] for name in INTERVALS]
    assert quick["f1"]["reason"] == "not resampled"


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("grouped", [False, True])
def test_one_class_or_nothing_is_no_crash(classes: int, n: int, grouped: bool) -> None:
    p = np.tile(np.eye(classes)[0], (n, 1))
    groups = ["part"] * n if grouped else None
    figures = evaluate(p, np.zeros(n, int), NAMES[:classes], normal_class=0, threshold=0.5, groups=groups, resamples=50)
    json.dumps(figures, allow_nan=False)
    assert figures["n"] == n
    assert figures["auroc"]["value"] is None
    assert figures["auroc"]["reason"]
    assert figures["recall"]["crack"]["reason"] == "no samples"


def test_confident_scores_keep_their_ranking() -> None:
    tiny = np.array([1e-20, 1e-19, 1e-18, 1e-17])  # 1 - P(normal) would be 0 for all
    p = np.stack([1 - tiny, tiny], axis=1)
    assert (np.diff(defect_score(p, 0)) > 0).all()
    assert evaluate(p, [0, 0, 1, 1], NAMES[:2], normal_class=0)["auroc"]["value"] == 1


@pytest.mark.parametrize(
    ("probs", "labels", "error", "words"),
    [
        ([[0.5, 0.5]], [0, 1], ValueError, "labels"),
        ([[0.5, 0.3, 0.2]], [0], ValueError, r"\(n, 2\)"),
        ([[0.5, 0.5]], [2], ValueError, "from 0 to 1"),
        ([[0.5, 0.5]], [-1], ValueError, "from 0 to 1"),
        ([[0.5, 0.5]], [0.0], ValueError, "integers"),
        ([[3.0, -1.0]], [0], ValueError, "softmax"),
        ([[math.nan, 0.5]], [0], UserError, "diverged"),
    ],
)
def test_bad_input_is_refused(probs: object, labels: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        evaluate(np.array(probs), np.array(labels), NAMES[:2])


# threshold_for_recall


@pytest.mark.parametrize("required", [0.05, 0.5, 0.9, 0.95, 1.0])
def test_threshold_is_the_largest_that_suffices(required: float) -> None:
    rng = np.random.default_rng(1)
    scores, defect = np.round(rng.random(200), 2), rng.random(200) < 0.3  # with ties
    threshold = threshold_for_recall(scores, defect, required)
    assert (scores[defect] >= threshold).mean() >= required
    assert (scores[defect] >= np.nextafter(threshold, 2)).mean() < required


def test_threshold_is_not_moved_by_rounding() -> None:
    # 0.07 * 100 = 7.000000000000001: seven defects of a hundred suffice all the same
    scores = np.arange(100, 0, -1)
    assert threshold_for_recall(scores, np.ones(100, bool), 0.07) == 94


def test_threshold_without_defects_is_nan() -> None:
    assert math.isnan(threshold_for_recall([0.1, 0.2], [False, False], 0.95))


@pytest.mark.parametrize("required", [0.0, 1.01, -1.0, math.nan])
def test_impossible_recall_is_refused(required: float) -> None:
    with pytest.raises(UserError, match="required_recall"):
        threshold_for_recall([0.1], [True], required)


# Calibration


@pytest.mark.parametrize("classes", [2, 4])
def test_ece_is_torchmetrics(classes: int) -> None:
    p, y = predictions(classes, n=500)
    expected = multiclass_calibration_error(torch.tensor(p), torch.tensor(y), classes, n_bins=15)
    assert reliability(p, y).ece == pytest.approx(expected.item(), abs=1e-6)
    assert evaluate(p, y, NAMES[:classes])["ece"]["value"] == pytest.approx(expected.item(), abs=1e-6)


def test_reliability_by_hand() -> None:
    p = np.array([[0.6, 0.4], [0.45, 0.55], [0.0, 1.0], [1.0, 0.0]])
    bins = reliability(p, [0, 0, 1, 0], bins=5)  # 0.6 closes its bin (0.4, 0.6]
    assert bins.count.tolist() == [0, 0, 2, 0, 2]
    assert bins.confidence[[2, 4]] == pytest.approx([0.575, 1.0])
    assert bins.accuracy[[2, 4]] == pytest.approx([0.5, 1.0])
    assert math.isnan(bins.accuracy[0])
    assert bins.ece == pytest.approx(0.5 * 0.075)


def test_weighted_ece_is_that_of_the_resample() -> None:
    p, y = predictions(3, n=50)
    weights = next(resamples(50, n=10))
    ours = weighted_ece(weights, p.max(1), p.argmax(1) == y)
    drawn = [reliability(np.repeat(p, r, axis=0), np.repeat(y, r)).ece for r in weights.astype(int)]
    assert ours == pytest.approx(drawn)


@pytest.mark.parametrize("scale", [0.05, 1.0, 4.0])
def test_temperature_recovers_the_scale_of_the_logits(scale: float) -> None:
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(20_000, 3)) * 2
    cumulative = np.cumsum(np.exp(logits) / np.exp(logits).sum(1, keepdims=True), axis=1)
    labels = (rng.random((20_000, 1)) > cumulative).sum(1)
    temperature = fit_temperature(logits * scale, labels)
    assert temperature == pytest.approx(scale, rel=0.05)
    assert fit_temperature(logits * scale * 3, labels) == pytest.approx(3 * temperature, rel=1e-4)


def test_temperature_is_stationary_for_the_likelihood() -> None:
    p, y = predictions(4, n=300)
    logits = torch.tensor(np.log(p))
    inverse = torch.tensor(1 / fit_temperature(logits.numpy(), y), requires_grad=True)
    torch.nn.functional.cross_entropy(logits * inverse, torch.tensor(y)).backward()
    assert inverse.grad is not None
    assert abs(inverse.grad.item()) < 1e-6


@pytest.mark.parametrize(("logits", "labels"), [(np.zeros((0, 2)), []), (np.zeros(3), [0, 0, 0])])
def test_temperature_needs_samples(logits: np.ndarray, labels: list[int]) -> None:
    with pytest.raises(ValueError, match="logits"):
        fit_temperature(logits, labels)


def test_temperature_of_a_perfect_classifier_stays_finite() -> None:
    temperature = fit_temperature(np.eye(2) * 10, [0, 1])
    assert 0.0099 < temperature < 1
