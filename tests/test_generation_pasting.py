"""Paste-back bit by bit, feathers against brute force, and the rule of judgement sentence by sentence."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image
from skimage.measure import label

from lit_defect.errors import UserError
from lit_defect.generation.judgement import (
    Contrasts,
    EditRule,
    Measures,
    Rule,
    change,
    contrast_gain,
    covered,
    likeness,
    outside,
    seam,
    stands_out,
    weakened,
)
from lit_defect.generation.pasting import Place, feathered, repair_label

RULE = Rule(least_change=5, least_covered=0.5)


def disc(size: tuple[int, int], centre: tuple[float, float], radius: float) -> np.ndarray:
    y, x = np.mgrid[: size[0], : size[1]]
    return (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2


def box(size: tuple[int, int], top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def colours(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


# --- paste-back ---


def paste_back(normal, generated, mask, feather, reconstructed=None, gain=1.0):
    place = Place(normal, mask, feather, reconstructed)
    return place.blended(place.enlarged(generated), gain), place.mask


@pytest.mark.parametrize("size", [(256, 301), (33, 20), (17, 90)])
@pytest.mark.parametrize("corner", [(0, 0), (9, 5), (26, 18)])
def test_pixels_are_those_of_the_whole_picture_at_the_new_size(size, corner):
    """At the picture's edges, too; the whole one is resized by Pillow, and then cut."""
    top, left = corner
    mask = box((32, 24), top, left, top + 6, left + 6)
    generated, before = np.random.default_rng(3).random((2, 32, 24, 3)).astype(np.float32)
    before /= 4  # so that the sums below stay within the grey levels

    def whole(picture):
        channels = [Image.fromarray(np.ascontiguousarray(picture[..., c])) for c in range(3)]
        scaled = [np.asarray(one.resize(size[::-1], Image.Resampling.BICUBIC)) for one in channels]
        return 255 * np.stack(scaled, axis=2).clip(0, 1)

    normal = colours(size)
    result, marked = paste_back(normal, generated, mask, 0)
    np.testing.assert_allclose(result[marked], whole(generated)[marked], atol=0.501)
    assert marked.any()
    assert np.array_equal(result[~marked], normal[~marked])
    normal = 64 + normal // 4
    result, marked = paste_back(normal, generated / 4, mask, 0, before)
    np.testing.assert_allclose(result[marked], (normal + whole(generated / 4) - whole(before))[marked], atol=0.501)


def test_only_the_surroundings_of_the_mask_are_enlarged_and_each_picture_once(monkeypatch):
    resize, sizes = Image.Image.resize, []
    monkeypatch.setattr(
        Image.Image, "resize", lambda one, size, *a, **k: sizes.append(size) or resize(one, size, *a, **k)
    )
    mask, pictures = box((256, 320), 80, 150, 96, 165), np.random.default_rng(0).random((3, 64, 64, 3))
    place = Place(colours((256, 320)), mask, 2, pictures[0])
    for picture in pictures[1:]:
        enlarged = place.enlarged(picture)
        place.blended(enlarged, 2.0)
        place.blended(enlarged, 0.5)
    assert sizes == [(17, 18)] * 9, "three channels of the reconstruction and of two candidates"


@pytest.mark.parametrize("size", [(32, 24), (75, 90), (13, 17)])
@pytest.mark.parametrize("feather", [0.0, 2.5])
def test_outside_the_mask_every_pixel_is_the_normal_pictures(size, feather):
    normal, generated = colours(size), np.random.default_rng(1).random((32, 24, 3)).astype(np.float32)
    result, mask = paste_back(normal, generated, disc((32, 24), (15, 12), 6), feather)
    assert result.dtype == np.uint8
    assert mask.shape == size
    np.testing.assert_array_equal(result[~mask], normal[~mask])
    assert (result[mask] != normal[mask]).any(axis=1).mean() > 0.9
    area = disc((32, 24), (15, 12), 6).mean()
    assert mask.mean() == pytest.approx(area, abs=0.02)


def test_what_lies_around_the_mask_does_not_matter():
    """Within a wide margin the picture and its label are those without it."""
    rng = np.random.default_rng(11)
    margin, inner = ((9, 5), (3, 8)), np.s_[9:33, 3:23]
    for _ in range(30):
        normal, generated = colours((24, 20), int(rng.integers(1000))), rng.random((24, 20, 3))
        mask = np.pad(rng.random((22, 18)) < 0.7, 1)
        wide = [np.pad(one, (*margin, (0, 0))[: one.ndim], mode) for one, mode in (
            (normal, "reflect"), (generated, "reflect"), (mask, "constant"))]  # fmt: skip
        (small, marked), (large, marked_too) = paste_back(normal, generated, mask, 2), paste_back(*wide, 2)
        assert np.array_equal(small, large[inner])
        label_of, label_too = repair_label(normal, small, marked, 60), repair_label(wide[0], large, marked_too, 60)
        assert np.array_equal(label_of, label_too[inner])
        assert 0 < label_of.sum() == label_too.sum() < mask.sum()


def test_without_feather_the_inside_is_the_generated_picture():
    normal, mask = colours((20, 30)), disc((20, 30), (9, 12), 5)
    generated = colours((20, 30), 1)
    result, kept = paste_back(normal, generated / 255, mask, 0)
    np.testing.assert_array_equal(kept, mask)
    np.testing.assert_array_equal(result, np.where(mask[..., None], generated, normal))


def test_inside_it_is_the_mixture_that_the_weights_say():
    normal, mask, generated = (
        colours((20, 30)),
        disc((20, 30), (9, 12), 7),
        np.random.default_rng(1).random((20, 30, 3)),
    )
    result, _ = paste_back(normal, generated, mask, 3)
    weight = feathered(mask, 3)
    for y, x in np.argwhere(mask):
        expected = weight[y, x] * generated[y, x] * 255 + (1 - weight[y, x]) * normal[y, x]
        np.testing.assert_allclose(result[y, x], expected, atol=0.5001)


def test_a_grey_picture_stays_grey():
    normal = np.repeat(colours((20, 30))[..., :1], 3, axis=2)
    generated = np.zeros((20, 30, 3))
    generated[..., 0] = 0.6
    result, mask = paste_back(normal, generated, disc((20, 30), (9, 12), 5), 0)
    assert (result == result[..., :1]).all()
    assert (result[mask] == 51).all()  # 0.6 * 255 / 3


def test_a_defect_of_one_pixel_is_there_at_every_size():
    mask, generated = box((16, 16), 7, 9, 8, 10), np.ones((16, 16, 3))
    for size in ((16, 16), (64, 48), (9, 8)):
        result, kept = paste_back(np.zeros((*size, 3), np.uint8), generated, mask, 4)
        assert kept.any()
        assert result.max() == 255


def test_nothing_that_is_no_number_gets_into_a_picture():
    normal, mask, generated = colours((20, 30)), disc((20, 30), (9, 12), 5), np.ones((20, 30, 3))
    generated[9, 12] = np.nan
    generated[9, 13] = np.inf
    result, _ = paste_back(normal, generated, mask, 0)
    np.testing.assert_array_equal(result[9, 12], normal[9, 12])
    np.testing.assert_array_equal(result[9, 13], normal[9, 13])
    assert (result[8, 12] == 255).all()


def test_an_empty_mask_changes_nothing():
    normal = colours((20, 30))
    result, mask = paste_back(normal, np.ones((10, 15, 3)), np.zeros((10, 15), bool), 2)
    np.testing.assert_array_equal(result, normal)
    assert not mask.any()


# --- the feather ---


def brute_depth(mask: np.ndarray) -> np.ndarray:
    """Distance of each pixel to the nearest one outside, by looking at all."""
    outside = np.argwhere(~mask)
    depth = np.zeros(mask.shape)
    for y, x in np.argwhere(mask):
        depth[y, x] = np.sqrt(((outside - (y, x)) ** 2).sum(axis=1)).min() if len(outside) else math.inf
    return depth


def test_in_a_wide_mask_weights_rise_over_the_feather():
    mask = disc((60, 60), (30, 30), 22)
    weight = feathered(mask, 4)
    depth = brute_depth(mask)
    assert (weight[~mask] == 0).all()
    np.testing.assert_allclose(weight[mask], np.clip((depth[mask] - 0.5) / 4, 0, 1), atol=0.13)
    rim = np.isclose(depth, 1) & mask
    np.testing.assert_allclose(weight[rim], 0.125, atol=0.05)
    assert (weight[depth >= 4.5] == 1).all()


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_thin_cracks_have_full_weight_along_their_middle_beside_a_large_stain(width):
    mask = disc((60, 90), (30, 20), 15) | box((60, 90), 28, 20, 28 + width, 80)
    weight = feathered(mask, 6)
    assert (weight[28 : 28 + width, 40:75].max(axis=0) == 1).all()
    assert weight[30, 6] < 0.2  # the stain's own rim


def test_every_part_of_any_mask_reaches_one():
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = np.kron(rng.random((10, 12)) > 0.7, np.ones((3, 3), bool)) & (rng.random((30, 36)) > 0.1)
        weight, parts = feathered(mask, float(rng.uniform(0.3, 6))), label(mask, connectivity=1)
        assert ((weight > 0) == mask).all()
        for part in range(1, parts.max() + 1):
            assert weight[parts == part].max() == 1


def test_a_corner_is_no_crack():
    weight = feathered(box((40, 40), 5, 5, 35, 35), 4)
    assert weight[5, 5] == weight[5, 6] == weight[20, 5] == 0.125
    assert weight[6, 6] == weight[20, 6] == 0.375


def test_weights_do_not_depend_on_what_is_far_away():
    small = disc((30, 30), (15, 15), 8)
    alone = feathered(small, 3)
    together = np.zeros((90, 90), bool)
    together[40:70, 50:80] = small
    together[2, 2] = True
    np.testing.assert_allclose(feathered(together, 3)[40:70, 50:80], alone)


def test_the_frame_of_the_picture_is_no_border():
    weight = feathered(box((20, 20), 0, 0, 10, 20), 3)
    assert (weight[0] == 1).all()
    assert (weight[9] < 0.2).all()
    assert (feathered(np.ones((5, 5), bool), 3) == 1).all()


# --- the label ---


def test_the_label_is_the_part_of_the_mask_that_changed():
    normal = np.full((20, 30, 3), 100, np.uint8)
    result, mask = normal.copy(), box((20, 30), 5, 5, 15, 25)
    result[5:15, 5:15] = 110
    result[0:3, 0:3] = 200  # not asked for
    np.testing.assert_array_equal(repair_label(normal, result, mask, 8), box((20, 30), 5, 5, 15, 15))
    assert not repair_label(normal, result, mask, 10.5).any()
    result[3:5], result[5] = 200, 100  # nor is what lies close to the mask
    np.testing.assert_array_equal(repair_label(normal, result, mask, 10), box((20, 30), 6, 5, 15, 15))


def test_darker_counts_as_brighter_and_channels_are_averaged():
    normal = np.full((5, 5, 3), 100, np.uint8)
    result = normal.copy()
    result[2, 2] = (70, 100, 100)
    everywhere = np.ones((5, 5), bool)
    assert repair_label(normal, result, everywhere, 10).sum() == 1
    assert repair_label(normal, result, everywhere, 10.1).sum() == 0


def test_what_a_change_encloses_is_of_the_label_and_a_bay_is_not():
    normal = np.full((20, 30, 3), 100, np.uint8)
    mask = box((20, 30), 3, 3, 17, 27)
    result = np.where(mask[..., None], np.uint8(110), normal)
    result[6:11, 6:11] = 100  # a hole
    result[5:14, 20:27] = 100  # a bay, open to the mask's border
    label = repair_label(normal, result, mask, 5)
    assert label[6:11, 6:11].all()
    assert not label[7:12, 22:27].any()
    assert label.sum() > 0.7 * mask.sum()


# --- measures ---


def test_change_is_the_mean_of_grey_levels_on_either_side():
    normal, generated, mask = colours((9, 7)), colours((9, 7), 1), box((9, 7), 2, 2, 5, 6)
    sums, numbers = {True: 0.0, False: 0.0}, {True: 0, False: 0}
    for y in range(9):
        for x in range(7):
            for channel in range(3):
                sums[mask[y, x]] += abs(float(normal[y, x, channel]) - float(generated[y, x, channel]))
                numbers[mask[y, x]] += 1
    inside, outside = change(normal / 255, generated / 255, mask)
    assert inside == pytest.approx(sums[True] / numbers[True])
    assert outside == pytest.approx(sums[False] / numbers[False])
    assert change(normal / 255, generated / 255, np.zeros((9, 7), bool))[0] == 0
    assert change(normal / 255, generated / 255, np.ones((9, 7), bool))[1] == 0
    assert math.isnan(change(normal / 255, np.full((9, 7, 3), np.nan), mask)[0])


def test_covered_is_the_share_of_what_was_asked_for():
    asked = box((10, 10), 0, 0, 4, 5)
    assert covered(asked, box((10, 10), 0, 0, 4, 3)) == pytest.approx(0.6)
    assert covered(asked, np.zeros((10, 10), bool)) == 0
    assert covered(np.zeros((10, 10), bool), asked) == 0


def test_likeness_is_minus_the_nearest_distance_in_standard_deviations():
    real = np.array([[0.0, 10.0], [2.0, 30.0], [4.0, 50.0]])
    spread = [math.sqrt(8 / 3), math.sqrt(800 / 3)]
    candidate = np.array([3.0, 20.0])
    by_hand = [
        math.sqrt((((candidate[0] - row[0]) / spread[0]) ** 2 + ((candidate[1] - row[1]) / spread[1]) ** 2) / 2)
        for row in real
    ]
    assert likeness(candidate, real) == pytest.approx(-min(by_hand))
    assert likeness(real[1], real) == 0
    assert likeness(candidate * 7, real * 7) == pytest.approx(-min(by_hand))  # units do not matter
    assert likeness(np.array([3.0, 2.0]), np.array([[0.0, 6.0], [0.0, 6.0]])) == pytest.approx(-math.sqrt(25 / 2))


@pytest.mark.parametrize(("apart", "spread"), [(0.0, 1 / 8), (1e-9, 1 / 8), (0.9, 0.45)])
def test_what_few_real_defects_agree_in_by_chance_does_not_decide(apart, spread):
    """The other spread is 1, so their mean is a half or more, and a quarter of that the least of two defects."""
    real = np.array([[0.0, 0.0], [apart, 2.0]])
    assert likeness(np.array([-0.01, 0.0]), real) == pytest.approx(-0.01 / spread / math.sqrt(2))
    assert likeness(np.array([-0.01, 0.0]), real) > likeness(np.array([0.0, -0.5]), real)


@pytest.mark.parametrize("shapes", [((2,), (1, 2)), ((3,), (4, 2)), ((2,), (2,))])
def test_descriptors_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError, match="descriptors"):
        likeness(np.zeros(shapes[0]), np.zeros(shapes[1]))


# --- the rule ---


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        (Measures(5, 1, 0.5), None),
        (Measures(4.9, 1, 0.5), "nothing changed"),
        (Measures(5, 1, 0.49), "label mostly lost"),
        (Measures(5, 1, 0.5, mask_fault="too small"), "mask: too small"),
        (Measures(math.nan, 1, 0.5), "not a number"),
        (Measures(5, math.inf, 0.5), "not a number"),
        (Measures(5, 1, math.nan), "not a number"),
        (Measures(5, 1, 0.5, -math.inf), "not a number"),
        (Measures(0, 1, 0, mask_fault="empty"), "nothing changed"),
        (Measures(9, 1, 0, mask_fault="empty"), "label mostly lost"),
    ],
)
def test_why_a_candidate_is_rejected(candidate, reason):
    verdict = RULE.judge([candidate])
    assert verdict.reasons == (reason,)
    assert verdict.chosen == (0 if reason is None else None)
    assert verdict.reason == (reason or "")


def test_of_those_left_the_most_like_the_real_ones_is_taken():
    verdict = RULE.judge(
        [
            Measures(1, 0, 1, -0.1),
            Measures(9, 0, 1, -3.0),
            Measures(9, 0, 1, -2.0),
            Measures(9, 0, 1, -2.0),
            Measures(1, 0, 1),
        ]
    )
    assert verdict.chosen == 2  # the first of equals
    assert verdict.reasons == ("nothing changed", None, None, None, "nothing changed")
    assert verdict.rejected == {"nothing changed": 2}


def test_when_all_are_rejected_the_most_frequent_reason_is_told():
    verdict = RULE.judge([Measures(9, 0, 0.1), Measures(0, 0, 1), Measures(0, 0, 1)])
    assert verdict.chosen is None
    assert verdict.reason == "nothing changed"
    assert verdict.rejected == {"nothing changed": 2, "label mostly lost": 1}
    assert RULE.judge([]).reason == "no candidates"


@pytest.mark.parametrize(("name", "value"), [("least_change", -1), ("least_change", math.nan), ("least_covered", 1.1)])
def test_a_rule_out_of_range_names_its_key(name, value):
    with pytest.raises(UserError, match=rf"generation\.{name} = "):
        Rule(**{"least_change": 5, "least_covered": 0.5, name: value})
    with pytest.raises(UserError, match=rf"model\.init_args\.edit\.{name} = "):
        EditRule(**{"least_change": 5, "least_covered": 0.5, name: value})


# --- edits ---


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        (Measures(40, 1, 0.5, seam=6.0), None),
        (Measures(5, 1, 0.5, seam=-30.0), None),
        (Measures(4.9, 1, 0.5), "nothing changed"),
        (Measures(9, 1, 0.49), "label mostly lost"),
        (Measures(9, 1, 0.5, mask_fault="too small"), "mask: too small"),
        (Measures(40.1, 1, 0.5), "another picture"),
        (Measures(40, 1, 0.5, seam=6.1), "its border shows"),
        (Measures(41, 1, 0.1, seam=9.0), "label mostly lost"),
        (Measures(9, 1, 0.5, seam=math.nan), "not a number"),
        (Measures(math.inf, 1, 0.5), "not a number"),
    ],
)
def test_why_an_edit_is_rejected(candidate, reason):
    rule = EditRule(least_change=5, least_covered=0.5, most_change=40, most_seam=6)
    assert rule.judge([candidate]).reasons == (reason,)


def test_an_edit_may_change_all_of_it_where_no_limit_is_set():
    verdict = EditRule(least_change=5, least_covered=0.5).judge([Measures(254, 200, 1, seam=200.0)])
    assert (verdict.chosen, verdict.rejected) == (0, {})


@pytest.mark.parametrize(
    ("candidates", "chosen"),
    [
        ([(-2.0, 0.0), (-1.0, 9.0), (-1.5, 0.0)], 1),  # likeness and seam
        ([(-2.0, 5.0), (-2.0, 3.0), (-2.0, 3.0)], 1),
        ([(0.0, 4.0), (0.0, 2.0), (0.0, 3.0)], 1),  # nothing to compare with
        ([(0.0, 4.0), (0.0, -1.0), (0.0, -9.0)], 1),  # smoother than the source is no better than the source
    ],
)
def test_of_the_edits_left_likeness_decides_and_then_the_border(candidates, chosen):
    measures = [Measures(9, 0, 1, likeness, seam=border) for likeness, border in candidates]
    assert EditRule(least_change=5, least_covered=0.5).judge(measures).chosen == chosen


@pytest.mark.parametrize(("name", "value"), [("most_change", 5), ("most_change", math.nan), ("most_seam", -1)])
def test_limits_of_edits_out_of_range_name_their_key(name, value):
    with pytest.raises(UserError, match=rf"model\.init_args\.edit\.{name} = "):
        EditRule(**{"least_change": 5, "least_covered": 0.5, name: value})


def test_what_an_edit_did_outside_is_told_of_the_pixels_there():
    source = np.full((4, 5, 3), 100, np.uint8)
    mask = box((4, 5), 0, 0, 2, 5)  # half of the pixels
    edited = source.copy()
    edited[:2] = 0
    edited[3, 0] = (90, 100, 103)
    found = outside(source, edited, mask)
    assert found == pytest.approx((13 / 30, 10, 1 / 10))
    assert outside(source, source, mask) == (0, 0, 0)
    assert outside(source, edited, np.ones((4, 5), bool)) == (0, 0, 0)
    assert outside(source, edited) == pytest.approx(((10 * 300 + 13) / 60, 100, 11 / 20))
    faint = source + np.where(np.arange(5)[:, None] < 2, 0.4, 0.6)  # of floats, what rounds to another grey level
    assert outside(source, faint, mask).share == pytest.approx(3 / 5)


def test_a_seam_is_the_step_across_the_border_beyond_the_sources_own():
    source = np.full((6, 8, 3), 100, np.uint8)
    source[:, 4:] = 110  # an edge of the source along the mask's right side
    mask = box((6, 8), 0, 1, 6, 4)
    edited = source.astype(float)
    edited[mask] += 20
    # 6 pairs on the left with a step of 20, 6 on the right with one of 10, where the source has 10
    assert seam(edited, mask, source) == pytest.approx((6 * 20 + 6 * 10) / 12 - 10 / 2)
    assert seam(source, mask, source) == 0
    assert seam(np.full_like(source, 100), mask, source) == pytest.approx(-5)
    for nothing in (np.zeros((6, 8), bool), np.ones((6, 8), bool)):
        assert seam(edited, nothing, source) == 0


def test_a_seam_counts_rows_as_columns_and_averages_channels():
    source = np.zeros((7, 9, 3), np.uint8)
    mask = box((7, 9), 2, 3, 5, 8)
    edited = source.copy()
    edited[mask] = (30, 0, 0)
    edited[0] = 255  # not at the border
    assert seam(edited, mask, source) == pytest.approx(10)
    assert seam(edited.transpose(1, 0, 2), mask.T, source.transpose(1, 0, 2)) == pytest.approx(10)


def test_a_change_keeps_the_grain_of_the_normal_picture():
    rng = np.random.default_rng(0)
    normal = rng.integers(60, 180, (20, 30, 3), dtype=np.uint8)
    mask = np.zeros((20, 30), bool)
    mask[5:15, 8:20] = True
    flat = np.full((20, 30, 3), 0.5)  # an autoencoder that keeps nothing of the grain
    result, _ = paste_back(normal, flat - 0.1, mask, 0, flat)
    assert np.array_equal(result[~mask], normal[~mask])
    assert np.array_equal(result[mask], np.rint(normal[mask] - 25.5).astype(np.uint8))
    assert np.array_equal(paste_back(normal, flat, mask, 0, flat)[0], normal)  # where nothing changes, nothing does


def test_a_gain_enlarges_the_change():
    normal = np.full((8, 8, 3), 100, np.uint8)
    flat, mask = np.full((8, 8, 3), 0.5), box((8, 8), 2, 2, 6, 6)
    result, _ = paste_back(normal, flat - 0.05, mask, 0, flat, gain=2.5)
    assert set(np.unique(result[mask])) == {68}  # 100 - 0.05 * 2.5 * 255
    assert (result[~mask] == 100).all()


def test_what_stands_out_is_measured_against_a_ring():
    picture = np.full((60, 80, 3), 90.0)
    mask = box((60, 80), 20, 30, 30, 45)
    picture[mask] = 50
    picture[:12] = 250  # farther away than the ring
    assert stands_out(picture, mask) == pytest.approx(-40)
    assert stands_out(picture, np.zeros((60, 80), bool)) == math.inf
    assert stands_out(picture, np.ones((60, 80), bool)) == math.inf


def test_the_gain_is_the_slope_through_zero_between_one_and_four():
    assert contrast_gain([-20.0, 40.0, math.inf], [-10.0, 20.0, 3.0]) == pytest.approx(2)
    assert contrast_gain([10.0, -4.0], [5.0, 3.0]) == pytest.approx((50 - 12) / 34)
    assert contrast_gain([10.0], [20.0]) == 1
    assert contrast_gain([100.0], [1.0]) == 4
    assert contrast_gain([], []) == 1


def test_limits_of_contrast_are_those_of_the_real_ones():
    real = [-10.0, 20.0, -30.0, 40.0, 50.0, math.inf, math.nan]
    found = Contrasts.of(real, 0.25, 0.25)
    assert (found.least, found.most) == (20, 40)
    drawn = {found.one(np.random.default_rng(seed)) for seed in range(50)}
    assert drawn == {20, 30, 40}
    free = Contrasts.of(real, 0, 0)
    assert (free.least, free.most) == (0, math.inf)
    nothing = Contrasts.of([math.inf], 0.1, 0.1)
    assert (nothing.least, nothing.most, nothing.one(np.random.default_rng(0))) == (0, math.inf, math.inf)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("wanted", [5.0, 12.0, 20.0])
def test_a_weakened_defect_stands_out_as_wanted(sign, wanted):
    """The place itself is 3 grey levels brighter than its surroundings."""
    normal = np.full((40, 40, 3), 120, np.uint8)
    mask = disc((40, 40), (20, 20), 6)
    normal[mask] = 123
    generated, before = (np.full((40, 40, 3), level / 255) for level in (120 + 18 * sign, 120))
    pasted = [paste_back(normal, generated, mask, 0.0, before, 2.0)[0]]
    plain, found = stands_out(normal, mask), stands_out(pasted[0], mask)
    gain = weakened(2.0, plain, found, wanted)
    assert 0 < gain < 2
    assert stands_out(paste_back(normal, generated, mask, 0.0, before, gain)[0], mask) == pytest.approx(
        math.copysign(wanted, found), abs=0.5
    )


def test_a_change_is_never_enlarged_nor_turned_round():
    assert weakened(2.0, 0.0, 10.0, 15.0) == 2.0
    assert weakened(2.0, 8.0, 10.0, 4.0) == 0.0
    assert weakened(2.0, 5.0, 5.0, 3.0) == 2.0, "the change does not tell"


def test_a_candidate_fainter_than_real_ones_is_rejected():
    rule = Rule(1.0, 0.1, least_contrast=8.0)
    verdict = rule.judge([Measures(9, 0, 1, contrast=7.9), Measures(9, 0, 1, contrast=8.0)])
    assert verdict.chosen == 1
    assert verdict.reasons == ("fainter than real ones", None)
    assert rule.judge([Measures(9, 0, 1, contrast=math.nan)]).reason == "not a number"
