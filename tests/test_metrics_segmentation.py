import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist
from skimage.morphology import diamond, erosion, footprint_rectangle
from sklearn.metrics import confusion_matrix
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from lit_defect.errors import UserError
from lit_defect.metrics.intervals import wilson, wilson_clustered
from lit_defect.metrics.segmentation import (
    VOID,
    MaskCounts,
    class_iou,
    compare_masks,
    confusion_of,
    count_masks,
    evaluate_masks,
    foreground_of,
    image_iou,
)

NAMES = {2: ["background", "scratch"], 4: ["background", "bird", "cat", "dog"]}


def blobs(
    seed: int, n: int = 6, size: tuple[int, int] = (30, 41), classes: int = 4, void: float = 0.05
) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and truth: smooth regions that agree in part, some images without some classes, specks of void."""
    rng = np.random.default_rng(seed)
    field = gaussian_filter(rng.normal(size=(n, classes, *size)), (0, 0, 3, 3))
    other = gaussian_filter(rng.normal(size=(n, classes, *size)), (0, 0, 2, 2))
    truth, prediction = field.argmax(1), (field + 0.3 * other).argmax(1)
    for image in range(n):
        truth[image][truth[image] == rng.integers(1, classes + 1)] = 0
        prediction[image][prediction[image] == rng.integers(1, classes + 1)] = 0
    truth[rng.random(truth.shape) < void] = VOID
    return prediction, truth


def binary(cells: list[str]) -> np.ndarray:
    """`.` background, `#` defect, `v` void."""
    return np.array([[{".": 0, "#": 1, "v": VOID}[cell] for cell in row] for row in cells])


def eroded(mask: np.ndarray, footprint: np.ndarray, margin: int) -> np.ndarray:
    return erosion(np.pad(mask, margin), footprint)[margin:-margin, margin:-margin]


def by_definition(prediction: np.ndarray, truth: np.ndarray, number: int, band: float) -> tuple[int, int, float]:
    """Intersection and union of the bands and the 95 % Hausdorff distance of one class, from scikit-image and cdist."""
    reach = max(1, round(band * math.sqrt(truth.shape[0] ** 2 + truth.shape[1] ** 2)))
    seen = truth != VOID
    masks = [(prediction == number) & seen, (truth == number) & seen]
    side = 2 * reach + 1
    first, second = (mask & ~eroded(mask, footprint_rectangle((side, side)), reach + 1) for mask in masks)
    outlines = [np.argwhere(mask & ~eroded(mask, diamond(1), 2)) for mask in masks]
    distance = math.nan
    if all(len(outline) for outline in outlines):
        between = cdist(*outlines)
        distance = max(np.percentile(between.min(0), 95), np.percentile(between.min(1), 95))
    return int((first & second).sum()), int((first | second).sum()), distance


def iou_by_sets(prediction: np.ndarray, truth: np.ndarray, number: int) -> float:
    claimed = {*zip(*np.nonzero((prediction == number) & (truth != VOID)), strict=True)}
    true = {*zip(*np.nonzero(truth == number), strict=True)}
    return len(claimed & true) / len(claimed | true) if true else math.nan


# Counting one image


@pytest.mark.parametrize("band", [0.02, 0.06, 0.2])
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_bands_and_distances_are_the_definitions(seed: int, classes: int, band: float) -> None:
    prediction, truth = blobs(seed, classes=classes)
    counts = count_masks(prediction, truth, classes, band=band)
    for image in range(len(truth)):
        for number in range(classes):
            intersection, union, distance = by_definition(prediction[image], truth[image], number, band)
            assert counts.boundary[image, number].tolist() == [intersection, union]
            assert counts.distance[image, number] == pytest.approx(distance, abs=1e-9, nan_ok=True)
    assert np.isfinite(counts.distance).any()
    assert np.isnan(counts.distance).any()


@pytest.mark.parametrize("seed", range(3))
def test_confusion_is_scikit_learns(seed: int) -> None:
    prediction, truth = blobs(seed)
    counts = count_masks(prediction, truth, 4)
    for image, (predicted, true) in enumerate(zip(prediction, truth, strict=True)):
        expected = confusion_matrix(true[true != VOID], predicted[true != VOID], labels=range(4))
        assert (counts.confusion[image] == expected).all()
    assert (confusion_of(prediction, truth, 4) == counts.confusion).all()


def test_a_worked_example() -> None:
    truth = binary([".....", ".###.", ".###.", ".###.", "....."])
    prediction = binary([".....", "..###", "..###", "..###", "....."])
    counts = count_masks(prediction[None], truth[None], 2)
    assert counts.confusion.tolist() == [[[13, 3], [3, 6]]]
    # each band is the ring of 8 around a centre; they share the two rows of 2 above and below, and nothing else
    assert counts.boundary[0, 1].tolist() == [4, 12]
    # 5 of 8 outline pixels lie on the other outline; the three of the outer column are 1 away: so is each centre
    assert counts.distance[0, 1] == 1
    assert image_iou(counts, [1]).tolist() == [6 / 12]


def test_hausdorff_takes_the_larger_direction_at_its_95th_percentile() -> None:
    truth = np.zeros((1, 1, 60), dtype=int)
    prediction = truth.copy()
    truth[0, 0, :21] = 1
    prediction[0, 0, :41] = 1  # 20 pixels too long: 0 for the first 21, then 1 .. 20
    distances = [0] * 21 + list(range(1, 21))
    counts = count_masks(prediction, truth, 2)
    assert counts.distance[0, 1] == np.percentile(distances, 95) == 18
    assert count_masks(truth, prediction, 2).distance[0, 1] == 18


def test_the_band_is_a_share_of_the_diagonal_and_at_least_one_pixel() -> None:
    truth = np.ones((1, 60, 80), dtype=int)  # diagonal 100; all of it, so that the band lies along the border
    for band, reach in [(0.0, 1), (0.001, 1), (0.02, 2), (0.1, 10)]:
        ring = 60 * 80 - (60 - 2 * reach) * (80 - 2 * reach)
        assert count_masks(truth, truth, 2, band=band).boundary[0, 1].tolist() == [ring, ring]


def test_what_is_said_of_void_changes_nothing() -> None:
    prediction, truth = blobs(5, void=0.3)
    otherwise = np.where(truth == VOID, (prediction + 1) % 4, prediction)
    one, two = count_masks(prediction, truth, 4), count_masks(otherwise, truth, 4)
    assert (one.confusion == two.confusion).all()
    assert (one.boundary == two.boundary).all()
    np.testing.assert_array_equal(one.distance, two.distance)


def test_a_right_prediction_is_perfect_also_beside_void() -> None:
    truth = binary(["........", ".vvvvvv.", ".v####v.", ".v####v.", ".vvvvvv.", "........"])
    counts = count_masks(np.where(truth == VOID, 1, truth)[None], truth[None], 2)
    assert counts.boundary[0, 1].tolist() == [8, 8]
    assert counts.distance[0, 1] == 0
    assert image_iou(counts, [1]).tolist() == [1]


def test_small_masks_and_missing_classes() -> None:
    dot, nothing = binary(["....", ".#..", "...."]), np.zeros((3, 4), dtype=int)
    void = np.full((3, 4), VOID)
    counts = count_masks([nothing, dot, dot, dot], [dot, nothing, dot, void], 2)
    assert counts.boundary[:, 1].tolist() == [[0, 1], [0, 1], [1, 1], [0, 0]]
    np.testing.assert_array_equal(counts.distance[:, 1], [math.nan, math.nan, 0, math.nan])
    np.testing.assert_array_equal(image_iou(counts, [1]), [0, math.nan, 1, math.nan])


def test_images_counted_apart_are_those_counted_together() -> None:
    prediction, truth = blobs(1)
    counts = count_masks(prediction, truth, 4)
    parts = [count_masks(prediction[rows], truth[rows], 4) for rows in (slice(0, 1), slice(1, 4), slice(4, 6))]
    joined = MaskCounts.join(parts)
    assert len(joined) == 6
    for part, expected in ((joined, counts), (counts.take([4, 1]), joined.take(np.arange(6)).take([4, 1]))):
        assert (part.confusion == expected.confusion).all()
        assert (part.boundary == expected.boundary).all()
        np.testing.assert_array_equal(part.distance, expected.distance)
    picked = counts.take(np.array([False, True, False, False, True, False]))
    assert (picked.confusion == counts.confusion[[1, 4]]).all()
    assert len(counts.take([])) == 0


def test_other_kinds_of_arrays() -> None:
    prediction, truth = blobs(2)
    expected = count_masks(prediction, truth, 4).confusion
    assert (count_masks(torch.from_numpy(prediction), truth.astype(np.uint8), 4).confusion == expected).all()
    ones = [np.where(part == 1, 1, 0) for part in (prediction, truth)]
    expected = count_masks(*ones, 2).confusion
    assert (count_masks(prediction == 1, truth == 1, 2).confusion == expected).all()


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda p, t: (p[0], t[0]), ValueError, r"\(N, H, W\)"),
        (lambda p, t: (p[:, 1:], t), ValueError, "alike in shape"),
        (lambda p, t: (p / 2, t), ValueError, "whole numbers"),
        (lambda p, t: (p + 1, t), ValueError, "predicted ids from 0 to 3, not .* to 4"),
        (lambda p, t: (p - 1, t), ValueError, "not -1 to"),
        (lambda p, t: (p, np.where(t == 2, 7, t)), UserError, "the value 7: expected class ids from 0 to 3, or 255"),
        (lambda p, t: (p, np.where(t == 2, -1, t)), UserError, "the value -1"),
    ],
)
def test_masks_that_do_not_fit(spoil: Callable, error: type[Exception], message: str) -> None:
    prediction, truth = spoil(*blobs(0))
    with pytest.raises(error, match=message):
        count_masks(prediction, truth, 4)


# IoU of one image


@pytest.mark.parametrize("seed", range(3))
def test_iou_is_that_of_the_sets_of_pixels(seed: int) -> None:
    prediction, truth = blobs(seed)
    counts = count_masks(prediction, truth, 4)
    expected = np.array([[iou_by_sets(p, t, c) for c in range(4)] for p, t in zip(prediction, truth, strict=True)])
    np.testing.assert_allclose(class_iou(counts.confusion), expected, atol=1e-12)
    np.testing.assert_allclose(image_iou(counts, range(4)), np.nanmean(expected, axis=1), atol=1e-12)
    np.testing.assert_allclose(image_iou(counts, [1, 3]), np.nanmean(expected[:, [1, 3]], axis=1), atol=1e-12)
    assert np.isnan(expected).any()


def test_foreground() -> None:
    assert foreground_of(NAMES[2]) == [1]
    assert foreground_of(NAMES[4]) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="two classes"):
        foreground_of(["background"])


# Figures of one method


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("seed", range(2))
def test_pooled_figures_are_torchmetrics(seed: int, classes: int) -> None:
    prediction, truth = (torch.from_numpy(part) for part in blobs(seed, classes=classes))
    figures = evaluate_masks(count_masks(prediction, truth, classes), NAMES[classes], resamples=50)
    for average in ("macro", "none"):
        metric = MulticlassJaccardIndex(classes, average=average, ignore_index=VOID)
        expected = metric(prediction, truth).tolist()
        if average == "macro":
            assert figures["pooled_iou"]["value"] == pytest.approx(expected, abs=1e-6)
        else:
            assert list(figures["pooled_iou_by_class"].values()) == pytest.approx(expected, abs=1e-6)
    accuracy = MulticlassAccuracy(classes, average="micro", ignore_index=VOID)(prediction, truth).item()
    assert figures["pixel_accuracy"]["value"] == pytest.approx(accuracy, abs=1e-6)


@pytest.mark.parametrize("classes", [2, 4])
def test_averaged_figures_from_the_pixels(classes: int) -> None:
    prediction, truth = blobs(7, n=8, classes=classes)
    figures = evaluate_masks(count_masks(prediction, truth, classes), NAMES[classes], resamples=50)
    foreground = [1] if classes == 2 else range(classes)
    iou, dice, bands, distances, missed = [], [], [], [], 0
    for p, t in zip(prediction, truth, strict=True):
        here = [c for c in foreground if (t == c).any()]
        if not here:
            continue
        shapes = [by_definition(p, t, c, 0.02) for c in here]
        known = [shape[2] for shape in shapes if math.isfinite(shape[2])]
        ious = [iou_by_sets(p, t, c) for c in here]
        iou.append(np.mean(ious))
        dice.append(np.mean([2 * value / (1 + value) for value in ious]))
        bands.append(np.mean([shape[0] / shape[1] for shape in shapes]))
        distances += [np.mean(known)] if known else []
        missed += len(here) - len(known)
    for name, values in {"iou": iou, "dice": dice, "boundary_iou": bands, "hd95": distances}.items():
        assert figures[name]["value"] == pytest.approx(np.mean(values), abs=1e-9)
        assert figures[name]["low"] < figures[name]["value"] < figures[name]["high"]
    assert (figures["n"], figures["n_defined"]) == (8, len(iou))
    assert (figures["hd95"]["n"], figures["hd95"]["undefined"]) == (len(distances), missed)
    assert list(figures["iou_by_class"]) == [NAMES[classes][c] for c in foreground]
    for c in foreground:
        by_class = [iou_by_sets(p, t, c) for p, t in zip(prediction, truth, strict=True)]
        entry = figures["iou_by_class"][NAMES[classes][c]]
        assert entry["value"] == pytest.approx(np.nanmean(by_class), abs=1e-9)
        assert entry["n"] == np.isfinite(by_class).sum()


def test_the_interval_is_scipys_bootstrap() -> None:
    prediction, truth = blobs(3, n=40, size=(16, 16), void=0)
    counts = count_masks(prediction, truth, 4)
    interval = evaluate_masks(counts, NAMES[4], resamples=9999)["iou"]
    values = image_iou(counts, range(4))
    expected = stats.bootstrap((values,), np.mean, method="percentile", rng=1).confidence_interval
    assert [interval["low"], interval["high"]] == pytest.approx(list(expected), abs=0.003)
    assert expected.high - expected.low > 0.03


def test_copies_of_an_image_in_one_group_add_no_certainty() -> None:
    prediction, truth = blobs(4, n=10, size=(16, 16))
    counts, better = count_masks(prediction, truth, 4), count_masks(np.where(truth == 2, 2, prediction), truth, 4)
    rows = np.repeat(np.arange(10), 3)
    kinds = np.array([f"kind {row % 2}" for row in rows])
    names = [f"part {row:02d}" for row in rows]  # in the order of the images, so that the draws are the same
    once = evaluate_masks(counts, NAMES[4], types=kinds[::3], resamples=200)
    thrice = evaluate_masks(counts.take(rows), NAMES[4], types=kinds, groups=names, resamples=200)
    loose = evaluate_masks(counts.take(rows), NAMES[4], resamples=200)
    assert (thrice["n"], thrice["n_groups"], once["n_groups"]) == (30, 10, None)
    for name in ("iou", "dice", "boundary_iou", "pooled_iou", "pixel_accuracy"):
        assert list(thrice[name].values()) == pytest.approx(list(once[name].values()), abs=1e-9)
        assert loose[name]["high"] - loose[name]["low"] < 0.8 * (once[name]["high"] - once[name]["low"])
    for kind, entry in once["iou_by_type"].items():
        assert entry["low"] == pytest.approx(thrice["iou_by_type"][kind]["low"], abs=1e-9)
    gain = compare_masks(counts, better, NAMES[4], resamples=200)
    grouped = compare_masks(counts.take(rows), better.take(rows), NAMES[4], groups=names, resamples=200)
    assert list(grouped["iou"].values()) == pytest.approx(list(gain["iou"].values()), abs=1e-9)
    assert grouped["wilcoxon_p"] == pytest.approx(gain["wilcoxon_p"])
    assert compare_masks(counts.take(rows), better.take(rows), NAMES[4], resamples=9)["wilcoxon_p"] < gain["wilcoxon_p"]


def test_by_type_only_where_defined() -> None:
    prediction, truth = blobs(8, n=5, classes=2)
    truth[:3, :4, :4], truth[3:] = 1, 0
    counts = count_masks(prediction, truth, 2)
    figures = evaluate_masks(counts, NAMES[2], types=["dent", "crack", "dent", "good", "dent"], resamples=50)
    iou = image_iou(counts, [1])
    assert list(figures["iou_by_type"]) == ["crack", "dent"]
    assert figures["iou_by_type"]["dent"]["value"] == pytest.approx((iou[0] + iou[2]) / 2)
    assert figures["iou_by_type"]["dent"]["n"] == 2
    assert figures["iou_by_type"]["crack"]["value"] == pytest.approx(iou[1])
    assert "iou_by_type" not in evaluate_masks(counts, NAMES[2], resamples=0)


def test_false_alarms() -> None:
    nothing, dot = np.zeros((3, 4), dtype=int), binary(["....", ".#..", "...."])
    hidden = np.where(dot == 1, VOID, 0)  # the alarm lies in the void: none
    truth = [nothing, nothing, nothing, dot, hidden, np.full((3, 4), VOID)]
    counts = count_masks([dot, nothing, nothing, dot, dot, dot], truth, 2)
    figures = evaluate_masks(counts, NAMES[2], resamples=20)
    assert figures["false_alarms"] == wilson(1, 4).as_dict()
    assert figures["n_defined"] == 1
    parts = [0, 0, 1, 1, 2, 3]
    grouped = evaluate_masks(counts, NAMES[2], groups=parts, resamples=20)["false_alarms"]
    assert grouped == wilson_clustered([True, False, False, False], [0, 0, 1, 2]).as_dict()
    assert "false_alarms" not in evaluate_masks(counts.take([3]), NAMES[2], resamples=0)
    many = count_masks(*blobs(0), 4)
    assert "false_alarms" not in evaluate_masks(many, NAMES[4], resamples=0)


def test_only_what_is_missed_altogether_has_no_distance() -> None:
    dot = binary(["....", ".#..", "...."])
    aside = binary(["....", "...#", "...."])
    figures = evaluate_masks(count_masks([aside, dot * 0], [dot, dot], 2), NAMES[2], resamples=20)
    assert (figures["hd95"]["value"], figures["hd95"]["n"], figures["hd95"]["undefined"]) == (2, 1, 1)


def test_missed_everywhere() -> None:
    dot = binary(["....", ".#..", "...."])
    figures = evaluate_masks(count_masks([dot * 0, dot * 0], [dot, dot], 2), NAMES[2], resamples=20)
    assert figures["hd95"]["value"] is None
    assert (figures["hd95"]["n"], figures["hd95"]["undefined"]) == (0, 2)
    assert figures["iou"]["value"] == figures["dice"]["value"] == figures["boundary_iou"]["value"] == 0


def test_a_class_that_is_nowhere() -> None:
    prediction, truth = blobs(2)
    figures = evaluate_masks(count_masks(prediction, truth, 5), [*NAMES[4], "unicorn"], resamples=20)
    assert figures["pooled_iou_by_class"]["unicorn"] is None
    assert figures["iou_by_class"]["unicorn"]["value"] is None
    assert figures["iou_by_class"]["unicorn"]["n"] == 0
    without = evaluate_masks(count_masks(prediction, truth, 4), NAMES[4], resamples=20)
    assert figures["pooled_iou"] == without["pooled_iou"]
    assert figures["iou"] == without["iou"]


# One method against another


def test_comparison_from_the_pixels() -> None:
    prediction, truth = blobs(9, n=12)
    rng = np.random.default_rng(0)
    refined = np.where(rng.random(truth.shape) < rng.choice([0.0, 0.1], (12, 1, 1)), truth % VOID, prediction)
    refined[:2] = rng.integers(0, 4, refined[:2].shape)  # much worse
    before, after = count_masks(prediction, truth, 4), count_masks(refined, truth, 4)
    kinds = np.array(["tabby", "siamese"] * 6)
    figures = compare_masks(before, after, NAMES[4], types=kinds, resamples=300)
    old, new = (
        np.array([[iou_by_sets(p, t, c) for c in range(4)] for p, t in zip(masks, truth, strict=True)])
        for masks in (prediction, refined)
    )
    gain = np.nanmean(new, axis=1) - np.nanmean(old, axis=1)
    gain[np.abs(gain) < 1e-9] = 0
    assert figures["iou"]["value"] == pytest.approx(gain.mean(), abs=1e-12)
    assert figures["iou"]["low"] < gain.mean() < figures["iou"]["high"]
    assert (figures["better"], figures["worse"], figures["equal"]) == tuple(
        int(part.sum()) for part in (gain > 0, gain < 0, gain == 0)
    )
    assert min(figures["better"], figures["worse"], figures["equal"]) > 0
    assert figures["wilcoxon_p"] == pytest.approx(stats.wilcoxon(gain[gain != 0]).pvalue)
    for number, name in enumerate(NAMES[4]):
        change = new[:, number] - old[:, number]
        assert figures["by_class"][name]["value"] == pytest.approx(np.nanmean(change), abs=1e-12)
        assert figures["by_class"][name]["n"] == np.isfinite(change).sum()
    for kind in ("tabby", "siamese"):
        assert figures["by_type"][kind]["value"] == pytest.approx(gain[kinds == kind].mean(), abs=1e-12)
    first, second = (evaluate_masks(counts, NAMES[4], resamples=0) for counts in (before, after))
    for name in ("iou", "pooled_iou", "boundary_iou"):
        assert figures[name]["value"] == pytest.approx(second[name]["value"] - first[name]["value"], abs=1e-12)


def test_the_pairing_takes_out_what_images_have_in_common() -> None:
    prediction, truth = blobs(10, n=30, size=(16, 16), void=0)
    slightly = prediction.copy()
    slightly[:, 8, 8] = truth[:, 8, 8]
    before, after = count_masks(prediction, truth, 4), count_masks(slightly, truth, 4)
    alone = evaluate_masks(before, NAMES[4], resamples=200)
    together = compare_masks(before, after, NAMES[4], resamples=200)
    for name in ("iou", "pooled_iou"):
        width = together[name]["high"] - together[name]["low"]
        assert 0 < width < (alone[name]["high"] - alone[name]["low"]) / 5


def test_with_groups_their_mean_gains_are_tested() -> None:
    prediction, truth = blobs(11, n=14)
    changed = np.where(truth == 3, 3, prediction)
    changed[:4, ::3] = 0  # the largest group, and another, get worse
    changed[8, ::2] = 0
    before, after = count_masks(prediction, truth, 4), count_masks(changed, truth, 4)
    parts = np.array(list("aaaabbcdefghij"))
    gain = image_iou(after, range(4)) - image_iou(before, range(4))
    means, sums = (np.array([of(gain[parts == part]) for part in "abcdefghij"]) for of in (np.mean, np.sum))
    assert stats.wilcoxon(means[means != 0]).pvalue != stats.wilcoxon(sums[sums != 0]).pvalue
    figures = compare_masks(before, after, NAMES[4], groups=parts, resamples=20)
    assert figures["wilcoxon_p"] == stats.wilcoxon(means[means != 0]).pvalue


def test_rounding_is_no_gain() -> None:
    def image(hits: list[int]) -> MaskCounts:
        """Three classes of ten pixels each; those that are not hit are called background."""
        confusion = np.diag([10, *hits])
        confusion[1:, 0] = 10 - np.array(hits)
        return MaskCounts(confusion[None], np.zeros((1, 4, 2), dtype=np.int64), np.zeros((1, 4)))

    before, after = image([1, 2, 3]), image([3, 2, 1])
    assert image_iou(before, range(4)) != image_iou(after, range(4))  # the same sum in another order
    figures = compare_masks(before, after, NAMES[4], resamples=0)
    assert (figures["equal"], figures["wilcoxon_p"]) == (1, None)


def test_a_method_against_itself() -> None:
    counts = count_masks(*blobs(0), 4)
    figures = compare_masks(counts, counts, NAMES[4], resamples=50)
    assert figures["wilcoxon_p"] is None
    assert (figures["better"], figures["worse"], figures["equal"]) == (0, 0, 6)
    assert figures["iou"]["value"] == figures["pooled_iou"]["value"] == 0


def test_another_truth_is_no_pair() -> None:
    prediction, truth = blobs(0)
    with pytest.raises(ValueError, match="same truth"):
        compare_masks(count_masks(prediction, truth, 4), count_masks(prediction, truth[::-1], 4), NAMES[4])


# What comes out


def test_results_are_plain_json_and_repeat() -> None:
    prediction, truth = blobs(6, n=9, classes=2)
    truth[:, :4, :4], truth[0], truth[1] = 1, 0, VOID
    counts = count_masks(prediction, truth, 2)
    kinds, parts = list("abcabcabc"), [0, 0, 1, 1, 2, 3, 4, 5, 6]
    other = count_masks(np.where(truth == 1, 1, prediction), truth, 2)
    for function, args in ((evaluate_masks, (counts,)), (compare_masks, (counts, other))):
        results = [function(*args, NAMES[2], types=kinds, groups=parts, resamples=50, seed=seed) for seed in (3, 3, 4)]
        assert json.dumps(results[0], allow_nan=False) == json.dumps(results[1])
        assert results[0]["iou"]["value"] == results[2]["iou"]["value"]
        assert results[0]["pooled_iou"]["low"] != results[2]["pooled_iou"]["low"]


@pytest.mark.parametrize("classes", [2, 4])
def test_no_images(classes: int) -> None:
    none = np.zeros((0, 5, 5), dtype=int)
    counts = count_masks(none, none, classes)
    figures = evaluate_masks(counts, NAMES[classes], types=[], groups=[])
    assert (figures["n"], figures["n_defined"], figures["iou"]["value"]) == (0, 0, None)
    assert compare_masks(counts, counts, NAMES[classes])["wilcoxon_p"] is None
    json.dumps(figures, allow_nan=False)


def test_arguments_that_do_not_fit() -> None:
    counts = count_masks(*blobs(0), 4)
    with pytest.raises(ValueError, match="2 class names for counts of 4"):
        evaluate_masks(counts, NAMES[2])
    with pytest.raises(ValueError, match="must differ"):
        evaluate_masks(counts, ["a", "b", "b", "c"])
    with pytest.raises(ValueError, match="one type for each of 6"):
        evaluate_masks(counts, NAMES[4], types=["a"])
    with pytest.raises(ValueError, match="one group for each of 6"):
        compare_masks(counts, counts, NAMES[4], groups=[1, 2])
